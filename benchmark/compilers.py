"""Processes that compile kernels into Triton's cache on disk, ahead of the one that owns the GPU and measures."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor


def _lay_overlay() -> None:
    from sglang_minimax import overlay

    overlay.install()


def compilers(at_most: int = 16) -> ProcessPoolExecutor:
    """A pool on all cores but one; each process has the overlay before it unpickles a plan, whose module it holds."""
    processes = max(1, min(at_most, (os.cpu_count() or 2) - 1))
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_lay_overlay)
