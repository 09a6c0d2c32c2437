"""When a layer takes the experts' kernels, for how many tokens, by which plan; what they compute when interpreted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers import minimax_expert_kernels as kernels
from sglang.srt.layers import minimax_experts as experts
from sglang.srt.layers import minimax_experts_prefill, minimax_log
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod
from unit.interpreted import assert_passes_interpreted

from sglang_minimax.cpu_host import has_no_accelerator

MOST = max(experts.PLANS[384])  # tokens


@pytest.mark.skipif(not has_no_accelerator(), reason="the op is registered for the GPU here: test/gpu/test_experts.py")
def test_the_kernels_in_tritons_interpreter():
    assert_passes_interpreted("experts_interpreted.py")


@pytest.mark.parametrize("width", experts.PLANS)
def test_every_count_up_to_the_limit_has_the_first_plan_that_is_large_enough(width):
    plans = experts.PLANS[width]
    for tokens in range(1, max(plans) + 1):
        assert experts.plan_for(tokens, width) == plans[min(limit for limit in plans if limit >= tokens)]
    assert experts.plan_for(max(plans) + 1, width) is None


def test_a_width_without_plans_takes_those_of_the_width_nearest_to_it():
    assert experts.plans_for(128) is experts.PLANS[min(experts.PLANS)]
    assert experts.plans_for(1536) is experts.PLANS[max(experts.PLANS)]


@pytest.mark.parametrize("plan", [plan for plans in experts.PLANS.values() for plan in plans.values()])
def test_a_plan_is_one_that_any_division_of_the_experts_can_run(plan):
    for projection, rows in ((plan.gate_up, 2 * plan.gate_up.columns), (plan.down, plan.down.columns)):
        assert 128 % projection.columns == 0, "a tile must lie within a block of scales"
        assert projection.activations in ("float32", "float8")
        assert projection.activations != "float8" or rows >= 64
    assert plan.routes >= 16 and plan.routes & (plan.routes - 1) == 0


def layer(**changes):
    """An object like the engine's layer of experts: FP8 in blocks, TP4 of the published model, no option given."""
    method = Fp8MoEMethod.__new__(Fp8MoEMethod)
    method.block_quant, method.use_mxfp8 = changes.pop("block_quant", True), False
    method.quant_config = SimpleNamespace(weight_block_size=changes.pop("weight_block_size", [128, 128]))
    config = {
        "activation": "silu", "is_gated": True, "apply_router_weight_on_input": False, "no_combine": False,
        "num_fused_shared_experts": 0, "gemm1_alpha": None, "gemm1_clamp_limit": None, "routed_scaling_factor": None,
        "top_k": 8, "num_experts": 256, "num_local_experts": 64,
    }  # fmt: skip
    config |= {name: changes.pop(name) for name in list(changes) if name in config}
    triton = changes.pop("runner", "triton")
    backend = SimpleNamespace(is_triton=lambda: triton == "triton", value=triton)
    own = {
        "quant_method": method, "moe_runner_config": SimpleNamespace(**config), "hidden_size": 3072,
        "intermediate_size_per_partition": 384, "reduce_results": False, "moe_ep_rank": 1,
        "num_local_experts": config["num_local_experts"], "runner": SimpleNamespace(runner_backend=backend),
    }  # fmt: skip
    return SimpleNamespace(**own | changes)


