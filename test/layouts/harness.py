"""Runs a checkpoint under one parallel layout, below the server: real ranks, real collectives, one batch.

:func:`run_layout` starts one process a rank. On a CPU they are forked from this process after it has imported
the engine, so that sixteen ranks cost seconds; on GPUs, where a process that uses CUDA cannot be forked, they
are spawned, and where there are more ranks than GPUs they take turns on these, see ``nodes.py``. Each rank
builds the engine's ``ServerArgs`` and ``ModelRunner`` and steps through the same batches that the engine's
scheduler would form: prompts in chunks, then decode, with the DP ranks agreeing on their token counts and
taking IDLE batches where they have nothing to do. See ``batches.py``.

    result = run_layout("path/to/checkpoint", tp=4, dp=2, prompts_by_dp_rank=[[[1, 2, 3]], []], steps=4)
    result.tokens[0][0]     # four greedy tokens of the first prompt of DP rank 0
    result.logprobs[0][0]   # float32 [4, vocab]: what those tokens were chosen from

A rank that fails, dies or hangs makes the run fail with that rank's traceback and its log, within the timeout,
and no process is left behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import gc
import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from layouts.nodes import BESIDE_OTHERS, shared_gpu_environment

Prompt = Sequence[int]
Probe = Callable[[Any], Callable[[], Any]]

LAST_WORDS_S = 5  # how long a run that failed waits for the other ranks to say how they ended


@dataclasses.dataclass(frozen=True)
class Layout:
    """One run, as every rank sees it. ``dp`` above 1 means DP attention: attention TP is then ``tp / dp``.

    There are ``tp * pp`` ranks, those of the first pipeline stage first. ``arrivals`` and ``lengths`` are indexed like
    ``prompts_by_dp_rank``; ``steps`` is the longest of ``lengths``. ``gpus`` is how many this host has, 0 on a CPU.
    """

    checkpoint: str
    prompts_by_dp_rank: tuple[tuple[tuple[int, ...], ...], ...]
    tp: int = 1
    dp: int = 1
    ep: int = 1
    pp: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    steps: int = 16
    chunk: int = 16
    arrivals: tuple[tuple[int, ...], ...] = ()
    lengths: tuple[tuple[int, ...], ...] = ()
    forced_tokens: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    hidden_states: bool = False
    server_arguments: tuple[tuple[str, Any], ...] = ()
    probe: Probe | None = None
    gpus: int = 0

    @property
    def shares_gpus(self) -> bool:
        """Whether there are GPUs, and fewer than ranks."""
        return 0 < self.gpus < self.tp * self.pp


@dataclasses.dataclass(frozen=True)
class LayoutResult:
    """What the ranks answered. Indices: DP rank, then prompt.

    tokens: the tokens that were chosen (greedy) or forced, as many a prompt as asked for.
    logprobs: float32 [tokens, vocab] a prompt; row i is the distribution that token i was taken from.
    cached: how many tokens of a prompt were found in the prefix cache.
    probed: what each rank's probe returned, by rank; None without a probe.
    seconds: "start" (until the slowest rank has loaded the model), "run" and "total".
    """

    tokens: list[list[list[int]]]
    logprobs: list[list[np.ndarray]]
    cached: list[list[int]]
    probed: list[Any]
    seconds: dict[str, float]


class LayoutFailed(RuntimeError):
    """A rank failed, died or hung. The message holds the rank, its traceback and the end of its log."""


def run_layout(
    checkpoint: str | os.PathLike,
    *,
    prompts_by_dp_rank: Sequence[Sequence[Prompt]],
    tp: int = 1,
    dp: int = 1,
    ep: int = 1,
    pp: int = 1,
    dtype: str = "float32",
    device: str = "cpu",
    steps: int = 16,
    chunk: int = 16,
    arrivals: Sequence[Sequence[int]] | None = None,
    lengths: Sequence[Sequence[int]] | None = None,
    forced_tokens: Sequence[Sequence[Sequence[int]]] | None = None,
    hidden_states: bool = False,
    server_arguments: dict[str, Any] | None = None,
    probe: Probe | None = None,
    timeout_s: float = 300,
) -> LayoutResult:
    """Runs prompts through ``tp * pp`` ranks and returns tokens and log-probabilities.

    Args:
        checkpoint: folder of a checkpoint in the published format.
        prompts_by_dp_rank: token ids; one list of prompts for each of the ``dp`` DP ranks, empty for an idle one.
        steps: tokens to decode for each prompt; 0 loads the model and runs nothing.
        chunk: at most so many tokens of a prompt go through the model at once.
        arrivals: the turn in which each prompt arrives, indexed like the prompts; without it all arrive in turn 0.
        lengths: tokens to decode for each prompt, instead of ``steps`` for all.
        forced_tokens: indexed like the result's ``tokens``; fed back instead of the greedy ones.
        hidden_states: the forward passes return what the model's head, or EAGLE3, would take: for probes.
        server_arguments: further fields of the engine's ``ServerArgs``.
        probe: called in each rank with its ``ModelRunner`` once the model is loaded; what it returns is called
            after the last step, and its value comes back in ``probed``. On GPUs it must be importable.
        timeout_s: seconds until the run is given up.

    Raises:
        LayoutFailed: a rank failed, died or hung, or ranks that hold the same requests disagree.
        ValueError: the arguments contradict each other.
    """
    if len(prompts_by_dp_rank) != dp:
        raise ValueError(
            f"prompts for {len(prompts_by_dp_rank)} DP ranks were given and dp is {dp}: give one list each"
        )
    if tp % dp or tp % ep:
        raise ValueError(f"dp {dp} and ep {ep} must both divide tp {tp}")
    if not any(prompts_by_dp_rank):
        raise ValueError("every DP rank is idle: give at least one prompt")
    lengths = _each(prompts_by_dp_rank, lengths, steps, "lengths")
    layout = Layout(
        checkpoint=os.fspath(checkpoint),
        prompts_by_dp_rank=_frozen(prompts_by_dp_rank),
        tp=tp,
        dp=dp,
        ep=ep,
        pp=pp,
        dtype=dtype,
        device=device,
        steps=max(length for row in lengths for length in row),
        chunk=chunk,
        arrivals=_each(prompts_by_dp_rank, arrivals, 0, "arrivals"),
        lengths=lengths,
        forced_tokens=None if forced_tokens is None else _frozen(forced_tokens),
        hidden_states=hidden_states,
        server_arguments=tuple((server_arguments or {}).items()),
        probe=probe,
        gpus=count_gpus() if device == "cuda" else 0,
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="layout-") as logs:
        reports = _run_ranks(layout, Path(logs), timeout_s)
    first_of_dp_ranks = _first_of_dp_ranks(layout, reports)
    seconds = {part: max(report["seconds"][part] for report in reports) for part in ("start", "run")}
    seconds["total"] = time.monotonic() - started
    return LayoutResult(
        *([report[what] for report in first_of_dp_ranks] for what in ("tokens", "logprobs", "cached")),
        probed=[report["probed"] for report in reports],
        seconds=seconds,
    )


def count_gpus() -> int:
    """NVIDIA GPUs of this host, without a CUDA context in this process."""
    import torch

    return torch.cuda.device_count()


def _frozen(nested):
    return tuple(tuple(tuple(map(int, tokens)) for tokens in requests) for requests in nested)


def _each(prompts_by_dp_rank, values, default: int, what: str) -> tuple[tuple[int, ...], ...]:
    """One integer a prompt: ``values``, or ``default`` for all.

    Raises:
        ValueError: ``values`` has another shape than the prompts.
    """
    counts = [len(prompts) for prompts in prompts_by_dp_rank]
    if values is None:
        return tuple((default,) * count for count in counts)
    if [len(row) for row in values] != counts:
        raise ValueError(f"{what} {values} must have one number for each prompt: {counts} on the DP ranks")
    return tuple(tuple(map(int, row)) for row in values)


def _first_of_dp_ranks(layout: Layout, reports: list[dict]) -> list[dict]:
    """One report for each DP rank, from the last pipeline stage, after checking that those who must agree do."""
    attn_tp = layout.tp // layout.dp
    first_of_last_stage = len(reports) - layout.tp
    for rank, report in enumerate(reports):
        other = first_of_last_stage + rank % layout.tp // attn_tp * attn_tp
        if report["tokens"] != reports[other]["tokens"]:
            raise LayoutFailed(
                f"ranks {other} and {rank} hold the same requests and chose other tokens: "
                f"{reports[other]['tokens']} and {report['tokens']}"
            )
    return reports[first_of_last_stage::attn_tp]


# --- Processes: started, watched, ended ------------------------------------------------------------------


def _run_ranks(layout: Layout, logs: Path, timeout_s: float) -> list[dict]:
    import torch.distributed

    method = "fork" if layout.device == "cpu" else "spawn"
    if method == "fork":
        _import_engine()
    context = multiprocessing.get_context(method)
    ranks, connections, store = [], [], None
    try:
        for rank in range(layout.tp * layout.pp):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main, args=(layout, rank, logs / f"rank{rank}.log", theirs), daemon=True
            )
            process.start()
            theirs.close()  # so that our end sees the end of a rank that died
            ranks.append(process)
            connections.append(ours)
        # The store lives here and takes a port that the system gives it, so no other program can take it first.
        # It runs a thread, and a process with threads is not safe to fork: it starts last and ends with the run.
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for connection in connections:
            with contextlib.suppress(BrokenPipeError):  # a rank that is dead already is found by _collect
                connection.send(store.port)
        return _collect(ranks, connections, logs, timeout_s)
    finally:
        store = None
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()


def _collect(ranks, connections, logs: Path, timeout_s: float) -> list[dict]:
    """Each rank's report, in rank order. A rank that fails ends the wait, but for a moment in which the others may say
    how they ended: the one that failed first takes its peers along, and a peer's end can be seen before its own.
    """
    deadline = time.monotonic() + timeout_s
    reports: dict[int, dict] = {}
    while len(reports) < len(ranks):
        waiting = {connection: rank for rank, connection in enumerate(connections) if rank not in reports}
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = waiting[connection]
            reports[rank] = _report(connection, ranks[rank])
            if "failed_at" in reports[rank]:
                deadline = min(deadline, time.monotonic() + LAST_WORDS_S)
    failed = {rank: report for rank, report in reports.items() if "failed_at" in report}
    if failed:
        raise LayoutFailed(_describe_failures(failed, logs))
    unfinished = [rank for rank in range(len(ranks)) if rank not in reports]
    if unfinished:
        raise LayoutFailed(_describe_hang(ranks, unfinished, logs, timeout_s))
    return [reports[rank] for rank in range(len(ranks))]


def _report(connection, process) -> dict:
    """What a rank sent, or how it died without a word."""
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        return {"failed_at": time.monotonic(), "exit_code": process.exitcode}


def _describe_failures(failed: dict[int, dict], logs: Path) -> str:
    """Every rank that died, then the error that was raised first. Those after it are the peers', who lost a rank."""
    said = [
        f"rank {rank} died with exit code {report['exit_code']}\n{_log_end(logs, rank)}"
        for rank, report in sorted(failed.items())
        if "exit_code" in report
    ]
    errors = sorted((report["failed_at"], rank) for rank, report in failed.items() if "error" in report)
    for _, rank in errors[:1]:
        said.append(f"rank {rank} failed\n{failed[rank]['error']}\n{_log_end(logs, rank)}")
    if len(errors) > 1:
        said.append(f"after it failed: rank(s) {sorted(rank for _, rank in errors[1:])}")
    return "\n".join(said)


