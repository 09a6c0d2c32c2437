"""The small checkpoints have the published format, and the reference reads them as the engine does."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_minimax.checkpoints import (
    SPECIAL_TOKENS,
    SmallModel,
    main,
    published_config,
    published_weights,
    write_checkpoint,
    write_fp8_blocks,
)
from sglang_minimax.reference import Reference, answer

TINY = SmallModel(
    num_hidden_layers=2,
    hidden_size=64,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=16,
    num_local_experts=5,
    num_experts_per_tok=2,
    intermediate_size=32,
    vocab_size=512,
)
PROMPTS = [[300, 301, 302, 303, 304], [261], [5, 400, 77, 300]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), TINY)


@pytest.fixture(scope="module")
def reference(checkpoint):
    return Reference(checkpoint)


def tensors(folder):
    return load_file(folder / "model.safetensors")


def published_shapes(model: SmallModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published MiniMax-M2 checkpoint, from its layout and not from our writer."""
    hidden, head, inner = model.hidden_size, model.head_dim, model.intermediate_size
    shapes = {
        "model.embed_tokens.weight": (model.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (model.vocab_size, hidden),
    }
    for index in range(model.num_hidden_layers):
        layer = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (model.num_attention_heads * head, hidden),
            "self_attn.k_proj.weight": (model.num_key_value_heads * head, hidden),
            "self_attn.v_proj.weight": (model.num_key_value_heads * head, hidden),
            "self_attn.o_proj.weight": (hidden, model.num_attention_heads * head),
            "self_attn.q_norm.weight": (model.num_attention_heads * head,),
            "self_attn.k_norm.weight": (model.num_key_value_heads * head,),
            "block_sparse_moe.gate.weight": (model.num_local_experts, hidden),
            "block_sparse_moe.e_score_correction_bias": (model.num_local_experts,),
        }
        for expert in range(model.num_local_experts):
            layer[f"block_sparse_moe.experts.{expert}.w1.weight"] = (inner, hidden)
            layer[f"block_sparse_moe.experts.{expert}.w2.weight"] = (hidden, inner)
            layer[f"block_sparse_moe.experts.{expert}.w3.weight"] = (inner, hidden)
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def test_names_and_shapes_are_the_published_ones(checkpoint):
    assert {name: tuple(tensor.shape) for name, tensor in tensors(checkpoint).items()} == published_shapes(TINY)


def test_names_are_those_that_transformers_saves(checkpoint, reference, tmp_path):
    reference.model.save_pretrained(tmp_path)
    saved, ours = tensors(tmp_path), tensors(checkpoint)
    assert saved.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(saved[name], tensor), name


