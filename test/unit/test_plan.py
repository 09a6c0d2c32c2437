"""The planner: its bytes against the model's parameters, its rules against the engine's, its speed without torch."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang.srt import server_args as engine
from sglang.srt.configs.model_config import is_piecewise_cuda_graph_disabled_model
from sglang.srt.distributed import parallel_state
from sglang.srt.distributed.utils import get_pp_indices
from sglang.srt.layers import dp_attention, minimax_counterpart
from sglang.srt.layers.moe import utils as moe_utils
from sglang.srt.layers.moe.utils import MoeRunnerBackend
from sglang.srt.layers.quantization import modelopt_quant
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp4Config
from sglang.srt.models import minimax_m2
from transformers import PretrainedConfig

from sglang_minimax import cli, sharding
from sglang_minimax.checkpoints import SmallModel, published_config, write_checkpoint
from sglang_minimax.plan import layout as layouts
from sglang_minimax.plan import memory, paths, report, scaling
from sglang_minimax.plan.hardware import GPUS, Gpu
from sglang_minimax.plan.layout import Flags, settle
from sglang_minimax.plan.shape import PUBLISHED_CONFIG, CannotPlan, Quantisation, read_model, shape_of_config

H200, B200 = GPUS["h200"], GPUS["b200"]
M25 = read_model("m2.5")
RECORDS = scaling.DOCUMENT.parents[1] / "benchmark" / "results"


def name_of(value) -> str | None:
    """A short name for a test's parameter."""
    if isinstance(value, Flags):
        return " ".join(value.words())
    return str((value or {}).get("quant_algo", "FP8" if value else None)) if not isinstance(value, str) else None


# ------------------------------------------------------------------ bytes, against the model's own parameters


def config_of(**changes) -> dict:
    """The published config with few layers, for a model that is built without memory."""
    unplanned = {"rms_norm_eps": 1e-6, "rope_theta": 5e6, "tie_word_embeddings": False}
    return {**PUBLISHED_CONFIG, **unplanned, "num_hidden_layers": 5, **changes}


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


FP8 = PUBLISHED_CONFIG["quantization_config"]
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
        (NVFP4_EXPERTS, Flags(tp=16, nnodes=2)),
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


# ------------------------------------------------------------------ the engine's own settings


@pytest.mark.parametrize("gpu", ["h100", "h200", "b200", "b300"])
@pytest.mark.parametrize(
    "flags",
    [
        Flags(), Flags(tp=4), Flags(tp=8), Flags(tp=16, nnodes=2), Flags(tp=8, pp=2, nnodes=2),
        Flags(tp=8, dp=8, enable_dp_attention=True), Flags(tp=2, dp=2, enable_dp_attention=True),
    ],
    ids=name_of,
)  # fmt: skip
def test_the_fraction_of_memory_is_the_one_that_the_engine_takes(gpu, flags):
    layout = settle(flags, M25, GPUS[gpu])
    arguments = engine.ServerArgs(model_path="dummy")
    arguments.tp_size, arguments.pp_size, arguments.dp_size = flags.tp, flags.pp, flags.dp
    arguments.enable_dp_attention, arguments.device = flags.enable_dp_attention, "cuda"
    arguments.disable_piecewise_cuda_graph = flags.enable_dp_attention or flags.pp > 1
    arguments.get_model_config = lambda: SimpleNamespace(is_multimodal=False)
    arguments.use_mla_backend = lambda: False
    arguments._handle_gpu_memory_settings(GPUS[gpu].memory_mib)
    fraction, reserve = memory.static_fraction(GPUS[gpu], layout)
    assert fraction == arguments.mem_fraction_static
    assert reserve is not None and reserve.cuda_graph_max_bs == arguments.cuda_graph_max_bs
    assert reserve.chunked_prefill_size == arguments.chunked_prefill_size
    assert not is_piecewise_cuda_graph_disabled_model(["MiniMaxM2ForCausalLM"])


