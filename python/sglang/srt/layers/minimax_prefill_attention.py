"""Attention of a prefill in one launch that a CUDA graph may hold: heads of 128, keys and values where they lie.

    scores = q @ k.T * head_dim**-0.5              # of a request's tokens up to the one that asks
    out = softmax(scores) @ v                      # float32 sums, weights in the dtype of v

The engine's prefill attention is launched for one batch: how many requests it has, and how long they are, is in the
launch, and so the engine's graphs of a prefill end before each attention. Here all of that is read from memory, a
:class:`PrefillBatch`, which is filled before a graph is replayed; only the number of tokens is the graph's.

A CTA takes ``rows`` rows of one KV head, a row being a new token and one of the q heads of that KV head, and goes once
over the keys that any of its rows sees (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
Tokens that pad a batch to its graph's size see none, and get zeros. The same batch gives the same bits, as long as its
slots stay: the engine may give a prefix another request's slots of the same tokens while layers run.

A CTA finds its request before it waits for the launch before (programmatic dependent launch). So batch and slots must
be written two launches earlier, as they are where a model has layers.

Where the server's prefills have Triton's attention, all of them have this one instead, in pieces of graphs and without
graphs too: :class:`PrefillAttention`. Graphs of short prefills have it under any: :mod:`minimax_prefill_graphs`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from sglang.srt.layers.minimax_decode_attention import HEAD_DIM, LOG2_E, reason_against_hardware
from sglang.srt.layers.minimax_log import log_once
from sglang.srt.layers.minimax_nvlink import has_programmatic_launch
from sglang.srt.layers.minimax_watchers import reason_of_watchers
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.server_args import get_global_server_args
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_REQUESTS = 255  # of a batch; its padding is one more, and every CTA looks for its own among all
GRAPH_REQUESTS = 63  # of a batch in a graph, of which every replay looks among so many
SWITCH = "SGLANG_MINIMAX_PREFILL_ATTENTION"  # 0: the attention backend attends, but for graphs of short prefills


class Plan(NamedTuple):
    """``rows`` of a CTA, and how many keys (``block``) it multiplies at once; ``stages`` of the pipeline of loads."""

    rows: int
    block: int
    warps: int
    stages: int


# Up to so many rows of all KV heads. Measured on one H200, benchmark/results/prefill_attention_h200.json.
PLANS = {
    768: Plan(16, 64, 4, 3), 3072: Plan(64, 64, 4, 3), 8448: Plan(64, 128, 8, 3), 49152: Plan(64, 64, 4, 3),
}  # fmt: skip
PLAN_OF_MORE = Plan(128, 64, 8, 3)


def plan_for(tokens: int, num_heads: int) -> Plan:
    return next((plan for limit, plan in PLANS.items() if tokens * num_heads <= limit), PLAN_OF_MORE)


class PrefillBatch:
    """The requests of a prefill, in memory that stays where it is.

    ``table``: int32, [3, ``MAX_REQUESTS`` + 2]; for each request the place of its first new token among those of all,
    how many tokens it has in the KV cache already, and its row of ``slots``. Behind the last comes the padding, as a
    request that sees nothing.

    Args:
        slots: int32, [requests, longest]; which slot of the KV cache a token of a request has, the new ones too.
    """

    def __init__(self, slots: torch.Tensor) -> None:
        self.slots, self.requests, self.tokens = slots, 0, 0
        self.table = torch.zeros(3, MAX_REQUESTS + 2, dtype=torch.int32, device=slots.device)

    def describe(self, forward_batch: Any, tokens: int) -> None:
        """Describes a batch of the engine's, of ``tokens`` with its padding."""
        lengths = forward_batch.extend_seq_lens.int()
        self.fill(lengths, forward_batch.seq_lens, forward_batch.req_pool_indices, tokens)

    def fill(self, lengths: torch.Tensor, totals: torch.Tensor, rows: torch.Tensor, tokens: int) -> None:
        """Describes a batch, in one launch.

        Args:
            lengths: int32, [requests]; new tokens.
            totals: int64, [requests]; tokens with those in the KV cache before. The engine's lengths of prefixes are
                not asked, since they can be one too large for requests that decode among those that begin.
            rows: int64, [requests]; their rows of ``slots``.
            tokens: of the batch, with its padding.
        """
        assert 0 < len(lengths) <= MAX_REQUESTS, f"{len(lengths)} requests"
        assert len(lengths) == len(totals) == len(rows), f"{len(lengths)}, {len(totals)} and {len(rows)} requests"
        self.requests, self.tokens = len(lengths), tokens
        _fill_kernel[(1,)](self.table, lengths, totals, rows, len(lengths), tokens, MOST=MAX_REQUESTS + 1)


