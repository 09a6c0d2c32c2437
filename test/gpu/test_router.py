"""The router's kernels on a GPU against float64: every plan, every way in which a server runs them."""

from __future__ import annotations

import functools

import pytest
import torch

from sglang_minimax import overlay

overlay.install()

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from sglang.srt.layers import minimax_router as router  # noqa: E402  (only after the overlay)
from sglang.srt.layers.moe.topk import fused_topk  # noqa: E402

TOKENS = [1, 2, 3, 8, 16, 17, 31, 32, 33, 64, 100, 256, 257, 4096]
SHAPES = [(experts, hidden_size) for experts in (8, 11, 256) for hidden_size in (512, 3072)]
TOP_K = 8
PLANS = router.PLANS | router.PREFILL_PLANS


@functools.lru_cache(maxsize=2)
def problem(tokens: int, experts: int, hidden_size: int):
    """x, weight, the logits in float64, and the largest error that summing in float32 explains for each.

    Products are exact. Of n sums, each rounded to 2^-23 of its value at worst (tensor cores cut off), the errors are
    as often up as down: together sqrt(n) of them, relative to the sum of magnitudes. It is a generous bound, but one
    that TF32 breaks, as a test below makes sure.
    """
    generator = torch.Generator("cuda").manual_seed(tokens * 10007 + experts * 101 + hidden_size)
    x = torch.randn(tokens, hidden_size, device="cuda", generator=generator).bfloat16()
    weight = torch.randn(experts, hidden_size, device="cuda", generator=generator) * hidden_size**-0.5
    magnitudes = x.double().abs() @ weight.double().abs().T
    return x, weight, x.double() @ weight.double().T, hidden_size**0.5 * 2**-23 * magnitudes


def check(logits, exact, bound):
    assert logits.dtype == torch.float32 and logits.shape == exact.shape
    error = (logits.double() - exact).abs()
    assert (error <= bound).all(), f"largest error {error.max():.2e}, {(error / bound).max():.2f} of what is allowed"


def root_mean_square(error: torch.Tensor) -> float:
    return float(error.double().square().mean().sqrt())


def rounded_to_tf32(weight: torch.Tensor) -> torch.Tensor:
    bits = weight.view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("plan", PLANS.values(), ids=lambda plan: "/".join(map(str, plan)))
