"""The planner: its bytes against the model's parameters, its rules against the engine's, its speed without torch."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import resource
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random
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
from sglang_minimax.plan import collectives, launches, memory, paths, report, scaling, step
from sglang_minimax.plan import layout as layouts
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
    monkeypatch.setattr(minimax_counterpart, "_choices_of_any_rank", dict)
    monkeypatch.setattr(minimax_counterpart, "_node_group", lambda ranks: SimpleNamespace(world_size=ranks))

    def build(config: dict, layout: layouts.Layout, rank: int, stage: int) -> dict[str, int]:
        fake_groups(monkeypatch, layout, rank, stage)
        arguments = engine.ServerArgs(model_path="dummy", tp_size=layout.tp, ep_size=layout.ep, device="cpu")
        arguments.nnodes, arguments.pp_size = layout.flags.nnodes, layout.pp
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

    attention = group(layout.attention_ranks, rank % layout.attention_ranks)
    for name, value in {
        "_TP": group(layout.tp, rank),
        "_ATTN_TP": attention,
        "_ATTN_CP": group(1, 0),
        "_MOE_DP": group(1, 0),
        "_MOE_EP": group(layout.ep, rank // layout.expert_ranks),
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
        (Flags(tp=8, dp=2, nnodes=2), "without --enable-dp-attention starts copies", "--tp 8 --dp 2"),
        (Flags(tp=8, dp=8), "starts 8 copies of the server on one node, 64 GPUs", "--tp 8 --dp 8 --enable-dp-att"),
        (
            Flags(tp=2, pp=3, kv_cache_dtype="fp8_e5m2"),
            "--pp-size 3: stage 2 has layers 41 to 61",
            "--tp 3 --dp 3 --pp-size 2",
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
    assert [flags.kv_cache_dtype for flags in made.nearest] == ["fp8_e4m3", "auto"]
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
        ({}, Flags(tp=8, moe_runner_backend="flashinfer_cutlass"), "not FP8 blocks"),
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


@pytest.mark.parametrize("flags", [Flags(tp=8), Flags(tp=16), Flags(tp=16, ep=2), Flags(tp=6), Flags(tp=12, ep=12)])
def test_what_the_server_says_of_heads_and_experts_the_plan_says(tmp_path, flags):
    """Through the engine's own ServerArgs: the same EP, or an error of the same words."""
    config = published_config(SmallModel(num_attention_heads=48, intermediate_size=1536, num_local_experts=256))
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": FP8}))
    arguments = {"tp_size": flags.tp} | ({"ep_size": flags.ep} if flags.ep else {})

    def ask(function):
        try:
            return function()
        except ValueError as error:
            return str(error)

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
    flags = Flags(tp=4, dp=4, ep=ep, enable_dp_attention=True, moe_runner_backend=backend)
    taken = {path.name: path.taken for path in paths.paths(model, settle(flags, model, B200), B200)}
    assert taken["FP4 all-gather"] == ("on" if on else "off")


def test_nvfp4_takes_ep_in_one_kernel_only_and_a_search_gives_it():
    model = read_model("m2.7", "modelopt_fp4")
    with pytest.raises(ValueError, match="or give --moe-runner-backend flashinfer_cutlass with --ep 4"):
        settle(Flags(tp=4, ep=2), model, B200)
    found = [each.layout for each in step.search(model, B200, 4, "throughput", Flags(quantization="modelopt_fp4"))]
    runners = {layout.flags.moe_runner_backend for layout in found if layout.ep > 1}
    assert runners == {"flashinfer_cutlass"} and all(layout.ep in (1, layout.tp) for layout in found)


def test_tokens_are_gathered_in_fp4_where_ep_equals_dp_alone():
    """4.5 of bfloat16's 16 bits in one of a layer's collectives, which grows with the tokens."""
    model, many = read_model("m2.7", "modelopt_fp4"), 4096
    flags = Flags(tp=4, dp=2, enable_dp_attention=True, moe_runner_backend="flashinfer_cutlass")
    alone, with_ep = (settle(dataclasses.replace(flags, ep=ep), model, B200) for ep in (1, 4))
    steps = [step.predict(model, layout, B200, many, 512).collectives_ms for layout in (alone, with_ep)]
    assert steps[0] == steps[1]
    fp4 = settle(dataclasses.replace(flags, dp=4, ep=4), model, B200)
    bf16 = settle(dataclasses.replace(flags, dp=4, ep=1), model, B200)
    less_ms = (step.predict(model, each, B200, many, 512).collectives_ms for each in (bf16, fp4))
    saved = 62 * (many * 3072 * 2) * (1 - 4.5 / 16) * 3 / 4 / (B200.link_gb_per_s * 1e9) * 1e3
    assert next(less_ms) - next(less_ms) == pytest.approx(saved)


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


