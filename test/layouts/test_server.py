"""The real server over HTTP, with no environment variable and no flag but the layout, answers as transformers does.

So that no server starts twice, what it says of itself is looked at on the same ones: its log, ``/server_info``,
``/metrics``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys

import psutil
import pytest
from layouts.nodes import Nodes, serve_on_nodes

from sglang_minimax import __version__
from sglang_minimax.checkpoints import SmallModel, write_checkpoint
from sglang_minimax.cpu_host import has_no_accelerator
from sglang_minimax.ports import free_port, port_flags
from sglang_minimax.reference import Reference
from sglang_minimax.server_process import Server, SessionProcess
from sglang_minimax.server_report import BLOCK_BEGINS

pytestmark = pytest.mark.skipif(not has_no_accelerator(), reason="this host has an accelerator: see test/gpu")

STEPS = 16
PROMPTS = [[11, 12, 13, 14, 15], list(range(100, 140)), [7, 700, 70]]
TOLERANCE = 1e-4
# Two KV heads, so that TP4 replicates them; a width that four ranks cannot divide and two can, so that EP is chosen.
SMALL = SmallModel(num_key_value_heads=2, intermediate_size=254)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), SMALL)


@pytest.fixture(scope="module")
def expected(checkpoint):
    return Reference(checkpoint).greedy(PROMPTS, STEPS)


@pytest.fixture
def bare_environment(monkeypatch):
    """Without what the engine and the overlay set in this process once they were imported."""
    for name in list(os.environ):
        if name.startswith(("SGLANG_", "TORCH", "OMP_", "GLOO_", "CUDA_", "NCCL_")):
            monkeypatch.delenv(name)


def check(server: Server | Nodes, prompts: list[list[int]], expected) -> None:
    answers = server.post(
        "/generate",
        {
            "input_ids": prompts,
            "sampling_params": {"temperature": 0, "max_new_tokens": STEPS, "ignore_eos": True},
            "return_logprob": True,
        },
        timeout_seconds=120,
    )
    for answer, completion in zip(answers, expected, strict=True):
        steps = answer["meta_info"]["output_token_logprobs"]
        assert [token for _, token, *_ in steps] == completion.tokens
        assert [logprob for logprob, *_ in steps] == pytest.approx(completion.logprobs, abs=TOLERANCE)


HEADS = {
    "tp4": "heads a rank: 4 of 16 q heads, 1 of 2 KV heads; each KV head is on 2 ranks",
    "tp4_dp2": "heads a rank: 8 of 16 q heads, 1 of 2 KV heads; no KV head is replicated",
}
APART = "; RoPE and KV store in launches of their own"
PATHS = {
    "tp4": {
        "QK norm": f"one all-reduce over 4 ranks{APART}",
        "sum over experts": "the model's all-reduce over 4 ranks",
    },
    "tp4_dp2": {"QK norm": f"one all-reduce over 2 ranks{APART}", "sum over experts": "reduce-scatter"},
}


def check_log(log: str, name: str, ranks: int) -> None:
    """One block, from the first rank; and every rank says at the end of its load how many bytes it was."""
    assert log.count(BLOCK_BEGINS) == 1
    (block,) = re.findall(rf"^\[[^]]* TP0[^]]*\] {BLOCK_BEGINS} 4 ranks, .*\n((?:  .*\n)+)", log, re.M)
    lines = [line.strip() for line in block.splitlines()]
    assert HEADS[name] in lines
    assert "experts a rank: 8 of 16, 127 of the 254 columns of each" in lines
    for path, taken in PATHS[name].items():
        assert any(line.startswith(f"{path}: {taken} (") for line in lines), path
    loaded = re.findall(r" TP(\d)[^]]*\] Loaded weights: ([\d.]+) GB of the checkpoint in [\d.]+ s, .* GB/s", log)
    assert sorted(rank for rank, _ in loaded) == [str(rank) for rank in range(ranks)]
    assert all(float(gigabytes) > 0 for _, gigabytes in loaded)


def check_server_info(server: Server, name: str, dp_ranks: int) -> None:
    for path in ("/server_info", "/get_server_info"):
        info = json.loads(server.get(path))
        assert info["tp_size"] == 4 and info["version"], "the engine's own fields stay"
        assert len(info["internal_states"]) == dp_ranks
        ours = info["sglang_minimax"]
        assert ours["version"] == __version__
        assert [state["sglang_minimax"] for state in info["internal_states"]] == [ours] * dp_ranks
        assert {path: ours["paths"][path]["taken"] for path in PATHS[name]} == PATHS[name]
        assert ours["paths"]["EP"]["taken"] == "2"
        assert "chosen, since --ep was left out: the expert width 254" in ours["paths"]["EP"]["why"]
        assert ours["paths"]["attention backend"]["taken"] == info["internal_states"][0]["attention_backend"]
        assert [rank["kv_heads"][0] for rank in ours["ranks"]] == ([0, 0, 1, 1] if name == "tp4" else [0, 1, 0, 1])


def listened_ports(server: Server) -> set[int]:
    """Of the TCP ports, those that a process of the server listens on."""
    sockets = [socket for process in server.members() for socket in process.net_connections("tcp")]
    return {socket.laddr.port for socket in sockets if socket.status == psutil.CONN_LISTEN}


def check_metrics(server: Server) -> None:
    """The engine's counters, and among them the tokens that were generated for this test."""
    generated = re.findall(r"^sglang:generation_tokens_total\{.*\} ([\d.]+)$", server.get("/metrics"), re.M)
    assert sum(map(float, generated)) >= STEPS * len(PROMPTS)


