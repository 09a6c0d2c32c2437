"""The planner's bytes: against the parameters of the model, a written checkpoint, and what a load on GPUs logged."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from sglang.srt import server_args as engine
from sglang.srt.distributed import parallel_state
from sglang.srt.layers import dp_attention, minimax_counterpart
from sglang.srt.layers.moe import utils as moe_utils
from sglang.srt.layers.moe.utils import MoeRunnerBackend
from sglang.srt.layers.quantization import modelopt_quant
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp4Config
from sglang.srt.models import minimax_m2
from transformers import PretrainedConfig
from unit.plans import B200, FP8, H200, M25, config_of, name_of

from sglang_minimax.checkpoints import SmallModel, write_checkpoint
from sglang_minimax.plan import layout as layouts
from sglang_minimax.plan import memory
from sglang_minimax.plan.hardware import GPUS
from sglang_minimax.plan.layout import Flags, settle
from sglang_minimax.plan.shape import read_model, shape_of_config


def quant_config_of(config: dict):
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    if quantization["quant_method"] == "fp8":
        return Fp8Config.from_config(quantization)
    quant_config = ModelOptFp4Config.from_config(quantization)
    quant_config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return quant_config


@pytest.fixture
def built_bytes(monkeypatch):
    """Bytes of the parameters of the real model on one rank, by kind. The model is built on torch's meta device, in
    groups that consist of their sizes and this rank's place in them."""
    monkeypatch.setattr(modelopt_quant, "is_blackwell_supported", lambda: True)
    monkeypatch.setattr(modelopt_quant, "swizzle_blockscale", pad_scales)
    monkeypatch.setattr(minimax_m2, "prepare_fused_all_reduce", lambda hidden_size: None)
    monkeypatch.setattr(minimax_m2, "choose_prefill_graphs", lambda model: None)
    monkeypatch.setattr(minimax_counterpart, "_choices_of_any_rank", dict)
    monkeypatch.setattr(minimax_counterpart, "_node_group", lambda ranks: SimpleNamespace(world_size=ranks))

    def build(config: dict, layout: layouts.Layout, rank: int, stage: int) -> dict[str, int]:
        fake_groups(monkeypatch, layout, rank, stage)
        arguments = engine.ServerArgs(model_path="dummy", tp_size=layout.tp, ep_size=layout.ep, device="cpu")
        arguments.nnodes, arguments.pp_size = layout.flags.nnodes, layout.pp
        arguments.attn_cp_size, arguments.moe_dp_size = layout.flags.attn_cp_size, layout.flags.moe_dp_size
        arguments.enable_dp_attention = layout.dp_groups > 1
        monkeypatch.setattr(moe_utils, "MOE_RUNNER_BACKEND", MoeRunnerBackend(layout.flags.moe_runner_backend))
        monkeypatch.setattr(engine, "_global_server_args", arguments)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"):
                model = minimax_m2.MiniMaxM2ForCausalLM(
                    PretrainedConfig(**{k: v for k, v in config.items() if k != "quantization_config"}),
                    quant_config_of(config),
                )
        finally:
            torch.set_default_dtype(before)
        sizes: dict[str, int] = {}
        for name, parameter in model.named_parameters():
            kind = kind_of(name)
            sizes[kind] = sizes.get(kind, 0) + parameter.numel() * parameter.element_size()
        return sizes

    return build


def pad_scales(scale: torch.Tensor) -> torch.Tensor:
    """As many bytes as the engine's function gives, which needs a GPU."""
    return torch.nn.functional.pad(scale.view(torch.uint8), (0, -scale.shape[2] % 4, 0, -scale.shape[1] % 128))


