"""What is decided for MiniMax-M2 while the server's arguments are read, through the engine's own ServerArgs."""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang.srt import server_args as engine
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.eplb.expert_location import ExpertLocationMetadata
from sglang.srt.eplb.expert_location_updater import _update_expert_weights_raw
from sglang.srt.server_args import ServerArgs, prepare_server_args

from sglang_minimax import cpu_host, sharding
from sglang_minimax.checkpoints import SmallModel, published_config
from sglang_minimax.overlay import ENGINE_VERSION
from sglang_minimax.server_arguments import (
    EP_SIZE_REASON,
    TRITON_KV_SPLITS,
    _check_stages_for_triton,
    announce_overlay,
)

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "float8_e4m3fn", "weight_block_size": [128, 128]}


@pytest.fixture
def folder(tmp_path):
    """Writes a config without weights, which is all that the arguments need, and returns its folder."""

    def write(quantization: dict | None = None, architecture: str = "MiniMaxM2ForCausalLM", **shape) -> str:
        shape = {"intermediate_size": 1536, "num_local_experts": 256, "num_attention_heads": 48, **shape}
        config = published_config(SmallModel(**shape))
        if quantization:
            config["quantization_config"] = quantization
        config["architectures"] = [architecture]
        own = tmp_path / str(len([*tmp_path.iterdir()]))  # the engine reads the config of a folder once
        own.mkdir()
        (own / "config.json").write_text(json.dumps(config))
        return str(own)

    return write


def read(folder: str, *arguments: str) -> ServerArgs:
    return prepare_server_args(["--model-path", folder, "--device", "cpu", "--skip-tokenizer-init", *arguments])


def dtype_of(folder: str, asked: str = "auto", **named: object) -> torch.dtype:
    """Of the model's activations, as every process of a server finds it, where the config names only ``named``.

    A draft model takes the one that the arguments have in the end, or where they have none its own.
    """
    path = Path(folder, "config.json")
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "dtype"} | named
    path = path.with_name("-".join([config["model_type"], asked, *named]))  # the engine remembers what a folder has
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    found = ModelConfig(str(path), dtype=asked).dtype
    of_a_draft = read(str(path), "--dtype", asked).dtype
    assert found == torch.bfloat16 if of_a_draft == "bfloat16" else of_a_draft == asked
    return found


def test_a_checkpoint_that_names_no_dtype_is_served_in_bfloat16(folder):
    """As MiniMax-M2.5's is said not to; the engine would take float16."""
    path = folder(FP8)
    assert dtype_of(path) == torch.bfloat16
    assert dtype_of(path, "float16") == torch.float16
    assert dtype_of(path, dtype="float16") == torch.float16
    assert dtype_of(path, torch_dtype="float16") == torch.float16
    assert dtype_of(path, quantization_config={"quant_method": "awq"}) == torch.float16


def test_other_models_keep_the_engines_dtype(folder):
    assert dtype_of(folder(architecture="LlamaForCausalLM"), model_type="llama") == torch.float16


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (4, 1), (8, 2), (16, 4)])
def test_fp8_blocks_choose_the_smallest_ep_that_works(folder, caplog, tp, ep):
    with caplog.at_level(logging.WARNING):
        args = read(folder(FP8), "--tp", str(tp))
    assert args.ep_size == ep and type(args.ep_size) is int
    said = [record.message for record in caplog.records if "Expert parallel size set to" in record.message]
    assert len(said) == (ep != 1)
    # A running server gives the reason, which must reach its ranks: they get the arguments pickled.
    assert (getattr(pickle.loads(pickle.dumps(args)), EP_SIZE_REASON, None) is not None) == (ep != 1)
    if said:
        assert getattr(args, EP_SIZE_REASON) in said[0]
        assert f"{1536 // tp}, is not a multiple of the quantisation block 128" in said[0]


def test_the_same_through_a_call_instead_of_the_command_line(folder):
    assert ServerArgs(model_path=folder(FP8), device="cpu", tp_size=8).ep_size == 2


@pytest.mark.parametrize("ep", [4, 8])
def test_an_ep_that_works_is_left_as_chosen(folder, ep):
    assert read(folder(FP8), "--tp", "8", "--ep", str(ep)).ep_size == ep


