"""A rank that is killed in the middle of NCCL's collectives: the server ends with an error, and a restart serves."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from faults.serving import chosen, serve, signal_while_serving
from gpu.host import needs_gpus

from sglang_minimax.checkpoints import SmallModel, write_checkpoint
from sglang_minimax.ports import free_port
from sglang_minimax.reference import Reference

WATCHDOG_SECONDS = 20
# It looks twice in its time, prints where the ranks stand, and processes take a while to die under NCCL.
END_SECONDS = 2 * WATCHDOG_SECONDS + 30
START_SECONDS = 420
PROMPT, STEPS = [7, 70, 700], 4
FLAGS = "--skip-tokenizer-init --attention-backend triton --grammar-backend none --disable-piecewise-cuda-graph"
FLAGS += f" --cuda-graph-bs 1 2 --max-total-tokens 16384 --watchdog-timeout {WATCHDOG_SECONDS}"


@pytest.mark.timeout(1200)
@needs_gpus(2)
@pytest.mark.parametrize(
    ("layout", "rank", "dp_ranks"),
    [
        pytest.param("--tp 2", "scheduler_TP1", (None,), id="TP2"),
        pytest.param("--tp 2 --dp 2 --enable-dp-attention", "scheduler_DP1_TP1", (0, 1), id="TP2-DP2"),
    ],
)
def test_a_killed_rank_ends_the_server_and_a_restart_serves(layout, rank, dp_ranks, tmp_path: Path):
    model = SmallModel(num_hidden_layers=2, hidden_size=512, head_dim=128, num_key_value_heads=2, dtype="bfloat16")
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model)
    [expected] = Reference(checkpoint, device="cuda").greedy([PROMPT], STEPS)
    logs = Path(os.environ.get("SGLANG_MINIMAX_TEST_LOGS") or tmp_path)
    log, flags = logs / f"killed_{rank}.log", f"{layout} {FLAGS}".split()
    options = {"port": free_port(), "device": "cuda", "start_seconds": START_SECONDS}

    with serve(checkpoint, log, *flags, **options) as (server, client):
        before = client.generate(PROMPT, STEPS)
        seconds = signal_while_serving(server, client, signal.SIGKILL, rank, dp_ranks, END_SECONDS)
        exit_code = server.wait(5)
    print(f"{layout}: ended {seconds:.1f} s after the kill (watchdog {WATCHDOG_SECONDS} s)")
    assert exit_code != 0
    text = log.read_text(errors="replace")
    # Either the launcher or a rank whose peer is gone notices first.
    signs = ("crashed with exit code", "watchdog timeout", "Connection reset by peer", "Connection closed by peer")
    assert any(sign in text for sign in signs), text[-2000:]

    with serve(checkpoint, log.with_suffix(".restart.log"), *flags, **options) as (_, client):
        assert chosen(client.generate(PROMPT, STEPS)) == chosen(before)
    assert chosen(before)[0][0] == expected.tokens[0]
