"""The real server over HTTP, with no environment variable and no flag but the layout, answers as transformers does."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import psutil
import pytest

from sglang_minimax.checkpoints import SmallModel, write_checkpoint
from sglang_minimax.reference import Reference

STEPS = 16
PROMPTS = [[11, 12, 13, 14, 15], list(range(100, 140)), [7, 700, 70]]
TOLERANCE = 1e-4
START_TIMEOUT_S = 240


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), SmallModel(num_key_value_heads=2))


@pytest.fixture(scope="module")
def expected(checkpoint):
    return Reference(checkpoint).greedy(PROMPTS, STEPS)


@contextlib.contextmanager
def server(checkpoint, log_path, *arguments: str):
    """Yields the URL of a server that answers; its log goes to ``log_path``, and all its processes end with it."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(checkpoint), "--device", "cpu"]
    ours = ("SGLANG_", "TORCH", "OMP_", "GLOO_")  # what importing the engine set in this process
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    with open(log_path, "w") as log:
        process = psutil.Popen(
            [*command, "--port", str(port), *arguments], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
    family = [process]
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, url, log_path)
        family += process.children(recursive=True)
        yield url
    finally:
        family += [child for child in _children(process) if child not in family]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=30)


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _wait_until_ready(process, url: str, log_path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{url}/health_generate", timeout=20).read()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    end = "\n".join(log_path.read_text(errors="replace").splitlines()[-40:])
    pytest.fail(f"the server did not answer; the end of its log:\n{end}")


def ask(url: str, prompts: list[list[int]]) -> list[dict]:
    request = {
        "input_ids": prompts,
        "sampling_params": {"temperature": 0, "max_new_tokens": STEPS, "ignore_eos": True},
        "return_logprob": True,
    }
    body = json.dumps(request).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/generate", body, headers), timeout=120) as reply:
        return json.load(reply)


def check(answers: list[dict], expected) -> None:
    for answer, completion in zip(answers, expected, strict=True):
        steps = answer["meta_info"]["output_token_logprobs"]
        assert [token for _, token, *_ in steps] == completion.tokens
        assert [logprob for logprob, *_ in steps] == pytest.approx(completion.logprobs, abs=TOLERANCE)


@pytest.mark.parametrize(
    "layout",
    [
        ["--tp", "4"],
        ["--tp", "4", "--dp", "2", "--enable-dp-attention", "--skip-tokenizer-init"],
    ],
    ids=["tp4", "tp4_dp2"],
)
def test_server_answers_as_transformers(layout, checkpoint, expected, tmp_path):
    log_path = tmp_path / "server.log"
    with server(checkpoint, log_path, *layout) as url:
        check(ask(url, PROMPTS), expected)  # all in one batch
        for prompt, completion in zip(PROMPTS, expected, strict=True):
            check(ask(url, [prompt]), [completion])  # alone: with DP attention the other rank is idle
    log = log_path.read_text(errors="replace")
    assert "No accelerator on this host" in log
    assert "Traceback" not in log
