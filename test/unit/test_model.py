"""Decisions of the model file that need no ranks."""

from __future__ import annotations

import contextlib
import json
import re
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.layers import minimax_layer_communicator
from sglang.srt.layers.communicator import FUSE_ALLREDUCE_MAX_BATCH_SIZE
from sglang.srt.layers.minimax_sharding import reason_against_runner
from sglang.srt.layers.moe import cutlass_moe
from sglang.srt.layers.moe.cutlass_moe_params import CutlassMoEParams, CutlassMoEType
from sglang.srt.layers.moe.utils import MoeA2ABackend, MoeRunnerBackend
from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.lora.layers import FusedMoEWithLoRA
from sglang.srt.models import minimax_m2, minimax_m2_moe, minimax_m2_overlap, minimax_m2_weights
from sglang.srt.models.minimax_m2 import MiniMaxM2Attention, MiniMaxM2ForCausalLM
from sglang.srt.models.minimax_m2_moe import ExpertReduction
from sglang.srt.models.minimax_m2_weights import CheckedWeights, Target, _describe, resolve_weight_name
from sglang.srt.utils.hf_transformers_utils import get_config
from torch import nn

from sglang_minimax.checkpoints import SmallModel, published_config


def communicator(reduce_scatter: bool, next_norm: bool):
    return SimpleNamespace(
        should_use_reduce_scatter=lambda batch: reduce_scatter,
        should_fuse_mlp_allreduce_with_next_layer=lambda batch: next_norm,
    )


@pytest.mark.parametrize(
    ("a2a", "fp4", "reduce_scatter", "next_norm", "who"),
    [
        ("none", False, False, False, ExpertReduction.MODEL),
        ("none", False, False, True, ExpertReduction.NEXT_NORM),
        ("none", False, True, False, ExpertReduction.REDUCE_SCATTER),
        ("none", False, True, True, ExpertReduction.REDUCE_SCATTER),
        ("none", True, True, True, ExpertReduction.DISPATCHER),
        *[(a2a, False, True, True, ExpertReduction.DISPATCHER) for a2a in ("deepep", "mooncake", "mori", "flashinfer")],
    ],
)
def test_exactly_one_reduces(monkeypatch, a2a, fp4, reduce_scatter, next_norm, who):
    monkeypatch.setattr(minimax_m2_moe, "get_moe_a2a_backend", lambda: MoeA2ABackend(a2a))
    monkeypatch.setattr(minimax_m2_moe, "should_use_flashinfer_cutlass_moe_fp4_allgather", lambda: fp4)
    assert ExpertReduction.of(communicator(reduce_scatter, next_norm), None) is who


@pytest.mark.parametrize("backend", MoeRunnerBackend)
def test_a_kernel_that_routes_by_other_rules_is_an_error(monkeypatch, backend):
    monkeypatch.setattr(minimax_m2_moe, "get_moe_runner_backend", lambda: backend)
    if backend.value in ("flashinfer_trtllm", "flashinfer_mxfp4", "triton_kernel"):
        with pytest.raises(ValueError, match=f"--moe-runner-backend {backend.value} chooses the experts in its kernel"):
            minimax_m2_moe.check_routing_stays_here()
    else:
        minimax_m2_moe.check_routing_stays_here()


@pytest.mark.parametrize(
    ("load_format", "path", "whole"),
    [
        ("auto", "folder", True),
        ("safetensors", "folder", True),
        ("remote", "s3://bucket/model", True),
        ("remote", "redis://host/model", False),
        ("dummy", "folder", False),
        ("sharded_state", "folder", False),
        ("remote_instance", "folder", False),
    ],
)
def test_the_first_load_is_of_a_whole_checkpoint_unless_the_engine_filled_the_parameters(
    monkeypatch, load_format, path, whole
):
    asked = []
    arguments = SimpleNamespace(load_format=load_format, model_path=path)
    monkeypatch.setattr(minimax_m2_weights, "get_global_server_args", lambda: arguments)
    monkeypatch.setattr(
        minimax_m2, "CheckedWeights", lambda model: SimpleNamespace(load=lambda weights, whole: asked.append(whole))
    )
    model = SimpleNamespace(weights_loaded=False)
    for _ in range(2):
        MiniMaxM2ForCausalLM.load_weights(model, [])
    assert asked == [whole, False]