@pytest.mark.parametrize(
    ("tp", "ep", "works"), [("8", "1", "2, 4, 8"), ("16", "1", "4, 8, 16"), ("16", "2", "4, 8, 16")]
)
def test_an_ep_that_cannot_work_is_an_error_with_those_that_do(folder, tp, ep, works):
    with pytest.raises(ValueError, match=rf"--tp {tp} --ep {ep}: .* EP sizes that work at --tp {tp}: {works}"):
        read(folder(FP8), "--tp", tp, "--ep", ep)


def test_an_odd_number_of_experts_names_the_tp_sizes_that_work(folder):
    with pytest.raises(ValueError, match=r"no EP size works at --tp 8; TP sizes for which one does: 1, 2, 3, 4, 6, 12"):
        read(folder(FP8, num_local_experts=179), "--tp", "8")


def test_redundant_experts_count(folder):
    arguments = ("--tp", "8", "--ep-num-redundant-experts", "1")
    assert read(folder(FP8, num_local_experts=179), *arguments).ep_size == 2


@pytest.mark.parametrize(("tp", "moe_dp", "ep"), [(8, 2, 1), (16, 2, 8), (16, 4, 1)])
def test_with_experts_in_data_parallel_groups_ep_divides_a_group_wholly_or_not_at_all(folder, tp, moe_dp, ep):
    """It is the engine's rule, which it has applied by then."""
    assert read(folder(FP8), "--tp", str(tp), "--moe-dp-size", str(moe_dp)).ep_size == ep


def test_an_a2a_backend_takes_all_ranks_for_ep_and_no_other_size_is_chosen_or_said(folder, caplog):
    """What would be chosen for FP8 blocks without it is 2, which the engine then sets to 8."""
    with caplog.at_level(logging.WARNING):
        args = read(folder(FP8), "--tp", "8", "--moe-a2a-backend", "deepep")
    assert args.ep_size == 8 and not hasattr(args, EP_SIZE_REASON)
    assert not [line for line in caplog.messages if "Expert parallel size set to" in line]


def test_an_a2a_backend_needs_experts_for_all_ranks(folder):
    said = r"deepep divides the experts over all --tp 8 ranks, .*: 60 experts are not a multiple of --ep 8\. TP sizes"
    with pytest.raises(ValueError, match=rf"{said} that work: 1, 2, 3, 4, 5, 6, 10, 12, 15, or leave --moe-a2a-back"):
        read(folder(num_local_experts=60), "--tp", "8", "--moe-a2a-backend", "deepep")


def test_an_a2a_backend_has_no_room_for_copies_of_the_experts(folder):
    said = r"whatever --ep says: --tp 8 is not a multiple of --ep 8 times --moe-dp-size 2\. Leave --moe-dp-size out, or"
    with pytest.raises(ValueError, match=said):
        read(folder(FP8), "--tp", "8", "--moe-a2a-backend", "deepep", "--moe-dp-size", "2")


@pytest.mark.parametrize("more", [["--dp", "2"], ["--enable-dp-attention"]])
def test_context_parallelism_goes_with_copies_of_the_server_and_with_one_dp_rank(folder, more):
    assert read(folder(FP8), "--tp", "8", "--attn-cp-size", "2", *more).attn_cp_size == 2


def test_copies_of_experts_that_do_not_divide_name_the_tp_sizes_that_have_room_for_them(folder):
    """179 experts are no multiple of an EP size, and 1, 2, 3, 4, 6 or 12 ranks of each copy have blocks of 128."""
    with pytest.raises(ValueError, match=r"TP sizes for which one does: 2, 4, 6, 8, 12, 24\. "):
        read(folder(FP8, num_local_experts=179), "--tp", "16", "--moe-dp-size", "2")


@pytest.mark.parametrize(
    ("arguments", "way_out"),
    [
        ("--tp 8", "--ep 2 divides them over 2: .* Add --ep 8"),
        ("--tp 8 --ep 4", "--ep 4 divides them over 4: .* Add --ep 8"),
        ("--tp 8 --pp-size 2 --ep 8", "all 16 ranks of --tp 8 --pp-size 2, .* or the pipeline"),
        (
            "--tp 8 --pp-size 2 --dp 8 --enable-dp-attention --moe-a2a-backend deepep",
            "all 16 ranks of --tp 8 --pp-size 2, .* or the pipeline",
        ),
    ],
)
def test_experts_that_eplb_could_not_move_are_refused(folder, arguments, way_out):
    with pytest.raises(ValueError, match=f"--enable-eplb .*{way_out}"):
        read(folder(FP8), *arguments.split(), "--enable-eplb")


