"""The tables of docs/scaling.md: what the step model predicts for more GPUs, and what QK norm costs over two nodes.

python -m sglang_minimax.plan.scaling             prints them
python -m sglang_minimax.plan.scaling --write     puts them into docs/scaling.md, in a checkout
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from sglang_minimax.plan import collectives, step
from sglang_minimax.plan.hardware import GPUS
from sglang_minimax.plan.launches import ENGINES, QK_NORM, Launch
from sglang_minimax.plan.layout import Flags, settle
from sglang_minimax.plan.shape import read_model

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "scaling.md"
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
BATCHES = (1, 16, 64)
CONTEXT = 529  # tokens of a request, as in the measured steps
_LAYOUTS = (Flags(tp=2), Flags(tp=4), Flags(tp=8), Flags(tp=16, nnodes=2))
_MODEL, _GPU = read_model("m2.5"), GPUS["h200"]


def tables() -> str:
    """All tables, in Markdown."""
    parts = {
        "Assumptions": "\n".join(f"- {assumption}" for assumption in step.ASSUMPTIONS),
        "A layer's launches": _launches(),
        "Against measurement": _measured(),
        "Predictions": _predictions(),
        "QK norm over two nodes": _two_nodes(),
    }
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items()) + "\n"


def _table(head: str, rows: list[list[str]]) -> str:
    columns = head.split(" | ")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _launches() -> str:
    rows = []
    for stock, *others in zip(*ENGINES.values(), strict=True):
        name = f"{stock.name}, {stock.context} tokens or more in a request" if stock.context else stock.name
        cells, sources, before = [_times(stock)], [stock.source], stock
        for engine, launch in zip(list(ENGINES)[1:], others, strict=True):
            cells.append("the same" if launch is before else _times(launch))
            sources += [] if launch is before else [f"{engine}: {launch.source}"]
            before = launch
        rows.append([name, *cells, "; ".join(sources)])
    text = _table(f"launch | {' | '.join(f'{engine}, us' for engine in ENGINES)} | from", rows)
    return f"{text}\n\nAt 1, 16 and 64 tokens. What no launch explains, fitted: {step.fitted()}."


def _times(launch: Launch) -> str:
    return ", ".join(f"{launch.at(batch):.2f}" for batch in BATCHES)


def _measured() -> str:
    rows = []
    for error in step.errors():
        measured = error.measured
        rows.append(
            [measured.engine, measured.layout, str(measured.num_layers), str(measured.input_len),
             measured.batch_name, f"{measured.ms:.2f}",
             f"{error.alike_ms:.2f}", "fitted" if measured in step.FITTED else f"{error.alike:+.1%}",
             f"{error.even_ms:.2f}"]
        )  # fmt: skip
    head = (
        "engine | layout | layers | tokens in | batch | measured, ms | model, all tokens alike | off by | even routing"
    )
    records = "\n".join(f"- `benchmark/results/{record}`" for record in dict.fromkeys(m.record for m in step.MEASURED))
    return f"{_table(head, rows)}\n\n{_largest_errors()}\n\nMedian steps, from\n\n{records}"


def _largest_errors() -> str:
    """The largest error of each kind of measured step, and what DP attention is without its constant."""
    constants = dataclasses.replace(step.fitted(), dp_layer_us=0.0)
    without = [
        step.predict_measured(measured, constants, routed_alike=True).ms / measured.ms - 1
        for measured in step.MEASURED
        if measured.flags.dp > 1
    ]
    largest = "; ".join(f"{kind} {error:+.1%}" for kind, error in step.largest_errors().items())
    return (
        f"Largest error of what is not fitted: {largest}. Without the constant of DP attention its three steps are "
        f"{', '.join(f'{error:+.0%}' for error in without)}."
    )


def _predictions() -> str:
    rows = []
    for flags in _LAYOUTS:
        layout = settle(flags, _MODEL, _GPU)
        for batch in BATCHES:
            cells = []
            for engine in ("stock", "ours"):
                alike, even = (
                    step.predict(_MODEL, layout, _GPU, batch, CONTEXT, routed_alike=alike, engine=engine)
                    for alike in (True, False)
                )
                cells.append(f"{alike.ms:.2f} to {even.ms:.2f}")
            rows.append([" ".join(flags.words()), str(batch), *cells, f"{even.collectives_ms:.2f}"])
    return _table("flags | batch | stock, ms | ours, ms | of ours, collectives", rows)


def _two_nodes() -> str:
    layout = settle(_LAYOUTS[-1], _MODEL, _GPU)
    extra_us = step.counterpart_bytes(_MODEL, layout) / (_GPU.hbm_gb_per_s * 1e3 * step.HBM_SHARE)
    rows, ranks = [], layout.tp_ranks_per_node
    for batch in BATCHES:
        whole = step.predict(_MODEL, layout, _GPU, batch, CONTEXT, counterpart=False).ms
        all_ranks = collectives.over_nodes_us(ranks, 2, 8.0 * batch)
        ways = {
            f"one all-reduce over {2 * ranks} ranks": all_ranks,
            "within nodes, then between pairs": collectives.over_nodes_us(1, 2, 8.0 * batch),
            "counterparts projected": extra_us,
        }
        for name, us in ways.items():
            share, saved = (_MODEL.num_hidden_layers * each / 1e3 / whole for each in (us, all_ranks - us))
            rows.append([str(batch), name, f"{us:.2f}", f"{share:.1%}", f"{saved:.1%}"])
    return _table(f"batch | how | us a layer beside {QK_NORM} | of the step | saved", rows)


def between_marks(text: str) -> str:
    """What the document has between its marks.

    Raises:
        ValueError: no such marks.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{DOCUMENT} needs the lines {BEGIN} and {END}, once each")
    return text.split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    """Prints the tables, or writes them."""
    if "--write" not in sys.argv[1:]:
        print(tables())
        return
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(text.replace(between_marks(text), tables().strip()), encoding="utf-8")


if __name__ == "__main__":
    main()
