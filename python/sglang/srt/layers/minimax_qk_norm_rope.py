"""From the qkv projection to attention in one launch: QK norm over all ranks, partial RoPE, KV-cache store.

    q, k, v = qkv.split(...)
    q, k = minimax_qk_norm.norm_qk(q, k, ...)               # statistics over all heads of all attention-TP ranks
    q, k = rope(q), rope(k)                                 # neox pairs, on the first half of every head
    k_cache[out_cache_loc], v_cache[out_cache_loc] = k, v

A CTA takes one token's row of qkv (several rows, where there are many tokens) into registers, sums the squares of its
q and of its k, swaps the two sums with its peers (:mod:`minimax_sum_exchange`), scales, rotates, and writes k back
where it lay, k and v into the cache, and q into a tensor of its own, to which attention backends would copy it
otherwise. Statistics, products and rotation are float32; the result is cast once.

Four ways, one chosen when a layer is built:
    torch       not a GPU. The sums are all-reduced by the engine's group.
    one launch  one rank in the attention-TP group: nothing to swap.
    exchange    2, 4 or 8 GPUs with NVLink between every pair: one launch.
    collective  peers out of reach: a launch for the sums, the engine's all-reduce, a launch for the rest.

Over two nodes a row may hold a counterpart's q and k too, behind v (:mod:`minimax_counterpart`): their squares are
added to the own, and the ranks of one node swap or all-reduce what otherwise all ranks would.

It is Triton and not CUDA C++ because a serving machine with a CUDA wheel has no nvcc, and nothing here needs more than
Triton and a few lines of PTX. docs/kernels.md has the measurements.
"""

# ruff: noqa: RUF005  a Triton function cannot unpack a tuple into another

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from sglang.srt.layers.minimax_log import log_once
from sglang.srt.layers.minimax_nvlink import (
    has_programmatic_launch,
    peer_timeout_ms,
    peers_are_reachable,
    registers_per_thread,
)
from sglang.srt.layers.minimax_parts import Parts
from sglang.srt.layers.minimax_qk_norm import sums_of_squares, sums_of_squares_triton
from sglang.srt.layers.minimax_qk_norm_paths import (
    EXCHANGE_RANKS,
    reason_against_dimensions,
    reason_against_exchange,
)
from sglang.srt.layers.minimax_sharding import shard_attention
from sglang.srt.layers.minimax_sum_exchange import (
    ROWS_PER_CTA,
    SumExchange,
    await_sums,
    epoch_of,
    exchange_of,
    inbox_of_peer,
    message_offset,
    poll_assembly,
    send_sums,
)
from sglang.srt.utils.custom_op import register_custom_op
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


class LaunchPlan(NamedTuple):
    """Warps of a CTA, CTAs that must fit on a multiprocessor together, and rows that a CTA holds in registers."""

    num_warps: int
    ctas_per_sm: int
    rows: int = 1

    @property
    def registers_per_thread(self) -> int:
        return registers_per_thread(self.num_warps, self.ctas_per_sm)


# Measured on H200 at 16 heads of 128 a rank (TP4), from few tokens to many; other widths scale the warps.
PLANS_AT_2048_VALUES = (
    LaunchPlan(8, 1, 1),
    LaunchPlan(2, 8, 1),
    LaunchPlan(2, 8, 2),
    LaunchPlan(2, 8, 4),
    LaunchPlan(2, 8, 2),
)


