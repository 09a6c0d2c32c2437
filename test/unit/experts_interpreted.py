"""The experts' kernels in Triton's interpreter, on a CPU, against float64 on the same FP8 weights.

``test_experts.py`` runs this file in a process of its own, since Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.eplb.expert_location import compute_logical_to_rank_dispatch_physical_map
from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo, topk_ids_logical_to_physical
from sglang.srt.layers import minimax_expert_kernels as expert_kernels
from sglang.srt.layers import minimax_experts as experts
from sglang.srt.layers import minimax_experts_prefill as experts_prefill
from sglang.srt.layers.minimax_experts import Plan, Projection
from sglang.srt.layers.minimax_fp8_linear import quantise_reference
from sglang.srt.layers.minimax_fp8_quantise import quantise_reference as divided_reference
from sglang.srt.layers.minimax_parts import Parts
from sglang.srt.layers.moe.topk import StandardTopKOutput
from unit.interpreted import compile_whole, compute_as_a_gpu

HIDDEN_SIZE, WIDTH, EXPERTS, TOP_K = 256, 128, 8, 2
MOST = max(experts.plans_for(WIDTH))  # tokens
PLANS = {
    "float32": Plan(16, Projection("float32", 64, 4), Projection("float32", 128, 4)),
    "float8": Plan(16, Projection("float8", 32, 4, 2, 2), Projection("float8", 128, 4, 2, 1)),
    "float8, 64 routes": Plan(64, Projection("float8", 64, 4, 2, 1), Projection("float8", 64, 4, 2, 3)),
    "float32, float8": Plan(32, Projection("float32", 32, 4), Projection("float8", 64, 4, 2, 2)),
    "float8, float32": Plan(16, Projection("float8", 32, 4, 2, 2), Projection("float32", 64, 4)),
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    compute_as_a_gpu(monkeypatch)


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
    return experts.run_plan(plan, *arguments, first_expert)


def quantised(x: torch.Tensor, quantise=quantise_reference) -> torch.Tensor:
    """Float64 of what the FP8 quantisation makes of x [rows, columns]."""
    q, scale = quantise(x)
    return q.double() * scale.double().repeat_interleave(128, -1)


def exact(plan: Plan, arguments, first_expert: int = 0, engine: bool = False) -> torch.Tensor:
    """In float64, but for silu(gate) * up, which are bfloat16, and for what a plan quantises.

    ``engine``: gate and up are bfloat16 too, and quantising divides by the scale, where the kernels for few tokens
    multiply with its inverse: the two differ beside a limit between two e4m3 values.
    """
    of_float8 = functools.partial(quantised, quantise=divided_reference) if engine else quantised
    x, routing_weights, ids, w13, w13_scale, w2, w2_scale = arguments
    of_x, of_activated = (of_float8 if how.activations == "float8" else torch.Tensor.double for how in plan[1:])
    x = of_x(x)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, choice in np.ndindex(*ids.shape):
        expert = int(ids[token, choice]) - first_expert
        if not 0 <= expert < EXPERTS:
            continue
        of_gate_up, of_down = (
            torch.kron(scale[expert].double(), torch.ones(128, 128)) * weight[expert].double()
            for weight, scale in ((w13, w13_scale), (w2, w2_scale))
        )
        gate, up = (of_gate_up @ x[token]).to(torch.bfloat16 if engine else torch.float64).double().chunk(2)
        activated = of_activated((torch.nn.functional.silu(gate) * up).bfloat16()[None])[0]
        out[token] += routing_weights[token, choice].double() * (of_down @ activated)
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


@pytest.mark.parametrize("name", ["float32", "float8"])
def test_the_weight_of_no_expert_counts_nothing(name):
    arguments = problem(9, "missing")
    _, routing_weights, ids, *_ = arguments
    expected = exact(PLANS[name], arguments)
    routing_weights[ids == -1] = float("nan")
    check(run(PLANS[name], arguments), expected)


@pytest.mark.parametrize("name", ["float32", "float8"])
def test_experts_of_other_ranks_count_nothing(name):
    arguments = problem(9, "global")
    for first in (0, 8, 16):
        check(run(PLANS[name], arguments, first), exact(PLANS[name], arguments, first))
    nowhere = run(PLANS[name], arguments, 100)
    assert torch.equal(nowhere, torch.zeros_like(nowhere))


@pytest.mark.parametrize(("tokens", "routing"), [(0, "uniform"), (1, "same"), (3, "missing"), (MOST, "same")])
def test_the_op_takes_any_planned_number_of_tokens_and_repeats_its_bits(tokens, routing):
    arguments = problem(tokens, routing)
    out = experts.minimax_experts(*arguments, 0)
    if tokens:
        check(out, exact(experts.plan_for(tokens, WIDTH), arguments))
    assert out.shape == (tokens, HIDDEN_SIZE) and torch.equal(out, experts.minimax_experts(*arguments, 0))


@pytest.mark.parametrize(("tokens", "routing", "first"), [(1, "uniform", 0), (40, "same", 0), (33, "global", 8)])
def test_the_list_has_every_route_once_and_in_order(tokens, routing, first):
    x, weights, ids, *_ = problem(tokens, routing)
    plan = PLANS["float8"]
    work = experts.list_work(x, experts.Routing(ids, weights, first, EXPERTS), plan)
    wanted = []
    for expert in range(EXPERTS):
        routes = (ids.flatten() == first + expert).nonzero().flatten().tolist()
        wanted += [[expert, routes[i : i + plan.routes]] for i in range(0, len(routes), plan.routes)]
    number = int(work.items[0, 0])
    found = [[row[0], row[2 : 2 + row[1]]] for row in work.items[1 : 1 + number].tolist()]
    assert found == wanted and number < len(work.items), "in the order of their experts, each item filled first"
    q, scale = quantise_reference(x)
    assert torch.equal(work.x.float(), q.float()) and torch.equal(work.x_scale, scale)


def test_the_reference_is_what_it_says():
    arguments = problem(12, "global")
    expected = exact(PLANS["float32"], arguments, 8)
    difference = (experts.experts_reference(*arguments, 8) - expected).norm() / expected.norm()
    assert 0 < difference < 2**-8  # what is rounded here, and nothing else


def test_more_tokens_than_planned_are_refused():
    with pytest.raises(ValueError, match=f"{MOST + 1} tokens"):
        experts.minimax_experts(*problem(MOST + 1), 0)


@pytest.mark.parametrize("name", ["float32", "float8"])
def test_strided_rows_are_read_where_they_are(name):
    x, *rest = problem(6)
    wide = torch.cat([x, torch.full_like(x, float("nan"))], dim=1)[:, :HIDDEN_SIZE]
    assert wide.stride(0) == 2 * HIDDEN_SIZE
    assert torch.equal(run(PLANS[name], (wide, *rest)), run(PLANS[name], (x, *rest)))


def test_a_token_does_not_depend_on_the_others():
    """Its experts' other routes hold infinities, and none of them reaches it."""
    x, *rest = problem(20, "same")
    alone = run(PLANS["float8"], (x, *rest))[3]
    among = torch.full_like(x, float("inf"))
    among[3] = x[3]
    assert torch.equal(run(PLANS["float8"], (among, *rest))[3], alone)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("routing", "first_expert"), [("missing", 0), ("global", 8)])
