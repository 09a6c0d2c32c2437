"""PNG of a record: decode steps by batch size, or an operator's microseconds by tokens.

    python -m sglang_minimax.bench.plots RECORD.json OUT.png

It takes what ``bench --json`` wrote and, for QK norm, what the script itself wrote.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sglang_minimax.bench import tables
from sglang_minimax.bench.record import CannotBench, describe_host

# Blue, orange, green, purple of Okabe and Ito, which colour-blind readers tell apart; markers say it again.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_MARKERS = "osD^vP"
_WHISKERS = {"capsize": 3, "elinewidth": 1}


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
        figure = _decode_bars(plt, found)
    else:
        figure = _operator_lines(plt, found.get("results", found))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the version of matplotlib in the file, the same numbers give the same bytes.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def _decode_bars(plt: Any, found: dict[str, Any]) -> Any:
    cells = {
        name: {size: cell for size, cell in column.items() if isinstance(cell, tables.Measured)}
        for name, column in tables.decode_cells(found).items()
    }
    cells = {name: column for name, column in cells.items() if column}
    if not cells:
        raise CannotBench("there is nothing to plot: no contestant was measured")
    sizes = sorted({size for column in cells.values() for size in column})
    figure, axes = plt.subplots(figsize=(1.5 + 0.75 * len(sizes) * len(cells) + 1.5, 4.5), layout="constrained")
    width = 0.8 / len(cells)
    for i, (name, column) in enumerate(cells.items()):
        at = [sizes.index(size) + (i - (len(cells) - 1) / 2) * width for size in column]
        medians = [cell.median for cell in column.values()]
        spread = [
            [cell.median - cell.low for cell in column.values()],
            [cell.high - cell.median for cell in column.values()],
        ]
        colour = _COLOURS[i % len(_COLOURS)]
        axes.bar(at, medians, width * 0.92, label=name, color=colour, yerr=spread, error_kw=_WHISKERS)
        for place, cell in zip(at, column.values(), strict=True):
            axes.annotate(f"{cell.median:.2f}", (place, cell.high), (0, 4), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("batch size")
    axes.set_ylabel("decode step, ms: median and quartiles")
    axes.set_ylim(0, max(cell.high for column in cells.values() for cell in column.values()) * 1.25)
    model = ", ".join([found["model"]["name"], *found["model"]["changes"]])
    axes.set_title(f"{model}; {found['layout']}\n{describe_host(found['host'])}", fontsize=10)
    axes.legend(frameon=False, ncols=len(cells), loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


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
            i = engines.index(engine)
            tokens = sorted(map(int, one["us_a_layer"]))
            at = [one["us_a_layer"][str(count)] for count in tokens]
            axes.plot(tokens, [x["median"] for x in at], color=_COLOURS[i], marker=_MARKERS[i], ms=5, label=engine)
            axes.fill_between(
                tokens, [x["p10"] for x in at], [x["p90"] for x in at], color=_COLOURS[i], alpha=0.25, linewidth=0
            )
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