class Attention:
    """Attention that fails at its first projection, so that a return before it shows."""

    def __init__(self, reduce_results: bool) -> None:
        self.reduces_output, self.fused_inputs = reduce_results, None

    def project_qkv(self, hidden_states):
        raise AssertionError("projected")


def batch(idle: bool):
    return SimpleNamespace(forward_mode=SimpleNamespace(is_idle=lambda: idle))


@pytest.mark.parametrize(("tokens", "idle"), [(0, False), (0, True), (3, True)])
def test_attention_without_tokens_returns_before_any_projection(tokens, idle):
    hidden_states = SimpleNamespace(shape=(tokens, 8))
    prepared = MiniMaxM2Attention.forward_prepare(Attention(False), None, hidden_states, batch(idle))
    assert MiniMaxM2Attention.forward_core(None, prepared) is hidden_states


def test_attention_with_tokens_projects():
    with pytest.raises(AssertionError, match="projected"):
        MiniMaxM2Attention.forward_prepare(Attention(False), None, SimpleNamespace(shape=(3, 8)), batch(False))


def test_attention_that_would_leave_others_waiting_is_an_error_that_says_why():
    with pytest.raises(AssertionError, match="would wait for this one for ever"):
        MiniMaxM2Attention.forward_prepare(Attention(True), None, SimpleNamespace(shape=(0, 8)), batch(True))


@pytest.mark.parametrize(
    ("stored", "takes", "attended"),
    [
        (True, True, "in one launch"),
        (True, False, "by the backend, which does not store"),  # more requests than the launch is for
        (False, True, "by the backend, which stores"),  # a KV cache of another dtype: the launch reads what is stored
        (False, False, "by the backend, which stores"),
    ],
)
def test_the_one_launch_of_decode_attends_to_what_is_stored_already(stored, takes, attended):
    class Backend:
        layer_id = 7

        def __call__(self, q, k, v, batch, save_kv_cache):
            return f"by the backend, which {'stores' if save_kv_cache else 'does not store'}"

    attention = SimpleNamespace(
        attn=Backend(),
        decode_attention=lambda q, batch, layer_id: "in one launch" if takes and layer_id == 7 else None,
        project_output=lambda row: row,
    )
    assert MiniMaxM2Attention.forward_core(attention, (None, "batch", ("q", "k", "v", stored))) == attended


def captured_layers(num_layers: int, already=(), pp_ranks: int = 1):
    """A stand-in for the model with what ``set_eagle3_layers_to_capture`` reads and writes."""
    return SimpleNamespace(
        pp_group=SimpleNamespace(is_last_rank=True, world_size=pp_ranks),
        config=SimpleNamespace(num_hidden_layers=num_layers),
        model=SimpleNamespace(layers_to_capture=list(already)),
    )


@pytest.mark.parametrize(
    ("asked", "already", "entering"),
    [(None, [], [2, 31, 59]), ([1, 30, 61], [], [2, 31, 62]), (None, [2, 31, 62], [2, 31, 62])],
)
def test_eagle3_layers(asked, already, entering):
    """The engine asks for none where it captures graphs: what the draft model asked for before stays."""
    model = captured_layers(62, already)
    MiniMaxM2ForCausalLM.set_eagle3_layers_to_capture(model, asked)
    assert model.model.layers_to_capture == entering and model.capture_aux_hidden_states