def test_a_given_fraction_is_taken():
    layout = settle(Flags(tp=8, mem_fraction_static=0.7), M25, H200)
    assert memory.static_fraction(H200, layout) == (0.7, None)


@pytest.mark.parametrize(("num_layers", "num_stages"), [(62, 1), (62, 2), (62, 4), (62, 5), (7, 3), (3, 3)])
def test_pipeline_stages_are_the_engines(num_layers, num_stages):
    for stage in range(num_stages):
        layers = sharding.pipeline_layers(num_layers, stage, num_stages)
        assert (layers.start, layers.stop) == get_pp_indices(num_layers, stage, num_stages)


@pytest.mark.parametrize(("tp", "ep"), [(8, 1), (8, 2), (16, 4), (16, 16)])
def test_ranks_hold_the_experts_that_the_engine_gives_them(tp, ep):
    from sglang.srt.entrypoints.engine import _compute_parallelism_ranks

    shape = sharding.ExpertShape(256, 1536)
    arguments = SimpleNamespace(
        enable_dp_attention=False, dp_size=1, tp_size=tp, attn_cp_size=1, moe_dp_size=1, ep_size=ep
    )
    seen = set()
    for rank in range(tp):
        _, _, ep_rank = _compute_parallelism_ranks(arguments, rank)
        experts, columns = shape.experts_of(rank, tp, ep), shape.columns_of(rank, tp, ep)
        assert experts.start == ep_rank * 256 // ep and len(experts) == 256 // ep
        seen |= set(itertools.product(experts, columns[::96]))
    assert len(seen) == 256 * 16


# ------------------------------------------------------------------ rules, and the way out


@pytest.mark.parametrize(
    ("flags", "rule", "first"),
    [
        (Flags(tp=16, ep=2, nnodes=2), "192, is not a multiple of the quantisation block", "--tp 16 --ep 4 --nnodes 2"),
        (Flags(tp=16), "16 a node, and a node has 8: --nnodes 2", "--tp 16 --nnodes 2"),
        (Flags(tp=5), "one number must be a multiple of the other", "--tp 4"),
        (Flags(tp=1), "weights of 214", "--tp 2"),
        (Flags(tp=0), "--tp 0 must be at least 1", "--tp 2"),
        (Flags(tp=8, dp=3, enable_dp_attention=True), "--tp 8 must be a multiple of --dp 3", "--tp 8 --dp 4"),
        (Flags(tp=8, dp=2, nnodes=2), "without --enable-dp-attention starts copies", "--tp 8 --dp 2 --nnodes 2 --ena"),
        (Flags(tp=8, dp=8), "starts 8 copies of the server on one node, 64 GPUs", "--tp 8 --dp 8 --enable-dp-att"),
        (Flags(dp=8), "weights of 214", "--tp 8 --dp 8 --enable-dp-attention"),
        (Flags(tp=16, moe_runner_backend="cutlass"), "and a node has 8: --nnodes 2", "--tp 16 --nnodes 2"),
        (
            Flags(tp=2, pp=3, kv_cache_dtype="fp8_e5m2"),
            "--pp-size 3: stage 2 has layers 41 to 61",
            "--tp 2 --pp-size 3 --kv-cache-dtype fp8_e5m2 --attention-backend flashinfer",
        ),
        (Flags(tp=8, context_length=10**6), "--context-length 1000000 must be between 1 and", "--tp 8"),
        (Flags(tp=8, mem_fraction_static=1.5), "--mem-fraction-static 1.5 must be between 0 and 1", "--tp 8"),
        (Flags(tp=8, moe_runner_backend="flashinfer_trtllm"), "chooses the experts by other rules", "--tp 8"),
        (Flags(tp=8, moe_runner_backend="cutlass"), "would sum rows that nobody wrote. Leave --moe-run", "--tp 8"),
    ],
    ids=name_of,
)
def test_what_cannot_work_names_the_rule_and_the_nearest_that_does(flags, rule, first):
    made = report.make_report(M25, flags, H200)
    assert made.broken_rule is not None and rule in made.broken_rule
    assert made.layout is None and not made.commands
    assert " ".join(made.nearest[0].words()).startswith(first)
    for flags in made.nearest:
        assert report.make_report(M25, flags, H200).broken_rule is None