def fake_groups(monkeypatch, layout: layouts.Layout, rank: int, stage: int) -> None:
    def group(size: int, place: int) -> SimpleNamespace:
        return SimpleNamespace(
            world_size=size, rank_in_group=place, rank=place,
            is_first_rank=place == 0, is_last_rank=place == size - 1,
        )  # fmt: skip

    flags = layout.flags
    attention = group(layout.attention_ranks, rank % layout.attention_ranks)
    for name, value in {
        "_TP": group(layout.tp, rank),
        "_ATTN_TP": attention,
        "_ATTN_CP": group(flags.attn_cp_size, rank // layout.attention_ranks % flags.attn_cp_size),
        "_MOE_DP": group(flags.moe_dp_size, rank // (layout.tp // flags.moe_dp_size)),
        "_MOE_EP": group(layout.ep, rank // layout.expert_ranks % layout.ep),
        "_MOE_TP": group(layout.expert_ranks, rank % layout.expert_ranks),
        "_PP": group(layout.pp, stage),
    }.items():
        monkeypatch.setattr(parallel_state, name, value)
    for name, value in {
        "_ATTN_DP_SIZE": layout.dp_groups,
        "_ATTN_DP_RANK": rank // layout.attention_ranks,
        "_ENABLE_DP_ATTENTION_FLAG": layout.dp_groups > 1,
    }.items():
        monkeypatch.setattr(dp_attention, name, value, raising=False)


def kind_of(name: str) -> str:
    for part, kind in (
        ("experts.", "experts"),
        ("norm", "norms"),
        ("self_attn", "attention"),
        ("block_sparse_moe", "router"),
        ("embed_tokens", "embedding"),
        ("lm_head", "head"),
    ):
        if part in name:
            return kind
    raise AssertionError(f"of no kind: {name}")


NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]}
NVFP4_EXPERTS = {**NVFP4, "ignore": ["lm_head", "model.layers.*.self_attn*"]}


@pytest.mark.parametrize(
    ("quantization", "flags"),
    [
        (FP8, Flags()),
        (FP8, Flags(tp=4)),
        (FP8, Flags(tp=8)),
        (FP8, Flags(tp=8, dp=4, enable_dp_attention=True, ep=8)),
        (FP8, Flags(tp=16, nnodes=2)),
        (FP8, Flags(tp=16, ep=16, nnodes=2)),
        (FP8, Flags(tp=8, pp=3, nnodes=3)),
        (FP8, Flags(tp=8, attn_cp_size=4)),
        (FP8, Flags(tp=8, attn_cp_size=2, moe_dp_size=2)),
        (FP8, Flags(tp=16, moe_dp_size=2, nnodes=2)),
        (None, Flags(tp=16, nnodes=2)),
        (None, Flags(tp=8, dp=2, enable_dp_attention=True, ep=4)),
        (NVFP4, Flags(tp=8)),
        (NVFP4_EXPERTS, Flags(tp=4, dp=4, ep=4, enable_dp_attention=True, moe_runner_backend="flashinfer_cutlass")),
        (NVFP4_EXPERTS, Flags(tp=16, ep=16, nnodes=2, moe_runner_backend="flashinfer_cutlass")),
    ],
    ids=name_of,
)
def test_weights_are_the_bytes_of_the_models_parameters(built_bytes, quantization, flags):
    config = config_of(quantization_config=quantization)
    shape = shape_of_config(config, "few layers")
    layout = settle(flags, shape, B200)
    for stage in range(layout.pp):
        planned = memory.weight_bytes(shape, layout, stage)
        for rank in {0, layout.tp // 2, layout.tp - 1}:
            built = built_bytes(config, layout, rank, stage)
            assert {kind: size for kind, size in planned.items() if size} == built, (rank, stage)


def test_all_ranks_together_hold_a_written_checkpoint_once_and_its_replicas_again(tmp_path):
    """Counted from the tensors of a file, without any formula of a layer: what is held more often is named here."""
    from safetensors import safe_open

    small = SmallModel(num_hidden_layers=2, num_local_experts=8, vocab_size=1024)
    folder = write_checkpoint(tmp_path, small)
    times = {"k_proj": 2, "v_proj": 2, "k_norm": 2, "gate": 16, "e_score": 16, "layernorm": 16, "model.norm": 16}
    times |= {"q_proj": 2, "k_proj": 4}  # those of its counterpart on the other node too
    expected = 0
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no dictionary)
            tensor = file.get_slice(name)
            count = torch.Size(tensor.get_shape()).numel()
            expected += 4 * count * next((factor for part, factor in times.items() if part in name), 1)
    shape = read_model(str(folder))
    layout = settle(Flags(tp=16, nnodes=2), shape, H200)
    assert 16 * sum(memory.weight_bytes(shape, layout).values()) == expected


def test_the_published_model_has_the_bytes_that_its_shapes_say():
    """229 billion parameters, by hand: a byte each, and two for embedding and head."""
    weights = memory.weight_bytes(M25, settle(Flags(), M25, H200))
    assert weights["embedding"] == weights["head"] == 200064 * 3072 * 2
    experts = 62 * 256 * 3 * 1536 * 3072
    assert weights["experts"] == experts + experts // 128**2 * 4


@pytest.mark.parametrize(("tp", "heads"), [(1, 8), (4, 2), (8, 1), (16, 1), (48, 1)])
def test_a_token_takes_k_and_v_of_the_heads_that_a_rank_holds(tp, heads):
    layout = settle(Flags(tp=tp, nnodes=max(tp // 8, 1), ep=None if tp < 48 else 16), M25, H200)
    assert memory.kv_bytes_per_token(M25, layout) == heads * 2 * 128 * 62 * 2
    in_fp8 = layouts.replace(M25, kv_cache_bytes=1)  # as the checkpoint says, where no flag does
    assert memory.kv_bytes_per_token(in_fp8, layout) == heads * 2 * 128 * 62


def test_the_stage_that_leaves_least_for_the_kv_cache_counts_and_requests_are_as_long_as_was_asked_for():
    """62 layers on four stages are 15, 15, 16 and 16, and the last has the head beside them."""
    flags = Flags(tp=2, pp=4, context_length=4096)
    planned = memory.plan_memory(M25, settle(flags, M25, H200), H200)
    assert planned.stage == 3 and planned.requests == planned.tokens // 4096
    assert planned.kv_bytes_per_token == 4 * 2 * 128 * 16 * 2


def test_amds_attention_takes_less_of_the_memory_for_long_contexts_only():
    (amd, *_) = (gpu for gpu in GPUS.values() if gpu.architecture == "cdna3")
    short, long = (settle(Flags(tp=8, context_length=length), M25, amd) for length in (8192, 8193))
    assert memory.static_fraction(amd, long)[0] == pytest.approx(0.85 * memory.static_fraction(amd, short)[0])


GIB = 2**30
# What `bench_one_batch --tp 2 --mem-fraction-static 0.85 --load-format dummy` logged on two H200 for the published
# config with 16 layers: "Load weight begin. avail mem=128.51 GB" (other processes were there), "Load weight end. ...
# mem usage=28.61 GB", "KV Cache is allocated. #tokens: 2642015, K size: 40.31 GB, V size: 40.31 GB".
LOGGED_FREE_GIB, LOGGED_WEIGHTS_GIB, LOGGED_TOKENS, LOGGED_KV_GIB = 128.51, 28.61, 2_642_015, 80.62


def test_weights_and_kv_cache_are_those_that_a_load_on_gpus_logged():
    sixteen = dataclasses.replace(M25, num_hidden_layers=16)
    free_mib = round(LOGGED_FREE_GIB * 1024) + memory.BEFORE_LOADING_MIB
    gpu = dataclasses.replace(H200, memory_mib=free_mib)
    planned = memory.plan_memory(sixteen, settle(Flags(tp=2, mem_fraction_static=0.85), sixteen, gpu), gpu)
    assert sum(planned.weights.values()) / GIB == pytest.approx(LOGGED_WEIGHTS_GIB, rel=0.005)
    assert planned.tokens == pytest.approx(LOGGED_TOKENS, rel=0.005)
    assert LOGGED_TOKENS * planned.kv_bytes_per_token / GIB == pytest.approx(LOGGED_KV_GIB, rel=0.001)
