"""A rank that dies or stops while the server answers: the server ends with an error, in time and whole."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest
from faults.serving import Client, check_answer, reference_beside, serve

from sglang_minimax.checkpoints import SmallModel, write_checkpoint
from sglang_minimax.cpu_host import has_no_accelerator
from sglang_minimax.reference import Reference
from sglang_minimax.server_process import Server, free_port

pytestmark = pytest.mark.skipif(not has_no_accelerator(), reason="this host has an accelerator: see test/gpu")

WATCHDOG_SECONDS = 8
# The watchdog looks twice in its time, prints where the ranks stand and leaves 5 s to read it; processes end in 2 s.
END_SECONDS = 2 * WATCHDOG_SECONDS + 15
LAYOUT = f"--tp 4 --dp 2 --enable-dp-attention --skip-tokenizer-init --watchdog-timeout {WATCHDOG_SECONDS}"
PROMPT, STEPS = [7, 70, 700], 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    shape = SmallModel(num_hidden_layers=2, num_local_experts=8)
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), shape)


@pytest.fixture(scope="module")
def reference(checkpoint):
    with reference_beside(checkpoint) as reference:
        yield reference


class LongRequest(threading.Thread):
    """A request that outlives the test; ``failure`` is what ended it."""

    def __init__(self, client: Client, dp_rank: int) -> None:
        super().__init__(daemon=True)
        self.client, self.dp_rank = client, dp_rank
        self.failure: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.client.generate([1, 2, 3], 4000, routed_dp_rank=self.dp_rank)
        except (OSError, AssertionError, ValueError) as error:
            self.failure = error


def rank_process(server: Server, name: str):
    [process] = [process for process in server.members() if process.cmdline() and name in process.cmdline()[0]]
    return process


def signal_while_serving(server: Server, client: Client, signum: int, rank: str) -> float:
    """Sends ``signum`` to a rank in the middle of two requests; seconds until the server has ended, whole."""
    requests = [LongRequest(client, dp_rank) for dp_rank in range(2)]
    time.sleep(2)
    assert all(request.is_alive() for request in requests), "the requests ended before the rank did"
    rank_process(server, rank).send_signal(signum)
    sent = time.monotonic()
    while not server.has_ended() or server.members():
        elapsed = time.monotonic() - sent
        assert elapsed < END_SECONDS, f"{len(server.members())} processes left after {elapsed:.0f} s"
        time.sleep(0.2)
    elapsed = time.monotonic() - sent
    for request in requests:
        request.join(timeout=5)
        assert request.failure is not None, "a client still waits for a server that has ended, or was answered"
    return elapsed


def check_serves(client: Client, reference: Reference) -> None:
    check_answer(client.generate(PROMPT, STEPS), PROMPT, STEPS, reference)


def test_a_killed_and_a_stopped_rank_end_the_server_and_a_restart_serves(checkpoint, reference, tmp_path: Path):
    port = free_port()
    with serve(checkpoint, tmp_path / "killed.log", *LAYOUT.split(), port=port) as (server, client):
        check_serves(client, reference)
        after_kill = signal_while_serving(server, client, signal.SIGKILL, "scheduler_DP1_TP3")
        killed_code = server.wait(5)

    with serve(checkpoint, tmp_path / "stopped.log", *LAYOUT.split(), port=port) as (server, client):
        check_serves(client, reference)
        after_stop = signal_while_serving(server, client, signal.SIGSTOP, "scheduler_DP0_TP1")
        stopped_code = server.wait(5)

    print(f"killed rank: {after_kill:.1f} s, stopped rank: {after_stop:.1f} s (watchdog {WATCHDOG_SECONDS} s)")
    assert killed_code != 0 and stopped_code != 0
    assert "crashed with exit code" in (tmp_path / "killed.log").read_text(errors="replace")
    assert "watchdog timeout" in (tmp_path / "stopped.log").read_text(errors="replace")
    assert after_kill < WATCHDOG_SECONDS + 7, "a killed rank is noticed without waiting for the watchdog"
