"""The wheel, installed into a fresh environment with stock SGLang, serves there and answers as transformers does."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_minimax import __version__
from sglang_minimax.checkpoints import SmallModel, write_checkpoint
from sglang_minimax.cpu_host import has_no_accelerator
from sglang_minimax.overlay import ENGINE_VERSION
from sglang_minimax.ports import free_port, port_flags
from sglang_minimax.reference import Reference
from sglang_minimax.server_process import Server
from sglang_minimax.server_report import BLOCK_BEGINS

REPOSITORY = Path(__file__).parents[2]
STEPS = 16
PROMPTS = [[11, 12, 13, 14, 15], list(range(100, 140)), [7, 700, 70]]
TOLERANCE = 1e-4
WHEEL = "SGLANG_MINIMAX_WHEEL"  # the wheel of a release, where one is being made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    if given := os.environ.get(WHEEL):
        return Path(given)
    folder = tmp_path_factory.mktemp("wheel")
    build = "from hatchling.build import build_wheel; import sys; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=REPOSITORY, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture
def environment(wheel, tmp_path, monkeypatch) -> Path:
    """The folder of packages of a fresh environment: the wheel, and behind it the stock engine with what it needs.

    The engine and its torch are 11 GB, so they are not installed again: a line of a ``.pth`` file names the folder
    where they are. Python runs no ``.pth`` file *there*, so an overlay installed beside them stays out.
    """
    for name in list(os.environ):
        if name.startswith(("PYTHON", "SGLANG_", "TORCH", "OMP_", "GLOO_", "CUDA_", "NCCL_")):
            monkeypatch.delenv(name)
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "uv", "pip", "install", "-q", "--offline", "--no-deps", "--python", str(python)]
    subprocess.run([*install, str(wheel)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    engine = Path(importlib.util.find_spec("sglang").submodule_search_locations[-1])
    assert engine.parent != REPOSITORY / "python", "the engine itself must be installed, not only this checkout"
    (packages / "zz_engine.pth").write_text(f"{engine.parent}\n")
    return packages


@pytest.mark.skipif(not has_no_accelerator(), reason="this host has an accelerator: see test/gpu")
def test_the_wheel_serves(environment, tmp_path):
    """At TP2 with one KV head, which stock answers wrongly: both ranks hold it."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", SmallModel(num_key_value_heads=1))
    port = free_port()
    command = [
        str(environment.parents[2] / "bin" / "python"), "-m", "sglang.launch_server",
        *("--model-path", str(checkpoint), "--device", "cpu", "--tp", "2", *port_flags(port)),
    ]  # fmt: skip
    with Server(command, tmp_path / "server.log", port=port) as server:
        server.wait_until_ready(240, on_progress=lambda reached: None)
        sampling = {"temperature": 0, "max_new_tokens": STEPS, "ignore_eos": True}
        request = {"input_ids": PROMPTS, "sampling_params": sampling, "return_logprob": True}
        answers = server.post("/generate", request, timeout_seconds=120)
        info = json.loads(server.get("/server_info"))
        log = server.log.read_text(errors="replace")
    laid_over = environment / "sglang_minimax" / "laid_over" / "sglang"
    assert f"sglang-minimax {__version__} is laid over sglang {ENGINE_VERSION}, from {laid_over}\n" in log
    assert str(REPOSITORY / "python") not in log
    assert log.count(BLOCK_BEGINS) == 1
    assert info["version"] == ENGINE_VERSION
    assert info["sglang_minimax"]["version"] == __version__
    for answer, expected in zip(answers, Reference(checkpoint).greedy(PROMPTS, STEPS), strict=True):
        steps = answer["meta_info"]["output_token_logprobs"]
        assert [token for _, token, *_ in steps] == expected.tokens
        assert [logprob for logprob, *_ in steps] == pytest.approx(expected.logprobs, abs=TOLERANCE)