@pytest.mark.parametrize(("experts", "hidden_size"), SHAPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_plan_takes_any_shape(plan, tokens, experts, hidden_size):
    x, weight, exact, bound = problem(tokens, experts, hidden_size)
    check(router.add_partials(router.partial_logits(x, weight, plan)), exact, bound)


@pytest.mark.parametrize(("experts", "hidden_size"), SHAPES)
@pytest.mark.parametrize("tokens", [0, *TOKENS])
def test_the_op_takes_any_number_of_tokens_and_repeats_its_bits(tokens, experts, hidden_size):
    x, weight, exact, bound = problem(tokens, experts, hidden_size)
    wide = torch.cat([x, torch.full_like(x, float("nan"))], dim=1)[:, :hidden_size]
    logits = router.minimax_router_logits(x, weight)
    check(logits, exact, bound)
    assert torch.equal(logits, router.minimax_router_logits(x, weight))
    check(router.minimax_router_logits(wide, weight), exact, bound)


@pytest.mark.parametrize("hidden_size", [512, 3072])
def test_the_bound_would_find_tf32(hidden_size):
    x, weight, exact, bound = problem(256, 256, hidden_size)
    assert ((x.double() @ rounded_to_tf32(weight).double().T - exact).abs() > bound).any()


@pytest.mark.parametrize(("tokens", "plan"), PLANS.items(), ids=str)
def test_the_error_is_that_of_the_float32_layer(tokens, plan):
    x, weight, exact, _ = problem(min(tokens, 8192), 256, 3072)
    ours = root_mean_square(router.add_partials(router.partial_logits(x, weight, plan)) - exact)
    stock = root_mean_square(torch.nn.functional.linear(x.float(), weight) - exact)
    assert ours <= 1.5 * stock, f"{ours:.2e}, and the float32 layer's is {stock:.2e}"


@pytest.mark.parametrize("plan", PLANS.values(), ids=lambda plan: "/".join(map(str, plan)))
def test_a_weight_is_whole(plan):
    """One activation of 1 and all others 0: a logit is the weight, which two parts of three would not be."""
    _, weight, _, _ = problem(1, 256, 512)
    x = torch.eye(512, device="cuda").bfloat16()
    logits = router.add_partials(router.partial_logits(x, weight, plan))
    torch.testing.assert_close(logits, weight.T.contiguous(), rtol=2**-22, atol=0)


def test_more_tokens_than_32_bits_count_values_of(monkeypatch):
    """The rows of the longest prompt that a server may have, at a stride that puts the last ones beyond 2^31."""
    tokens, hidden_size = 163840, 3072
    x = torch.empty(tokens, 13312, dtype=torch.bfloat16, device="cuda")[:, :hidden_size].normal_()
    assert x[-1].storage_offset() > 2**31
    weight = problem(1, 256, hidden_size)[1]
    routed = router.minimax_route(x, weight, None, TOP_K)
    for rows in (slice(0, 300), slice(tokens // 2, tokens // 2 + 300), slice(tokens - 300, tokens)):
        exact, magnitudes = x[rows].double() @ weight.double().T, x[rows].double().abs() @ weight.double().abs().T
        bound = hidden_size**0.5 * 2**-23 * magnitudes
        check_route([part[rows] for part in routed], exact, bound, None, TOP_K)


@functools.lru_cache
def bias_of(experts: int, shift: float = 0.0) -> torch.Tensor:
    """[experts] float32, in no order."""
    generator = torch.Generator("cuda").manual_seed(experts)
    return torch.rand(experts, device="cuda", generator=generator) * 0.2 + shift


def check_route(routed, exact, bound, bias, top_k):
    """Against float64: each place has an expert whose choice is the one that belongs there, as near as rounding lets
    it be, no expert has two places, and the weights are those of the experts that were chosen."""
    logits, weights, ids = routed
    check(logits, exact, bound)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert weights.shape == ids.shape == (exact.shape[0], top_k)
    scores = exact.sigmoid()
    choice = scores if bias is None else scores + bias.double()
    # Of a score 2^-21 for exponential and quotient; of a sum half of its last bit; of a sigmoid a quarter of its input.
    wrong = bound.max(dim=-1, keepdim=True).values / 4 + 2**-21 + choice.abs().max() * 2**-24
    belongs = choice.sort(dim=-1, descending=True).values[:, :top_k]
    assert ((choice.gather(1, ids.long()) - belongs).abs() <= 2 * wrong).all()
    assert (ids.sort(dim=-1).values.diff(dim=-1) > 0).all()
    chosen = scores.gather(1, ids.long())
    expected = chosen / chosen.sum(dim=-1, keepdim=True)
    assert ((weights - expected).abs() <= 4 * wrong).all(), f"{(weights - expected).abs().max():.2e}"


@pytest.mark.parametrize("shift", [0.0, 8.0, None])
@pytest.mark.parametrize(("experts", "hidden_size"), SHAPES)
@pytest.mark.parametrize("tokens", [0, *TOKENS])
def test_the_op_routes_any_number_of_tokens_and_repeats_its_bits(tokens, experts, hidden_size, shift):
    x, weight, exact, bound = problem(tokens, experts, hidden_size)
    top_k = min(TOP_K, experts - 1)
    bias = None if shift is None else bias_of(experts, shift)
    if tokens == 0:
        assert [tuple(part.shape) for part in router.minimax_route(x, weight, bias, top_k)] == [
            (0, experts),
            (0, top_k),
            (0, top_k),
        ]
        return
    routed = router.minimax_route(x, weight, bias, top_k)
    check_route(routed, exact, bound, bias, top_k)
    again = router.minimax_route(x, weight, bias, top_k)
    assert all(torch.equal(one, other) for one, other in zip(routed, again, strict=True))


@pytest.mark.parametrize("warps", [1, 2, 4, 8])
@pytest.mark.parametrize("plan", router.CHOICE_PLANS.values(), ids=lambda plan: "/".join(map(str, plan.logits)))
def test_every_choice_plan(plan, warps):
    x, weight, exact, bound = problem(33, 256, 3072)
    partials = router.partial_logits(x, weight, plan.logits)
    check_route(router.choose_experts(partials, bias_of(256), TOP_K, warps), exact, bound, bias_of(256), TOP_K)


@pytest.mark.parametrize("warps", [1, 2, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 8.0, -3.0])
def test_the_choice_is_the_engines(warps, shift):
    """On the same logits, by the engine's own kernel: the experts, and the weights to the last bits."""
    generator = torch.Generator("cuda").manual_seed(warps)
    logits = torch.randn(4096, 256, device="cuda", generator=generator) * 2
    bias = bias_of(256, shift)
    weights, ids = fused_topk(logits, logits, TOP_K, True, bias, "sigmoid")
    _, our_weights, our_ids = router.choose_experts(logits[None], bias, TOP_K, warps)
    same = (our_ids == ids).all(dim=-1)
    # Where the last bit of a sigmoid differs, two experts a bit apart may change places.
    assert same.double().mean() > 0.99
    choice = logits.sigmoid() + bias
    apart = (choice.gather(1, our_ids.long()) - choice.gather(1, ids.long())).abs()
    assert (apart <= 4 * torch.finfo(torch.float32).eps * choice.abs().max()).all()
    torch.testing.assert_close(our_weights[same], weights[same], rtol=1e-5, atol=2**-22 * (1 + abs(shift)))


@pytest.mark.parametrize("warps", [1, 2, 4, 8])
def test_of_equal_choices_the_lower_expert_is_first_as_in_the_engine(warps):
    generator = torch.Generator("cuda").manual_seed(7)
    logits = torch.randint(-1, 2, (512, 256), device="cuda", generator=generator).float()
    logits[0] = 0.0
    bias = torch.randint(0, 2, (256,), device="cuda", generator=generator) * 0.125
    _, ids = fused_topk(logits, logits, TOP_K, True, bias, "sigmoid")
    _, weights, our_ids = router.choose_experts(logits[None], bias, TOP_K, warps)
    assert torch.equal(our_ids, ids)
    ranked = (logits.double().sigmoid() + bias.double()).sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(our_ids.long(), ranked[:, :TOP_K])
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(512, device="cuda"), rtol=0, atol=1e-6)


def test_graphs_of_several_sizes_replay_in_any_order():
    weight, bias, graphs = problem(16, 256, 3072)[1], bias_of(256), {}
    torch.cuda.synchronize()
    for tokens in (64, 16, 1, 256, 2048):
        x = torch.zeros(tokens, 3072, device="cuda", dtype=torch.bfloat16)
        router.minimax_route(x, weight, bias, TOP_K)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            routed = router.minimax_route(x, weight, bias, TOP_K)
        graphs[tokens] = x, graph, routed
    for turn, tokens in enumerate([16, 1, 2048, 256, 16, 64, 1, 64, 256, 2048, 16]):
        x, graph, routed = graphs[tokens]
        generator = torch.Generator("cuda").manual_seed(turn)
        x.copy_(torch.randn(x.shape, device="cuda", generator=generator))
        for part in routed:
            part.zero_()
        graph.replay()
        expected = router.minimax_route(x, weight, bias, TOP_K)
        assert all(torch.equal(one, other) for one, other in zip(routed, expected, strict=True))


@pytest.mark.parametrize(("experts", "hidden_size"), SHAPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_experts_are_those_of_float64(tokens, experts, hidden_size):
    """Wherever the last one in and the first one out lie further apart than two logits can be wrong."""
    x, weight, exact, bound = problem(tokens, experts, hidden_size)
    top_k = min(TOP_K, experts - 1)
    bias = torch.linspace(-0.1, 0.1, experts, device="cuda", dtype=torch.float64)

    def chosen(logits):
        return (logits.double().sigmoid() + bias).topk(top_k, dim=-1).indices.sort(dim=-1).values

    ranked = (exact.sigmoid() + bias).sort(dim=-1, descending=True).values
    # The slope of a sigmoid is 1/4 at most, and two scores may be wrong.
    clear = ranked[:, top_k - 1] - ranked[:, top_k] > bound.max(dim=-1).values / 2
    assert clear.double().mean() > 0.8 or tokens < 16
    assert torch.equal(chosen(router.minimax_router_logits(x, weight))[clear], chosen(exact)[clear])


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_captured_graph_replays_on_new_inputs(tokens):
    x, weight, _, _ = problem(tokens, 256, 3072)
    x = x.clone()
    router.minimax_router_logits(x, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = router.minimax_router_logits(x, weight)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        logits.fill_(float("nan"))
        graph.replay()
        assert torch.equal(logits, router.minimax_router_logits(x, weight))


def test_compiled_whole_with_a_symbol_for_the_tokens():
    """As the engine compiles the forward: no graph break, and no other graph on the other side of the limit."""
    gate = torch.nn.Linear(3072, 256, bias=False, device="cuda")
    bias = bias_of(256)

    def both(x):
        return router.fused_router_logits(x * 2, gate) + 1, router.minimax_route(x * 2, gate.weight, bias, TOP_K)

    compiled = torch.compile(both, fullgraph=True, dynamic=True)
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (5, 17, 64, 256, 257, 4096):
            x, weight, exact, bound = problem(tokens, 256, 3072)
            gate.weight.copy_(weight)
            logits, routed = compiled(x)
            check(logits, exact * 2 + 1, bound * 2 + 2**-20)
            check_route(routed, exact * 2, bound * 2, bias, TOP_K)