def test_eagle3_refuses_unknown_layers_and_pipelines():
    with pytest.raises(ValueError, match=r"outputs of layers \[62\] of 62"):
        MiniMaxM2ForCausalLM.set_eagle3_layers_to_capture(captured_layers(62), [62])
    with pytest.raises(ValueError, match=r"outputs of layers \[-1\] of 62"):
        MiniMaxM2ForCausalLM.set_eagle3_layers_to_capture(captured_layers(62), [-1])
    with pytest.raises(ValueError, match="--pp-size is 2"):
        MiniMaxM2ForCausalLM.set_eagle3_layers_to_capture(captured_layers(62, pp_ranks=2), [3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_embeddings_of_a_request_take_the_models_dtype(dtype):
    """The engine hands them over in bfloat16, and products of two dtypes fail."""
    given = torch.tensor([[1.0, -2.5], [0.25, 3.0]], dtype=torch.bfloat16)
    model = SimpleNamespace(
        pp_group=SimpleNamespace(is_first_rank=True, is_last_rank=True, world_size=1),
        embed_tokens=SimpleNamespace(weight=torch.zeros(5, 2, dtype=dtype)),
        layers_to_capture=[],
        end_layer=0,
        _forward_layers=lambda positions, hidden_states, *others: (hidden_states, None),
        norm=lambda hidden_states: hidden_states,
    )
    batch = SimpleNamespace(can_run_tbo=False)
    result = minimax_m2.MiniMaxM2Model.forward(model, None, None, batch, input_embeds=given)
    assert result.dtype == dtype and torch.equal(result.double(), given.double())


@pytest.mark.parametrize(
    ("quantised", "tp", "experts_tp", "message"),
    [
        (False, 1, 1, None),
        (False, 4, 4, None),
        (False, 4, 2, "cut into --tp 4 parts, and 2 ranks share each expert: .* Use --ep 1 and --moe-dp-size 1, or"),
        (True, 4, 4, "need experts that are not quantised: .* Fp8MoEMethod's weights without their scales"),
    ],
)
def test_adapters_of_experts_need_whole_tp_and_weights_without_scales(monkeypatch, quantised, tp, experts_tp, message):
    monkeypatch.setattr(minimax_m2_moe, "get_tensor_model_parallel_world_size", lambda: tp)
    experts = FusedMoEWithLoRA.__new__(FusedMoEWithLoRA)
    nn.Module.__init__(experts)
    experts.base_layer = SimpleNamespace(moe_tp_size=experts_tp)
    method = Fp8MoEMethod if quantised else UnquantizedFusedMoEMethod
    experts.quant_method = method.__new__(method)
    if message is None:
        minimax_m2_moe.check_adapted_experts(experts)
    else:
        with pytest.raises(ValueError, match=message):
            minimax_m2_moe.check_adapted_experts(experts)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def checkpoint_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps(published_config(SmallModel(rope_theta=5000))))
    return lambda **override: get_config(str(folder), trust_remote_code=False, model_override_args=override)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_an_override_of_rope_that_leaves_out_its_base_is_an_error_that_says_what_to_give(checkpoint_config, key):
    with pytest.raises(ValueError, match=r"rope_theta None and, among rope_parameters, None.* give rope_parameters"):
        minimax_m2._rope(checkpoint_config(**{key: YARN}))
    theta, parameters = minimax_m2._rope(checkpoint_config(**{key: {**YARN, "rope_theta": 700}}))
    assert theta == 700 and parameters["factor"] == 4.0


def test_an_override_of_the_base_that_would_change_nothing_is_an_error(checkpoint_config):
    assert minimax_m2._rope(checkpoint_config())[0] == 5000
    with pytest.raises(ValueError, match="rope_theta 700 and, among rope_parameters, 5000"):
        minimax_m2._rope(checkpoint_config(rope_theta=700))


# --- What depends on hardware that tests do not have --------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "on", "works", "others", "asked", "stays", "saved"),
    [
        (2, True, True, True, 1, True, False),
        (2, True, False, True, 1, False, False),
        (2, True, True, False, 1, False, False),  # another rank could not: this one would wait for it in a kernel
        (2, False, True, True, 0, True, False),
        (1, True, True, True, 0, True, False),  # DP attention: a rank has nothing to reduce
        (2, True, True, True, 0, False, True),  # the memory saver would take its pointers away
    ],
)
def test_fused_all_reduce_is_off_on_all_ranks_if_it_does_not_work_on_one(
    monkeypatch, ranks, on, works, others, asked, stays, saved
):
    arguments = SimpleNamespace(enable_flashinfer_allreduce_fusion=True, enable_memory_saver=saved)
    workspaces: list[dict] = []
    all_of_tp = SimpleNamespace(all_gather_object=lambda mine: [mine, others])
    make = lambda **workspace: workspaces.append(workspace) or works  # noqa: E731
    monkeypatch.setattr(minimax_layer_communicator.flashinfer_comm_fusion, "ensure_workspace_initialized", make)
    monkeypatch.setattr(minimax_layer_communicator, "get_attention_tp_size", lambda: ranks)
    monkeypatch.setattr(minimax_layer_communicator, "apply_flashinfer_allreduce_fusion", lambda batch_size: on)
    monkeypatch.setattr(minimax_layer_communicator, "get_tp_group", lambda: all_of_tp)
    monkeypatch.setattr(minimax_layer_communicator, "get_global_server_args", lambda: arguments)
    monkeypatch.setattr(minimax_layer_communicator, "log_once", lambda *_: None)
    minimax_layer_communicator.prepare_fused_all_reduce(3072)
    wanted = {"max_token_num": FUSE_ALLREDUCE_MAX_BATCH_SIZE, "hidden_dim": 3072, "dtype": torch.get_default_dtype()}
    assert workspaces == [wanted] * asked and arguments.enable_flashinfer_allreduce_fusion == stays


