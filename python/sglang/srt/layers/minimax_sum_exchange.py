"""Sums of two floats a token over the GPUs of one host, from inside a Triton kernel, over plain NVLink stores.

    sums[token] = all-reduce(partial sums[token])           # what it replaces: a collective between two launches

Every rank writes its two partial sums for a token into the inbox of every rank, its own too, and polls its own. A
message is 16 bytes, {first: f32, second: f32, epoch: u64}, written and read by one 128-bit relaxed access at system
scope, which PTX makes single-copy atomic: who reads this launch's epoch has this launch's sums, so there is no flag to
order after the data and no fence. Every rank adds the messages in rank order, its own included, so all ranks get
the same bits, and the same bits every time.

Epochs live in device memory, one counter a CTA, and a CTA raises its own: a captured graph replays with fresh
epochs, and graphs of several sizes may be replayed in any order. 64 bits never wrap.

Why two parities are enough. CTA c of every rank counts the same launches (ranks launch the same token counts in the
same order; grids follow from the token count). Rank A writes epoch e over the message of e - 2. In epoch e, A's
CTA c has finished e - 1, so it has read what B's CTA c sent in e - 1; launches that share an inbox are ordered on
one stream, so B sent that after its launch of e - 2 was complete, and has read all it ever will of e - 2.

Why waiting CTAs never starve the ones they wait for. A CTA waits for CTA c of the peers only, never for a CTA of
its own GPU, and it waits for rows only after it sent the same rows, in the same order on every rank. A launch
has at most ``max_ctas`` CTAs, which all fit on the GPU at once under the register cap of the launch, so every CTA
comes to run as soon as whatever else is on the GPU ends. Then by induction over a CTA's rows every wait ends.
What else is on the GPU must not wait for peers itself: a token dispatcher on another stream, as in two-batch overlap,
could hold the place of a CTA here while the exchange there holds the dispatcher's. The model takes the all-reduce then.
A pipeline's NCCL, which waits for another stage, takes a few multiprocessors only, and GPUs start CTAs in the order of
their numbers, though nobody promises it: the first CTA that is not through is on all of them, and makes room.

One inbox serves the launches of one stream order; work that may run concurrently, or in different order on different
ranks, needs one ``slot`` each.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from sglang.srt.layers.minimax_nvlink import (
    MESSAGE_BYTES,
    Inboxes,
    inbox_on_symmetric_memory,
    poll_again_in_time,
    smallest_gpu,
)

ROWS_PER_CTA = 16  # rows that one CTA sends in one launch at most; longer inputs take several launches


class SumExchange(Inboxes):
    """The inbox of this rank, the addresses of everybody's inbox, and the epoch of every CTA.

    Args:
        inbox: as of :class:`Inboxes`, :func:`inbox_bytes` long; zero is an epoch that no launch has.
        inbox_addresses: as of :class:`Inboxes`.
        rank: this rank.
        num_multiprocessors: of the smallest GPU of all ranks, so that grids are the same on every rank.
        ctas_per_sm: CTAs of one launch that may be on a multiprocessor at once.

    Attributes:
        inbox: [2 parities, max_ctas, ROWS_PER_CTA, ranks, MESSAGE_BYTES] as bytes in a row.
        epochs: [max_ctas] int64, the last epoch of each CTA.
        max_ctas: CTAs that may take part in one launch.
    """

    def __init__(
        self, inbox: torch.Tensor, inbox_addresses: list[int], rank: int, num_multiprocessors: int, ctas_per_sm: int
    ) -> None:
        self.num_multiprocessors = num_multiprocessors
        self.max_ctas = num_multiprocessors * ctas_per_sm
        size = inbox_bytes(len(inbox_addresses), self.max_ctas)
        super().__init__(inbox, inbox_addresses, rank, size, f"{self.max_ctas} CTAs")
        self.epochs = torch.zeros(self.max_ctas, dtype=torch.int64, device=inbox.device)


def inbox_bytes(num_ranks: int, max_ctas: int) -> int:
    """What an inbox takes: for both parities, a message of each rank for each row of each CTA."""
    return 2 * max_ctas * ROWS_PER_CTA * num_ranks * MESSAGE_BYTES


_exchanges: dict[tuple, SumExchange] = {}


def exchange_of(group, device: torch.device, slot: int, ctas_per_sm: int) -> SumExchange:
    """The one exchange of this group, slot and width, on symmetric memory.

    The first call of each is collective over ``group``, an engine ``GroupCoordinator`` for which
    :func:`minimax_nvlink.peers_are_reachable` is true, and allocates.
    """
    key = (group.unique_name, slot, ctas_per_sm)
    if key not in _exchanges:
        smallest = smallest_gpu(group, device)
        size = inbox_bytes(group.world_size, smallest * ctas_per_sm)
        inbox, addresses = inbox_on_symmetric_memory(group, device, size)
        _exchanges[key] = SumExchange(inbox, addresses, group.rank_in_group, smallest, ctas_per_sm)
    return _exchanges[key]


@triton.jit
def epoch_of(epochs_ptr, cta):
    """This launch's epoch for ``cta``. Every thread loads it before the first barrier of the CTA."""
    return tl.load(epochs_ptr + cta, volatile=True) + 1


