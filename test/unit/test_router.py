"""The router's kernels in Triton's interpreter against float64, and when a layer takes them."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels run on a CPU with TRITON_INTERPRET=1", allow_module_level=True)

from sglang.srt.layers import minimax_router as router
from sglang.srt.layers.minimax_router import Plan
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

PLANS = [Plan("fma", 16, 16, 64, 2, 4), Plan("reduce", 2, 8, 64, 3, 4), Plan("parts", 16, 16, 64, 2, 4)]
FITS = {"on_cuda": True, "activations": torch.bfloat16, "weights": torch.float32, "deterministic": False}


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


@pytest.mark.parametrize("tokens", [1, 2, 3, 17, 33, 129, 257, 0])
def test_the_op_takes_any_number_of_tokens(tokens):
    x, weight = problem(tokens, 11, 512)
    logits = router.minimax_router_logits(x, weight)
    assert logits.shape == (tokens, 11) and logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().T, rtol=0, atol=3e-6)


def test_a_weight_in_three_parts_is_the_whole_weight():
    """One activation of 1 and all others 0: a logit is the weight, in all of its 24 bits."""
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    logits = router.add_partials(router.partial_logits(torch.eye(96).bfloat16(), weight, PLANS[2]))
    assert torch.equal(logits, weight.T)


def test_every_count_up_to_the_limit_has_the_first_plan_that_is_large_enough():
    limits = [min(limit for limit in router.PLANS if limit >= tokens) for tokens in range(1, router.MAX_TOKENS + 1)]
    assert [router.plan_for(tokens) for tokens in range(1, 257)] == [router.PLANS[limit] for limit in limits]


def test_strided_rows_are_read_where_they_are():
    x, weight = problem(6, 16, 256)
    wide = torch.cat([x, torch.full_like(x, float("nan"))], dim=1)[:, :256]
    assert wide.stride(0) == 512
    for plan in PLANS:
        logits = router.add_partials(router.partial_logits(wide, weight, plan))
        assert torch.equal(logits, router.add_partials(router.partial_logits(x, weight, plan)))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"on_cuda": False}, "NVIDIA"),
        ({"activations": torch.float16}, "float16"),
        ({"weights": torch.bfloat16}, "weights are torch.bfloat16"),
        ({"deterministic": True}, "batch size"),
    ],
)
def test_a_layer_takes_the_kernels_where_they_were_measured(monkeypatch, changed, reason):
    case = FITS | changed
    monkeypatch.setattr(router, "is_cuda", lambda: case["on_cuda"])
    monkeypatch.setattr(torch, "get_default_dtype", lambda: case["activations"])
    arguments = SimpleNamespace(enable_deterministic_inference=case["deterministic"])
    monkeypatch.setattr(router, "get_global_server_args", lambda: arguments)
    said = []
    monkeypatch.setattr(router, "log_info_on_rank0", lambda logger, text: said.append(text))
    router._log_once.cache_clear()
    gate = SimpleNamespace(weight=torch.empty(1, dtype=case["weights"]))
    chosen = {router.choose_router_logits(gate) for _ in range(3)}
    router._log_once.cache_clear()
    assert chosen == {router.fused_router_logits if reason is None else router.linear_router_logits}
    assert len(said) == 1 and (reason or "two kernels up to 256 tokens") in said[0]


def test_compiled_whole_with_a_symbol_for_the_tokens(monkeypatch):
    """As the engine compiles the forward: no graph break, and one graph for both sides of the limit."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # as a host without a GPU is set up
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    gate = torch.nn.Linear(512, 11, bias=False)
    compiled = torch.compile(
        lambda x: router.fused_router_logits(x * 2, gate) + 1, fullgraph=True, dynamic=True, backend=backend
    )
    with torch.no_grad():
        for tokens in (5, 17, 257, 300):
            x, weight = problem(tokens, 11, 512)
            gate.weight.copy_(weight)
            exact = (x * 2).double() @ weight.double().T + 1
            torch.testing.assert_close(compiled(x).double(), exact, rtol=0, atol=6e-6)
    assert len(graphs) == 1
