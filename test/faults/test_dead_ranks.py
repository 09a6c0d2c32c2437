"""A rank that dies or stops while the server answers: the server ends with an error, in time and whole."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from faults.serving import Client, check_answer, reference_beside, serve, signal_while_serving

from sglang_minimax.checkpoints import SmallModel, write_checkpoint
from sglang_minimax.cpu_host import has_no_accelerator
from sglang_minimax.ports import free_port
from sglang_minimax.reference import Reference

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


def check_serves(client: Client, reference: Reference) -> None:
    check_answer(client.generate(PROMPT, STEPS), PROMPT, STEPS, reference)


def test_a_killed_and_a_stopped_rank_end_the_server_and_a_restart_serves(checkpoint, reference, tmp_path: Path):
    port = free_port()
    with serve(checkpoint, tmp_path / "killed.log", *LAYOUT.split(), port=port) as (server, client):
        check_serves(client, reference)
        after_kill = signal_while_serving(server, client, signal.SIGKILL, "scheduler_DP1_TP3", range(2), END_SECONDS)
        killed_code = server.wait(5)

    with serve(checkpoint, tmp_path / "stopped.log", *LAYOUT.split(), port=port) as (server, client):
        check_serves(client, reference)
        after_stop = signal_while_serving(server, client, signal.SIGSTOP, "scheduler_DP0_TP1", range(2), END_SECONDS)
        stopped_code = server.wait(5)

    print(f"killed rank: {after_kill:.1f} s, stopped rank: {after_stop:.1f} s (watchdog {WATCHDOG_SECONDS} s)")
    assert killed_code != 0 and stopped_code != 0
    assert "crashed with exit code" in (tmp_path / "killed.log").read_text(errors="replace")
    assert "watchdog timeout" in (tmp_path / "stopped.log").read_text(errors="replace")
    assert after_kill < WATCHDOG_SECONDS + 7, "a killed rank is noticed without waiting for the watchdog"
