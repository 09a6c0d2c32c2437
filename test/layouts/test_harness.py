"""A rank that fails, dies or hangs fails the run, says why, and leaves no process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import tqdm
from layouts.harness import LayoutFailed, _collect, run_layout

from sglang_minimax.checkpoints import SmallModel, write_checkpoint

PROMPTS = [[[1, 2, 3, 4, 5]]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    shape = SmallModel(num_hidden_layers=1, num_key_value_heads=2, hidden_size=64, intermediate_size=32)
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), shape)


def fail_on_rank_1(runner):
    if runner.tp_rank == 1:
        raise ValueError("the reason")
    return lambda: None


def die_on_rank_1(runner):
    if runner.tp_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return lambda: None


def hang_on_rank_1(runner):
    if runner.tp_rank == 1:
        time.sleep(600)
    return lambda: None


@pytest.mark.parametrize(
    ("probe", "said"),
    [
        (fail_on_rank_1, ["rank 1 failed", "ValueError: the reason", "fail_on_rank_1"]),
        (die_on_rank_1, ["rank 1 died with exit code -9"]),
        (hang_on_rank_1, ["did not answer within 15 s", "hang_on_rank_1"]),
    ],
)
def test_a_lost_rank_ends_the_run(checkpoint, probe, said):
    before = set(psutil.Process().children(recursive=True))
    started = time.monotonic()
    with pytest.raises(LayoutFailed) as failure:
        run_layout(checkpoint, tp=2, prompts_by_dp_rank=PROMPTS, steps=2, probe=probe, timeout_s=15)
    assert all(part in str(failure.value) for part in said), str(failure.value)
    assert time.monotonic() - started < 45
    assert set(psutil.Process().children(recursive=True)) == before


@pytest.fixture
def two_ranks():
    """Our ends of two ranks' pipes and theirs, and what stands for their processes: the second is killed."""
    ours, theirs = zip(*(multiprocessing.Pipe() for _ in range(2)), strict=True)
    processes = [SimpleNamespace(exitcode=code, join=lambda: None) for code in (0, -9)]
    return ours, theirs, processes


def test_a_rank_that_died_is_named_before_the_peers_that_it_took_along(two_ranks, tmp_path):
    """Also where its end is seen after theirs, as on a busy machine."""
    ours, theirs, processes = two_ranks
    theirs[0].send({"failed_at": 1.0, "error": "connection closed by peer"})
    end = threading.Timer(0.5, theirs[1].close)
    end.start()
    with pytest.raises(LayoutFailed, match=r"(?s)^rank 1 died with exit code -9.*rank 0 failed\nconnection closed"):
        _collect(processes, ours, tmp_path, timeout_s=60)
    end.join()


def test_the_rank_that_failed_first_is_named(two_ranks, tmp_path):
    ours, theirs, processes = two_ranks
    theirs[0].send({"failed_at": 2.0, "error": "connection closed by peer"})
    theirs[1].send({"failed_at": 1.0, "error": "the reason"})
    with pytest.raises(LayoutFailed, match=r"(?s)^rank 1 failed\nthe reason.*after it failed: rank\(s\) \[0\]$"):
        _collect(processes, ours, tmp_path, timeout_s=60)


def test_a_failure_does_not_wait_for_a_rank_that_hangs(two_ranks, tmp_path, monkeypatch):
    monkeypatch.setattr("layouts.harness.LAST_WORDS_S", 0.1)
    ours, theirs, processes = two_ranks
    theirs[1].send({"failed_at": 1.0, "error": "the reason"})
    started = time.monotonic()
    with pytest.raises(LayoutFailed, match=r"^rank 1 failed\nthe reason"):
        _collect(processes, ours, tmp_path, timeout_s=60)
    assert time.monotonic() - started < 30


def die_within_a_progress_bar(runner):
    tqdm.tqdm.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_dies_within_a_progress_bar_keeps_no_lock_of_ours(checkpoint):
    """What loads weights next would wait for it for ever."""
    locks = tqdm.tqdm.get_lock().locks  # one of which is shared with forked processes
    with pytest.raises(LayoutFailed, match="died"):
        run_layout(checkpoint, prompts_by_dp_rank=PROMPTS, probe=die_within_a_progress_bar)
    assert all(lock.acquire(True, 5) for lock in locks)
    for lock in locks:
        lock.release()


def test_forced_tokens_are_fed_back(checkpoint):
    free = run_layout(checkpoint, prompts_by_dp_rank=PROMPTS, steps=3)
    other = [(token + 1) % 1000 for token in free.tokens[0][0]]
    forced = run_layout(checkpoint, prompts_by_dp_rank=PROMPTS, steps=3, forced_tokens=[[other]])
    assert forced.tokens == [[other]]
    assert (forced.logprobs[0][0][0] == free.logprobs[0][0][0]).all()
    assert (forced.logprobs[0][0][1:] != free.logprobs[0][0][1:]).any()


def test_chunks_do_not_change_the_answer(checkpoint):
    prompts = [[list(range(20)), [7, 8, 9]]]
    whole = run_layout(checkpoint, prompts_by_dp_rank=prompts, steps=3, chunk=32)
    chunked = run_layout(checkpoint, prompts_by_dp_rank=prompts, steps=3, chunk=3)
    assert chunked.tokens == whole.tokens


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(prompts_by_dp_rank=[[[1]]], tp=2, dp=2), "1 DP ranks were given and dp is 2"),
        (dict(prompts_by_dp_rank=[[[1]]], tp=4, ep=3), "must both divide tp 4"),
        (dict(prompts_by_dp_rank=[[]]), "every DP rank is idle"),
    ],
)
def test_contradictions_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        run_layout("nowhere", **arguments)
