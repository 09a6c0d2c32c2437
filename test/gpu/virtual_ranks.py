"""Attention-TP ranks that are streams of one process, so that few GPUs run the real exchange of many ranks.

Each rank has its inbox, its epochs and its layers; the peers' addresses are plain addresses of this process, which
other GPUs reach by peer access. The kernel, its messages and its waiting are those of a rank in a process of its own.

Ranks that wait for each other on one GPU must all be on it at once, or they wait for ever. A launch takes at most
``num_multiprocessors`` multiprocessors' worth of registers, however its plan divides them into CTAs, and with
programmatic launch a rank's next launch may already be there while the current one waits. So each rank plays a GPU of
real multiprocessors / (2 * ranks on that GPU). Between launches of different plans another kernel or the host must
come, since a wide CTA may find no whole place between narrow ones that wait.

Nor may the host wait for a GPU on which a rank waits for one that the host has yet to launch. Kernels are compiled and
loaded, and memory is allocated, in a rehearsal: one rank alone, whose inbox is filled as if all had sent. And every
stream needs a hardware queue of its own: start the process with ``CUDA_DEVICE_MAX_CONNECTIONS=32``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace

import torch

PEER_TIMEOUT_SECONDS = 20


class VirtualRanks:
    """``num_ranks`` ranks over ``num_gpus`` GPUs in turn, so that neighbours, which share KV heads, are on two of them.

    Attributes:
        devices, streams: of each rank.
        exchanges: of each rank, once the first layer was built.
    """

    def __init__(self, num_ranks: int, num_gpus: int) -> None:
        assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "32", "streams that share a queue wait for each other"
        self.num_ranks = num_ranks
        self.devices = [torch.device("cuda", rank % num_gpus) for rank in range(num_ranks)]
        self.ranks_per_gpu = on_one_gpu = -(-num_ranks // num_gpus)
        real = min(torch.cuda.get_device_properties(gpu).multi_processor_count for gpu in range(num_gpus))
        self.num_multiprocessors = real // (2 * on_one_gpu)
        assert self.num_multiprocessors, f"{real} multiprocessors are too few for {on_one_gpu} ranks"
        self.streams = [torch.cuda.Stream(device) for device in self.devices]
        self.exchanges: list = []
        self._epochs_in = _epochs_of_sums
        _enable_peer_access(num_gpus)

    def build(self, rank: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, eps: float, layer_id: int):
        """A layer of ``rank``; all layers of a rank share its exchange."""
        from sglang.srt.layers.minimax_qk_norm_rope import QKNormRope

        def exchange(ctas_per_sm: int):
            if not self.exchanges:
                self._connect_sums(ctas_per_sm)
            return self.exchanges[rank]

        group = SimpleNamespace(world_size=self.num_ranks, rank_in_group=rank)
        return QKNormRope(
            heads, kv_heads, head_dim, rotary_dim, eps, group, layer_id, self.devices[rank],
            peer_timeout_seconds=PEER_TIMEOUT_SECONDS, exchange=exchange,
        )  # fmt: skip

    def build_all_reduce_norm(self, rank: int, hidden_size: int):
        """All-reduce + norm of ``rank``, for all of its layers."""
        from sglang.srt.layers.minimax_all_reduce_norm import AllReduceNorm

        if not self.exchanges:
            self._connect_rows(hidden_size)
        return AllReduceNorm(None, self.exchanges[rank], peer_timeout_seconds=PEER_TIMEOUT_SECONDS)

    @contextlib.contextmanager
    def on(self, rank: int) -> Iterator[None]:
        """Its GPU and its stream."""
        with torch.cuda.device(self.devices[rank]), torch.cuda.stream(self.streams[rank]):
            yield

    def rehearse(self, rank: int, run) -> None:
        """Calls ``run``, of at most two launches, with nobody to wait for; then all inboxes are as after ``clear``."""
        exchange = self.exchanges[rank]
        self.clear()
        epochs = self._epochs_in(exchange.inbox)
        epochs[0], epochs[1] = 2, 1
        self.synchronize()
        with self.on(rank):
            run()
        self.clear()

    def clear(self) -> None:
        self.synchronize()
        for exchange in self.exchanges:
            exchange.inbox.zero_()
            exchange.epochs.zero_()
        self.synchronize()

    def synchronize(self) -> None:
        for device in set(self.devices):
            torch.cuda.synchronize(device)

    def _connect_sums(self, ctas_per_sm: int) -> None:
        from sglang.srt.layers.minimax_sum_exchange import SumExchange, inbox_bytes

        size, units = inbox_bytes(self.num_ranks, self.num_multiprocessors * ctas_per_sm), self.num_multiprocessors
        self._connect(size, lambda inbox, addresses, rank: SumExchange(inbox, addresses, rank, units, ctas_per_sm))

    def _connect_rows(self, hidden_size: int) -> None:
        from sglang.srt.layers.minimax_all_reduce_norm import RowExchange, inbox_bytes, rows_that_fit

        units, self._epochs_in = self.num_multiprocessors, _epochs_of_rows
        rows = rows_that_fit(units, self.num_ranks)
        size = inbox_bytes(self.num_ranks, hidden_size, rows)
        self._connect(
            size, lambda inbox, addresses, rank: RowExchange(inbox, addresses, rank, hidden_size, rows, units)
        )

    def _connect(self, size: int, make) -> None:
        inboxes = [torch.zeros(size, dtype=torch.uint8, device=device) for device in self.devices]
        addresses = [inbox.data_ptr() for inbox in inboxes]
        for rank, inbox in enumerate(inboxes):
            self.exchanges.append(make(inbox, addresses, rank))
        self.synchronize()


def _epochs_of_sums(inbox: torch.Tensor) -> torch.Tensor:
    """[2 parities, messages]: a message is two floats and an epoch of 64 bits."""
    return inbox.view(torch.int64).view(2, -1, 2)[..., 1]


def _epochs_of_rows(inbox: torch.Tensor) -> torch.Tensor:
    """[2 parities, messages]: a message is three words of values and an epoch of 32 bits."""
    return inbox.view(torch.int32).view(2, -1, 4)[..., 3]


def _enable_peer_access(num_gpus: int) -> None:
    """Torch enables it, for all of its memory, when it first copies from one GPU to another."""
    for one in range(num_gpus):
        for other in range(num_gpus):
            if one != other:
                assert torch.cuda.can_device_access_peer(one, other), f"GPU {one} cannot reach GPU {other}"
                torch.empty(1, device=f"cuda:{one}").copy_(torch.zeros(1, device=f"cuda:{other}"))
