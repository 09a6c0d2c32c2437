"""What is adjusted in the engine outside the modules that are laid over it: one list, one place to look.

Each entry is (engine module, function of that module), and the function runs once, right after the engine's module was
imported. The functions live with their subject: :mod:`sglang_minimax.server_arguments` for what is decided when the
server's arguments are read, :mod:`sglang_minimax.node_address` for how nodes find each other,
:mod:`sglang_minimax.agreement` for nodes that were not started alike,
:mod:`sglang_minimax.lost_nodes` for nodes that are gone later,
:mod:`sglang_minimax.request_checks` for what a request may hold,
:mod:`sglang_minimax.request_mends` for right requests that the engine would end with or not answer,
:mod:`sglang_minimax.weight_updates` for weights that are replaced while serving,
:mod:`sglang_minimax.eagle3` for the layers that a draft model names, :mod:`sglang_minimax.kv_transfer` for KV heads
that go to another server, :mod:`sglang_minimax.expert_tables` for the tuning of expert GEMMs,
:mod:`sglang_minimax.expert_sum` for the sum after them, :mod:`sglang_minimax.quantised_inputs` for what goes into them,
:mod:`sglang_minimax.server_report` for what a running server says of itself, :mod:`sglang_minimax.cpu_host` for a host
without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

# A module of the engine, or an object of one of its classes: no types come with it, and ours are not its own.
EngineModule: TypeAlias = Any
EngineObject: TypeAlias = Any

Adjustment = tuple[str, Callable[[EngineModule], None]]


def for_this_host() -> Iterator[Adjustment]:
    """The adjustments that apply to this process, decided before anything of the engine is imported."""
    from sglang_minimax import (
        agreement,
        cpu_host,
        eagle3,
        expert_sum,
        expert_tables,
        kv_transfer,
        lost_nodes,
        node_address,
        quantised_inputs,
        request_checks,
        request_mends,
        server_arguments,
        server_report,
        weight_updates,
    )

    yield from server_arguments.ADJUSTMENTS
    yield from node_address.ADJUSTMENTS
    yield from agreement.ADJUSTMENTS
    yield from lost_nodes.ADJUSTMENTS
    yield from request_checks.ADJUSTMENTS
    yield from request_mends.ADJUSTMENTS
    yield from weight_updates.ADJUSTMENTS
    yield from eagle3.ADJUSTMENTS
    yield from kv_transfer.ADJUSTMENTS
    yield from expert_tables.ADJUSTMENTS
    yield from expert_sum.ADJUSTMENTS
    yield from quantised_inputs.ADJUSTMENTS
    yield from server_report.ADJUSTMENTS
    if cpu_host.has_no_accelerator():
        cpu_host.prepare_environment()
        yield from cpu_host.ADJUSTMENTS
