"""Small random MiniMax-M2 checkpoints in the published format, tokenizer included, for demos and tests.

    python -m sglang_minimax.checkpoints FOLDER [--num-hidden-layers 3 --dtype bfloat16 ...]

The weights are random but not careless. They are drawn so that a serving mistake shows in the answer:

- QK norm spans all heads, so heads differ in size by up to 4x: a rank that normalises over its own heads
  alone, or counts a replicated KV head twice, divides by another number.
- The mean square of q and k is about ten times ``rms_norm_eps``: an eps added in the wrong place shows.
- Every norm weight is different: a shard taken from the wrong head shows.
- The correction bias is as large as the spread of the router's scores: leaving it out picks other experts,
  and weighting experts by the corrected score instead of the score gives other sums.
- What attention and experts add to the residual stream is of the size of what the embedding brought.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SPECIAL_TOKENS = ("]!p~[", "]~!b[", "[e~[")  # padding, begin, end: the last ids of the vocabulary
DTYPES = ("float32", "bfloat16")
# As the published models' it names the tools, and opens the thinking.
CHAT_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool['function']['name'] }} {% endfor %}"
    "{% for message in messages %}{{ message['content'] }}{% endfor %}<think>"
)

_NUM_BYTES = 256  # a byte-level vocabulary starts with the single bytes
_MEAN_SQUARE_IN_EPS = 10.0  # of q and k before QK norm
_QUIET = 0.1  # scale of lm_head's rows for single bytes and special tokens, so that text is made of words


@dataclass(frozen=True)
class SmallModel:
    """The shape of a small MiniMax-M2. The names are the published config's.

    With the defaults TP16 is valid and puts each of the 8 KV heads on two ranks.

    Raises:
        ValueError: the shape is none that MiniMax-M2 can have.
    """

    num_hidden_layers: int = 3
    hidden_size: int = 256
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 64
    num_local_experts: int = 16
    num_experts_per_tok: int = 4
    intermediate_size: int = 256
    vocab_size: int = 1024
    max_position_embeddings: int = 4096
    rope_theta: float = 5_000_000
    rms_norm_eps: float = 1e-6
    num_mtp_modules: int = 0
    dtype: str = "float32"
    seed: int = 1

    def __post_init__(self) -> None:
        def check(holds: bool, rule: str) -> None:
            if not holds:
                raise ValueError(f"{rule}; this shape is {self}")

        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and field.name not in ("num_mtp_modules", "seed"):
                check(value > 0, f"{field.name}={value} must be positive")
        check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads={self.num_attention_heads} must be a multiple of "
            f"num_key_value_heads={self.num_key_value_heads}",
        )
        check(
            self.head_dim % 4 == 0,
            f"head_dim={self.head_dim} must be a multiple of 4: half of it is rotated, in pairs",
        )
        check(
            self.num_experts_per_tok <= self.num_local_experts,
            f"num_experts_per_tok={self.num_experts_per_tok} must not exceed "
            f"num_local_experts={self.num_local_experts}",
        )
        smallest = _NUM_BYTES + len(SPECIAL_TOKENS)
        check(
            self.vocab_size >= smallest,
            f"vocab_size={self.vocab_size} must be at least {smallest}: every byte and the special tokens",
        )
        check(self.dtype in DTYPES, f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")

    @property
    def rotary_dim(self) -> int:
        """How many of the ``head_dim`` dimensions are rotated: half of them, as in the published models."""
        return self.head_dim // 2


def write_checkpoint(folder: str | Path, model: SmallModel | None = None) -> Path:
    """Writes config, weights, tokenizer, chat template and generation config of ``model`` into ``folder``; returns it.

    The folder is made if need be; files of the same names are overwritten. The same shape and seed give
    the same weights and the same tokenizer.
    """
    from safetensors.torch import save_file

    model = model or SmallModel()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", published_config(model))
    # Greedy, so that a client that leaves sampling alone gets the same answer twice.
    _write_json(
        folder / "generation_config.json",
        {"do_sample": False, "bos_token_id": model.vocab_size - 2, "eos_token_id": model.vocab_size - 1},
    )
    write_tokenizer(folder, model.vocab_size)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    save_file(dict(published_weights(model)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def published_config(model: SmallModel) -> dict[str, Any]:
    """``config.json`` with the published models' keys.

    RoPE is written twice: the engine and the published code read ``rotary_dim`` and ``rope_theta``,
    transformers reads ``rope_parameters``. Both are needed for the two to rotate the same dimensions.
    """
    config = {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "dtype": model.dtype,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": model.vocab_size - 2,
        "eos_token_id": model.vocab_size - 1,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "shared_intermediate_size": 0,
        "use_mtp": model.num_mtp_modules > 0,
        "num_mtp_modules": model.num_mtp_modules,
        "mtp_transformer_layers": 1,
        "rotary_dim": model.rotary_dim,
        "rope_theta": model.rope_theta,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": model.rope_theta,
            "partial_rotary_factor": model.rotary_dim / model.head_dim,
        },
    }
    same_name = (
        "num_hidden_layers hidden_size num_attention_heads num_key_value_heads head_dim num_local_experts "
        "num_experts_per_tok intermediate_size vocab_size max_position_embeddings rms_norm_eps"
    )
    return config | {name: getattr(model, name) for name in same_name.split()}


# ---------------------------------------------------------------------------------------------- weights


def published_weights(model: SmallModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields ``(name, tensor)`` in the published layout: one tensor a projection and an expert, none fused.

    Projections are ``[out, in]`` in ``model.dtype``. The router's weight ``[experts, hidden]`` and
    correction bias ``[experts]`` are float32, as published, whatever the dtype. MTP modules follow the last
    layer as further layers, with the names that speculative decoding adds.
    """
    draw = _Draw(model)
    hidden, vocab = model.hidden_size, model.vocab_size
    yield "model.embed_tokens.weight", draw.normal(vocab, hidden, std=1.0)
    for layer in range(model.num_hidden_layers):
        yield from _decoder_layer(draw, f"model.layers.{layer}")
    yield "model.norm.weight", draw.norm_weight(hidden)
    # Logits with a standard deviation of 3: peaked enough for a clear winner, far from one-hot.
    lm_head = draw.normal(vocab, hidden, std=3.0 / math.sqrt(hidden))
    lm_head[:_NUM_BYTES] *= _QUIET
    lm_head[-len(SPECIAL_TOKENS) :] *= _QUIET
    yield "lm_head.weight", lm_head
    for module in range(model.num_mtp_modules):
        prefix = f"model.layers.{model.num_hidden_layers + module}"
        yield f"{prefix}.enorm.weight", draw.norm_weight(hidden)
        yield f"{prefix}.hnorm.weight", draw.norm_weight(hidden)
        yield f"{prefix}.eh_proj.weight", draw.normal(hidden, 2 * hidden)
        yield from _decoder_layer(draw, prefix)