def test_config_says_what_the_published_one_says(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    expected = {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "hidden_act": "silu",
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "rope_theta": 5000000,
        "rotary_dim": TINY.head_dim // 2,
        "tie_word_embeddings": False,
    }
    assert {key: config[key] for key in expected} == expected


def test_engine_and_transformers_read_the_same_rotary_embedding(checkpoint, reference):
    from sglang.srt.utils.hf_transformers_utils import get_config, get_rope_config

    config = get_config(str(checkpoint), trust_remote_code=False)
    theta, _ = get_rope_config(config)
    inverse = reference.model.model.rotary_emb.inv_freq
    assert config.rotary_dim == 2 * len(inverse) == TINY.head_dim // 2
    steps = torch.arange(0, config.rotary_dim, 2) / config.rotary_dim
    torch.testing.assert_close(inverse, 1.0 / 5_000_000**steps)
    assert theta == 5_000_000


def test_engine_reads_the_shape_that_was_asked_for(checkpoint):
    from sglang.srt.utils.hf_transformers_utils import get_config

    config = get_config(str(checkpoint), trust_remote_code=False)
    for name in ("num_local_experts", "num_experts_per_tok", "num_key_value_heads", "head_dim", "vocab_size"):
        assert getattr(config, name) == getattr(TINY, name), name
    assert config.scoring_func == "sigmoid" and config.use_routing_bias


@pytest.mark.parametrize("text", ["Once upon a time", "  two  spaces\n\ttab", "Äpfel 東京 🚀", "\x00\x7f", ""])
def test_any_text_round_trips_through_the_tokenizer(checkpoint, text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_engine_loads_the_same_tokenizer(checkpoint):
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer
    from transformers import AutoTokenizer

    text = "A router sends every token to a few of its experts."
    ours, theirs = AutoTokenizer.from_pretrained(checkpoint), get_tokenizer(str(checkpoint))
    assert theirs.encode(text) == ours.encode(text)
    assert len(ours) == TINY.vocab_size
    assert max(ours.get_vocab().values()) == TINY.vocab_size - 1


def test_special_tokens_are_the_last_ids_and_the_config_names_them(checkpoint):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    assert tokenizer.convert_ids_to_tokens(list(range(509, 512))) == list(SPECIAL_TOKENS)
    assert tokenizer.eos_token_id == config["eos_token_id"] == 511
    assert tokenizer.bos_token_id == config["bos_token_id"] == 510


def test_greedy_and_scored_log_probabilities_are_the_same(reference):
    """Decoding with a cache and scoring in one pass are two ways through transformers to one distribution."""
    greedy = reference.greedy(PROMPTS, 12, top_k=3)
    scored = reference.score(PROMPTS, [one.tokens for one in greedy], top_k=3)
    for one, other in zip(greedy, scored, strict=True):
        assert len(one.tokens) == 12
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)
        assert [step[0][0] for step in other.top] == one.tokens


def test_log_probabilities_are_of_the_models_own_logits(reference):
    prompt = PROMPTS[0]
    with torch.inference_mode():
        logits = reference.model(torch.tensor([prompt])).logits[0, -1]
    first = reference.greedy([prompt], 1)[0]
    assert first.tokens == [int(logits.argmax())]
    probabilities = torch.exp(logits - logits.max())
    expected = torch.log(probabilities.max() / probabilities.sum())
    assert first.logprobs[0] == pytest.approx(float(expected), abs=1e-5)


def test_a_wrong_continuation_is_less_likely_than_the_greedy_one(reference):
    greedy = reference.greedy(PROMPTS, 6)
    wrong = [[(token + 1) % 400 for token in one.tokens] for one in greedy]
    for one, other in zip(greedy, reference.score(PROMPTS, wrong), strict=True):
        assert other.logprobs[0] < one.logprobs[0]
        assert statistics.mean(other.logprobs) < statistics.mean(one.logprobs) - 1


@pytest.mark.parametrize("text", ["Once upon a time", "42", "def main():"])
def test_the_default_model_does_not_repeat_itself(tmp_path_factory, text, default_checkpoint):
    from transformers import AutoTokenizer

    prompt = AutoTokenizer.from_pretrained(default_checkpoint.folder).encode(text)
    completion = default_checkpoint.reference.greedy([prompt], 16)[0]
    assert len(set(completion.tokens)) >= 6
    assert -4 < statistics.median(completion.logprobs) < -0.1  # neither uniform (-6.9) nor certain


class DefaultCheckpoint:
    def __init__(self, folder):
        self.folder = write_checkpoint(folder)
        self.reference = Reference(self.folder)


@pytest.fixture(scope="module")
def default_checkpoint(tmp_path_factory):
    return DefaultCheckpoint(tmp_path_factory.mktemp("default"))


@pytest.mark.parametrize("fault", ["no correction bias", "k_norm of the neighbouring head", "eps times ten"])
def test_a_fault_moves_the_answer_far_more_than_the_tolerance(default_checkpoint, fault):
    import copy

    reference = default_checkpoint.reference
    right = reference.greedy(PROMPTS, 8)
    model, layers = reference.model, reference.model.model.layers
    before = copy.deepcopy(model.state_dict()), layers[0].self_attn.k_norm.variance_epsilon
    with torch.no_grad():
        for layer in layers:
            if fault == "no correction bias":
                layer.mlp.e_score_correction_bias.zero_()
            elif fault == "eps times ten":
                layer.self_attn.k_norm.variance_epsilon *= 10
            else:
                layer.self_attn.k_norm.weight.copy_(layer.self_attn.k_norm.weight.roll(64))
    try:
        wrong = reference.score(PROMPTS, [one.tokens for one in right])
    finally:
        model.load_state_dict(before[0])
        for layer in layers:
            layer.self_attn.k_norm.variance_epsilon = before[1]
    for one, other in zip(right, wrong, strict=True):
        assert max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)) > 1e-2


def test_bfloat16_weights_and_mtp_modules(tmp_path):
    model = SmallModel(**{**vars(TINY), "dtype": "bfloat16", "num_mtp_modules": 2})
    write_checkpoint(tmp_path, model)
    found = tensors(tmp_path)
    assert found["lm_head.weight"].dtype == torch.bfloat16
    assert found["model.layers.0.block_sparse_moe.gate.weight"].dtype == torch.float32
    assert found["model.layers.0.block_sparse_moe.e_score_correction_bias"].dtype == torch.float32
    extra = found.keys() - published_shapes(model).keys()
    assert extra and all(name.startswith(("model.layers.2.", "model.layers.3.")) for name in extra)
    assert Reference(tmp_path).greedy([[300]], 1)[0].tokens  # transformers leaves the MTP modules out