def test_ranks_answer_each_other_on_the_cpu_while_a_model_is_built_elsewhere():
    """By the engine's own method, over the group that it has for CPUs."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        group = SimpleNamespace(world_size=1, cpu_group=torch.distributed.group.WORLD)
        with torch.device("meta"):
            assert GroupCoordinator.all_gather_object(group, {"lora": True}) == [{"lora": True}]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("reduction", ExpertReduction)
@pytest.mark.parametrize("a2a", ["none", "deepep"])
def test_padding_is_told_to_an_a2a_backend_and_to_nothing_else(monkeypatch, a2a, reduction):
    """FP4 all-gather, a dispatcher without such a backend, and the reductions without one route all ranks' tokens."""
    monkeypatch.setattr(minimax_m2_moe, "get_moe_a2a_backend", lambda: MoeA2ABackend(a2a))
    monkeypatch.setattr(minimax_m2_moe, "get_global_server_args", lambda: SimpleNamespace(ep_dispatch_algorithm=None))
    moe, batch = SimpleNamespace(layer_id=0), SimpleNamespace(num_token_non_padded="so many")
    told = minimax_m2_moe.MiniMaxM2MoE._routing_info(moe, batch, reduction)
    is_told = a2a != "none" and reduction is ExpertReduction.DISPATCHER
    assert told == ({"num_token_non_padded": "so many"} if is_told else {})


@pytest.mark.parametrize(
    ("cuda", "a2a", "left"), [(True, "deepep", 112), (True, "mooncake", None), (False, "deepep", None)]
)
def test_products_leave_deepep_its_multiprocessors(monkeypatch, cuda, a2a, left):
    monkeypatch.setattr(minimax_m2_overlap, "is_cuda", lambda: cuda)
    monkeypatch.setattr(minimax_m2_overlap, "get_moe_a2a_backend", lambda: MoeA2ABackend(a2a))
    deepep = SimpleNamespace(get_instance=lambda: SimpleNamespace(num_sms=20))
    monkeypatch.setattr(minimax_m2_overlap, "DeepEPConfig", deepep)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    assert minimax_m2_overlap._sms_beside_deepep() == left


@pytest.mark.parametrize("at_once", [False, True])
def test_without_tokens_nothing_is_routed_by_a_kernel(at_once):
    def fails(*_):
        raise AssertionError("launched for no tokens")

    topk = type("TopK", (), {"__call__": fails, "empty_topk_output": lambda self, device: f"none on {device}"})()
    moe = SimpleNamespace(topk=topk, route_at_once=fails if at_once else None, gate=None, router_logits=fails)
    route = minimax_m2_moe.MiniMaxM2MoE._route
    assert route(moe, torch.empty(0, 8), None, ExpertReduction.MODEL) == "none on cpu"
    # And in the stages of two-batch overlap.
    state = type("State", (SimpleNamespace,), {"pop": lambda self, name: vars(self).pop(name)})()
    state.hidden_states_mlp_input = torch.empty(0, 8)
    minimax_m2_moe.MiniMaxM2MoE.op_gate(moe, state)
    minimax_m2_moe.MiniMaxM2MoE.op_select_experts(moe, state)
    assert state.topk_output == "none on cpu"


@pytest.mark.parametrize("without_graphs", [True, False])
def test_the_recorder_of_expert_loads_is_told_the_layer_but_in_piecewise_graphs(monkeypatch, without_graphs):
    told = []
    recorder = SimpleNamespace(with_current_layer=lambda layer_id: told.append(layer_id) or contextlib.nullcontext())
    arguments = SimpleNamespace(disable_piecewise_cuda_graph=without_graphs)
    monkeypatch.setattr(minimax_m2_moe, "get_global_server_args", lambda: arguments)
    monkeypatch.setattr(minimax_m2_moe, "get_global_expert_distribution_recorder", lambda: recorder)
    with minimax_m2_moe.recorded_as(5):
        assert told == ([5] if without_graphs else [])


