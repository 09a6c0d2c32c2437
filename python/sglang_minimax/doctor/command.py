"""``sglang-minimax doctor``: the command line and the screen."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from sglang_minimax.doctor import facts as gathered
from sglang_minimax.doctor import self_check
from sglang_minimax.doctor.checks import all_checks
from sglang_minimax.doctor.finding import EXIT_CODES, Finding, worst

SUMMARY = "checks whether this environment can serve: engine, overlay, driver, GPUs, libraries, QK norm on every GPU"

_EPILOG = """One line a check: ok, warning, error or not applicable, and the command that mends it.

exit code, by the worst line: 0 ok, 1 a warning, 2 an error (or flags that cannot be read). What is not applicable does
not count: a host without a GPU serves from CPU ranks, for tests.

QK norm is run on every GPU, one process each, over NCCL; without a GPU on two CPU ranks over gloo. It is compared with
plain torch in float64. Tolerance: half a unit in the last place of the dtype, and 64 roundings of float32.

examples:
  sglang-minimax doctor
  sglang-minimax doctor --port 8000 --json
"""

_COLOURS = {"ok": "green", "not applicable": "dim", "warning": "yellow", "error": "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("--port", type=int, default=30000, help="the server's --port (default: 30000, the engine's)")
    parser.add_argument(
        "--timeout", type=_seconds, default=300.0, metavar="SECONDS",
        help="time for each child process: those that look at the host, and the ranks (default: 300)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="for programs: findings, every rank's errors, all facts")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 86400:
        raise argparse.ArgumentTypeError(f"{text} s: give more than 0 and less than a day")
    return seconds


def run(arguments: argparse.Namespace) -> int:
    """Looks, checks, prints, and returns the exit code."""
    with _ended_children():
        facts = gathered.gather(arguments.port, arguments.timeout)
        checked = self_check.run(facts, arguments.timeout)
    findings = [*all_checks(facts), *checked.findings]
    exit_code = EXIT_CODES[worst(findings)]
    if arguments.json:
        print(json.dumps(as_data(findings, checked, facts), indent=2))
    else:
        show(findings, exit_code)
    return exit_code


def as_data(findings: Sequence[Finding], checked: self_check.SelfCheck, facts: gathered.Facts) -> dict[str, Any]:
    """For JSON: the lines, what each rank answered, and what they follow from."""
    status = worst(findings)
    return {
        "status": status,
        "exit_code": EXIT_CODES[status],
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "ranks": [rank.as_data() for rank in checked.ranks],
        "facts": dataclasses.asdict(facts),
    }


def show(findings: Sequence[Finding], exit_code: int) -> None:
    """One line a check; a terminal wraps it, a file gets it whole."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    names = max(len(finding.name) for finding in findings)
    for finding in findings:
        status = f"[{_COLOURS[finding.status]}]{finding.status:<14}[/]"
        mend = f"  [bold]->[/] {escape(finding.mend)}" if finding.mend else ""
        console.print(f"{status}  {finding.name:<{names}}  {escape(finding.what)}{mend}", soft_wrap=True)
    console.print(f"\n{worst(findings)}, exit code {exit_code}")


@contextlib.contextmanager
def _ended_children() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP raise, so that the children are ended on the way out, as Ctrl-C does by itself."""

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
