"""Nodes that were not started alike say so, on every rank, and do not wait for each other."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from sglang.srt.server_args import ServerArgs, prepare_server_args

from sglang_minimax import agreement
from sglang_minimax.checkpoints import SmallModel, published_config


def _rank(rank: int, facts: list[dict | None], meeting_point: str, said) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=len(facts))
    if facts[rank] is None:  # an engine that knows nothing of this
        said.put((rank, "stock"))
        said.close()
        said.join_thread()
        dist.new_group(backend="gloo")
        return
    try:
        agreement.check_ranks_agree(facts[rank], dist.group.WORLD)
        said.put((rank, ""))
    except RuntimeError as error:
        said.put((rank, str(error)))


@pytest.fixture
def said_by(tmp_path, monkeypatch):
    """What each rank's check ends with, given each rank's facts; None for a rank that does not check."""
    monkeypatch.setattr(agreement, "ANSWER_SECONDS", 3.0)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")

    def said_by(facts: list[dict | None]) -> list[str]:
        context = multiprocessing.get_context("fork")
        said = context.Queue()
        ranks = [
            context.Process(target=_rank, args=(rank, facts, tmp_path / "meeting", said), daemon=True)
            for rank in range(len(facts))
        ]
        for rank in ranks:
            rank.start()
        answers = dict(said.get(timeout=60) for _ in ranks)
        for rank in ranks:
            rank.kill()
            rank.join()
        return [answers[rank] for rank in range(len(facts))]

    return said_by


def test_ranks_that_were_started_alike_go_on(said_by):
    assert said_by([{"--tp-size": "4", "--ep-size": "2"}] * 4) == [""] * 4


def test_what_differs_is_said_on_every_rank(said_by):
    one = {"--tp-size": "4", "--enable-memory-saver": "True", "sglang-minimax": "0.1.0 (aa)"}
    other = {**one, "--enable-memory-saver": "False", "sglang-minimax": "0.1.0 (bb)"}
    answers = said_by([one, one, other, one])
    assert len(set(answers)) == 1
    assert answers[0].splitlines()[1:3] == [
        "  --enable-memory-saver: True on ranks 0-1, 3, False on rank 2",
        "  sglang-minimax: 0.1.0 (aa) on ranks 0-1, 3, 0.1.0 (bb) on rank 2",
    ]
    assert "--tp-size" not in answers[0] and "by the same command but for --node-rank" in answers[0]


def test_a_node_without_the_package_is_not_waited_for(said_by):
    answers = said_by([{"--tp-size": "3"}, {"--tp-size": "3"}, None])
    assert answers.pop() == "stock"
    for answer in answers:
        assert "Not every rank said within 3 s" in answer and "SGLANG_MINIMAX_OVERLAY=0" in answer
    assert "Ranks 2 failed" in answers[0], "rank 0 knows which"


@pytest.mark.parametrize(
    ("ranks", "words"),
    [([3], "rank 3"), ([0, 1], "ranks 0-1"), ([0, 2], "ranks 0, 2"), ([0, 1, 2, 5, 7, 8], "ranks 0-2, 5, 7-8")],
)
def test_ranks_in_words(ranks, words):
    assert agreement.ranks_in_words(ranks) == words


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(published_config(SmallModel())))
    return tmp_path


def arguments(checkpoint: Path, *flags: str) -> ServerArgs:
    return prepare_server_args(["--model-path", str(checkpoint), "--device", "cpu", "--skip-tokenizer-init", *flags])


def test_what_a_node_has_for_itself_is_no_difference(checkpoint, tmp_path_factory):
    elsewhere = shutil.copytree(checkpoint, tmp_path_factory.mktemp("node1") / "model")
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (checkpoint / "config.json").write_text(json.dumps(config))
    config["quantization_config"] = dict(reversed(config["quantization_config"].items()))
    (elsewhere / "config.json").write_text(json.dumps(config))
    common = ["--tp", "4", "--nnodes", "2", "--dist-init-addr", "127.0.0.1:5000"]
    first = arguments(checkpoint, *common, "--node-rank", "0", "--host", "0.0.0.0", "--port", "31000")
    second = arguments(elsewhere, *common, "--node-rank", "1", "--log-level", "warning", "--random-seed", "7")
    assert agreement.facts_of(first) == agreement.facts_of(second)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--ep", "4"], "--ep-size"),
        (["--dp", "2", "--enable-dp-attention"], "--dp-size"),
        (["--enable-memory-saver"], "--enable-memory-saver"),
        (["--chunked-prefill-size", "96"], "--chunked-prefill-size"),
        (["--scheduler-recv-interval", "4"], "--scheduler-recv-interval"),
        (["--max-queued-requests", "8"], "--max-queued-requests"),
        (["--radix-eviction-policy", "lfu"], "--radix-eviction-policy"),
        (["--enable-fp32-lm-head"], "--enable-fp32-lm-head"),
        (["--grammar-backend", "none"], "--grammar-backend"),
        (["--json-model-override-args", '{"num_hidden_layers": 2}'], "num_hidden_layers of config.json"),
    ],
)
def test_what_ranks_do_together_is(checkpoint, flags, name):
    one = agreement.facts_of(arguments(checkpoint, "--tp", "4"))
    other = agreement.facts_of(arguments(checkpoint, "--tp", "4", *flags))
    assert one.keys() == other.keys() and name in {fact for fact in one if one[fact] != other[fact]}


def test_every_flag_is_one_of_the_engines():
    assert set(agreement.FLAGS) <= {field.name for field in dataclasses.fields(ServerArgs)}
    assert len(set(agreement.FLAGS)) == len(agreement.FLAGS)


def test_two_builds_of_one_version_differ(tmp_path, monkeypatch):
    """And a file that Python wrote beside the sources is no difference."""
    ours = agreement._digest()
    copied = shutil.copytree(agreement.folder(), tmp_path / "sglang")
    (copied / "srt/models/__pycache__").mkdir(exist_ok=True)
    (copied / "srt/models/__pycache__/other.py").write_text("")
    monkeypatch.setattr(agreement, "folder", lambda: str(copied))
    assert agreement._digest.__wrapped__() == ours
    with (copied / "srt/models/minimax_m2.py").open("a") as file:
        file.write("#")
    assert agreement._digest.__wrapped__() != ours


@pytest.mark.parametrize(("nodes", "ours", "checked"), [(2, True, True), (1, True, False), (2, False, False)])
def test_only_several_nodes_that_serve_this_model_are_asked(monkeypatch, nodes, ours, checked):
    did = []
    monkeypatch.setattr(agreement, "facts_of", lambda args: {"--nnodes": str(args.nnodes)})
    monkeypatch.setattr(agreement, "check_ranks_agree", lambda facts, group: did.append((facts, group)))
    monkeypatch.setattr(
        "sglang.srt.distributed.parallel_state.get_world_group", lambda: SimpleNamespace(cpu_group="all")
    )
    config = SimpleNamespace(hf_config=SimpleNamespace(architectures=["MiniMaxM2ForCausalLM" if ours else "Other"]))
    module = SimpleNamespace(
        initialize_model_parallel=lambda **sizes: did.append(sizes),
        get_global_server_args=lambda: SimpleNamespace(nnodes=nodes, get_model_config=lambda: config),
    )
    agreement.check_before_groups_are_made(module)
    module.initialize_model_parallel(tensor_model_parallel_size=4)
    assert did == [({"--nnodes": "2"}, "all")] * checked + [{"tensor_model_parallel_size": 4}]