def test_a_layout_is_named_once_whether_its_ep_is_given_or_chosen():
    """Of FP8 blocks at TP8 the smallest EP that works is 2, which is chosen where --ep is left out."""
    nearest = [" ".join(flags.words()) for flags in report.make_report(M25, Flags(tp=8, ep=1), H200).nearest]
    assert nearest[0] == "--tp 8" and "--tp 8 --ep 2" not in nearest and "--tp 8 --ep 4" in nearest


def test_a_kv_cache_that_no_kernel_reads_is_given_up_where_no_layout_goes_with_it():
    made = report.make_report(M25, Flags(tp=8, kv_cache_dtype="fp8_e5m2"), B200)
    assert "no kernel for it in trtllm_mha" in made.broken_rule
    given_up = [(flags.kv_cache_dtype, flags.attention_backend) for flags in made.nearest]
    assert given_up == [("fp8_e5m2", "flashinfer"), ("fp8_e4m3", None), ("auto", None)]
    assert report.make_report(M25, Flags(tp=8, kv_cache_dtype="fp8_e5m2"), H200).broken_rule is None


WIDE = {"head_dim": 64, "rotary_dim": 32, "quantisation": Quantisation("fp8", (64, 128))}  # blocks that are not square
NARROW = WIDE | {"head_dim": 32, "num_attention_heads": 32}


