"""The matrix's layouts through the real server, over HTTP. Started by ``matrix.py --servers``.

A server has the flags of a row, and the row's model. It is asked for the five prompts of the matrix in one batch, which
it prefills in chunks; for the same again, now from its prefix cache; and for one alone, which leaves all DP ranks but
one idle. Rows that differ in which rank has which prompt, or when it comes, are one server here: requests go where the
server sends them. Left out are rows in which something is simulated, those of EAGLE3, whose captured states no server
returns (test/gpu/test_reference.py has drafts), and on a CPU pipeline stages, whose scheduler needs CUDA.

Tokens are the server's own, so a number is compared until the two choose different ones, which on a CPU is wrong. An
answer that parts from the reference has the difference at which it did for each step behind it too, so that a prompt
that is wrong from its first token on is a fifth of the numbers. On GPUs a server has CUDA graphs and overlap
scheduling, where the engine does, and several launchers where it has more ranks than there are GPUs.

On GPUs five prompts are few: one at a near tie of the router is a fifth of all numbers, and rounding may tip it over in
the server and not in the reference. A server whose answers are not within half of the tolerance is therefore asked for
four more such sets, each in the same way, and judged by all of them, with a tolerance from all of them. What is wrong
for prompts of one kind, a fifth of the numbers, is a fifth of the numbers then too.

Stock's server of a row, on GPUs, since on a CPU stock has none, is started and asked in the same way.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from layouts.harness import count_gpus
from layouts.matrix import Oracles, Outcome
from layouts.nodes import BESIDE_OTHERS, ON_GPUS, Nodes, answer_of, serve_on_nodes, shared_gpu_environment
from layouts.rows import CHUNK, CPU, ROWS, STEPS, Device, Row

from sglang_minimax import comparison
from sglang_minimax.comparison import Comparison, Tolerance
from sglang_minimax.reference import Completion
from sglang_minimax.server_process import ServerError

START_SECONDS = 420
STOCK_START_SECONDS = 300  # it may hang; beside others 16 ranks take up to 250
# As the engine's log has it, behind the name of what raised it.
_ERROR = re.compile(r"^(?:\[.*?\] )?((?:\w+\.)*\w*(?:Error|Exception)\b.*)")
_LOGGED_AT = re.compile(r"\[(\d{4}-\d\d-\d\d [\d:.]+)[ \]]")
# What a rank or a launcher says when another one is gone.
_CONSEQUENCE = re.compile(
    r"Connection (?:closed|reset|refused)|Broken ?pipe|EOFError|DistBackendError|NCCL|'NoneType' object|CancelledError"
)


def names_of_servers(names: Iterable[str], device: Device) -> list[str]:
    """Of the rows ``names`` the first of each server."""
    first: dict[tuple, str] = {}
    for name in names:
        row = ROWS[name]
        if row.simulation_on(device) is None and not row.captures and (row.pp == 1 or device is not CPU):
            first.setdefault((row.shape, flags_of(row), row.arguments.get("nnodes", 1)), name)
    return list(first.values())


def flags_of(row: Row) -> tuple[str, ...]:
    """The server's flags for a row's layout; how many nodes is not among them."""
    flags = ["--tp", str(row.tp)]
    if row.dp > 1:
        flags += ["--dp", str(row.dp), "--enable-dp-attention"]
    if row.ep > 1:
        flags += ["--ep", str(row.ep)]
    if row.pp > 1:
        flags += ["--pp-size", str(row.pp)]
    for name, value in row.arguments.items():
        if name != "nnodes":
            flags += _flag(name, value)
    return tuple(flags)


def run_server(row: Row, oracles: Oracles, stock: bool = False) -> Outcome:
    """Starts the server of ``row``, asks it, and compares its answers with transformers'.

    Args:
        stock: the engine's own model instead of ours.
    """
    checkpoint, _, completions = oracles.of(row.shape)
    tolerance = oracles.tolerance(row.shape, chosen_only=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="server-") as folder:
        try:
            with _started(row, checkpoint, oracles.device, Path(folder), stock) as server:
                found = _compared(server, oracles.prompts, completions)
                if oracles.device is not CPU and not _well_within(tolerance).accepts(_to_their_ends(found)):
                    more, tolerance = oracles.more(row.shape)
                    for prompts in oracles.more_prompts:
                        found += _compared(server, prompts, more)
        except ServerError as error:
            logs = [log.read_text(errors="replace") for log in sorted(Path(folder).glob("*.log"))]
            ends = [line for log in logs[:2] for line in log.splitlines()[-15:]]
            return Outcome.of_failure([first_error(logs) or str(error).splitlines()[0], *ends])
        except ValueError as error:  # not a number
            return Outcome.of_failure([str(error)])
    seconds = time.monotonic() - started
    judged = _to_their_ends(found)
    differences = [difference for one in judged for difference in one.differences]
    within = comparison.quantile(differences, tolerance.share)
    faults = []
    if not tolerance.accepts(judged):
        faults.append(f"{tolerance.share:.0%} of log-probabilities differ by up to {within:.2e}")
        faults += map(_in_words, found)
    compared = sum(len(one.differences) for one in found)
    return Outcome(max(differences), within, tolerance.limit, compared, seconds, faults)


def _well_within(tolerance: Tolerance) -> Tolerance:
    """Outside it five prompts leave a doubt, whichever side of the limit they are on."""
    return replace(tolerance, limit=tolerance.limit / 2)


def _in_words(one: Comparison) -> str:
    parted = "" if one.same_tokens else f"; another token at step {one.parted_at}"
    return f"{one.answer.prompt}: {', '.join(f'{difference:.1e}' for difference in one.differences)}{parted}"


def _compared(server: Nodes, prompts: list[list[int]], completions: list[Completion]) -> list[Comparison]:
    """All ``prompts`` in one batch, again, and the first alone, each beside the one of ``completions`` that is its own.

    Raises:
        ServerError: the server does not answer.
        ValueError: with something that is no number.
    """
    expected = {str(one.prompt): one for one in completions}
    answers = [
        answer_of(prompt, meta_info)
        for asked in (prompts, prompts, prompts[:1])
        for prompt, meta_info in zip(asked, server.generate(asked, STEPS), strict=True)
    ]
    return [comparison.compare(answer, expected[answer.prompt], [], "") for answer in answers]


def _to_their_ends(found: list[Comparison]) -> list[Comparison]:
    """With a difference for each step: where an answer parted, that of the parting for those behind it."""
    return [
        replace(one, differences=one.differences + one.differences[-1:] * (one.num_steps - len(one.differences)))
        for one in found
    ]


@dataclass(frozen=True)
class Launch:
    """How a server is started.

    flags: of ``sglang.launch_server``, without model, port and nodes.
    nodes: launchers, each of which is told that it is a host of its own.
    gpus_of_node: GPUs that each of several launchers sees, one a rank; 0: all there are.
    """

    flags: list[str]
    nodes: int
    gpus_of_node: int


def first_error(logs: list[str]) -> str | None:
    """The earliest in ``logs``, one a node, of those that are no consequence of another; if all are, of these."""
    found: list[tuple[bool, str, str]] = []
    for log in logs:
        time_of_line = ""
        for text in log.splitlines():
            if logged := _LOGGED_AT.search(text):
                time_of_line = logged[1]
            if error := _ERROR.match(text):
                found.append((_CONSEQUENCE.search(error[1]) is not None, time_of_line, error[1]))
    # Of one second the first as the logs have them: a cause stands before what was raised while it was handled.
    return min(found, key=lambda one: one[:2])[2] if found else None


def launch_of(row: Row, device: Device, gpus: int) -> Launch:
    """``gpus``: of this host."""
    nodes, gpus_of_node = row.arguments.get("nnodes", 1), 0
    # Under DP attention the chunk is divided by the groups.
    flags = [*flags_of(row), "--chunked-prefill-size", str(CHUNK * row.dp), "--max-total-tokens", "4096"]
    if device is CPU:
        return Launch([*flags, "--device", "cpu"], nodes, gpus_of_node)
    flags += [*ON_GPUS, "--disable-piecewise-cuda-graph"]  # these take a while to start
    if row.ranks > gpus or nodes > 1:
        # NCCL wants a GPU a rank of a host. Few nodes start sooner than many.
        nodes = nodes if nodes > 1 and row.ranks // nodes <= gpus else row.ranks // math.gcd(row.ranks, gpus)
        gpus_of_node = row.ranks // nodes
        flags += ["--disable-custom-all-reduce"]  # it is for GPUs that no other rank has
    for name, value in row.on_gpus.items():
        flags += _flag(name, value)
    return Launch(flags, nodes, gpus_of_node)


def environment_of(launch: Launch, rank: int, device: Device, gpus: int, stock: bool = False) -> dict[str, str]:
    """What the launcher of node ``rank`` is given."""
    if device is CPU:
        return {"GLOO_SOCKET_IFNAME": "lo"} if launch.nodes > 1 else {}
    own = BESIDE_OTHERS | {"SGLANG_MINIMAX_OVERLAY": str(int(not stock))}
    return own | (shared_gpu_environment(rank, gpus, launch.gpus_of_node) if launch.gpus_of_node else {})


def _flag(name: str, value: object) -> list[str]:
    """A field of ``ServerArgs`` on the command line."""
    return [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]


@contextlib.contextmanager
def _started(row: Row, checkpoint: Path, device: Device, folder: Path, stock: bool) -> Iterator[Nodes]:
    """The server of ``row``, ready; its logs are in ``folder``.

    Raises:
        ServerError: it does not start.
    """
    gpus = 0 if device is CPU else count_gpus()
    launch = launch_of(row, device, gpus)
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(checkpoint), *launch.flags]
    logs = [folder / f"node{node}.log" for node in range(launch.nodes)]

    def environment(rank: int) -> dict[str, str]:
        return environment_of(launch, rank, device, gpus, stock)

    with serve_on_nodes(command, launch.nodes, logs, environment) as server:
        server.wait_until_ready(STOCK_START_SECONDS if stock else START_SECONDS)
        yield server
