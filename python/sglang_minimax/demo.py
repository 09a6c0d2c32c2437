"""Shows on this machine that the real server answers as the reference does; ``scripts/demo.sh`` calls it.

    python -m sglang_minimax.demo [--tp N] [--dp N] [--ep N] [--model-path CHECKPOINT]

It writes a small MiniMax-M2 checkpoint, decodes a few prompts with transformers, starts
``python -m sglang.launch_server`` at the widest layout of this host, asks it through ``/generate`` and
``/v1/completions``, and once more with ``--enable-dp-attention``. The exit code is 0 only if all answers agree.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sglang_minimax import comparison
from sglang_minimax.checkpoints import SmallModel, write_checkpoint
from sglang_minimax.comparison import Answer, Comparison, Tolerance
from sglang_minimax.demo_layouts import Host, Layout, ModelShape, choose_layouts
from sglang_minimax.ports import free_port, port_flags
from sglang_minimax.reference import Completion
from sglang_minimax.server_process import (
    Interrupted,
    Interrupts,
    RankProgress,
    Server,
    ServerError,
    SessionProcess,
)

PROMPTS = (
    "Once upon a time",
    "A router sends every token to a few of its experts, and",
    "def main():",
    "The answer is 42",
    "It was a dark and stormy night, and the heads did not agree on what came before",
    "Äpfel, 東京, 🚀",
    "Two ranks met in a ring",
    "import torch",
    "The quick brown fox",
    "Dear Sir or Madam, the eighth of sixteen ranks writes to",
    "1, 2, 3, 5, 8, 13,",
    "No",
)
MAX_NEW_TOKENS = 16
START_SECONDS = 600.0
ANSWER_SECONDS = 300.0

# A terminal has a width of its own; a file or a CI log takes one in which the tables are easy to read.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)


RunningT = TypeVar("RunningT", bound=SessionProcess)


class CannotRun(Exception):
    """The demo cannot run as asked; the message says why and what to do instead."""


# ------------------------------------------------------------------------------------------ host and model


def look_at_host() -> Host:
    """This host's GPUs and free memory. Asks torch in a child process, so that no CUDA context stays here."""
    count = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
        capture_output=True,
        text=True,
        check=True,
    )
    return Host(num_gpus=int(count.stdout.split()[-1]), free_memory_gb=free_memory_gb())


def free_memory_gb() -> float:
    """GB (10^9 bytes) that new processes can use: of the machine, and of this container if it has a limit."""
    free = [psutil.virtual_memory().available]
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free.append(limit - used + int(statistics["inactive_file"]))  # page cache is given back on demand
    return float(min(free)) / 1e9


def read_model(checkpoint: Path) -> tuple[ModelShape, str]:
    """The shape and dtype that a checkpoint's ``config.json`` states.

    Raises:
        CannotRun: there is no config, it is another architecture's, or the checkpoint is quantised.
    """
    try:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise CannotRun(f"--model-path {checkpoint} must be a folder with a config.json: {error}") from error
    if config.get("model_type") != "minimax_m2":
        raise CannotRun(f"--model-path {checkpoint} is a {config.get('model_type')} model, not minimax_m2")
    if config.get("quantization_config"):
        raise CannotRun(
            f"--model-path {checkpoint} is quantised, and the reference needs the unquantised weights. "
            f"Serve it with `python -m sglang.launch_server --model-path {checkpoint} ...`"
        )
    size_gb = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) / 1e9
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    in_float32_gb = size_gb * (1 if dtype == "float32" else 2)
    if in_float32_gb > free_memory_gb():
        raise CannotRun(
            f"the reference computes {checkpoint} in float32, which takes {in_float32_gb:.0f} GB where "
            f"{free_memory_gb():.0f} GB are free. Take a smaller checkpoint, or a larger machine"
        )
    shape = ModelShape(
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        num_experts=config["num_local_experts"],
        expert_width=config["intermediate_size"],
        weights_gb=size_gb,
    )
    return shape, dtype


# ----------------------------------------------------------------------------------------------- reference


class ReferenceRuns:
    """Runs ``sglang_minimax.reference`` in a child process and reads its answer."""

    def __init__(self, checkpoint: Path, folder: Path, interrupts: Interrupts) -> None:
        self._checkpoint, self._folder, self._interrupts = checkpoint, folder, interrupts

    def ask(self, request: dict[str, Any], *, dtype: str) -> list[Completion]:
        question, reply = self._folder / "request.json", self._folder / "reply.json"
        log = self._folder / "reference.log"
        question.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "sglang_minimax.reference"]
        command += ["--model-path", str(self._checkpoint), "--dtype", dtype]
        with running(self._interrupts, lambda: SessionProcess(command, log, stdin=question, stdout=reply)) as child:
            code = child.wait(ANSWER_SECONDS)
        if code != 0:
            raise ServerError(f"the reference ended with code {code}:\n{log.read_text()[-2000:]}")
        return [Completion(**entry) for entry in json.loads(reply.read_text())]