def launch_plans(values_per_row: int) -> list[LaunchPlan]:
    """The first plan whose CTAs hold all rows at once is taken, or else the last."""
    plans = []
    for num_warps, ctas_per_sm, rows in PLANS_AT_2048_VALUES:
        scaled_warps = max(1, min(num_warps * values_per_row // 2048, 32))
        scaled_ctas = max(1, min(ctas_per_sm * 2048 // values_per_row, 32))
        plans.append(LaunchPlan(scaled_warps, scaled_ctas, rows))
    return plans


class QKNormRope:
    """QK norm, RoPE and KV-cache store of one attention layer.

    Args:
        num_heads, num_kv_heads: heads of the whole model; each rank's share follows from the group.
        head_dim: width of a head.
        rotary_dim: how many of a head's first values are rotated; on a GPU head_dim / 2, as in MiniMax-M2.
        eps: added to the mean of squares.
        group: the engine's ``GroupCoordinator`` of the attention-TP ranks, which all build their layers in the same
            order; None for a single rank.
        layer_id: said by the error of a peer that never answers.
        device: where the layer runs.
        slot: which exchange buffer. Layers that run in one stream order share a slot; work that may overlap on the
            GPU (a second stream) takes another one.
        peer_timeout_seconds: how long a GPU waits for a peer before it traps; None: long enough for a peer that
            compiles kernels, and less in CUDA graphs.
        shares_gpu: kernels that wait for peers run on another stream at the same time.
        exchange: called with the CTAs that may be on a multiprocessor at once, gives the exchange to use; without it
            the group has one on symmetric memory where its ranks can reach each other.
        node: the group of this node's ranks, where each row holds the q and k of a counterpart on the other node, so
            that the sum over ``node`` is the sum over ``group``; None: the sum is over ``group``.

    Raises:
        ValueError: the heads cannot be divided over the ranks, or a dimension is one that the kernel does not have.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary_dim: int,
        eps: float,
        group,
        layer_id: int,
        device: torch.device | str,
        slot: int = 0,
        peer_timeout_seconds: float | None = None,
        shares_gpu: bool = False,
        exchange: Callable[[int], SumExchange] | None = None,
        node=None,
    ) -> None:
        shards = shard_attention(num_heads, num_kv_heads, 1 if group is None else group.world_size)
        self.has_counterpart = node is not None
        self.group = group if node is None else node  # of the ranks that add their sums up
        self.num_ranks = 1 if group is None else self.group.world_size
        self.rank = 0 if group is None else self.group.rank_in_group
        self.num_heads, self.num_kv_heads = shards.q.heads_per_rank, shards.kv.heads_per_rank
        self.head_dim, self.rotary_dim, self.eps, self.layer_id = head_dim, rotary_dim, eps, layer_id
        # Every holder of a replicated KV head adds its squares, so the sum covers each head that many times.
        self.q_count = shards.q.replicas * num_heads * head_dim
        self.k_count = shards.kv.replicas * num_kv_heads * head_dim
        self.sizes = [heads * head_dim for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        self.row_sizes = [*self.sizes, *self.sizes[:2]] if self.has_counterpart else self.sizes
        self.peer_timeout_seconds = peer_timeout_seconds
        self.device = torch.device(device)
        self.heads_block = triton.next_power_of_2(self.num_heads + 2 * self.num_kv_heads)
        self.exchange: SumExchange | None = None
        self.reason_against_exchange: str | None = None
        self._run = self._choose(exchange, shares_gpu, slot)
        self.handle = len(operators)
        operators.append(self)

    def __call__(
        self,
        qkv: torch.Tensor | Parts,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        positions: torch.Tensor,
        cos_sin_cache: torch.Tensor,
        k_cache: torch.Tensor | None = None,
        v_cache: torch.Tensor | None = None,
        out_cache_loc: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Norms and rotates q and k, k where it lies in ``qkv``, and stores k and v if there are caches.

        Args:
            qkv: [tokens, (heads + 2 KV heads) a rank * head_dim], bfloat16 or float16, contiguous values, rows at any
                stride; with a counterpart its q and k follow, (2 heads + 3 KV heads) in all. All ranks of the group
                must call with the same number of tokens. Or parts of these rows, where :attr:`adds_parts` holds.
            q_weight, k_weight: this rank's shard of the norm's weights, any float dtype, contiguous.
            positions: [tokens], int32 or int64, contiguous.
            cos_sin_cache: [max_position, rotary_dim], cosines then sines, any float dtype, contiguous.
            k_cache, v_cache: [slots, KV heads a rank, head_dim] of the dtype of qkv. None: nothing is stored. A cache
                of another dtype (FP8 with scales) is the engine's to store to.
            out_cache_loc: [tokens], each token's slot, int32 or int64, contiguous.

        Returns:
            q, k, v: [tokens, heads a rank * head_dim] each; q is contiguous, k and v are views of qkv, or of a tensor
            like it.

        Raises:
            ValueError: a shape or dtype other than these.
        """
        q = torch.empty(qkv.shape[0], self.sizes[0], dtype=qkv.dtype, device=self.device)
        parts = None
        if isinstance(qkv, Parts):
            assert self.adds_parts and not torch.compiler.is_compiling(), "parts come where adds_parts was asked for"
            parts, qkv = qkv.values, torch.empty(qkv.shape, dtype=qkv.dtype, device=self.device)
        arguments = (qkv, q, q_weight, k_weight, positions, cos_sin_cache, k_cache, v_cache, out_cache_loc)
        if torch.compiler.is_compiling():
            minimax_qk_norm_rope(self.handle, *arguments)
        else:
            self.run(*arguments, parts=parts)
        _, k, v, *_ = qkv.split(self.row_sizes, dim=-1)
        return q, k, v

    @property
    def adds_parts(self) -> bool:
        """Whether rows may come in parts (:mod:`minimax_parts`), but in compiled graphs: one launch reads them once."""
        return not self.has_counterpart and self._run in (self._run_alone, self._run_exchange, self._run_torch)

    def run(
        self, qkv, q, q_weight, k_weight, positions, cos_sin_cache, k_cache, v_cache, out_cache_loc, parts=None
    ) -> None:
        """The operator itself, which writes q, the k of qkv and the caches; what a compiled graph calls.

        ``parts``: [parts, tokens, width] float32, from which q, k and v are read, and k and v are written to qkv.
        """
        if qkv.shape[0] == 0:  # an idle group: none of its ranks has tokens, so nobody waits for us
            return
        self._check(qkv, q_weight, k_weight, positions, cos_sin_cache, k_cache, v_cache, out_cache_loc)
        arguments = (qkv, q, q_weight, k_weight, positions, cos_sin_cache, k_cache, v_cache, out_cache_loc)
        self._run(*arguments) if parts is None else self._run(*arguments, parts=parts)

    def _choose(self, exchange: Callable[[int], SumExchange] | None, shares_gpu: bool, slot: int):
        self.plans = launch_plans(self.heads_block * self.head_dim)
        self.single_plan = LaunchPlan(max(1, min(self.heads_block // 4, 8)), 1)
        if self.device.type != "cuda":
            return self._run_torch
        reason = reason_against_dimensions(self.head_dim, self.rotary_dim)
        if reason is not None:
            raise ValueError(f"fused QK norm and RoPE on a GPU: {reason}. Call norm, RoPE and store one by one.")
        if self.num_ranks == 1:
            log_once("QK norm, RoPE and KV store: one launch, on this rank alone.")
            return self._run_alone
        if exchange is None:
            reachable = self.num_ranks in EXCHANGE_RANKS and peers_are_reachable(self.group, self.device)
            self.reason_against_exchange = reason = reason_against_exchange(self.num_ranks, reachable, shares_gpu)
            if reason is not None:
                log_once(f"QK norm, RoPE and KV store: two launches and an all-reduce, not one launch: {reason}.")
                return self._run_collective
            exchange = functools.partial(exchange_of, self.group, self.device, slot)
        self.exchange = exchange(max(plan.ctas_per_sm for plan in self.plans))
        log_once(f"QK norm, RoPE and KV store: one launch, sums exchanged between {self.num_ranks} GPUs over NVLink.")
        return self._run_exchange

    def _check(self, qkv, q_weight, k_weight, positions, cos_sin_cache, k_cache, v_cache, out_cache_loc) -> None:
        """Raises ValueError. Words are made for what fails alone: in a prefill without graphs they would cost time."""
        tokens = qkv.shape[0]
        if not (qkv.dim() == 2 and qkv.shape[1] == sum(self.row_sizes) and qkv.stride(1) == 1):
            raise ValueError(
                f"qkv has shape {tuple(qkv.shape)} and strides {qkv.stride()}, and must be [tokens, "
                f"{sum(self.row_sizes)}] with contiguous rows: pass the output of the qkv projection as it is"
            )
        for name, weight, size in (("q_weight", q_weight, self.sizes[0]), ("k_weight", k_weight, self.sizes[1])):
            if not (weight.numel() == size and weight.is_contiguous()):
                raise ValueError(
                    f"{name} has {weight.numel()} values, and this rank's shard has {size}: load the shard of this rank"
                )
        if not (positions.shape == (tokens,) and positions.is_contiguous()):
            raise ValueError(
                f"positions has shape {tuple(positions.shape)} and strides {positions.stride()}, and must have one "
                f"position for each of {tokens} tokens, one behind the other"
            )
        if not (cos_sin_cache.shape[-1] == self.rotary_dim and cos_sin_cache.is_contiguous()):
            raise ValueError(
                f"cos_sin_cache has shape {tuple(cos_sin_cache.shape)}, and must be [max_position, {self.rotary_dim}]"
            )
        if k_cache is None and v_cache is None:
            return
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            if not self._is_cache(cache, qkv.dtype):
                raise ValueError(
                    f"{name} must be [slots, {self.num_kv_heads}, {self.head_dim}] of {qkv.dtype}, and is "
                    f"{None if cache is None else (tuple(cache.shape), cache.dtype)}: without caches nothing is "
                    "stored, and the engine's set_kv_buffer stores to a cache of any dtype"
                )
        if out_cache_loc is None or out_cache_loc.shape != (tokens,) or not out_cache_loc.is_contiguous():
            raise ValueError(
                f"out_cache_loc must have one slot for each of {tokens} tokens, one behind the other, where there is a "
                "cache to store to"
            )

    def _is_cache(self, cache: torch.Tensor | None, dtype: torch.dtype) -> bool:
        return (
            cache is not None
            and cache.dtype == dtype
            and cache.shape[1:] == (self.num_kv_heads, self.head_dim)
            and cache.stride(2) == 1
            and (self.num_kv_heads == 1 or cache.stride(1) == self.head_dim)
        )

    def _run_torch(
        self, qkv, q, q_weight, k_weight, positions, cos_sin_cache, k_cache, v_cache, out_cache_loc, parts=None
    ) -> None:
        if parts is not None:
            qkv.copy_(Parts(parts, dtype=qkv.dtype).summed())
        raw_q, k, v, *of_counterpart = qkv.split(self.row_sizes, dim=-1)
        sums = self._all_reduced(sums_of_squares(raw_q, k, *of_counterpart))
        normed = norm_rope_reference(
            raw_q, k, q_weight, k_weight, sums, positions, cos_sin_cache,
            self.q_count, self.k_count, self.eps, self.head_dim,
        )  # fmt: skip
        q.copy_(normed[0])
        k.copy_(normed[1])
        if k_cache is not None:
            k_cache[out_cache_loc.long()] = k.unflatten(-1, (self.num_kv_heads, self.head_dim))
            v_cache[out_cache_loc.long()] = v.unflatten(-1, (self.num_kv_heads, self.head_dim))

    def _run_alone(self, qkv, *arguments, parts=None) -> None:
        self._launch(qkv.shape[0], self.single_plan, qkv, *arguments, parts=parts)

    def _run_collective(self, qkv, *arguments) -> None:
        raw_q, k, _, *of_counterpart = qkv.split(self.row_sizes, dim=-1)
        sums = self._all_reduced(sums_of_squares_triton(raw_q, k, *of_counterpart))
        self._launch(qkv.shape[0], self.single_plan, qkv, *arguments, sums=sums)

    def _run_exchange(
        self, qkv, q, q_weight, k_weight, positions, cos_sin_cache, k_cache, v_cache, out_cache_loc, parts=None
    ) -> None:
        assert self.exchange is not None, "this path is chosen only where there is an exchange"
        multiprocessors = self.exchange.num_multiprocessors
        limit = self.plans[-1].ctas_per_sm * multiprocessors * ROWS_PER_CTA
        for start in range(0, qkv.shape[0], limit):
            part = slice(start, start + limit)
            tokens = min(limit, qkv.shape[0] - start)
            fitting = (plan for plan in self.plans if tokens <= plan.ctas_per_sm * multiprocessors * plan.rows)
            plan = next(fitting, self.plans[-1])
            assert parts is None or plan.rows == 1, f"{tokens} rows in parts: a CTA has registers for one at a time"
            ctas = min(triton.cdiv(tokens, plan.rows), plan.ctas_per_sm * multiprocessors)
            self._launch(
                ctas, plan, qkv[part], q[part], q_weight, k_weight, positions[part], cos_sin_cache, k_cache, v_cache,
                None if out_cache_loc is None else out_cache_loc[part], parts=parts,
            )  # fmt: skip

    def _all_reduced(self, sums: torch.Tensor) -> torch.Tensor:
        return sums if self.num_ranks == 1 else self.group.all_reduce(sums)

    def _launch(
        self, ctas, plan, qkv, q, q_weight, k_weight, positions, cos_sin_cache, k_cache, v_cache, out_cache_loc,
        sums=None, parts=None,
    ) -> None:  # fmt: skip
        if q_weight.dtype != k_weight.dtype:
            q_weight, k_weight = q_weight.float(), k_weight.float()
        exchange, store = self.exchange, k_cache is not None
        options = {"num_warps": plan.num_warps}
        if exchange is not None:
            options["maxnreg"] = plan.registers_per_thread
        if pdl := has_programmatic_launch(qkv.device):
            options["launch_pdl"] = True
        ranks = exchange.num_ranks if exchange else 1
        _qk_norm_rope_kernel[(ctas,)](
            qkv, qkv if parts is None else parts, *((0, 0) if parts is None else parts.stride()[:2]),
            q, q_weight, k_weight, positions, cos_sin_cache,
            k_cache if store else qkv, v_cache if store else qkv, out_cache_loc if store else positions, sums,
            exchange.inbox_addresses if exchange else None, exchange.epochs if exchange else None,
            qkv.shape[0], qkv.stride(0), k_cache.stride(0) if store else 0, v_cache.stride(0) if store else 0,
            self.q_count, self.k_count, self.eps,
            exchange.max_ctas if exchange else 0, self.rank, self.layer_id,
            peer_timeout_ms(self.peer_timeout_seconds) if exchange else 0,
            NUM_HEADS=self.num_heads, NUM_KV_HEADS=self.num_kv_heads, HEADS_BLOCK=self.heads_block,
            HEAD_DIM=self.head_dim, STORE=store, SUMS_GIVEN=sums is not None, ROWS=plan.rows,
            ONCE=ctas * plan.rows >= qkv.shape[0], RANKS=ranks, SLOTS=ROWS_PER_CTA, PDL=pdl, PACKED=pdl,
            COUNTERPART=self.has_counterpart and sums is None, PARTS=0 if parts is None else parts.shape[0],
            POLL=poll_assembly(plan.rows, ranks) if exchange else "", **options,
        )  # fmt: skip


def norm_rope_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    sums: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    q_count: int,
    k_count: int,
    eps: float,
    head_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel computes, in plain torch: float32 throughout, cast once.

    Args:
        q, k: [tokens, heads a rank * head_dim] each.
        sums: [at least tokens, 2] float32, sums of squares of q and of k over all ranks.
        q_count, k_count: how many values the sums cover, replicas included.

    Returns:
        q and k, normed and rotated, in their own dtype.
    """
    cos, sin = cos_sin_cache[positions.long()].float()[:, None, :].chunk(2, dim=-1)

    def one(x: torch.Tensor, weight: torch.Tensor, total: torch.Tensor, count: int) -> torch.Tensor:
        inverse_rms = torch.rsqrt(total / count + eps)[:, None]
        normed = (x.float() * inverse_rms * weight.float()).unflatten(-1, (-1, head_dim))
        half = cos.shape[-1]
        first, second, rest = normed.split([half, half, head_dim - 2 * half], dim=-1)
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
        return rotated.flatten(1).to(x.dtype)

    tokens = q.shape[0]
    return one(q, q_weight, sums[:tokens, 0], q_count), one(k, k_weight, sums[:tokens, 1], k_count)


operators: list[QKNormRope] = []  # a compiled graph names a layer by its place here


@register_custom_op(mutates_args=["qkv", "q", "k_cache", "v_cache"])
def minimax_qk_norm_rope(
    operator: int,
    qkv: torch.Tensor,
    q: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    out_cache_loc: torch.Tensor | None,
) -> None:
    """:meth:`QKNormRope.run` as a torch operator, opaque to torch.compile and to piecewise CUDA graphs."""
    operators[operator].run(qkv, q, q_weight, k_weight, positions, cos_sin_cache, k_cache, v_cache, out_cache_loc)


@triton.jit
def _load_quarters(pointers, mask, other: tl.constexpr, QUARTER: tl.constexpr):
    """Four tiles of one layout, [heads, QUARTER] each: neox pairs meet in one thread, without a shuffle."""
    a = tl.load(pointers, mask=mask, other=other)
    b = tl.load(pointers + QUARTER, mask=mask, other=other)
    c = tl.load(pointers + 2 * QUARTER, mask=mask, other=other)
    d = tl.load(pointers + 3 * QUARTER, mask=mask, other=other)
    return a, b, c, d


@triton.jit
def _add_parts(pointers, part_stride, mask, dtype: tl.constexpr, QUARTER: tl.constexpr, PARTS: tl.constexpr):
    """As :func:`_load_quarters`, from float32 parts, which are added in their order and rounded."""
    parts = ()  # all are under way together
    for part in tl.static_range(PARTS):
        parts = parts + (_load_quarters(pointers + part * part_stride.to(tl.int64), mask, 0.0, QUARTER),)
    a, b, c, d = parts[0]
    for part in tl.static_range(1, PARTS):
        a, b, c, d = a + parts[part][0], b + parts[part][1], c + parts[part][2], d + parts[part][3]
    return a.to(dtype), b.to(dtype), c.to(dtype), d.to(dtype)


@triton.jit
def _store_quarters(pointers, a, b, c, d, mask, QUARTER: tl.constexpr):
    tl.store(pointers, a, mask=mask)
    tl.store(pointers + QUARTER, b, mask=mask)
    tl.store(pointers + 2 * QUARTER, c, mask=mask)
    tl.store(pointers + 3 * QUARTER, d, mask=mask)


@triton.jit
def _add_pairs(a_first, a_second, b_first, b_second):
    return a_first + b_first, a_second + b_second


@triton.jit
def _sums_of_squares(quarters, is_q, is_k):
    a, b = quarters[0].to(tl.float32), quarters[1].to(tl.float32)
    c, d = quarters[2].to(tl.float32), quarters[3].to(tl.float32)
    squares = a * a + b * b + c * c + d * d
    of_q = tl.ravel(tl.where(is_q, squares, 0.0), can_reorder=True)
    of_k = tl.ravel(tl.where(is_k, squares, 0.0), can_reorder=True)
    return tl.reduce((of_q, of_k), 0, _add_pairs)  # both in one round through shared memory


@triton.jit
def _load_rotation(cos_sin_ptr, position, column, QUARTER: tl.constexpr):
    cos = tl.load(cos_sin_ptr + position * (2 * QUARTER) + column).to(tl.float32)
    sin = tl.load(cos_sin_ptr + position * (2 * QUARTER) + QUARTER + column).to(tl.float32)
    return cos, sin


@triton.jit
def _cast(x, dtype: tl.constexpr, PACKED: tl.constexpr):
    """float32 to ``dtype``; PACKED: two values an instruction, which the compiler does not find by itself."""
    if PACKED and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return x.to(dtype)


@triton.jit
def _finish_row(
    quarters, weights, rotation, row, slot, is_row, q_sum, k_sum, q_count, k_count, eps, offset, head, qkv_ptr,
    q_ptr, qkv_stride, k_cache_ptr, v_cache_ptr, k_cache_stride, v_cache_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, QUARTER: tl.constexpr, STORE: tl.constexpr,
    PACKED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Scales and rotates one row that lies in registers; q goes to its tensor, k back into the row and to the cache.

    So does v where the row came in parts, and is nowhere else.
    """
    HEAD_DIM: tl.constexpr = 4 * QUARTER
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    a, b, c, d = quarters
    cos, sin = rotation
    is_qk = head < NUM_HEADS + NUM_KV_HEADS
    k_or_v = tl.where(is_qk, tl.rsqrt(k_sum / k_count + eps), 1.0)  # v is scaled by 1 and its weight is 1
    inverse_rms = tl.where(head < NUM_HEADS, tl.rsqrt(q_sum / q_count + eps), k_or_v)
    a = a.to(tl.float32) * inverse_rms * weights[0].to(tl.float32)
    b = b.to(tl.float32) * inverse_rms * weights[1].to(tl.float32)
    a_rotated = tl.where(is_qk, a * cos - b * sin, a)
    b_rotated = tl.where(is_qk, b * cos + a * sin, b)
    a = _cast(a_rotated, dtype, PACKED)
    b = _cast(b_rotated, dtype, PACKED)
    c = _cast(c.to(tl.float32) * inverse_rms * weights[2].to(tl.float32), dtype, PACKED)
    d = _cast(d.to(tl.float32) * inverse_rms * weights[3].to(tl.float32), dtype, PACKED)
    q_row = q_ptr + row.to(tl.int64) * (NUM_HEADS * HEAD_DIM) + offset
    k_row = qkv_ptr + row.to(tl.int64) * qkv_stride + offset
    written = is_qk if PARTS == 0 else head < NUM_HEADS + 2 * NUM_KV_HEADS
    _store_quarters(tl.where(head < NUM_HEADS, q_row, k_row), a, b, c, d, written & is_row, QUARTER)
    if STORE:
        k_slot = k_cache_ptr + slot * k_cache_stride + (offset - NUM_HEADS * HEAD_DIM)
        v_slot = v_cache_ptr + slot * v_cache_stride + (offset - (NUM_HEADS + NUM_KV_HEADS) * HEAD_DIM)
        is_kv = (head >= NUM_HEADS) & (head < NUM_HEADS + 2 * NUM_KV_HEADS) & is_row
        _store_quarters(tl.where(is_qk, k_slot, v_slot), a, b, c, d, is_kv, QUARTER)


@triton.jit
def _rows(
    first, stride, turn, epoch, inbox, peer_inbox, cta, qkv_ptr, parts_ptr, part_stride, parts_stride, q_ptr,
    q_weight_ptr, k_weight_ptr, positions_ptr, cos_sin_ptr, k_cache_ptr, v_cache_ptr, out_cache_loc_ptr, sums_ptr,
    num_tokens, qkv_stride, k_cache_stride, v_cache_stride, q_count, k_count, eps, max_ctas, rank, layer_id, timeout_ns,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
    STORE: tl.constexpr, SUMS_GIVEN: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, POLL: tl.constexpr,
    PACKED: tl.constexpr, SLOTS: tl.constexpr, COUNTERPART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Rows first, first + stride, ..., ``ROWS`` of them, all in registers at once: loads, sums, exchange, stores."""
    QUARTER: tl.constexpr = HEAD_DIM // 4
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    column = tl.arange(0, QUARTER)[None, :]
    offset = head * HEAD_DIM + column
    is_q = head < NUM_HEADS
    is_k = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    inside = head < NUM_HEADS + 2 * NUM_KV_HEADS

    rows, is_row, positions, slots, quarters = (), (), (), (), ()
    for i in tl.static_range(ROWS):
        row = first + i * stride
        rows = rows + (row,)
        is_row = is_row + (row < num_tokens,)
        # Volatile keeps this load here: what depends on it must not start only after the wait.
        positions = positions + (tl.load(positions_ptr + row, mask=is_row[i], other=0, volatile=True).to(tl.int64),)
        if PARTS == 0:
            row_ptr = qkv_ptr + row.to(tl.int64) * qkv_stride
            quarters = quarters + (_load_quarters(row_ptr + offset, inside & is_row[i], 0.0, QUARTER),)
        else:
            tl.static_assert(ROWS == 1)
            row_ptr = parts_ptr + row.to(tl.int64) * parts_stride
            dtype: tl.constexpr = qkv_ptr.dtype.element_ty
            quarters = quarters + (
                _add_parts(row_ptr + offset, part_stride, inside & is_row[i], dtype, QUARTER, PARTS),
            )
    for i in tl.static_range(ROWS):
        slots = slots + (tl.load(out_cache_loc_ptr + rows[i], mask=is_row[i], other=0).to(tl.int64),)
    weight_pointers = tl.where(is_q, q_weight_ptr + offset, k_weight_ptr + (offset - NUM_HEADS * HEAD_DIM))
    weights = _load_quarters(weight_pointers, is_q | is_k, 1.0, QUARTER)

    sums = ()
    messages = message_offset(epoch, cta, turn, max_ctas, SLOTS, RANKS)
    for i in tl.static_range(ROWS):
        if SUMS_GIVEN:
            q_sum = tl.load(sums_ptr + rows[i] * 2)
            k_sum = tl.load(sums_ptr + rows[i] * 2 + 1)
        else:
            q_sum, k_sum = _sums_of_squares(quarters[i], is_q, is_k)
            if COUNTERPART:  # its q and k lie behind v as the own lie before it
                other_ptr = qkv_ptr + rows[i].to(tl.int64) * qkv_stride + (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
                others = _load_quarters(other_ptr + offset, (is_q | is_k) & is_row[i], 0.0, QUARTER)
                other_q_sum, other_k_sum = _sums_of_squares(others, is_q, is_k)
                q_sum += other_q_sum
                k_sum += other_k_sum
        if RANKS > 1:
            receivers = is_row[i].to(tl.int32) * RANKS
            send_sums(peer_inbox, messages + (i * RANKS + rank) * 16, q_sum, k_sum, epoch, receivers)
        sums = sums + (q_sum, k_sum)
    rotation = _load_rotation(cos_sin_ptr, positions[0], column, QUARTER)
    if RANKS > 1:
        num_rows = tl.minimum(ROWS, tl.cdiv(num_tokens - first, stride))
        sums = await_sums(inbox + messages, epoch, num_rows, timeout_ns, layer_id, rank, ROWS, POLL)
    x = quarters[0]
    if ROWS > 1:  # several rows do not fit in registers as float32: each is read again, from the L1 cache
        x = _load_quarters(qkv_ptr + rows[0].to(tl.int64) * qkv_stride + offset, inside & is_row[0], 0.0, QUARTER)
    for i in tl.static_range(ROWS):
        if i + 1 < ROWS:
            next_rotation = _load_rotation(cos_sin_ptr, positions[i + 1], column, QUARTER)
            next_ptr = qkv_ptr + rows[i + 1].to(tl.int64) * qkv_stride
            next_x = _load_quarters(next_ptr + offset, inside & is_row[i + 1], 0.0, QUARTER)
        _finish_row(
            x, weights, rotation, rows[i], slots[i], is_row[i], sums[2 * i], sums[2 * i + 1],
            q_count, k_count, eps, offset, head, qkv_ptr, q_ptr, qkv_stride, k_cache_ptr, v_cache_ptr, k_cache_stride,
            v_cache_stride, NUM_HEADS, NUM_KV_HEADS, QUARTER, STORE, PACKED, PARTS,
        )  # fmt: skip
        if i + 1 < ROWS:
            rotation = next_rotation
            x = next_x


@triton.jit(do_not_specialize=[
    "num_tokens", "part_stride", "parts_stride", "q_count", "k_count", "max_ctas", "rank", "layer_id",
    "peer_timeout_ms",
], do_not_specialize_on_alignment=["positions_ptr", "out_cache_loc_ptr"])  # fmt: skip
def _qk_norm_rope_kernel(
    qkv_ptr, parts_ptr, part_stride, parts_stride, q_ptr, q_weight_ptr, k_weight_ptr, positions_ptr, cos_sin_ptr,
    k_cache_ptr, v_cache_ptr, out_cache_loc_ptr, sums_ptr, inboxes_ptr, epochs_ptr, num_tokens, qkv_stride,
    k_cache_stride, v_cache_stride, q_count, k_count, eps, max_ctas, rank, layer_id, peer_timeout_ms,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
    STORE: tl.constexpr, SUMS_GIVEN: tl.constexpr, ROWS: tl.constexpr, ONCE: tl.constexpr, RANKS: tl.constexpr,
    POLL: tl.constexpr, PDL: tl.constexpr, PACKED: tl.constexpr, SLOTS: tl.constexpr, COUNTERPART: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """CTA c takes rows c, c + CTAs, ..., ``ROWS`` at a time; ``ONCE``: they are no more than that."""
    cta = tl.program_id(0)
    ctas = tl.num_programs(0)
    if PDL:
        gdc_wait()  # before the first read: the projection, and our own last launch's epochs, are written by then
        gdc_launch_dependents()
    epoch, inbox, peer_inbox, timeout_ns = cta.to(tl.int64), 0, 0, 0
    if RANKS > 1:
        epoch = epoch_of(epochs_ptr, cta)
        inbox = tl.load(inboxes_ptr + rank)
        peer_inbox = inbox_of_peer(inboxes_ptr, RANKS)
        timeout_ns = peer_timeout_ms.to(tl.int64) * 1000000
    if ONCE:
        _rows(
            cta, ctas, 0, epoch, inbox, peer_inbox, cta, qkv_ptr, parts_ptr, part_stride, parts_stride, q_ptr,
            q_weight_ptr, k_weight_ptr, positions_ptr, cos_sin_ptr, k_cache_ptr, v_cache_ptr, out_cache_loc_ptr,
            sums_ptr, num_tokens, qkv_stride, k_cache_stride, v_cache_stride, q_count, k_count, eps, max_ctas, rank,
            layer_id, timeout_ns,
            NUM_HEADS, NUM_KV_HEADS, HEADS_BLOCK, HEAD_DIM, STORE, SUMS_GIVEN, ROWS, RANKS, POLL, PACKED, SLOTS,
            COUNTERPART, PARTS,
        )  # fmt: skip
    else:
        for first in range(cta, num_tokens, ctas * ROWS):
            _rows(
                first, ctas, first // ctas, epoch, inbox, peer_inbox, cta, qkv_ptr, parts_ptr, part_stride,
                parts_stride, q_ptr, q_weight_ptr, k_weight_ptr, positions_ptr, cos_sin_ptr, k_cache_ptr, v_cache_ptr,
                out_cache_loc_ptr, sums_ptr, num_tokens, qkv_stride, k_cache_stride, v_cache_stride, q_count, k_count,
                eps, max_ctas, rank, layer_id, timeout_ns,
                NUM_HEADS, NUM_KV_HEADS, HEADS_BLOCK, HEAD_DIM, STORE, SUMS_GIVEN, ROWS, RANKS, POLL, PACKED, SLOTS,
                COUNTERPART, PARTS,
            )  # fmt: skip
    if RANKS > 1:
        tl.store(epochs_ptr + cta, epoch)