# --- What the engine asks of a model ------------------------------------------------------------------------


def test_eplb_moves_what_belongs_to_single_experts_of_this_stage():
    experts = nn.Module()
    experts.num_local_experts = 4
    for name, shape in (("w13_weight", (4, 6, 2)), ("w2_weight", (4, 2, 3)), ("a_scale", ()), ("of_all", (8,))):
        experts.register_parameter(name, nn.Parameter(torch.randn(shape)))
    moe = SimpleNamespace(experts=experts)
    moe.expert_weights = lambda: minimax_m2_moe.MiniMaxM2MoE.expert_weights(moe)
    found = moe.expert_weights()
    assert [weight.data_ptr() for weight in found] == [experts.w13_weight.data_ptr(), experts.w2_weight.data_ptr()]
    layers = {layer_id: SimpleNamespace(block_sparse_moe=moe) for layer_id in (3, 4)}
    model = SimpleNamespace(model=SimpleNamespace(start_layer=3, end_layer=5, layers=layers))
    by_layer = MiniMaxM2ForCausalLM.routed_experts_weights_of_layer.fget(model)
    assert by_layer.keys() == {3, 4} and all(len(weights) == 2 for weights in by_layer.values())


def test_a_stage_says_its_own_layers_for_which_alone_the_engine_makes_a_kv_cache():
    model = SimpleNamespace(model=SimpleNamespace(start_layer=3, end_layer=5))
    ends = (MiniMaxM2ForCausalLM.start_layer.fget(model), MiniMaxM2ForCausalLM.end_layer.fget(model))
    assert ends == (3, 5)


def test_a_draft_model_gets_the_embedding_and_then_the_head():
    model = SimpleNamespace(model=SimpleNamespace(embed_tokens=SimpleNamespace(weight="embedding")))
    model.lm_head = SimpleNamespace(weight="head")
    assert MiniMaxM2ForCausalLM.get_embed_and_head(model) == ("embedding", "head")


# --- Configs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tp", "ep", "redundant", "moe_dp", "said"),
    [
        (8, 2, 1, 1, None),
        (8, 2, 0, 1, "179 experts are not a multiple of --ep 2"),
        (16, 1, 0, 4, None),
        (16, 1, 0, 1, "1536 / 16 = 96, is not a multiple of the quantisation block 128"),
    ],
)
def test_the_model_takes_the_division_that_the_servers_arguments_came_to(monkeypatch, tp, ep, redundant, moe_dp, said):
    arguments = SimpleNamespace(
        ep_size=ep, ep_num_redundant_experts=redundant, moe_dp_size=moe_dp, ep_dispatch_algorithm=None
    )
    monkeypatch.setattr(minimax_m2_moe, "get_global_server_args", lambda: arguments)
    monkeypatch.setattr(minimax_m2_moe, "get_tensor_model_parallel_world_size", lambda: tp)
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = SimpleNamespace(num_local_experts=179, intermediate_size=1536, quantization_config=blocks)
    with pytest.raises(ValueError, match=said) if said else contextlib.nullcontext():
        minimax_m2_moe.check_experts(config, "fp8")


