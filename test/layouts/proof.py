"""Runs the matrix, prints its table, and writes the table into docs/proof.md. Started by ``matrix.py``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import re
import tempfile
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from layouts.harness import LayoutFailed, count_gpus
from layouts.matrix import Oracles, Outcome, run_row
from layouts.nodes import end_servers
from layouts.rows import CPU, GPUS, ROWS, SHARE, TOLERANCE, Device, Row
from layouts.servers import flags_of, names_of_servers, run_server

from sglang_minimax.server_process import Interrupted, Interrupts

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "proof.md"
COMMAND = "python test/layouts/matrix.py --write"


@dataclass(frozen=True)
class Marks:
    """The lines of the document between which a device's table lies."""

    begin: str
    end: str


MARKS = {  # by device, and by whether servers ran
    (CPU.name, False): Marks("<!-- matrix: written by the command below -->", "<!-- end of matrix -->"),
    (CPU.name, True): Marks("<!-- servers: written by the command below -->", "<!-- end of servers -->"),
    (GPUS.name, False): Marks(
        "<!-- matrix on GPUs: written by the command below -->", "<!-- end of matrix on GPUs -->"
    ),
    (GPUS.name, True): Marks(
        "<!-- servers on GPUs: written by the command below -->", "<!-- end of servers on GPUs -->"
    ),
}


@dataclass(frozen=True)
class Run:
    """A row, below the server or through it, and there with our model or with stock's."""

    name: str
    stock: bool = False

    @property
    def row(self) -> Row:
        return ROWS[self.name]


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 if any row is not as it should be."""
    options = parse(arguments)
    if not options.servers:  # ranks below the server end with this process, whatever ends it
        return run(options)
    try:
        with Interrupts():
            return run(options)
    except Interrupted as interruption:
        return interruption.exit_code


def run(options: argparse.Namespace) -> int:
    """As :func:`main`, for arguments that are parsed."""
    device, names = options.device, options.names
    runs = [Run(name, stock) for stock in (False, True)[: 1 + options.stock] for name in names]
    started = time.monotonic()
    outcomes = {run: outcome for run, outcome in read_kept(options.keep).items() if run in runs}
    kept = len(outcomes)
    how = run_server if options.servers else run_row
    remaining = [run for run in runs if run not in outcomes]
    for run, outcome in outcomes_of(remaining, device, how, options.at_once, options.ranks):
        outcomes[run] = outcome
        print(line(run, outcome), *(f"    {fault}" for fault in outcome.faults), sep="\n", flush=True)
        if options.keep and (run.stock or not outcome.faults):
            with options.keep.open("a", encoding="utf-8") as file:
                without_logs = replace(outcome, faults=outcome.faults[:1])
                file.write(json.dumps(asdict(run) | asdict(without_logs)) + "\n")
    seconds = time.monotonic() - started
    ours = {name: outcomes[Run(name)] for name in names}
    of_stock = {name: outcomes[Run(name, stock=True)] for name in names} if options.stock else None
    wrong = [name for name, outcome in ours.items() if outcome.faults]
    print(f"{len(ours) - len(wrong)} of {len(ours)} rows hold; {seconds:.0f} s, the reference included")
    if options.write and not wrong:
        command = command_of(options) + (f" --keep FILE, which had {kept} of them," if kept else "")
        write(
            DOCUMENT,
            MARKS[device.name, options.servers],
            table(ours, command, seconds, device, options.servers, of_stock),
        )
        print(f"wrote {DOCUMENT}")
    return 1 if wrong else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """``device`` as :class:`Device`; ``names``, beside what is given, are those of the rows to run."""
    parser = argparse.ArgumentParser(prog="python test/layouts/matrix.py", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="PART", help="rows whose names contain one of these")
    parser.add_argument("--write", action="store_true", help="write docs/proof.md; all rows must hold")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the ranks run (default: cpu)")
    parser.add_argument("--servers", action="store_true", help="each layout through the real server, see servers.py")
    parser.add_argument("--stock", action="store_true", help="beside each server of ours on GPUs the stock engine's")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="rows that run at a time")
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="of rows at a time, unless it is one: N ranks at most; "
        "a server's rank on a GPU takes 3 to 4 GiB of the host's memory",
    )
    parser.add_argument("--keep", type=Path, metavar="FILE", help="add each row that holds to FILE, and run none of it")
    options = parser.parse_args(arguments)
    if options.write and options.only:
        parser.error("--write needs all rows: leave --only out")
    if options.at_once < 1 or (options.at_once > 1 and options.device == "cpu" and not options.servers):
        # Ranks on a CPU are forked, which a process with threads cannot do safely.
        parser.error(f"--at-once {options.at_once} must be 1 on the CPU, but for --servers, and at least 1 on GPUs")
    if options.stock and not (options.servers and options.device == "cuda"):
        parser.error("--stock needs --servers --device cuda: the stock engine does not serve this model on a CPU")
    options.device = {one.name: one for one in (CPU, GPUS)}[options.device]
    options.names = [name for name in ROWS if not options.only or any(part in name for part in options.only)]
    if options.device is GPUS:
        options.names = [name for name in options.names if ROWS[name].simulation_on(GPUS) is None]
        if not options.names or not count_gpus():
            parser.error(f"none of these rows can run on {count_gpus()} GPUs, where nothing is simulated")
    if options.servers:
        options.names = names_of_servers(options.names, options.device)
    return options


def command_of(options: argparse.Namespace) -> str:
    """The command that writes a table, as the document has it."""
    command = COMMAND + " --servers" * options.servers
    command += "" if options.device is CPU else f" --device {options.device.name}"
    command += " --stock" * options.stock
    command += f" --at-once {options.at_once}" if options.at_once > 1 else ""
    return command + (f" --ranks {options.ranks}" if options.ranks else "")


def read_kept(file: Path | None) -> dict[Run, Outcome]:
    """The rows that an earlier run, which may have been cut off, found to hold, and what it found of stock's."""
    if file is None or not file.exists():
        return {}
    found = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
    return {Run(fields.pop("name"), fields.pop("stock")): Outcome(**fields) for fields in found}