# ------------------------------------------------------------------ drawing, search, command line


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


@pytest.mark.parametrize("goal", ["throughput", "latency"])
def test_a_search_uses_all_gpus_and_ranks_by_its_goal(goal):
    found = step.search(M25, H200, 16, goal, Flags())
    assert len(found) > 10
    assert all(candidate.copies * candidate.layout.gpus == 16 for candidate in found)
    for better, worse in itertools.pairwise(found):
        if goal == "latency":
            apart = round(worse.step.ms, 3) - round(better.step.ms, 3)
        else:
            apart = round(better.tokens_per_s, 3) - round(worse.tokens_per_s, 3)
        room = better.copies * better.kv_tokens - worse.copies * worse.kv_tokens
        words, more_words = (candidate.layout.flags.words() for candidate in (better, worse))
        assert (apart, room, len(more_words) - len(words)) >= (0, 0, 0)
        if (apart, room, len(more_words)) == (0, 0, len(words)):
            assert words < more_words
    for candidate in found:
        assert report.make_report(M25, candidate.layout.flags, H200).broken_rule is None
        assert candidate.step.batch == 1 or goal == "throughput"


@pytest.mark.parametrize("gpus", [12, 16])
def test_a_search_has_every_layout_that_works_once_and_leaves_out_the_ep_that_would_be_taken_anyway(gpus):
    """All numbers are tried, on as few nodes as hold them; the EP that is taken anyway is the smallest."""
    expected = []
    for tp, pp, dp in itertools.product(range(1, gpus + 1), (1, 2, 4, 8), range(1, gpus + 1)):
        if gpus % (tp * pp):
            continue
        flags = Flags(tp=tp, pp=pp, dp=dp, nnodes=1 if tp * pp <= 8 else 2, enable_dp_attention=dp > 1)
        works = []
        for ep in range(1, tp + 1):
            with contextlib.suppress(ValueError):
                layout = settle(dataclasses.replace(flags, ep=ep), M25, H200)
                memory.plan_memory(M25, layout, H200)  # where it fits, more than one request of 8192 tokens does
                works.append(ep)
        expected += [dataclasses.replace(flags, ep=ep) for ep in [None, *works[1:]] if works]
    found = [candidate.layout.flags for candidate in step.search(M25, H200, gpus, "latency", Flags())]
    assert sorted(found, key=str) == sorted(expected, key=str)


@pytest.mark.parametrize(("gpu", "small"), [(H200, 256), (B200, 512)])  # the second has 160 GiB and more
def test_a_search_for_throughput_fills_the_kv_cache_or_the_cuda_graphs_of_every_group_and_stage(gpu, small):
    batches = set()
    for found in step.search(M25, gpu, 8, "throughput", Flags(context_length=512)):
        flags = found.layout.flags
        room, graphs = found.kv_tokens // flags.dp // 512, (512 if flags.tp >= 4 else small) * flags.pp
        assert found.step.batch == min(room, graphs) * flags.dp
        assert found.kv_tokens == memory.plan_memory(M25, found.layout, gpu).tokens * flags.dp
        assert found.copies == 8 // (flags.tp * flags.pp)
        assert found.tokens_per_s == pytest.approx(found.copies * found.step.batch / (found.step.ms / 1e3))
        batches.add((flags.tp >= 4, flags.pp > 1, flags.dp > 1, room < graphs))
    assert {(False, False, False, False), (True, True, True, False), (False, True, False, True)} <= batches


def test_a_search_has_no_layout_whose_kv_cache_holds_no_request():
    """Two GPUs of TP2 are all that hold the model."""
    tokens = memory.plan_memory(M25, settle(Flags(tp=2), M25, H200), H200).tokens
    fits, too_long = (step.search(M25, H200, 2, "throughput", Flags(context_length=tokens + more)) for more in (0, 1))
    assert ("--tp 2", 1) in {(" ".join(one.layout.flags.words()[:2]), one.step.batch) for one in fits}
    assert Flags(tp=2, context_length=tokens + 1) not in {one.layout.flags for one in too_long}