def _describe_hang(ranks, unfinished: list[int], logs: Path, timeout_s: float) -> str:
    """Which ranks have not answered, and where each stands: a hang shows in the ranks that stand elsewhere."""
    for rank in unfinished:
        if ranks[rank].is_alive():
            os.kill(ranks[rank].pid, signal.SIGUSR1)  # faulthandler writes the stack to the rank's log
    time.sleep(1)
    stacks = "\n".join(_stack(logs, rank) for rank in unfinished[:4])
    return f"rank(s) {unfinished} did not answer within {timeout_s:.0f} s\n{stacks}"


def _stack(logs: Path, rank: int, frames: int = 12) -> str:
    """The innermost frames of the rank's main thread, from what faulthandler wrote."""
    lines = _log_lines(logs, rank)
    start = max((i for i, line in enumerate(lines) if line.startswith("Current thread")), default=len(lines))
    return "\n".join([f"--- rank {rank} stands in", *(lines[start + 1 : start + 1 + frames] or ["(no stack)"])])


def _log_end(logs: Path, rank: int) -> str:
    return "\n".join([f"--- end of rank {rank}'s log", *_log_lines(logs, rank)[-15:]])


def _log_lines(logs: Path, rank: int) -> list[str]:
    path = logs / f"rank{rank}.log"
    text = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [line for line in text if not line.startswith("[Gloo]")]