@triton.jit(do_not_specialize=["requests", "tokens"])
def _fill_kernel(table_ptr, lengths_ptr, totals_ptr, rows_ptr, requests, tokens, MOST: tl.constexpr):
    number = tl.arange(0, MOST)
    is_request = number < requests
    lengths = tl.load(lengths_ptr + number, mask=is_request, other=0)
    first = tl.where(number <= requests, tl.cumsum(lengths) - lengths, tokens)
    totals = tl.load(totals_ptr + number, mask=is_request, other=0).to(tl.int32)
    cached = tl.where(is_request, totals - lengths, -tokens)  # no token of the padding sees the first key
    rows = tl.load(rows_ptr + number, mask=is_request, other=0).to(tl.int32)
    tl.store(table_ptr + number, first)
    tl.store(table_ptr + MOST, tokens)
    tl.store(table_ptr + (MOST + 1) + number, cached)
    tl.store(table_ptr + 2 * (MOST + 1) + number, rows)


_captured: PrefillBatch | None = None


@contextmanager
def captured_for(batch: PrefillBatch) -> Iterator[None]:
    """Attention of all layers is that of this module, over ``batch``."""
    global _captured
    assert _captured is None, "one prefill is captured at a time"
    _captured = batch
    try:
        yield
    finally:
        _captured = None


def attend_if_captured(q: torch.Tensor, forward_batch: Any, layer_id: int) -> torch.Tensor | None:
    """From and to [tokens, heads * head_dim] of one layer, whose keys and values of the new tokens are stored; or None,
    where no short prefill is being captured."""
    if torch.compiler.is_compiling() or _captured is None:
        return None
    return _attend(q, forward_batch, layer_id, _captured)


def _attend(q: torch.Tensor, forward_batch: Any, layer_id: int, batch: PrefillBatch) -> torch.Tensor:
    pool = forward_batch.token_to_kv_pool
    return prefill_attention(q, pool.get_key_buffer(layer_id), pool.get_value_buffer(layer_id), batch)


def is_prefill_of(forward_batch: Any, dtype: torch.dtype) -> bool:
    """Whether the engine's batch is a prefill that a :class:`PrefillBatch` describes, on a KV cache of ``dtype``."""
    pool, requests = forward_batch.token_to_kv_pool, forward_batch.batch_size
    return (
        forward_batch.forward_mode in (ForwardMode.EXTEND, ForwardMode.MIXED)
        and forward_batch.spec_info is None
        and type(pool) is MHATokenToKVPool
        and pool.store_dtype == pool.dtype == dtype
        and 0 < requests <= MAX_REQUESTS
        and requests == len(forward_batch.extend_seq_lens) == len(forward_batch.seq_lens)
        and requests == len(forward_batch.req_pool_indices)
    )


def choose_prefill_attention(attention: Any) -> PrefillAttention | None:
    """What attends in prefills, or None: the server's attention backend does.

    Called once, when the layers are built, under the model's default dtype, which is that of its activations.
    ``attention``: that of a layer, all of which are alike.
    """
    reason = reason_against_layer(attention) or reason_against_server() or reason_against_backend()
    if reason is not None:
        log_once(f"A prefill's attention is the attention backend's, since {reason}.")
        return None
    log_once(f"A prefill's attention is ours, for batches of up to {MAX_REQUESTS} requests. {SWITCH}=0 turns it off.")
    return PrefillAttention(torch.get_default_dtype())