def test_parts_add_up_to_the_sum_over_a_tokens_experts(name, routing, first_expert):
    """Those of other ranks' experts hold anything."""
    arguments = problem(5, routing, 384)
    found = experts.run_plan(PLANS[name], *arguments, first_expert, in_parts=True)
    assert isinstance(found, Parts) == (PLANS[name].down.activations == "float8"), "no sum, no launch for it"
    if isinstance(found, Parts):
        local = (found.ids >= first_expert) & (found.ids < first_expert + EXPERTS)
        found.values[~local.T] = torch.nan
        found = found.summed()
    check(found, exact(PLANS[name], arguments, first_expert))


class Experts(torch.nn.Module):
    """What the engine's layer of experts has of it, but for its own kernels: they give zeros."""

    moe_ep_rank, num_local_experts, intermediate_size_per_partition = 0, EXPERTS, WIDTH

    def __init__(self, *weights: torch.Tensor) -> None:
        super().__init__()
        names = "w13_weight", "w13_weight_scale_inv", "w2_weight", "w2_weight_scale_inv"
        for name, weight in zip(names, weights, strict=True):
            setattr(self, name, torch.nn.Parameter(weight, requires_grad=False))

    def forward(self, hidden_states, topk_output):
        return hidden_states * 0


@pytest.mark.parametrize("in_parts", [False, True])
def test_places_of_experts_may_come_in_the_dtype_of_the_engines_map(in_parts):
    """That names where EPLB or --init-expert-location have put each expert, in int64."""
    places = torch.tensor([[[place] for place in (3, 0, 7, 5, 1, 6, 2, 4)]])
    to_rank = compute_logical_to_rank_dispatch_physical_map(
        SimpleNamespace(ep_size=1, nnodes=1), places, ep_size=1, num_physical_experts=EXPERTS, ep_rank=0
    )
    x, weights, ids, *rest = problem(9)
    placed = topk_ids_logical_to_physical(
        ids, ExpertLocationDispatchInfo("static", to_rank[0], places[0], torch.ones(EXPERTS), EXPERTS)
    )
    assert placed.dtype == torch.int64 and not torch.equal(placed, ids.long())
    topk_output, many = StandardTopKOutput(weights, placed, None), expert_kernels.engine_experts
    out = expert_kernels.few_or_many_tokens(MOST, many, Experts(*rest), x, topk_output, in_parts)
    assert isinstance(out, Parts) == in_parts
    check(out.summed() if in_parts else out, exact(experts.plan_for(9, WIDTH), (x, weights, placed, *rest)))


