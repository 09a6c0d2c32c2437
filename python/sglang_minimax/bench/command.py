"""``sglang-minimax bench``: the command line of the benchmark."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_minimax.bench import contestants, operators, plots, record, tables
from sglang_minimax.bench.contestants import Contestant
from sglang_minimax.bench.record import CannotBench

SUMMARY = "times whole steps or one operator, beside stock and other engines, on this host"

_EPILOG = """exit code: 0 all was measured, 1 something was not, 2 a question that cannot be answered

examples:
  sglang-minimax bench --model MODEL --layout "--tp 2" --num-layers 16 --compare stock --json out.json
  sglang-minimax bench --model MODEL --layout "--tp 2" --compare stock,peer=VENV --env peer:VARIABLE=1
  sglang-minimax bench --show monday.json tuesday.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, who is, and where the numbers go."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, metavar="FOLDER", help="whole steps of its config.json, with dummy weights")
    what.add_argument("--op", choices=operators.SCRIPTS, help="one operator, by its script in a checkout's benchmark/")
    what.add_argument("--show", type=Path, nargs="+", metavar="JSON", help="tables of earlier runs, side by side")
    who = parser.add_argument_group("contestants; this package is always one")
    who.add_argument(
        "--compare", metavar="NAMES", help="with commas: stock, NAME=VENV, or NAME=FOLDER[:FOLDER...] for PYTHONPATH"
    )
    who.add_argument(
        "--env", action="append", default=[], metavar="[NAME:]VARIABLE=VALUE", help="set for each, or for one"
    )
    who.add_argument(
        "--extra", action="append", default=[], metavar='"[NAME:]--flag ..."', help="engine flags of each, or of one"
    )
    steps = parser.add_argument_group("whole steps")
    steps.add_argument("--layout", default="--tp 1", metavar='"--tp N ..."', help="engine flags (default: --tp 1)")
    steps.add_argument("--device", help="the engine's --device: cpu on a host without a GPU (default: left to it)")
    steps.add_argument("--num-layers", type=int, help="fewer layers than the model has")
    steps.add_argument(
        "--part-of", type=int, default=1, metavar="N",
        help="heads, experts' width and vocabulary divided by N: at --tp 2, with N 2, a rank's shards are TP4's",
    )  # fmt: skip
    steps.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 64], help="(default: 1 16 64)")
    steps.add_argument(
        "--input-len", type=int, nargs="+", default=[128], help="tokens; each with each batch size (default: 128)"
    )
    steps.add_argument("--output-len", type=int, default=34, help="tokens (default: 34)")
    steps.add_argument(
        "--rounds", type=int, default=1,
        help="how often each shape runs in one start; of several rounds the first is a warm-up (default: 1, whose "
        "prefill has compilation in it)",
    )  # fmt: skip
    steps.add_argument("--repeats", type=int, default=1, help="whole runs of each contestant, in turn (default: 1)")
    steps.add_argument(
        "--side-by-side", action="store_true",
        help="load all contestants at once, for which the GPUs must have the memory, and measure one after the other",
    )  # fmt: skip
    steps.add_argument(
        "--timeout", type=float, default=900,
        help="seconds that a run may take; side by side, that loading may take, and then measuring (default: 900)",
    )  # fmt: skip
    steps.add_argument("--logs", type=Path, metavar="FOLDER", help="where logs stay (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write host, versions and all numbers here")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw into this folder; needs matplotlib")


def run(arguments: argparse.Namespace) -> int:
    """Measures or shows, and returns the exit code."""
    # Here, because it takes psutil, which the doctor must do without.
    from sglang_minimax.server_process import Interrupted, Interrupts

    try:
        with Interrupts():
            if arguments.plots:  # a lack of matplotlib is better known before minutes are spent
                plots.check_matplotlib()
            if arguments.show:
                return _show(arguments)
            if arguments.op:
                return _measure_operator(arguments)
            return _measure_model(arguments)
    except CannotBench as error:
        print(f"sglang-minimax bench: {error}", file=sys.stderr)
        return 2
    except Interrupted as interruption:
        return interruption.exit_code


def _show(arguments: argparse.Namespace) -> int:
    records = [record.read(path) for path in arguments.show]
    names = [path.name for path in arguments.show]
    record.check_comparable(records, names)
    _print(records, names)
    for found, path in zip(records, arguments.show, strict=True):
        _draw(found, arguments.plots, path.stem)
    return 0


