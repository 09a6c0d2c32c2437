"""The screen: one layout, or the layouts of a search."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sglang_minimax.plan.memory import MIB, Memory
from sglang_minimax.plan.report import BASIS, RankHolds, Report
from sglang_minimax.plan.step import ASSUMPTIONS, FITTED, MEASURED, Candidate, errors, fitted, largest_errors

_GIB = 1024 * MIB
_RANKS_IN_A_ROW = 8  # of the drawing, so that it fits 80 columns
_DRAWN_RANKS = 16


def make_console() -> Console:
    """A terminal has a width of its own; a file or a pipe takes one in which commands are not broken early."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def show_report(report: Report, console: Console) -> None:
    """One layout, valid or not."""
    title = f"{report.model.name} on {report.gpu.name}: {' '.join(report.flags.words())}"
    if report.broken_rule is not None:
        _show_broken(report, title, console)
        return
    layout, memory = report.layout, report.memory
    assert layout is not None and memory is not None, "a valid report holds a layout and its memory"
    console.print(f"[bold green]valid[/]  {escape(title)}")
    ep = f"EP {layout.ep}"
    if layout.ep_chosen_because:
        ep += f", chosen: {layout.ep_chosen_because}"
    console.print(escape(
        f"{layout.gpus} GPUs, {layout.flags.nnodes} node(s); attention over {layout.attention_ranks} rank(s), "
        f"{layout.dp_groups} group(s) of requests; {ep}"
    ))  # fmt: skip
    if len(report.stages) > 1:
        console.print("pipeline: " + "; ".join(f"stage {i}: layers {a}-{b}" for i, (a, b) in enumerate(report.stages)))
    console.print()
    for line in draw_ranks(report.ranks):
        console.print(line, markup=False, no_wrap=True, crop=False)
    _show_memory(memory, report, console)
    _show_paths(report, console)
    for node, command in enumerate(report.commands):
        console.print(f"\n[bold]node {node}[/]" if len(report.commands) > 1 else "")
        console.print(command, markup=False, soft_wrap=True)


def _show_broken(report: Report, title: str, console: Console) -> None:
    console.print(f"[bold red]not valid[/]  {escape(title)}")
    console.print(escape(f"{report.broken_rule}."))
    if not report.nearest:
        console.print("No change of --tp, --dp, --ep, --pp-size and --nnodes on up to 16 such GPUs works.")
        return
    console.print("\nWhat works, nearest first:")
    for flags in report.nearest:
        console.print("  " + " ".join(flags.words()), markup=False, soft_wrap=True)


def draw_ranks(ranks: Sequence[RankHolds]) -> list[str]:
    """Lines that show what the ranks hold; ranks that share a KV head stand under one bracket."""
    drawn = ranks[:_DRAWN_RANKS]
    lines = []
    for start in range(0, len(drawn), _RANKS_IN_A_ROW):
        row = drawn[start : start + _RANKS_IN_A_ROW]
        lines += _draw_row(row)
    if len(ranks) > len(drawn):
        lines.append(f"... and so on up to rank {ranks[-1].rank}")
    return lines


def _draw_row(row: Sequence[RankHolds]) -> list[str]:
    cells: list[tuple[str, Callable[[RankHolds], str]]] = [
        ("rank", lambda holds: str(holds.rank)),
        ("DP rank", lambda holds: str(holds.dp_rank)),
        ("q heads", lambda holds: _span(holds.q_heads)),
        ("KV heads", lambda holds: _span(holds.kv_heads)),
        ("experts", lambda holds: _span(holds.experts)),
        ("columns", lambda holds: _span(holds.expert_columns)),
    ]
    texts = [(name, [text(holds) for holds in row]) for name, text in cells]
    width = max(len(text) for _, row_texts in texts for text in row_texts) + 1
    lines = []
    for name, row_texts in texts:
        if name == "DP rank" and len(set(row_texts)) == 1 and row_texts[0] == "0":
            continue
        lines.append(f"{name:<9}" + "".join(f"{text:^{width}}" for text in row_texts).rstrip())
        if name == "KV heads" and row[0].kv_replicas > 1:
            lines.append(" " * 9 + _brackets(row, width))
    return [*lines, ""]


def _brackets(row: Sequence[RankHolds], width: int) -> str:
    """A bracket under all ranks of one attention-TP group that hold the same KV head."""
    drawn = []
    for _, group in itertools.groupby(row, key=lambda holds: (holds.dp_rank, holds.kv_heads)):
        room = width * len(list(group)) - 1
        text = f" x{row[0].kv_replicas} " if room >= 6 else ""
        drawn.append("└" + f"{text:─^{room - 2}}" + "┘")
    return " ".join(drawn)


