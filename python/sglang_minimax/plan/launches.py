"""What a layer launches in a decode step, and how long each launch takes: the one table that the step model reads.

Times are of H200 at TP4's shapes of the published FP8 model, microseconds a layer, all launches of a name together. A
time that was measured for several batch sizes is by tokens; else it is of 16 tokens and taken for any number. To put a
new kernel in: its line of ``OURS``, with where it was measured.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass

GAP_US = 0.85  # lost between two kernels of a CUDA graph: 0.7 to 1 was measured in whole steps


@dataclass(frozen=True)
class Launch:
    """One or several kernels of a layer.

    us: by tokens of the batch, at TP4; the time for the nearest measured number that is not above.
    kernels: how many, each with a gap before it.
    reads: the weights among ``memory.weight_bytes`` that it reads: its time beyond those bytes is a constant, and the
        bytes are counted for each layout. "": the whole time is a constant.
    source: where it was measured.
    """

    name: str
    us: Mapping[int, float]
    kernels: int
    source: str
    reads: str = ""

    def at(self, tokens: int) -> float:
        """Microseconds of the kernels alone."""
        measured = sorted(self.us)
        return self.us[measured[max(bisect.bisect_right(measured, tokens) - 1, 0)]]


_PROFILE = "profile of a stock step at batch 16, TP4's shapes on two H200, dummy weights, 16 layers"
_TABLES = "docs/performance.md"

QK_NORM = "QK norm, RoPE, KV store"
QK_NORM_ALL_REDUCE_US = 4.3  # of it, in stock: the all-reduce of the sums, as long as that of 98 kB in the same profile

STOCK = (
    Launch("qkv and o projections", {16: 2 * 9.8}, 2, _PROFILE, "attention"),
    Launch("their activations to FP8", {16: 2 * 1.33}, 2, _PROFILE),
    Launch(QK_NORM, {1: 8.18, 4: 11.90, 16: 12.28, 64: 12.52, 128: 14.31, 256: 14.81}, 1, _TABLES),
    Launch("attention", {16: 4.3 + 2.7}, 2, _PROFILE),
    Launch("residual add and norm", {16: 2 * 2.33}, 2, _PROFILE),
    Launch("router's logits",
           {1: 6.20, 2: 13.75, 4: 14.09, 8: 18.08, 16: 18.75, 32: 16.39, 64: 16.85, 128: 19.41, 256: 24.88}, 1,
           _TABLES, "router"),
    Launch("choice of experts", {16: 3.9}, 1, _PROFILE),
    Launch("order of tokens by expert", {16: 2.6 + 1.24}, 2, _PROFILE),
    Launch("experts' activations to FP8", {16: 2 * 1.76}, 2, _PROFILE),
    Launch("expert products", {16: 0.0}, 2, "nothing beyond their bytes, see the step model's assumptions", "experts"),
    Launch("SiLU and product", {16: 1.4}, 1, _PROFILE),
    Launch("sum over experts", {16: 4.7}, 1, _PROFILE),
)  # fmt: skip

_EXPERTS = f"{_TABLES}, all tokens to the same 8 experts, less the 6.6 us in which HBM reads these"


def _none(name: str, where: str) -> Launch:
    return Launch(name, {1: 0.0}, 0, f"in the launch of {where}")


OURS = {  # in place of stock's of the same name
    launch.name: launch
    for launch in (
        Launch("qkv and o projections", {1: 11.90, 4: 11.95, 16: 12.32, 32: 14.65, 64: 20.37}, 4, _TABLES, "attention"),
        _none("their activations to FP8", "the projections"),
        Launch(QK_NORM, {1: 2.81, 4: 2.75, 16: 2.73, 64: 2.82, 128: 2.89, 256: 3.42}, 1, _TABLES),
        _none("residual add and norm", "the all-reduce"),
        Launch("router's logits",
               {1: 5.84, 2: 6.57, 4: 7.30, 8: 7.36, 16: 7.61, 32: 7.78, 64: 7.90, 128: 9.12, 256: 12.50}, 2, _TABLES,
               "router"),
        _none("choice of experts", "the router's logits"),
        _none("order of tokens by expert", "the expert products"),
        _none("experts' activations to FP8", "the expert products"),
        Launch("expert products", {1: 6.9, 4: 16.5, 8: 16.7, 16: 17.1, 64: 26.1}, 4, _EXPERTS, "experts"),
        _none("SiLU and product", "the expert products"),
        _none("sum over experts", "the expert products"),
    )
}  # fmt: skip

ENGINES = {"stock": STOCK, "ours": tuple(OURS.get(launch.name, launch) for launch in STOCK)}
"""A layer's launches by engine, without the all-reduces of attention's and the experts' output, which depend on the
layout: :mod:`sglang_minimax.plan.collectives`."""
