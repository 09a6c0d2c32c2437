"""When a layer takes the router's kernels, by which plan, and what they compute when interpreted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers import minimax_log
from sglang.srt.layers import minimax_router as router
from sglang.srt.layers.moe.topk import TopK, TopKOutputFormat
from sglang.srt.layers.moe.utils import MoeA2ABackend
from unit.interpreted import assert_passes_interpreted

from sglang_minimax.cpu_host import has_no_accelerator

FITS = {
    "on_cuda": True,
    "hopper": True,
    "activations": torch.bfloat16,
    "weights": torch.float32,
    "deterministic": False,
}


@pytest.mark.skipif(not has_no_accelerator(), reason="the op is registered for the GPU here: test/gpu/test_router.py")
def test_the_kernels_in_tritons_interpreter():
    assert_passes_interpreted("router_interpreted.py")


def test_every_count_up_to_the_limit_has_the_first_plan_that_is_large_enough():
    plans = router.PLANS | router.PREFILL_PLANS
    for tokens in [*range(1, 600), *(limit + more for limit in router.PREFILL_PLANS for more in (0, 1))][:-1]:
        assert router.plan_for(tokens) == plans[min(limit for limit in plans if limit >= tokens)]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"on_cuda": False}, "NVIDIA"),
        ({"hopper": False}, "compute capability 9 "),
        ({"activations": torch.float16}, "float16"),
        ({"weights": torch.bfloat16}, "weights are torch.bfloat16"),
        ({"deterministic": True}, "batch size"),
        ({"hooks": [{}]}, "--forward-hooks"),
    ],
)
def test_a_layer_takes_the_kernels_where_they_were_measured(monkeypatch, changed, reason):
    said = server(monkeypatch, FITS | changed)
    gate = gate_of(FITS | changed)
    chosen = {router.choose_router_logits(gate) for _ in range(3)}
    assert chosen == {router.fused_router_logits if reason is None else router.linear_router_logits}
    assert len(said) == 1 and (reason or f"two kernels up to {router.MAX_TOKENS} tokens") in said[0]


def gate_of(case: dict) -> SimpleNamespace:
    return SimpleNamespace(weight=torch.empty(1, dtype=case["weights"]))


def server(monkeypatch, case: dict, **arguments) -> list[str]:
    """A host and a server of which ``case`` holds; gives what is logged."""
    said: list[str] = []
    monkeypatch.setattr(router, "is_cuda", lambda: case["on_cuda"])
    monkeypatch.setattr(router, "get_device_capability", lambda: (9, 0) if case["hopper"] else (10, 0))
    monkeypatch.setattr(torch, "get_default_dtype", lambda: case["activations"])
    plain = {"ep_dispatch_algorithm": None, "enable_symm_mem": False, "forward_hooks": case.get("hooks")}
    arguments = SimpleNamespace(enable_deterministic_inference=case["deterministic"], **(plain | arguments))
    monkeypatch.setattr(router, "get_global_server_args", lambda: arguments)
    monkeypatch.setattr(minimax_log, "log_info_on_rank0", lambda logger, text: said.append(text))
    # Of this test alone, so that no other finds said what it waits for.
    minimax_log.log_once.cache_clear()
    return said


@pytest.mark.parametrize(
    ("of_topk", "of_server", "case", "reason"),
    [
        ({}, {}, {}, None),
        ({"correction_bias": None}, {}, {}, None),
        ({}, {}, {"deterministic": True}, "batch size"),
        ({"scoring_func": "softmax"}, {}, {}, "scores are softmax"),
        ({"renormalize": False}, {}, {}, "renormalised: False"),
        ({"routed_scaling_factor": 2.5}, {}, {}, "times 2.5"),
        ({"use_grouped_topk": True, "topk_group": 1, "num_expert_group": 1}, {}, {}, "groups of experts"),
        ({"num_fused_shared_experts": 1}, {}, {}, "shared experts"),
        ({"custom_routing_function": print}, {}, {}, "function of its own"),
        ({"correction_bias": torch.zeros(4, dtype=torch.bfloat16)}, {}, {}, "bias is torch.bfloat16"),
        ({"output_format": TopKOutputFormat.BYPASSED}, {}, {}, "want BYPASSED"),
        ({}, {"ep_dispatch_algorithm": "static"}, {}, "--ep-dispatch-algorithm static"),
        ({}, {"a2a": MoeA2ABackend.DEEPEP}, {}, "a2a backend"),
        ({}, {"enable_symm_mem": True}, {}, "--enable-symm-mem"),
    ],
)
def test_a_layer_chooses_in_the_kernel_where_topk_would_do_no_more(monkeypatch, of_topk, of_server, case, reason):
    backend = of_server.pop("a2a", MoeA2ABackend.NONE)
    said = server(monkeypatch, FITS | case, **of_server)
    monkeypatch.setattr(router, "get_moe_a2a_backend", lambda: backend)
    plain = {"top_k": 2, "layer_id": 0, "scoring_func": "sigmoid", "correction_bias": torch.zeros(4)}
    topk = TopK(**(plain | of_topk))
    chosen = {router.choose_route(gate_of(FITS), topk) for _ in range(3)}
    assert chosen == {router.fused_route if reason is None else None}
    assert len(said) == 1
    assert (reason or f"chosen by the router's second kernel up to {router.MAX_TOKENS} tokens") in said[0]


def test_who_listens_to_the_choice_is_told(monkeypatch):
    """What the engine's ``TopK`` tells them, in its order, and its whole answer."""
    x, gate = torch.randn(3, 16), torch.nn.Linear(16, 4, bias=False)
    bias = torch.tensor([0.0, 2.0, 0.0, 1.0])
    monkeypatch.setattr(router, "minimax_route", router.route_reference)
    told = []
    monkeypatch.setattr(
        router, "get_global_experts_capturer", lambda: SimpleNamespace(capture=lambda **what: told.append(what))
    )
    recorder = SimpleNamespace(on_select_experts=lambda **what: told.append(what))
    monkeypatch.setattr(router, "get_global_expert_distribution_recorder", lambda: recorder)
    topk = TopK(2, layer_id=5, scoring_func="sigmoid", correction_bias=bias)
    ours, engines = router.fused_route(x, gate, topk), topk.forward_native(x, gate(x))
    assert told == [{"layer_id": 5, "topk_ids": ours.topk_ids}, {"topk_ids": ours.topk_ids}]
    assert ours.topk_ids.tolist() == [[1, 3]] * 3
    torch.testing.assert_close(ours.router_logits, engines.router_logits)
    order = engines.topk_ids.argsort(dim=-1).gather(1, ours.topk_ids.argsort(dim=-1).argsort(dim=-1))
    torch.testing.assert_close(ours.topk_weights, engines.topk_weights.gather(1, order))
