"""Whole rows from every GPU of a host to every other, in a kernel that goes on with them: messages, epochs, inboxes.

A message is 16 bytes, {three words of two bfloat16 values each, epoch: u32}, written and read by one 128-bit relaxed
access at system scope, which PTX makes single-copy atomic: who reads this launch's epoch has this launch's values, so
there is no flag to order after the data and no fence. A row of 3072 values is 512 messages.

Epochs live in device memory, one counter a row, and the CTA of a row raises it: a captured graph replays with fresh
epochs, and graphs of several sizes may be replayed in any order. A row's message is always from the row's last use but
one, or this one, so that an epoch may wrap: it only has to differ from the one two before.

Why two parities are enough. Ranks launch the same token counts in the same order, so row r of every rank counts the
same launches. Rank A writes epoch e of a row over its message of e - 2. In epoch e, A's earlier launches are complete,
so it has read what B sent in e - 1; launches that share an inbox are ordered on one stream, so B sent that after its
launch of e - 2 was complete, and has read all it ever will of e - 2. With programmatic launch that order is the wait
before a launch's first read of anything that launches write; all that is launched early on that stream must wait so.
"""

# ruff: noqa: RUF005  a Triton function cannot unpack a tuple into another

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from sglang.srt.layers.minimax_nvlink import MESSAGE_BYTES, Inboxes, poll_again_in_time

WORDS_PER_MESSAGE = 3  # of two values; the fourth word of a message is its epoch


class RowExchange(Inboxes):
    """Inboxes for whole rows, and the epoch of every row.

    Args:
        inbox: as of :class:`Inboxes`, :func:`inbox_bytes` long.
        inbox_addresses, rank: as of :class:`Inboxes`.
        hidden_size: values of a row.
        max_tokens: rows of one launch.
        num_multiprocessors: of the smallest GPU of all ranks, so that all ranks take the same plan.

    Attributes:
        inbox: [2 parities, max_tokens, ranks, messages of a row, MESSAGE_BYTES] as bytes in a row.
        epochs: [max_tokens] int32, the last epoch of each row.
    """

    def __init__(
        self,
        inbox: torch.Tensor,
        inbox_addresses: list[int],
        rank: int,
        hidden_size: int,
        max_tokens: int,
        num_multiprocessors: int,
    ) -> None:
        self.hidden_size, self.max_tokens, self.num_multiprocessors = hidden_size, max_tokens, num_multiprocessors
        size = inbox_bytes(len(inbox_addresses), hidden_size, max_tokens)
        super().__init__(inbox, inbox_addresses, rank, size, f"{max_tokens} rows of {hidden_size} values")
        self.epochs = torch.zeros(max_tokens, dtype=torch.int32, device=inbox.device)


def messages_per_row(hidden_size: int) -> int:
    return triton.cdiv(hidden_size, 2 * WORDS_PER_MESSAGE)


def inbox_bytes(num_ranks: int, hidden_size: int, max_tokens: int) -> int:
    """What an inbox takes: for both parities and each row the messages of every rank, this rank's place unused."""
    return 2 * max_tokens * num_ranks * messages_per_row(hidden_size) * MESSAGE_BYTES