@contextlib.contextmanager
def running(interrupts: Interrupts, start: Callable[[], RunningT]) -> Iterator[RunningT]:
    """A :class:`SessionProcess` that is ended whatever happens: no signal comes between its start and our care."""
    with contextlib.ExitStack() as stack:
        with interrupts.deferred():
            process = start()
            stack.callback(_stop_undisturbed, interrupts, process)
        yield process


def _stop_undisturbed(interrupts: Interrupts, process: SessionProcess) -> None:
    with interrupts.deferred():
        process.stop()


# ------------------------------------------------------------------------------------------------- server


def server_command(checkpoint: Path, layout: Layout, port: int) -> list[str]:
    """The command a person would type, with a KV cache no larger than the demo needs."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(checkpoint)]
    command += [*layout.flags(), "--host", "127.0.0.1", *port_flags(port)]
    return [*command, "--max-total-tokens", "8192"]


def ask_generate(server: Server, prompts: Sequence[str]) -> list[Answer]:
    """All ``prompts`` in one request to the engine's own ``/generate``."""
    sampling = {"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS, "ignore_eos": True}
    body = {"text": list(prompts), "sampling_params": sampling, "return_logprob": True}
    replies = server.post("/generate", body, timeout_seconds=ANSWER_SECONDS)
    answers = []
    for prompt, reply in zip(prompts, replies, strict=True):
        steps = reply["meta_info"]["output_token_logprobs"]  # [log-probability, token id, text or None] each
        answers.append(Answer(prompt, reply["text"], [step[1] for step in steps], [step[0] for step in steps]))
    return answers


def ask_completions(server: Server, prompts: Sequence[str]) -> list[Answer]:
    """All ``prompts`` in one request to the OpenAI-compatible ``/v1/completions``, which gives no token ids."""
    body = {
        "model": "default",
        "prompt": list(prompts),
        "max_tokens": MAX_NEW_TOKENS,
        "temperature": 0,
        "logprobs": 1,
        "ignore_eos": True,
    }
    reply = server.post("/v1/completions", body, timeout_seconds=ANSWER_SECONDS)
    choices = sorted(reply["choices"], key=lambda choice: choice["index"])
    return [
        Answer(prompt, choice["text"], choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"])
        for prompt, choice in zip(prompts, choices, strict=True)
    ]


@dataclass(frozen=True)
class Expected:
    """The reference's completion of each prompt, with the texts of its tokens."""

    completions: list[Completion]
    token_texts: list[list[str]]
    texts: list[str]

    def compare(self, answers: Sequence[Answer]) -> list[Comparison]:
        """Compares answers to the first ``len(answers)`` prompts."""
        return [
            comparison.compare(answer, completion, token_texts, text)
            for answer, completion, token_texts, text in zip(
                answers, self.completions, self.token_texts, self.texts, strict=False
            )
        ]


def tokenize(checkpoint: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)


# -------------------------------------------------------------------------------------------------- demo


class Demo:
    """One run: the reference first, then a server a layout, each compared with it."""

    def __init__(self, options: argparse.Namespace, folder: Path, interrupts: Interrupts) -> None:
        self.options, self.folder, self.interrupts = options, folder, interrupts

    def run(self) -> bool:
        """Whether every answer of every layout agreed with the reference."""
        host = look_at_host()
        checkpoint = self.options.model_path or self._write_checkpoint(host)
        shape, dtype = read_model(checkpoint)
        plan = choose_layouts(host, shape, tp=self.options.tp, dp=self.options.dp, ep=self.options.ep)
        for note in plan.notes:
            console.print(f"[yellow]{escape(note)}[/]")
        expected, tolerance = self._ask_reference(checkpoint, dtype, host)
        verdicts = [self._try_layout(checkpoint, layout, expected, tolerance) for layout in plan.layouts]
        agreed = all(verdicts)
        console.rule("[green]all layouts agree with the reference" if agreed else "[red]NOT all agree")
        return agreed

    def _write_checkpoint(self, host: Host) -> Path:
        # Float32 leaves only the order of summation between the two; the engine's GPU kernels want bfloat16.
        model = SmallModel(dtype="bfloat16" if host.num_gpus else "float32")
        console.print(
            f"[bold]checkpoint[/]  MiniMax-M2 with random weights: {model.num_hidden_layers} layers, "
            f"{model.num_attention_heads} heads, {model.num_key_value_heads} KV heads, "
            f"{model.num_local_experts} experts, {model.dtype}"
        )
        return write_checkpoint(self.folder / "checkpoint", model)

    def _ask_reference(self, checkpoint: Path, dtype: str, host: Host) -> tuple[Expected, Tolerance]:
        since = time.monotonic()
        tokenizer = tokenize(checkpoint)
        prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
        reference = ReferenceRuns(checkpoint, self.folder, self.interrupts)
        request = {"prompts": prompts, "max_new_tokens": MAX_NEW_TOKENS, "top_k": 2}
        completions = reference.ask(request, dtype="float32")
        if dtype == "float32" and not host.num_gpus:
            tolerance = comparison.exact()
        else:  # on a GPU float32 matrices are multiplied in TF32, which rounds no finer than bfloat16 by much
            tokens = [completion.tokens for completion in completions]
            rounded = reference.ask({"prompts": prompts, "continuations": tokens}, dtype="bfloat16")
            tolerance = comparison.from_rounding(completions, rounded, "bfloat16")
        console.print(
            f"[bold]reference[/]   transformers, float32, {len(prompts)} prompts, {MAX_NEW_TOKENS} tokens each: "
            f"{time.monotonic() - since:.1f} s"
        )
        console.print(f"[bold]tolerance[/]   {tolerance.limit:.3g} ({tolerance.why})")
        token_texts = [[tokenizer.decode([token]) for token in one.tokens] for one in completions]
        texts = [tokenizer.decode(one.tokens, skip_special_tokens=True) for one in completions]
        return Expected(completions, token_texts, texts), tolerance

    def _try_layout(self, checkpoint: Path, layout: Layout, expected: Expected, tolerance: Tolerance) -> bool:
        console.rule(f"[bold]{layout}")
        port, log, since = free_port(), self.folder / f"server-{layout.slug()}.log", time.monotonic()
        command = server_command(checkpoint, layout, port)
        console.print("[dim]python " + escape(" ".join(command[1:])), soft_wrap=True)

        def show(progress: RankProgress) -> None:
            console.print(
                f"  {time.monotonic() - since:5.1f} s  rank {progress.tp_rank:2d} {progress.stage:9} "
                f"({progress.reached} of {layout.tp})"
            )

        # Where rounding may tip a router's choice over, the numbers of one prompt are too few to judge by.
        alone = PROMPTS[:1] if tolerance.share == 1 else PROMPTS
        with running(self.interrupts, lambda: Server(command, log, port=port)) as server:
            server.wait_until_ready(START_SECONDS, show)
            console.print(f"  {time.monotonic() - since:5.1f} s  server ready, answering")
            asked = {
                "/generate, all prompts at once": ask_generate(server, PROMPTS),
                # One prompt alone leaves the other DP ranks idle, and they must still join every collective.
                "/generate, one prompt at a time": [one for prompt in alone for one in ask_generate(server, [prompt])],
                "/v1/completions, all prompts at once": ask_completions(server, PROMPTS),
            }
            console.print(f"  {time.monotonic() - since:5.1f} s  answered")
        console.print(f"  {time.monotonic() - since:5.1f} s  server stopped, no process left")
        return all([report(title, expected.compare(answers), tolerance) for title, answers in asked.items()])


def report(title: str, comparisons: Sequence[Comparison], tolerance: Tolerance) -> bool:
    """Prints the answers beside the reference's, with differences of log-probabilities; whether they agree."""
    table = Table(title=title, title_justify="left")
    for column in ("prompt", "server", "transformers"):
        table.add_column(column, overflow="fold", ratio=1)
    table.add_column("same tokens", justify="right")
    table.add_column("largest difference", justify="right")
    for one in comparisons:
        same = one.num_steps if one.parted_at is None else one.parted_at
        cells = (repr(text) for text in (one.answer.prompt, one.answer.text, one.expected_text))
        table.add_row(*map(escape, cells), f"{same}/{one.num_steps}", f"{one.largest:.2e}")
    console.print(table)
    agreed = tolerance.accepts(comparisons)
    differences = [difference for one in comparisons for difference in one.differences]
    within = comparison.quantile(differences, tolerance.share)
    largest = "" if tolerance.share == 1 else f"; the largest by {max(differences):.2e}"
    console.print(
        f"  {'[green]agrees' if agreed else '[red]DOES NOT AGREE'}[/]: {tolerance.share:.0%} of log-probabilities "
        f"differ by at most {within:.2e}, where {tolerance.limit:.3g} is allowed{largest}\n"
    )
    return agreed


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/demo.sh",
        description="Starts the real server on a MiniMax-M2 checkpoint and compares its answers with transformers'.",
    )
    parser.add_argument("--tp", type=int, help="tensor-parallel ranks (default: the widest that fits)")
    parser.add_argument("--dp", type=int, help="DP ranks of the run with DP attention (default: 2)")
    parser.add_argument("--ep", type=int, help="expert-parallel ranks (default: the engine's choice)")
    parser.add_argument("--model-path", type=Path, help="a checkpoint to take instead of a small random one")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo. 0: all agree; 1: they do not, or something failed; 128 + n: ended by signal n."""
    options = parse_arguments(arguments)
    folder = Path(tempfile.mkdtemp(prefix="sglang-minimax-demo-"))
    code = 1
    try:
        with Interrupts() as interrupts:
            code = 0 if Demo(options, folder, interrupts).run() else 1
    except Interrupted as interruption:
        console.print(f"\n[yellow]{interruption}; every process of the demo has ended")
        code = interruption.exit_code
    except (CannotRun, ServerError, OSError, ValueError) as error:
        console.print(f"[red]{escape(str(error))}")
    _clean_up(folder, keep_logs=code == 1)
    return code


def _clean_up(folder: Path, *, keep_logs: bool) -> None:
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    if keep_logs and any(folder.glob("*.log")):
        console.print(f"The logs are in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
