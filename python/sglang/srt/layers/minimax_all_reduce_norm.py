"""All-reduce + residual add + RMSNorm of a few tokens in one launch, over plain NVLink stores.

    total = all_reduce(x)                                   # [tokens, hidden_size], over 2, 4 or 8 GPUs of one host
    residual += total
    normed = residual * rsqrt(mean(residual ** 2) + eps) * weight

One CTA takes one row. It stores its row into the inbox of every peer, polls its own inbox for theirs, adds all ranks'
rows in rank order, its own among them, so that all ranks get the same bits, and goes on with residual and norm. Every
sum and product is float32: bfloat16 is what comes in, what the new residual is stored as, and what comes out. The
engine's two kernels round the sum over ranks to bfloat16 as well, in between; here it is not rounded. A row may also
come as its float32 parts (:mod:`minimax_parts`): these are added in their order and rounded to bfloat16, as they would
have been by a launch of its own.

How rows get from rank to rank, and why no flag and no fence is needed, is in :mod:`minimax_row_exchange`.

Why waiting CTAs never starve the ones they wait for. A CTA sends its row before it waits, and waits for the CTAs of the
same row on other GPUs only. All CTAs of a launch fit on the GPU at once, under the register cap of the launch, so each
comes to run as soon as whatever else is on the GPU ends; what else is on the GPU must not wait for peers itself. Only a
pipeline's NCCL may, which takes a few multiprocessors while it waits for another stage: GPUs start the CTAs of a launch
in the order of their numbers, though nobody promises it, so the first row that is not through is on all of them, and
makes room for the next.
"""

# ruff: noqa: RUF005  a Triton function cannot unpack a tuple into another

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from sglang.srt.layers.minimax_all_reduce_norm_paths import MAX_TOKENS
from sglang.srt.layers.minimax_nvlink import (
    GRAPH_TIMEOUT_SECONDS,
    has_programmatic_launch,
    inbox_on_symmetric_memory,
    peer_timeout_ms,
    registers_per_thread,
    smallest_gpu,
)
from sglang.srt.layers.minimax_parts import Parts
from sglang.srt.layers.minimax_row_exchange import (
    RowExchange,
    await_rows,
    inbox_bytes,
    messages_per_row,
    poll_assembly,
    poll_operands,
    send,
    trap_for,
)
from sglang.srt.utils.custom_op import register_custom_op
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


class Plan(NamedTuple):
    """Warps of a CTA, CTAs that must fit on a multiprocessor together, and up to how many tokens it is taken."""

    num_warps: int
    ctas_per_sm: int
    max_tokens: int = 2**31 - 1

    def takes(self, tokens: int, multiprocessors: int) -> bool:
        return tokens <= min(self.max_tokens, self.ctas_per_sm * multiprocessors)

    @property
    def registers_per_thread(self) -> int:
        return registers_per_thread(self.num_warps, self.ctas_per_sm)


# The first whose CTAs all fit at once is taken. benchmark/all_reduce_norm.py times others.
PLANS = (Plan(8, 1, max_tokens=8), Plan(16, 1), Plan(16, 2))


def rows_that_fit(num_multiprocessors: int, num_ranks: int) -> int:
    """How many rows one launch may have: no more than are worth it, nor than there is room for waiting CTAs."""
    return min(MAX_TOKENS[num_ranks], num_multiprocessors * max(plan.ctas_per_sm for plan in PLANS))


def row_exchange_of(group, device: torch.device, hidden_size: int) -> RowExchange:
    """An exchange on symmetric memory; collective over ``group``, an engine ``GroupCoordinator`` for which
    :func:`minimax_nvlink.peers_are_reachable` is true."""
    smallest = smallest_gpu(group, device)
    max_tokens = rows_that_fit(smallest, group.world_size)
    inbox, addresses = inbox_on_symmetric_memory(group, device, inbox_bytes(group.world_size, hidden_size, max_tokens))
    return RowExchange(inbox, addresses, group.rank_in_group, hidden_size, max_tokens, smallest)