@pytest.fixture
def server(monkeypatch):
    """A server's arguments on an H200, no dispatcher."""
    arguments = SimpleNamespace(
        enable_lora=None, lora_paths=None, enable_symm_mem=False, enable_deterministic_inference=False,
        enable_fused_moe_sum_all_reduce=False, cpu_offload_gb=0, offload_group_size=-1, moe_runner_backend="cutlass",
    )  # fmt: skip
    monkeypatch.setattr(kernels, "is_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    monkeypatch.setattr(kernels, "get_moe_a2a_backend", lambda: SimpleNamespace(is_none=lambda: True))
    monkeypatch.setattr(kernels, "should_use_flashinfer_cutlass_moe_fp4_allgather", lambda: False)
    for module in (kernels, minimax_experts_prefill):
        monkeypatch.setattr(module, "get_global_server_args", lambda: arguments)
    minimax_log.log_once.cache_clear()
    yield arguments
    minimax_log.log_once.cache_clear()


@pytest.mark.parametrize(
    ("on_this_rank", "of_many", "why"),
    [
        (256, minimax_experts_prefill.experts_of_many_tokens, "in two launches of ours"),
        (64, kernels.engine_experts, "routes to experts of other ranks"),
    ],
)
def test_the_published_model_takes_the_kernels_and_says_so_once(server, monkeypatch, on_this_rank, of_many, why):
    said = []
    monkeypatch.setattr(minimax_log, "log_info_on_rank0", lambda logger, text: said.append(text))
    chosen = [kernels.choose_expert_kernels(layer(num_local_experts=on_this_rank)) for _ in range(3)]
    assert {(way.func, way.args) for way in chosen} == {(kernels.few_or_many_tokens, (MOST, of_many))}
    assert len(said) == 2 and f"kernels up to {MOST} tokens" in said[0] and why in said[1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_quant": False}, "FP8 weights in blocks"),
        ({"quant_method": SimpleNamespace()}, "SimpleNamespace"),
        ({"weight_block_size": [64, 128]}, "[64, 128]"),
        ({"runner": "deep_gemm"}, "--moe-runner-backend cutlass"),
        ({"intermediate_size_per_partition": 192}, "192"),
        ({"top_k": 6}, "6 experts"),
        ({"activation": "gelu"}, "SiLU"),
        ({"gemm1_clamp_limit": 7.0}, "SiLU"),
        ({"apply_router_weight_on_input": True}, "SiLU"),
        ({"routed_scaling_factor": 2.5}, "SiLU"),
        ({"reduce_results": True}, "SiLU"),
    ],
)
def test_other_experts_are_the_engines(server, monkeypatch, changes, reason):
    said = []
    monkeypatch.setattr(minimax_log, "log_info_on_rank0", lambda logger, text: said.append(text))
    assert kernels.choose_expert_kernels(layer(**changes)) is kernels.engine_experts
    assert len(said) == 1
    assert reason in said[0]


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("enable_lora", True, "LoRA"),
        ("enable_symm_mem", True, "symm-mem"),
        ("enable_deterministic_inference", True, "batch size"),
        ("cpu_offload_gb", 4, "offloaded"),
        ("offload_group_size", 2, "offloaded"),
        ("forward_hooks", [{}], "--forward-hooks"),
        ("debug_tensor_dump_output_folder", "dumped", "--debug-tensor-dump-output-folder"),
    ],
)
def test_an_option_that_the_kernels_do_not_know_leaves_them_out(server, option, value, reason):
    assert kernels.reason_against_plans(layer()) is None
    setattr(server, option, value)
    assert reason in kernels.reason_against_plans(layer())


def test_a_backend_without_a_runner_of_its_own_leaves_them_out(server):
    without = layer()
    del without.runner  # as the engine's cutlass experts have it
    assert "--moe-runner-backend cutlass" in kernels.reason_against_plans(without)


def test_other_hardware_and_a_dispatcher_leave_them_out(server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
        assert "9.0" in kernels.reason_against_plans(layer())
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "is_cuda", lambda: False)
        assert "NVIDIA" in kernels.reason_against_plans(layer())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_default_dtype", lambda: torch.float16)
        assert "float16" in kernels.reason_against_plans(layer())
    monkeypatch.setattr(kernels, "get_moe_a2a_backend", lambda: SimpleNamespace(is_none=lambda: False))
    assert "dispatcher" in kernels.reason_against_plans(layer())


@pytest.mark.parametrize(
    ("tokens", "piecewise", "taken"),
    [
        (0, False, "engine"),
        (1, False, "ours"),
        (MOST, False, "ours"),
        (MOST + 1, False, "engine"),
        (1, True, "engine"),
    ],
)
def test_many_tokens_and_piecewise_graphs_are_the_engines(monkeypatch, tokens, piecewise, taken):
    calls = []
    monkeypatch.setattr(kernels, "is_in_piecewise_cuda_graph", lambda: piecewise)
    monkeypatch.setattr(kernels, "minimax_experts", lambda *given: calls.append(("ours", given[-1])))

    class Layer(torch.nn.Module):
        w13_weight = w13_weight_scale_inv = w2_weight = w2_weight_scale_inv = None
        moe_ep_rank, num_local_experts = 3, 64

        def forward(self, hidden_states, topk_output):
            calls.append(("engine", None))

    topk_output = StandardTopKOutput(torch.empty(tokens, 8), torch.empty(tokens, 8, dtype=torch.int32), None)
    kernels.few_or_many_tokens(MOST, kernels.engine_experts, Layer(), torch.empty(tokens, 256), topk_output)
    assert calls == [(taken, 192 if taken == "ours" else None)], "the fourth EP rank's experts begin at 192"


def test_the_op_has_a_shape_without_running():
    """As torch.compile asks for it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(3, 256, dtype=torch.bfloat16)
        ids, weights = torch.empty(3, 8, dtype=torch.int32), torch.empty(3, 8)
        w13, w2 = (torch.empty(*size, dtype=torch.float8_e4m3fn) for size in ((4, 256, 256), (4, 256, 128)))
        scales = torch.empty(4, 2, 2), torch.empty(4, 2, 1)
        out = torch.ops.sglang.minimax_experts(x, weights, ids, w13, scales[0], w2, scales[1], 0)
    assert out.shape == (3, 256) and out.dtype == torch.bfloat16
