"""The doctor's child processes and ranks: what hangs, crashes or is wrong is named, and nothing is left behind."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace

import pytest
import torch
from unit.doctor_hosts import (
    BROKEN_TORCH,
    GPU_FACTS,
    assert_is_read,
    changed,
    environment_with_overlay,
    wait_until_gone,
)

from sglang_minimax import cpu_host
from sglang_minimax.doctor import child, rank, self_check
from sglang_minimax.doctor.facts import Devices, Engine
from sglang_minimax.doctor.finding import Finding
from sglang_minimax.ports import free_port

# --------------------------------------------------------------------------------------------------- children


def run_one(code: str, timeout_seconds: float = 30) -> child.Ended:
    (ended,) = child.run_together([[sys.executable, "-S", "-c", code]], timeout_seconds)
    return ended


def test_a_child_says_how_it_ended():
    assert run_one("print('hello')") == child.Ended(0, "hello\n", "")
    assert run_one("raise ValueError('of 3')").failure == "it ended with exit code 1: ValueError: of 3"
    assert run_one("import os; os.abort()").failure.startswith("it was ended by SIGABRT")


def test_the_error_is_found_behind_what_libraries_say_after_it():
    said = "[rank1]: torch.AcceleratorError: no kernel image\nwarnings.warn(x)\n"
    code = f"import sys\nsys.stderr.write({said!r})\nsys.exit(1)"
    assert run_one(code).failure == "it ended with exit code 1: torch.AcceleratorError: no kernel image"


def test_a_child_that_hangs_is_ended_with_what_it_started(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "other = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])\n"
        "print(other.pid, flush=True)\n"
        "time.sleep(600)"
    )
    started = time.monotonic()
    ended = run_one(code, timeout_seconds=3)
    assert time.monotonic() - started < 20
    assert ended.exit_code is None and ended.failure == "it did not end in time"
    assert wait_until_gone(int(ended.stdout))


# ---------------------------------------------------------------------------------------- ranks that go wrong


def telling(*lines: dict, then: str = "") -> list[str]:
    """A command that tells ``lines`` as a rank does, and goes on with ``then``."""
    said = "".join(f"print({rank.PREFIX + json.dumps(line)!r}, flush=True)\n" for line in lines)
    return [sys.executable, "-S", "-c", "import os, sys, time\n" + said + then]


def result(worst: float, operation: str = "norm_qk") -> dict:
    return {"operation": operation, "heads": 48, "kv_heads": 8, "tokens": 7, "dtype": "bfloat16", "worst": worst}


def answering(worst: float, path: str = "fused") -> list[str]:
    return telling({"stage": "built", "path": path}, {"stage": "compared", "device": "CPU", "results": [result(worst)]})


def judged(*commands: list[str], timeout_seconds: float = 30, on_gpus: bool = False) -> tuple[Finding, Finding]:
    places = list(range(len(commands))) if on_gpus else [None] * len(commands)
    ranks = self_check.run_ranks(commands, places, timeout_seconds)
    return self_check.judge_path(ranks), self_check.judge(ranks)


def test_right_ranks_are_ok_and_each_ranks_error_is_reported():
    path, checked = judged(answering(0.25), answering(0.5), on_gpus=True)
    assert path == Finding(self_check.PATH, "ok", "fused, with 2 GPU rank(s) over NCCL")
    assert checked.status == "ok" and "by rank 0.250, 0.500 of the tolerance" in checked.what


def test_a_wrong_rank_is_named():
    _, checked = judged(answering(1), answering(1.01), answering(0.9), answering(rank.NOT_A_NUMBER))
    assert checked.status == "error"
    assert "wrong on rank 1, rank 3: norm_qk of 7 token(s), 48 q and 8 KV heads" in checked.what
    assert "1.01 times the tolerance" in checked.what
    assert_is_read(checked.mend)


def test_the_rank_that_hangs_is_named_and_not_those_that_wait_for_it():
    waiting = telling({"stage": "started"}, {"stage": "imported"}, {"stage": "joined"}, then="time.sleep(600)")
    hanging = telling({"stage": "started"}, {"stage": "imported"}, then="time.sleep(600)")
    path, checked = judged(waiting, waiting, hanging, timeout_seconds=3)
    assert checked.status == "error"
    assert checked.what.startswith("rank 2 failed after it had imported the engine: it did not end in time")
    assert "2 other(s) waited" in checked.what
    assert path.status == "error" and "no rank" in path.what
    assert_is_read(checked.mend)


def test_the_rank_that_crashes_is_named_and_not_those_that_wait_for_it(monkeypatch):
    monkeypatch.setattr(child, "GRACE_SECONDS", 0.5)
    waiting = telling({"stage": "started"}, then="time.sleep(600)")
    crashing = telling({"stage": "started"}, {"stage": "joined"}, then="raise RuntimeError('NCCL error')")
    started = time.monotonic()
    _, checked = judged(waiting, crashing, timeout_seconds=300)
    assert time.monotonic() - started < 60, "the rank that waits was waited for"
    assert checked.what.startswith("rank 1 failed after it had joined the others: it ended with exit code 1: ")
    assert "RuntimeError: NCCL error" in checked.what


def test_a_rank_that_ends_without_an_answer_has_failed():
    _, checked = judged(telling({"stage": "built", "path": "a"}), answering(0.5, path="a"))
    assert checked.status == "error" and "rank 0 failed after it had chosen a path: it ended without an" in checked.what


def test_ranks_that_choose_different_paths_are_an_error():
    path, _ = judged(answering(0.5, path="exchange"), answering(0.5, path="collective"))
    assert path.status == "error" and "rank 0: exchange; rank 1: collective" in path.what


@pytest.mark.parametrize(
    ("num_gpus", "groups"),
    [
        (1, [[0]]),
        (2, [[0, 1]]),
        (3, [[0, 1], [1, 2]]),
        (5, [[0, 1, 2, 3], [1, 2, 3, 4]]),
        (6, [[0, 1, 2, 3], [2, 3, 4, 5]]),
        (8, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (16, [list(range(16))]),
    ],
)
def test_every_gpu_is_in_a_group_that_the_heads_divide_over(num_gpus, groups):
    assert self_check.groups_of(num_gpus) == groups


def test_a_group_of_some_gpus_sees_those_alone(monkeypatch):
    calls = []
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "1")
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    monkeypatch.setattr(self_check, "run_ranks", lambda *given: calls.append(given) or [])
    self_check.run_group([1, 2], 3, None, 10)
    self_check.run_group([1, 2], 3, "4,6,7", 10)
    self_check.run_group([0, 1], 2, "4,6", 10)
    assert [given[3].get("CUDA_VISIBLE_DEVICES") for given in calls] == ["1,2", "6,7", None]
    assert all(given[3]["NCCL_NVLS_ENABLE"] == "0" for given in calls)
    assert all(given[3]["NCCL_CUMEM_ENABLE"] == "1" for given in calls), "what the person set was changed"


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (replace(GPU_FACTS, engine=Engine()), "no engine"),
        (changed(GPU_FACTS, engine={"laid_over": False}), "overlay is not active"),
        (replace(GPU_FACTS, torch=BROKEN_TORCH), "torch cannot be imported"),
        (changed(GPU_FACTS, torch={"gpus": []}), "torch sees no GPU"),
        (replace(GPU_FACTS, devices=Devices(failure="x")), "the GPUs cannot be used"),
    ],
)
def test_nothing_is_started_where_nothing_can_be_checked(told, reason, monkeypatch):
    monkeypatch.setattr(self_check, "run_group", lambda *given: pytest.fail("ranks were started"))
    found = self_check.run(told, 10).findings
    assert [one.status for one in found] == ["not applicable"] * 2
    assert all(reason in one.what for one in found)


# -------------------------------------------------------------------------------------- what a rank computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_rounded_once_is_within_the_tolerance_and_one_unit_more_is_not(dtype):
    want = torch.randn(4096, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 3
    got = want.to(dtype)
    assert 0 < rank.worst_error(got, want, want.abs()) <= 1
    if dtype != torch.float32:  # whose one unit is within what 64 operations may add up to
        above = torch.nextafter(got, torch.full_like(got, 1e4))
        assert rank.worst_error(above, want, want.abs()) > 1
    assert rank.worst_error(got * (1 + 2.0**-6), want, want.abs()) > 1


def test_nan_and_infinity_are_outside_every_tolerance_and_zero_is_not():
    want = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for value in (float("nan"), float("inf")):
        assert rank.worst_error(torch.tensor([1.0, value]), want, want) == rank.NOT_A_NUMBER
    zero = torch.zeros(2, dtype=torch.float64)
    assert rank.worst_error(torch.zeros(2), zero, zero) == 0


def test_the_rotation_turns_pairs_by_their_angle():
    rows = rank.draw(2, 1, 5, torch.float32, 11, torch.device("cpu"))
    x = rows.q.double()
    value, magnitude = rank.rotate(x, rows)
    half = rank.ROTARY_DIM // 2
    exponents = torch.arange(half, dtype=torch.float64) / half
    angles = rows.positions[:, None, None] * rank.ROTARY_BASE**-exponents
    heads = x.unflatten(-1, (-1, rank.HEAD_DIM))
    turned = torch.complex(heads[..., :half], heads[..., half : 2 * half]) * torch.polar(
        torch.ones_like(angles), angles
    )
    want = torch.cat([turned.real, turned.imag, heads[..., 2 * half :]], dim=-1).flatten(1)
    assert (value - want).abs().max() < 1e-5  # the table of cosines is float32
    assert (magnitude >= value.abs() - 1e-12).all()


def test_the_definition_is_transformers():
    norm = torch.nn.RMSNorm(256, eps=rank.EPS, dtype=torch.float64)
    x = torch.randn(3, 256, dtype=torch.float64)
    weight = torch.randn(256, dtype=torch.float64)
    norm.weight.data.copy_(weight)
    assert torch.allclose(rank.in_float64(x, weight), norm(x), rtol=1e-12, atol=0)


@pytest.mark.skipif(not cpu_host.has_no_accelerator(), reason="this host has an accelerator")
def test_one_rank_that_miscounts_shared_heads_is_found_and_named(tmp_path, monkeypatch):
    """The fault is real: on rank 1 the mean of k's squares is taken over each head once, where two ranks hold it."""
    monkeypatch.setattr(os, "environ", environment_with_overlay(tmp_path))
    miscount = (
        "import sys\n"
        "from sglang.srt.layers import minimax_qk_norm as module\n"
        "right = module.scale_rows\n"
        "module.scale_rows = lambda q, k, qw, kw, sums, q_count, k_count, eps: right(\n"
        "    q, k, qw, kw, sums, q_count, min(k_count, 128), eps)\n"
        "from sglang_minimax.doctor import rank\n"
        "rank.main(sys.argv[1:])"
    )
    shared = ["2", str(free_port()), "cpu", "5", "200"]
    commands = [
        [*child.python("sglang_minimax.doctor.rank"), "0", *shared],
        [sys.executable, "-c", miscount, "1", *shared],
    ]
    ranks = self_check.run_ranks(commands, [None, None], 200)
    found = self_check.judge(ranks)
    assert found.status == "error" and found.what.startswith("wrong on rank 1: norm_qk"), (found, ranks)
    wrong = {row["kv_heads"]: row["worst"] for row in ranks[1].results if row["operation"] == "norm_qk"}
    assert wrong[1] > 50 and ranks[0].worst <= 1