def test_the_choice_by_the_number_of_tokens_breaks_no_graph(monkeypatch):
    """As --enable-torch-compile has it, which compiles for each number of tokens."""
    monkeypatch.setattr(expert_kernels, "reason_against_plans", lambda layer: None)
    monkeypatch.setattr(expert_kernels, "choose_experts_of_many", lambda layer: None)
    x, weights, ids, *rest = problem(MOST + 1)
    layer = Experts(*rest)
    run_experts = expert_kernels.choose_expert_kernels(layer)

    def both(x, weights, ids):
        return run_experts(layer, x + 0, StandardTopKOutput(weights, ids, None)) * 1

    compiled, graphs = compile_whole(both, monkeypatch, dynamic=False)
    with torch.no_grad():
        for tokens in (2, MOST + 1):
            inputs = x[:tokens], weights[:tokens], ids[:tokens]
            out = compiled(*inputs)
            if tokens > MOST:
                assert not out.any()
            else:
                check(out, exact(experts.plan_for(tokens, WIDTH), (*inputs, *rest)))
    assert len(graphs) == 2


@pytest.fixture
def engines_launches(monkeypatch):
    """The engine's expert GEMM as on CUDA, with a small configuration; order and sum in plain torch."""
    from sglang.srt.layers.moe.fused_moe_triton import fused_moe, fused_moe_triton_kernels

    def align(ids, block, experts):
        """Routes in the order of their experts, each expert's filled up to whole blocks with the number of routes."""
        routes, blocks = [], []
        for expert in range(experts):
            own = (ids.flatten() == expert).nonzero().flatten().tolist()
            own += [ids.numel()] * (-len(own) % block)
            routes, blocks = routes + own, blocks + [expert] * (len(own) // block)
        return tuple(torch.tensor(values, dtype=torch.int32) for values in (routes, blocks, [len(routes)]))

    config = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1}
    monkeypatch.setattr(fused_moe_triton_kernels, "_is_cuda", True)
    monkeypatch.setattr(fused_moe_triton_kernels, "is_sm90_supported", lambda: False)
    monkeypatch.setattr(fused_moe, "try_get_optimal_moe_config", lambda *args, **kwargs: (config, (None, None)))
    monkeypatch.setattr(fused_moe, "moe_align_block_size", align)
    monkeypatch.setattr(
        fused_moe, "moe_sum_reduce", lambda x, out, factor: out.copy_(x.float().sum(1) * factor), raising=False
    )


@pytest.mark.parametrize(("tokens", "width"), [(1, 128), (70, 128), (9, 384)])
def test_the_engines_gemms_take_what_is_quantised_here(engines_launches, tokens, width):
    arguments = problem(tokens, "uniform", width)
    out = experts_prefill.minimax_experts_of_many(*arguments)
    expected = exact(PLANS["float8"], arguments, engine=True)
    # Each route's output is rounded to bfloat16 before the sum: far less than what another scale would make.
    assert out.dtype == torch.bfloat16 and (out.double() - expected).norm() < 2**-8 * expected.norm()
    wide = torch.cat([arguments[0], arguments[0]], dim=1)[:, :HIDDEN_SIZE]
    assert torch.equal(experts_prefill.minimax_experts_of_many(wide, *arguments[1:]), out)


def test_more_tokens_than_fit_in_a_pass_take_several_and_none_takes_none(engines_launches, monkeypatch):
    x, *rest = problem(20)
    whole = experts_prefill.minimax_experts_of_many(x, *rest)
    monkeypatch.setattr(experts_prefill, "MOST", 8)
    assert torch.equal(experts_prefill.minimax_experts_of_many(x, *rest), whole)
    assert experts_prefill.minimax_experts_of_many(x[:0], rest[0][:0], rest[1][:0], *rest[2:]).shape == (0, HIDDEN_SIZE)


def test_piecewise_graphs_hold_it_as_one_operator(engines_launches, monkeypatch):
    """Compiled with a symbol for the tokens, without a break."""
    monkeypatch.setattr(expert_kernels, "is_in_piecewise_cuda_graph", lambda: True)
    x, weights, ids, *rest = problem(20)
    layer = Experts(*rest)

    def forward(x, weights, ids):
        topk_output, many = StandardTopKOutput(weights, ids, None), experts_prefill.experts_of_many_tokens
        return expert_kernels.few_or_many_tokens(MOST, many, layer, x + 0, topk_output) * 1

    compiled, graphs = compile_whole(forward, monkeypatch)
    with torch.no_grad():
        for tokens in (3, 20):
            inputs = x[:tokens], weights[:tokens], ids[:tokens]
            assert torch.equal(compiled(*inputs), experts_prefill.minimax_experts_of_many(*inputs, *rest))
    assert len(graphs) == 1