@pytest.mark.parametrize(
    ("method", "runner", "ep", "a2a", "said"),
    [
        ("fp8", "cutlass", 2, "none", "fp8 experts, --ep 2 .* Leave --moe-runner-backend out"),
        ("fp8", "cutlass", 1, "none", None),
        ("fp8", "cutlass", 2, "deepep", None),  # whose dispatcher sends a rank its own routes only
        ("fp8", "auto", 2, "none", None),
        (None, "cutlass", 2, "none", None),
        ("mxfp8", "auto", 1, "none", "Add --moe-runner-backend flashinfer_trtllm_routed"),
        ("fp8", "flashinfer_cutlass", 1, "none", "flashinfer_cutlass has no kernels for FP8 experts"),
        ("fp8", "flashinfer_cutedsl", 4, "deepep", "flashinfer_cutedsl has no kernels for FP8 experts"),
        (None, "flashinfer_cutedsl", 1, "none", None),
        ("fp8", "flashinfer_trtllm_routed", 1, "none", "for Blackwell GPUs alone"),
        ("modelopt_fp4", "auto", 2, "none", "or give --moe-runner-backend flashinfer_cutlass with --ep 4"),
        ("modelopt_fp4", "auto", 1, "none", None),
        ("modelopt_fp4", "flashinfer_cutlass", 4, "none", None),
        ("compressed_tensors nvfp4-pack-quantized", "flashinfer_cutlass", 4, "none", r"first step. Leave --ep out\.$"),
        ("compressed_tensors nvfp4-pack-quantized", "auto", 1, "none", None),
        ("compressed_tensors pack-quantized", "auto", 4, "none", None),
    ],
)
def test_experts_are_refused_to_kernels_that_would_not_pass_over_those_of_other_ranks_or_not_run(
    monkeypatch, method, runner, ep, a2a, said
):
    arguments = SimpleNamespace(ep_size=ep, ep_num_redundant_experts=0, moe_dp_size=1, ep_dispatch_algorithm=None)
    monkeypatch.setattr(minimax_m2_moe, "get_global_server_args", lambda: arguments)
    monkeypatch.setattr(minimax_m2_moe, "get_tensor_model_parallel_world_size", lambda: 4)
    monkeypatch.setattr(minimax_m2_moe, "get_moe_runner_backend", lambda: MoeRunnerBackend(runner))
    monkeypatch.setattr(minimax_m2_moe, "get_moe_a2a_backend", lambda: MoeA2ABackend(a2a))
    config = SimpleNamespace(num_local_experts=256, intermediate_size=1536)
    with pytest.raises(ValueError, match=said) if said else contextlib.nullcontext():
        minimax_m2_moe.check_experts(config, method)


@pytest.mark.parametrize(("tp", "ep", "refused"), [(16, 1, True), (8, 1, False), (16, 16, False)])
def test_nvfp4_experts_whose_rows_the_engine_would_have_to_pad_are_refused(monkeypatch, tp, ep, refused):
    arguments = SimpleNamespace(ep_size=ep, ep_num_redundant_experts=0, moe_dp_size=1, ep_dispatch_algorithm=None)
    monkeypatch.setattr(minimax_m2_moe, "get_global_server_args", lambda: arguments)
    monkeypatch.setattr(minimax_m2_moe, "get_tensor_model_parallel_world_size", lambda: tp)
    monkeypatch.setattr(minimax_m2_moe, "get_moe_runner_backend", lambda: MoeRunnerBackend("flashinfer_cutlass"))
    monkeypatch.setattr(minimax_m2_moe, "get_moe_a2a_backend", lambda: MoeA2ABackend("none"))
    config = SimpleNamespace(num_local_experts=256, intermediate_size=1536)
    said = r"96 columns on each rank at --tp 16 --ep 1, .* Give --moe-runner-backend flashinfer_cutlass with --ep 16\.$"
    with pytest.raises(ValueError, match=said) if refused else contextlib.nullcontext():
        minimax_m2_moe.check_experts(config, "modelopt_fp4")


@pytest.mark.parametrize(("of_rank", "reached"), [(4, False), (8, True)])
def test_the_engines_nvfp4_kernels_want_the_experts_of_all_ranks_on_each(monkeypatch, of_rank, reached):
    """Its own function, with the parameters that its layers give it: those of all 8 experts, whatever EP says."""
    packed = lambda *shape: torch.zeros(of_rank, *shape, dtype=torch.uint8)  # noqa: E731
    each, routes = torch.ones(of_rank), torch.zeros(2, 2, dtype=torch.int32)
    params = CutlassMoEParams(CutlassMoEType.BlockscaledFP4, torch.device("cpu"), 8, 64, 128)
    monkeypatch.setattr(cutlass_moe, "prepare_moe_input", Mock(side_effect=InterruptedError), raising=False)
    x, gate_up, down = torch.zeros(2, 128, dtype=torch.bfloat16), packed(128, 64), packed(128, 32)
    with pytest.raises(InterruptedError) if reached else pytest.raises(AssertionError, match="Number of experts"):
        cutlass_moe.cutlass_moe_fp4(
            x, each, gate_up, packed(128, 8), each, each, down, packed(128, 4), each, routes.float(), routes, params
        )