def _rank_main(layout: Layout, rank: int, log: Path, connection) -> None:
    stream = open(log, "w", buffering=1)  # noqa: SIM115  stays open for as long as the process lives
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    faulthandler.enable(stream)
    faulthandler.register(signal.SIGUSR1, stream, all_threads=True)
    try:
        from layouts.batches import run_rank

        _prepare_process(layout, rank)
        os.environ["MASTER_PORT"] = str(connection.recv())
        report = run_rank(layout, rank)
        _release_shared_memory()
    except BaseException:
        report = {"failed_at": time.monotonic(), "error": traceback.format_exc()}
    connection.send(report)
    connection.close()
    stream.flush()
    os._exit(0)  # a rank has nothing to clean up that its peers, or an interpreter shutting down, could not hang


def _take_own_lock_of_progress_bars() -> None:
    """A rank that is killed while it draws one would keep the lock that it shares with the process it was forked from,
    which then waits for ever before its own next bar."""
    import tqdm

    lock, classes = threading.RLock(), [tqdm.tqdm]
    while classes:
        one = classes.pop()
        one.set_lock(lock)
        classes += one.__subclasses__()


def _prepare_process(layout: Layout, rank: int) -> None:
    import logging

    import torch

    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        TORCHELASTIC_USE_AGENT_STORE="True",
        SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE="env://",
    )
    if layout.device == "cpu":
        # OpenMP's threads do not survive a fork: a rank that asked for more than its own would wait for them.
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
        _take_own_lock_of_progress_bars()
    else:
        os.environ.update(BESIDE_OTHERS)
        if layout.shares_gpus:
            os.environ.update(shared_gpu_environment(rank, layout.gpus))
    logging.basicConfig(level=logging.INFO, force=True)
    from sglang.srt.utils import kill_itself_when_parent_died

    kill_itself_when_parent_died()


def _release_shared_memory() -> None:
    """The TP group broadcasts through a segment of /dev/shm, which outlives a process that does not let go of it."""
    from sglang.srt.distributed import get_tp_group

    get_tp_group().mq_broadcaster = None
    gc.collect()


def _import_engine() -> None:
    """Everything a rank uses, so that forked ranks share it."""
    importlib.import_module("layouts.batches")
    for module in ("model_executor.model_runner", "managers.scheduler_dp_attn_mixin", "models.registry"):
        importlib.import_module(f"sglang.srt.{module}")
