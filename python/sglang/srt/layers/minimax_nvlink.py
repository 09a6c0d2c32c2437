"""What the kernels that exchange data between the GPUs of one host share: memory that peers store to, and its limits.

A rank owns an *inbox*, memory of its GPU that every peer's GPU can store to over NVLink. What lies in it is the
business of the kernel: :mod:`minimax_sum_exchange` (two sums a token), :mod:`minimax_row_exchange` (whole rows).
"""

from __future__ import annotations

import functools
import logging
import os

import torch
from sglang.srt.layers.minimax_log import log_once
from sglang.srt.layers.minimax_qk_norm_paths import EXCHANGE_RANKS

logger = logging.getLogger(__name__)

# How long a GPU waits for a peer before it traps. In a graph peers are near: ranks take a batch from one broadcast, a
# graph's kernels are all compiled, and none of them runs while it is captured. Elsewhere the first rank may be
# compiling: DeepGEMM's kernels alone take it 10 to 20 minutes, in which the others wait here as they would in an
# all-reduce.
# Neither follows --watchdog-timeout (300 s). Where that is less, the watchdog ends the processes of a server that
# already serves, and their kernels with them. Where a person gave more, for what compiles between requests, that rank
# is outside of graphs, and its peers wait in the same pass for the longer time or in a collective. A rank that is
# halted for minutes, by a debugger, is taken for lost in graphs: that wants --disable-cuda-graph and
# --disable-piecewise-cuda-graph.
GRAPH_TIMEOUT_SECONDS = 120.0
EAGER_TIMEOUT_SECONDS = 3600.0
REGISTERS_PER_SM = 65536  # of every NVIDIA GPU with NVLink
MESSAGE_BYTES = 16  # what one store writes and one load reads at once: a message is there whole, or not at all


class Inboxes:
    """The inbox of this rank, and the addresses of everybody's.

    It does not ask where an inbox is: any memory of any GPU does that all ranks' GPUs can store to, and that stays
    mapped. :func:`inbox_on_symmetric_memory` gives one, with a process a rank.

    Args:
        inbox: this rank's, uint8, 16-byte aligned, all zero; no rank may send before every inbox is cleared.
        inbox_addresses: where the inbox of each rank is mapped for this rank, in rank order, its own included.
        rank: this rank.
        size: bytes that the inbox must have.
        what_for: what needs that size, for the error.

    Attributes:
        inbox_addresses: [ranks] int64, on the GPU.

    Raises:
        ValueError: too many ranks, or an inbox of another size.
    """

    def __init__(self, inbox: torch.Tensor, inbox_addresses: list[int], rank: int, size: int, what_for: str) -> None:
        self.rank, self.num_ranks = rank, len(inbox_addresses)
        if self.num_ranks not in EXCHANGE_RANKS or not 0 <= rank < self.num_ranks:
            raise ValueError(
                f"rank {rank} of {self.num_ranks}: data is exchanged between {EXCHANGE_RANKS} ranks of one NVLink "
                "domain; others add up by a collective"
            )
        if inbox.dtype != torch.uint8 or inbox.numel() != size or inbox.data_ptr() % MESSAGE_BYTES:
            raise ValueError(
                f"the inbox has {inbox.numel()} values of {inbox.dtype}, and {what_for} of {self.num_ranks} "
                f"ranks need {size} of uint8, aligned to {MESSAGE_BYTES}: allocate as many bytes as the exchange says"
            )
        if inbox_addresses[rank] != inbox.data_ptr():
            raise ValueError(f"inbox_addresses[{rank}] is not this rank's inbox: give the addresses in rank order")
        self.inbox = inbox
        self.inbox_addresses = torch.tensor(inbox_addresses, dtype=torch.int64, device=inbox.device)


_symmetric_memory: list = []  # what keeps the peers' inboxes mapped


def inbox_on_symmetric_memory(group, device: torch.device, size: int) -> tuple[torch.Tensor, list[int]]:
    """An inbox of ``size`` bytes, cleared on every rank, and everybody's addresses; collective over ``group``, an
    engine ``GroupCoordinator`` for which :func:`peers_are_reachable` is true."""
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symmetric_memory

    inbox = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
    handle = symmetric_memory.rendezvous(inbox, group.cpu_group)
    _symmetric_memory.append(handle)
    inbox.zero_()
    torch.cuda.synchronize(device)
    dist.barrier(group=group.cpu_group)  # no rank writes into an inbox that is still being cleared
    return inbox, list(handle.buffer_ptrs)