@pytest.mark.parametrize(
    ("change", "flags", "rule"),
    [
        (WIDE, Flags(tp=8), None),  # 64 rows of k, which is cut by rows alone
        (WIDE | {"num_attention_heads": 24}, Flags(tp=8), "q projection, 3 heads of 64, .* block 64 x 128"),
        (WIDE | {"num_attention_heads": 9, "num_key_value_heads": 3}, Flags(tp=1), None),  # nothing is cut
        (NARROW, Flags(tp=8), "k and v projection, 1 heads of 32, .* block 64 x 128"),
        (NARROW | {"quantisation": Quantisation("fp8", (64, 128), attention=False)}, Flags(tp=8), None),
        ({"num_hidden_layers": 8}, Flags(pp=8), None),
        ({"num_hidden_layers": 7}, Flags(pp=8), "--pp-size 8 is more than the 7 layers"),
        ({}, Flags(tp=4, nnodes=3), "4 GPUs .* are not a multiple of --nnodes 3"),
        ({}, Flags(tp=4, pp=3, nnodes=2), "--pp-size 3 and --nnodes 2: one must be a multiple of the other"),
        ({}, Flags(tp=16, nnodes=2), None),  # 8 a node, which is all of it
        ({}, Flags(tp=16), "16 a node, and a node has 8: --nnodes 2"),
        ({}, Flags(tp=4, pp=3), "12 a node, and a node has 8: --nnodes 2"),  # rounded up
        ({}, Flags(tp=8, context_length=M25.max_position_embeddings), None),
        ({}, Flags(tp=8, context_length=0), "--context-length 0 must be between 1 and"),
        ({}, Flags(tp=8, mem_fraction_static=1.0), "--mem-fraction-static 1.0 must be between 0 and 1"),
        ({}, Flags(tp=8, kv_cache_dtype="int4"), "--kv-cache-dtype int4 is not planned"),
        ({}, Flags(tp=8, moe_runner_backend="flashinfer_cutlass"), "no kernels for FP8 experts"),
        ({}, Flags(tp=8, moe_runner_backend="flashinfer_cutedsl"), "no kernels for FP8 experts"),
        ({"quantisation": Quantisation()}, Flags(tp=8, moe_runner_backend="flashinfer_cutedsl"), None),  # Triton's run
        ({}, Flags(tp=8, moe_runner_backend="flashinfer_trtllm_routed"), "for Blackwell GPUs alone"),
        ({}, Flags(tp=8, dp=2, enable_dp_attention=True, attn_cp_size=2), "without regard to context parallelism"),
        ({}, Flags(tp=4, dp=2, attn_cp_size=4), "--tp 4 must be a multiple of --dp 2 times the con"),  # two copies
        ({}, Flags(tp=4, pp=2, moe_dp_size=2), "--moe-dp-size 2 and --pp-size 2: the engine takes one or"),
        ({}, Flags(tp=4, ep=2, moe_dp_size=4), "--tp 4 is not a multiple of --ep 2 times --moe-dp-size 4"),
        ({}, Flags(tp=4, moe_dp_size=2, moe_a2a_backend="deepep"), "Leave --moe-dp-size out, or leave --moe-a2a"),
        ({}, Flags(tp=8, moe_a2a_backend="mori"), "--moe-a2a-backend mori is not planned; these are: deepep"),
        ({}, Flags(tp=8, moe_a2a_backend="flashinfer"), "needs NVFP4 experts and --moe-runner-backend flashinfer_cu"),
        ({}, Flags(tp=8, moe_a2a_backend="nixl", moe_runner_backend="deep_gemm"), None),
        ({}, Flags(tp=8, moe_a2a_backend="nixl", moe_runner_backend="triton"), "nixl is planned for FP8 experts on NV"),
        ({"quantisation": Quantisation()}, Flags(tp=8, moe_a2a_backend="deepep"), "deepep is planned for FP8 experts"),
        ({}, Flags(tp=8, attention_backend="wave"), "--attention-backend wave is not planned; these are: fa3, flash"),
        ({}, Flags(tp=8, attention_backend="aiter"), "aiter has no kernels for NVIDIA H200 .* have: fa3, flashinfer"),
        ({}, Flags(tp=2, pp=3, attention_backend="triton"), "--pp-size 3: stage 2 has layers 41 to 61 of 62"),
        (
            {"quantisation": Quantisation()},
            Flags(tp=8, ep=2, moe_runner_backend="flashinfer_cutlass"),
            "needs --ep 1 or --ep 8, and not 2",
        ),
        ({}, Flags(tp=4, moe_runner_backend="cutlass"), None),  # EP 1
        ({"quantisation": Quantisation()}, Flags(tp=4, ep=2, moe_runner_backend="cutlass"), None),  # Triton's run
    ],
    ids=name_of,
)
def test_each_rule_ends_where_it_says(change, flags, rule):
    with pytest.raises(ValueError, match=rule) if rule else contextlib.nullcontext():
        settle(flags, layouts.replace(M25, **change), H200)


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({}, True),
        ({"use_qk_norm": False}, False),  # there is no sum
        ({"quantisation": Quantisation("nvfp4", attention=True), "expert_block": 1}, False),  # its rows share a scale
        ({"quantisation": Quantisation("nvfp4", attention=False), "expert_block": 1}, True),
    ],
)
def test_a_rank_of_two_nodes_holds_rows_of_the_other_if_they_are_normed_and_stand_for_themselves(change, holds):
    model = layouts.replace(M25, **change)
    assert layouts.has_counterpart(settle(Flags(tp=16, nnodes=2), model, B200), model) is holds


def test_nvfp4_needs_blackwell():
    model = read_model("m2.7", "modelopt_fp4")
    made = report.make_report(model, Flags(tp=4, quantization="modelopt_fp4"), H200)
    assert "NVFP4 weights need a Blackwell GPU" in made.broken_rule and "--gpu b200" in made.broken_rule