@pytest.mark.parametrize("arguments", ["--tp 8 --ep 8", "--tp 8 --moe-a2a-backend deepep --deepep-mode normal"])
def test_experts_of_all_ranks_may_move(folder, arguments):
    assert read(folder(FP8), *arguments.split(), "--enable-eplb").ep_size == 8


@pytest.mark.parametrize(("tp", "pp", "ep"), [(8, 1, 8), (8, 1, 4), (8, 1, 2), (4, 2, 4)])
def test_the_engine_moves_experts_of_all_ranks_only(folder, monkeypatch, tp, pp, ep):
    """Its own function, on the experts of the last rank, none of which moves."""
    experts, rank = 16, tp - 1
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: tp * pp)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    config = ModelConfig(folder(num_local_experts=experts))
    arguments = SimpleNamespace(
        ep_num_redundant_experts=0, ep_size=ep, nnodes=1, device="cpu", ep_dispatch_algorithm="static"
    )
    places = ExpertLocationMetadata.init_trivial(arguments, config, moe_ep_rank=rank * ep // tp)
    held = [torch.zeros(experts // ep, 4)]
    moves = contextlib.nullcontext() if ep == tp * pp else pytest.raises(AssertionError, match="num_local_physical")
    with moves:
        _update_expert_weights_raw({0: held}, places, places, update_layer_ids=[0], nnodes=1, rank=rank)


@pytest.mark.parametrize("replaced", ["auto", "triton", "deep_gemm", "flashinfer_cutlass"])
def test_the_engine_replaces_what_knows_no_mxfp8(folder, replaced):
    """By a kernel that the model refuses, which is why its message names none of these as a way out."""
    flags = ("--quantization", "mxfp8", "--moe-runner-backend")
    assert read(folder(), *flags, replaced).moe_runner_backend == "flashinfer_trtllm"
    for left in ("cutlass", "flashinfer_trtllm_routed"):
        assert read(folder(), *flags, left).moe_runner_backend == left


def test_unquantised_experts_need_no_ep(folder):
    assert read(folder(), "--tp", "16").ep_size == 1
    assert read(folder(num_local_experts=179), "--tp", "8").ep_size == 1


def test_other_architectures_are_left_alone(folder):
    args = read(folder(FP8, architecture="MixtralForCausalLM"), "--tp", "8")
    assert args.ep_size == 1 and type(args.ep_size) is int


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "5"], "8 KV heads cannot be divided over 5 attention-TP ranks.*: 4, 8"),
        (["--tp", "32"], "48 q heads cannot be divided over 32"),
        (["--tp", "8", "--dp", "3", "--enable-dp-attention"], "--tp 8 must be a multiple of --dp 3 times the context"),
        (
            ["--tp", "8", "--dp", "2", "--enable-dp-attention", "--attn-cp-size", "2"],
            "--dp 2 --enable-dp-attention and --attn-cp-size 2: .* Leave out either",
        ),
        (["--tp", "4", "--attn-cp-size", "3"], "--tp 4 must be a multiple of --dp 1 times the context-parallel size 3"),
    ],
)
def test_heads_that_do_not_divide_are_refused_before_anything_is_loaded(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        read(folder(), *arguments)


def test_a_vocabulary_that_does_not_divide_is_refused_before_anything_is_loaded(folder):
    for_three_ranks = folder(vocab_size=1000, num_attention_heads=24, num_key_value_heads=1)
    with pytest.raises(ValueError, match=r"vocabulary of 1000 words, padded to 1024, .* over 3 ranks.*: 1, 2, 4"):
        read(for_three_ranks, "--tp", "3")


def test_a_vocabulary_that_divides_with_its_padding_is_served(folder):
    """1150 words are padded to 1152, three times 384."""
    for_three_ranks = folder(vocab_size=1150, num_attention_heads=24, num_key_value_heads=1)
    assert read(for_three_ranks, "--tp", "3").tp_size == 3


def test_under_dp_attention_each_rank_may_have_the_whole_vocabulary(folder):
    one_head = folder(vocab_size=1000, num_attention_heads=24, num_key_value_heads=1)
    flags = ("--tp", "3", "--dp", "3", "--enable-dp-attention")
    with pytest.raises(ValueError, match="over 3 ranks"):
        read(one_head, *flags)
    assert read(one_head, *flags, "--enable-dp-lm-head").dp_size == 3


def test_an_embedding_server_is_refused(folder):
    with pytest.raises(ValueError, match="--is-embedding would end the server at its first request"):
        read(folder(), "--is-embedding")


def test_an_embedding_server_of_another_model_is_not(folder):
    assert read(folder(architecture="LlamaForCausalLM"), "--is-embedding").is_embedding


def test_under_dp_attention_the_heads_are_divided_over_its_groups(folder):
    args = read(folder(), "--tp", "32", "--dp", "2", "--enable-dp-attention")
    assert args.tp_size == 32


def test_copies_of_the_server_divide_nothing(folder):
    """--dp without DP attention: each copy has all of TP for itself, of which 2 need be no divisor."""
    for_three_ranks = folder(vocab_size=768, num_key_value_heads=3)
    assert read(for_three_ranks, "--tp", "3", "--dp", "2").tp_size == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--tp 4 --pp-size 2 --moe-a2a-backend deepep", "the 4 ranks that share attention hold different tokens"),
        ("--tp 4 --dp 2 --moe-a2a-backend deepep", "starts 2 copies of the server, .*: give --enable-dp-attention"),
        ("--tp 2 --dp 2 --moe-dense-tp-size 1", "Leave --moe-dense-tp-size out: this model has no dense layers"),
        ("--tp 2 --dp 2 --enable-dp-attention --enable-mixed-chunk", "--enable-mixed-chunk with DP attention"),
        ("--tp 2 --moe-dense-tp-size 1 --enable-mixed-chunk", "--enable-mixed-chunk with DP attention"),
        ("--tp 4 --moe-a2a-backend deepep --enable-mixed-chunk", "--enable-mixed-chunk with DP attention"),
    ],
)
def test_where_ranks_hold_their_own_tokens_what_the_engine_cannot_is_refused(folder, arguments, said):
    with pytest.raises(ValueError, match=said):
        read(folder(FP8, num_local_experts=16), *arguments.split())


