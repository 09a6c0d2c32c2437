"""The kernel that quantises for many tokens in Triton's interpreter, on a CPU, against plain torch.

``test_fp8_linear.py`` runs this file in a process of its own, since Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sglang.srt.layers import minimax_fp8_linear
from sglang.srt.layers import minimax_fp8_quantise as fp8
from sglang.srt.layers.quantization import fp8_utils
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from unit.fp8_layers import Layer, bfloat16_pairs, dequantised, problem
from unit.interpreted import converted


@pytest.fixture(autouse=True)
def arithmetic_of_a_gpu(monkeypatch):
    """The interpreter cuts off where a GPU rounds, and rounds twice where a GPU adds a product to a number at once."""

    def fused(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    monkeypatch.setattr(interpreter, "_convert_float", converted)
    monkeypatch.setattr(InterpreterBuilder, "create_fma", fused)


def same(found, expected) -> bool:
    return all(torch.equal(ours.float(), theirs.float()) for ours, theirs in zip(found, expected, strict=True))


def random(rows: int, columns: int) -> torch.Tensor:
    """Rows of very different size, one group of zeros."""
    generator = torch.Generator().manual_seed(rows * 31 + columns)
    x = torch.randn(rows, columns, generator=generator) * torch.logspace(-8, 6, max(rows, 1))[:rows, None]
    x[:1, :128] = 0
    return x.bfloat16()


@pytest.mark.parametrize("plan", [None, (1, 4), (64, 8)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (7, 384), (33, 640)])
def test_values_and_scales_are_those_of_the_engines_formula(rows, columns, plan):
    x = random(rows, columns)
    values, scale = fp8.quantise(x, plan=plan)
    assert values.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert values.is_contiguous() and scale.is_contiguous()
    assert same((values, scale), fp8.quantise_reference(x))


def test_every_value_in_a_group_of_every_largest_magnitude_becomes_what_division_makes_of_it():
    x = bfloat16_pairs()
    assert same(fp8.quantise(x, plan=(256, 4)), fp8.quantise_reference(x))


@pytest.mark.parametrize("rows", [1, 6, 9])
def test_scales_lie_as_the_linear_layers_want_them(rows):
    x = random(rows, 384)
    expected = fp8.quantise_reference(x)
    for aligned, stride in ((False, rows), (True, -(-rows // 4) * 4)):
        values, scale = fp8.quantise(x, column_major=True, tma_aligned=aligned)
        assert scale.shape == (rows, 3) and scale.stride() == (1, stride)
        assert same((values, scale), expected)


def test_strided_rows_are_read_where_they_are():
    x = random(6, 384)
    wide = torch.cat([x, torch.full_like(x, float("nan"))], dim=1)[:, :384]
    assert wide.stride(0) == 768
    assert same(fp8.quantise(wide), fp8.quantise(x))


@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (40, 384)])
def test_silu_of_gate_times_up_is_quantised_from_its_bfloat16(rows, columns):
    gate_up = random(rows, 2 * columns).clamp(-200, 200)
    gate_up[-1, :8] = torch.tensor([-100.0, -90, -88, -1e-3, 0, 1e-3, 88, 100])
    values, scale = fp8.quantise_activated(gate_up)
    activated = fp8.activated_reference(gate_up)
    expected_values, expected_scale = fp8.quantise_reference(activated)
    assert values.is_contiguous() and scale.is_contiguous() and values.shape == (rows, columns)
    # A float32 SiLU beside a limit between two bfloat16 values may fall on its other side: 2^-8 of a value at most.
    assert ((scale - expected_scale).abs() <= expected_scale * 2**-8).all()
    scales, expected_scales = (s.double().repeat_interleave(128, 1) for s in (scale, expected_scale))
    assert ((values.float() != expected_values.float()) | (scales != expected_scales)).double().mean() < 2**-7
    expected = expected_values.double() * expected_scales
    step = torch.maximum(expected.abs() * 2**-3, expected_scales * 2**-9)
    assert ((values.double() * scales - expected).abs() <= 1.1 * step).all(), "no further than the next e4m3 value"


@pytest.mark.parametrize("columns", [256, 384])
def test_no_rows_are_no_launch(columns):
    for values, scale in (
        fp8.quantise(random(0, columns)), fp8.quantise_activated(random(0, 2 * columns)),
        fp8.quantise(random(0, columns), column_major=True, tma_aligned=True),
    ):  # fmt: skip
        assert values.shape == (0, columns) and scale.shape == (0, columns // 128)


def test_other_groups_are_refused():
    with pytest.raises(ValueError, match="200 columns"):
        fp8.quantise(random(2, 200))
    with pytest.raises(AssertionError, match="float16"):
        fp8.quantise(random(2, 256).half())


@pytest.mark.parametrize("product", ["cutlass", "deepgemm"])
def test_above_the_plans_the_engines_product_takes_what_is_quantised_here(monkeypatch, product):
    x, weight, scale = problem(201, 256, 384)
    layer, given = Layer(weight, scale), []
    layer.quant_method.w8a8_block_fp8_linear = getattr(fp8_utils, f"{product}_w8a8_block_fp8_linear_with_fallback")

    def cutlass(q, weight_t, q_scale, weight_scale_t, out_dtype):
        return deepgemm(q, weight_t.T, q_scale, weight_scale_t.T, [128, 128], out_dtype)

    def deepgemm(q, weight, q_scale, weight_scale, block, output_dtype):
        given.append((q_scale.stride(), block))
        values = q.double() * q_scale.double().repeat_interleave(128, 1)
        return (values @ dequantised(weight, weight_scale).T).to(output_dtype)

    monkeypatch.setattr(fp8_utils, "fp8_blockwise_scaled_mm", cutlass, raising=False)
    monkeypatch.setattr(fp8_utils, "w8a8_block_fp8_matmul_deepgemm", deepgemm)
    project = minimax_fp8_linear.Fp8Linear(layer)
    q, q_scale = fp8.quantise_reference(x)
    exact = (q.double() * q_scale.double().repeat_interleave(128, 1)) @ dequantised(weight, scale).T
    assert torch.equal(project(x), exact.bfloat16())
    assert given == [((1, 201 if product == "cutlass" else 204), [128, 128])] and layer.calls == 0
    assert project(x[:0]).shape == (0, 256) and project(x[: project.max_tokens]).shape[1] == 256
    assert len(given) == 1, "none and few are as before"
