"""The model: its sizes, and how its weights are quantised, from a config or from the published models' data."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sglang_minimax.sharding import ExpertShape, quantisation_block

ARCHITECTURE = "MiniMaxM2ForCausalLM"
NVFP4_GROUP = 16  # values of a row that share one FP8 scale

_SIZES = [
    *["num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"],
    *["num_local_experts", "num_experts_per_tok", "intermediate_size", "vocab_size"],
]


class CannotPlan(ValueError):
    """The planner has no answer; the message names the value, the rule and the way out."""


@dataclass(frozen=True)
class Quantisation:
    """How weights are stored.

    kind: "none", "fp8" (one float32 scale a block of ``block``), or "nvfp4" (one FP8 scale for each 16 values of a
        row, and a few float32 scales an expert).
    block: rows and columns that one FP8 scale covers.
    attention: whether the projections of attention are quantised too, or only the experts.
    """

    kind: str = "none"
    block: tuple[int, int] = (1, 1)
    attention: bool = True


@dataclass(frozen=True)
class ModelShape:
    """The sizes of one MiniMax-M2, under the names of its config.

    name: what ``--model-path`` takes.
    dtype_bytes: bytes of one value that is not quantised.
    kv_cache_bytes: bytes of one value of the KV cache that ``--kv-cache-dtype auto`` means.
    expert_block: what a rank's part of an expert's width must be a multiple of.
    """

    name: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rotary_dim: int
    dtype_bytes: int
    kv_cache_bytes: int
    quantisation: Quantisation
    expert_block: int
    use_qk_norm: bool = True
    use_routing_bias: bool = True

    @property
    def experts(self) -> ExpertShape:
        """What decides how the experts can be divided."""
        return ExpertShape(self.num_local_experts, self.intermediate_size, self.expert_block)


PUBLISHED_CONFIG = {
    "architectures": [ARCHITECTURE],
    "num_hidden_layers": 62,
    "hidden_size": 3072,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "intermediate_size": 1536,
    "vocab_size": 200064,
    "max_position_embeddings": 196608,
    "rotary_dim": 64,
    "dtype": "bfloat16",
    "use_qk_norm": True,
    "use_routing_bias": True,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "float8_e4m3fn",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    },
}
"""What the published models' configs say of their sizes: one architecture and one shape for all four."""

PUBLISHED = {name: f"MiniMaxAI/MiniMax-{name.upper()}" for name in ("m2", "m2.1", "m2.5", "m2.7")}

NVFP4_CHECKPOINTS = {"m2.5": "nvidia/MiniMax-M2.5-NVFP4", "m2.7": "nvidia/MiniMax-M2.7-NVFP4"}
"""Published by NVIDIA: experts in NVFP4; attention, router, embedding and head in bfloat16; KV cache in FP8
(their recipe: NVIDIA/Model-Optimizer, pull request 2437)."""


def read_model(model: str, quantization: str | None = None) -> ModelShape:
    """The shape of ``model``: a short name, a folder with a config.json, or a hub name that is in the local cache.

    Args:
        quantization: the server's ``--quantization``; for a short name it chooses the checkpoint.

    Raises:
        CannotPlan: no such model here, another architecture, or a quantisation whose bytes are not known here.
    """
    short = next((name for name, hub in PUBLISHED.items() if model.lower() in (name, hub.lower())), None)
    folder = _folder_of(model)
    if folder is None and short is None:
        short = next((name for name, hub in NVFP4_CHECKPOINTS.items() if model.lower() == hub.lower()), None)
        quantization = quantization or ("modelopt_fp4" if short else None)
    if folder is not None:
        shape = _from_folder(model, folder)
    elif short is not None:
        shape = _published(short, quantization)
    else:
        raise CannotPlan(
            f"{model!r} is no folder with a config.json, and no model of the hub cache on this machine. Give the "
            f"folder of a checkpoint, a hub name that was downloaded before, or one of {', '.join(PUBLISHED)}"
        )
    return _as_served(shape, quantization)


def _published(short: str, quantization: str | None) -> ModelShape:
    shape = shape_of_config(PUBLISHED_CONFIG, PUBLISHED[short])
    if quantization != "modelopt_fp4":
        return shape
    name = NVFP4_CHECKPOINTS.get(short, "NVFP4_CHECKPOINT")
    return replace(
        shape, name=name, kv_cache_bytes=1, expert_block=1, quantisation=Quantisation("nvfp4", attention=False),
    )  # fmt: skip


def _as_served(shape: ModelShape, quantization: str | None) -> ModelShape:
    """Checks ``--quantization`` against what the checkpoint holds."""
    stored = {"none": None, "fp8": "fp8", "nvfp4": "modelopt_fp4"}[shape.quantisation.kind]
    if quantization is None or quantization == stored:
        return shape
    raise CannotPlan(
        f"--quantization {quantization} does not go with {shape.name}, which is stored "
        f"{'unquantised' if stored is None else 'as ' + stored}: weights that are quantised while they load are not "
        f"planned. Leave --quantization out, or name a checkpoint that is stored so"
    )