@pytest.mark.parametrize(
    "arguments",
    [
        "--tp 4 --moe-a2a-backend deepep",
        "--tp 4 --pp-size 2",
        "--tp 2 --enable-mixed-chunk",
        "--tp 2 --moe-dense-tp-size 1",
    ],
)
def test_each_of_them_alone_is_served(folder, arguments):
    assert read(folder(FP8, num_local_experts=16), *arguments.split())


def test_a_recorder_of_experts_has_no_pieces_of_graphs_to_trace_it(folder, monkeypatch):
    """The engine turns them off for a recorder that is asked for, but not for one that the metrics turn on later."""
    monkeypatch.setattr(engine, "is_cpu", lambda: False)  # for which there are none anyway
    plain = read(folder(), "--tp", "2")
    recorded = read(folder(), "--tp", "2", "--enable-expert-distribution-metrics")
    assert recorded.expert_distribution_recorder_mode == "stat"
    assert (plain.disable_piecewise_cuda_graph, recorded.disable_piecewise_cuda_graph) == (False, True)


@pytest.mark.parametrize("mode", ["auto", "normal", "low_latency"])
def test_a_recorder_that_counts_nothing_behind_an_a2a_backend_is_refused(folder, mode):
    arguments = "--tp 4 --moe-a2a-backend deepep --enable-expert-distribution-metrics --deepep-mode"
    folder = folder(FP8, num_local_experts=16)
    if mode == "auto":
        with pytest.raises(ValueError, match="--deepep-mode auto: give --deepep-mode normal, or low_latency"):
            read(folder, *arguments.split(), mode)
    else:
        assert read(folder, *arguments.split(), mode).deepep_mode == mode


@pytest.mark.parametrize("lora", [["--enable-lora"], ["--lora-paths", "somewhere"]])
def test_adapters_that_the_engine_would_cut_for_other_ranks_are_refused(folder, lora):
    lora = [*lora, "--max-lora-rank", "8", "--lora-target-modules", "q_proj"]
    assert read(folder(), "--tp", "4", *lora).enable_lora in (True, None)
    with pytest.raises(
        ValueError, match=r"cut into --tp 4 parts, and 2 ranks share it: .* Leave out --enable-dp-attention"
    ):
        read(folder(), "--tp", "4", "--dp", "2", "--enable-dp-attention", *lora)


