"""Who is measured: the environment of each engine, and the variables and flags that it alone gets."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sglang_minimax.bench.record import CannotBench

OURS, STOCK = "ours", "stock"

_PROBE = Path(__file__).with_name("probe.py")
_HOOK = "import sglang_minimax.overlay\n\nsglang_minimax.overlay.install()\n"
_NAME = r"\w[\w.-]*"


@dataclass(frozen=True)
class Contestant:
    """One engine in its own environment.

    python: its interpreter.
    path: what PYTHONPATH is for it; None leaves this process's.
    overlay: whether sglang-minimax is laid over its engine.
    variables: what else is set in its environment.
    flags: engine flags that it gets behind everybody's.
    """

    name: str
    python: str = sys.executable
    path: str | None = None
    overlay: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        """What is added to this process's environment for its processes."""
        added = {"PYTHONUNBUFFERED": "1", "SGLANG_MINIMAX_OVERLAY": "1" if self.overlay else "0"}
        if self.path is not None:
            added["PYTHONPATH"] = self.path
        return {**added, **self.variables}


def parse(compare: str | None, variables: Sequence[str], flags: Sequence[str]) -> list[Contestant]:
    """Ours and those of ``--compare``, with ``--env`` and ``--extra`` given to those that they are for.

    Args:
        compare: names after commas: ``stock``, or ``NAME=ENVIRONMENT`` where the environment is a virtual environment's
            folder or the entries of PYTHONPATH.
        variables: ``VARIABLE=VALUE`` for all, ``NAME:VARIABLE=VALUE`` for one.
        flags: ``"--flag value ..."`` for all, ``"NAME:--flag value ..."`` for one.

    Raises:
        CannotBench: a name without an environment, a folder that is not there, or a word of another form.
    """
    found = {OURS: Contestant(OURS, overlay=True)}
    for item in filter(None, (compare or "").split(",")):
        name, given, where = item.partition("=")
        if not re.fullmatch(_NAME, name):
            raise CannotBench(f"--compare {item}: {name!r} is no name; use letters, digits, dots and hyphens")
        if name == OURS:
            if given:
                raise CannotBench(f"--compare {item}: ours is this environment; give the other one another name")
            continue
        if not given and name != STOCK:
            raise CannotBench(
                f"--compare {name} needs an environment: {name}=VENV, a virtual environment's folder, or "
                f"{name}=FOLDER[:FOLDER...], the entries of PYTHONPATH. Only stock is known without one"
            )
        python, path = _environment(item, where) if given else (sys.executable, None)
        found[name] = Contestant(name, python, path)
    return [_with_its_own(contestant, list(found), variables, flags) for contestant in found.values()]


def _environment(item: str, where: str) -> tuple[str, str]:
    """(interpreter, PYTHONPATH): of a virtual environment, or this interpreter with other folders."""
    folders = [Path(folder).expanduser().resolve() for folder in where.split(os.pathsep) if folder]
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing or not folders:
        raise CannotBench(f"--compare {item}: {', '.join(missing) or 'nothing'} is not a folder of this host")
    interpreter = folders[0] / "bin" / "python"
    if len(folders) == 1 and interpreter.exists():
        return str(interpreter), ""
    return sys.executable, os.pathsep.join(map(str, folders))


def _with_its_own(
    contestant: Contestant, names: Sequence[str], variables: Sequence[str], flags: Sequence[str]
) -> Contestant:
    own_variables: dict[str, str] = {}
    own_flags: list[str] = []
    for text in variables:
        match = re.fullmatch(rf"(?:(?P<who>{_NAME}):)?(?P<name>[A-Za-z_]\w*)=(?P<value>.*)", text, re.S)
        if match is None:
            raise CannotBench(f"--env {text} must be VARIABLE=VALUE, or NAME:VARIABLE=VALUE for one contestant")
        if _is_for(match["who"], contestant.name, names, f"--env {text}"):
            own_variables[match["name"]] = match["value"]
    for text in flags:
        match = re.fullmatch(rf"(?:(?P<who>{_NAME}):)?(?P<flags>\s*-.*)", text, re.S)
        if match is None:
            raise CannotBench(f'--extra "{text}" must be "--flag value ...", or "NAME:--flag ..." for one contestant')
        if _is_for(match["who"], contestant.name, names, f'--extra "{text}"'):
            own_flags += shlex.split(match["flags"])
    return replace(contestant, variables=own_variables, flags=tuple(own_flags))


def _is_for(who: str | None, name: str, names: Sequence[str], option: str) -> bool:
    if who is not None and who not in names:
        raise CannotBench(f"{option}: {who} is not measured here, only {', '.join(names)}; add it to --compare")
    return who in (None, name)


def inspect(contestant: Contestant, folder: Path) -> tuple[Contestant, dict[str, Any]]:
    """What is in its environment, and the contestant with the overlay switched on if it must be and is not.

    The wheel's start-up line does that; a checkout on PYTHONPATH has none, and gets one in ``folder``.

    Returns:
        The contestant to run, and ``versions`` (python, torch, triton, sglang) and ``overlay`` of its environment.

    Raises:
        CannotBench: no engine, or ours without the overlay.
    """
    found = _probe(contestant)
    if contestant.overlay and not found["overlay"]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sitecustomize.py").write_text(_HOOK, encoding="utf-8")
        before = contestant.path if contestant.path is not None else os.environ.get("PYTHONPATH", "")
        # The folder that holds this package, which may be known to this process only through its working directory.
        entries = [str(folder), *filter(None, before.split(os.pathsep)), str(Path(__file__).parents[2])]
        path = os.pathsep.join(dict.fromkeys(entries))
        contestant = replace(contestant, path=path)
        found = _probe(contestant)
    version = found["versions"]["sglang"]
    if version is None:
        raise CannotBench("no engine: `import sglang` finds nothing in this environment")
    if contestant.overlay and not found["overlay"]:
        raise CannotBench(
            f"the overlay is not laid over this environment's sglang {version}: see sglang-minimax doctor"
        )
    return contestant, found


def _probe(contestant: Contestant) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [contestant.python, str(_PROBE)],
            env={**os.environ, **contestant.environment()},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBench(f"its Python does not start: {error}") from error
    if done.returncode != 0:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise CannotBench(f"its Python does not start: {last}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