@pytest.mark.parametrize(("positions", "context"), [(196608, 8192), (4096, 4096)])
def test_a_search_is_for_8192_tokens_of_a_request_or_as_many_as_the_model_has(positions, context):
    model = dataclasses.replace(M25, max_position_embeddings=positions)
    left_out, said = (step.search(model, H200, 4, "latency", Flags(context_length=it)) for it in (None, context))
    assert [one.step for one in left_out] == [one.step for one in said]


@pytest.mark.parametrize(("given", "with_ep"), [("auto", {"flashinfer_cutlass"}), ("triton", set())])
def test_a_search_divides_nvfp4_experts_by_ep_where_no_backend_was_asked_for_that_cannot(given, with_ep):
    model = read_model("m2.7", "modelopt_fp4")
    found = step.search(model, B200, 4, "throughput", Flags(quantization="modelopt_fp4", moe_runner_backend=given))
    backends: dict[bool, set[str]] = {True: set(), False: set()}
    for candidate in found:
        flags = candidate.layout.flags
        backends[candidate.layout.ep > 1].add(flags.moe_runner_backend)
    assert backends == {True: with_ep, False: {given}}


def test_a_search_in_json_has_the_step_of_each_layout_and_every_measured_step(capsys):
    assert cli.main(["plan", "m2.5", "--search", "--gpus", "8", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["assumptions"] == list(step.ASSUMPTIONS)
    rates = []
    for layout in data["layouts"]:
        words = layout["flags"].split()
        assert words[0] == "--tp" and layout["ep"] >= 1 and layout["kv_tokens"] > 8192
        seconds = layout["step"]["ms"] / 1e3
        assert layout["tokens_per_s"] == pytest.approx(layout["servers"] * layout["step"]["batch"] / seconds)
        rates.append(layout["tokens_per_s"])
    assert max(rates) == pytest.approx(rates[0], abs=0.001)
    first = data["errors"][0]
    said = {  # the first line of docs/scaling.md
        "engine": "stock", "flags": "--tp 4", "num_layers": 62, "input_len": 512, "batch": 1, "measured_ms": 8.03,
        "record": "steps_tp4_62_layers_h200.json", "fitted": False, "model_ms": pytest.approx(7.99, abs=0.005),
        "model_ms_all_tokens_routed_alike": pytest.approx(7.99, abs=0.005),
    }  # fmt: skip
    assert first == said and len(data["errors"]) == len(step.MEASURED)
    assert [one["measured_ms"] for one in data["errors"] if one["fitted"]] == [2.58, 3.69, 8.14]


@pytest.mark.parametrize(("more", "tokens"), [([], 8192), (["--context-length", "4096"], 4096)])
def test_a_search_says_how_long_its_requests_are(capsys, more, tokens):
    search = ["plan", "m2.5", "--search", "--gpus", "8", *more]
    assert cli.main(search) == 0
    assert f"each with requests of {tokens:,} tokens" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*search, "--json"]) == 0
    for found in json.loads(capsys.readouterr().out)["layouts"]:
        assert found["context"] == tokens
        assert found["step"]["batch"] <= found["kv_tokens"] / tokens


def test_the_model_of_the_step_says_how_far_off_it_is():
    for error in step.errors(step.FITTED):
        assert error.alike == pytest.approx(0, abs=1e-9), error
    assert all(error.even_ms >= error.alike_ms for error in step.errors())
    said = {  # in docs/scaling.md
        "TP4, 62 layers": 0.04, "TP4, 16 layers": 0.15, "2 ranks of TP4, 16 layers": 0.22, "TP2, 8 layers": 0.21,
        "TP1, 6 layers": 0.27, "TP4 DP4 EP4, 62 layers": 0.25,
    }  # fmt: skip
    largest = step.largest_errors()
    assert largest.keys() == said.keys()
    assert all(abs(largest[kind]) < most for kind, most in said.items()), largest