@pytest.mark.parametrize(
    ("name", "layout", "dp_ranks"),
    [
        ("tp4", "--tp 4 --enable-metrics", 1),
        ("tp4_dp2", "--tp 4 --dp 2 --enable-dp-attention --skip-tokenizer-init --enable-metrics", 2),
    ],
    ids=["tp4", "tp4_dp2"],
)
@pytest.mark.usefixtures("bare_environment")
def test_server_answers_as_transformers(name, layout, dp_ranks, checkpoint, expected, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(checkpoint), "--device", "cpu"]
    with Server([*command, *port_flags(port), *layout.split()], tmp_path / "server.log", port=port) as server:
        server.wait_until_ready(240, on_progress=lambda reached: None)
        check(server, PROMPTS, expected)  # all in one batch
        for prompt, completion in zip(PROMPTS, expected, strict=True):
            check(server, [prompt], [completion])  # alone: with DP attention the other rank is idle
        check_server_info(server, name, dp_ranks)
        assert port + 1 in listened_ports(server), "where the ranks met"
        check_metrics(server)
        log = server.log.read_text(errors="replace")
    assert "No accelerator on this host" in log
    assert "Traceback" not in log
    check_log(log, name, ranks=4)


@pytest.mark.usefixtures("bare_environment")
def test_two_nodes_answer_as_transformers(checkpoint, expected, tmp_path):
    """The launchers of two hosts, two ranks each: only the host is one."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(checkpoint), "--device", "cpu"]
    logs = [tmp_path / "node0.log", tmp_path / "node1.log"]
    with serve_on_nodes([*command, "--tp", "4"], 2, logs, lambda rank: {"GLOO_SOCKET_IFNAME": "lo"}) as server:
        server.wait_until_ready(240)
        check(server, PROMPTS, expected)
        texts = [log.read_text(errors="replace") for log in logs]
    assert [text.count(BLOCK_BEGINS) for text in texts] == [1, 0]
    for text, ranks in zip(texts, ({"0", "1"}, {"2", "3"}), strict=True):
        assert set(re.findall(r" TP(\d)[^]]*\] Loaded weights: ", text)) == ranks


@pytest.mark.usefixtures("bare_environment")
def test_two_nodes_that_were_not_started_alike_end_and_say_why(checkpoint, tmp_path):
    """Before they load anything: their ranks would not have the same batches."""
    meeting = f"127.0.0.1:{free_port()}"
    flags = ["--model-path", str(checkpoint), "--device", "cpu", "--tp", "2", "--nnodes", "2"]
    with contextlib.ExitStack() as running:
        nodes = []
        for node, own in enumerate(([], ["--chunked-prefill-size", "96"])):
            command = [sys.executable, "-m", "sglang.launch_server", *flags, "--dist-init-addr", meeting, *own]
            command += ["--node-rank", str(node), *port_flags(free_port())]
            log, environment = tmp_path / f"node{node}.log", {"GLOO_SOCKET_IFNAME": "lo"}
            nodes.append(running.enter_context(SessionProcess(command, log, environment=environment)))
        for node in nodes:
            node.wait(120)
            text = node.log.read_text(errors="replace")
            assert re.search(r"--chunked-prefill-size: \S+ on rank 0, 96 on rank 1\n", text)
            assert "by the same command but for --node-rank" in text and "Load weight begin" not in text
