"""The experts' kernels on a GPU against float64, and beside the engine's: every plan, every way a server runs them."""

from __future__ import annotations

import functools

import pytest
import torch

from sglang_minimax import overlay

overlay.install()

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from sglang.srt.layers import minimax_experts as experts  # noqa: E402  (only after the overlay)
from sglang.srt.layers.minimax_experts import Plan, Projection, Routing  # noqa: E402
from sglang.srt.layers.minimax_fp8_linear import quantise_reference  # noqa: E402

HIDDEN_SIZE, TOP_K, EXPERTS = 3072, 8, 256
SHAPES = [(256, 384), (64, 768), (32, 1536)]  # experts of a rank, and their width: enough of each for a GPU's memory
GATE_UP = [  # routes of one expert that are taken at once, and how
    (16, Projection("float32", 8, 4)), (16, Projection("float32", 4, 2)),
    (16, Projection("float8", 32, 4, 7, 3)), (16, Projection("float8", 64, 4, 4, 3)),
    (32, Projection("float8", 32, 4, 5, 2)), (64, Projection("float8", 64, 8, 4, 1)),
]  # fmt: skip
DOWN = [
    (16, Projection("float32", 8, 2)), (16, Projection("float32", 16, 4)),
    (16, Projection("float8", 128, 4, 3, 3)), (16, Projection("float8", 64, 4, 3, 5)),
    (32, Projection("float8", 128, 4, 2, 2)), (64, Projection("float8", 128, 8, 2, 2)),
]  # fmt: skip
for plan in dict.fromkeys(plan for plans in experts.PLANS.values() for plan in plans.values()):
    GATE_UP += [one for one in [(plan.routes, plan.gate_up)] if one not in GATE_UP]
    DOWN += [one for one in [(plan.routes, plan.down)] if one not in DOWN]
MOST = max(experts.plans_for(384))  # tokens
COUNTS = [tokens for tokens in (1, 2, 3, 8, 16, 17, 33, 64) if tokens <= MOST]