def _decoder_layer(draw: _Draw, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    model = draw.model
    hidden = model.hidden_size
    yield f"{prefix}.input_layernorm.weight", draw.norm_weight(hidden)
    yield from _attention(draw, f"{prefix}.self_attn")
    yield f"{prefix}.post_attention_layernorm.weight", draw.norm_weight(hidden)
    yield from _experts(draw, f"{prefix}.block_sparse_moe")


def _attention(draw: _Draw, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    model = draw.model
    hidden, head_dim = model.hidden_size, model.head_dim
    q_heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    small = math.sqrt(_MEAN_SQUARE_IN_EPS * model.rms_norm_eps / hidden)
    yield f"{prefix}.q_proj.weight", draw.heads_of_different_size(q_heads, std=small)
    yield f"{prefix}.k_proj.weight", draw.heads_of_different_size(kv_heads, std=small)
    yield f"{prefix}.v_proj.weight", draw.normal(kv_heads * head_dim, hidden)
    # A head averages over the tokens it sees and so shrinks its values: the gain makes up for it.
    yield f"{prefix}.o_proj.weight", draw.normal(hidden, q_heads * head_dim, gain=2.0)
    yield f"{prefix}.q_norm.weight", draw.norm_weight(q_heads * head_dim)
    yield f"{prefix}.k_norm.weight", draw.norm_weight(kv_heads * head_dim)


def _experts(draw: _Draw, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    model = draw.model
    hidden, inner, num_experts = model.hidden_size, model.intermediate_size, model.num_local_experts
    yield f"{prefix}.gate.weight", draw.normal(num_experts, hidden, gain=1.5, dtype="float32")
    yield f"{prefix}.e_score_correction_bias", draw.uniform(num_experts, low=-0.4, high=0.4, dtype="float32")
    for expert in range(num_experts):
        yield f"{prefix}.experts.{expert}.w1.weight", draw.normal(inner, hidden)
        # silu(gate) * up is about half the size of its inputs. More gain would make up for the average over
        # experts too, but then one choice of the router, tipped by bfloat16, would carry the whole answer.
        yield f"{prefix}.experts.{expert}.w2.weight", draw.normal(hidden, inner, gain=2.0)
        yield f"{prefix}.experts.{expert}.w3.weight", draw.normal(inner, hidden)


class _Draw:
    """Draws tensors of ``model.dtype`` from one seeded generator, in float32 first."""

    def __init__(self, model: SmallModel) -> None:
        import torch

        self.model = model
        self._torch = torch
        self._generator = torch.Generator().manual_seed(model.seed)

    def normal(
        self, rows: int, columns: int, *, std: float | None = None, gain: float = 1.0, dtype: str | None = None
    ) -> torch.Tensor:
        """``[rows, columns]``; without ``std`` a projection that scales its input by ``gain``."""
        std = gain / math.sqrt(columns) if std is None else std
        return self._cast(self._torch.randn(rows, columns, generator=self._generator) * std, dtype)

    def uniform(self, size: int, *, low: float, high: float, dtype: str | None = None) -> torch.Tensor:
        return self._cast(self._torch.rand(size, generator=self._generator) * (high - low) + low, dtype)

    def norm_weight(self, size: int) -> torch.Tensor:
        return self.uniform(size, low=0.5, high=1.5)

    def heads_of_different_size(self, num_heads: int, *, std: float) -> torch.Tensor:
        """``[num_heads * head_dim, hidden]`` with one scale a head, between 1/2 and 2."""
        torch, model = self._torch, self.model
        scale = 2.0 ** (torch.rand(num_heads, generator=self._generator) * 2 - 1)
        rows = num_heads * model.head_dim
        weight = torch.randn(rows, model.hidden_size, generator=self._generator) * std
        return self._cast(weight * scale.repeat_interleave(model.head_dim)[:, None], None)

    def _cast(self, tensor: torch.Tensor, dtype: str | None) -> torch.Tensor:
        return tensor.to(getattr(self._torch, dtype or self.model.dtype)).contiguous()


FP8_BLOCK = 128


def write_fp8_blocks(checkpoint: str | Path, quantised: str | Path, dequantised: str | Path) -> tuple[Path, Path]:
    """Quantises ``checkpoint`` as the published models are, and writes beside it what the result stands for.

    Projections and experts become float8_e4m3fn with one float32 scale, ``weight_scale_inv``, for each block of
    128 x 128; embedding, head, norms and router stay as they are.

    Args:
        checkpoint: a folder that :func:`write_checkpoint` wrote.
        quantised: the folder for the FP8 checkpoint.
        dequantised: the folder for the checkpoint whose weights are exactly scale times FP8 value, in float32: what a
            reference that does not know FP8 must compute with.

    Returns:
        ``quantised`` and ``dequantised``.
    """
    import shutil

    from safetensors.torch import load_file, save_file

    checkpoint, quantised, dequantised = Path(checkpoint), Path(quantised), Path(dequantised)
    for folder in (quantised, dequantised):
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    in_blocks: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        if name.endswith("_proj.weight") or ".experts." in name:
            values, scales, meant = _quantise_blocks(tensor)
            in_blocks |= {name: values, name + "_scale_inv": scales}
            plain[name] = meant
        else:
            in_blocks[name] = tensor
            plain[name] = tensor.float()
    save_file(in_blocks, quantised / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, dequantised / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    _write_json(dequantised / "config.json", config | {"dtype": "float32"})
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "float8_e4m3fn",
        "quant_method": "fp8",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    }
    _write_json(quantised / "config.json", config)
    return quantised, dequantised


def _quantise_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(float8_e4m3fn [rows, columns], float32 scales [row blocks, column blocks], float32 product of the two)."""
    import torch

    rows, columns = weight.shape
    spread = torch.nn.functional.pad(weight.float(), (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    # [row block, row, column block, column]
    blocks = spread.unflatten(0, (-1, FP8_BLOCK)).unflatten(2, (-1, FP8_BLOCK))
    largest = blocks.abs().amax(dim=(1, 3), keepdim=True).clamp(min=1e-12)
    scales = largest / torch.finfo(torch.float8_e4m3fn).max
    values = (blocks / scales).to(torch.float8_e4m3fn)
    meant = (values.float() * scales).flatten(2).flatten(0, 1)[:rows, :columns].contiguous()
    values = values.float().flatten(2).flatten(0, 1)[:rows, :columns].contiguous().to(torch.float8_e4m3fn)
    return values, scales.squeeze(3).squeeze(1).contiguous(), meant


# -------------------------------------------------------------------------------------------- tokenizer


def write_tokenizer(folder: str | Path, vocab_size: int) -> None:
    """Trains a byte-level BPE of exactly ``vocab_size`` tokens and saves it for transformers and the engine.

    Any text round-trips. Nothing is downloaded: it learns from a passage of English and made-up words.
    The ids of the special tokens are the last of the vocabulary, as in the published models.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(num_words=vocab_size), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    learned = tokenizer.get_vocab_size()
    assert learned == vocab_size, f"the tokenizer learned {learned} tokens where the config says {vocab_size}"

    folder = Path(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, begin, end = SPECIAL_TOKENS
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": pad,
            "bos_token": begin,
            "eos_token": end,
            "clean_up_tokenization_spaces": False,
            "model_max_length": SmallModel.max_position_embeddings,
        },
    )


_ENGLISH = """
A mixture of experts sends every token to a few of its experts. A router scores them, the best ones answer,
and their answers are added up by weight. The rest of the layer is attention: each head asks what came before,
and what it hears depends on where it stands. When a model does not fit one device, its heads and its experts
are spread over many, and the devices must agree on every sum. If they do not, the words are still words, but
the sentence is no longer the one that the model would have written. So we ask the same question twice, once of
the server and once of a reference, and we compare the two answers number by number before we trust either.
"""


def _corpus(num_words: int) -> Iterator[str]:
    """English first, so that it is learned best; then made-up words, each of which can give a merge or more."""
    for _ in range(20):
        yield _ENGLISH
    rng = random.Random(0)
    onsets = [*"bcdfghlmnprstvw", "br", "cl", "dr", "fl", "gr", "pl", "sh", "st", "th", "tr"]
    nuclei = [*"aeiou", "ai", "ea", "ou"]
    codas = ["", "", "l", "m", "n", "r", "s", "t", "nd", "st"]
    for _ in range(num_words):
        syllables = rng.randint(2, 3)
        yield " " + "".join(rng.choice(onsets) + rng.choice(nuclei) + rng.choice(codas) for _ in range(syllables))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_minimax.checkpoints",
        description="Writes a small random MiniMax-M2 checkpoint with a tokenizer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    for field in fields(SmallModel):
        kind = {"int": int, "float": float, "str": str}[str(field.type)]
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=field.default)
    options = vars(parser.parse_args(arguments))
    folder: Path = options.pop("folder")
    try:
        model = SmallModel(**options)
        _check_no_other_model(folder, model)
        write_checkpoint(folder, model)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"wrote a MiniMax-M2 checkpoint to {folder}")


def _check_no_other_model(folder: Path, model: SmallModel) -> None:
    """Raises ValueError if ``folder`` holds a checkpoint of anything but ``model``, which would be lost."""
    config = folder / "config.json"
    if config.exists() and json.loads(config.read_text(encoding="utf-8")) != published_config(model):
        raise ValueError(f"{config} is of another model, whose files would be lost: give another folder, or remove it")


if __name__ == "__main__":
    main()
