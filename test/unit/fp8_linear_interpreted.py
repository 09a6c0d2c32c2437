"""The FP8 linear kernels in Triton's interpreter, on a CPU, against float64.

``test_fp8_linear.py`` runs this file in a process of its own, since Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from sglang.srt.layers import minimax_fp8_linear as fp8
from sglang.srt.layers.minimax_fp8_linear import Plan
from sglang.srt.layers.minimax_parts import Parts
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from unit.fp8_layers import Layer, check, problem
from unit.interpreted import compile_whole

PLANS = [
    Plan(16, 64, 1, 4),
    Plan(32, 64, 2, 4),
    Plan(16, 64, 3, 4, stages=2),
    Plan(32, 128, 1, 8, stages=3),
    Plan(16, 32, 2, 4, swap=False),
    Plan(16, 32, 4, 4, stages=2, swap=False),
]
SHAPES = [(160, 384), (64, 128), (100, 640)]  # outputs, inputs; blocks cut off, groups that no split divides


@pytest.fixture(autouse=True)
def nearest_e4m3(monkeypatch):
    """The interpreter cuts off where a GPU rounds to the nearest."""
    convert = InterpreterBuilder.create_fp_to_fp

    def rounded(self, source, dtype, mode):
        if dtype.scalar != tl.float8e4nv or source.data.dtype != np.float32:
            return convert(self, source, dtype, mode)
        values = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float8_e4m3fn)
        return TensorHandle(values.view(torch.uint8).numpy(), dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", rounded)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: "/".join(map(str, plan)))
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_every_kind_of_plan_is_the_product_of_float64(plan, outputs, inputs):
    for tokens in (1, 17):
        x, weight, scale = problem(tokens, outputs, inputs)
        check(fp8.fp8_linear(x, weight, scale, plan), x, weight, scale)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: "/".join(map(str, plan)))
def test_parts_add_up_to_the_product(plan):
    x, weight, scale = problem(17, 160, 384)
    found = fp8.fp8_linear(x, weight, scale, plan, in_parts=True)
    assert isinstance(found, Parts) == (plan.splits > 1), "what nobody has divided is whole"
    if plan.splits > 1:
        assert found.shape == (17, 160) and found.values.shape[0] == plan.splits
        found = found.summed()
    check(found, x, weight, scale)


def test_a_layer_leaves_parts_where_its_plan_has_some():
    x, weight, scale = problem(70, 160, 384)
    layer = fp8.Fp8Linear(Layer(weight, scale))
    check(layer.in_parts(x[:9]).summed(), x[:9], weight, scale)
    assert torch.equal(layer.in_parts(x), layer(x)), "the engine's product is whole"
    assert layer.in_parts(x[:0]).shape == (0, 160)


def test_strided_rows_are_read_where_they_are():
    x, weight, scale = problem(6, 160, 384)
    wide = torch.cat([x, torch.full_like(x, float("nan"))], dim=1)[:, :384]
    assert wide.stride(0) == 768
    for plan in PLANS:
        out = fp8.fp8_linear(wide, weight, scale, plan)
        assert torch.equal(out, fp8.fp8_linear(x, weight, scale, plan))


@pytest.mark.parametrize("tokens", [0, 1, 2, 9, 16, 33, 64, 65])
def test_a_layer_takes_any_number_of_tokens(tokens):
    x, weight, scale = problem(tokens, 160, 384)
    layer = Layer(weight, scale)
    out = fp8.Fp8Linear(layer)(x)
    check(out, x, weight, scale) if tokens else None
    assert out.shape == (tokens, 160) and out.dtype == torch.bfloat16
    assert layer.calls == (tokens > max(fp8.plans_for(384, 160)))


def test_compiled_whole_with_a_symbol_for_the_tokens(monkeypatch):
    """As the engine compiles the forward: no graph break, and one graph for both sides of the limit."""
    _, weight, scale = problem(1, 160, 384)
    project = fp8.Fp8Linear(Layer(weight, scale))
    compiled, graphs = compile_whole(lambda x: project(x) * 1, monkeypatch)
    with torch.no_grad():
        for tokens in (5, 17, 65, 70):
            x, _, _ = problem(tokens, 160, 384)
            check(compiled(x), x, weight, scale)
    assert len(graphs) == 1
