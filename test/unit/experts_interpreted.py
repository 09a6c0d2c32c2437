"""The experts' kernels in Triton's interpreter, on a CPU, against float64 on the same FP8 weights.

``test_experts.py`` runs this file in a process of its own, since Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import triton.language as tl
from sglang.srt.layers import minimax_experts as experts
from sglang.srt.layers.minimax_experts import Plan, Projection
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

HIDDEN_SIZE, WIDTH, EXPERTS, TOP_K = 256, 128, 8, 2
PLANS = {
    "by token": Plan(Projection(16, "float16", False, 16, 4, 2), Projection(1, "bfloat16", False, 16, 4, 1)),
    "bfloat16": Plan(Projection(16, "bfloat16", False, 32, 4, 2), Projection(16, "bfloat16", False, 64, 4, 2)),
    "float16": Plan(Projection(16, "float16", False, 16, 4, 2), Projection(32, "float16", False, 64, 4, 2)),
    "float8": Plan(Projection(16, "float8", False, 32, 4, 2), Projection(16, "float8", False, 64, 4, 2)),
    "weights first": Plan(Projection(32, "float16", True, 32, 4, 2), Projection(16, "bfloat16", True, 64, 4, 2)),
    "float8, weights first": Plan(Projection(16, "float8", True, 32, 4, 2), Projection(16, "float8", True, 128, 4, 2)),
}


TORCH = {
    "fp8e4nv": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32,
}  # fmt: skip


def converted(data: np.ndarray, source, target, rounding_mode=None) -> np.ndarray:
    """Triton's values of one type as another's, in the interpreter's integers, rounded to nearest even as on a GPU."""
    values = torch.from_numpy(np.ascontiguousarray(data).view(f"int{source.primitive_bitwidth}"))
    bits = target.primitive_bitwidth
    found = values.view(TORCH[source.name]).to(TORCH[target.name]).view(getattr(torch, f"int{bits}"))
    return found.numpy().view(f"uint{bits}")


