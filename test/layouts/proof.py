"""Runs the matrix, prints its table, and writes the table into docs/proof.md. Started by ``matrix.py``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from layouts.harness import LayoutFailed, count_gpus
from layouts.matrix import CPU, GPUS, ROWS, SHARE, TOLERANCE, Device, Oracles, Outcome, run_row

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "proof.md"
COMMAND = "python test/layouts/matrix.py --write"


@dataclass(frozen=True)
class Marks:
    """The lines of the document between which a device's table lies."""

    begin: str
    end: str


MARKS = {
    CPU.name: Marks("<!-- matrix: written by the command below -->", "<!-- end of matrix -->"),
    GPUS.name: Marks("<!-- matrix on GPUs: written by the command below -->", "<!-- end of matrix on GPUs -->"),
}


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 if any row is not as it should be."""
    parser = argparse.ArgumentParser(prog="python test/layouts/matrix.py", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="PART", help="rows whose names contain one of these")
    parser.add_argument("--write", action="store_true", help="write docs/proof.md; all rows must hold")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the ranks run (default: cpu)")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="rows that run at a time, on GPUs only")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="add each row that holds to FILE, and run none of it")
    options = parser.parse_args(arguments)
    if options.write and options.only:
        parser.error("--write needs all rows: leave --only out")
    if options.at_once < 1 or (options.at_once > 1 and options.device == "cpu"):
        # Ranks on a CPU are forked, which a process with threads cannot do safely.
        parser.error(f"--at-once {options.at_once} must be 1 on the CPU and at least 1 on GPUs")
    names = [name for name in ROWS if not options.only or any(part in name for part in options.only)]
    device = {one.name: one for one in (CPU, GPUS)}[options.device]
    if device is GPUS:
        names = [name for name in names if ROWS[name].simulation is None]
        if not names or not count_gpus():
            parser.error(f"none of these rows can run on {count_gpus()} GPUs, where nothing is simulated")
    started = time.monotonic()
    outcomes = read_kept(options.keep)
    kept = len(outcomes)
    for name, outcome in run_rows([name for name in names if name not in outcomes], device, options.at_once):
        outcomes[name] = outcome
        print(line(name, outcome), *(f"    {fault}" for fault in outcome.faults), sep="\n", flush=True)
        if options.keep and not outcome.faults:
            with options.keep.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"name": name, **asdict(outcome)}) + "\n")
    seconds = time.monotonic() - started
    outcomes = {name: outcomes[name] for name in names}
    wrong = [name for name, outcome in outcomes.items() if outcome.faults]
    print(f"{len(outcomes) - len(wrong)} of {len(outcomes)} rows hold; {seconds:.0f} s, the reference included")
    if options.write and not wrong:
        command = COMMAND if device is CPU else f"{COMMAND} --device {device.name} --at-once {options.at_once}"
        command += f" --keep FILE, which had {kept} of them," if kept else ""
        write(DOCUMENT, MARKS[device.name], table(outcomes, command, seconds, device))
        print(f"wrote {DOCUMENT}")
    return 1 if wrong else 0


def read_kept(file: Path | None) -> dict[str, Outcome]:
    """The rows that an earlier run, which may have been cut off, found to hold."""
    if file is None or not file.exists():
        return {}
    found = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
    return {fields.pop("name"): Outcome(**fields) for fields in found}


def run_rows(names: list[str], device: Device, at_once: int = 1) -> Iterator[tuple[str, Outcome]]:
    """The rows' outcomes as they come; ``at_once`` of them run at a time."""
    with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
        oracles = Oracles(Path(folder), device)

        def outcome(name: str) -> tuple[str, Outcome]:
            try:
                return name, run_row(ROWS[name], oracles)
            except LayoutFailed as failure:
                return name, Outcome.of_failure(str(failure).splitlines()[:40])

        for shape in dict.fromkeys(ROWS[name].shape for name in names):
            oracles.prepare(shape)  # so that a row's seconds are its own, and rows at once make it once
        if at_once == 1:  # without a thread: a process that has some cannot be forked safely
            yield from map(outcome, names)
            return
        with ThreadPoolExecutor(at_once) as pool:
            for done in as_completed([pool.submit(outcome, name) for name in names]):
                yield done.result()