def _folder_of(model: str) -> Path | None:
    """The folder that holds ``model``'s config.json: a path, or the newest snapshot of the hub's local cache."""
    if (Path(model) / "config.json").is_file():
        return Path(model)
    home = os.environ.get("HF_HOME") or os.path.join(os.path.expanduser("~"), ".cache", "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))
    snapshots = (cache / f"models--{model.replace('/', '--')}" / "snapshots").glob("*/config.json")
    newest = max(snapshots, key=lambda path: path.stat().st_mtime, default=None)
    return newest.parent if newest else None


def _from_folder(model: str, folder: Path) -> ModelShape:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        beside = folder / "hf_quant_config.json"
        if isinstance(config, dict) and "quantization_config" not in config and beside.is_file():
            config["quantization_config"] = json.loads(beside.read_text(encoding="utf-8"))["quantization"]
    except (OSError, ValueError, KeyError) as error:
        raise CannotPlan(f"the configuration in {folder} cannot be read: {error}") from error
    return shape_of_config(config, model)


def shape_of_config(config: dict[str, Any], name: str) -> ModelShape:
    """The shape that a config.json describes.

    Raises:
        CannotPlan: another architecture, a key that is missing, or a quantisation whose bytes are not known here.
    """
    if not isinstance(config, dict):
        raise CannotPlan(f"the config of {name} is no JSON object")
    if ARCHITECTURE not in (config.get("architectures") or []):
        raise CannotPlan(f"{name} is {config.get('architectures')} and only {ARCHITECTURE} is planned here")
    missing = [size for size in _SIZES if not (isinstance(config.get(size), int) and config[size] > 0)]
    if missing:
        raise CannotPlan(f"the config of {name} does not say {', '.join(missing)} as whole numbers above 0")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    fraction = (config.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    dtype_bytes = {"bfloat16": 2, "float16": 2, "float32": 4}.get(dtype)
    if dtype_bytes is None:
        raise CannotPlan(f"the config of {name} says dtype {dtype!r}, which is none of bfloat16, float16, float32")
    quantization = config.get("quantization_config")
    return ModelShape(
        name=name,
        **{size: config[size] for size in _SIZES},
        head_dim=head_dim,
        max_position_embeddings=config.get("max_position_embeddings") or 8192,
        rotary_dim=config.get("rotary_dim") or int(head_dim * fraction),
        dtype_bytes=dtype_bytes,
        kv_cache_bytes=1 if _kv_cache_is_fp8(quantization) else dtype_bytes,
        quantisation=_quantisation(quantization, config["num_hidden_layers"], name),
        expert_block=quantisation_block(quantization),
        use_qk_norm=bool(config.get("use_qk_norm", True)),
        use_routing_bias=bool(config.get("use_routing_bias", True)),
    )


def _kv_cache_is_fp8(quantization: dict[str, Any] | None) -> bool:
    """Whether ``--kv-cache-dtype auto`` means FP8, as modelopt's checkpoints may ask for."""
    quantization = quantization or {}
    scheme = quantization.get("kv_cache_scheme") or quantization.get("kv_cache_quant_algo") or ""
    if isinstance(scheme, dict):
        return scheme.get("type") == "float" and scheme.get("num_bits") == 8
    return scheme.upper() in ("FP8", "FLOAT8")


def _quantisation(quantization: dict[str, Any] | None, num_layers: int, name: str) -> Quantisation:
    if not quantization:
        return Quantisation()
    method, algorithm = quantization.get("quant_method"), str(quantization.get("quant_algo") or "").upper()
    skipped = [
        *(quantization.get("modules_to_not_convert") or quantization.get("ignored_layers") or []),
        *(quantization.get("ignore") or quantization.get("exclude_modules") or []),
    ]
    attention = _attention_is_quantised(skipped, num_layers, name)
    if method == "fp8" and quantization.get("weight_block_size"):
        block = quantization["weight_block_size"]
        if not (isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) for size in block)):
            raise CannotPlan(f"{name} says weight_block_size {block!r}, which must be two numbers, [rows, columns]")
        return Quantisation("fp8", (block[0], block[1]), attention)
    if algorithm == "NVFP4":
        return Quantisation("nvfp4", attention=attention)
    raise CannotPlan(
        f"{name} is quantised by {method or algorithm!r}, and its bytes are known here for FP8 in blocks "
        f"(weight_block_size), NVFP4 (modelopt) and unquantised weights only"
    )


def _attention_is_quantised(skipped: list[str], num_layers: int, name: str) -> bool:
    def kept(layer: int) -> bool:
        module = f"model.layers.{layer}.self_attn"
        names = ("self_attn", module, f"{module}.qkv_proj", f"{module}.q_proj")
        return any(fnmatch(name, pattern) for name in names for pattern in skipped)

    unquantised = sum(kept(layer) for layer in range(num_layers))
    if 0 < unquantised < num_layers:
        raise CannotPlan(
            f"{name} leaves the attention of {unquantised} of its {num_layers} layers unquantised: all or none is "
            f"planned here"
        )
    return unquantised == 0
