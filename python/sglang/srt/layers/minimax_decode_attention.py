"""Decode attention of MiniMax-M2 in one launch: a token a request, heads of 128, keys and values where they lie.

    scores = q @ k.T * head_dim**-0.5              # of a request's cached tokens, for each head
    out = softmax(scores) @ v                      # float32 sums, weights in the dtype of v

A request's tokens are divided into parts alike, and a CTA takes a part for all q heads of a KV head. How many parts a
request has follows from its share of the tokens of all requests, so that there is about as much work for every
multiprocessor whether one request is long or many are short, and so that all parts run at once, but for what many
requests far below the average add, as each has a part; the CTAs read it from the batch, whose graph was captured for
any lengths. Each CTA has a maximum, a sum and weighted values; the last of a request's CTAs to come scales and adds
those of all, in the order of the tokens (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; the
division of one request is that of Flash-Decoding). Which one is last changes nothing: the same batch gives the same
bits.

Which part a CTA has, and which slots its first tile, does not depend on the launch before, and is found before the wait
for it (programmatic dependent launch). So whatever writes lengths and slots must be done two launches earlier, as it is
in a model.
"""

# ruff: noqa: RUF005  a Triton function cannot unpack a tuple into another

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
from sglang.srt.layers.minimax_log import log_once
from sglang.srt.layers.minimax_nvlink import has_programmatic_launch, num_multiprocessors
from sglang.srt.layers.minimax_watchers import reason_of_watchers
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.server_args import get_global_server_args
from sglang.srt.utils import get_device_capability, is_cuda
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

HEAD_DIM = 128
MAX_GROUP = 16  # q heads of a KV head: rows of one product of the tensor cores
MAX_REQUESTS = 1024  # of a batch; every CTA looks for its request among all
LOG2_E = 1.4426950408889634
SWITCH = "SGLANG_MINIMAX_DECODE_ATTENTION"  # 0: the attention backend attends


class Plan(NamedTuple):
    """How the work is divided.

    ``block``: tokens that a CTA multiplies at once.
    ``stages``: of the pipeline of loads; shared memory holds the keys and values of one tile fewer.
    ``ctas_per_sm``: CTAs that run at once on a multiprocessor; the work is divided into about as many parts.
    ``shortest``: tokens; a request has no more parts than its tokens / ``shortest``, rounded up, so that none of
        several has fewer than half of it.
    ``most``: parts that a request has at most, since one CTA adds them.
    """

    block: int
    warps: int
    stages: int
    ctas_per_sm: int
    shortest: int
    most: int


# Up to so many KV heads of all requests. Measured on one H200, benchmark/results/decode_attention_h200.json.
PLANS = {16: Plan(128, 8, 3, 1, 128, 64), 256: Plan(64, 4, 3, 3, 64, 64)}
PLAN_OF_MORE = Plan(64, 4, 2, 4, 64, 64)


def plan_for(requests: int, num_kv_heads: int) -> Plan:
    return next((plan for limit, plan in PLANS.items() if requests * num_kv_heads <= limit), PLAN_OF_MORE)


class CachedTokens(NamedTuple):
    """Which slots of the KV cache a batch attends to.

    bounds: int32; ragged: [requests + 1], request i has ``slots[bounds[i]:bounds[i + 1]]``; else [requests], how many
        of row i of ``slots``.
    slots: int32 or int64, below 2**31; ragged: [tokens of all requests, or more]; else [requests, longest, or more].
    """

    bounds: torch.Tensor
    slots: torch.Tensor
    ragged: bool

    @property
    def requests(self) -> int:
        return self.bounds.shape[0] - self.ragged


def _of_triton(metadata: Any) -> CachedTokens:
    return CachedTokens(metadata.kv_indptr, metadata.kv_indices, True)


def _of_flash_attention(metadata: Any) -> CachedTokens:
    return CachedTokens(metadata.cache_seqlens_int32, metadata.page_table, False)


# By the class's place, since the module of a backend that a server does not use may not be importable.
CACHED_TOKENS: dict[str, Callable[[Any], CachedTokens]] = {
    "sglang.srt.layers.attention.triton_backend.TritonAttnBackend": _of_triton,
    "sglang.srt.layers.attention.flashattention_backend.FlashAttentionBackend": _of_flash_attention,
}
BACKENDS = ("triton", "fa3")