def test_every_weight_is_drawn():
    for name, tensor in published_weights(TINY):
        assert torch.isfinite(tensor).all() and (tensor != 0).float().mean() > 0.99, name
        assert tensor.float().std() > 0, name


def test_the_seed_decides_the_weights():
    one, same, other = (dict(published_weights(SmallModel(**{**vars(TINY), "seed": seed}))) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_key_value_heads": 5}, "num_key_value_heads=5"),
        ({"num_experts_per_tok": 6}, "num_local_experts=5"),
        ({"head_dim": 18}, "head_dim=18"),
        ({"vocab_size": 100}, "at least 259"),
        ({"dtype": "float16"}, "float16"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    ],
)
def test_an_impossible_shape_is_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        SmallModel(**{**vars(TINY), **change})


def test_the_least_vocabulary_and_a_choice_of_all_experts_are_shapes():
    assert SmallModel(vocab_size=256 + 3, num_experts_per_tok=16, num_local_experts=16).vocab_size == 259


def test_the_reference_refuses_a_checkpoint_with_a_hole(checkpoint, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    weights = tensors(checkpoint)
    del weights["model.layers.1.self_attn.k_norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_norm"):
        Reference(tmp_path)


def test_a_request_says_one_thing(reference):
    with pytest.raises(ValueError, match="either"):
        answer({"prompts": [[1]]}, reference)
    with pytest.raises(ValueError, match="at least one token"):
        answer({"prompts": [[]], "max_new_tokens": 1}, reference)
    with pytest.raises(ValueError, match="as many continuations"):
        answer({"prompts": [[1]], "continuations": []}, reference)


# ---------------------------------------------------------------------------------------------- FP8 blocks


def test_fp8_blocks_are_scale_times_value_and_near_the_weights(tmp_path):
    """Block by block in float64: the dequantised weight is exactly what the FP8 checkpoint says, within FP8's step."""
    shape = SmallModel(num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=1, intermediate_size=192)
    original = write_checkpoint(tmp_path / "original", shape)
    quantised, dequantised = write_fp8_blocks(original, tmp_path / "fp8", tmp_path / "plain")
    before, stored, meant = tensors(original), tensors(quantised), tensors(dequantised)
    scaled = [name for name in stored if name.endswith("_scale_inv")]
    assert len(scaled) == 4 + 2 * 3  # q, k, v, o and three for each expert
    for scale_name in scaled:
        name = scale_name.removesuffix("_scale_inv")
        values, scales, weight = stored[name].double(), stored[scale_name].double(), before[name].double()
        assert stored[name].dtype == torch.float8_e4m3fn and stored[scale_name].dtype == torch.float32
        assert scales.shape == tuple(-(-size // 128) for size in weight.shape)
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                block = slice(row * 128, (row + 1) * 128), slice(column * 128, (column + 1) * 128)
                product = values[block] * scales[row, column]
                torch.testing.assert_close(meant[name][block].double(), product, rtol=1e-6, atol=0)
                smallest = weight[block].abs().max() / 448 * 2**-9  # FP8's, where its largest, 448, is the block's
                step = weight[block].abs() * 2**-4 + smallest * 0.501
                assert ((product - weight[block]).abs() <= step).all()
    for name in set(stored) - set(scaled) - {name.removesuffix("_scale_inv") for name in scaled}:
        assert torch.equal(stored[name], before[name]) and torch.equal(meant[name], before[name].float())
    config = json.loads((quantised / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num-attention-heads", "5"], "num_attention_heads=5 must be a multiple of num_key_value_heads=8"),
        (["--hidden-size", "-1"], "hidden_size=-1 must be positive"),
        (["--dtype", "int4"], "dtype='int4' must be one of float32, bfloat16"),
        (["--seed", "2", "--num-local-experts", "32"], "is of another model, whose files would be lost"),
    ],
)
def test_the_command_says_in_a_line_what_it_cannot_write(tmp_path, capsys, arguments, said):
    (tmp_path / "config.json").write_text(json.dumps(published_config(SmallModel())))
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), *arguments])
    assert said in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "file")])
    assert str(tmp_path / "file") in capsys.readouterr().err
