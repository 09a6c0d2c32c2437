"""The reference of the kernel that quantises for many tokens; ``test_fp8_linear.py`` has the kernel interpreted."""

from __future__ import annotations

import torch
from sglang.srt.layers import minimax_fp8_quantise as fp8
from unit.fp8_layers import bfloat16_pairs


def test_the_reference_takes_the_nearest_of_all_e4m3_values():
    x = bfloat16_pairs()[::16]
    q, scale = fp8.quantise_reference(x)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[every.isfinite()].unique()
    target = x.double() / scale.double()
    nearest = (target[..., None] - every).abs().amin(-1)
    assert ((target - q.double()).abs() <= nearest + target.abs() * 2**-22).all()
    assert torch.equal(fp8.quantise_reference(torch.zeros(1, 128))[1], torch.tensor([[1e-10]]) / 448)


def test_pairs_hold_every_value_below_every_largest_magnitude():
    x = bfloat16_pairs().float().abs()
    assert (x.amax(1) == x[:, 0]).all() and x[:, 0].unique().numel() == 128
    of_one = x[x[:, 0] == 1.5, 1:].unique()
    assert of_one.numel() == 65 + 20 * 128 + 1 and of_one[1] == 2.0**-20