def choose_decode_attention(
    num_heads: int, num_kv_heads: int, head_dim: int, is_stored: bool
) -> DecodeAttention | None:
    """What attends in a decode step, or None: the server's attention backend does.

    Called once, while the layer is built, under the model's default dtype, which is that of its activations.
    ``is_stored``: whether the new tokens' keys and values are in the KV cache before attention.
    """
    reason = reason_against_layer(num_heads, num_kv_heads, head_dim, is_stored) or reason_against_server()
    if reason is not None:
        log_once(f"A decode step's attention is the attention backend's, since {reason}.")
        return None
    up_to = f"for batches of up to {MAX_REQUESTS} requests"
    log_once(f"A decode step's attention is one launch of ours, {up_to}. {SWITCH}=0 turns it off.")
    return DecodeAttention(num_kv_heads, torch.device("cuda", torch.cuda.current_device()))


def reason_against_layer(num_heads: int, num_kv_heads: int, head_dim: int, is_stored: bool) -> str | None:
    """Why a layer, with these heads on a rank, is none for this kernel, as a clause, or None."""
    if head_dim != HEAD_DIM or num_heads % num_kv_heads or num_heads // num_kv_heads > MAX_GROUP:
        return (
            f"it takes heads of {HEAD_DIM} and up to {MAX_GROUP} of q for one of k, not {num_heads} of {head_dim} for "
            f"{num_kv_heads}"
        )
    return None if is_stored else "the new tokens' keys and values are stored by the backend"


def reason_against_hardware() -> str | None:
    """Why attention of ours, in decode or prefill, is none for this GPU or for the default dtype, as a clause, or
    None."""
    if not is_cuda() or get_device_capability()[0] != 9:
        return "it was measured on NVIDIA GPUs of compute capability 9 (Hopper) only"
    if torch.get_default_dtype() not in (torch.bfloat16, torch.float16):
        return f"activations are {torch.get_default_dtype()}, and it takes bfloat16 and float16"
    return None


def reason_against_server() -> str | None:
    """The first of the server's choices that this kernel does not go with, as a clause, or None."""
    arguments = get_global_server_args()
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    if (reason := reason_against_hardware()) is not None:
        return reason
    backend = arguments.get_attention_backends()[1]
    if backend not in BACKENDS:
        return f"it reads the batches of the backends {' and '.join(BACKENDS)}, and decode has {backend}"
    if arguments.page_size not in (None, 1):
        return f"it takes a KV cache in pages of 1 token, not {arguments.page_size}"
    if arguments.enable_deterministic_inference:
        return "how a request is divided depends on the others of its batch, which is not deterministic"
    if arguments.attn_cp_size > 1:
        return "context-parallel ranks hold parts of a request"
    for flag in ("enable_pdmux", "enable_two_batch_overlap", "enable_memory_saver"):
        if getattr(arguments, flag):
            return f"--{flag.replace('_', '-')} may run, or move, its counters while they count"
    return reason_of_watchers(arguments)


