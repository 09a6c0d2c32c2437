"""Whole steps: one contestant's run of the engine's own ``bench_one_batch`` in a child, and what its log says.

The weights are dummies, so a folder with nothing but ``config.json`` will do. The steps are read from the log and not
from the tool's result file: that has medians only, and nothing at all when the last batch size fails.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sglang_minimax.bench import record
from sglang_minimax.bench.contestants import Contestant
from sglang_minimax.bench.record import CannotBench, Shape
from sglang_minimax.checkpoints import SmallModel, write_tokenizer
from sglang_minimax.server_process import SessionProcess

TOOL = "sglang.bench_one_batch"
TURNS, TURN_VARIABLE = Path(__file__).with_name("turns.py"), "SGLANG_MINIMAX_BENCH_TURN"
SMALLEST_VOCABULARY = 10_000  # the tool draws its prompts' tokens from so many, whatever the model has

_COPIED = ("*.json", "*.jinja", "*.model", "*.py", "*.txt")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_LARGEST_COPIED_BYTES = 64 * 2**20
_SHARES_GPUS = {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}  # others load meanwhile, not on all GPUs at once
_GRACE_SECONDS = 10.0  # for what a failing rank and its peers still have to say
_POLL_SECONDS = 0.2


# ------------------------------------------------------------------------------------------------ model


_SHARDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
"""What TP divides, by its name in the config."""


def prepare_model(model: Path, folder: Path, num_layers: int | None, part_of: int = 1) -> dict[str, Any]:
    """Copies the config and, if there is one, the tokenizer of ``model`` into ``folder``, without weights.

    Where there is no tokenizer a small one is written: the tool loads it and encodes nothing.

    Args:
        num_layers: hidden layers of the copy; None leaves them.
        part_of: divides what TP divides, so that fewer GPUs hold the shards of a wider TP and do the work of its ranks,
            all but the exchange with the ranks that are not there.

    Returns:
        ``name``, and ``changes``: in words, what of the config is not the model's.

    Raises:
        CannotBench: no ``config.json``, a number of layers that the model does not have, or a part that is not whole.
    """
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CannotBench(
            f"--model {model} must be a folder with a config.json ({error}). Download that file, or write a small "
            f"model with `python -m sglang_minimax.checkpoints FOLDER`"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    for file in (file for pattern in _COPIED for file in model.glob(pattern)):
        if file.stat().st_size <= _LARGEST_COPIED_BYTES and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    changes = []
    layers = config.get("num_hidden_layers")
    if num_layers is not None and num_layers != layers:
        if not 1 <= num_layers <= (layers or 0):
            raise CannotBench(f"--num-layers {num_layers} must be from 1 to the model's {layers}")
        config["num_hidden_layers"] = num_layers
        changes.append(f"{num_layers} of {layers} layers")
    if part_of != 1:
        uneven = [f"{name} {config.get(name)}" for name in _SHARDED if part_of < 1 or (config.get(name) or 0) % part_of]
        if uneven:
            raise CannotBench(f"--part-of {part_of} must divide {', '.join(uneven)}")
        config.update({name: config[name] // part_of for name in _SHARDED})
        changes.append(f"heads, experts' width and vocabulary divided by {part_of}")
    vocabulary = config.get("vocab_size") or 0
    if vocabulary < SMALLEST_VOCABULARY:
        config["vocab_size"] = SMALLEST_VOCABULARY
        changes.append(f"vocabulary of {SMALLEST_VOCABULARY} instead of {vocabulary}, which {TOOL} needs")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        write_tokenizer(folder, SmallModel.vocab_size)
    return {"name": model.resolve().name, "changes": changes}


# -------------------------------------------------------------------------------------------------- log


@dataclass
class Batch:
    """Milliseconds of each prefill and of each decode step."""

    prefill_ms: list[float] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)

    def add(self, other: Batch) -> None:
        self.prefill_ms += other.prefill_ms
        self.decode_ms += other.decode_ms


class StepLog:
    """Reads the tool's log line by line; what comes before the measurement proper is its warm-up.

    Args:
        shapes: what is asked, in the tool's order, once a round: a line names the batch size at most. Errors are found
            without.
        warm_ups: how many of the shapes, from the first, are not counted.

    Attributes:
        batches: those that ran to their end.
        skipped: those that the tool left out because the KV cache holds fewer tokens.
        rank_died: whether a rank ended with an error, after which the others may wait for it without end.
    """

    _SECONDS = r"latency:\s+([\d.]+) s"
    _PREFILL = re.compile(rf"Prefill\. {_SECONDS}")
    _STEP = re.compile(rf"Decode \d+\. Batch size: \d+, {_SECONDS}")
    _SKIPPED = re.compile(r"skipping \(\d+, \d+, \d+\)")
    _RANK_DIED = re.compile(r"\bProcess \w*Process-\d[\d:]*:\s*$")
    _ERROR = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception)\b(?:: .*)?)$")
    _FOLLOWS = ("KeyboardInterrupt", "BrokenPipeError", "EOFError", "CancelledError")

    def __init__(self, shapes: Sequence[Shape] = (), warm_ups: int = 0) -> None:
        self.batches: dict[Shape, Batch] = {}
        self.skipped: list[Shape] = []
        self.rank_died = False
        self._next = iter([None] * warm_ups + list(shapes[warm_ups:]))  # None: not counted
        self._measures = False
        self._shape: Shape | None = None
        self._batch = Batch()
        self._last_error = self._last_line = ""
        self._first_of_ranks: str | None = None

    def read(self, line: str) -> None:
        """Takes in one line."""
        if line.strip():
            self._last_line = line.strip()
        if "Benchmark ..." in line:
            self._measures = True
        elif not self._measures:
            pass
        elif found := self._PREFILL.search(line):
            self._shape, self._batch = next(self._next, None), Batch([float(found[1]) * 1000])
        elif found := self._STEP.search(line):
            self._batch.decode_ms.append(float(found[1]) * 1000)
        elif "Total. latency" in line and self._shape is not None:
            self.batches.setdefault(self._shape, Batch()).add(self._batch)
            self._shape = None
        elif self._SKIPPED.search(line):
            self.skipped.extend(shape for shape in itertools.islice(self._next, 1) if shape is not None)
        if self._RANK_DIED.search(line):
            self.rank_died = True
        elif (found := self._ERROR.search(line)) and not found[1].startswith(self._FOLLOWS):
            self._last_error = found[1]
            if self.rank_died and self._first_of_ranks is None:
                self._first_of_ranks = found[1]

    def error(self) -> str:
        """The error of the rank that died first, the last line that is an error's, or else the last line.

        The other ranks' errors, of a connection that was lost, come later and say less.
        """
        return self._first_of_ranks or self._last_error or self._last_line or "it wrote nothing"


# -------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class Work:
    """What every contestant is asked to do. Lengths are in tokens; each batch size meets each input length, each round.

    model: the folder of :func:`prepare_model`.
    flags: engine flags of all: device and layout.
    side_by_side: the command waits for its turn, for :func:`run_side_by_side`.
    """

    model: Path
    flags: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    input_lens: tuple[int, ...]
    output_len: int
    rounds: int = 1
    side_by_side: bool = False

    def __post_init__(self) -> None:
        for option, values in (("--batch-sizes", self.batch_sizes), ("--input-len", self.input_lens)):
            if not values or min(values) < 1 or len(set(values)) != len(values):
                raise CannotBench(f"{option} {' '.join(map(str, values))} must differ and be at least 1")
        if self.output_len < 2:
            raise CannotBench(f"--output-len {self.output_len} must be at least 2: the first token is the prefill's")
        if self.rounds < 1:
            raise CannotBench(f"--rounds {self.rounds} must be at least 1")

    @property
    def shapes(self) -> list[Shape]:
        """What is measured, in the tool's order of one round."""
        return [Shape(*one) for one in itertools.product(self.batch_sizes, self.input_lens)]

    def new_log(self) -> StepLog:
        """A reader of the tool's log. The first of several rounds compiles and tunes, and is not counted."""
        return StepLog(self.shapes * self.rounds, warm_ups=len(self.shapes) if self.rounds > 1 else 0)

    def command(self, contestant: Contestant, model: str | None = None) -> list[str]:
        """The child's command; ``model`` stands in for the folder where a record must not name it."""
        tool = ("-m", TOOL) if not self.side_by_side else (TURNS.name if model else str(TURNS),)
        return [
            contestant.python if model is None else "python", *tool,
            "--model-path", model or str(self.model), "--load-format", "dummy", *self.flags,
            "--batch-size", *map(str, self.batch_sizes * self.rounds), "--input-len", *map(str, self.input_lens),
            "--output-len", str(self.output_len), "--log-decode-step", "1", "--result-filename", "",
            *contestant.flags,
        ]  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run: seconds in all, the batches that were measured, what went wrong if not all were, the GPUs' clocks."""

    seconds: float
    batches: dict[Shape, Batch]
    error: str | None
    clocks_before: list[dict[str, str]]
    clocks_after: list[dict[str, str]]

    def as_data(self) -> dict[str, Any]:
        """The run as a record has it; milliseconds."""
        return {"seconds": round(self.seconds, 1), "error": self.error, "batches": {
            str(shape): {name: [round(ms, 5) for ms in samples] for name, samples in asdict(one).items()}
            for shape, one in self.batches.items()
        }, "clocks_before": self.clocks_before, "clocks_after": self.clocks_after}  # fmt: skip


