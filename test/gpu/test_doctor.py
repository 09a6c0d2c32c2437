"""``sglang-minimax doctor`` on real GPUs: QK norm on every one of them, against float64.

    python -m pytest test/gpu/test_doctor.py

What else it finds is that host's: a library that is missing there is a finding and no failure of this test.
"""

from __future__ import annotations

import json
import subprocess

import pytest
from gpu.host import NUM_GPUS, needs_gpus
from unit.doctor_hosts import doctor, environment_with_overlay

from sglang_minimax.doctor import rank
from sglang_minimax.doctor.finding import EXIT_CODES

SECONDS = 240  # of each of the doctor's children
OPERATIONS = {"norm_qk", "QKNormRope", "its KV store"}


def ask(folder, **environment: str) -> dict:
    """The doctor's answer, after what holds on any host was checked."""
    done: subprocess.CompletedProcess = doctor(
        {**environment_with_overlay(folder), **environment}, "--json", "--timeout", str(SECONDS), timeout=3 * SECONDS
    )
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    answer = json.loads(done.stdout)
    print(json.dumps(answer["findings"], indent=1))  # pytest shows it where the test fails, or with -rP
    statuses = [one["status"] for one in answer["findings"]]
    assert done.returncode == answer["exit_code"] == max(EXIT_CODES[status] for status in statuses)
    return answer


def finding(answer: dict, name: str) -> dict:
    (found,) = [one for one in answer["findings"] if one["name"] == name]
    return found


def assert_right(answer: dict, num_gpus: int) -> None:
    """Every GPU has a rank, and every rank compared everything and is within the tolerance."""
    checked = finding(answer, "QK norm self-check")
    assert checked["status"] == "ok", (checked, answer["ranks"])
    assert finding(answer, "QK norm path")["status"] == "ok"
    assert {one["place"] for one in answer["ranks"]} == set(range(num_gpus))
    for one in answer["ranks"]:
        assert one["failure"] is None and one["stage"] == "compared" and 0 < one["worst"] <= 1, one
        compared = {(row["operation"], row["tokens"], row["dtype"]) for row in one["results"]}
        assert compared == {(name, tokens, "bfloat16") for name in OPERATIONS for tokens in rank.TOKENS["cuda"]}


@pytest.mark.timeout(4 * SECONDS)
@needs_gpus(1)
def test_qk_norm_is_right_on_every_gpu_of_this_host(tmp_path):
    answer = ask(tmp_path)
    assert_right(answer, NUM_GPUS)
    for name in ("driver", "GPUs", "GPU architecture", "NCCL", "sgl_kernel", "FlashInfer", "CUDA compiler"):
        assert finding(answer, name)["status"] != "not applicable", name
    for name in ("driver", "GPU architecture"):
        assert finding(answer, name)["status"] != "error", "the GPUs work, so these cannot be so"
    peers = finding(answer, "peer access")
    assert peers["status"] == ("not applicable" if NUM_GPUS == 1 else "ok"), peers


@pytest.mark.timeout(4 * SECONDS)
@needs_gpus(2)
def test_one_visible_gpu_is_one_rank(tmp_path):
    answer = ask(tmp_path, CUDA_VISIBLE_DEVICES="1")
    assert_right(answer, 1)
    assert finding(answer, "peer access")["status"] == "not applicable"


@pytest.mark.timeout(4 * SECONDS)
@needs_gpus(1)
def test_hidden_gpus_are_an_error_that_says_so(tmp_path):
    answer = ask(tmp_path, CUDA_VISIBLE_DEVICES="")
    gpus = finding(answer, "GPUs")
    assert gpus["status"] == "error" and gpus["mend"] == "unset CUDA_VISIBLE_DEVICES", gpus
    assert finding(answer, "QK norm self-check")["status"] == "not applicable"