@pytest.fixture(autouse=True)
def arithmetic_of_a_gpu(monkeypatch):
    """The interpreter cuts bits off where a GPU rounds, and would multiply the integers that hold small floats."""
    dot = InterpreterBuilder.create_dot

    def widened(handle):
        scalar = handle.dtype.scalar
        if scalar.name not in ("bf16", "fp8e4nv"):
            return handle
        return TensorHandle(converted(handle.data, scalar, tl.float32).view(np.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_convert_float", converted)
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    )


def distinct(tokens: int, generator, among: int = EXPERTS) -> torch.Tensor:
    """[tokens, TOP_K] int32: each token's experts, drawn without repetition."""
    return torch.rand(tokens, among, generator=generator).topk(TOP_K).indices.to(torch.int32)


@functools.lru_cache
def problem(tokens: int, routing: str = "uniform", width: int = WIDTH):
    """The op's arguments but for the last."""
    generator = torch.Generator().manual_seed(tokens * 31 + width)

    def weight(*size):
        return torch.randn(*size, generator=generator).to(torch.float8_e4m3fn)

    def scale(inputs, *size):
        return (0.5 + torch.rand(*size, generator=generator)) * inputs**-0.5

    ids = distinct(tokens, generator)
    if routing == "same":
        ids = torch.tensor([5, 2], dtype=torch.int32).expand(tokens, TOP_K).contiguous()
    elif routing == "global":  # 24 experts in all, of which this rank has those from 8 to 15
        ids = distinct(tokens, generator, among=3 * EXPERTS)
    elif routing == "missing":
        ids = torch.where(torch.rand(tokens, TOP_K, generator=generator) < 0.5, -1, ids).to(torch.int32)
    x = torch.randn(tokens, HIDDEN_SIZE, generator=generator).bfloat16()
    routing_weights = torch.rand(tokens, TOP_K, generator=generator)
    w13, w13_scale = weight(EXPERTS, 2 * width, HIDDEN_SIZE), scale(HIDDEN_SIZE, EXPERTS, 2 * width // 128, 2)
    w2, w2_scale = weight(EXPERTS, HIDDEN_SIZE, width), scale(width, EXPERTS, 2, width // 128)
    return x, routing_weights, ids, w13, w13_scale, w2, w2_scale


def run(plan: Plan, arguments, first_expert: int = 0) -> torch.Tensor:
    x, routing_weights, ids, w13, w13_scale, w2, w2_scale = arguments
    activated = experts.gate_up(x, ids, w13, w13_scale, first_expert, plan.gate_up)
    return experts.down(activated, routing_weights, ids, w2, w2_scale, first_expert, plan.down)


def quantised(x: torch.Tensor) -> torch.Tensor:
    """Float64 of what the engine's FP8 quantisation makes of x [rows, columns]."""
    groups = x.float().unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 448.0
    return ((groups / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).double() * scale.double()).flatten(-2)


def exact(plan: Plan, arguments, first_expert: int = 0) -> torch.Tensor:
    """In float64, but for silu(gate) * up, which are bfloat16, and for what a plan quantises."""
    x, routing_weights, ids, w13, w13_scale, w2, w2_scale = arguments
    small = quantised if plan.down.activations == "float8" else torch.Tensor.double
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, choice in np.ndindex(*ids.shape):
        expert = int(ids[token, choice]) - first_expert
        if not 0 <= expert < EXPERTS:
            continue
        of_gate_up, of_down = (
            torch.kron(scale[expert].double(), torch.ones(128, 128)) * weight[expert].double()
            for weight, scale in ((w13, w13_scale), (w2, w2_scale))
        )
        gate, up = (of_gate_up @ small(x[token])).chunk(2)
        activated = (torch.nn.functional.silu(gate) * up).bfloat16()
        down = of_down @ (activated.double() if plan.down.routes == 1 else small(activated))
        out[token] += routing_weights[token, choice] * down
    return out


def check(out: torch.Tensor, expected: torch.Tensor) -> None:
    """To the output's rounding."""
    assert out.dtype == torch.bfloat16 and out.shape == expected.shape and out.isfinite().all()
    error = (out.double() - expected).abs()
    # A sum in float32 beside a limit between two bfloat16 or FP8 values may fall on its other side.
    bound = 2**-8 * expected.abs() + 2**-9 * expected.square().mean().sqrt()
    assert (error <= bound).all(), f"{(error / bound).max():.2f} of what is allowed"


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("tokens", "routing", "width"), [(1, "uniform", 256), (5, "missing", 384), (20, "same", 128)])
def test_every_plan_is_right(name, tokens, routing, width):
    arguments = problem(tokens, routing, width)
    check(run(PLANS[name], arguments), exact(PLANS[name], arguments))


@pytest.mark.parametrize("name", ["by token", "bfloat16"])
def test_experts_of_other_ranks_count_nothing(name):
    arguments = problem(9, "global")
    for first in (0, 8, 16):
        check(run(PLANS[name], arguments, first), exact(PLANS[name], arguments, first))
    nowhere = run(PLANS[name], arguments, 100)
    assert torch.equal(nowhere, torch.zeros_like(nowhere))


@pytest.mark.parametrize(
    ("tokens", "routing"), [(0, "uniform"), (1, "same"), (3, "missing"), (experts.MAX_TOKENS, "same")]
)
def test_the_op_takes_any_planned_number_of_tokens_and_repeats_its_bits(tokens, routing):
    arguments = problem(tokens, routing)
    out = experts.minimax_experts(*arguments, 0)
    if tokens:
        check(out, exact(experts.plan_for(tokens), arguments))
    assert out.shape == (tokens, HIDDEN_SIZE) and torch.equal(out, experts.minimax_experts(*arguments, 0))


def test_the_reference_is_what_it_says():
    arguments = problem(12, "global")
    expected = exact(PLANS["bfloat16"], arguments, 8)
    difference = (experts.experts_reference(*arguments, 8) - expected).norm() / expected.norm()
    assert 0 < difference < 2**-8  # what is rounded here, and nothing else


def test_more_tokens_than_planned_are_refused():
    with pytest.raises(ValueError, match=f"{experts.MAX_TOKENS + 1} tokens"):
        experts.minimax_experts(*problem(experts.MAX_TOKENS + 1), 0)


def test_strided_rows_are_read_where_they_are():
    x, *rest = problem(6)
    wide = torch.cat([x, torch.full_like(x, float("nan"))], dim=1)[:, :HIDDEN_SIZE]
    assert wide.stride(0) == 2 * HIDDEN_SIZE
    assert torch.equal(run(PLANS["bfloat16"], (wide, *rest)), run(PLANS["bfloat16"], (x, *rest)))


def test_a_token_does_not_depend_on_the_others():
    """Its experts' other routes hold infinities, and none of them reaches it."""
    x, *rest = problem(20, "same")
    alone = run(PLANS["bfloat16"], (x, *rest))[3]
    among = torch.full_like(x, float("inf"))
    among[3] = x[3]
    assert torch.equal(run(PLANS["bfloat16"], (among, *rest))[3], alone)
