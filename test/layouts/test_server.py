"""The real server over HTTP, with no environment variable and no flag but the layout, answers as transformers does."""

from __future__ import annotations

import os
import sys

import pytest

from sglang_minimax.checkpoints import SmallModel, write_checkpoint
from sglang_minimax.cpu_host import has_no_accelerator
from sglang_minimax.reference import Reference
from sglang_minimax.server_process import Server, free_port

pytestmark = pytest.mark.skipif(not has_no_accelerator(), reason="this host has an accelerator: see test/gpu")

STEPS = 16
PROMPTS = [[11, 12, 13, 14, 15], list(range(100, 140)), [7, 700, 70]]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), SmallModel(num_key_value_heads=2))


@pytest.fixture(scope="module")
def expected(checkpoint):
    return Reference(checkpoint).greedy(PROMPTS, STEPS)


@pytest.fixture
def bare_environment(monkeypatch):
    """Without what the engine and the overlay set in this process once they were imported."""
    for name in list(os.environ):
        if name.startswith(("SGLANG_", "TORCH", "OMP_", "GLOO_", "CUDA_", "NCCL_")):
            monkeypatch.delenv(name)


def check(server: Server, prompts: list[list[int]], expected) -> None:
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


@pytest.mark.parametrize(
    "layout",
    ["--tp 4", "--tp 4 --dp 2 --enable-dp-attention --skip-tokenizer-init"],
    ids=["tp4", "tp4_dp2"],
)
@pytest.mark.usefixtures("bare_environment")
def test_server_answers_as_transformers(layout, checkpoint, expected, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(checkpoint), "--device", "cpu"]
    with Server([*command, "--port", str(port), *layout.split()], tmp_path / "server.log", port=port) as server:
        server.wait_until_ready(240, on_progress=lambda reached: None)
        check(server, PROMPTS, expected)  # all in one batch
        for prompt, completion in zip(PROMPTS, expected, strict=True):
            check(server, [prompt], [completion])  # alone: with DP attention the other rank is idle
        log = server.log.read_text(errors="replace")
    assert "No accelerator on this host" in log
    assert "Traceback" not in log
