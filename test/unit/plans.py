"""What the tests of the planner share: two GPUs, the published shape, and a name for a layout."""

from __future__ import annotations

from sglang_minimax.plan.hardware import GPUS
from sglang_minimax.plan.layout import Flags
from sglang_minimax.plan.shape import PUBLISHED_CONFIG, read_model

H200, B200 = GPUS["h200"], GPUS["b200"]
M25 = read_model("m2.5")
FP8 = PUBLISHED_CONFIG["quantization_config"]


def name_of(value) -> str | None:
    """A short name for a test's parameter."""
    if isinstance(value, Flags):
        return " ".join(value.words())
    return str((value or {}).get("quant_algo", "FP8" if value else None)) if not isinstance(value, str) else None


def config_of(**changes) -> dict:
    """The published config with few layers, for a model that is built without memory."""
    unplanned = {"rms_norm_eps": 1e-6, "rope_theta": 5e6, "tie_word_embeddings": False}
    return {**PUBLISHED_CONFIG, **unplanned, "num_hidden_layers": 5, **changes}
