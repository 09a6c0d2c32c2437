"""Runs the matrix, prints its table, and writes the table into docs/proof.md. Started by ``matrix.py``."""

from __future__ import annotations

import argparse
import os
import platform
import re
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from layouts.harness import LayoutFailed
from layouts.matrix import CPU, GPUS, ROWS, TOLERANCE, Device, Oracles, Outcome, run_row

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "proof.md"
BEGIN, END = "<!-- matrix: written by the command below -->", "<!-- end of matrix -->"
COMMAND = "python test/layouts/matrix.py --write"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 if any row is not as it should be."""
    parser = argparse.ArgumentParser(prog="python test/layouts/matrix.py", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="PART", help="rows whose names contain one of these")
    parser.add_argument("--write", action="store_true", help="write docs/proof.md; all rows must hold")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the ranks run (default: cpu)")
    options = parser.parse_args(arguments)
    if options.write and (options.only or options.device != "cpu"):
        parser.error("--write needs all rows on the CPU: leave --only and --device out")
    names = [name for name in ROWS if not options.only or any(part in name for part in options.only)]
    device = {one.name: one for one in (CPU, GPUS)}[options.device]
    if device is GPUS:
        gpus = count_gpus()
        names = [name for name in names if ROWS[name].simulation is None and ROWS[name].ranks <= gpus]
        if not names:
            parser.error(f"none of these rows can run on {gpus} GPUs: one a rank, and nothing simulated")
    started = time.monotonic()
    outcomes = {}
    for name, outcome in run_rows(names, device):
        outcomes[name] = outcome
        print(line(name, outcome), *(f"    {fault}" for fault in outcome.faults), sep="\n", flush=True)
    seconds = time.monotonic() - started
    wrong = [name for name, outcome in outcomes.items() if outcome.faults]
    print(f"{len(outcomes) - len(wrong)} of {len(outcomes)} rows hold; {seconds:.0f} s, the reference included")
    if options.write and not wrong:
        write(DOCUMENT, table(outcomes, seconds))
        print(f"wrote {DOCUMENT}")
    return 1 if wrong else 0


def count_gpus() -> int:
    """NVIDIA GPUs of this host, without a CUDA context in this process."""
    import torch

    return torch.cuda.device_count()


def run_rows(names: list[str], device: Device) -> Iterator[tuple[str, Outcome]]:
    with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
        oracles = Oracles(Path(folder), device)
        for name in names:
            oracles.of(ROWS[name].shape)  # so that a row's seconds are its own
            try:
                yield name, run_row(ROWS[name], oracles)
            except LayoutFailed as failure:
                yield name, Outcome(float("nan"), 0, float("nan"), str(failure).splitlines()[:40])


def line(name: str, outcome: Outcome) -> str:
    held = f"{outcome.largest_difference:.1e}" if not outcome.faults else "WRONG"
    return f"{name:24} {ROWS[name].layout:16} {ROWS[name].ranks:3} ranks {held:>8} {outcome.seconds:6.1f} s"


def table(outcomes: dict[str, Outcome], seconds: float) -> str:
    compared = sum(outcome.compared for outcome in outcomes.values())
    lines = [
        BEGIN,
        "",
        f"`{COMMAND}` on {hardware()}: {len(outcomes)} rows in {seconds:.0f} s, the reference included. "
        f"{compared:,} log-probabilities were compared; the largest difference allowed is {TOLERANCE:g}.",
        "",
        "| row | layout | model, and what happens | ranks | largest difference | seconds | evidence |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for name, outcome in outcomes.items():
        row = ROWS[name]
        lines.append(
            f"| {name} | {row.layout} | {row.shape}; {row.what} | {row.ranks} | {outcome.largest_difference:.1e} "
            f"| {outcome.seconds:.1f} | {row.evidence} |"
        )
    return "\n".join([*lines, "", END])


def hardware() -> str:
    """Processor, cores, memory and versions, as this process has them."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in ("sglang", "torch", "transformers"))
    return (
        f"{len(os.sched_getaffinity(0))} cores of {model[1] if model else platform.processor()}, {memory:.0f} GiB; "
        f"Python {platform.python_version()}, {versions}"
    )


def write(document: Path, matrix: str) -> None:
    """Puts ``matrix`` between its two marks in ``document`` and leaves the rest as it is.

    Raises:
        ValueError: the document lacks the marks.
    """
    text = document.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, behind = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{document} needs the lines {BEGIN!r} and {END!r}: the table goes between them")
    document.write_text(before + matrix + behind, encoding="utf-8")