@dataclass(frozen=True)
class Start:
    """How a contestant's run begins: its command, what is added to the environment, and where its log goes."""

    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path


class _Running:
    """A run that goes on. Use it as a context manager, which ends it with all its ranks."""

    def __init__(self, start: Start, work: Work) -> None:
        self.work, self.steps, self.started = work, work.new_log(), time.monotonic()
        self.deadline, self.timed_out_after = float("inf"), 0.0
        self.clocks_before: list[dict[str, str]] = []
        self.process = SessionProcess(start.command, start.log, environment=start.environment)

    def __enter__(self) -> _Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stop()

    def goes_on(self) -> bool:
        """Reads its log. False once it has ended, is past its deadline, or a rank died and the others had their say."""
        died_before = self.steps.rank_died
        for line in self.process.new_lines():
            self.steps.read(line)
        if self.steps.rank_died and not died_before:
            self.deadline = min(self.deadline, time.monotonic() + _GRACE_SECONDS)
        return not self.process.has_ended() and time.monotonic() <= self.deadline

    def limit(self, seconds: float) -> None:
        """Gives it ``seconds`` from now on."""
        if not self.steps.rank_died:
            self.deadline, self.timed_out_after = time.monotonic() + seconds, seconds

    def measure(self, timeout_seconds: float) -> Run:
        """Lets it run to its end, or to the end of this time."""
        self.clocks_before = record.clocks()
        self.limit(timeout_seconds)
        while self.goes_on():
            time.sleep(_POLL_SECONDS)
        return self.finish()

    def finish(self) -> Run:
        """Ends it, if it has not ended."""
        clocks_after = record.clocks()  # at once, before its session is searched for what is left
        ended, exit_code = self.process.has_ended(), 0
        for line in self.process.new_lines():
            self.steps.read(line)
        self.process.stop()
        if ended:
            exit_code = self.process.wait(timeout_seconds=0)
        steps, error = self.steps, None
        if missing := [shape for shape in self.work.shapes if shape not in steps.batches]:
            if not ended and not steps.rank_died:
                limit = f"{self.timed_out_after:.0f} s (--timeout)"
                error = f"no end after {limit}; the last line is: {steps.error()}"
            elif set(missing) <= set(steps.skipped):
                error = (
                    "the KV cache holds fewer tokens: lower --batch-sizes or --input-len, or raise --max-total-tokens"
                )
            elif exit_code < 0:
                error = f"ended by signal {-exit_code}; the last line is: {steps.error()}"
            else:
                error = steps.error()
        return Run(time.monotonic() - self.started, steps.batches, error, self.clocks_before, clocks_after)