@pytest.mark.parametrize("backend", ["--attention-backend", "--decode-attention-backend"])
def test_stages_that_tritons_attention_would_fail_in_are_refused(folder, backend):
    """Two stages have 31 layers each; of three, the last has 21 behind 41."""
    whole = folder(num_hidden_layers=62)
    assert read(whole, "--pp-size", "2", backend, "triton").pp_size == 2
    with pytest.raises(
        ValueError, match=r"stage 2 has layers 41 to 61 of 62, .* --attention-backend flashinfer, or fa3"
    ):
        read(whole, "--pp-size", "3", backend, "triton")
    with pytest.raises(ValueError, match="stage 2 has layers 30 to 45 of 62"):  # the first that fails is not the last
        read(whole, "--pp-size", "4", backend, "triton")


def test_stages_of_other_attention_backends_are_served(folder):
    assert read(folder(num_hidden_layers=62), "--pp-size", "3", "--attention-backend", "torch_native").pp_size == 3


def test_the_stages_refused_are_those_whose_kv_cache_would_not_be_found():
    """The rule, against a KV cache of the engine's own, at every stage of every division of up to 20 layers."""
    import torch
    from sglang.srt.distributed.utils import get_pp_indices
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    for layers in range(1, 21):
        for stages in range(1, min(layers, 6) + 1):
            fails = False
            for stage in range(stages):
                first, end = get_pp_indices(layers, stage, stages)
                pool = MHATokenToKVPool.__new__(MHATokenToKVPool)
                pool.start_layer, pool.layer_transfer_counter = first, None
                pool.v_buffer = [torch.empty(1, 1, 8)] * (end - first)
                pool.store_dtype = pool.dtype = torch.float32
                try:
                    pool.get_value_buffer(0)
                except IndexError:
                    fails = True
            try:
                _check_stages_for_triton(layers, stages)
            except ValueError:
                assert fails, (layers, stages)
            else:
                assert not fails, (layers, stages)


# --- FlashInfer's fused all-reduce ---------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch):
    """ServerArgs believes that it runs on one H200; only the decision is looked at, on the method that takes it."""
    monkeypatch.setattr(engine, "is_sm90_supported", lambda: True)
    monkeypatch.setattr(engine, "is_sm100_supported", lambda: False)
    monkeypatch.setattr(engine, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(cpu_host, "fill_in_server_defaults", lambda args: None)


def test_tritons_attention_divides_long_requests_further_on_hopper(folder, hopper):
    assert read(folder(), "--attention-backend", "triton").triton_attention_num_kv_splits == TRITON_KV_SPLITS
    assert ServerArgs(model_path=folder(), device="cpu").triton_attention_num_kv_splits == TRITON_KV_SPLITS


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--attention-backend", "triton"], True),
        (["--decode-attention-backend", "triton"], True),
        (["--attention-backend", "torch_native"], False),
    ],
)
def test_the_parts_of_a_request_are_said_where_tritons_attention_decodes(folder, hopper, caplog, flags, said):
    with caplog.at_level(logging.WARNING):
        read(folder(), *flags)
    assert any(f"up to {TRITON_KV_SPLITS} parts" in line for line in caplog.messages) == said


@pytest.mark.parametrize("splits", [8, 16])
def test_as_many_parts_as_were_asked_for_stay(folder, hopper, splits):
    """The engine's default too, if it is asked for."""
    args = read(folder(), "--triton-attention-num-kv-splits", str(splits))
    assert args.triton_attention_num_kv_splits == splits


@pytest.mark.parametrize("other", ["hardware", "model"])
def test_elsewhere_tritons_attention_has_the_engines_default(folder, monkeypatch, other):
    monkeypatch.setattr(engine, "is_sm90_supported", lambda: other == "model")
    args = read(folder(architecture="MixtralForCausalLM" if other == "model" else "MiniMaxM2ForCausalLM"))
    assert args.triton_attention_num_kv_splits == 8 and type(args.triton_attention_num_kv_splits) is int


ON = ["--tp", "4"]
OFF = {
    "one rank": ["--tp", "1"],
    "the engine's flag": ["--tp", "4", "--enforce-disable-flashinfer-allreduce-fusion"],
    "DP attention": ["--tp", "4", "--dp", "2", "--enable-dp-attention"],
    "two nodes": ["--tp", "4", "--nnodes", "2", "--node-rank", "0", "--dist-init-addr", "127.0.0.1:5000"],
}


