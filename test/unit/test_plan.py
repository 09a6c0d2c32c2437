"""The planner: its rules and settings against the engine's, its command line, its speed without torch."""

from __future__ import annotations

import contextlib
import itertools
import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from sglang.srt import server_args as engine
from sglang.srt.configs.model_config import is_piecewise_cuda_graph_disabled_model
from sglang.srt.distributed.utils import get_pp_indices
from unit.plans import B200, FP8, H200, M25, config_of, name_of

from sglang_minimax import cli, sharding
from sglang_minimax.checkpoints import SmallModel, published_config
from sglang_minimax.plan import layout as layouts
from sglang_minimax.plan import memory, paths, report
from sglang_minimax.plan.hardware import GPUS, Gpu
from sglang_minimax.plan.layout import Flags, settle
from sglang_minimax.plan.shape import CannotPlan, Quantisation, read_model, shape_of_config

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
        ({}, Flags(tp=8, pp=2, nnodes=2, moe_a2a_backend="deepep"), "the 8 ranks that share attention hold different"),
        (
            {},
            Flags(tp=8, pp=2, nnodes=2, dp=8, ep=8, enable_dp_attention=True, moe_a2a_backend="deepep"),
            None,
        ),
        (
            {},
            Flags(tp=4, dp=2, moe_a2a_backend="deepep"),
            "starts 2 copies of the server, .* give --enable-dp-attention",
        ),
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
    of_all = {"ep": 16, "moe_runner_backend": "flashinfer_cutlass"} if "quantisation" in change else {}
    assert layouts.has_counterpart(settle(Flags(tp=16, nnodes=2, **of_all), model, B200), model) is holds


def test_nvfp4_experts_of_96_columns_are_refused_and_a_neighbour_works():
    model = layouts.replace(M25, quantisation=Quantisation("nvfp4", attention=False), expert_block=1)
    made = report.make_report(model, Flags(tp=16, nnodes=2), B200)
    assert "96 columns on each rank at --tp 16 --ep 1, which is not a multiple of 64" in made.broken_rule
    settle(Flags(tp=16, nnodes=2, ep=16, moe_runner_backend="flashinfer_cutlass"), model, B200)
    assert made.nearest


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
