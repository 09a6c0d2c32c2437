"""The sum over a token's experts for MiniMax-M2, up to 32 tokens: through a kernel instead of torch.compile.

There the engine sums through torch.compile, whose choice of a configuration depends on which shape came first, and
above with a kernel of sgl_kernel, which takes less time from 8 tokens on: see docs/kernels.md. Only a server whose
arguments name this architecture sums otherwise than before.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from sglang_minimax.adjustments import EngineModule, EngineObject

MARK = "sums_experts_in_kernel"

logger = logging.getLogger(__name__)


def mark(server_args: EngineObject) -> None:
    """Asks for the kernel. On the arguments, since these are what reaches the processes that run the model."""
    setattr(server_args, MARK, True)


def sum_in_kernel(fused_moe: EngineModule) -> None:
    """Lets marked servers sum in the kernel; runs once, after the engine's ``fused_moe`` was imported."""
    kernel = getattr(fused_moe, "moe_sum_reduce", None)
    if kernel is None:
        return  # not CUDA: there is no such kernel
    compiled = fused_moe.moe_sum_reduce_torch_compile

    @functools.wraps(compiled)
    def moe_sum_reduce_torch_compile(x: Any, out: Any, routed_scaling_factor: float) -> None:
        if getattr(fused_moe.get_global_server_args(), MARK, False):
            _log_once()
            kernel(x, out, routed_scaling_factor)
        else:
            compiled(x, out, routed_scaling_factor)

    fused_moe.moe_sum_reduce_torch_compile = moe_sum_reduce_torch_compile


@functools.lru_cache
def _log_once() -> None:
    logger.info("The outputs of a token's experts are summed by sgl_kernel for few tokens too.")


ADJUSTMENTS = [("sglang.srt.layers.moe.fused_moe_triton.fused_moe", sum_in_kernel)]