@pytest.mark.parametrize(
    ("runner", "ep", "refused"),
    [
        ("flashinfer_trtllm", 1, True),  # what the engine makes of any that is not among these, and of none
        ("auto", 1, True),  # where only the checkpoint names the method
        ("cutlass", 2, True),
        ("cutlass", 1, False),
        ("flashinfer_trtllm_routed", 1, False),
        ("flashinfer_trtllm_routed", 4, False),
    ],
)
def test_mxfp8_experts_name_the_kernels_that_are_left(runner, ep, refused):
    said = f"not with --ep {ep} in {runner}: .* Add --moe-runner-backend flashinfer_trtllm_routed"
    reason = reason_against_runner("mxfp8", runner, 4, ep, blackwell=True)
    assert re.search(said, reason) if refused else reason is None
    assert "mxfp8" not in (reason_against_runner("fp8", runner, 4, ep, blackwell=True) or "")


@pytest.mark.parametrize(
    ("method", "stored", "tp", "ep", "moe_dp", "said"),
    [
        ("moe_wna16", "awq", 2, 2, 1, "puts zero points where .* Leave --ep out"),
        ("moe_wna16", "awq", 2, 1, 1, None),
        ("moe_wna16", "gptq", 2, 2, 1, None),
        *((method, method, 2, 2, 1, f"^{method} experts and --ep 2: ") for method in ("awq", "awq_marlin")),
        ("gptq", "gptq", 2, 2, 1, "Leave --ep out, and give --quantization moe_wna16"),
        ("gptq_marlin", "gptq", 2, 1, 1, "GPTQ experts cannot be divided over --tp 2"),
        ("gptq_marlin", "gptq", 2, 1, 2, None),  # each copy of the experts is whole on its rank
        ("gptq_marlin", "gptq", 4, 2, 4, r"Leave --ep out\."),
    ],
)
def test_experts_of_4_bits_are_refused_where_the_engine_would_load_or_multiply_others(
    method, stored, tp, ep, moe_dp, said
):
    with pytest.raises(ValueError, match=said) if said else contextlib.nullcontext():
        minimax_m2_moe._check_4_bit_experts(method, stored, tp, ep, moe_dp)


def test_norms_over_single_heads_are_refused():
    config = SimpleNamespace(qk_norm_type="per_head", num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6)
    with pytest.raises(ValueError, match=r"qk_norm_type 'per_head' is not supported: .*'per_layer'"):
        minimax_m2._qk_norms(config, 8)


@pytest.mark.parametrize(("given", "head_dim"), [({"head_dim": 128}, 128), ({"head_dim": None}, 64), ({}, 64)])
def test_without_a_head_dim_the_hidden_size_is_divided(given, head_dim):
    assert minimax_m2._head_dim(SimpleNamespace(hidden_size=3072, num_attention_heads=48, **given)) == head_dim


def test_a_config_with_the_older_name_of_ropes_parameters_is_scaled_by_them():
    """As one that transformers does not know, and so does not rename."""
    config = SimpleNamespace(rope_theta=5000, rope_scaling=YARN)
    assert minimax_m2._rope(config) == (5000, YARN)


@pytest.mark.parametrize(
    ("config", "rotated"),
    [({"rotary_dim": 48}, 48), ({"rope_parameters": {"partial_rotary_factor": 0.25}}, 32), ({}, 128)],
)
def test_without_a_rotary_dim_a_fraction_of_the_head_is_rotated_or_all_of_it(config, rotated):
    assert minimax_m2._rotary_dim(SimpleNamespace(**config), 128) == rotated


@pytest.mark.parametrize(
    ("can", "captures", "stages", "overlapped"),
    [(True, [], 1, True), (False, [], 1, False), (True, [1], 1, False), (True, [], 2, False)],
)
def test_halves_of_a_batch_overlap_unless_a_layer_is_captured_or_a_pipeline_goes_on(
    monkeypatch, can, captures, stages, overlapped
):
    """Overlapped, no layer's input is handed out, and what comes from a stage before is not taken."""
    ran = []

    def go(how):
        return lambda *_: (ran.append(how) or torch.ones(1, 2), None)

    monkeypatch.setattr(minimax_m2, "forward_overlapped", go("overlapped"))
    model = SimpleNamespace(
        pp_group=SimpleNamespace(is_first_rank=True, is_last_rank=True, world_size=stages),
        embed_tokens=torch.ones_like,
        layers=[],
        start_layer=0,
        end_layer=2,
        layers_to_capture=captures,
        _forward_layers=go("in turn"),
        norm=torch.clone,
    )
    minimax_m2.MiniMaxM2Model.forward(model, torch.ones(1, 2), None, SimpleNamespace(can_run_tbo=can))
    assert ran == ["overlapped" if overlapped else "in turn"]


