"""Medians, spreads and ratios of a record's numbers, and the screen."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_minimax.bench.contestants import STOCK
from sglang_minimax.bench.record import Shape, describe_clocks, describe_host


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


_LEGEND = (
    "Median (quartiles of all samples, widened to the medians of single runs). A ratio is how many times faster;",
    '"same" is a difference smaller than the spread, which is noise.',
)

Cell = Measured | str
"""What a contestant did, or why there is no number."""


def decode_cells(record: dict[str, Any]) -> dict[str, dict[Shape, Cell]]:
    """Milliseconds of a decode step, by contestant."""
    return _cells(record, lambda batch: batch["decode_ms"])


def prefill_cells(record: dict[str, Any]) -> dict[str, dict[Shape, Cell]]:
    """Milliseconds of the prefill, by contestant; one sample a counted round of a run."""
    return _cells(record, lambda batch: batch["prefill_ms"])


def _cells(record: dict[str, Any], samples: Callable[[dict[str, Any]], list[float]]) -> dict[str, dict[Shape, Cell]]:
    cells: dict[str, dict[Shape, Cell]] = {}
    shapes = [Shape(*one) for one in itertools.product(record["batch_sizes"], record["input_lens"])]
    for name, contestant in record["contestants"].items():
        cells[name] = {}
        for shape in shapes:
            runs = [samples(run["batches"][str(shape)]) for run in contestant["runs"] if str(shape) in run["batches"]]
            errors = [run["error"] for run in contestant["runs"] if run["error"]]
            unmeasured = errors[-1] if errors else contestant.get("error") or "not measured"
            cells[name][shape] = Measured.of_runs(runs) if runs else unmeasured
    return cells


def ratio(baseline: Cell, other: Cell) -> str:
    """How many times faster ``other`` is, or "same" where the difference is under the spread."""
    if not isinstance(baseline, Measured) or not isinstance(other, Measured):
        return "-"
    times = f"{baseline.median / other.median:.2f}"
    if min(baseline.samples, other.samples) == 1:
        return f"{times} (1 run)"
    return "same" if baseline.is_same_as(other) else times


def render(records: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Lines: what was measured, on what, a table, versions. ``names`` of the records show if there are several."""
    labels = names if len(records) > 1 else [""]
    lines = [line for record, label in zip(records, labels, strict=True) for line in _facts(record, label)]
    lines += ["", *_table(records, labels), "", *_LEGEND]
    for record, label in zip(records, labels, strict=True):
        lines += _versions(record, label)
    return lines


def _facts(record: dict[str, Any], label: str) -> list[str]:
    model = ", ".join([record["model"]["name"], *record["model"]["changes"], "dummy weights"])
    tokens_in = ", ".join(map(str, record["input_lens"]))
    name, lengths = f"{label}: " if label else "", f"{tokens_in} tokens in, {record['output_len']} out"
    return [
        f"{name}{model}; {record['layout']}; {lengths}",
        f"{describe_host(record['host'])}; host {record['host']['identity']}; {record['time']}",
    ]


def _versions(record: dict[str, Any], label: str) -> list[str]:
    lines = []
    for contestant, facts in record["contestants"].items():
        versions = ", ".join(f"{package} {version}" for package, version in (facts["versions"] or {}).items())
        samples = [sample for run in facts["runs"] for sample in (run["clocks_before"], run["clocks_after"])]
        variables = " ".join(f"{variable}={value}" for variable, value in facts["variables"].items())
        parts = [versions or "nothing found", describe_clocks(samples), f"{len(facts['runs'])} run(s)", variables]
        parts.append(facts.get("command"))
        lines.append(f"{_named(contestant, label)}: {'; '.join(filter(None, parts))}")
    return lines


def _table(records: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[str]:
    """A row a shape and contestant; ratios are to stock, or to the first that was measured where stock was not."""
    decode, prefill = _columns(records, labels, decode_cells), _columns(records, labels, prefill_cells)
    measured = [name for name, cells in decode.items() if any(isinstance(cell, Measured) for cell in cells.values())]
    baseline = next((name for name in measured if name.split(" ")[0] == STOCK), next(iter(measured or decode)))
    rows = [
        ["batch", "tokens in", "contestant", "decode, ms a step", f"{baseline} / it", "prefill, ms", f"{baseline} / it"]
    ]
    for shape in sorted({shape for cells in decode.values() for shape in cells}):
        for name in decode:
            if shape not in decode[name]:
                continue
            row = [*map(str, shape), name, str(decode[name][shape])]
            if isinstance(decode[name][shape], Measured):  # an error takes the rest of the line
                of_decode, of_prefill = (
                    "" if name == baseline else ratio(cells[baseline].get(shape, ""), cells[name][shape])
                    for cells in (decode, prefill)
                )
                row += [of_decode, str(prefill[name][shape]), of_prefill]
            rows.append(row)
    whole = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[column]) for row in whole) for column in range(len(rows[0]))]
    widths[:3] = [max(len(row[column]) for row in rows) for column in range(3)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]


def _named(contestant: str, label: str) -> str:
    return f"{contestant} ({label})" if label else contestant


def _columns(
    records: Sequence[dict[str, Any]],
    labels: Sequence[str],
    cells_of: Callable[[dict[str, Any]], dict[str, dict[Shape, Cell]]],
) -> dict[str, dict[Shape, Cell]]:
    return {
        _named(contestant, label): cells
        for record, label in zip(records, labels, strict=True)
        for contestant, cells in cells_of(record).items()
    }
