"""When the experts of many tokens take activations that are quantised here; ``experts_interpreted.py`` has what comes
out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers import minimax_expert_kernels, minimax_experts_prefill, minimax_log
from sglang.srt.layers.moe.topk import StandardTopKOutput

from sglang_minimax import adjustments, quantised_inputs


def layer(experts: int | None = 256, local: int = 256):
    return SimpleNamespace(moe_runner_config=SimpleNamespace(num_experts=experts, num_local_experts=local))


@pytest.fixture
def choose(monkeypatch):
    """What is chosen, and the line that it logs."""

    def chosen(experts, sums: bool = False):
        said: list[str] = []
        arguments = SimpleNamespace(enable_fused_moe_sum_all_reduce=sums)
        monkeypatch.setattr(minimax_experts_prefill, "get_global_server_args", lambda: arguments)
        monkeypatch.setattr(minimax_log, "log_info_on_rank0", lambda logger, text: said.append(text))
        minimax_log.log_once.cache_clear()
        found = minimax_experts_prefill.choose_experts_of_many(experts)
        minimax_log.log_once.cache_clear()
        return found, said

    return chosen


def test_all_experts_on_a_rank_take_it_and_say_so(choose):
    found, said = choose(layer())
    assert found is minimax_experts_prefill.experts_of_many_tokens
    assert len(said) == 1 and "two launches of ours" in said[0]


@pytest.mark.parametrize(
    ("experts", "options", "reason"),
    [
        (layer(256, 32), {}, "other ranks"),
        (layer(None, 32), {}, "other ranks"),
        (layer(), {"sums": True}, "--enable-fused-moe-sum-all-reduce"),
    ],
)
def test_what_is_not_known_is_left_to_the_engine(choose, experts, options, reason):
    found, said = choose(experts, **options)
    assert found is None and len(said) == 1 and reason in said[0]


@pytest.mark.parametrize(("tokens", "piecewise"), [(0, False), (65, False), (1, True), (300, True)])
def test_above_the_plans_and_in_piecewise_graphs_it_is_what_runs(monkeypatch, tokens, piecewise):
    calls = []
    monkeypatch.setattr(minimax_expert_kernels, "is_in_piecewise_cuda_graph", lambda: piecewise)
    monkeypatch.setattr(minimax_experts_prefill, "minimax_experts_of_many", lambda *given: calls.append(given))
    names = "w13_weight", "w13_weight_scale_inv", "w2_weight", "w2_weight_scale_inv"
    experts = SimpleNamespace(**{name: name for name in names})
    x, weights, ids = torch.empty(tokens, 256), torch.empty(tokens, 8), torch.empty(tokens, 8, dtype=torch.int32)
    many = minimax_experts_prefill.experts_of_many_tokens
    minimax_expert_kernels.few_or_many_tokens(64, many, experts, x, StandardTopKOutput(weights, ids, None))
    assert len(calls) == 1 and calls[0][3:] == names
    assert all(given is wanted for given, wanted in zip(calls[0], (x, weights, ids), strict=False))


def test_the_engines_invocation_takes_a_pair_as_it_is_and_quantises_a_tensor():
    kernels = SimpleNamespace(sglang_per_token_group_quant_fp8=lambda x, group, eps=0: (x, group, eps))
    quantised_inputs.take_pairs(kernels)
    pair = torch.ones(1), torch.ones(1)
    assert kernels.sglang_per_token_group_quant_fp8(pair, 128) is pair
    x = torch.ones(2)
    assert kernels.sglang_per_token_group_quant_fp8(x, 128, eps=1) == (x, 128, 1)


def test_the_engine_still_names_what_is_replaced():
    from sglang.srt.layers.moe.fused_moe_triton import fused_moe_triton_kernels as kernels

    [(name, adjust)] = quantised_inputs.ADJUSTMENTS
    assert name == kernels.__name__ and (name, adjust) in list(adjustments.for_this_host())
    assert "sglang_per_token_group_quant_fp8" in kernels.invoke_fused_moe_kernel.__code__.co_names
    assert kernels.sglang_per_token_group_quant_fp8.__module__ != quantised_inputs.__name__, "it wraps, and says whose"
    assert hasattr(kernels.sglang_per_token_group_quant_fp8, "__wrapped__")