@pytest.mark.parametrize(
    "flags",
    [
        Flags(tp=8), Flags(tp=16), Flags(tp=16, ep=2), Flags(tp=6), Flags(tp=12, ep=12),
        Flags(tp=8, moe_dp_size=2), Flags(tp=16, moe_dp_size=2), Flags(tp=16, moe_dp_size=2, ep=1),
        Flags(tp=8, attn_cp_size=2), Flags(tp=16, ep=2, moe_a2a_backend="deepep"),
        Flags(tp=8, moe_dp_size=2, moe_a2a_backend="deepep"), Flags(tp=12, moe_a2a_backend="deepep"),
        Flags(tp=8, attn_cp_size=3), Flags(tp=8, dp=2, enable_dp_attention=True, attn_cp_size=2),
    ],
    ids=name_of,
)  # fmt: skip
def test_what_the_server_says_of_heads_and_experts_the_plan_says(tmp_path, flags):
    """Through the engine's own ServerArgs: the same EP, or an error of the same words."""
    config = published_config(SmallModel(num_attention_heads=48, intermediate_size=1536, num_local_experts=256))
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": FP8}))
    names = ("enable_dp_attention", "attn_cp_size", "moe_dp_size", "moe_a2a_backend")
    arguments = {"tp_size": flags.tp, "dp_size": flags.dp} | {name: getattr(flags, name) for name in names}
    arguments |= {"ep_size": flags.ep} if flags.ep else {}

    def ask(function):
        try:
            return function()
        except ValueError as error:
            return str(error).rstrip(".")

    served = ask(lambda: engine.ServerArgs(model_path=str(tmp_path), device="cpu", **arguments).ep_size)
    wide = layouts.replace(flags, nnodes=2 if flags.tp > 8 else 1)
    assert ask(lambda: settle(wide, M25, H200).ep) == served


@pytest.mark.parametrize(
    ("flags", "gpu", "expected"),
    [
        (
            Flags(tp=8), H200,
            {"fused all-reduce + norm": "on, one launch", "sum over experts": "in the next layer's norm"},
        ),
        (Flags(tp=8), GPUS["mi300x"], {"fused all-reduce + norm": "off", "sum over experts": "the model's"}),
        (
            Flags(tp=16, nnodes=2), H200,
            {"fused all-reduce + norm": "off", "QK norm": "one kernel with RoPE and KV store, over 8 ranks of a node"},
        ),
        (
            Flags(tp=16, nnodes=4), H200,
            {"QK norm": "one all-reduce over 16 ranks, and one kernel with RoPE and KV store; sums cross nodes"},
        ),
        (Flags(tp=8), H200, {"QK norm": "one kernel with RoPE and KV store, over 8 ranks"}),
        (Flags(tp=8, kv_cache_dtype="fp8_e4m3"), H200, {"QK norm": "one kernel with RoPE, over 8 ranks"}),
        (
            Flags(tp=16, dp=2, nnodes=2, enable_dp_attention=True), H200,
            {"QK norm": "one kernel with RoPE and KV store, over 8 ranks"},
        ),
        (Flags(tp=8), GPUS["mi300x"], {"QK norm": "one all-reduce over 8 ranks; RoPE and KV store in launches of"}),
        (
            Flags(tp=8, dp=8, enable_dp_attention=True), H200,
            {"QK norm": "on each rank alone, in one", "sum over experts": "reduce-scatter", "FP4 all-gather": "off"},
        ),
    ],
)  # fmt: skip
def test_paths(flags, gpu, expected):
    taken = {path.name: path.taken for path in paths.paths(M25, settle(flags, M25, gpu), gpu)}
    for name, begin in expected.items():
        assert taken[name].startswith(begin), name


@pytest.mark.parametrize(
    ("dtype", "gpu", "backend"),
    [("auto", H200, "fa3"), ("fp8_e4m3", H200, "fa3"), ("fp8_e5m2", H200, "triton"), ("fp8_e5m2", B200, "trtllm_mha")],
)
def test_on_hopper_a_kv_cache_in_e5m2_takes_tritons_attention(dtype, gpu, backend):
    assert layouts.attention_backend(Flags(tp=8, kv_cache_dtype=dtype), gpu) == backend


