"""What a benchmark writes: JSON with the host, its clocks, every contestant's versions and all numbers.

A host is named by a hash of its name and its GPUs' UUIDs, which says "same" or "another" and nothing else.
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import json
import os
import platform
import re
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = 3

_FACTS = ("uuid", "name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.memory", "power.limit")
_CLOCKS = ("clocks.sm", "clocks.mem", "temperature.gpu")


class CannotBench(Exception):
    """A benchmark cannot run, or records cannot be compared; the message says why and what to do instead."""


class Shape(NamedTuple):
    """What one batch of whole steps is: how many sequences, and how many tokens each has before the first step."""

    batch_size: int
    input_len: int

    def __str__(self) -> str:
        """The batch's name in a record."""
        return f"{self.batch_size} x {self.input_len}"


# ------------------------------------------------------------------------------------------------- host


def host_facts() -> dict[str, Any]:
    """This host: ``identity`` (16 hex digits), ``gpus`` (one dict each), ``cpu``, ``cores``."""
    gpus = query_gpus(_FACTS)
    names = [socket.gethostname(), *sorted(gpu.pop("uuid") for gpu in gpus)]
    return {
        "identity": hashlib.sha256("\n".join(names).encode()).hexdigest()[:16],
        "gpus": gpus,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
    }


def clocks() -> list[dict[str, str]]:
    """SM and memory clock in MHz and temperature in degrees Celsius, one dict a GPU; empty without GPUs."""
    return query_gpus(_CLOCKS)


def query_gpus(fields: Sequence[str]) -> list[dict[str, str]]:
    """What nvidia-smi says of each GPU, as text without units; empty where there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    rows = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


def describe_host(host: dict[str, Any]) -> str:
    """One line: GPUs and driver, or the processor."""
    gpus = host["gpus"]
    if not gpus:
        return f"{host['cpu']}, {host['cores']} cores, no GPU"
    names = ", ".join(sorted({gpu["name"] for gpu in gpus}))
    return f"{len(gpus)} x {names}, driver {gpus[0]['driver_version']}"


def describe_clocks(samples: Sequence[list[dict[str, str]]]) -> str:
    """The range of SM and memory clocks in several samples of :func:`clocks`."""

    def span(field: str) -> str:
        found = [int(gpu[field]) for sample in samples for gpu in sample if gpu[field].isdigit()]
        return f"{min(found)} to {max(found)}" if found else "unknown"

    if not any(samples):
        return "no GPU clocks"
    return f"SM clock {span('clocks.sm')} MHz, memory clock {span('clocks.mem')} MHz"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


# ----------------------------------------------------------------------------------------------- record


def new(kind: str, **facts: Any) -> dict[str, Any]:
    """An empty record of ``kind`` "model" or "operator", made on this host now (UTC)."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"format": FORMAT, "kind": kind, "time": now, "host": host_facts(), **facts}


def write(record: dict[str, Any], path: Path) -> None:
    """Writes atomically, so that a reader and a benchmark that goes on never meet half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    """A record from a file.

    Raises:
        CannotBench: no such file, no JSON, or not a record of this format.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CannotBench(f"{path} cannot be read as a record of this benchmark: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise CannotBench(
            f"{path} is no record of format {FORMAT}; write one with `sglang-minimax bench ... --json {path.name}`"
        )
    return found


def check_comparable(records: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Records may stand side by side if host, model, lengths, rounds and requests of a batch are the same.

    Raises:
        CannotBench: they differ; the message has both values.
    """
    sizes = {
        _dp_ranks(facts.get("command") or ""): f"{contestant} of {name}"
        for record, name in zip(records, names, strict=True)
        for contestant, facts in record.get("contestants", {}).items()
    }
    if len(records) > 1 and len(sizes) > 1:
        which = ", ".join(f"{who}: {ranks}" for ranks, who in sizes.items())
        raise CannotBench(
            f"a batch is for each DP rank under DP attention, and these have different numbers of them ({which}): the "
            f"same batch size is another number of requests. Show each by itself"
        )
    first = records[0]
    for record, name in zip(records[1:], names[1:], strict=True):
        ours, theirs = first["host"], record["host"]
        if ours["identity"] != theirs["identity"]:
            raise CannotBench(
                f"{names[0]} is of host {ours['identity']} ({describe_host(ours)}) and {name} of host "
                f"{theirs['identity']} ({describe_host(theirs)}): times of different hosts cannot be compared. Measure "
                f"all of it in one go with --compare, or show each file by itself"
            )
        for field in ("kind", "model", "op", "input_lens", "output_len", "rounds", "device"):
            if first.get(field) != record.get(field):
                raise CannotBench(
                    f"{field} is {first.get(field)!r} in {names[0]} and {record.get(field)!r} in {name}: these are not "
                    f"times of the same work. Measure again with the same {field}, or show each file by itself"
                )


def _dp_ranks(command: str) -> int:
    """Among how many DP ranks a command's server divides its requests; each of them gets the whole batch."""
    given = re.search(r"--(?:dp|dp-size|data-parallel-size)[ =](\d+)", command)
    return int(given[1]) if given and "--enable-dp-attention" in command else 1