def _print(records: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    if records[0]["kind"] == "model":
        print("\n".join(tables.render(records, names)))
        return
    for found, name in zip(records, names, strict=True):
        print("\n".join(operators.render(found, name if len(records) > 1 else "")))


def _draw(found: dict[str, Any], folder: Path | None, name: str) -> None:
    if folder is not None:
        plots.draw(found, folder / f"{name}.png")
        print(f"drew {folder / name}.png", file=sys.stderr)


def _measure_operator(arguments: argparse.Namespace) -> int:
    everyone = contestants.parse(arguments.compare, arguments.env, arguments.extra)
    logs = _folder_for_logs(arguments)
    with tempfile.TemporaryDirectory(prefix="sglang-minimax-bench-") as scratch:
        found = operators.measure(arguments.op, everyone, logs, Path(scratch), arguments.timeout)
    if arguments.json:
        record.write(found, arguments.json)
    _print([found], [""])
    _draw(found, arguments.plots, arguments.json.stem if arguments.json else arguments.op)
    return 0


def _folder_for_logs(arguments: argparse.Namespace) -> Path:
    logs: Path = arguments.logs or Path(tempfile.mkdtemp(prefix="sglang-minimax-bench-logs-"))
    logs.mkdir(parents=True, exist_ok=True)
    return logs


def _measure_model(arguments: argparse.Namespace) -> int:
    from sglang_minimax.bench import model_steps

    for option, value in (("--repeats", arguments.repeats), ("--timeout", arguments.timeout)):
        if value < 1:
            raise CannotBench(f"{option} {value} must be at least 1")
    everyone = contestants.parse(arguments.compare, arguments.env, arguments.extra)
    with tempfile.TemporaryDirectory(prefix="sglang-minimax-bench-") as scratch:
        folder = Path(scratch)
        device = ["--device", arguments.device] if arguments.device else []
        flags = (*device, *shlex.split(arguments.layout))
        sizes, lengths = tuple(arguments.batch_sizes), tuple(arguments.input_len)
        work = model_steps.Work(
            folder / "model", flags, sizes, lengths, arguments.output_len, arguments.rounds, arguments.side_by_side
        )
        model = model_steps.prepare_model(arguments.model, work.model, arguments.num_layers, arguments.part_of)
        found = record.new(
            "model", model=model, layout=arguments.layout, device=arguments.device, batch_sizes=list(sizes),
            input_lens=list(lengths), output_len=arguments.output_len, rounds=arguments.rounds,
            repeats=arguments.repeats, side_by_side=arguments.side_by_side, contestants={},
        )  # fmt: skip
        logs = _folder_for_logs(arguments)
        _say(f"the logs are in {logs}")
        entered = [_enter(contestant, work, folder, found) for contestant in everyone]
        runs = model_steps.run_side_by_side if arguments.side_by_side else model_steps.run_one_by_one
        ready = [contestant for contestant in entered if contestant is not None]
        for repeat in range(arguments.repeats):
            starts = {
                one.name: model_steps.Start(work.command(one), one.environment(), logs / f"{one.name}.{repeat}.log")
                for one in ready
            }
            # Closed before anything else is done about an interruption: with it ends all that it started.
            with contextlib.closing(runs(starts, work, arguments.timeout, lambda name: _say(f"{name}: runs"))) as done:
                for name, run in done:
                    found["contestants"][name]["runs"].append(run.as_data())
                    _say(f"{name}: {run.error or 'measured'}, {run.seconds:.0f} s")
                    if arguments.json:  # after each run: what was measured stays whatever becomes of the next
                        record.write(found, arguments.json)
    if arguments.json:  # once more: with nobody to run, nothing was written yet
        record.write(found, arguments.json)
    _print([found], [""])
    failed = any(one["error"] or any(r["error"] for r in one["runs"]) for one in found["contestants"].values())
    if failed:
        print(f"not all was measured; the logs are in {logs}", file=sys.stderr)
    if any(run["batches"] for one in found["contestants"].values() for run in one["runs"]):
        _draw(found, arguments.plots, arguments.json.stem if arguments.json else "decode_steps")
    return 1 if failed else 0


def _enter(contestant: Contestant, work: Any, folder: Path, found: dict[str, Any]) -> Contestant | None:
    """Looks into the contestant's environment and enters it into the record; None if it cannot run."""
    facts: dict[str, Any] = {"versions": None, "error": None, "runs": [], "variables": dict(contestant.variables)}
    found["contestants"][contestant.name] = facts
    facts["command"] = shlex.join(work.command(contestant, model="MODEL"))
    try:
        contestant, inside = contestants.inspect(contestant, folder / "hook")
    except CannotBench as error:
        facts["error"] = str(error)
        return None
    facts.update(inside)
    return contestant


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