def line(name: str, outcome: Outcome) -> str:
    held = f"{outcome.largest_difference:.1e}" if not outcome.faults else "WRONG"
    within = f"{outcome.within:.1e} of {outcome.allowed:.1e}"
    return f"{name:24} {ROWS[name].layout:16} {ROWS[name].ranks:3} ranks {held:>8} {within} {outcome.seconds:6.1f} s"


def table(outcomes: dict[str, Outcome], command: str, seconds: float, device: Device = CPU) -> str:
    """The lines between a device's marks, the marks included."""
    compared = sum(outcome.compared for outcome in outcomes.values())
    columns: dict[str, Callable[[str, Outcome], str]] = {
        "row": lambda name, _: name,
        "layout": lambda name, _: ROWS[name].layout,
        "model, and what happens": lambda name, _: f"{ROWS[name].shape}; {ROWS[name].what}",
        "ranks": lambda name, _: str(ROWS[name].ranks),
        "90% within": lambda _, outcome: f"{outcome.within:.3f}",
        "allowed": lambda _, outcome: f"{outcome.allowed:.3f}",
        "largest difference": lambda _, outcome: f"{outcome.largest_difference:.1e}",
        "seconds": lambda _, outcome: f"{outcome.seconds:.1f}",
        "evidence": lambda name, _: ROWS[name].evidence if device is CPU else evidence_of_gpus(ROWS[name].ranks),
    }
    if device is GPUS:
        allowed = f"{SHARE:.0%} of the differences must be smaller than what is allowed"
    else:
        allowed = f"the largest difference allowed is {TOLERANCE:g}"
        del columns["90% within"], columns["allowed"]
    words = {"row", "layout", "model, and what happens", "evidence"}
    rows = [list(columns), ["---" if title in words else "---:" for title in columns]]
    rows += [[cell(name, outcome) for cell in columns.values()] for name, outcome in outcomes.items()]
    return "\n".join([
        MARKS[device.name].begin,
        "",
        f"`{command}` on {hardware(device)}: {len(outcomes)} rows in {seconds:.0f} s, the reference included. "
        f"{compared:,} log-probabilities were compared; {allowed}.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in rows),
        "",
        MARKS[device.name].end,
    ])  # fmt: skip


def evidence_of_gpus(ranks: int) -> str:
    gpus = count_gpus()
    return "a GPU a rank" if ranks <= gpus else f"took turns on {gpus} GPUs"


def hardware(device: Device) -> str:
    """Processor, cores, memory and versions, as this process has them; on GPUs these instead of the processor."""
    if device is GPUS:
        import torch

        where = f"{count_gpus()} {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
        return f"{where}; Python {platform.python_version()}, {versions('sglang', 'torch', 'triton', 'transformers')}"
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{len(os.sched_getaffinity(0))} cores of {model[1] if model else platform.processor()}, {memory:.0f} GiB; "
        f"Python {platform.python_version()}, {versions('sglang', 'torch', 'transformers')}"
    )


def versions(*packages: str) -> str:
    """As the packages themselves say: what PYTHONPATH adds is not always known to be installed."""
    return ", ".join(f"{name} {importlib.import_module(name).__version__}" for name in packages)


def write(document: Path, marks: Marks, matrix: str) -> None:
    """Puts ``matrix`` between its two ``marks`` in ``document`` and leaves the rest as it is.

    Raises:
        ValueError: the document lacks the marks.
    """
    text = document.read_text(encoding="utf-8")
    before, begin, rest = text.partition(marks.begin)
    _, end, behind = rest.partition(marks.end)
    if not (begin and end):
        raise ValueError(f"{document} needs the lines {marks.begin!r} and {marks.end!r}: the table goes between them")
    document.write_text(before + matrix + behind, encoding="utf-8")