def test_the_steps_that_the_model_is_held_against_are_the_medians_of_their_records():
    for measured in step.MEASURED:
        record = json.loads((RECORDS / measured.record).read_text(encoding="utf-8"))
        changes = [] if measured.num_layers == 62 else [f"{measured.num_layers} of 62 layers"]
        flags = measured.flags
        if measured.ranks:  # each with what a rank of more has
            share = flags.tp // measured.ranks
            changes.append(f"heads, experts' width and vocabulary divided by {share}")
            flags = dataclasses.replace(flags, tp=measured.ranks)
        assert record["model"]["changes"] == changes
        assert sorted(record["layout"].split()) == sorted(" ".join(flags.words()).split())
        contestant = "stock" if measured.engine == "stock" else "ours"
        (run,) = record["contestants"][contestant]["runs"]
        samples = run["batches"][f"{measured.batch // measured.flags.dp} x {measured.input_len}"]["decode_ms"]
        assert measured.ms == pytest.approx(statistics.median(samples), abs=0.0051)


def test_a_launch_takes_its_nearest_measured_time():
    launch = launches.Launch("any", {1: 2.0, 16: 5.0}, "here")
    assert [launch.at(tokens) for tokens in (0, 1, 15, 16, 1000)] == [2, 2, 2, 5, 5]
    longer = dataclasses.replace(launch, context=512)
    assert [launches.for_context((launch, longer), tokens) for tokens in (511, 512, 8192)] == [
        (launch,),
        (longer,),
        (longer,),
    ]
    for engine_launches in launches.ENGINES.values():
        assert len({(each.name, each.context) for each in engine_launches}) == len(launches.STOCK)


def test_long_requests_take_the_longer_of_their_tokens_and_of_their_bytes():
    """At TP4 a token has 2 heads x 128 x K and V x 2 bytes on a rank, which HBM reads at 90% of 4.8 TB/s."""
    layout, constants = settle(Flags(tp=4), M25, H200), step.fitted()

    def grows_ms(engine: str, requests: int) -> float:
        short, long = (
            step.predict(M25, layout, H200, requests, tokens, constants, engine=engine).ms for tokens in (512, 8704)
        )
        return long - short

    read_ms = 62 * 8192 * 1024 / (0.9 * 4.8e12) * 1e3
    assert grows_ms("stock", 1) == pytest.approx(62 * 8192 * 11.8e-6, rel=1e-6)
    assert grows_ms("stock", 16) == pytest.approx(62 * 8192 * 11.8e-6, rel=1e-6)
    assert 256 * read_ms > 62 * 8192 * 11.8e-6
    assert grows_ms("stock", 256) == pytest.approx(256 * read_ms, rel=1e-6)
    assert grows_ms("ours", 1) == pytest.approx(62 * 8192 * 0.5e-6, rel=1e-6)
    assert grows_ms("ours", 16) == pytest.approx(16 * read_ms, rel=1e-6)


def test_a_step_changes_by_as_much_as_a_launch_in_its_table(monkeypatch):
    layout = settle(Flags(tp=4), M25, H200)
    constants = step.fitted()  # before the table changes
    before = step.predict(M25, layout, H200, 16, 529, constants).ms
    slower = [
        dataclasses.replace(each, us={16: 9.0}) if each.context == 512 else each for each in launches.ENGINES["ours"]
    ]
    monkeypatch.setitem(launches.ENGINES, "ours", tuple(slower))
    after = step.predict(M25, layout, H200, 16, 529, constants).ms
    assert after - before == pytest.approx(62 * (9.0 - 8.4) / 1e3)


def test_across_nodes_a_tree_takes_the_latencies_that_nccl_has_for_it():
    """By hand: 4.4 + 2 * (7 steps of 0.52 * 1.8 over NVLink + 1 of 5.0 over the network), then the bytes."""
    assert collectives.over_nodes_us(8, 2, 0) == pytest.approx(27.504)
    assert collectives.over_nodes_us(1, 2, 0) == pytest.approx(14.4)
    small, large = (collectives.over_nodes_us(8, 2, size) for size in (98304, 1 << 20))
    assert small == pytest.approx(27.504 + 98304 / 8.7e3, rel=0.01)  # LL
    assert large == pytest.approx(4.4 + 2 * (7 * 1.2 + 8.5) + (1 << 20) / 30.2e3, rel=0.01)  # LL128