# --- Names of a checkpoint ------------------------------------------------------------------------------------

EXPERT = "model.layers.1.block_sparse_moe.experts"


def test_of_many_missing_parts_the_first_four_are_named_and_the_rest_counted():
    parts = [("w1", expert) for expert in range(6)]
    named = "w1 of expert 0, w1 of expert 1, w1 of expert 2, w1 of expert 3"
    assert (_describe(parts[:4]), _describe(parts)) == (named, f"{named} and 2 more")


@pytest.mark.parametrize("kind", ["k", "v"])
def test_scales_of_the_kv_cache_move_from_the_projection_to_attention(kind):
    layer = "model.layers.1.self_attn"
    model = SimpleNamespace(
        model=SimpleNamespace(start_layer=0, end_layer=2), config=SimpleNamespace(tie_word_embeddings=False)
    )
    params = {f"{layer}.qkv_proj.weight": None, f"{layer}.attn.{kind}_scale": None}
    found = resolve_weight_name(model, f"{layer}.{kind}_proj.{kind}_scale", params)
    assert found == [Target(f"{layer}.attn.{kind}_scale")]


@pytest.mark.parametrize(
    ("name", "stages", "belongs"),
    [
        ("model.layers.2.self_attn.q_proj.weight", 1, "skipped"),
        ("model.layers.7.self_attn.q_proj.weight", 1, "skipped"),  # three modules of two layers each
        ("model.layers.8.self_attn.q_proj.weight", 1, None),
        ("lm_head.weight_scale", 1, None),  # a quantised head, which would be multiplied as if it were none
        ("lm_head.weight_scale", 2, "skipped"),  # here it is another stage's
        ("model.layers.1.block_sparse_moe.e_score_correction_bias", 1, None),  # beside use_routing_bias: false
        ("model.layers.1.self_attn.o_proj.bias", 1, "skipped"),
        (f"{EXPERT}.7.w1.input_scale", 1, "skipped"),
        (f"{EXPERT}.8.w1.input_scale", 1, None),  # of 8 experts
        (f"{EXPERT}.8.w1.weight", 1, None),
    ],
)
def test_a_name_that_has_no_parameter_is_skipped_if_it_is_known_and_else_a_fault(monkeypatch, name, stages, belongs):
    arguments = SimpleNamespace(json_model_override_args='{"rope_theta": 1}')
    monkeypatch.setattr(minimax_m2_weights, "get_global_server_args", lambda: arguments)
    config = SimpleNamespace(num_hidden_layers=2, num_mtp_modules=3, mtp_transformer_layers=2, num_local_experts=8)
    model = SimpleNamespace(
        model=SimpleNamespace(start_layer=0, end_layer=2), config=config, pp_group=SimpleNamespace(world_size=stages)
    )
    config.tie_word_embeddings = False
    assert resolve_weight_name(model, name, {f"{EXPERT}.w13_weight": None}) == belongs


HEAD, EMBEDDING = ("lm_head.weight", torch.ones(4, 2)), ("model.embed_tokens.weight", torch.zeros(4, 2))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("tied", "tensors", "filled_with"),
    [
        (True, [EMBEDDING], 0),
        (True, [EMBEDDING, HEAD], 1),
        (True, [HEAD, EMBEDDING], 1),
        (False, [HEAD, EMBEDDING], 1),
    ],
)
def test_a_checkpoints_own_head_is_the_head_in_whatever_order(tied, tensors, filled_with, whole):
    model = torch.nn.Module()
    model.config = SimpleNamespace(tie_word_embeddings=tied, num_local_experts=8)
    model.pp_group = SimpleNamespace(world_size=1)
    model.model = torch.nn.Module()
    model.model.embed_tokens = torch.nn.Embedding(4, 2)
    model.lm_head = torch.nn.Linear(2, 4, bias=False)
    with torch.no_grad():
        assert CheckedWeights(model).load(tensors, whole) == {"lm_head.weight", "model.embed_tokens.weight"}
    assert (model.lm_head.weight == filled_with).all() and (model.model.embed_tokens.weight == 0).all()
