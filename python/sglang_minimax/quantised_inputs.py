"""Lets the engine's expert GEMM take activations that are quantised already.

Its invocation quantises whatever comes in. Where that is a pair, of FP8 values and their scales, the pair goes through:
:mod:`sglang.srt.layers.minimax_experts_prefill` gives one. A tensor is quantised as before.
"""

from __future__ import annotations

import functools
from typing import Any

from sglang_minimax.adjustments import EngineModule


def take_pairs(kernels: EngineModule) -> None:
    """Runs once, after the engine's ``fused_moe_triton_kernels`` was imported."""
    quantise = kernels.sglang_per_token_group_quant_fp8

    @functools.wraps(quantise)
    def sglang_per_token_group_quant_fp8(x: Any, *args: Any, **options: Any) -> Any:
        return x if isinstance(x, tuple) else quantise(x, *args, **options)

    kernels.sglang_per_token_group_quant_fp8 = sglang_per_token_group_quant_fp8


ADJUSTMENTS = [("sglang.srt.layers.moe.fused_moe_triton.fused_moe_triton_kernels", take_pairs)]
