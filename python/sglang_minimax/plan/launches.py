"""What a layer launches in a decode step, and how long each launch takes: the one table that the step model reads.

Times are of H200 at TP4's shapes of the published FP8 model, microseconds a layer, all launches of a name together, by
the tokens of the batch that they were measured for. To put a new kernel in: its line of ``OURS``, with where it was
measured.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Launch:
    """One or several kernels of a layer.

    us: by tokens of the batch, at TP4; the time for the nearest measured number that is not above.
    source: where it was measured.
    reads: the weights among ``memory.weight_bytes`` that it reads: its time beyond those bytes is a constant, and the
        bytes are counted for each layout. "": the whole time is a constant.
    context: the tokens of a request from which on this entry holds, up to that of the next one of its name.
    ns_per_token: for each token of a request more than ``context``, of all requests at once: by so much the launch
        takes longer, unless reading these tokens' keys and values takes longer still.
    """

    name: str
    us: Mapping[int, float]
    source: str
    reads: str = ""
    context: int = 0
    ns_per_token: float = 0.0

    def at(self, tokens: int) -> float:
        """Microseconds for a batch of so many."""
        measured = sorted(self.us)
        return self.us[measured[max(bisect.bisect_right(measured, tokens) - 1, 0)]]


_TABLES = "docs/kernels.md"
_PROFILE = "profile of stock, TP4's shapes on two H200, dummy weights, 16 layers, 128 tokens in"
_LONGER = "profile of ours at TP4 on four H200, 16 layers, 512 tokens in"
_LESS_KV = "less what HBM takes to read the keys and values"
# (13.77 - 2.13) ms / 16 layers / (65536 - 4096) tokens. The Triton backend divides a request into 8 parts.
_TRITON_NS = 11.8
_SLOPE = f"and {_TRITON_NS} ns for each token more, from steps of ours with one request of 4096 and 65536 tokens"
_DECODE_ATTENTION = {1: 6.1, 16: 8.3, 64: 8.6, 256: 10.4}
_DECODE_ATTENTION_NS = 0.5  # (22.57 - 6.21) us / (32768 - 516) tokens, of benchmark/results/decode_attention_h200.json
_LESS_EXPERTS = "less the 6.6 us in which HBM reads 8 experts"

PROJECTIONS = "qkv and o projections, quantisation"
QK_NORM = "QK norm, RoPE, KV store"
QK_NORM_ALL_REDUCE_US = 4.3  # of it, in stock: the all-reduce of the sums, as long as that of 98 kB in the same profile
ATTENTION = "attention"
NORMS = "residual add and norm"
ROUTER = "router and choice of experts"
EXPERTS = "experts, from order to sum"

STOCK = (
    Launch(PROJECTIONS, {1: 40.27, 4: 27.31, 16: 27.60, 32: 27.69, 64: 28.27, 128: 29.77}, _TABLES, reads="attention"),
    Launch(QK_NORM, {1: 8.18, 4: 11.90, 16: 12.28, 64: 12.52, 128: 14.31, 256: 14.81}, _TABLES),
    Launch(ATTENTION, {1: 5.8, 16: 6.5, 64: 11.7}, f"{_PROFILE}, {_LESS_KV}"),
    Launch(ATTENTION, {16: 12.3, 64: 16.8}, f"{_LONGER}, {_LESS_KV}; {_SLOPE}", context=512, ns_per_token=_TRITON_NS),
    Launch(NORMS, {1: 4.46, 16: 4.65, 64: 4.91}, _PROFILE),
    Launch(
        ROUTER,
        {1: 10.33, 2: 17.58, 4: 17.67, 8: 21.85, 16: 20.90, 32: 20.13, 64: 20.96, 128: 23.28, 256: 28.78},
        _TABLES,
        reads="router",
    ),
    Launch(EXPERTS, {1: 25.2, 16: 33.5, 64: 39.1}, f"{_PROFILE}, {_LESS_EXPERTS}", reads="experts"),
)

EARLIER = (  # in place of stock's of the same name, in the steps that were measured before OURS
    Launch(PROJECTIONS, {1: 11.90, 4: 11.95, 16: 12.32, 32: 14.65, 64: 20.37}, _TABLES, reads="attention"),
    Launch(QK_NORM, {1: 2.81, 4: 2.75, 16: 2.73, 64: 2.82, 128: 2.89, 256: 3.42}, _TABLES),
    Launch(NORMS, {1: 0.0}, "in the launch of the all-reduce"),
    Launch(
        ROUTER,
        {1: 5.84, 2: 6.57, 4: 7.30, 8: 7.36, 16: 7.61, 32: 7.78, 64: 7.90, 128: 9.12, 256: 12.50},
        _TABLES,
        reads="router",
    ),
    Launch(
        EXPERTS,
        {1: 6.9, 4: 16.5, 8: 16.7, 16: 17.1, 64: 26.1},
        f"{_TABLES}, all tokens to the same 8 experts, {_LESS_EXPERTS}",
        reads="experts",
    ),
)

# What steps gained when all-reduce + norm took over the last launch of the projections, and that of the experts.
_SUMS_US = Launch("sums of parts", {1: 0.0, 16: 4.4, 64: 5.3}, _TABLES)


def _without_its_sum(launch: Launch) -> Launch:
    us = {tokens: us - _SUMS_US.at(tokens) / 2 for tokens, us in launch.us.items()}
    return replace(launch, us=us, source=f"{launch.source}, less half of what steps gained by leaving out two sums")


OURS = (  # in place of those of the same name among the earlier ones
    *(_without_its_sum(launch) for launch in EARLIER if launch.name in (PROJECTIONS, EXPERTS)),
    Launch(ATTENTION, _DECODE_ATTENTION, f"{_TABLES}, 516 tokens, {_LESS_KV}"),
    Launch(
        ATTENTION,
        _DECODE_ATTENTION,
        f"{_TABLES}, {_LESS_KV}; and {_DECODE_ATTENTION_NS} ns for each token more, from one request of 516 and 32768",
        context=512,
        ns_per_token=_DECODE_ATTENTION_NS,
    ),
)


def _in_place(launches: Iterable[Launch], others: Iterable[Launch]) -> tuple[Launch, ...]:
    """``launches``, each with that of ``others`` in its place that has its name and holds for the same requests."""
    found = {(each.name, each.context): each for each in others}
    return tuple(found.get((each.name, each.context), each) for each in launches)


_EARLIER = _in_place(STOCK, EARLIER)
ENGINES = {"stock": STOCK, "earlier": _EARLIER, "ours": _in_place(_EARLIER, OURS)}
"""A layer's launches by engine: stock; ours before all-reduce + norm added parts and attention was a launch of its own;
and ours. Without the all-reduces of attention's and the experts' output, which depend on the layout:
:mod:`sglang_minimax.plan.collectives`."""


def for_context(launches: Iterable[Launch], context: int) -> tuple[Launch, ...]:
    """Of each name the one that holds for requests of ``context`` tokens."""
    return tuple(
        {
            each.name: each for each in sorted(launches, key=lambda each: each.context) if each.context <= context
        }.values()
    )