class DecodeAttention:
    """Decode attention of one layer; made by :func:`choose_decode_attention`.

    Args:
        num_kv_heads: of this rank.
        device: where it runs.
    """

    def __init__(self, num_kv_heads: int, device: torch.device) -> None:
        # How many of a request's CTAs are done, by KV head; zero between launches.
        self.counters = torch.zeros(MAX_REQUESTS * num_kv_heads, dtype=torch.int32, device=device)

    def __call__(self, q: torch.Tensor, forward_batch: Any, layer_id: int) -> torch.Tensor | None:
        """From and to [requests, heads * head_dim] of one layer, whose keys and values of the new tokens are stored.

        None: this is no plain decode step, on a KV cache of q's dtype, of so few requests; the attention backend
        attends.
        """
        cached = self.cached_tokens(q, forward_batch)
        if cached is None:
            return None
        pool = forward_batch.token_to_kv_pool
        k_cache, v_cache = pool.get_key_buffer(layer_id), pool.get_value_buffer(layer_id)
        plan = plan_for(cached.requests, k_cache.shape[1])
        return decode_attention(q, k_cache, v_cache, cached, self.counters, plan)

    def cached_tokens(self, q: torch.Tensor, forward_batch: Any) -> CachedTokens | None:
        """What each of ``q``'s requests attends to, or None where the attention backend attends."""
        if torch.compiler.is_compiling() or not forward_batch.forward_mode.is_decode():
            return None
        if forward_batch.spec_info is not None:
            return None
        backend, pool = forward_batch.attn_backend, forward_batch.token_to_kv_pool
        if type(backend) is HybridAttnBackend:
            backend = backend.decode_backend
        found = CACHED_TOKENS.get(f"{type(backend).__module__}.{type(backend).__qualname__}")
        if found is None or type(pool) is not MHATokenToKVPool or not pool.store_dtype == pool.dtype == q.dtype:
            return None
        cached = found(backend.forward_metadata)
        return cached if q.shape[0] == cached.requests <= MAX_REQUESTS else None


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cached: CachedTokens,
    counters: torch.Tensor,
    plan: Plan,
) -> torch.Tensor:
    """Attends by one plan.

    Args:
        q: [requests, heads * head_dim], contiguous; from 1 to ``MAX_REQUESTS`` requests.
        k_cache, v_cache: [slots, KV heads, head_dim] of q's dtype, heads contiguous.
        cached: the tokens of each request. One without tokens gets zeros.
        counters: int32, a zero for each request and KV head at least, and zeros again afterwards.

    Returns:
        Like q.
    """
    requests, width = q.shape
    num_kv_heads = k_cache.shape[1]
    group = width // (num_kv_heads * HEAD_DIM)
    assert q.is_contiguous() and width == group * num_kv_heads * HEAD_DIM, f"q {tuple(q.shape)}, {q.stride()}"
    for cache in (k_cache, v_cache):
        assert cache.dtype == q.dtype and cache.stride()[1:] == (HEAD_DIM, 1), f"{cache.dtype}, {cache.stride()}"
    assert 0 < requests <= MAX_REQUESTS and counters.numel() >= requests * num_kv_heads, f"{requests} requests"
    out = torch.empty_like(q)
    aim = max(1, plan.ctas_per_sm * num_multiprocessors(q.device) // num_kv_heads)
    grid = (aim + requests, num_kv_heads)  # no request has more than one part above its share of aim
    values = torch.empty(*grid, group, HEAD_DIM, dtype=torch.float32, device=q.device)
    scales = torch.empty(*grid, 2, MAX_GROUP, dtype=torch.float32, device=q.device)
    pdl = has_programmatic_launch(q.device)
    options = {"launch_pdl": True} if pdl else {}
    _decode_attention_kernel[grid](
        q, k_cache, v_cache, out, cached.bounds, cached.slots, values, scales, counters, k_cache.stride(0),
        v_cache.stride(0), 0 if cached.ragged else cached.slots.stride(0), requests, aim, plan.shortest, plan.most,
        HEAD_DIM**-0.5 * LOG2_E, RAGGED=cached.ragged, GROUP=group, GROUP_ROWS=triton.next_power_of_2(group),
        KV_HEADS=num_kv_heads, DIM=HEAD_DIM, ROWS=MAX_GROUP, BLOCK=plan.block, PDL=pdl,
        REQUESTS_BLOCK=max(16, triton.next_power_of_2(requests)), num_warps=plan.warps, num_stages=plan.stages,
        **options,
    )  # fmt: skip
    return out


@triton.jit
def _my_part(
    cta, bounds_ptr, requests, aim, shortest, most, RAGGED: tl.constexpr, REQUESTS_BLOCK: tl.constexpr
):  # fmt: skip
    """(request, where its slots start in a ragged list, its tokens [begin, end), the first CTA of its parts, how many
    parts there are); a request of ``requests`` or more: there is nothing for this CTA."""
    number = tl.arange(0, REQUESTS_BLOCK)
    is_request = number < requests
    bound = tl.load(bounds_ptr + number, mask=is_request, other=0)
    lengths = tl.load(bounds_ptr + number + 1, mask=is_request, other=0) - bound if RAGGED else bound
    total = tl.maximum(tl.sum(lengths), 1)
    # No more than aim parts, so that none waits until others are done; requests whose share rounds to 0 come on top.
    # Shares rounded to the nearest can add up to more than is shared, so 15 of 16 are shared. Where that is too many
    # still, all are, and the shares are rounded down.
    fewer = aim - aim // 16
    is_nearest = tl.sum((2 * lengths * fewer + total) // (2 * total)) <= aim
    aim, half = tl.where(is_nearest, fewer, aim), tl.where(is_nearest, total, 0)
    upto = tl.cumsum(tl.where(is_request, _num_parts(lengths, total, aim, half, shortest, most), 0))
    request = tl.sum((upto <= cta).to(tl.int32))
    first = tl.sum(tl.where(number == request - 1, upto, 0))
    # Read again, from the cache: a sum over all threads would take longer.
    start = tl.load(bounds_ptr + request, mask=request < requests, other=0)
    length = tl.load(bounds_ptr + request + 1, mask=request < requests, other=0) - start if RAGGED else start
    parts, part = _num_parts(length, total, aim, half, shortest, most), cta - first
    return request, start, length * part // parts, length * (part + 1) // parts, first, parts


@triton.jit
def _num_parts(length, total, aim, half, shortest, most):
    """A request's share of ``aim`` parts: rounded down where ``half`` is 0, to the nearest where it is ``total``. One
    at least, since a request without tokens too has zeros to write. 32 bits hold requests of fewer than 2**30 / aim
    tokens: two million, where 528 parts are shared."""
    share = (2 * length * aim + half) // (2 * total)
    return tl.maximum(tl.minimum(tl.minimum(share, most), tl.cdiv(length, shortest)), 1)


@triton.jit(do_not_specialize=["requests", "aim", "shortest", "most"])
def _decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, bounds_ptr, slots_ptr, values_ptr, scales_ptr, counters_ptr, k_stride, v_stride,
    slots_stride, requests, aim, shortest, most, scale, RAGGED: tl.constexpr, GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr, REQUESTS_BLOCK: tl.constexpr,
):  # fmt: skip
    """CTA (c, h): part c of all requests' parts, KV head h. ``scale`` is for exponents of 2."""
    cta, kv_head = tl.program_id(0), tl.program_id(1)
    request, start, begin, end, first, parts = _my_part(
        cta, bounds_ptr, requests, aim, shortest, most, RAGGED, REQUESTS_BLOCK
    )
    if request >= requests:
        return
    my_slots = slots_ptr + (start.to(tl.int64) if RAGGED else request.to(tl.int64) * slots_stride)
    token, dim = tl.arange(0, BLOCK), tl.arange(0, DIM)
    k_ptr += kv_head * DIM
    v_ptr += kv_head * DIM
    # A tile's slots are loaded while the one before is multiplied, into registers. In a pipeline with the keys and
    # values that they lead to they would take stages of it, and a CTA with one tile would wait for those of all stages.
    slot = tl.load(my_slots + begin + token, mask=begin + token < end, other=0).to(tl.int32)
    if PDL:
        gdc_wait()  # before the first read of q and of the new token, and the first write
        gdc_launch_dependents()
    row = tl.arange(0, ROWS)
    is_row = row < GROUP
    head = kv_head * GROUP + row
    q_place = (request.to(tl.int64) * (KV_HEADS * GROUP) + head[:, None]) * DIM + dim[None, :]
    q = tl.load(q_ptr + q_place, mask=is_row[:, None], other=0.0)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    values = tl.zeros([ROWS, DIM], tl.float32)
    for at in range(begin, end, BLOCK):
        inside, place = at + token < end, slot.to(tl.int64)[:, None]
        # The tile's place is added to the pointer: with addresses made of token numbers these loads came one by one
        # between the copies of keys, and 64 requests of 4100 tokens took 99.6 us instead of 72.4.
        slot = tl.load(my_slots + at + BLOCK + token, mask=at + BLOCK + token < end, other=0).to(tl.int32)
        k = tl.load(k_ptr + place * k_stride + dim[None, :], mask=inside[:, None], other=0.0)
        scores = tl.where(inside[None, :], tl.dot(q, k.T) * scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights, fewer = tl.exp2(scores - larger[:, None]), tl.exp2(largest - larger)
        v = tl.load(v_ptr + place * v_stride + dim[None, :], mask=inside[:, None], other=0.0)
        values = values * fewer[:, None] + tl.dot(weights.to(v.dtype), v)
        total = total * fewer + tl.sum(weights, 1)
        largest = larger
    if parts == 1:
        _store_result(out_ptr, values, total[:, None], request, kv_head, GROUP, KV_HEADS, DIM, ROWS)
    else:
        place = cta * KV_HEADS + kv_head
        tl.store(values_ptr + (place * GROUP + row[:, None]) * DIM + dim[None, :], values, mask=is_row[:, None])
        tl.store(scales_ptr + (place * 2 + 0) * ROWS + row, largest)
        tl.store(scales_ptr + (place * 2 + 1) * ROWS + row, total)
        tl.debug_barrier()  # all threads have stored before one of them says so
        counter = counters_ptr + request * KV_HEADS + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1:
            tl.store(counter, 0)
            values_of_all, total_of_all = _add_parts(
                values_ptr, scales_ptr, first, parts, kv_head, GROUP, GROUP_ROWS, KV_HEADS, DIM, ROWS
            )
            _store_result(out_ptr, values_of_all, total_of_all, request, kv_head, GROUP, KV_HEADS, DIM, GROUP_ROWS)


@triton.jit
def _add_parts(
    values_ptr, scales_ptr, first, parts, kv_head, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The values, and [GROUP_ROWS, 1] the sums, of all ``parts`` CTAs of a request, from ``first``, scaled to one
    maximum.

    They are read from the L2 cache, where other multiprocessors put them, past this one's own."""
    TOGETHER: tl.constexpr = 8  # parts under way at once
    row, dim = tl.arange(0, GROUP_ROWS)[:, None], tl.arange(0, DIM)[None, :]
    # Maxima and sums are columns from their load on, so that each lies with the threads that have its row of values.
    largest = tl.full([GROUP_ROWS, 1], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_ROWS, 1], tl.float32)
    values = tl.zeros([GROUP_ROWS, DIM], tl.float32)
    for begin in range(0, parts, TOGETHER):
        loaded = ()
        for i in tl.static_range(TOGETHER):
            place, is_part = (first + begin + i) * KV_HEADS + kv_head, begin + i < parts
            scales = scales_ptr + place * 2 * ROWS + row
            part_largest = tl.load(scales, mask=is_part, other=float("-inf"), cache_modifier=".cg")
            part_total = tl.load(scales + ROWS, mask=is_part, other=0.0, cache_modifier=".cg")
            part_values = tl.load(
                values_ptr + (place * GROUP + row) * DIM + dim, mask=(row < GROUP) & is_part, other=0.0,
                cache_modifier=".cg",
            )  # fmt: skip
            loaded = loaded + ((part_largest, part_total, part_values),)
        larger = largest
        for i in tl.static_range(TOGETHER):
            larger = tl.maximum(larger, loaded[i][0])
        fewer = tl.exp2(largest - larger)
        values, total = values * fewer, total * fewer
        for i in tl.static_range(TOGETHER):
            weight = tl.exp2(loaded[i][0] - larger)
            values += loaded[i][2] * weight
            total += loaded[i][1] * weight
        largest = larger
    return values, total


@triton.jit
def _store_result(
    out_ptr, values, total, request, kv_head, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """``values`` [ROWS, DIM] over ``total`` [ROWS, 1], for the q heads of a KV head."""
    row, dim = tl.arange(0, ROWS)[:, None], tl.arange(0, DIM)[None, :]
    place = (request.to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + row) * DIM + dim
    values = values / tl.where(total > 0, total, 1.0)  # without tokens all of it is zero
    tl.store(out_ptr + place, values.to(out_ptr.dtype.element_ty), mask=row < GROUP)
