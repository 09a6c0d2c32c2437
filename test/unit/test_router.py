"""The router's kernels in Triton's interpreter against float64, and what its choice must hold."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels run on a CPU with TRITON_INTERPRET=1", allow_module_level=True)

from sglang.srt.layers import minimax_router as router
from sglang.srt.layers.minimax_router import Plan

PLANS = [
    Plan("fma", 16, 16, 64, 2, 4),
    Plan("reduce", 2, 8, 64, 3, 4),
]


def problem(tokens: int, experts: int, hidden_size: int, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(tokens * 1000 + experts)
    x = torch.randn(tokens, hidden_size, generator=generator).to(dtype)
    weight = torch.randn(experts, hidden_size, generator=generator) * hidden_size**-0.5
    return x, weight, torch.randn(experts, generator=generator)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.method)
@pytest.mark.parametrize(("tokens", "experts", "hidden_size"), [(1, 256, 768), (17, 11, 200), (5, 180, 256)])
def test_logits_are_those_of_float64(plan, tokens, experts, hidden_size):
    x, weight, _ = problem(tokens, experts, hidden_size)
    logits = router.add_partials(router.partial_logits(x, weight, plan))
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().T, rtol=0, atol=3e-6)


@pytest.mark.parametrize(("experts", "top_k"), [(256, 8), (11, 8), (180, 6), (8, 8)])
@pytest.mark.parametrize("biased", [True, False])
def test_the_choice_is_that_of_plain_torch(experts, top_k, biased):
    x, weight, bias = problem(9, experts, 256)
    bias = bias if biased else None
    logits, weights, ids = router.choose_experts(router.partial_logits(x, weight, PLANS[0]), bias, top_k)
    exact = router.route(x.double(), weight, bias, top_k)
    torch.testing.assert_close(logits, exact[0], rtol=0, atol=3e-6)
    assert torch.equal(ids, exact[2]) and ids.dtype == torch.int32
    torch.testing.assert_close(weights, exact[1], rtol=1e-5, atol=1e-6)


def test_of_equal_scores_the_first_experts_win():
    partials = torch.zeros(2, 3, 20)
    _, weights, ids = router.choose_experts(partials, torch.zeros(20), 4)
    assert torch.equal(ids, torch.arange(4, dtype=torch.int32).expand(3, 4))
    torch.testing.assert_close(weights, torch.full((3, 4), 0.25))


def test_strided_rows_are_read_where_they_are():
    x, weight, _ = problem(6, 16, 256)
    wide = torch.cat([x, torch.full_like(x, float("nan"))], dim=1)[:, :256]
    assert wide.stride(0) == 512
    logits = router.add_partials(router.partial_logits(wide, weight, PLANS[0]))
    assert torch.equal(logits, router.add_partials(router.partial_logits(x, weight, PLANS[0])))
