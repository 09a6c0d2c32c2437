"""One server over two hosts, each with a network, a name and shared memory of its own: by the README's commands."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import time

import pytest
from layouts.hosts import Host, reason_against, two_hosts
from layouts.nodes import Nodes, answer_of, serve_on_nodes

from sglang_minimax import comparison
from sglang_minimax.checkpoints import SmallModel, write_checkpoint
from sglang_minimax.cpu_host import has_no_accelerator
from sglang_minimax.reference import Completion, Reference
from sglang_minimax.server_process import ServerError

pytestmark = pytest.mark.skipif(not has_no_accelerator(), reason="this host has an accelerator")

STEPS = 8
PROMPTS = [[11, 12, 13, 14, 15], list(range(100, 140)), [7, 700, 70]]
TOLERANCE = 1e-4  # float32, another order of summation: 1e-5 is seen
START_SECONDS = 240
# The engine's watchdog looks twice in its time, and leaves 5 s to read what it says; processes end in 2 s.
WATCHDOG_SECONDS = 8
END_SECONDS = 2 * WATCHDOG_SECONDS + 15


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """48 q heads and 8 KV heads, as the published model has."""
    shape = SmallModel(
        num_hidden_layers=2, num_attention_heads=48, num_key_value_heads=8, head_dim=32, intermediate_size=128
    )
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), shape)


@pytest.fixture(scope="module")
def expected(checkpoint) -> list[Completion]:
    return Reference(checkpoint).greedy(PROMPTS, STEPS)


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    if reason := reason_against():
        pytest.skip(reason)
    for name in ("GLOO_SOCKET_IFNAME", "SGLANG_HOST_IP", "HOST_IP", "SGLANG_LOCAL_IP_NIC"):
        monkeypatch.delenv(name, raising=False)
    with two_hosts(tmp_path) as hosts:
        yield hosts


@pytest.fixture
def serve(checkpoint, hosts, tmp_path):
    """A server that is ready, by its flags."""

    @contextlib.contextmanager
    def serve(flags: str):
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(checkpoint), "--device", "cpu"]
        logs = [tmp_path / "node0.log", tmp_path / "node1.log"]
        with serve_on_nodes([*command, *flags.split()], 2, logs, lambda rank: {}, hosts) as server:
            server.wait_until_ready(START_SECONDS)
            yield server

    return serve


def check(server: Nodes, expected: list[Completion]) -> None:
    for prompt, meta_info, completion in zip(PROMPTS, server.generate(PROMPTS, STEPS), expected, strict=True):
        compared = comparison.compare(answer_of(prompt, meta_info), completion, [], "")
        assert compared.same_tokens
        assert max(compared.differences) <= TOLERANCE


@pytest.mark.parametrize(
    "flags",
    ["--tp 16", "--tp 4 --dp 2 --enable-dp-attention", "--tp 4 --dp 4 --ep 4 --enable-dp-attention"],
    ids=["tp16", "tp4_dp2", "tp4_dp4_ep4"],
)
def test_two_hosts_answer_as_transformers(flags, serve, hosts, expected):
    with serve(flags) as server:
        check(server, expected)
        for node, host in zip(server.launchers(), hosts, strict=True):
            named = re.findall(r"Other nodes are to reach this one at (\S+): (.*)\. Set these", node.log.read_text())
            assert named == [(host.address, f"SGLANG_HOST_IP={host.address} GLOO_SOCKET_IFNAME=eth0")]


@contextlib.contextmanager
def pulled_out_after(seconds: float, host: Host):
    """Pulls the host's cable meanwhile, and not later: its process id, by which it is found, may be another's then."""
    pull = threading.Timer(seconds, host.plug, [False])
    pull.start()
    try:
        yield
    finally:
        pull.cancel()
        pull.join()


@pytest.mark.parametrize("answering", [False, True], ids=["idle", "answering"])
def test_a_cable_that_is_pulled_out_ends_both_nodes(answering, serve, hosts, expected):
    """No connection is closed, so nobody is told. Plugged in again, the same command serves."""
    with serve(f"--tp 4 --watchdog-timeout {WATCHDOG_SECONDS}") as server:
        check(server, expected)
        pulled = time.monotonic() + 2
        with pulled_out_after(2, hosts[1]):
            if answering:
                with pytest.raises(ServerError):
                    server.generate([[1, 2, 3]], 4000)
            while not all(node.has_ended() for node in server.launchers()):
                assert time.monotonic() < pulled + END_SECONDS
                time.sleep(0.2)
        print(f"both nodes had ended after {time.monotonic() - pulled:.1f} s (watchdog {WATCHDOG_SECONDS} s)")
        ends = [node.log.read_text(errors="replace") for node in server.launchers()]
    for end, lost in zip(ends, ("ranks 2-3", "the first node"), strict=True):
        assert "watchdog timeout" in end
        said = f"Nothing was heard of {lost} for over {WATCHDOG_SECONDS} s (--watchdog-timeout): a node, or the network"
        assert said in end or answering
    if answering:
        return
    hosts[1].plug(into=True)
    with serve("--tp 4") as server:
        check(server, expected)
