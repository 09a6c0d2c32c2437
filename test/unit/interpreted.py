"""What the tests of kernels in Triton's interpreter share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

TORCH = {
    "fp8e4nv": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32,
}  # fmt: skip


def assert_passes_interpreted(*cases: str) -> None:
    """Runs the tests of files beside this one, or of others by their whole paths, in a process of their own, since
    Triton decides at import."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *(str(Path(__file__).parent / name) for name in cases)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


def converted(data: np.ndarray, source, target, rounding_mode=None) -> np.ndarray:
    """Triton's values of one type as another's, in the interpreter's integers, rounded to nearest even as on a GPU."""
    values = torch.from_numpy(np.ascontiguousarray(data).view(f"int{source.primitive_bitwidth}"))
    bits = target.primitive_bitwidth
    found = values.view(TORCH[source.name]).to(TORCH[target.name]).view(getattr(torch, f"int{bits}"))
    return found.numpy().view(f"uint{bits}")


def compute_as_a_gpu(monkeypatch) -> None:
    """The interpreter cuts bits off where a GPU rounds, and would multiply the integers that hold small floats."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, patch_tensor = InterpreterBuilder.create_dot, interpreter._patch_lang_tensor

    def widened(handle):
        scalar = handle.dtype.scalar
        if scalar.name not in ("bf16", "fp8e4nv"):
            return handle
        return TensorHandle(converted(handle.data, scalar, tl.float32).view(np.float32), tl.float32)

    def countable(tensor):  # the interpreter's scalars are arrays of one, which NumPy 2.4 takes for no integer
        patch_tensor(tensor)
        tensor.__index__ = lambda self: self.handle.data.item()

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", countable)
    monkeypatch.setattr(interpreter, "_convert_float", converted)
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    )


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
