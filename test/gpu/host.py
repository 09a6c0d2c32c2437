"""What the tests on real GPUs share: how many there are, and a reason to skip where there are too few."""

from __future__ import annotations

import subprocess
import sys

import pytest


def count_gpus() -> int:
    """Asked in a process of its own: CUDA must not start in the one that starts the servers."""
    probe = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return int(answer.stdout.split()[-1])


NUM_GPUS = count_gpus()


def needs_gpus(number: int):
    return pytest.mark.skipif(
        number > NUM_GPUS, reason=f"needs {number} NVIDIA GPUs of one host, and this one has {NUM_GPUS}"
    )