def test_flashinfer_reduces_and_norms_where_one_launch_cannot():
    """A model in float32: the launch takes bfloat16."""
    flags = Flags(tp=8)
    assert paths.one_launch_reason(M25, settle(flags, M25, H200), H200) is None
    model = layouts.replace(M25, dtype_bytes=4)
    taken = {path.name: path for path in paths.paths(model, settle(flags, model, H200), H200)}
    assert taken["fused all-reduce + norm"].taken == "on, up to 2048 tokens"
    assert "above 2048 tokens" in taken["sum over experts"].why


@pytest.mark.parametrize(("ep", "backend", "on"), [(4, "flashinfer_cutlass", True), (1, "flashinfer_cutlass", False),
                                                   (1, "auto", False)])  # fmt: skip
def test_fp4_all_gather_is_on_where_the_engine_turns_it_on(ep, backend, on):
    model = read_model("m2.7", "modelopt_fp4")
    flags = Flags(tp=4, dp=4, ep=ep, enable_dp_attention=True, moe_runner_backend=backend, quantization="modelopt_fp4")
    taken = {path.name: path.taken for path in paths.paths(model, settle(flags, model, B200), B200)}
    assert taken["FP4 all-gather"] == ("on" if on else "off")
    unnamed = settle(layouts.replace(flags, quantization=None), model, B200)  # the engine looks at the flag alone
    assert {path.name: path.taken for path in paths.paths(model, unnamed, B200)}["FP4 all-gather"] == "off"


# ------------------------------------------------------------------ models


def test_a_hub_name_is_found_in_the_local_cache(tmp_path, monkeypatch):
    folder = tmp_path / "models--someone--a-model" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of()))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert read_model("someone/a-model").num_hidden_layers == 5
    with pytest.raises(CannotPlan, match="someone/another"):
        read_model("someone/another")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "only MiniMaxM2ForCausalLM is planned"),
        ({"hidden_size": "3072"}, "does not say hidden_size as whole numbers"),
        ({"num_local_experts": 0}, "does not say num_local_experts as whole numbers above 0"),
        ({"intermediate_size": -1}, "does not say intermediate_size as whole numbers above 0"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised by 'awq'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"quantization_config": FP8 | {"weight_block_size": 128}}, "weight_block_size 128, which must be two numbers"),
    ],
)
def test_a_config_that_cannot_be_planned(change, said):
    with pytest.raises(CannotPlan, match=said):
        shape_of_config(config_of(**change), "x")


@pytest.mark.parametrize("content", ["[]", "null", "5"])
def test_a_config_that_is_no_object_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CannotPlan, match="is no JSON object"):
        read_model(str(tmp_path))


def test_quantising_while_loading_is_refused():
    with pytest.raises(CannotPlan, match=r"--quantization awq does not go with MiniMaxAI/MiniMax-M2\.5"):
        read_model("m2.5", "awq")


# ------------------------------------------------------------------ drawing, command line


def test_the_drawing_shows_which_ranks_share_a_head():
    lines = rendered(M25, Flags(tp=16, nnodes=2))
    heads = [line.split()[2:] for line in lines if line.startswith("KV heads")]
    assert heads == [list("00112233"), list("44556677")]
    assert [line.count("x2") for line in lines if "└" in line] == [4, 4]
    alone = rendered(M25, Flags(tp=8))
    assert not any("└" in line for line in alone)


def rendered(model, flags: Flags) -> list[str]:
    from sglang_minimax.plan.rendering import draw_ranks

    return draw_ranks(report.rank_holds(model, settle(flags, model, H200)))


def test_a_valid_plan_on_the_screen(capsys):
    assert cli.main(["plan", "m2.5", "--tp", "16", "--nnodes", "2", "--gpu", "h100"]) == 0
    shown = capsys.readouterr().out
    for text in ("valid", "chosen: the expert width a rank, 1536 / 16", "--node-rank 1", "logged 0.3% more weights"):
        assert text in shown.replace(" \n", " ").replace("\n", " "), text
    assert len(shown.splitlines()) <= 55