@triton.jit
def message_offset(epoch, cta, turn, max_ctas, ROWS: tl.constexpr, RANKS: tl.constexpr):
    """Bytes from the start of an inbox to the messages for the row that ``cta`` takes in its ``turn``-th turn."""
    row = ((epoch & 1) * max_ctas + cta) * ROWS + turn
    return row * (RANKS * 16)


@triton.jit
def inbox_of_peer(inboxes_ptr, num_ranks):
    """In thread r of the CTA, r < num_ranks: the address of rank r's inbox. Only :func:`send_sums` can use it.

    A Triton scalar that is not the same in every thread: loaded early, so that the sums can leave at once.
    """
    return tl.inline_asm_elementwise(
        """
        {
            .reg .pred is_rank;
            .reg .b32 thread;
            .reg .b64 address;
            mov.u32 thread, %tid.x;
            setp.lt.u32 is_rank, thread, $2;
            mad.wide.u32 address, thread, 8, $1;
            mov.b64 $0, 0;
            @is_rank ld.global.b64 $0, [address];
        }
        """,
        "=&l,l,r",
        [inboxes_ptr.to(tl.int64), num_ranks],
        dtype=tl.int64,
        is_pure=False,
        pack=1,
    )


@triton.jit
def send_sums(peer_inbox, offset, first, second, epoch, num_receivers):
    """Thread r of the CTA, r < num_receivers, writes {first, second, epoch} at ``offset`` of rank r's inbox."""
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred sends;
            .reg .b32 thread;
            .reg .b64 address, sums;
            .reg .b128 message;
            mov.u32 thread, %tid.x;
            setp.lt.u32 sends, thread, $6;
            add.s64 address, $1, $2;
            mov.b64 sums, {$3, $4};
            mov.b128 message, {sums, $5};
            @sends st.relaxed.sys.global.b128 [address], message;
            mov.b32 $0, 0;
        }
        """,
        "=&r,l,l,f,f,l,r",
        [peer_inbox, offset, first, second, epoch, num_receivers],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def await_sums(messages, epoch, num_rows, timeout_ns, layer_id, rank, ROWS: tl.constexpr, POLL: tl.constexpr):
    """The sums over all ranks of the first ``num_rows`` rows at address ``messages``, once they have this epoch.

    ``POLL`` is :func:`poll_assembly` of (ROWS, ranks); returns (first, second) for each of the rows, in order. A peer
    that stays away for ``timeout_ns`` traps the kernel, which ends the process's CUDA context, after one line that
    says who waited for whom.
    """
    if ROWS == 1:
        a, b, missing = tl.inline_asm_elementwise(
            POLL, "=&f,=&f,=&r,l,l,r,l", [messages, epoch, num_rows, timeout_ns],
            dtype=(tl.float32, tl.float32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
        sums = (a, b)
    elif ROWS == 2:
        a, b, c, d, missing = tl.inline_asm_elementwise(
            POLL, "=&f,=&f,=&f,=&f,=&r,l,l,r,l", [messages, epoch, num_rows, timeout_ns],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
        sums = (a, b, c, d)
    else:
        a, b, c, d, e, f, g, h, missing = tl.inline_asm_elementwise(
            POLL, "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&r,l,l,r,l", [messages, epoch, num_rows, timeout_ns],
            dtype=(
                tl.float32, tl.float32, tl.float32, tl.float32,
                tl.float32, tl.float32, tl.float32, tl.float32, tl.int32,
            ), is_pure=False, pack=1,
        )  # fmt: skip
        sums = (a, b, c, d, e, f, g, h)
    if missing >= 0:
        tl.device_print(
            "QK norm: no partial sums of a peer within the time limit. Operands: layer, this rank, rank waited for",
            layer_id,
            rank,
            missing,
        )
        tl.inline_asm_elementwise("trap; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    return sums


@functools.cache
def poll_assembly(rows: int, ranks: int) -> str:
    """PTX that polls the messages of ``rows`` consecutive rows until all have one epoch, then adds them in rank order.

    Outputs: (first, second) of each row, then the lowest rank whose message is missing, or -1. Inputs: the address of
    the first message, the epoch, how many of the rows are sent at all, the time limit in ns.

    Lane l of every warp polls message l: one load a turn for all rows, and no barrier. After the limit thread 0 alone
    returns, to say who is missing: the rest of its warp exits, since lanes that stayed would keep it from getting past
    the point where the warp meets again, and other warps poll on until it traps.
    """
    if rows * ranks > 32:
        raise ValueError(f"{rows} rows of {ranks} messages: a warp polls 32 messages at most")
    row_inputs = 2 * rows + 1
    address, epoch, num_rows, limit = (f"${row_inputs + i}" for i in range(4))
    gather = []
    for row in range(rows):
        for part, name in ((2 * row, "first"), (2 * row + 1, "second")):
            for rank in range(ranks):
                value = "total" if rank == 0 else "value"
                gather.append(f"shfl.sync.idx.b32 {value}, {name}, {row * ranks + rank}, 31, 0xffffffff;")
                if rank:
                    gather.append("add.rn.f32 total, total, value;")
            gather.append(f"mov.f32 ${part}, total;")
    gather_lines = "\n".join(gather)
    nothing_lines = "\n".join(f"mov.f32 ${part}, 0f00000000;" for part in range(2 * rows))
    return f"""
    {{
    .reg .pred idle, arrived, all, yes;
    .reg .b32 lane, thread, messages, polls, low, waiting, missing, first, second;
    .reg .b64 address, sums, epoch, start, now;
    .reg .b128 message;
    .reg .f32 total, value;
    mov.u32 thread, %tid.x;
    and.b32 lane, thread, 31;
    mul.lo.u32 messages, {num_rows}, {ranks};
    setp.ge.u32 idle, lane, messages;
    mad.wide.u32 address, lane, {MESSAGE_BYTES}, {address};
    mov.b32 polls, 0;
    mov.b32 missing, -1;
    mov.b64 start, 0;
    mov.b64 sums, 0;
    mov.b64 epoch, {epoch};
    POLL:
    @!idle ld.relaxed.sys.global.b128 message, [address];
    @!idle mov.b128 {{sums, epoch}}, message;
    setp.eq.b64 arrived, epoch, {epoch};
    vote.sync.all.pred all, arrived, 0xffffffff;
    @all bra ARRIVED;
    {poll_again_in_time(limit, agree="vote.sync.any.pred yes, yes, 0xffffffff;")}
    setp.ge.u32 yes, thread, 32;
    @yes bra POLL;
    not.pred arrived, arrived;
    vote.sync.ballot.b32 waiting, arrived, 0xffffffff;
    brev.b32 waiting, waiting;
    clz.b32 waiting, waiting;
    rem.u32 missing, waiting, {ranks};
    setp.eq.u32 yes, thread, 0;
    @yes bra REPORT;
    exit;
    REPORT:
    {nothing_lines}
    bra DONE;
    ARRIVED:
    mov.b64 {{first, second}}, sums;
    {gather_lines}
    DONE:
    mov.b32 ${2 * rows}, missing;
    }}
    """
