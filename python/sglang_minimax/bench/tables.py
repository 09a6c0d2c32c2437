"""Medians, spreads and ratios of a record's numbers, and the screen."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sglang_minimax.bench.contestants import STOCK
from sglang_minimax.bench.record import describe_clocks, describe_host


@dataclass(frozen=True)
class Measured:
    """A median with its spread, in the unit of what was measured.

    low, high: the quartiles of all samples, widened to the medians of single runs.
    samples: how many there were; with one the spread is not known.
    """

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of_runs(cls, runs: Sequence[Sequence[float]]) -> Measured:
        """Samples of each run; none may be empty."""
        samples = [sample for run in runs for sample in run]
        low = high = samples[0]
        if len(samples) > 1:
            low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        medians = [statistics.median(run) for run in runs]
        return cls(statistics.median(samples), min(low, *medians), max(high, *medians), len(samples))

    def is_same_as(self, other: Measured) -> bool:
        """Whether the medians differ by no more than the larger of the two spreads: then the difference is noise."""
        return abs(self.median - other.median) <= max(self.high - self.low, other.high - other.low)

    def __str__(self) -> str:
        spread = "" if self.samples == 1 else f" ({self.low:.2f} to {self.high:.2f})"
        return f"{self.median:.2f}{spread}"


Cell = Measured | str
"""What a contestant did at a batch size, or why there is no number."""


def decode_cells(record: dict[str, Any]) -> dict[str, dict[int, Cell]]:
    """Milliseconds of a decode step by contestant and batch size."""
    return _cells(record, lambda batch: batch["decode_ms"])


def prefill_cells(record: dict[str, Any]) -> dict[str, dict[int, Cell]]:
    """Milliseconds of the prefill by contestant and batch size; one sample a run."""
    return _cells(record, lambda batch: [batch["prefill_ms"]])


def _cells(record: dict[str, Any], samples: Callable[[dict[str, Any]], list[float]]) -> dict[str, dict[int, Cell]]:
    cells: dict[str, dict[int, Cell]] = {}
    for name, contestant in record["contestants"].items():
        cells[name] = {}
        for size in record["batch_sizes"]:
            runs = [samples(run["batches"][str(size)]) for run in contestant["runs"] if str(size) in run["batches"]]
            errors = [run["error"] for run in contestant["runs"] if run["error"]]
            unmeasured = errors[-1] if errors else contestant.get("error") or "not measured"
            cells[name][size] = Measured.of_runs(runs) if runs else unmeasured
    return cells


def ratio(baseline: Cell, other: Cell) -> str:
    """How many times faster ``other`` is, or "same" where the difference is under the spread."""
    if not isinstance(baseline, Measured) or not isinstance(other, Measured):
        return "-"
    times = f"{baseline.median / other.median:.2f}"
    if min(baseline.samples, other.samples) == 1:
        return f"{times} (1 run)"
    return "same" if baseline.is_same_as(other) else times


def show(records: Sequence[dict[str, Any]], names: Sequence[str], console: Console) -> None:
    """Prints what was measured, on what, and a table. ``names`` of the records are shown if there are several."""
    labels = names if len(records) > 1 else [""]
    _show_facts(records[0], console)
    console.print(make_table(records, labels))
    console.print(
        "[dim]Median (quartiles of all samples, widened to the medians of single runs). A ratio is how many times "
        'faster; "same" is a difference smaller than the spread, which is noise.[/]'
    )
    for record, label in zip(records, labels, strict=True):
        _show_versions(record, label, console)


def _show_facts(record: dict[str, Any], console: Console) -> None:
    model = ", ".join([record["model"]["name"], *record["model"]["changes"], "dummy weights"])
    console.print(escape(f"{model}; {record['layout']}; {record['input_len']} tokens in, {record['output_len']} out"))
    console.print(escape(f"{describe_host(record['host'])}; host {record['host']['identity']}; {record['time']}"))


def _show_versions(record: dict[str, Any], name: str, console: Console) -> None:
    for contestant, facts in record["contestants"].items():
        versions = ", ".join(f"{package} {version}" for package, version in (facts["versions"] or {}).items())
        samples = [sample for run in facts["runs"] for sample in (run["clocks_before"], run["clocks_after"])]
        label = f"{contestant} ({name})" if name else contestant
        variables = " ".join(f"{variable}={value}" for variable, value in facts["variables"].items())
        line = f"{label}: {versions or 'nothing found'}; {describe_clocks(samples)}; {len(facts['runs'])} run(s)"
        console.print(escape(line + (f"; {variables}" if variables else "")))


def make_table(records: Sequence[dict[str, Any]], labels: Sequence[str]) -> Table:
    """A row a batch size and contestant; ratios are to stock, or to the first contestant where stock was not measured."""
    decode, prefill = _columns(records, labels, decode_cells), _columns(records, labels, prefill_cells)
    measured = [name for name, cells in decode.items() if any(isinstance(cell, Measured) for cell in cells.values())]
    baseline = next((name for name in measured if name.split(" ")[0] == STOCK), next(iter(measured or decode)))
    table = Table(box=None, pad_edge=False)
    table.add_column("batch", justify="right")
    table.add_column("contestant")
    for title in ("decode, ms a step", "prefill, ms"):
        table.add_column(title, max_width=60, overflow="fold")
        table.add_column(escape(f"{baseline} / it"), justify="right")
    for size in sorted({size for cells in decode.values() for size in cells}):
        for name in decode:
            if size not in decode[name]:
                continue
            row = [str(size), name]
            for cells in (decode, prefill):
                cell, of_baseline = cells[name][size], cells[baseline].get(size, "")
                # The first column of numbers has the error, and once is enough.
                text = "-" if isinstance(cell, str) and cells is prefill else str(cell)
                row += [text, "" if name == baseline else ratio(of_baseline, cell)]
            table.add_row(*map(escape, row))
        table.add_section()
    return table


def _columns(
    records: Sequence[dict[str, Any]],
    labels: Sequence[str],
    cells_of: Callable[[dict[str, Any]], dict[str, dict[int, Cell]]],
) -> dict[str, dict[int, Cell]]:
    return {
        f"{contestant} ({label})" if label else contestant: cells
        for record, label in zip(records, labels, strict=True)
        for contestant, cells in cells_of(record).items()
    }
