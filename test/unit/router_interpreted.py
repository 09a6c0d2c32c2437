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

PLANS = [Plan("fma", 16, 16, 64, 2, 4), Plan("reduce", 2, 8, 64, 3, 4), Plan("parts", 16, 16, 64, 2, 4)]


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


def test_strided_rows_are_read_where_they_are():
    x, weight = problem(6, 16, 256)
    wide = torch.cat([x, torch.full_like(x, float("nan"))], dim=1)[:, :256]
    assert wide.stride(0) == 512
    for plan in PLANS:
        logits = router.add_partials(router.partial_logits(wide, weight, plan))
        assert torch.equal(logits, router.add_partials(router.partial_logits(x, weight, plan)))


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
