"""PNG of a record: decode steps by batch size or context, or an operator's microseconds by tokens.

    python -m sglang_minimax.bench.plots RECORD.json OUT.png

It takes what ``bench --json`` wrote and, for QK norm, what the script itself wrote.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sglang_minimax.bench import tables
from sglang_minimax.bench.record import CannotBench, Shape, describe_host
from sglang_minimax.bench.tables import Measured

# Blue, orange, green, purple of Okabe and Ito, which colour-blind readers tell apart; markers say it again.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_MARKERS = "osD^vP"
_WHISKERS = {"capsize": 3, "elinewidth": 1}
_MOST_BARS = 4  # batch sizes


def check_matplotlib() -> Any:
    """``matplotlib.pyplot`` without a display.

    Raises:
        CannotBench: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise CannotBench("plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def draw(found: dict[str, Any], path: Path) -> None:
    """Writes the plot of a record to ``path``.

    Raises:
        CannotBench: no matplotlib, nothing measured, or an operator of which there is no plot.
    """
    plt = check_matplotlib()
    if found.get("kind") == "model":
        figure = _decode_steps(plt, found)
    else:
        figure = _operator_lines(plt, found.get("results", found))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the version of matplotlib in the file, the same numbers give the same bytes.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def _decode_steps(plt: Any, found: dict[str, Any]) -> Any:
    """Bars for a few batch sizes, a line for many; with several contexts a panel a batch size, and lines.

    Batch sizes that were measured with one context only share a panel of their own, over the batch size.
    """
    columns = {
        name: {shape: cell for shape, cell in column.items() if isinstance(cell, Measured)}
        for name, column in tables.decode_cells(found).items()
    }
    columns = {name: column for name, column in columns.items() if column}
    if not columns:
        raise CannotBench("there is nothing to plot: no contestant was measured")
    if len(found["input_lens"]) > 1:
        figure = _lines_by_context(plt, columns)
    elif len(found["batch_sizes"]) > _MOST_BARS:
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        _lines(axes, "batch size", {
            name: {shape.batch_size: _band(cell) for shape, cell in column.items()} for name, column in columns.items()
        })  # fmt: skip
    else:
        figure = _bars(plt, columns)
    figure.axes[0].set_ylabel("decode step, ms: median and quartiles")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, ncols=len(columns), loc="outside lower center")
    model = ", ".join([found["model"]["name"], *found["model"]["changes"]])
    figure.suptitle(f"{model}; {found['layout']}\n{describe_host(found['host'])}", fontsize=10)
    return figure