def reason_against_layer(attention: Any) -> str | None:
    """Why a layer's attention is none for this kernel, as a clause, or None."""
    if attention.attn.head_dim != HEAD_DIM:
        return f"heads have {attention.attn.head_dim} dimensions, not {HEAD_DIM}"
    if attention.fused_inputs is None or not attention.fused_inputs.stores:
        return "the new tokens' keys and values are stored by the backend"
    return None


def reason_against_server() -> str | None:
    """The first of the server's choices that this kernel does not go with, as a clause, or None."""
    arguments = get_global_server_args()
    if (reason := reason_against_hardware()) is not None:
        return reason
    if arguments.enable_deterministic_inference:
        return "its tiles depend on how many tokens a batch has, which is not deterministic"
    if arguments.attn_cp_size > 1:
        return "context-parallel ranks hold parts of a request"
    for flag in ("enable_pdmux", "enable_two_batch_overlap", "enable_memory_saver"):
        if getattr(arguments, flag):
            return f"--{flag.replace('_', '-')} may run two batches at once, or move what describes them"
    return reason_of_watchers(arguments)


def reason_against_backend() -> str | None:
    """Why attention is the backend's also where the kernel could attend, as a clause, or None."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    backend = get_global_server_args().get_attention_backends()[0]
    return None if backend == "triton" else f"it is faster than Triton's only, and prefill has {backend}"


class PrefillAttention:
    """In the place of Triton's attention, for one prefill at a time; made by :func:`choose_prefill_attention`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.batch: PrefillBatch | None = None

    def of(self, forward_batch: Any, tokens: int) -> AbstractContextManager[None]:
        """Within it a prefill's layers attend here. Other batches, and prefills of more requests, change nothing."""
        return self._replaced(forward_batch, tokens) if is_prefill_of(forward_batch, self.dtype) else nullcontext()

    @contextmanager
    def _replaced(self, forward_batch: Any, tokens: int) -> Iterator[None]:
        if self.batch is None:
            self.batch = PrefillBatch(forward_batch.req_to_token_pool.req_to_token)
        self.batch.describe(forward_batch, tokens)
        backend = forward_batch.attn_backend
        forward_batch.attn_backend = _Backend(backend, self.batch)
        try:
            yield
        finally:
            forward_batch.attn_backend = backend


