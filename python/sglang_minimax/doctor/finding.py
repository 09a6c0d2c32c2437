"""What a check says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "not applicable", "warning", "error"]

# What does not apply is no fault: a host without a GPU is used as it is, so it must be able to end with 0.
EXIT_CODES: dict[Status, int] = {"ok": 0, "not applicable": 0, "warning": 1, "error": 2}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    name: what was looked at.
    status: "warning" is what serves but slower, or not in every layout; "error" is what does not serve, or wrongly.
    what: what was found, as a clause, values first.
    mend: a command that mends it, or the next one to run where no single command does; None where nothing is to mend.
    """

    name: str
    status: Status
    what: str
    mend: str | None = None


def worst(findings: Iterable[Finding]) -> Status:
    """The status that decides the exit code."""
    return max((finding.status for finding in findings), key=lambda status: EXIT_CODES[status], default="ok")
