"""The engine's ``bench_one_batch``, which waits for its turn between its warm-up and what it measures.

Run by path, in a contestant's environment, with the tool's own arguments: any contestant's Python can run it. Several
such may then load at once, and have the GPUs for themselves while they are measured. In ``SGLANG_MINIMAX_BENCH_TURN``
is a path: a file of that name and ``.ready`` says that this one waits, one and ``.turn`` that it may go on. Ranks that
wait sleep, and leave the GPUs alone.

A rank's launches are measured on the same core in all contestants: short steps wait for the host, and of two processes
of the same code one took 1.2 times as long as the other where the system chose their cores.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

VARIABLE = "SGLANG_MINIMAX_BENCH_TURN"
_POLL_SECONDS = 0.05

# Where the functions are: later releases leave nothing but their names where the tool was.
tool: Any = sys.modules[importlib.import_module("sglang.bench_one_batch").latency_test.__module__]
measure, run_once = tool.latency_test, tool.latency_test_run_once


def latency_test(server_args: Any, port_args: Any, bench_args: Any, gpu_id: int, tp_rank: int) -> None:
    """The tool's work of one rank, in a process of its own: this file is imported there again."""
    calls = itertools.count()

    def run_in_turn(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 1:  # the first was the warm-up
            _wait(says_so=tp_rank == 0)
            _stay_on_core(tp_rank, server_args.tp_size)
        return run_once(*args, **kwargs)

    tool.latency_test_run_once = run_in_turn
    measure(server_args, port_args, bench_args, gpu_id, tp_rank)


def _wait(says_so: bool) -> None:
    path = os.environ[VARIABLE]
    if says_so:
        Path(f"{path}.ready").touch()
    while not os.path.exists(f"{path}.turn"):
        time.sleep(_POLL_SECONDS)


def _stay_on_core(rank: int, ranks: int) -> None:
    """Keeps this thread, which launches, where that of this rank is in every contestant; the other threads move.

    Threads that it starts from now on stay with it."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= 2 * ranks:  # else it would wait for them
        apart = len(cores) // ranks
        os.sched_setaffinity(0, {cores[rank * apart + apart - 1]})


if __name__ == "__main__":
    tool.latency_test = latency_test
    parser = argparse.ArgumentParser()
    tool.ServerArgs.add_cli_args(parser)
    tool.BenchArgs.add_cli_args(parser)
    given = parser.parse_args()
    server_args = tool.ServerArgs.from_cli_args(given)
    logging.basicConfig(level=getattr(logging, server_args.log_level.upper()), format="%(message)s")
    tool.main(server_args, tool.BenchArgs.from_cli_args(given))
