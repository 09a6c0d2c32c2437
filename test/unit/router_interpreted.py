"""The router's kernels in Triton's interpreter, on a CPU, against float64.

``test_router.py`` runs this file in a process of its own, since Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sglang.srt.layers import minimax_router as router
from sglang.srt.layers.minimax_router import Plan
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from unit.interpreted import compile_whole

TILES = Plan("tiles", 32, 16, 64, 2, 4, 3)
PLANS = [Plan("reduce", 2, 8, 64, 3, 4), Plan("parts", 16, 16, 64, 2, 4), TILES]


@pytest.fixture(autouse=True)
def dot_of_bfloat16(monkeypatch):
    """The interpreter keeps bfloat16 as 16-bit integers, and would multiply these."""
    dot = InterpreterBuilder.create_dot

    def widened(handle):
        if handle.data.dtype != np.uint16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), handle.dtype)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    )


def problem(tokens: int, experts: int, hidden_size: int):
    generator = torch.Generator().manual_seed(tokens * 1000 + experts)
    x = torch.randn(tokens, hidden_size, generator=generator).bfloat16()
    return x, torch.randn(experts, hidden_size, generator=generator) * hidden_size**-0.5


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.method)
@pytest.mark.parametrize(("tokens", "experts", "hidden_size"), [(1, 256, 768), (17, 11, 200), (5, 180, 256)])
def test_logits_are_those_of_float64(plan, tokens, experts, hidden_size):
    x, weight = problem(tokens, experts, hidden_size)
    logits = router.add_partials(router.partial_logits(x, weight, plan))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().T, rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("limit", "tokens", "experts", "hidden_size"), [(512, 257, 160, 192), (512, 300, 11, 200), (2048, 1, 32, 3072)]
)
def test_prefill_is_as_near_to_float64_as_the_float32_product(limit, tokens, experts, hidden_size):
    """Rounded to 2^-24 of the sum of magnitudes in each of n additions, of errors as often up as down sqrt(n). What the
    tensor cores of a GPU cut off within a block is in test/gpu/test_router.py: here a block is a float32 product."""
    x, weight = problem(tokens, experts, hidden_size)
    exact, magnitudes = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    error = (router.add_partials(router.partial_logits(x, weight, router.PREFILL_PLANS[limit])) - exact).abs()
    assert (error <= hidden_size**0.5 * 2**-24 * magnitudes).all()
    of_float32 = torch.nn.functional.linear(x.float(), weight) - exact
    assert error.square().mean() <= 1.5**2 * of_float32.square().mean()


def test_prefill_takes_no_more_sums_than_32_bits_count():
    x, weight = torch.empty(1 << 20, 64, dtype=torch.bfloat16, device="meta"), torch.empty(2048, 64, device="meta")
    with pytest.raises(AssertionError, match="divide the tokens"):
        router.partial_logits(x, weight, router.PREFILL_PLANS[1 << 20])


@pytest.mark.parametrize(
    ("limit", "tokens"), [*((router.MAX_TOKENS, tokens) for tokens in (1, 2, 3, 17, 33, 129, 257, 0)), (256, 257)]
)
def test_the_op_takes_any_number_of_tokens(monkeypatch, limit, tokens):
    monkeypatch.setattr(router, "MAX_TOKENS", limit)
    x, weight = problem(tokens, 11, 512)
    logits = router.minimax_router_logits(x, weight)
    assert logits.shape == (tokens, 11) and logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().T, rtol=0, atol=3e-6)


def chosen(logits: torch.Tensor, bias: torch.Tensor | None, top_k: int):
    """Weights and ids in float64 by brute force: every expert beside every other; of equals the lower one is first."""
    scores = logits.double().sigmoid()
    choice = scores if bias is None else scores + bias.double()
    better = (choice[:, :, None] > choice[:, None, :]).sum(dim=1)
    equal_before = (choice[:, :, None] == choice[:, None, :]).triu(diagonal=1).sum(dim=1)
    ids = (better + equal_before).argsort(dim=-1)[:, :top_k]
    weights = scores.gather(1, ids)
    return weights / weights.sum(dim=-1, keepdim=True), ids


def check_choice(routed, partials: torch.Tensor, bias: torch.Tensor | None, top_k: int):
    logits, weights, ids = routed
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    expected_weights, expected_ids = chosen(partials.double().sum(dim=0), bias, top_k)
    torch.testing.assert_close(logits.double(), partials.double().sum(dim=0), rtol=0, atol=1e-5)
    assert torch.equal(ids.long(), expected_ids)
    torch.testing.assert_close(weights.double(), expected_weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("splits", "experts", "top_k"), [(24, 256, 8), (3, 11, 3), (1, 300, 6), (2, 8, 8), (5, 128, 1)]
)
def test_the_experts_are_those_of_float64(splits, experts, top_k, biased):
    generator = torch.Generator().manual_seed(splits)
    partials = torch.randn(splits, 6, experts, generator=generator) * splits**-0.5
    bias = torch.randn(experts, generator=generator) if biased else None
    check_choice(router.choose_experts(partials, bias, top_k, 4), partials, bias, top_k)


@pytest.mark.parametrize("splits", [1, 3])
def test_weights_are_of_scores_that_are_lost_beside_their_bias(splits):
    """Of 1e-9 and less, where the last bit of a choice is worth 1e-6. The bias alone chooses, in any place of a row."""
    generator = torch.Generator().manual_seed(7)
    partials = (torch.randn(splits, 6, 256, generator=generator) * 0.5 - 24) / splits
    bias = 8 + torch.randperm(256, generator=generator) / 256
    _, weights, ids = router.choose_experts(partials, bias, 8, 4)
    expected_weights, expected_ids = chosen(partials.double().sum(dim=0), bias, 8)
    assert torch.equal(ids.long(), expected_ids)
    torch.testing.assert_close(weights.double(), expected_weights, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shift", [0.0, 8.0, -3.0])
def test_of_equal_choices_the_lower_expert_is_first(shift):
    """Logits of three values and biases of three, far apart: dozens of experts are equal, in any place of a row."""
    generator = torch.Generator().manual_seed(1)
    partials = torch.randint(-1, 2, (1, 8, 256), generator=generator).float()
    partials[0, 0] = 0.0
    bias = torch.randint(0, 2, (256,), generator=generator) * 0.125 + shift
    _, expected = chosen(partials[0], bias, 9)
    choice = partials[0].double().sigmoid() + bias.double()
    assert (choice.gather(1, expected[:, 7:8]) == choice.gather(1, expected[:, 8:9])).any(), "no tie at the edge"
    check_choice(router.choose_experts(partials, bias, 8, 4), partials, bias, 8)


def test_logits_that_are_no_numbers_still_name_experts_that_exist():
    partials = torch.randn(2, 4, 256, generator=torch.Generator().manual_seed(2))
    partials[0, 0] = float("nan")
    partials[0, 1, 5] = float("nan")
    partials[0, 2] = -float("inf")
    partials[0, 3, 250:] = float("inf")
    ids = router.choose_experts(partials, torch.zeros(256), 8, 4)[2]
    assert ((ids >= 0) & (ids < 256)).all()
    assert all(len(set(row)) == 8 for row in ids.tolist())
    assert set(ids[3, :6].tolist()) == set(range(250, 256))


@pytest.mark.parametrize(
    ("limit", "tokens"), [*((router.MAX_TOKENS, tokens) for tokens in (1, 2, 17, 257, 0)), (256, 257)]
)
def test_the_op_routes_any_number_of_tokens(monkeypatch, limit, tokens):
    monkeypatch.setattr(router, "MAX_TOKENS", limit)
    x, weight = problem(tokens, 11, 512)
    bias = torch.linspace(-0.5, 0.5, 11)
    asked = []

    def engines_kernel(x, logits, top_k, renormalize, bias, scoring_func):
        assert renormalize and scoring_func == "sigmoid"
        asked.append(x.shape[0])
        weights, ids = chosen(logits, bias, top_k)
        return weights.float(), ids.int()

    monkeypatch.setattr(router, "fused_topk", engines_kernel)
    logits, weights, ids = router.minimax_route(x, weight, bias, 3)
    assert asked == ([tokens] if tokens > limit else [])
    assert (logits.shape, weights.shape, ids.shape) == ((tokens, 11), (tokens, 3), (tokens, 3))
    check_choice((logits, weights, ids), (x.double() @ weight.double().T)[None], bias, 3)


def test_the_reference_is_the_brute_force():
    x, weight = problem(9, 64, 128)
    bias = torch.randn(64, generator=torch.Generator().manual_seed(3))
    _, weights, ids = router.route_reference(x, weight.double(), bias.double(), 8)
    expected_weights, expected_ids = chosen(x.double() @ weight.double().T, bias, 8)
    assert torch.equal(ids.long(), expected_ids)
    torch.testing.assert_close(weights, expected_weights)


def test_a_weight_in_three_parts_is_the_whole_weight():
    """One activation of 1 and all others 0: a logit is the weight, in all of its 24 bits."""
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    for plan in (PLANS[1], TILES):
        logits = router.add_partials(router.partial_logits(torch.eye(96).bfloat16(), weight, plan))
        assert torch.equal(logits, weight.T)


def test_prefill_takes_apart_every_weight_whose_parts_are_normal():
    """Random mantissas at all exponents from 2^-102 on, below which the third part has fewer bits, and the ends: the
    largest and smallest mantissa, of which the largest weight rounded to bfloat16 would be infinite."""
    mantissas = torch.randint(0, 1 << 23, (230, 6), generator=torch.Generator().manual_seed(4))
    mantissas[:, 0], mantissas[:, 1] = 0, (1 << 23) - 1
    exponents = torch.arange(127 - 102, 255)[:, None]
    weight = (exponents << 23 | mantissas).int().view(torch.float32)
    assert weight.isfinite().all() and weight.max() == torch.finfo(torch.float32).max and weight.min() == 2.0**-102
    weight = torch.cat([weight, -weight], dim=1)
    logits = router.partial_logits(torch.eye(12).bfloat16(), weight, Plan("tiles", 16, 256, 16, 1, 4))[0]
    assert torch.equal(logits, weight.T)


def test_strided_rows_are_read_where_they_are():
    x, weight = problem(6, 16, 256)
    wide = torch.cat([x, torch.full_like(x, float("nan"))], dim=1)[:, :256]
    assert wide.stride(0) == 512
    for plan in PLANS:
        logits = router.add_partials(router.partial_logits(wide, weight, plan))
        assert torch.equal(logits, router.add_partials(router.partial_logits(x, weight, plan)))


def test_compiled_whole_with_a_symbol_for_the_tokens(monkeypatch):
    """As the engine compiles the forward: no graph break, and one graph for both sides of the limit."""
    monkeypatch.setattr(router, "fused_topk", lambda x, logits, top_k, *_: chosen(logits, None, top_k))
    gate = torch.nn.Linear(512, 11, bias=False)

    def both(x):
        return router.fused_router_logits(x * 2, gate) + 1, *router.minimax_route(x * 2, gate.weight, None, 3)

    compiled, graphs = compile_whole(both, monkeypatch)
    with torch.no_grad():
        for tokens in (5, 17, 257, 300):
            x, weight = problem(tokens, 11, 512)
            gate.weight.copy_(weight)
            exact = (x * 2).double() @ weight.double().T
            logits, *routed = compiled(x)
            torch.testing.assert_close(logits.double(), exact + 1, rtol=0, atol=6e-6)
            assert torch.equal(routed[2].long(), chosen(exact, None, 3)[1])
    assert len(graphs) == 1
