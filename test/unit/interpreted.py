"""What the tests of kernels in Triton's interpreter share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch


def assert_passes_interpreted(*cases: str) -> None:
    """Runs the tests of files beside this one in a process of their own, since Triton decides at import."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *(str(Path(__file__).with_name(name)) for name in cases)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


def compile_whole(function, monkeypatch, dynamic: bool = True) -> tuple:
    """``function`` as the engine compiles a forward pass, without a graph break and, if ``dynamic``, with symbols for
    sizes (piecewise graphs) or else for each size anew (--enable-torch-compile); and the graphs that came of it."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # as a host without a GPU is set up
    monkeypatch.setattr(torch._dynamo.config, "disable", False, raising=False)  # undone, it is gone for the next test
    graphs: list = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend), graphs