@triton.jit
def send(address, words, epoch, sends, IN_PTX: tl.constexpr):
    """Writes {three words, epoch} at each ``address`` where ``sends`` is not 0."""
    if IN_PTX:
        tl.inline_asm_elementwise(
            """
            {
                .reg .pred sends;
                .reg .b64 low, high;
                .reg .b128 message;
                setp.ne.b32 sends, $6, 0;
                mov.b64 low, {$2, $3};
                mov.b64 high, {$4, $5};
                mov.b128 message, {low, high};
                @sends st.relaxed.sys.global.b128 [$1], message;
                mov.b32 $0, 0;
            }
            """,
            "=r,l,r,r,r,r,r",
            [address, words[0], words[1], words[2], epoch, sends],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        place = address.to(tl.pointer_type(tl.int32))
        for part in tl.static_range(3):
            tl.store(place + part, words[part], mask=sends != 0)
        tl.store(place + 3, epoch, mask=sends != 0)


@triton.jit
def await_rows(
    address, epoch, rank, waits, timeout_ns,
    MESSAGES: tl.constexpr, RANKS: tl.constexpr, POLL: tl.constexpr, OPERANDS: tl.constexpr,
):  # fmt: skip
    """Three words of every rank's message, in rank order, this rank's being any, and a rank that never sent, or -1.

    ``address`` is where rank 0's messages are. Without ``POLL`` nothing is waited for: what is there is taken.
    """
    if POLL == "":
        words = ()
        for sender in tl.static_range(RANKS):
            place = (address + sender * (MESSAGES * 16)).to(tl.pointer_type(tl.int32))
            for part in tl.static_range(3):
                words = words + (tl.load(place + part, mask=waits != 0, other=0),)
        words = words + (tl.full(address.shape, -1, tl.int32),)
    elif RANKS == 2:
        words = tl.inline_asm_elementwise(
            POLL, OPERANDS, [address, epoch, rank, waits, timeout_ns], dtype=WORDS_OF_2, is_pure=False, pack=1
        )
    elif RANKS == 4:
        words = tl.inline_asm_elementwise(
            POLL, OPERANDS, [address, epoch, rank, waits, timeout_ns], dtype=WORDS_OF_4, is_pure=False, pack=1
        )
    else:
        words = tl.inline_asm_elementwise(
            POLL, OPERANDS, [address, epoch, rank, waits, timeout_ns], dtype=WORDS_OF_8, is_pure=False, pack=1
        )
    return words


WORDS_OF_2, WORDS_OF_4, WORDS_OF_8 = (
    tl.constexpr((tl.int32,) * (WORDS_PER_MESSAGE * ranks + 1)) for ranks in (2, 4, 8)
)


@triton.jit
def trap_for(missing, layer_id, rank):
    """Ends the process's CUDA context, after one line that says who waited for whom, where a rank is missing."""
    if missing >= 0:
        tl.inline_asm_elementwise(  # one thread speaks for all
            "{ .reg .pred others; .reg .b32 thread; mov.u32 thread, %tid.x; setp.ne.u32 others, thread, 0; "
            "@others exit; mov.b32 $0, 0; }",
            "=r",
            [],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        tl.device_print(
            "All-reduce + norm: no row of a peer within the time limit. Operands: layer, this rank, rank waited for",
            layer_id,
            rank,
            missing,
        )
        tl.inline_asm_elementwise("trap; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


def poll_operands(ranks: int) -> str:
    """The operands of :func:`poll_assembly`: 3 words of each rank and the missing one; then the inputs."""
    return ",".join(["=&r"] * (WORDS_PER_MESSAGE * ranks + 1) + ["l", "r", "r", "r", "l"])


@functools.cache
def poll_assembly(ranks: int, messages: int) -> str:
    """PTX by which a thread polls the same message of all ranks but its own until all have one epoch.

    Outputs: the three words of each rank's message, then the lowest rank whose message is missing, or -1. Inputs: the
    address of rank 0's message, the epoch, this rank, whether there is anything to wait for, the time limit in ns. A
    rank's message is ``messages`` messages behind that of the rank before.

    All loads of a turn are under way together.
    """
    first_input = WORDS_PER_MESSAGE * ranks + 1
    missing = f"${first_input - 1}"
    address, epoch, rank, waits, limit = (f"${first_input + i}" for i in range(5))
    each = range(ranks)
    declare = "\n".join(
        f".reg .pred skip{r}, arrived{r};\n.reg .b64 low{r}, high{r};\n.reg .b128 message{r};" for r in each
    )
    prepare = "\n".join(
        f"setp.eq.b32 skip{r}, {rank}, {r};\nor.pred skip{r}, skip{r}, idle;\nmov.b64 low{r}, 0;\nmov.b64 high{r}, 0;"
        for r in each
    )
    load = "\n".join(
        f"@!skip{r} ld.relaxed.sys.global.b128 message{r}, [{address} + {r * messages * MESSAGE_BYTES}];" for r in each
    )
    compare = "\n".join(
        f"@!skip{r} mov.b128 {{low{r}, high{r}}}, message{r};\nmov.b64 {{word, its_epoch}}, high{r};\n"
        f"setp.eq.or.s32 arrived{r}, its_epoch, {epoch}, skip{r};\nand.pred all, all, arrived{r};"
        for r in each
    )
    name_missing = "\n".join(f"@!arrived{r} mov.b32 {missing}, {r};" for r in reversed(each))
    give = "\n".join(
        f"mov.b64 {{${3 * r}, ${3 * r + 1}}}, low{r};\nmov.b64 {{${3 * r + 2}, its_epoch}}, high{r};" for r in each
    )
    return f"""
    {{
    .reg .pred idle, all, yes;
    .reg .b32 word, its_epoch, polls, low;
    .reg .b64 start, now;
    {declare}
    setp.eq.b32 idle, {waits}, 0;
    {prepare}
    mov.b32 {missing}, -1;
    mov.b32 polls, 0;
    mov.b64 start, 0;
    POLL:
    {load}
    setp.eq.b32 all, polls, polls;
    {compare}
    @all bra ARRIVED;
    {poll_again_in_time(limit)}
    {name_missing}
    ARRIVED:
    {give}
    }}
    """
