"""Which layouts the demo runs on a host: the widest that its GPUs or its memory allow."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from types import ModuleType

from sglang_minimax import overlay


def _load_sharding() -> ModuleType:
    """The overlay's arithmetic, by its file: with ``SGLANG_MINIMAX_OVERLAY=0`` the demo runs the stock engine,
    which does not have it."""
    path = os.path.join(overlay.folder(), "srt", "layers", "minimax_sharding.py")
    spec = importlib.util.spec_from_file_location("sglang_minimax_sharding_of_demo", path)
    assert spec is not None and spec.loader is not None, f"{path} cannot be loaded as a module"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_sharding = _load_sharding()

WIDEST_ON_CPU = 16

# What a server takes on a host without a GPU, where ranks share the memory of the process they are forked from.
# Measured with the small model, as sums of proportional set sizes: 1.2 GB at TP2 and 2.2 GB at TP16 with DP2
# attention, so 0.07 GB a rank and 1.1 GB beside them. Twice that and more is left for growth while it answers.
GB_PER_RANK = 0.2
GB_BESIDE_RANKS = 2.0  # launcher, detokenizer, DP controller and the demo itself


@dataclass(frozen=True)
class Host:
    """What a layout must fit: GPUs, or without any the memory that is free (GB, 10^9 bytes)."""

    num_gpus: int
    free_memory_gb: float


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides how it can be divided."""

    num_heads: int
    num_kv_heads: int
    num_experts: int
    expert_width: int
    weights_gb: float = 0.0  # all ranks together, 10^9 bytes

    def reason_against(self, tp: int, dp: int, ep: int | None) -> str | None:
        """Why this layout cannot be, as a sentence, or None."""
        if tp < 1 or dp < 1 or tp % dp:
            return f"--tp {tp} must be a multiple of --dp {dp}, and both at least 1"
        try:
            _sharding.shard_attention(self.num_heads, self.num_kv_heads, tp // dp)
        except ValueError as error:
            return str(error)
        experts = _sharding.ExpertShape(self.num_experts, self.expert_width)
        if ep is not None:
            reason: str | None = experts.reason_against(tp, ep)
            return reason
        if not _sharding.working_ep_sizes(experts, tp):
            return f"no --ep divides {self.num_experts} experts of width {self.expert_width} at --tp {tp}"
        return None


@dataclass(frozen=True)
class Layout:
    """A server's layout. ``dp`` above 1 means DP attention; ``ep`` None leaves the choice to the engine."""

    tp: int
    dp: int
    ep: int | None
    on_gpu: bool

    def flags(self) -> list[str]:
        """The server's flags for it."""
        flags = ["--tp", str(self.tp)]
        if self.ep is not None:
            flags += ["--ep", str(self.ep)]
        if self.dp > 1:
            flags += ["--dp", str(self.dp), "--enable-dp-attention"]
        return flags if self.on_gpu else [*flags, "--device", "cpu"]

    def slug(self) -> str:
        """A name for files."""
        return f"tp{self.tp}" + (f"-dp{self.dp}" if self.dp > 1 else "")

    def __str__(self) -> str:
        ep = "" if self.ep is None else f", EP{self.ep}"
        dp = f", DP{self.dp} attention" if self.dp > 1 else ""
        return f"TP{self.tp}{ep}{dp} on {'GPUs' if self.on_gpu else 'CPU'}"


@dataclass(frozen=True)
class Plan:
    """The layouts to run, in order, and what the person should know about the choice."""

    layouts: list[Layout]
    notes: list[str]


def choose_layouts(
    host: Host, shape: ModelShape, *, tp: int | None = None, dp: int | None = None, ep: int | None = None
) -> Plan:
    """Tensor parallelism alone first, then with DP attention, as wide as the host allows.

    What the person chose (``tp``, ``dp``, ``ep``) is taken as it is.

    Raises:
        ValueError: a chosen layout cannot be, with the rule it breaks, or nothing fits this host.
    """
    notes: list[str] = []
    on_gpu = host.num_gpus > 0
    tp = _chosen_tp(host, shape, tp, ep, notes) if tp is not None else _widest_tp(host, shape, ep, notes)
    layouts = [Layout(tp, 1, ep, on_gpu)]
    dp = _chosen_dp(shape, tp, dp, ep) if dp is not None else _smallest_dp(shape, tp, ep)
    if dp is None:
        notes.append(f"DP attention needs at least two ranks and is left out at TP{tp}")
    elif dp > 1:
        layouts.append(Layout(tp, dp, ep, on_gpu))
    return Plan(layouts, notes)


def memory_needed_gb(shape: ModelShape, tp: int) -> float:
    """Memory (GB) of a server with ``tp`` ranks on a host without a GPU."""
    return shape.weights_gb + GB_BESIDE_RANKS + tp * GB_PER_RANK


def ranks_that_fit(host: Host, shape: ModelShape) -> int:
    """How many ranks the host holds: one a GPU, or as many, up to 16, as its free memory does."""
    if host.num_gpus:
        return host.num_gpus
    fitting = (tp for tp in range(WIDEST_ON_CPU, 0, -1) if memory_needed_gb(shape, tp) <= host.free_memory_gb)
    return next(fitting, 0)


def _widest_tp(host: Host, shape: ModelShape, ep: int | None, notes: list[str]) -> int:
    fits = ranks_that_fit(host, shape)
    if fits == 0:
        raise ValueError(
            f"{host.free_memory_gb:.1f} GB of memory are free, and one rank with the processes beside it needs "
            f"{memory_needed_gb(shape, 1):.1f} GB: free some, or choose --tp yourself"
        )
    possible = [tp for tp in range(1, fits + 1) if shape.reason_against(tp, 1, ep) is None]
    if not possible:
        raise ValueError(f"--ep {ep} is possible at no number of ranks up to the {fits} that fit this host")
    widest = max(possible)
    if not host.num_gpus and fits < WIDEST_ON_CPU:
        notes.append(
            f"{host.free_memory_gb:.1f} GB of memory are free and TP{WIDEST_ON_CPU} needs "
            f"{memory_needed_gb(shape, WIDEST_ON_CPU):.1f} GB: TP{widest} is the widest layout that fits"
        )
    return widest


def _chosen_tp(host: Host, shape: ModelShape, tp: int, ep: int | None, notes: list[str]) -> int:
    if reason := shape.reason_against(tp, 1, ep):
        raise ValueError(reason)
    fits = ranks_that_fit(host, shape)
    if tp > fits:
        if host.num_gpus:
            raise ValueError(f"--tp {tp} needs as many GPUs, and this host has {host.num_gpus}")
        notes.append(f"--tp {tp} is taken as asked, though memory for {fits} ranks only is free")
    return tp


def _smallest_dp(shape: ModelShape, tp: int, ep: int | None) -> int | None:
    possible = (dp for dp in range(2, tp + 1) if shape.reason_against(tp, dp, ep) is None)
    return next(possible, None)


def _chosen_dp(shape: ModelShape, tp: int, dp: int, ep: int | None) -> int:
    if reason := shape.reason_against(tp, dp, ep):
        raise ValueError(reason)
    return dp
