"""One operator: the scripts of ``benchmark/`` in a checkout, run as they are, with host and clocks beside the numbers.

The scripts are no part of the wheel: they compare with what only a developer has, and say their own protocol.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_minimax.bench import contestants, record
from sglang_minimax.bench.contestants import OURS, STOCK, Contestant
from sglang_minimax.bench.record import CannotBench

SCRIPTS = {
    "qk-norm": "qk_norm_rope.py",
    "all-reduce-norm": "all_reduce_norm.py",
    "router": "router.py",
    "experts": "experts_profile.py",
    "expert-sum": "expert_sum.py",
    "fp8-linear": "fp8_linear.py",
    "fp8-quantise": "fp8_quantise.py",
}
_COMPARES = {"qk-norm": (STOCK, "peer")}  # the others hold the engine's way and ours in one process


def find_script(op: str) -> Path:
    """The script of an operator: of the checkout that this package lies in, or of the working directory.

    Raises:
        CannotBench: neither is a checkout.
    """
    checkouts = [Path(__file__).parents[3], Path.cwd()]
    for checkout in checkouts:
        if (script := checkout / "benchmark" / SCRIPTS[op]).is_file():
            return script
    raise CannotBench(
        f"--op {op} runs benchmark/{SCRIPTS[op]} of a checkout, which is not in the wheel: get the repository and run "
        f"this in its root. --model needs no checkout"
    )


def command(op: str, script: Path, everyone: Sequence[Contestant], out: Path) -> list[str]:
    """The script's command, with the engines to compare as the script takes them.

    Raises:
        CannotBench: an engine that this operator's script does not know, or one that is no PYTHONPATH.
    """
    words = [sys.executable, str(script)]
    known = _COMPARES.get(op, ())
    for contestant in (one for one in everyone if one.name != OURS):
        if contestant.name not in known:
            can = f"only with {' and '.join(known)}" if known else "with nothing: its script has the engine's way in it"
            raise CannotBench(f"--compare {contestant.name}: --op {op} compares {can}")
        if contestant.python != sys.executable:
            raise CannotBench(
                f"--compare {contestant.name}: --op {op} takes FOLDER[:FOLDER...] for PYTHONPATH, no VENV"
            )
        path = contestant.path if contestant.path is not None else os.pathsep.join(filter(None, sys.path))
        words += [f"--{contestant.name}", path]
    return [*words, *everyone[0].flags, "--json", str(out)]


def measure(
    op: str, everyone: Sequence[Contestant], logs: Path, folder: Path, timeout_seconds: float
) -> dict[str, Any]:
    """Runs the script and returns its record: ``results`` is the script's JSON, ``table`` what it printed.

    Raises:
        CannotBench: no checkout, no engine, or the script failed or took too long.
    """
    from sglang_minimax.bench.model_steps import StepLog
    from sglang_minimax.server_process import ServerError, SessionProcess

    out = folder / "result.json"
    words = command(op, find_script(op), everyone, out)
    ours, inside = contestants.inspect(everyone[0], folder / "hook")
    named = shlex.join(["python", f"benchmark/{SCRIPTS[op]}", *ours.flags])
    found = record.new("operator", op=op, command=named, versions=inside["versions"], clocks_before=record.clocks())
    log, printed = logs / f"{op}.log", logs / f"{op}.txt"
    started = time.monotonic()
    with SessionProcess(words, log, environment=ours.environment(), stdout=printed) as process:
        try:
            exit_code = process.wait(timeout_seconds)
        except ServerError as error:
            raise CannotBench(f"--op {op}: {error}; more time is --timeout SECONDS") from error
    found["clocks_after"] = record.clocks()
    if exit_code != 0 or not out.exists():
        reader = StepLog()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            reader.read(line)
        raise CannotBench(f"--op {op} ended with {exit_code}: {reader.error()}; its log is {log}")
    table = printed.read_text(encoding="utf-8", errors="replace").splitlines()
    seconds = round(time.monotonic() - started, 1)
    return {**found, "seconds": seconds, "table": table, "results": json.loads(out.read_text(encoding="utf-8"))}


def render(found: dict[str, Any], label: str) -> list[str]:
    """Lines: host, clocks and versions, then what the script printed."""
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    clocks = record.describe_clocks([found["clocks_before"], found["clocks_after"]])
    return [
        f"{label + ': ' if label else ''}--op {found['op']}: {found['command']}",
        f"{record.describe_host(found['host'])}; host {found['host']['identity']}; {found['time']}",
        f"{versions}; {clocks}",
        *found["table"],
    ]
