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

TOKENS = [1, 2, 3, 8, 16, 17, 31, 32, 33, 64, 100, 256, 257, 4096]
SHAPES = [(experts, hidden_size) for experts in (8, 11, 256) for hidden_size in (512, 3072)]
TOP_K = 8


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


@pytest.mark.parametrize("plan", router.PLANS.values(), ids=lambda plan: "/".join(map(str, plan)))
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


@pytest.mark.parametrize("limit", router.PLANS)
def test_the_error_is_that_of_the_float32_layer(limit):
    x, weight, exact, _ = problem(limit, 256, 3072)
    ours = root_mean_square(router.minimax_router_logits(x, weight) - exact)
    stock = root_mean_square(torch.nn.functional.linear(x.float(), weight) - exact)
    assert ours <= 1.5 * stock, f"{ours:.2e}, and the float32 layer's is {stock:.2e}"


@pytest.mark.parametrize("plan", router.PLANS.values(), ids=lambda plan: "/".join(map(str, plan)))
def test_a_weight_is_whole(plan):
    """One activation of 1 and all others 0: a logit is the weight, which two parts of three would not be."""
    _, weight, _, _ = problem(1, 256, 512)
    x = torch.eye(512, device="cuda").bfloat16()
    logits = router.add_partials(router.partial_logits(x, weight, plan))
    torch.testing.assert_close(logits, weight.T.contiguous(), rtol=2**-22, atol=0)


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
    compiled = torch.compile(lambda x: router.fused_router_logits(x * 2, gate) + 1, fullgraph=True, dynamic=True)
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (5, 17, 64, 256, 257, 4096):
            x, weight, exact, bound = problem(tokens, 256, 3072)
            gate.weight.copy_(weight)
            check(compiled(x), exact * 2 + 1, bound * 2 + 2**-20)
