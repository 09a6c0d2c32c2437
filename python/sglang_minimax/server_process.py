"""Starts a command with all its processes in one session, follows its log, and ends every one of them.

The engine's server is a tree: a launcher, a scheduler a rank, a detokenizer, a data-parallel controller.
A new session holds them together whatever becomes of their parents, and nothing else is in it; so what is
ended here, by process id, is exactly what was started here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_GRACE_SECONDS = 10.0  # from SIGTERM to SIGKILL
_KILL_SECONDS = 10.0  # from SIGKILL to the end of a process, which a busy host takes a while to clear away
_POLL_SECONDS = 0.2


class ServerError(RuntimeError):
    """The server ended, did not come up in time, or answered with an error."""


class SessionProcess:
    """A command in a session of its own, its output in a log file. Use it as a context manager.

    Args:
        command: the program and its arguments.
        log: the file that takes standard output and standard error, written anew.
        environment: what to add to this process's environment.
        stdin: a file to read standard input from; without it there is none.
        stdout: a file for standard output alone, where it must not mix with the log.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        stdin: Path | None = None,
        stdout: Path | None = None,
    ) -> None:
        self.log = log
        with contextlib.ExitStack() as files:
            errors = files.enter_context(open(log, "wb"))
            self._process = subprocess.Popen(
                list(command),
                stdin=files.enter_context(open(stdin, "rb")) if stdin else subprocess.DEVNULL,
                stdout=files.enter_context(open(stdout, "wb")) if stdout else errors,
                stderr=errors,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        self._lines_read_to = 0

    def __enter__(self) -> SessionProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the command, and of its session."""
        return self._process.pid

    def has_ended(self) -> bool:
        """Whether the command itself has ended. Its id stays taken until :meth:`stop`, so none can be mixed up."""
        if self._process.returncode is not None:
            return True
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # stop() has just reaped it, in another thread
            return True

    def wait(self, timeout_seconds: float) -> int:
        """The exit code of the command, once it has ended and the rest of its session was stopped.

        Raises:
            ServerError: it has not ended in time.
        """
        deadline = time.monotonic() + timeout_seconds
        while not self.has_ended():
            if time.monotonic() > deadline:
                raise ServerError(f"no end after {timeout_seconds:.0f} s; its log is {self.log}")
            time.sleep(_POLL_SECONDS)
        self.stop()
        return self._process.wait()

    def new_lines(self) -> Iterator[str]:
        """The whole lines that the log gained since the last call."""
        with open(self.log, "rb") as stream:
            stream.seek(self._lines_read_to)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                self._lines_read_to += len(line)
                yield line.decode("utf-8", errors="replace").rstrip()

    def members(self) -> list[psutil.Process]:
        """Every process of the session that is alive."""
        if self._process.returncode is not None:
            return []  # reaped by stop(), which leaves none behind; the id may be another's by now
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
                if os.getsid(process.pid) == self._process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ask_to_end(self) -> None:
        """Sends SIGTERM to the command, from whichever thread, and leaves the rest to :meth:`stop` in its own."""
        if not self.has_ended():
            os.kill(self._process.pid, signal.SIGTERM)

    def stop(self) -> None:
        """Ends every process of the session: SIGTERM to the command, SIGKILL to what is left after 10 s.

        Raises:
            RuntimeError: a process outlived SIGKILL; the message has its id and name.
        """
        if self._process.returncode is not None:
            return
        self.ask_to_end()
        _wait_until(lambda: self.has_ended() and not self.members(), _GRACE_SECONDS)
        for process in self.members():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if not _wait_until(lambda: self.has_ended() and not self.members(), _KILL_SECONDS):
            left = ", ".join(f"{process.pid} ({process.name()})" for process in self.members())
            raise RuntimeError(f"these processes outlived SIGKILL: {left}")
        self._process.wait()


def _wait_until(holds: Callable[[], bool], timeout_seconds: float) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


# ---------------------------------------------------------------------------------- the engine's server

# A scheduler writes "[2026-01-31 12:00:00 DP0 TP3 EP1] message", at times behind another's unfinished line.
_RANK_LINE = re.compile(r"\[\d{4}-\d\d-\d\d [\d:.]+(?: DP\d+)?(?: TP(?P<tp>\d+))?(?: EP\d+)?\] (?P<message>.*)")
_STAGES = {
    "Init torch distributed begin": "started",
    "Load weight begin": "connected",
    "Load weight end": "loaded",
}


@dataclass(frozen=True)
class RankProgress:
    """A rank reached a stage (``started``, ``connected`` or ``loaded``); ``reached`` ranks have by now."""

    tp_rank: int
    stage: str
    reached: int


class StartProgress:
    """Reads from the server's log how far each rank is."""

    def __init__(self) -> None:
        self._reached: dict[str, set[int]] = {stage: set() for stage in _STAGES.values()}

    def read(self, line: str) -> RankProgress | None:
        """What the line tells, if it tells anything new."""
        match = _RANK_LINE.search(line)
        if match is None:
            return None
        tp_rank = int(match["tp"] or 0)  # a single rank does not name itself
        for beginning, stage in _STAGES.items():
            if match["message"].startswith(beginning) and tp_rank not in self._reached[stage]:
                self._reached[stage].add(tp_rank)
                return RankProgress(tp_rank, stage, len(self._reached[stage]))
        return None


class Server(SessionProcess):
    """The engine's HTTP server on this host's loopback interface."""

    def __init__(self, command: Sequence[str], log: Path, *, port: int, **kwargs: Any) -> None:
        # The engine asks itself through HTTP while it warms up, and a proxy would be in the way.
        environment = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
        super().__init__(command, log, environment=environment, **kwargs)
        self._url = f"http://127.0.0.1:{port}"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def wait_until_ready(self, timeout_seconds: float, on_progress: Callable[[RankProgress], None]) -> None:
        """Returns once the server answers; calls ``on_progress`` for each rank and stage on the way.

        Raises:
            ServerError: it ended or did not answer in time; the message ends with the log's last lines.
        """
        deadline, progress = time.monotonic() + timeout_seconds, StartProgress()
        while True:
            for line in self.new_lines():
                if reached := progress.read(line):
                    on_progress(reached)
            if self._is_healthy():
                return
            if self.has_ended():
                raise ServerError(f"the server ended while it started:\n{self.end_of_log()}")
            if time.monotonic() > deadline:
                raise ServerError(f"no server after {timeout_seconds:.0f} s:\n{self.end_of_log()}")
            time.sleep(_POLL_SECONDS)

    def post(self, path: str, body: dict[str, Any], *, timeout_seconds: float) -> Any:
        """The JSON that the server replies to ``body``.

        Raises:
            ServerError: it replied with an error, or not in time, or it is no more.
        """
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return json.loads(self._reply(request, path, timeout_seconds))

    def get(self, path: str, *, timeout_seconds: float = 60) -> str:
        """The text that the server replies to a request without a body.

        Raises:
            ServerError: as :meth:`post`.
        """
        return self._reply(urllib.request.Request(self._url + path), path, timeout_seconds).decode()

    def _reply(self, request: urllib.request.Request, path: str, timeout_seconds: float) -> bytes:
        try:
            with self._opener.open(request, timeout=timeout_seconds) as reply:
                content: bytes = reply.read()
                return content
        except urllib.error.HTTPError as error:
            raise ServerError(f"{path} answered {error.code}: {error.read().decode()[:2000]}") from error
        except OSError as error:
            raise ServerError(f"{path} gave no answer ({error}):\n{self.end_of_log()}") from error

    def end_of_log(self, lines: int = 40) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def _is_healthy(self) -> bool:
        try:
            with self._opener.open(self._url + "/health", timeout=5) as reply:
                return int(reply.status) == 200
        except OSError:  # not listening yet, or still warming up (503)
            return False


# ---------------------------------------------------------------------------------------------- signals


class Interrupted(BaseException):
    """A signal asked this process to end. Not an ``Exception``: nothing but a clean-up should catch it."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"ended by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class Interrupts:
    """Turns Ctrl-C, SIGTERM and SIGHUP into :class:`Interrupted`, except where that would leave work half done.

    Use it as a context manager in the main thread, and :meth:`deferred` around a start or a clean-up: a
    signal that comes meanwhile is raised at its end.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._depth = 0
        self._pending: int | None = None

    def __enter__(self) -> Interrupts:
        self._before = {signum: signal.signal(signum, self._handle) for signum in self._SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            pending = self._pending
            if pending is not None and self._depth == 0:
                self._pending = None
                raise Interrupted(pending)

    def _handle(self, signum: int, _frame: object) -> None:
        if self._depth:
            self._pending = signum
        else:
            raise Interrupted(signum)