def outcomes_of(
    runs: list[Run],
    device: Device,
    how: Callable[..., Outcome] = run_row,
    at_once: int = 1,
    ranks: int | None = None,
) -> Iterator[tuple[Run, Outcome]]:
    """What ``how`` gives for each of ``runs``, as it comes.

    Args:
        how: takes a row and :class:`Oracles`, and ``stock=True`` where the run is stock's.
        at_once: so many run at a time, those of the most ranks first.
        ranks: unless only one runs, they have so many ranks together at most.
    """
    with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
        oracles = Oracles(Path(folder), device)

        def outcome(run: Run) -> tuple[Run, Outcome]:
            try:
                return run, how(run.row, oracles, **({"stock": True} if run.stock else {}))
            except LayoutFailed as failure:
                return run, Outcome.of_failure(str(failure).splitlines()[:40])

        for shape in dict.fromkeys(run.row.shape for run in runs):
            oracles.prepare(shape)  # so that a row's seconds are its own, and rows at once make it once
        if at_once == 1:  # without a thread: a process that has some cannot be forked safely
            yield from map(outcome, runs)
            return
        waiting = deque(sorted(runs, key=lambda run: run.row.ranks, reverse=True))
        running: dict[Future, int] = {}
        with ThreadPoolExecutor(at_once) as pool, _servers_ended_when_interrupted():
            while waiting or running:
                while waiting and len(running) < at_once:
                    needed = waiting[0].row.ranks
                    if running and ranks and sum(running.values()) + needed > ranks:
                        break
                    running[pool.submit(outcome, waiting.popleft())] = needed
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    yield future.result()


@contextlib.contextmanager
def _servers_ended_when_interrupted() -> Iterator[None]:
    """Inside a pool of threads, which would otherwise wait until their servers have started and answered."""
    try:
        yield
    except Interrupted:
        end_servers()
        raise


def line(run: Run, outcome: Outcome) -> str:
    name = "stock " * run.stock + run.name
    held = f"{outcome.largest_difference:.1e}" if not outcome.faults else "WRONG"
    within = f"{outcome.within:.1e} of {outcome.allowed:.1e}"
    return f"{name:28} {run.row.layout:16} {run.row.ranks:3} ranks {held:>8} {within} {outcome.seconds:6.1f} s"


def table(
    outcomes: dict[str, Outcome],
    command: str,
    seconds: float,
    device: Device = CPU,
    servers: bool = False,
    of_stock: dict[str, Outcome] | None = None,
) -> str:
    """The lines between the marks of a device, and of rows or servers, the marks included; stock's in a column."""
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
    if servers:
        columns["model"] = lambda name, _: ROWS[name].shape
        columns["flags"] = lambda name, _: f"`{' '.join(flags_of(ROWS[name]))}`{_on_nodes(ROWS[name])}"
        shown = ["row", "flags", "model", "ranks", "90% within", "allowed", "largest difference", "seconds", "evidence"]
        columns = {title: columns[title] for title in shown if title in columns}
    if of_stock:
        columns["stock"] = lambda name, _: said_of_stock(of_stock[name])
    words = {"row", "layout", "model, and what happens", "evidence", "model", "flags", "stock"}
    rows = [list(columns), ["---" if title in words else "---:" for title in columns]]
    rows += [[cell(name, outcome) for cell in columns.values()] for name, outcome in outcomes.items()]
    marks, what = MARKS[device.name, servers], "servers" if servers else "rows"
    return "\n".join([
        marks.begin,
        "",
        f"`{command}` on {hardware(device)}: {len(outcomes)} {what} in {seconds:.0f} s, the reference included. "
        f"{compared:,} log-probabilities were compared; {allowed}.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in rows),
        "",
        marks.end,
    ])  # fmt: skip


def said_of_stock(outcome: Outcome) -> str:
    """A cell: that it is right, how far off it is, or how it ended."""
    if not outcome.faults:
        return "right"
    if outcome.compared:
        return f"wrong: 90% within {outcome.within:.3f}"
    if "is not finite" in outcome.faults[0]:  # an answer, in which the comparison ends
        return "wrong: a log-probability is not finite"
    error = textwrap.shorten(outcome.faults[0], 100, placeholder=" …")
    return f"ends: `{error.replace('`', '').replace('|', '/')}`"


def _on_nodes(row: Row) -> str:
    nodes = row.arguments.get("nnodes", 1)
    return f" on {nodes} nodes" if nodes > 1 else ""


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
