"""The self-check of QK norm: a rank on every GPU, or two on the CPU, against plain torch."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sglang_minimax import ports, sharding
from sglang_minimax.doctor import child
from sglang_minimax.doctor.facts import Facts
from sglang_minimax.doctor.finding import Finding
from sglang_minimax.doctor.rank import HEADS, KV_HEADS, PREFIX, STAGES

CPU_RANKS = 2
PATH, SELF_CHECK = "QK norm path", "QK norm self-check"

_OUTPUT_LINES = 20
_AGAIN = "NCCL_DEBUG=INFO sglang-minimax doctor --json --timeout 600"
_SAFE_PATH = "python -m sglang.launch_server --model-path MiniMaxAI/MiniMax-M2.5 --disable-custom-all-reduce"
# Where the person set nothing. A server sets the first two alike for its ranks. Nothing here uses multicast, and to set
# it up is one more thing that may fail.
_ENVIRONMENT = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


@dataclass(frozen=True)
class Rank:
    """What one rank answered.

    place: its GPU as torch numbers them, None on the CPU. stage: the last one it reached, of ``rank.STAGES``.
    path: what the model would take. results: for each operation and shape the worst error, 1 being the tolerance.
    failure: why it has no answer. hung: it was ended when the time was up, or soon after another rank had failed.
    output: the end of what it wrote, where it has no answer.
    """

    rank: int
    place: int | None
    stage: str | None = None
    device: str = ""
    path: str | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None
    hung: bool = False
    output: list[str] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """The largest error of all, as a share of the tolerance."""
        return max((float(result["worst"]) for result in self.results), default=0.0)

    @property
    def name(self) -> str:
        return f"rank {self.rank}" + (
            f" (GPU {self.place})" if self.place is not None and self.place != self.rank else ""
        )

    def as_data(self) -> dict[str, Any]:
        return {**asdict(self), "worst": self.worst}


@dataclass(frozen=True)
class SelfCheck:
    """What came of it: the findings of the path and of the check, and all ranks."""

    findings: list[Finding]
    ranks: list[Rank] = field(default_factory=list)


def run(facts: Facts, timeout_seconds: float) -> SelfCheck:
    """Starts the ranks and judges them; ``timeout_seconds`` is the limit of each group of ranks."""
    if reason := reason_against(facts):
        return SelfCheck([Finding(name, "not applicable", reason) for name in (PATH, SELF_CHECK)])
    num_gpus = len(facts.torch.gpus)
    ranks: list[Rank] = []
    for places in groups_of(num_gpus) if num_gpus else [[None] * CPU_RANKS]:
        ranks += run_group(places, num_gpus, facts.host.visible_devices, timeout_seconds)
        if any(rank.failure for rank in ranks):
            break
    return SelfCheck([judge_path(ranks), judge(ranks)], ranks)


def reason_against(facts: Facts) -> str | None:
    """Why there is nothing to check, as a clause, or None."""
    if facts.engine.failure or facts.engine.version is None:
        return "there is no engine"
    if not facts.engine.laid_over:
        return "the overlay is not active, and stock has another QK norm"
    if facts.torch.failure:
        return "torch cannot be imported"
    if not facts.torch.gpus and not facts.host.has_no_accelerator:
        return "there is a driver and torch sees no GPU; see GPUs"
    if facts.devices is not None and facts.devices.failure:
        return "the GPUs cannot be used; see GPUs"
    return None


def groups_of(num_gpus: int) -> list[list[int | None]]:
    """Groups of GPUs, of one size that the heads can be divided over, that cover all: 6 are 0 to 3 and 2 to 5."""
    size = next(size for size in range(num_gpus, 0, -1) if _divides(size))
    starts = list(range(0, num_gpus - size + 1, size))
    if starts[-1] + size < num_gpus:
        starts.append(num_gpus - size)
    return [list(range(start, start + size)) for start in starts]


def _divides(size: int) -> bool:
    try:
        sharding.shard_attention(HEADS, KV_HEADS, size)
    except ValueError:
        return False
    return True


def run_group(
    places: Sequence[int | None], num_gpus: int, visible_devices: str | None, timeout_seconds: float
) -> list[Rank]:
    """One process a rank; ``places`` are their GPUs as torch numbers them, or None."""
    environment = {name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()}
    device_type = "cpu" if places[0] is None else "cuda"
    if device_type == "cuda" and len(places) < num_gpus:
        # The engine takes rank 0 to be on the first visible GPU.
        visible = (visible_devices or ",".join(map(str, range(num_gpus)))).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[place] for place in places if place is not None)
    shared = (len(places), ports.free_port(), device_type, secrets.randbits(31), timeout_seconds + 60)
    commands = [child.python("sglang_minimax.doctor.rank", *map(str, (rank, *shared))) for rank in range(len(places))]
    return run_ranks(commands, places, timeout_seconds, environment)


def run_ranks(
    commands: Sequence[Sequence[str]],
    places: Sequence[int | None],
    timeout_seconds: float,
    environment: dict[str, str] | None = None,
) -> list[Rank]:
    """Runs one command a rank and reads what each told."""
    ended = child.run_together(commands, timeout_seconds, environment, end_all_if_one_fails=True)
    return [read_rank(rank, place, one) for rank, (place, one) in enumerate(zip(places, ended, strict=True))]


def read_rank(rank: int, place: int | None, ended: child.Ended) -> Rank:
    """The lines that the rank told, put together."""
    told: dict[str, Any] = {}
    for line in ended.stdout.splitlines():
        if line.startswith(PREFIX):
            told.update(json.loads(line[len(PREFIX) :]))
    failure = ended.failure
    if failure is None and told.get("stage") != STAGES[-1]:
        failure = "it ended without an answer"
    output = (ended.stdout + ended.stderr).splitlines()[-_OUTPUT_LINES:] if failure else []
    return Rank(rank, place, **{**told, "failure": failure, "hung": ended.exit_code is None, "output": output})


def judge_path(ranks: Sequence[Rank]) -> Finding:
    """Which path the model takes: what the ranks said, which must be one thing."""
    paths = {rank.path for rank in ranks if rank.path is not None}
    if not paths:
        return Finding(PATH, "error", f"no rank came as far as choosing one; see {SELF_CHECK}", _AGAIN)
    if len(paths) > 1:
        said = "; ".join(f"{rank.name}: {rank.path}" for rank in ranks)
        return Finding(PATH, "error", f"the ranks chose differently, and would wait for each other: {said}", _SAFE_PATH)
    return Finding(PATH, "ok", f"{paths.pop()}, with {_how_many(ranks)}")


def judge(ranks: Sequence[Rank]) -> Finding:
    """Every rank's answer. A rank that failed is named before those that it left waiting, and so is one that hangs."""
    failed = [rank for rank in ranks if rank.failure]
    if failed:
        blamed = to_blame(failed)
        names = ", ".join(rank.name for rank in blamed)
        reached = f"after it {_words(blamed[0].stage)}" if blamed[0].stage else "before it began"
        what = f"{names} failed {reached}: {blamed[0].failure}"
        if len(failed) > len(blamed):
            what += f" ({len(failed) - len(blamed)} other(s) waited for it)"
        return Finding(SELF_CHECK, "error", what, _AGAIN)
    wrong = [rank for rank in ranks if not rank.worst <= 1]
    shares = ", ".join(f"{rank.worst:.3f}" for rank in ranks)
    if wrong:
        first = next(result for result in wrong[0].results if not result["worst"] <= 1)
        what = (
            f"wrong on {', '.join(rank.name for rank in wrong)}: {first['operation']} of {first['tokens']} token(s), "
            f"{first['heads']} q and {first['kv_heads']} KV heads in {first['dtype']}, is off by {first['worst']:.3g} "
            f"times the tolerance"
        )
        return Finding(SELF_CHECK, "error", what, _SAFE_PATH)
    dtypes = list(dict.fromkeys(result["dtype"] for rank in ranks for result in rank.results))
    what = (
        f"{_how_many(ranks)} against float64, {' and '.join(dtypes)}: worst error by rank {shares} of the tolerance "
        f"(half a unit in the dtype's last place, and 64 roundings of float32)"
    )
    return Finding(SELF_CHECK, "ok", what)


def to_blame(failed: Sequence[Rank]) -> list[Rank]:
    """Those that ended by themselves, or else those that came least far: the others wait for them."""
    suspects = [rank for rank in failed if not rank.hung] or list(failed)
    least = min(map(_stage_number, suspects))
    return [rank for rank in suspects if _stage_number(rank) == least]


def _stage_number(rank: Rank) -> int:
    return STAGES.index(rank.stage) if rank.stage is not None else -1


def _words(stage: str | None) -> str:
    return {
        "started": "had started",
        "imported": "had imported the engine",
        "joined": "had joined the others",
        "built": "had chosen a path",
        "compared": "had compared",
    }.get(stage or "", "had begun")


def _how_many(ranks: Sequence[Rank]) -> str:
    if ranks[0].place is None:
        return f"{len(ranks)} CPU rank(s) over gloo"
    return f"{len({rank.place for rank in ranks})} GPU rank(s) over NCCL"