class _Backend:
    """An attention backend whose attention is that of this module for one batch."""

    def __init__(self, backend: Any, batch: PrefillBatch) -> None:
        self.backend, self.batch = backend, batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def forward(self, q, k, v, layer, forward_batch, save_kv_cache: bool = True, **kwargs) -> torch.Tensor:
        if save_kv_cache or kwargs or len(q) != self.batch.tokens:
            return self.backend.forward(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        return _attend(q, forward_batch, layer.layer_id, self.batch)


def prefill_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: PrefillBatch, plan: Plan | None = None
) -> torch.Tensor:
    """Attends, by one plan.

    Args:
        q: [tokens, heads * head_dim], contiguous; the tokens of ``batch``, its padding too.
        k_cache, v_cache: [slots, KV heads, head_dim] of q's dtype, heads contiguous.

    Returns:
        Like q.
    """
    tokens, width = q.shape
    num_kv_heads = k_cache.shape[1]
    group = width // (num_kv_heads * HEAD_DIM)
    assert q.is_contiguous() and width == group * num_kv_heads * HEAD_DIM, f"q {tuple(q.shape)}, {q.stride()}"
    for cache in (k_cache, v_cache):
        assert cache.dtype == q.dtype and cache.stride()[1:] == (HEAD_DIM, 1), f"{cache.dtype}, {cache.stride()}"
    plan = plan or plan_for(tokens, width // HEAD_DIM)
    out = torch.empty_like(q)
    among = max(GRAPH_REQUESTS + 1, triton.next_power_of_2(batch.requests + 1))
    # A request has at most one tile that is not full, and so has the padding.
    grid = (triton.cdiv(tokens * group, plan.rows) + min(tokens, among), num_kv_heads)
    pdl = has_programmatic_launch(q.device)
    options = {"launch_pdl": True} if pdl else {}
    _prefill_attention_kernel[grid](
        q, k_cache, v_cache, out, batch.table, batch.slots, k_cache.stride(0), v_cache.stride(0),
        batch.slots.stride(0), HEAD_DIM**-0.5 * LOG2_E, GROUP=group, KV_HEADS=num_kv_heads, DIM=HEAD_DIM,
        MOST=MAX_REQUESTS + 1, AMONG=among, ROWS=plan.rows, BLOCK=plan.block, PDL=pdl, num_warps=plan.warps,
        num_stages=plan.stages, **options,
    )  # fmt: skip
    return out


@triton.jit
def _prefill_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, table_ptr, slots_ptr, k_stride, v_stride, slots_stride, scale, GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, MOST: tl.constexpr, AMONG: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """CTA (t, h): tile t of all requests' tiles, KV head h. ``scale`` is for exponents of 2. The table has ``MOST``
    requests, of which the first ``AMONG`` have all of the batch's tokens."""
    cta, kv_head = tl.program_id(0), tl.program_id(1)
    number = tl.arange(0, AMONG)
    tokens_of_each = tl.load(table_ptr + number + 1) - tl.load(table_ptr + number)
    upto = tl.cumsum(tl.cdiv(tokens_of_each * GROUP, ROWS))
    request = tl.sum((upto <= cta).to(tl.int32))
    if request >= AMONG:
        return
    first_row = (cta - tl.sum(tl.where(number == request - 1, upto, 0))) * ROWS
    begin = tl.load(table_ptr + request)
    tokens = tl.load(table_ptr + request + 1) - begin
    cached = tl.load(table_ptr + (MOST + 1) + request)
    my_slots = slots_ptr + tl.load(table_ptr + 2 * (MOST + 1) + request).to(tl.int64) * slots_stride
    row = first_row + tl.arange(0, ROWS)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    position = cached + token
    end = cached + tl.minimum(tl.cdiv(first_row + ROWS, GROUP), tokens)
    key, dim = tl.arange(0, BLOCK), tl.arange(0, DIM)
    k_ptr += kv_head * DIM
    v_ptr += kv_head * DIM
    # As in decode attention: a tile's slots come while the one before is multiplied, not in the pipeline of its keys.
    slot = tl.load(my_slots + key, mask=key < end, other=0)
    if PDL:
        gdc_wait()  # before the first read of q and of the new tokens, and the first write
        gdc_launch_dependents()
    is_row = token < tokens
    place = ((begin + token).to(tl.int64) * (KV_HEADS * GROUP) + head)[:, None] * DIM + dim[None, :]
    q = tl.load(q_ptr + place, mask=is_row[:, None], other=0.0)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    values = tl.zeros([ROWS, DIM], tl.float32)
    for at in range(0, end, BLOCK):
        inside, where = at + key < end, slot.to(tl.int64)[:, None]
        slot = tl.load(my_slots + at + BLOCK + key, mask=at + BLOCK + key < end, other=0)
        k = tl.load(k_ptr + where * k_stride + dim[None, :], mask=inside[:, None], other=0.0)
        sees = at + key[None, :] <= position[:, None]
        scores = tl.where(sees, tl.dot(q, k.T) * scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights, fewer = tl.exp2(scores - larger[:, None]), tl.exp2(largest - larger)
        v = tl.load(v_ptr + where * v_stride + dim[None, :], mask=inside[:, None], other=0.0)
        values = values * fewer[:, None] + tl.dot(weights.to(v.dtype), v)
        total = total * fewer + tl.sum(weights, 1)
        largest = larger
    values = values / tl.where(total > 0, total, 1.0)[:, None]  # the padding's are zero
    tl.store(out_ptr + place, values.to(out_ptr.dtype.element_ty), mask=is_row[:, None])