def test_a_counterparts_rows_are_read_where_they_are_held():
    """At TP16 over two nodes: 3 q heads and a KV head of 128 rows, a byte each, and a scale a block."""
    layout = settle(Flags(tp=16, nnodes=2), M25, H200)
    more = 4 * 128 * 3072 + 4 * (3072 // 128) * 4
    assert step.counterpart_bytes(M25, layout) == more
    crossing = step.predict(M25, layout, H200, 16, 529, counterpart=False)
    within = step.predict(M25, layout, H200, 16, 529)
    assert (within.memory_ms - crossing.memory_ms) * 1e-3 * 0.9 * 4.8e12 == pytest.approx(62 * more)
    saved = crossing.ms - within.ms
    assert saved == pytest.approx(62 * (collectives.over_nodes_us(8, 2, 128) - more / 4.32e6) / 1e3)
    assert saved > 0.03 * crossing.ms


A_TOKEN = 2 * 3072 * 2  # bytes of its hidden states that an all-reduce of a rank sends; half of it, a gather


def predicted(flags: Flags, batch: int, context: int = 529, model=M25, gpu: Gpu = H200, **more) -> step.Step:
    return step.predict(model, settle(flags, model, gpu), gpu, batch, context, **more)


def test_stages_of_a_pipeline_each_have_a_part_of_the_batch():
    """By hand, 6 requests of 100 tokens on four stages: each has up to two of them, so that all layers see two."""
    constants = step.Constants(step_us=100.0, request_us=10.0)
    flags = Flags(tp=4, pp=4, nnodes=2)  # of 15, 15, 16 and 16 layers
    made = predicted(flags, 6, 100, constants=constants)
    weights = [memory.weight_bytes(M25, settle(flags, M25, H200), stage) for stage in range(4)]
    read = sum(sum(stage.values()) - stage["experts"] - stage["embedding"] for stage in weights)
    read += sum(stage["experts"] for stage in weights) * (1 - (248 / 256) ** 2)  # of 256 experts a token misses 248
    read += 2 * 100 * 62 * 2 * 2 * 128 * 2  # tokens, layers, K and V, 2 heads of 128, bfloat16
    assert made.memory_ms == pytest.approx(read / 4.32e12 * 1e3, rel=1e-12)
    all_reduce_us = 5 + 2 * A_TOKEN * (3 / 4) / 450e3
    assert made.collectives_ms == pytest.approx((62 * 2 * all_reduce_us + 3 * 5) / 1e3, rel=1e-12)  # and three sends
    assert made.once_ms == pytest.approx(0.15, rel=1e-12)
    one_stage = predicted(Flags(tp=4), 2, 100, constants=constants)
    assert (made.launches_ms, made.arithmetic_ms) == (one_stage.launches_ms, one_stage.arithmetic_ms)


def test_under_dp_attention_a_rank_attends_to_its_requests_and_has_experts_of_all():
    """By hand, 5 requests on two groups of two ranks: one group has three."""
    flags = Flags(tp=4, dp=2, enable_dp_attention=True)
    made = predicted(flags, 5, 100, constants=step.Constants(dp_layer_us=7.0))
    weights = memory.weight_bytes(M25, settle(flags, M25, H200))
    read = sum(weights.values()) - weights["experts"] - weights["embedding"]
    read += weights["experts"] * (1 - (248 / 256) ** 5) + 3 * 100 * 62 * 2 * 4 * 128 * 2
    assert made.memory_ms == pytest.approx(read / 4.32e12 * 1e3, rel=1e-12)
    attention_us = 5 + 5 / 2 * A_TOKEN * (1 / 2) / 450e3
    gather_us = 5 + 5 * A_TOKEN / 2 * (3 / 4) / 450e3
    assert made.collectives_ms == pytest.approx(62 * (attention_us + 2 * gather_us) / 1e3, rel=1e-12)
    # q, o, k and v of 24 and 4 heads; scores and sums over 100 tokens; 8 experts and the head, divided by four.
    attention = 2 * 3072 * 128 * (2 * 24 + 2 * 4) + 4 * 24 * 128 * 100
    experts, head = 8 * 3 * 2 * 3072 * 1536 // 4, 2 * 3072 * 200064 // 4
    operations = 62 * (3 * attention + 5 * experts) + 5 * head
    assert made.arithmetic_ms == pytest.approx(operations / 1979e12 * 1e3, rel=1e-12)
    without = predicted(flags, 5, 100, constants=step.Constants())
    assert made.launches_ms - without.launches_ms == pytest.approx(62 * 7e-3)


def test_a_step_waits_for_memory_or_for_arithmetic_whichever_takes_longer():
    assert step.Step(1, 2.0, 3.0, 0.5, 0.25, 0.125).ms == 3.875
    assert step.Step(8, 4.0, 3.0, 0.5, 0.25, 0.25).tokens_per_s == 1600


@pytest.mark.parametrize(
    ("quantization", "backend", "share"),
    [("modelopt_fp4", "flashinfer_cutlass", 4.5 / 16), (None, "flashinfer_cutlass", 1)],
)
def test_tokens_are_gathered_in_four_and_a_half_bits_a_value_where_the_engine_does(quantization, backend, share):
    """Four bits, and a scale of eight for each 16 values, in place of bfloat16."""
    model = read_model("m2.7", quantization) if quantization else dataclasses.replace(M25, quantisation=Quantisation())
    flags = Flags(tp=4, dp=4, ep=4, enable_dp_attention=True, moe_runner_backend=backend)
    gather_us, scatter_us = (5 + 64 * A_TOKEN / 2 * part * (3 / 4) / 900e3 for part in (share, 1))
    made = predicted(flags, 64, model=model, gpu=B200)
    assert made.collectives_ms == pytest.approx(62 * (gather_us + scatter_us) / 1e3, rel=1e-12)


@pytest.mark.parametrize(
    ("flags", "engine", "sums_us", "launch_us"),
    [
        # Stock's launch has an all-reduce of 4.3 us in it, which is another one over two nodes.
        (Flags(tp=16, nnodes=2), "stock", collectives.over_nodes_us(8, 2, 4 * 8), 11.90 - 4.3),
        (Flags(tp=8), "stock", 0.0, 11.90),
        (Flags(tp=16, nnodes=2), "ours", 0.0, 2.75),  # which projects the counterpart's q and k
        (Flags(tp=16, nnodes=4), "ours", collectives.over_nodes_us(4, 4, 4 * 8), 2.75),  # where nobody has one
        (  # two of the tokens in a group
            Flags(tp=32, dp=2, nnodes=4, enable_dp_attention=True), "stock",
            collectives.over_nodes_us(8, 2, 2 * 8), 8.18 - 4.3,
        ),
    ],
)  # fmt: skip
def test_qk_norm_takes_its_launch_and_its_sums_where_they_cross_nodes(flags, engine, sums_us, launch_us):
    """Against a model without it; 4 tokens, of 8 bytes each."""
    without = predicted(flags, 4, model=dataclasses.replace(M25, use_qk_norm=False), engine=engine)
    made = predicted(flags, 4, engine=engine)
    assert made.launches_ms - without.launches_ms == pytest.approx(62 * launch_us / 1e3)
    assert made.collectives_ms - without.collectives_ms == pytest.approx(62 * sums_us / 1e3)


@pytest.mark.parametrize(("ep", "tokens"), [(1, 16), (2, 1), (4, 1), (4, 16), (8, 64), (16, 128)])
def test_the_busiest_ep_group_reads_about_as_many_experts_as_if_tokens_were_drawn(ep, tokens):
    """Never less than the mean of many draws, and at most 30% more."""
    random = Random(0)
    held, largest = 256 // ep, []
    for _ in range(200):
        touched = set(itertools.chain.from_iterable(random.sample(range(256), 8) for _ in range(tokens)))
        largest.append(max(Counter(expert // held for expert in touched).values()) / held)
    flags = Flags(tp=max(ep, 4), ep=ep, nnodes=max(ep // 8, 1))
    weights = memory.weight_bytes(M25, settle(flags, M25, H200))
    read = predicted(flags, tokens, context=0).memory_ms / 1e3 * 4.32e12
    share = (read - sum(weights.values()) + weights["embedding"]) / weights["experts"] + 1
    mean = statistics.mean(largest)
    assert 0.99 * mean <= share <= min(1, 1.3 * mean)


def test_the_document_of_scaling_has_what_the_model_says():
    assert scaling.between_marks(scaling.DOCUMENT.read_text(encoding="utf-8")) == scaling.tables().strip()


def test_more_gpus_are_not_slower_than_their_memory_says():
    """A step reads less a GPU with more ranks, and never less than nothing."""
    times = [step.predict(M25, settle(Flags(tp=tp), M25, H200), H200, 64, 4096).memory_ms for tp in (2, 4, 8)]
    assert times == sorted(times, reverse=True) and times[-1] > 0


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
