"""What the tests of kernels on several GPUs share: a process a rank, which runs a function of the test's file."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sglang_minimax.ports import free_port

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


def needs_gpus(count: int):
    return pytest.mark.skipif(count > GPUS, reason=f"needs {count} GPUs, and this host has {GPUS}")


def same_bits(x, y) -> bool:
    return torch.equal(x.view(torch.int16), y.view(torch.int16))


def run_ranks(file: str, what: str, world: int, seconds: float) -> list[subprocess.CompletedProcess]:
    """A process for each of ``world`` ranks, which calls function ``what`` of ``file`` with rank, ranks and a port."""
    port = free_port()
    return run_processes(file, [[what, rank, world, port] for rank in range(world)], seconds)


def run_processes(file: str, calls: list[list], seconds: float, **environment) -> list[subprocess.CompletedProcess]:
    """A process for each [function of ``file``, its numbers], all at once."""
    processes = [
        subprocess.Popen(
            [sys.executable, file, *map(str, call)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment},
        )
        for call in calls
    ]
    done = []
    for process in processes:
        try:
            out, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out = process.communicate()[0] + "\nkilled: it ran out of time"
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out))
    return done