def test_fused_all_reduce_is_on_by_default(folder, hopper):
    assert read(folder(), *ON).enable_flashinfer_allreduce_fusion


@pytest.mark.parametrize("why", OFF)
def test_fused_all_reduce_is_off_where_the_engine_turns_it_off(folder, hopper, why):
    assert not read(folder(), *OFF[why]).enable_flashinfer_allreduce_fusion


def test_fused_all_reduce_is_off_on_other_hardware(folder):
    assert not read(folder(), *ON).enable_flashinfer_allreduce_fusion


@pytest.mark.parametrize(("device", "on"), [("NVIDIA H20", False), ("NVIDIA H200", True), ("NVIDIA H100", True)])
def test_fused_all_reduce_knows_the_device_with_the_bug(folder, hopper, monkeypatch, device, on):
    monkeypatch.setattr(engine, "get_device_name", lambda: device)
    assert read(folder(), *ON).enable_flashinfer_allreduce_fusion is on


def test_fused_all_reduce_is_off_where_the_experts_are_in_data_parallel_groups(folder, hopper):
    assert not read(folder(), *ON, "--moe-data-parallel-size", "2").enable_flashinfer_allreduce_fusion


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tp", "4", "--enable-deterministic-inference"],
        ["--tp", "4", "--rl-on-policy-target", "fsdp"],
        ["--tp", "4", "--enable-memory-saver"],
        ["--tp", "4", "--disable-custom-all-reduce"],
        ["--tp", "2", "--pp-size", "2"],
        ["--tp", "16"],
        ["--tp", "4", "--debug-tensor-dump-output-folder", "dumped"],
    ],
    ids=lambda arguments: arguments[-1],
)
def test_nobody_gets_what_would_not_start_or_be_right_without_asking(folder, hopper, arguments):
    """Where the engine leaves it on for its other models; whoever asks for it has it."""
    arguments = [*arguments, "--attention-backend", "triton"]
    assert not read(folder(), *arguments).enable_flashinfer_allreduce_fusion
    assert read(folder(), *arguments, "--enable-flashinfer-allreduce-fusion").enable_flashinfer_allreduce_fusion


def test_fused_all_reduce_that_a_person_asked_for_is_not_taken_for_a_default(folder, hopper):
    """Which the model would turn off for a launch of its own."""
    assert getattr(read(folder(), *ON), sharding.FLASHINFER_BY_DEFAULT)
    args = read(folder(), *ON, "--enable-flashinfer-allreduce-fusion")
    assert args.enable_flashinfer_allreduce_fusion and not hasattr(args, sharding.FLASHINFER_BY_DEFAULT)


@pytest.mark.parametrize("why", [None, *OFF])
def test_the_decision_is_the_engines_for_its_other_mixtures_of_experts(folder, hopper, why):
    """The same arguments, another architecture that the engine names itself: the same answer."""
    arguments = ON if why is None else OFF[why]
    ours = read(folder(), *arguments).enable_flashinfer_allreduce_fusion
    theirs = read(folder(architecture="Qwen3MoeForCausalLM"), *arguments).enable_flashinfer_allreduce_fusion
    assert ours is theirs


# --- What the log says -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "given_by_environment", "said"),
    [
        ((0, 0, 0, 0, 0, None), None, 1),
        ((0, 1, 1, 1, 0, 0), None, 1),
        ((1, 0, 0, 0, 0, None), None, 0),
        ((0, 0, 0, 0, 1, None), None, 0),
        ((0, 0, 0, 0, 0, 1), None, 0),
        ((0, 0, 0, 0, 0, None), 2, 0),  # the engine finds a DP rank in the environment, and returns it
    ],
)
def test_the_first_rank_alone_says_what_is_laid_over_what(caplog, ranks, given_by_environment, said):
    set_up = []

    def configure(*arguments):
        set_up.append(arguments)
        return arguments[-1] if given_by_environment is None else given_by_environment

    module = SimpleNamespace(configure_scheduler=configure)
    announce_overlay(module)
    with caplog.at_level(logging.INFO):
        assert module.configure_scheduler("arguments", *ranks) == configure(*ranks)
    assert set_up[0] == ("arguments", *ranks)
    assert len([line for line in caplog.messages if f"is laid over sglang {ENGINE_VERSION}, from " in line]) == said
