"""Decisions of the model file that need no ranks."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.moe.utils import MoeA2ABackend, MoeRunnerBackend
from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.lora.layers import FusedMoEWithLoRA
from sglang.srt.models import minimax_m2, minimax_m2_moe
from sglang.srt.models.minimax_m2 import MiniMaxM2Attention, MiniMaxM2ForCausalLM
from sglang.srt.models.minimax_m2_moe import ExpertReduction
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
    monkeypatch.setattr(minimax_m2, "get_global_server_args", lambda: arguments)
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