@functools.lru_cache(maxsize=1)
def weights(count: int, width: int):
    generator = torch.Generator("cuda").manual_seed(width)
    found = []
    for outputs, inputs in ((2 * width, HIDDEN_SIZE), (HIDDEN_SIZE, width)):
        weight = torch.empty(count, outputs, inputs, device="cuda", dtype=torch.float8_e4m3fn)
        for one in weight:
            one.copy_(torch.randn(outputs, inputs, device="cuda", generator=generator))
        scale = torch.rand(count, outputs // 128, inputs // 128, device="cuda", generator=generator) + 0.5
        found += [weight, scale * inputs**-0.5]
    return found


def inputs(tokens: int, among: int, routing: str = "uniform", seed: int = 0):
    """x, the routing weights and the ids, of ``among`` experts."""
    generator = torch.Generator("cuda").manual_seed(tokens * 101 + seed)
    x = torch.randn(tokens, HIDDEN_SIZE, device="cuda", generator=generator).bfloat16()
    ids = torch.rand(tokens, among, device="cuda", generator=generator).topk(TOP_K).indices.to(torch.int32)
    if routing == "same":
        ids = ids[:1].repeat(tokens, 1)
    return x, torch.rand(tokens, TOP_K, device="cuda", generator=generator), ids


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def exact_activated(x, ids, w13, w13_scale) -> torch.Tensor:
    """Float64 silu(gate) * up of each route, in plain torch."""
    out = torch.empty(ids.numel(), w13.shape[1] // 2, device="cuda", dtype=torch.float64)
    for expert in ids.unique().tolist():
        route = (ids.flatten() == expert).nonzero().flatten()
        weight = w13[expert].double() * w13_scale[expert].double().repeat_interleave(128, 0).repeat_interleave(128, 1)
        gate, up = (x[route // TOP_K].double() @ weight.T).chunk(2, dim=-1)
        out[route] = torch.nn.functional.silu(gate) * up
    return out


def taken_as(how: Projection, x: torch.Tensor) -> torch.Tensor:
    """Float64 of x as a projection multiplies it."""
    if how.activations != "float8":
        return x.double()
    q, scale = quantise_reference(x)
    return q.double() * scale.double().repeat_interleave(128, -1)


def every_problem(test):
    """For tests of (count, width, tokens, routing)."""
    routings = [(1, "uniform"), (16, "uniform"), (40, "same"), (64, "uniform")]
    return pytest.mark.parametrize(("count", "width"), SHAPES)(
        pytest.mark.parametrize(("tokens", "routing"), routings)(test)
    )


TOLERANCE = 0.0025  # of the relative norm: bfloat16's rounding of what comes out


@pytest.mark.parametrize(("routes", "how"), GATE_UP, ids=str)
@every_problem
def test_gate_and_up_by_every_plan(routes, how, count, width, tokens, routing):
    w13, w13_scale, _, _ = weights(count, width)
    x, routing_weights, ids = inputs(tokens, count, routing)
    plan, where = Plan(routes, how, how), Routing(ids, routing_weights, 0, count)
    found = experts.gate_up(x, where, experts.list_work(x, where, plan), w13, w13_scale, plan)
    exact = exact_activated(taken_as(how, x), ids, w13, w13_scale)
    assert relative(found, exact) < TOLERANCE
    worst = (found.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert worst.max() < 1.5 * TOLERANCE, f"a route has {worst.max():.1e}"


@pytest.mark.parametrize(("routes", "how"), DOWN, ids=str)
@every_problem
def test_down_by_every_plan(routes, how, count, width, tokens, routing):
    _, _, w2, w2_scale = weights(count, width)
    x, routing_weights, ids = inputs(tokens, count, routing)
    activated = torch.randn(tokens * TOP_K, width, device="cuda").bfloat16()
    plan, where = Plan(routes, how, how), Routing(ids, routing_weights, 0, count)
    found = experts.down(activated, where, experts.list_work(x, where, plan), w2, w2_scale, plan)
    exact = torch.zeros(tokens, HIDDEN_SIZE, device="cuda", dtype=torch.float64)
    for expert in ids.unique().tolist():
        token, choice = (ids == expert).nonzero(as_tuple=True)
        weight = w2[expert].double() * w2_scale[expert].double().repeat_interleave(128, 0).repeat_interleave(128, 1)
        part = taken_as(how, activated[token * TOP_K + choice]) @ weight.T
        exact.index_add_(0, token, part * routing_weights[token, choice, None].double())
    assert relative(found, exact) < TOLERANCE
    worst = (found.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert worst.max() < 1.5 * TOLERANCE, f"a token has {worst.max():.1e}"


@pytest.mark.parametrize("tokens", COUNTS)
@pytest.mark.parametrize("routing", ["uniform", "same"])
def test_the_op_is_right_repeats_its_bits_and_reads_strided_rows(tokens, routing):
    tensors = weights(256, 384)
    x, routing_weights, ids = inputs(tokens, EXPERTS, routing)
    out = experts.minimax_experts(x, routing_weights, ids, *tensors, 0)
    # FP8's rounding of activations where the plan has it: that of the engine, below.
    assert relative(out, experts.experts_reference(x, routing_weights, ids, *tensors, 0)) < 0.06
    for _ in range(3):
        assert torch.equal(out, experts.minimax_experts(x, routing_weights, ids, *tensors, 0))
    wide = torch.cat([x, torch.full_like(x, float("nan"))], dim=1)[:, :HIDDEN_SIZE]
    assert torch.equal(out, experts.minimax_experts(wide, routing_weights, ids, *tensors, 0))


@pytest.mark.parametrize("tokens", COUNTS)
def test_the_parts_of_all_ep_ranks_sum_to_the_whole(tokens):
    """Four ranks with 64 of 256 experts each; memory that nobody wrote holds NaN, and none of it is read."""
    w13, w13_scale, w2, w2_scale = weights(256, 384)
    x, routing_weights, ids = inputs(tokens, EXPERTS)
    ids[0, 0] = -1
    total = torch.zeros(tokens, HIDDEN_SIZE, device="cuda", dtype=torch.float64)
    for rank in range(4):
        mine = slice(64 * rank, 64 * rank + 64)
        part = w13[mine], w13_scale[mine], w2[mine], w2_scale[mine]
        dirty = [torch.full((tokens * TOP_K * HIDDEN_SIZE * 4,), float("nan"), device="cuda") for _ in range(3)]
        del dirty
        out = experts.minimax_experts(x, routing_weights, ids, *part, 64 * rank)
        exact = experts.experts_reference(x, routing_weights, ids, *part, 64 * rank)
        assert relative(out, exact) < 0.06 or not exact.any()
        assert torch.equal(out[~exact.any(dim=1)], torch.zeros_like(out[~exact.any(dim=1)]))
        total += out.double()
    whole = experts.minimax_experts(x, routing_weights, ids, w13, w13_scale, w2, w2_scale, 0)
    assert relative(total, whole.double()) < 0.006  # each part is rounded to bfloat16


@pytest.mark.parametrize("tokens", COUNTS)
def test_the_error_is_no_larger_than_the_engines(tokens):
    from sglang.srt import server_args
    from sglang.srt.layers.moe.fused_moe_triton import fused_moe

    class NoOptions:
        def __getattr__(self, name):
            return None

    server_args.set_global_server_args_for_scheduler(NoOptions())
    w13, w13_scale, w2, w2_scale = weights(256, 384)
    x, routing_weights, ids = inputs(tokens, EXPERTS)
    exact = experts.experts_reference(x, routing_weights, ids, w13, w13_scale, w2, w2_scale, 0)
    engine = fused_moe.outplace_fused_experts(
        x, w13, w2, routing_weights, ids, use_fp8_w8a8=True, w1_scale=w13_scale, w2_scale=w2_scale,
        block_shape=[128, 128], filter_expert=False,
    )  # fmt: skip
    ours = experts.minimax_experts(x, routing_weights, ids, w13, w13_scale, w2, w2_scale, 0)
    # Both round the same activations to FP8; the engine also gate, up and each expert's output to bfloat16.
    assert relative(ours, exact) <= 1.01 * relative(engine, exact)


def test_graphs_of_several_sizes_replay_in_any_order_on_new_inputs():
    tensors, sizes = weights(256, 384), COUNTS
    graphs = {}
    for tokens in sizes:
        held = inputs(tokens, EXPERTS)
        experts.minimax_experts(*held, *tensors, 0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # Twice, as two layers: the second reads what the first wrote, while kernels of both may be resident.
            first = experts.minimax_experts(*held, *tensors, 0)
            second = experts.minimax_experts(first, *held[1:], *tensors, 0)
        graphs[tokens] = graph, held, first, second
    for seed, tokens in enumerate([*COUNTS[::-1], *COUNTS, COUNTS[-1]]):
        graph, held, first, second = graphs[tokens]
        for place, value in zip(held, inputs(tokens, EXPERTS, seed=seed), strict=True):
            place.copy_(value)
        graph.replay()
        wanted = experts.minimax_experts(*held, *tensors, 0)
        assert torch.equal(first, wanted)
        assert torch.equal(second, experts.minimax_experts(wanted, *held[1:], *tensors, 0))


def test_every_fp8_value_of_a_weight_is_multiplied_as_it_is():
    """One activation of 1 and all others 0: gate and up are the weight."""
    codes = torch.arange(256, device="cuda", dtype=torch.uint8)
    finite = codes[(codes & 127) != 127].view(torch.float8_e4m3fn)
    w13 = torch.zeros(8, 256, 128, device="cuda", dtype=torch.float8_e4m3fn)
    w13[:, :128] = torch.ones(128, device="cuda").to(torch.float8_e4m3fn)  # gate is 1
    up = torch.zeros(8, 128, device="cuda").to(torch.float8_e4m3fn)
    up[0], up[1, :126] = finite[:128], finite[128:]
    w13[:, 128:, 0] = up
    scale = torch.ones(8, 2, 1, device="cuda")
    x = torch.zeros(1, 128, device="cuda", dtype=torch.bfloat16)
    x[0, 0] = 1
    ids = torch.arange(8, device="cuda", dtype=torch.int32)[None]
    silu_of_one = torch.nn.functional.silu(torch.ones((), dtype=torch.float64))
    where = Routing(ids, torch.ones(1, 8, device="cuda"), 0, 8)
    for routes, how in GATE_UP:  # in FP8 the activations are exact too: 448 and zeros
        plan = Plan(routes, how, how)
        found = experts.gate_up(x, where, experts.list_work(x, where, plan), w13, scale, plan)
        torch.testing.assert_close(found.cpu().double(), up.cpu().double() * silu_of_one, rtol=2**-8, atol=0)


def test_compiled_whole():
    """As the engine compiles the decode step for torch.compile: no graph break."""
    tensors = weights(256, 384)
    compiled = torch.compile(lambda *given: experts.minimax_experts(*given, *tensors, 0) + 1, fullgraph=True)
    for tokens in (1, MOST):
        given = inputs(tokens, EXPERTS)
        with torch.no_grad():
            assert torch.equal(compiled(*given), experts.minimax_experts(*given, *tensors, 0) + 1)