def run_one_by_one(
    starts: Mapping[str, Start], work: Work, timeout_seconds: float, on_turn: Callable[[str], None]
) -> Generator[tuple[str, Run], None, None]:
    """Runs the tool for each to its end, or ends it with all its ranks: after ``timeout_seconds``, or if one has died.

    Args:
        starts: by name.
        on_turn: called with each name before it runs.
    """
    for name, start in starts.items():
        on_turn(name)
        with _Running(start, work) as running:
            yield name, running.measure(timeout_seconds)


def run_side_by_side(
    starts: Mapping[str, Start], work: Work, timeout_seconds: float, on_turn: Callable[[str], None]
) -> Generator[tuple[str, Run], None, None]:
    """Loads all at once and measures one after the other, while the others sleep: see ``turns.py``.

    Args:
        starts: by name; with the commands of a ``Work`` that is side by side.
        timeout_seconds: what each may take until it is ready, and for its turn.
        on_turn: called with each name before it is measured.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sglang-minimax-turns-")))
        everyone: dict[str, _Running] = {}
        for name, start in starts.items():
            environment = {**start.environment, TURN_VARIABLE: str(folder / name), **_SHARES_GPUS}
            everyone[name] = stack.enter_context(_Running(replace(start, environment=environment), work))
            everyone[name].limit(timeout_seconds)

        def is_ready(name: str) -> bool:
            return (folder / f"{name}.ready").exists()

        while any(running.goes_on() and not is_ready(name) for name, running in everyone.items()):
            time.sleep(_POLL_SECONDS)
        ready = [name for name in everyone if is_ready(name)]
        for name in everyone.keys() - set(ready):  # first, so that they are gone while the others are measured
            yield name, everyone[name].finish()
        for name in ready:
            on_turn(name)
            (folder / f"{name}.turn").touch()
            yield name, everyone[name].measure(timeout_seconds)
