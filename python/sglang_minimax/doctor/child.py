"""Child processes with a time limit, ended by their ids.

:mod:`sglang_minimax.server_process` does more, and needs psutil, which comes with the engine: this must work where
the engine is missing.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

GRACE_SECONDS = 5.0  # for the others, once one has failed: they may be failing too, and have the better message
_POLL_SECONDS = 0.05
_ERROR = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception)\b.*)")  # the last line of a traceback


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    exit_code: negative for a signal, None where its time was up and it was ended from here.
    """

    exit_code: int | None
    stdout: str
    stderr: str

    @property
    def failure(self) -> str | None:
        """Why there is no answer, as a clause with the error that the child wrote last; None where it ended well."""
        if self.exit_code == 0:
            return None
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        errors = [match[1] for match in map(_ERROR.search, lines) if match]  # libraries go on talking after them
        said = errors or lines
        last = f": {said[-1][:300]}" if said else ""
        if self.exit_code is None:
            return f"it did not end in time{last}"
        if self.exit_code < 0:
            return f"it was ended by {_signal_name(-self.exit_code)}{last}"
        return f"it ended with exit code {self.exit_code}{last}"


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs ``module`` as the server would be run: ``python -m``, the same interpreter."""
    return [sys.executable, "-m", module, *arguments]


def run_together(
    commands: Sequence[Sequence[str]],
    timeout_seconds: float,
    environment: Mapping[str, str] | None = None,
    *,
    end_all_if_one_fails: bool = False,
) -> list[Ended]:
    """Runs commands side by side and returns how each ended, in their order; none is left running.

    Args:
        environment: what to add to this process's environment.
        end_all_if_one_fails: for ranks, which would wait for the one that is gone until their time is up.
    """
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(_started(command, environment)) for command in commands]
        deadline = time.monotonic() + timeout_seconds
        while not all(child.has_ended() for child in children) and time.monotonic() < deadline:
            if end_all_if_one_fails and any(child.has_failed() for child in children):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                end_all_if_one_fails = False
            time.sleep(_POLL_SECONDS)
        return [child.end() for child in children]


@contextlib.contextmanager
def _started(command: Sequence[str], environment: Mapping[str, str] | None) -> Iterator[_Child]:
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        child = _Child(command, environment, stdout, stderr)
        try:
            yield child
        finally:
            child.end()


class _Child:
    """One command in a session of its own, so that what it starts ends with it."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None, stdout: BinaryIO, stderr: BinaryIO
    ) -> None:
        self._stdout, self._stderr = stdout, stderr
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        self._ended: Ended | None = None

    def has_ended(self) -> bool:
        return self._state() is not None

    def has_failed(self) -> bool:
        state = self._state()
        return state is not None and (state.si_code != os.CLD_EXITED or state.si_status != 0)

    def end(self) -> Ended:
        """Ends the whole session and says how the command ended; a second call says the same."""
        if self._ended is None:
            in_time = self.has_ended()
            # The command is reaped only below, so until then its id is nobody else's.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            exit_code = self._process.wait()
            self._ended = Ended(exit_code if in_time else None, _text(self._stdout), _text(self._stderr))
        return self._ended

    def _state(self) -> os.waitid_result | None:
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def _text(stream: BinaryIO) -> str:
    stream.seek(0)
    return stream.read().decode("utf-8", errors="replace")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