class AllReduceNorm:
    """All-reduce, residual add and RMSNorm over one tensor-parallel group, for all layers of a model.

    Args:
        group: the engine's ``GroupCoordinator``, whose ranks all call in the same order.
        exchange: of the same ranks; None: plain torch and the group's all-reduce, on a CPU.
        max_tokens: up to so many tokens a caller should come here; None: as many as the exchange has rows for.
        peer_timeout_seconds: how long a GPU waits for a peer before it traps; None: long enough for a peer that
            compiles kernels, and less in CUDA graphs.
    """

    def __init__(
        self,
        group,
        exchange: RowExchange | None,
        max_tokens: int | None = None,
        peer_timeout_seconds: float | None = None,
    ) -> None:
        if max_tokens is None:
            assert exchange is not None, "without an exchange nothing says up to how many tokens this is worth it"
            max_tokens = exchange.max_tokens
        self.group, self.exchange, self.max_tokens = group, exchange, max_tokens
        self.peer_timeout_seconds = peer_timeout_seconds
        self._handle = len(_operators)
        _operators.append(self)

    def __call__(
        self, x: torch.Tensor | Parts, residual: torch.Tensor, weight: torch.Tensor, eps: float, layer_id: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds all ranks' ``x`` to ``residual`` and norms the sum.

        Args:
            x: [tokens, hidden_size], this rank's part, contiguous; all ranks call with the same number of tokens, 0
                included. On a GPU bfloat16. What it holds afterwards is not said. Or parts of it, but in a compiled
                graph, for as many tokens as the exchange has rows for.
            residual: of the same shape and dtype, contiguous, the same on every rank; the sum is written to it.
            weight: [hidden_size] of the same dtype, contiguous.
            eps: added to the mean of squares.
            layer_id: said by the error of a peer that never answers.

        Returns:
            (normed, residual), as a norm of the engine's does.

        Raises:
            ValueError: a shape, stride or dtype other than these.
        """
        if torch.compiler.is_compiling():
            assert isinstance(x, torch.Tensor), "a compiled graph knows no parts"
            return minimax_all_reduce_norm(self._handle, x, residual, weight, eps, layer_id), residual
        return self.run(x, residual, weight, eps, layer_id), residual

    def run(
        self, x: torch.Tensor | Parts, residual: torch.Tensor, weight: torch.Tensor, eps: float, layer_id: int
    ) -> torch.Tensor:
        """The operator itself: writes ``residual`` and returns the normed sum; what a compiled graph calls."""
        tokens = x.shape[0]
        if tokens == 0:  # no rank of the group has any
            return torch.empty_like(residual)
        if self.exchange is None and isinstance(x, Parts):
            x = x.summed()
        self._check(x, residual, weight)
        if self.exchange is None:
            return add_and_norm(self.group.all_reduce(x), residual, weight, eps)
        if tokens > self.exchange.max_tokens:  # only a compiled graph, which serves every number of tokens
            return self._by_collective(x, residual, weight, eps)
        multiprocessors = self.exchange.num_multiprocessors
        plan = next(plan for plan in PLANS if plan.takes(tokens, multiprocessors))
        return self.launch(plan, x, residual, weight, eps, layer_id)

    def launch(
        self,
        plan: Plan,
        x: torch.Tensor | Parts,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        layer_id: int,
    ) -> torch.Tensor:
        """:meth:`run` by one plan, of at least one token and no more than the exchange has rows for."""
        exchange, normed = self.exchange, torch.empty_like(residual)
        assert exchange is not None and x.shape[0] <= exchange.max_tokens, "more rows than the inboxes have"
        hidden_size, ranks = exchange.hidden_size, exchange.num_ranks
        messages = messages_per_row(hidden_size)
        options: dict = {"num_warps": plan.num_warps, "maxnreg": plan.registers_per_thread}
        if pdl := has_programmatic_launch(residual.device):
            options["launch_pdl"] = True
        given, num_parts, has_ids = (x, exchange.epochs, 0, 0, 0, 0), 0, False  # what is not read may be anything
        if isinstance(x, Parts):
            num_parts, has_ids = x.values.shape[0], x.ids is not None
            ids = x.ids if has_ids else exchange.epochs
            given = (x.values, ids, x.values.stride(0), x.values.stride(1), x.first_expert, x.experts)
        _all_reduce_norm_kernel[(x.shape[0],)](
            *given, residual, weight, normed, exchange.inbox_addresses, exchange.epochs, eps, exchange.max_tokens,
            exchange.rank, layer_id, peer_timeout_ms(self.peer_timeout_seconds),
            HIDDEN_SIZE=hidden_size, MESSAGES=messages, BLOCK=32 * plan.num_warps, RANKS=ranks, PDL=pdl,
            POLL=poll_assembly(ranks, messages), OPERANDS=poll_operands(ranks), PARTS=num_parts, HAS_IDS=has_ids,
            **options,
        )  # fmt: skip
        return normed

    def _by_collective(self, x, residual, weight, eps: float) -> torch.Tensor:
        from sgl_kernel import fused_add_rmsnorm

        total = self.group.all_reduce(x)
        if total.data_ptr() == x.data_ptr():  # what an operator returns must not be what it was given
            total = total.clone()
        fused_add_rmsnorm(total, residual, weight, eps)
        return total

    def _check(self, x: torch.Tensor | Parts, residual: torch.Tensor, weight: torch.Tensor) -> None:
        width = x.shape[1] if self.exchange is None else self.exchange.hidden_size
        dtype = residual.dtype if self.exchange is None else torch.bfloat16
        checked = [("residual", residual, x.shape), ("weight", weight, (width,))]
        if isinstance(x, Parts):
            values, ids = x.values, x.ids
            assert x.shape[1] == width and values.dtype == torch.float32, f"{values.dtype} parts of {tuple(x.shape)}"
            assert values.stride(2) == 1 and not (values.stride(0) | values.stride(1)) % 2, "pairs of values are read"
            assert ids is None or (ids.dtype == torch.int32 and ids.is_contiguous()), "contiguous int32 ids"
        else:
            checked.insert(0, ("x", x, (x.shape[0], width)))
        for name, given, shape in checked:
            if tuple(given.shape) != tuple(shape) or given.dtype != dtype or not given.is_contiguous():
                raise ValueError(
                    f"{name} has shape {tuple(given.shape)}, strides {given.stride()} and dtype {given.dtype}, and "
                    f"must be {tuple(shape)}, contiguous, of {dtype}: all-reduce and norm it apart otherwise"
                )

    def check(self, weight: torch.Tensor) -> str | None:
        """What is wrong with the launch between these GPUs, or None: random rows, against plain torch.

        Every rank draws the parts of all of them, so what is expected takes no exchange. Few rows and as many as there
        may be, four launches each, one right after the other as in a graph: both halves of the inboxes, and each half
        over what was in it before. A rank that finds something wrong launches on, since the others wait for its rows.

        Args:
            weight: whose hidden size, dtype and device the rows have.

        Raises:
            RuntimeError: a launch failed, as it does where no row of a peer arrives in ``GRAPH_TIMEOUT_SECONDS``.
        """
        generator, wrong = torch.Generator("cpu").manual_seed(20), None
        limit, self.peer_timeout_seconds = self.peer_timeout_seconds, self.peer_timeout_seconds or GRAPH_TIMEOUT_SECONDS
        try:
            for tokens in sorted({1, min(7, self.max_tokens), self.max_tokens}):
                found = self._check_rows(tokens, weight, generator)
                wrong = wrong or found
        finally:
            self.peer_timeout_seconds = limit
        return wrong

    def _check_rows(self, tokens: int, weight: torch.Tensor, generator: torch.Generator) -> str | None:
        group, (hidden_size,), ones = self.group, weight.shape, torch.ones_like(weight)

        def draw(*shape: int) -> torch.Tensor:
            values = torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)
            return values.to(device=weight.device, dtype=weight.dtype)

        drawn = [(draw(group.world_size, tokens, hidden_size), draw(tokens, hidden_size)) for _ in range(4)]
        given = [(parts[group.rank_in_group].clone(), residual.clone()) for parts, residual in drawn]
        outputs = [self(x, residual, ones, CHECKED_EPS, layer_id=-1) for x, residual in given]
        for turn, ((parts, wanted_sum), (normed, summed)) in enumerate(zip(drawn, outputs, strict=True)):
            wanted_norm = add_and_norm(parts.float().sum(0), wanted_sum, ones, CHECKED_EPS)
            for name, got, wanted in (("sum", summed, wanted_sum), ("norm", normed, wanted_norm)):
                # Float32 sums in another order may lie across a tie of bfloat16, and so a rounding apart.
                if not torch.allclose(got.float(), wanted.float(), rtol=2**-7, atol=2**-7):
                    worst = (got.float() - wanted.float()).abs().max().item()
                    return f"the {name} of {tokens} rows is {worst:.3g} off in launch {turn + 1}"
        return None


CHECKED_EPS = 1e-6


def add_and_norm(total: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """What the kernel does once it has the sum over ranks, in plain torch: float32, each result rounded once."""
    summed = total.float() + residual.float()
    residual.copy_(summed)
    normed = summed * torch.rsqrt(summed.square().mean(-1, keepdim=True) + eps) * weight.float()
    return normed.to(residual.dtype)


_operators: list[AllReduceNorm] = []  # a compiled graph names one by its place here


def _no_rows(
    operator: int, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, layer_id: int
) -> torch.Tensor:
    return torch.empty_like(x)


# x too: an all-reduce, where that is taken, may sum in place.
@register_custom_op(mutates_args=["x", "residual"], fake_impl=_no_rows)
def minimax_all_reduce_norm(
    operator: int, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, layer_id: int
) -> torch.Tensor:
    """:meth:`AllReduceNorm.run` as a torch operator, opaque to torch.compile and to piecewise CUDA graphs."""
    return _operators[operator].run(x, residual, weight, eps, layer_id)


@triton.jit
def _place_of(chunk: tl.constexpr, part: tl.constexpr, message, MESSAGES: tl.constexpr, WORDS: tl.constexpr):
    """Which word of a row is the ``part``-th of each message of a chunk, and whether there is one.

    The words of message m are m, m + MESSAGES and m + 2 * MESSAGES: neighbouring threads read neighbouring words.
    """
    number = chunk * message.shape[0] + message
    place = part * MESSAGES + number
    return place, (number < MESSAGES) & (place < WORDS)


@triton.jit
def _load_row(row_ptr, message, MESSAGES: tl.constexpr, WORDS: tl.constexpr, CHUNKS: tl.constexpr):
    """The words of a row: for each chunk the three of each message."""
    words = ()
    for chunk in tl.static_range(CHUNKS):
        for part in tl.static_range(3):
            at, inside = _place_of(chunk, part, message, MESSAGES, WORDS)
            # Volatile keeps the load where it stands: before the wait, and not after it, where the values are used.
            words = words + (tl.load(row_ptr + at, mask=inside, other=0, volatile=True),)
    return words


@triton.jit
def _add_parts(
    row_ptr, part_stride, ids_ptr, first_expert, experts, message, MESSAGES: tl.constexpr, WORDS: tl.constexpr,
    CHUNKS: tl.constexpr, PARTS: tl.constexpr, HAS_IDS: tl.constexpr,
):  # fmt: skip
    """As :func:`_load_row`, from float32 parts of the row, which are added in their order and rounded."""
    pairs, counts = (), ()
    for chunk in tl.static_range(CHUNKS):
        for word in tl.static_range(3):
            at, inside = _place_of(chunk, word, message, MESSAGES, WORDS)
            for part in tl.static_range(PARTS):
                pair = (row_ptr + part * part_stride.to(tl.int64)).to(tl.pointer_type(tl.int64)) + at
                pairs = pairs + (tl.load(pair, mask=inside, other=0),)
    if HAS_IDS:  # behind the parts, also those that nobody wrote: all loads are under way together
        for part in tl.static_range(PARTS):
            expert = tl.load(ids_ptr + part) - first_expert
            counts = counts + ((expert >= 0) & (expert < experts),)
    words = ()
    for word in tl.static_range(3 * CHUNKS):
        low, high = tl.zeros(message.shape, tl.float32), tl.zeros(message.shape, tl.float32)
        for part in tl.static_range(PARTS):
            next_low, next_high = _halves(pairs[word * PARTS + part])
            if HAS_IDS:
                next_low, next_high = tl.where(counts[part], next_low, 0.0), tl.where(counts[part], next_high, 0.0)
            low += next_low
            high += next_high
        words = words + (_word(low, high),)
    return words


@triton.jit
def _halves(pair):
    """The two float32 values of 64 bits."""
    return pair.to(tl.int32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _values(words):
    """The two bfloat16 values of each 32-bit word as float32, of which a bfloat16 is the upper half."""
    return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _word(low, high):
    """Two float32 values, rounded to bfloat16, in one word."""
    first = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
    second = high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
    return (first & 65535) | (second << 16)


@triton.jit
def _add_and_larger(a_sum, a_missing, b_sum, b_missing):
    return a_sum + b_sum, tl.maximum(a_missing, b_missing)


@triton.jit(do_not_specialize=[
    "max_tokens", "rank", "layer_id", "peer_timeout_ms", "part_stride", "row_stride", "first_expert", "experts",
])  # fmt: skip
def _all_reduce_norm_kernel(
    x_ptr, ids_ptr, part_stride, row_stride, first_expert, experts, residual_ptr, weight_ptr, normed_ptr, inboxes_ptr,
    epochs_ptr, eps, max_tokens, rank, layer_id, peer_timeout_ms,
    HIDDEN_SIZE: tl.constexpr, MESSAGES: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
    POLL: tl.constexpr, OPERANDS: tl.constexpr, PARTS: tl.constexpr, HAS_IDS: tl.constexpr,
):  # fmt: skip
    """The CTA of row r. A thread has one message in each chunk of ``BLOCK``, which is the number of threads: given two
    at once, Triton would lay them out in two ways, and poll for each of these."""
    WORDS: tl.constexpr = HIDDEN_SIZE // 2
    CHUNKS: tl.constexpr = (MESSAGES + BLOCK - 1) // BLOCK
    row = tl.program_id(0)
    message = tl.arange(0, BLOCK)
    start = row.to(tl.int64) * WORDS
    residual_row = residual_ptr.to(tl.pointer_type(tl.int32)) + start
    normed_row = normed_ptr.to(tl.pointer_type(tl.int32)) + start

    # What no earlier launch writes is read before those are waited for.
    peers = ()
    for turn in tl.static_range(1, RANKS):
        peers = peers + (tl.load(inboxes_ptr + (rank + turn) % RANKS),)
    inbox = tl.load(inboxes_ptr + rank)
    weight = _load_row(weight_ptr.to(tl.pointer_type(tl.int32)), message, MESSAGES, WORDS, CHUNKS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

    epoch = tl.load(epochs_ptr + row, volatile=True) + 1  # every thread has it before the first barrier of the CTA
    if PARTS == 0:
        x = _load_row(x_ptr.to(tl.pointer_type(tl.int32)) + start, message, MESSAGES, WORDS, CHUNKS)
    else:
        x = _add_parts(
            x_ptr + row.to(tl.int64) * row_stride, part_stride, ids_ptr + row * PARTS, first_expert, experts, message,
            MESSAGES, WORDS, CHUNKS, PARTS, HAS_IDS,
        )  # fmt: skip
    first = ((epoch & 1) * max_tokens + row).to(tl.int64) * (RANKS * MESSAGES * 16)  # of rank 0's messages, in bytes
    place = first + message * 16
    own = place + rank * (MESSAGES * 16)
    for chunk in tl.static_range(CHUNKS):
        sends = (chunk * BLOCK + message < MESSAGES).to(tl.int32)
        for turn in tl.static_range(RANKS - 1):  # another peer first on every rank, so that all links are in use
            words = x[3 * chunk], x[3 * chunk + 1], x[3 * chunk + 2]
            send(peers[turn] + own + chunk * BLOCK * 16, words, epoch, sends, POLL != "")
    residual = _load_row(residual_row, message, MESSAGES, WORDS, CHUNKS)

    totals = ()
    squares = tl.zeros((BLOCK,), tl.float32)
    missing = tl.full((BLOCK,), -1, tl.int32)
    timeout_ns = peer_timeout_ms.to(tl.int64) * 1000000
    for chunk in tl.static_range(CHUNKS):
        waits = (chunk * BLOCK + message < MESSAGES).to(tl.int32)
        theirs = await_rows(
            inbox + place + chunk * BLOCK * 16, epoch, rank, waits, timeout_ns, MESSAGES, RANKS, POLL, OPERANDS
        )
        missing = tl.maximum(missing, theirs[3 * RANKS])
        for part in tl.static_range(3):
            mine = x[3 * chunk + part]
            low, high = _values(tl.where(rank == 0, mine, theirs[part]))
            for sender in tl.static_range(1, RANKS):
                next_low, next_high = _values(tl.where(rank == sender, mine, theirs[3 * sender + part]))
                low += next_low
                high += next_high
            residual_low, residual_high = _values(residual[3 * chunk + part])
            low += residual_low
            high += residual_high
            squares += low * low + high * high
            totals = totals + ((low, high),)
    sum_of_squares, missing = tl.reduce((squares, missing), 0, _add_and_larger)  # one round for both
    if POLL != "":
        trap_for(missing, layer_id, rank)
    inverse_rms = tl.rsqrt(sum_of_squares / HIDDEN_SIZE + eps)
    for chunk in tl.static_range(CHUNKS):
        for part in tl.static_range(3):
            low, high = totals[3 * chunk + part]
            weight_low, weight_high = _values(weight[3 * chunk + part])
            at, inside = _place_of(chunk, part, message, MESSAGES, WORDS)
            normed = _word(low * inverse_rms * weight_low, high * inverse_rms * weight_high)
            tl.store(normed_row + at, normed, mask=inside)
            tl.store(residual_row + at, _word(low, high), mask=inside)
    tl.store(epochs_ptr + row, epoch)
