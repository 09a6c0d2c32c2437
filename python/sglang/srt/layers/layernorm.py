"""The engine's layer norms, with one contract of ``RMSNorm`` mended on CUDA.

With no tokens the engine's ``RMSNorm.forward_cuda`` returns ``x`` alone, whatever else it was given: a caller that
passed a residual unpacks an empty tensor and fails, and ``post_residual_addition`` is lost. A data-parallel rank
without requests is such a caller. Here that path returns what every other path returns.

All other names of this module are the engine's own objects.
"""

from __future__ import annotations

import torch

from sglang_minimax.overlay import load_engine_module

_engine = load_engine_module(__name__)

globals().update({name: value for name, value in vars(_engine).items() if not name.startswith("__")})


class RMSNorm(_engine.RMSNorm):  # type: ignore[name-defined]
    """The engine's RMSNorm; see there for the arguments.

    ``forward(x, residual, post_residual_addition)`` takes x of shape [tokens, hidden_size], and returns the normed
    x, or, given a residual of the same shape, the pair (normed sum, sum) with ``post_residual_addition`` in the sum.
    Tokens may be 0 on every path.
    """

    def forward_cuda(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        post_residual_addition: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if x.numel() == 0 and residual is not None:
            if post_residual_addition is not None:
                residual = residual + post_residual_addition
            return x, residual
        return super().forward_cuda(x, residual, post_residual_addition)