def _bars(plt: Any, columns: dict[str, dict[Shape, Measured]]) -> Any:
    shapes = sorted({shape for column in columns.values() for shape in column})
    figure, axes = plt.subplots(figsize=(3 + 0.75 * len(shapes) * len(columns), 4.5), layout="constrained")
    width = 0.8 / len(columns)
    for i, (name, column) in enumerate(columns.items()):
        at = [shapes.index(shape) + (i - (len(columns) - 1) / 2) * width for shape in column]
        medians = [cell.median for cell in column.values()]
        spread = [
            [cell.median - cell.low for cell in column.values()],
            [cell.high - cell.median for cell in column.values()],
        ]
        axes.bar(at, medians, width * 0.92, label=name, color=_colour(i), yerr=spread, error_kw=_WHISKERS)
        for place, cell in zip(at, column.values(), strict=True):
            axes.annotate(f"{cell.median:.2f}", (place, cell.high), (0, 4), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(shapes)), [str(shape.batch_size) for shape in shapes])
    axes.set_xlabel("batch size")
    axes.set_ylim(0, max(cell.high for column in columns.values() for cell in column.values()) * 1.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _lines_by_context(plt: Any, columns: dict[str, dict[Shape, Measured]]) -> Any:
    lengths_of: dict[int, set[int]] = {}
    for shape in sorted({shape for column in columns.values() for shape in column}):
        lengths_of.setdefault(shape.batch_size, set()).add(shape.input_len)
    sizes = [size for size, lengths in lengths_of.items() if len(lengths) > 1]
    # A size that fits one context only is a point, which says something beside the other sizes.
    alone = sorted({length for lengths in lengths_of.values() if len(lengths) == 1 for length in lengths})
    number = len(alone) + len(sizes)
    figure, panels = plt.subplots(1, number, figsize=(1 + 3.6 * number, 4.2), squeeze=False, layout="constrained")

    for length, axes in zip(alone, panels[0], strict=False):
        _lines(axes, "batch size", {
            name: {shape.batch_size: _band(cell) for shape, cell in column.items() if shape.input_len == length}
            for name, column in columns.items()
        })  # fmt: skip
        axes.set_title(f"{length} tokens of context", fontsize=10)
    for size, axes in zip(sizes, panels[0][len(alone) :], strict=True):
        _lines(axes, "tokens of context", {
            name: {shape.input_len: _band(cell) for shape, cell in column.items() if shape.batch_size == size}
            for name, column in columns.items()
        })  # fmt: skip
        axes.set_title(f"batch size {size}", fontsize=10)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k" if value >= 1024 else f"{value:g}")
    return figure


Band = tuple[float, float, float]
"""A median and the ends of what is drawn around it."""


def _band(cell: Measured) -> Band:
    return cell.median, cell.low, cell.high


def _line(axes: Any, i: int, name: str, bands: dict[int, Band]) -> None:
    at = sorted(bands)
    medians, low, high = ([bands[x][part] for x in at] for part in range(3))
    axes.plot(at, medians, color=_colour(i), marker=_MARKERS[i % len(_MARKERS)], ms=5, label=name)
    axes.fill_between(at, low, high, color=_colour(i), alpha=0.25, linewidth=0)


def _lines(axes: Any, label: str, bands_of: dict[str, dict[int, Band]]) -> None:
    """A line for each contestant, over what ``label`` says."""
    for i, (name, bands) in enumerate(bands_of.items()):
        _line(axes, i, name, bands)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(i: int) -> str:
    return _COLOURS[i % len(_COLOURS)]


def _operator_lines(plt: Any, results: dict[str, Any]) -> Any:
    measured: dict[str, dict[str, dict[str, Any]]] = {}
    for name, one in results.items():
        if isinstance(one, dict) and "us_a_layer" in one:
            engine, layout = name.split(" ")
            measured.setdefault(layout, {})[engine] = one
    if not measured:
        raise CannotBench("there is no plot of this operator, only of qk-norm; its table is in the record")
    figure, all_axes = plt.subplots(
        1, len(measured), figsize=(1 + 3.6 * len(measured), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    engines = list(dict.fromkeys(engine for column in measured.values() for engine in column))
    for axes, (layout, column) in zip(all_axes[0], measured.items(), strict=True):
        for engine, one in column.items():
            bands = {int(tokens): (us["median"], us["p10"], us["p90"]) for tokens, us in one["us_a_layer"].items()}
            _line(axes, engines.index(engine), engine, bands)
        heads, kv_heads, gpus = layout.split(":")
        axes.set_title(f"{heads} q, {kv_heads} KV heads on {gpus} GPU{'s' if gpus != '1' else ''}", fontsize=10)
        axes.set_xscale("log", base=4)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0][0].set_ylabel("microseconds a layer, 10th to 90th percentile")
    all_axes[0][0].legend(frameon=False)
    gpu = next(iter(next(iter(measured.values())).values())).get("host", {}).get("gpu", "")
    figure.suptitle(f"QK norm, RoPE and KV store, {gpu}", fontsize=11)
    return figure


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    try:
        draw(json.loads(source.read_text(encoding="utf-8")), target)
    except CannotBench as error:
        sys.exit(str(error))