def smallest_gpu(group, device: torch.device) -> int:
    """Multiprocessors of the smallest GPU of ``group``, so that grids are the same on every rank; collective."""
    return min(group.all_gather_object(torch.cuda.get_device_properties(device).multi_processor_count))


@functools.cache
def peers_are_reachable(group, device: torch.device) -> bool:
    """Whether ``group`` is as many NVIDIA GPUs of one host as can exchange, with NVLink between every pair.

    Collective over the group, and the same answer on every rank. PCIe peers do not count: a 16-byte store is one
    access over NVLink, and nobody says so of PCIe. Nor do peers of a server that was started with
    ``--disable-custom-all-reduce``, which is how a user says that peer access does not work on the host.
    """
    from sglang.srt.distributed import parallel_state

    if device.type != "cuda" or torch.version.hip is not None or not parallel_state._ENABLE_CUSTOM_ALL_REDUCE:
        return False
    reason = _reason_against_a_check(
        os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count(), group.world_size
    )
    # Before the check, in which a rank that fails leaves the others waiting.
    if not all(group.all_gather_object(reason is None)):
        log_once(_UNCHECKED % (reason or "another rank cannot check it"))
        return False
    from sglang.srt.distributed.device_communicators.custom_all_reduce_utils import (
        can_use_custom_all_reduce_with_nvlink,
    )

    sizes, found = list(EXCHANGE_RANKS), None
    try:
        found = can_use_custom_all_reduce_with_nvlink(group.cpu_group, device, sizes, "An exchange over NVLink")
    except Exception as error:  # as the engine, which then goes on without its own all-reduce
        logger.warning(_UNCHECKED, f"{type(error).__name__}: {error}")  # on whichever rank it is
    return all(group.all_gather_object(found is True))


def _reason_against_a_check(visible_devices: str | None, num_devices: int, num_ranks: int) -> str | None:
    """Why the engine's check of peer access would fail on this rank, or None."""
    named = [name.strip() for name in (visible_devices or "").split(",") if name.strip()]
    if not all(name.isdigit() for name in named):
        return f"CUDA_VISIBLE_DEVICES={visible_devices} names GPUs, and the engine reads numbers there"
    if num_devices < num_ranks:
        return f"this process sees {num_devices} GPUs, and the group has {num_ranks}"
    return None


_UNCHECKED = "Whether GPUs reach each other cannot be checked, so nothing is exchanged over NVLink: %s."


def peer_timeout_ms(seconds: float | None) -> int:
    """How long a launch waits for a peer: ``seconds``, or what suits a graph that is captured, or an eager call."""
    if seconds is None:
        seconds = GRAPH_TIMEOUT_SECONDS if torch.cuda.is_current_stream_capturing() else EAGER_TIMEOUT_SECONDS
    return int(seconds * 1000)


def registers_per_thread(num_warps: int, ctas_per_sm: int) -> int:
    """The cap under which ``ctas_per_sm`` CTAs of ``num_warps`` warps fit on a multiprocessor together."""
    return min(REGISTERS_PER_SM // (32 * num_warps * ctas_per_sm) // 8 * 8, 248)


def poll_again_in_time(limit: str, agree: str = "") -> str:
    """PTX behind a poll in vain: back to the label ``POLL``, or on to the next line once ``limit`` ns are over.

    It reads the time once in 4096 polls. The code around it declares and clears ``polls`` (b32) and ``start`` (b64),
    and declares ``low`` (b32), ``now`` (b64) and the predicate ``yes``, which says that there is time left; ``agree``:
    PTX that makes threads agree on that.
    """
    return f"""add.u32 polls, polls, 1;
    and.b32 low, polls, 4095;
    setp.ne.b32 yes, low, 0;
    @yes bra POLL;
    mov.u64 now, %globaltimer;
    setp.eq.b64 yes, start, 0;
    @yes mov.b64 start, now;
    sub.u64 now, now, start;
    setp.lt.u64 yes, now, {limit};
    {agree}
    @yes bra POLL;"""


@functools.cache
def has_programmatic_launch(device: torch.device) -> bool:
    """Whether a kernel may start while its predecessor in the stream still runs: Hopper and later."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; on a CPU, where Triton's interpreter runs one CTA after the other, a few, so that some have several."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
