"""Linear layers in FP8 blocks for the tests of ``minimax_fp8_linear``: exact products, and the engine's layer faked."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
from sglang.srt.layers.quantization.fp8_utils import triton_w8a8_block_fp8_linear

GROUP = 128


def problem(tokens: int, outputs: int, inputs: int, device: str = "cpu"):
    """x, weight and its scales; tokens of very different size, one group of zeros."""
    generator = torch.Generator().manual_seed(tokens * 10007 + outputs * 101 + inputs)
    x = torch.randn(tokens, inputs, generator=generator) * torch.logspace(-3, 2, tokens)[:, None]
    x[:1, :GROUP] = 0
    weight = torch.randn(outputs, inputs, generator=generator).to(torch.float8_e4m3fn)
    blocks = (-(-outputs // GROUP), inputs // GROUP)
    scale = (0.5 + torch.rand(*blocks, generator=generator)) * inputs**-0.5
    return x.bfloat16().to(device), weight.to(device), scale.to(device)


def dequantised(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[outputs, inputs] float64."""
    wide = scale.double().repeat_interleave(GROUP, 0)[: weight.shape[0]]
    return weight.double() * wide.repeat_interleave(GROUP, 1)


def quantised(x: torch.Tensor) -> torch.Tensor:
    """x as the layer sees it, float64: for each group of 128 the e4m3 values nearest to x / (largest / 448)."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10)
    scale = largest / torch.full_like(largest, 448)  # by a number, CUDA would multiply with its rounded inverse
    return ((groups * (1 / scale)).to(torch.float8_e4m3fn).double() * scale.double()).flatten(1)


def check(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
    """Against float64 of the same e4m3 values.

    bfloat16 rounds to 2^-8 of a value. Tensor cores cut a product off 13 bits below the largest of a group, 32 of which
    are added before the cut: 2^-9 of the sum of magnitudes is far more than that, and far less than what another
    scale, or a group left out, makes.
    """
    assert out.dtype == torch.bfloat16 and out.shape == (x.shape[0], weight.shape[0]) and out.is_contiguous()
    values, exact_weight = quantised(x), dequantised(weight, scale)
    exact, magnitudes = values @ exact_weight.T, values.abs() @ exact_weight.abs().T
    error = (out.double() - exact).abs()
    bound = exact.abs() * 2**-8 + magnitudes * 2**-9
    assert (error <= bound).all(), f"{(error / bound.clamp(min=1e-30)).max():.2f} of what is allowed"
    rounded = (exact - exact.bfloat16().double()).square().mean().sqrt()
    assert error.square().mean().sqrt() <= 1.5 * rounded + 2**-13 * magnitudes.square().mean().sqrt()


class Layer(torch.nn.Module):
    """What the engine's linear layer has of it, with its product in float32; counts how often it is called."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, block=(GROUP, GROUP)) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.weight_scale_inv = torch.nn.Parameter(scale, requires_grad=False)
        self.bias = None
        self.quant_method = object.__new__(Fp8LinearMethod)
        self.quant_method.use_mxfp8 = self.quant_method.use_marlin = False
        self.quant_method.w8a8_block_fp8_linear = triton_w8a8_block_fp8_linear  # a way that is left to the engine
        self.quant_method.quant_config = SimpleNamespace(weight_block_size=list(block))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.calls += 1
        exact = quantised(x) @ dequantised(self.weight, self.weight_scale_inv).T
        return exact.bfloat16(), None


def bfloat16_pairs() -> torch.Tensor:
    """[groups, 128] bfloat16: for each of the 128 largest magnitudes that differ by more than a power of two, all
    values of its group down to 2^-20 of it, which is far below the least e4m3 value; signs in turn."""
    mantissas = 1 + torch.arange(128) / 128
    smaller = (mantissas * 2.0 ** -torch.arange(21)[:, None]).flatten()
    rows = []
    for largest in mantissas:
        values = smaller[smaller <= largest]
        values = torch.cat([values, values.new_zeros(-len(values) % 127)]).unflatten(0, (-1, 127))
        rows.append(torch.cat([torch.full((len(values), 1), largest), values], dim=1))
    x = torch.cat(rows)
    x[:, ::2] *= -1
    return x.bfloat16()
