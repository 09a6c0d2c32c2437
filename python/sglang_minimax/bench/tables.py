"""Medians, spreads and ratios of a record's numbers, and the screen."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
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
    """Prints what was measured and two tables: decode and prefill. ``names`` are shown if there are several records."""
    first = records[0]
    _show_facts(first, console)
    for title, cells_of in (("decode, ms a step", decode_cells), ("prefill, ms", prefill_cells)):
        merged: dict[str, dict[int, Cell]] = {}
        for record, name in zip(records, names, strict=True):
            for contestant, cells in cells_of(record).items():
                merged[contestant if len(records) == 1 else f"{contestant} ({name})"] = cells
        if cells_of is prefill_cells:  # the table above has the errors
            merged = {
                column: {size: "-" if isinstance(cell, str) else cell for size, cell in cells.items()}
                for column, cells in merged.items()
            }
        console.print(_table(title, merged))
    console.print(
        "[dim]Median (quartiles of all samples, widened to the medians of single runs). A ratio is how many times "
        'faster; "same" is a difference smaller than the spread, which is noise.[/]'
    )
    for record, name in zip(records, names, strict=True):
        _show_versions(record, name if len(records) > 1 else "", console)


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


def _table(title: str, cells: dict[str, dict[int, Cell]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("batch", justify="right")
    baseline = next((name for name in cells if name.split(" ")[0] == STOCK), next(iter(cells)))
    others = [name for name in cells if name != baseline]
    for name in cells:
        table.add_column(escape(name), justify="right", max_width=40)
    for name in others:
        table.add_column(escape(f"{baseline} / {name}"), justify="right")
    for size in _sizes(cells):
        row = [cells[name].get(size, "not measured") for name in cells]
        ratios = [ratio(cells[baseline].get(size, ""), cells[name].get(size, "")) for name in others]
        table.add_row(str(size), *(escape(str(cell)) for cell in row), *ratios)
    return table


def _sizes(cells: dict[str, dict[int, Cell]]) -> Iterator[int]:
    yield from sorted({size for column in cells.values() for size in column})
