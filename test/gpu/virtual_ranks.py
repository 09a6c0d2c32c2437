"""Attention-TP ranks that are streams of one process, so that few GPUs run the real exchange of many ranks.

Each rank has its inbox, its epochs and its layers; the peers' addresses are plain addresses of this process, which
other GPUs reach by peer access. The kernel, its messages and its waiting are those of a rank in a process of its own.

Ranks that wait for each other on one GPU must all be on it at once, or they wait for ever. A launch takes at most
``num_multiprocessors`` multiprocessors' worth of registers, however its plan divides them into CTAs, and with
programmatic launch a rank's next launch may already be there while the current one waits. So each rank plays a GPU of
real multiprocessors / (2 * ranks on that GPU). Between launches of different plans another kernel or the host must
come: with programmatic launch the next launch's narrow CTAs could be there before a peer's wide ones of this launch,
which then find no whole place. Behind another kernel a rank's next launch starts when its last one is complete, and
that is when all CTAs of all ranks have been there.

Nor may the host wait for a GPU on which a rank waits for one that the host has yet to launch. CUDA loads a kernel when
it is first launched, and may let all that runs on the GPU end before; allocating may do so too. So everything that is
launched between the first rank's launch and the last one's was launched on that GPU before: kernels are compiled and
loaded, and memory is allocated, in a rehearsal, one rank alone, whose inbox is filled as if all had sent. And every
stream needs a hardware queue of its own: start the process with ``CUDA_DEVICE_MAX_CONNECTIONS=32``.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch

PEER_TIMEOUT_SECONDS = 10
VARIANTS = 3  # of the inputs of a graph: odd, so that what an inbox held two launches ago was another one's


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
        for device in self.devices:
            with torch.cuda.device(device):
                torch.cuda._sleep(1)  # loads the kernel, which is launched beside ranks that wait
        self.synchronize()

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

    def capture(self, rank: int, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of ``run``, of at most two launches, which was run and replayed once."""
        self.rehearse(rank, run)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.devices[rank]), torch.cuda.graph(graph, stream=self.streams[rank]):
            run()
        self.rehearse(rank, graph.replay)
        return graph

    def replay(self, graphs: dict[tuple[int, int], tuple], replays: int, seed: int) -> None:
        """Replays the graphs of one number of tokens after another, on the ranks in any order and with pauses.

        Args:
            graphs: of (tokens, rank), a tuple that begins with the graph and its :class:`Findings`.
            seed: of the order.

        Raises:
            AssertionError: a replay found a difference; it says which.
        """
        self.clear()
        for _, findings, *_ in graphs.values():
            findings.clear()
        self.synchronize()
        order, counts, launched = random.Random(seed), sorted({tokens for tokens, _ in graphs}), []
        together = 10 if self.ranks_per_gpu <= 2 else 1  # four were seen to end at the time limit, nobody knows why
        for replay in range(replays):
            tokens, ranks = order.choice(counts), order.sample(range(self.num_ranks), self.num_ranks)
            launched.append(f"{tokens} tokens, ranks {ranks}")
            for rank in ranks:
                with self.on(rank):
                    if order.random() < 0.3:
                        torch.cuda._sleep(order.randrange(1, 40_000))
                    graphs[tokens, rank][0].replay()
            if len(launched) == together or replay == replays - 1:
                with telling(f"replays up to {replay}: {'; '.join(launched)}"):
                    self.synchronize()
                launched.clear()
        wrong = [f"{tokens} tokens, rank {rank}: {findings.told()}"
                 for (tokens, rank), (_, findings, *_) in graphs.items() if int(findings.wrong)]  # fmt: skip
        assert not wrong, "\n".join(wrong)
        assert sum(int(findings.turn) for _, findings, *_ in graphs.values()) == replays * self.num_ranks

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


class Findings:
    """What the replays of a graph found, kept on the GPU: the host does not look on while ranks wait for each other.

    Attributes:
        turn: [1], replays so far.
        wrong: [1], outputs that had other bits than they must.
        first: [4], of the first of these: replay, launch of the graph, which output, which value of it.
    """

    def __init__(self, outputs: tuple[str, ...]) -> None:
        self.outputs = outputs
        self.turn, self.wrong = (torch.zeros(1, dtype=torch.int64, device="cuda") for _ in range(2))
        self.first = torch.full((4,), -1, dtype=torch.int64, device="cuda")
        self.widths: dict[int, int] = {}

    def variant(self, launch: int) -> torch.Tensor:
        """[1], which inputs a launch of the next replay has."""
        return (self.turn + launch) % VARIANTS

    def compare(self, launch: int, output: int, got: torch.Tensor, wanted: torch.Tensor) -> None:
        """[tokens, width] each, bit by bit."""
        self.widths[output] = got.shape[1]
        differs = (got.contiguous().view(torch.int16) != wanted.contiguous().view(torch.int16)).flatten()
        place, any_differs = differs.int().argmax().view(1), differs.any()
        found = torch.cat([self.turn, *(torch.full_like(self.turn, number) for number in (launch, output)), place])
        torch.where(any_differs & (self.wrong == 0), found, self.first, out=self.first)
        self.wrong.add_(any_differs)

    def next_turn(self) -> None:
        self.turn.add_(1)

    def clear(self) -> None:
        self.turn.zero_()
        self.wrong.zero_()
        self.first.fill_(-1)

    def told(self) -> str:
        replay, launch, output, place = self.first.tolist()
        row, column = divmod(place, self.widths[output])
        return (
            f"{int(self.wrong)} wrong outputs in {int(self.turn)} replays of this graph, the first in its replay "
            f"{replay}, launch {launch}: {self.outputs[output]}[{row}, {column}]"
        )


@contextlib.contextmanager
def telling(what: str) -> Iterator[None]:
    """Says what was going on, and for how long, when it fails."""
    started = time.monotonic()
    try:
        yield
    except BaseException:
        print(f"failed after {time.monotonic() - started:.1f} s: {what}", flush=True)
        raise


def first_difference(differs: torch.Tensor, got: torch.Tensor, wanted: torch.Tensor) -> str:
    """Of [rows, columns]: how many values differ, and the first of them."""
    places = differs.nonzero()
    if not len(places):
        return "nothing differs"
    place = tuple(places[0].tolist())
    return f"{len(places)} of {differs.numel()} differ, first {list(place)}: {got[place]:.8g}, not {wanted[place]:.8g}"


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