def _span(ends: tuple[int, int]) -> str:
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]}-{ends[1]}"


def _show_memory(memory: Memory, report: Report, console: Console) -> None:
    layout, gpu = report.layout, report.gpu
    assert layout is not None
    stage = f" (stage {memory.stage}, the tightest)" if layout.pp > 1 else ""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    total = sum(memory.weights.values())
    kinds = ", ".join(f"{kind} {size / _GIB:.2f}" for kind, size in memory.weights.items())
    table.add_row("weights", f"{total / _GIB:.2f} GiB", kinds)
    table.add_row("KV cache", f"{memory.kv_pool / _GIB:.2f} GiB", f"{memory.kv_bytes_per_token} bytes a token")
    reserve = gpu.memory_mib / 1024 * (1 - memory.fraction)
    table.add_row("reserve", f"{reserve:.2f} GiB", _basis_of_reserve(memory))
    console.print(f"[bold]a GPU[/]{stage} of {gpu.memory_mib / 1024:.1f} GiB")
    console.print(table)
    everywhere = f", {memory.tokens * layout.dp_groups:,} in {layout.dp_groups} groups" if layout.dp_groups > 1 else ""
    console.print(
        f"room for {memory.tokens:,} tokens{everywhere}: {memory.requests * layout.dp_groups} requests of "
        f"{memory.context_length:,} tokens at once" + (" in each server" if layout.servers > 1 else "")
    )
    if memory.requests == 0:
        console.print("[yellow]Not one request of the full context length fits: lower --context-length.[/]")
    console.print(f"[dim]{escape(BASIS)}[/]\n")


def _basis_of_reserve(memory: Memory) -> str:
    given = f"--mem-fraction-static {memory.fraction:.3f}"
    if memory.reserve is None:
        return given
    parts = ", ".join(f"{name} {mib / 1024:.1f}" for name, mib in memory.reserve.parts_mib.items())
    return f"the engine's own estimate, {given}: {parts}"


def _show_paths(report: Report, console: Console) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for path in report.paths:
        table.add_row(path.name, path.taken, f"[dim]{escape(path.why)}[/]")
    console.print(table)


def show_search(candidates: Sequence[Candidate], title: str, limit: int, console: Console) -> None:
    """The best layouts of a search, the model's assumptions and its error against what was measured."""
    console.print(escape(title))
    table = Table(box=None, pad_edge=False)
    for name in ("", "servers", "flags of each"):
        table.add_column(name)
    for name in ("EP", "KV tokens", "batch", "step ms", "HBM", "math", "collectives", "tokens/s in all"):
        table.add_column(name, justify="right")
    for place, candidate in enumerate(candidates[:limit], 1):
        step = candidate.step
        table.add_row(
            str(place), str(candidate.copies), " ".join(candidate.layout.flags.words()), str(candidate.layout.ep),
            f"{candidate.kv_tokens:,}", str(step.batch), f"{step.ms:.2f}", f"{step.memory_ms:.2f}",
            f"{step.arithmetic_ms:.2f}", f"{step.collectives_ms:.2f}", f"{candidate.tokens_per_s:,.0f}",
        )  # fmt: skip
    console.print(table)
    if len(candidates) > limit:
        console.print(f"and {len(candidates) - limit} more valid layouts; --json has all")
    console.print("\n[bold]A model, not a measurement.[/] It assumes:")
    for assumption in ASSUMPTIONS:
        console.print(f"- {assumption}", markup=False)
    console.print(f"\nWhat no launch explains is fitted: {fitted()}.")
    console.print(
        "The model's error on measured steps of ours on H200, 62 layers, with the launches of that time (dummy "
        "weights, whose tokens go to few experts: a step lies between two predictions, and near the first):"
    )
    for error in errors(step for step in MEASURED if step.engine != "stock" and step.num_layers == 62):
        measured = error.measured
        off = "fitted" if measured in FITTED else f"{error.alike:+.0%}"
        console.print(
            f"- {measured.layout}, batch {measured.batch_name}, {measured.input_len} tokens in: "
            f"measured {measured.ms:.2f} ms; all tokens alike {error.alike_ms:.2f} ({off}), even routing "
            f"{error.even_ms:.2f}",
            markup=False,
        )
    largest = "; ".join(f"{kind} {error:+.0%}" for kind, error in largest_errors().items())
    console.print(f"Largest error of all measured steps, stock's too, all tokens alike: {largest}.", markup=False)
