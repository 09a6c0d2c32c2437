"""What FP8 does to the reference: its activations rounded as a block-quantised checkpoint asks.

``activation_scheme: dynamic`` in the published quantization_config: where a weight is in FP8, each 128 values of a
token that meet it are rounded to float8_e4m3fn under one scale, their largest magnitude over 448.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

from sglang_minimax.checkpoints import SmallModel

_GROUP = 128


def rounded_to_fp8(x: torch.Tensor) -> torch.Tensor:
    """``x`` [..., multiple of 128] through float8 and back, in its own dtype."""
    groups = x.float().unflatten(-1, (-1, _GROUP))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / torch.finfo(torch.float8_e4m3fn).max
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2).to(x.dtype)


@contextlib.contextmanager
def activations_in_fp8(model: SmallModel) -> Iterator[None]:
    """Within it every linear layer of transformers rounds what it is given, but for those whose weights are not in FP8.

    These are the router's and the language-model head's, which are known by their rows: of ``model`` no other weight
    may have as many.
    """
    linear = torch.nn.functional.linear
    unrounded_rows = {model.num_local_experts, model.vocab_size}

    def rounding(x, weight, bias=None):
        return linear(x if weight.shape[0] in unrounded_rows else rounded_to_fp8(x), weight, bias)

    with mock.patch("torch.nn.functional.linear", rounding):
        yield