@pytest.mark.parametrize(
    "flags",
    [
        Flags(tp=8, dp=4, enable_dp_attention=True),
        Flags(tp=8, pp=2, nnodes=2, ep=8),
        Flags(
            tp=4, kv_cache_dtype="fp8_e4m3", mem_fraction_static=0.8, context_length=4096, moe_runner_backend="triton"
        ),
    ],
    ids=name_of,
)
def test_every_command_of_a_plan_is_one_that_the_server_takes(flags):
    import argparse
    import shlex

    made = report.make_report(M25, flags, H200)
    assert made.broken_rule is None and len(made.commands) == flags.nnodes
    parser = argparse.ArgumentParser()
    engine.ServerArgs.add_cli_args(parser)
    for node, command in enumerate(made.commands):
        given = parser.parse_args(shlex.split(command)[3:])
        sizes = given.tensor_parallel_size, given.data_parallel_size, given.pipeline_parallel_size, given.nnodes
        assert sizes == (flags.tp, flags.dp, flags.pp, flags.nnodes) and given.node_rank == node
        assert given.expert_parallel_size == (flags.ep or 1)
        assert given.enable_dp_attention == flags.enable_dp_attention and given.tool_call_parser == "minimax-m2"
        names = "kv_cache_dtype", "mem_fraction_static", "context_length", "moe_runner_backend"
        assert [getattr(given, name) for name in names] == [getattr(flags, name) for name in names]


def test_the_backends_of_the_experts_are_the_engines():
    assert list(layouts.MOE_RUNNER_BACKENDS) == engine.MOE_RUNNER_BACKEND_CHOICES


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "16"], "--gpus: for --search only"),
        (["--tp", "8", "--goal", "latency"], "--goal: for --search only"),
        (["--search", "--tp", "8", "--pp", "2"], "--tp, --pp-size with --search"),
        (["--search", "--gpus", "513"], "--gpus 513 must be between 1 and 512"),
        (["--search", "--gpus", "7", "--gpu", "h100"], "6 of them have one that does"),
        (["--search", "--gpus", "1", "--gpu", "h100"], "more GPUs, or GPUs with more memory"),
    ],
)
def test_a_flag_without_a_meaning_is_refused_and_a_search_that_finds_nothing_says_what_would(capsys, arguments, said):
    assert cli.main(["plan", "m2.5", *arguments]) != 0
    captured = capsys.readouterr()
    assert said in captured.err + captured.out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--tp", "16", "--ep", "2"], 1),
        (["--gpu", "abacus"], 2),
        (["--search", "--gpus", "0"], 2),
        (["--search", "--gpus", "1"], 1),
        (["--search", "--gpus", "8", "--json"], 0),
    ],
)
def test_exit_codes(capsys, arguments, code):
    assert cli.main(["plan", "m2.5", *arguments]) == code


WITHOUT_TORCH = """
import sys
for name in ("torch", "sglang", "transformers", "numpy"):
    sys.modules[name] = None
from sglang_minimax.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("more", [["--tp", "8"], ["--tp", "8", "--json"], ["--search", "--gpus", "16"]])
def test_it_answers_in_under_a_second_without_torch(more):
    python = str(Path(layouts.__file__).parents[2])
    command = [sys.executable, "-c", WITHOUT_TORCH, "plan", "m2.5", *more]

    def seconds() -> float:
        """Of the processor, which is what a command that waits for nothing takes: a busy machine adds none."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True, env={"PYTHONPATH": python})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    # The fastest of three: the first one compiles the modules.
    assert min(seconds() for _ in range(3)) < 1.0


def test_every_gpu_names_its_sources():
    for gpu in GPUS.values():
        assert isinstance(gpu, Gpu) and "sheet" in gpu.source and gpu.memory_source
