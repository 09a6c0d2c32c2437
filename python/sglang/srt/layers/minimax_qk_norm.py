"""RMSNorm of q and of k over all heads, sharded by head over the attention-TP ranks.

    sums = sum of squares of my q row, sum of squares of my k row       # one pass over both
    sums = all-reduce over attention TP                                 # one collective for both
    q, k = x * rsqrt(sums / (replicas * hidden_size) + eps) * weight    # one pass over both

Statistics and products are float32, the result is cast once. On CUDA the two passes are one Triton kernel each,
which read q and k where the projection left them, as strided rows; elsewhere they are plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

ALIGNED_ROWS = 2  # the engine's custom all-reduce takes multiples of 16 bytes: two rows of two floats


def norm_qk(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    q_count: int,
    k_count: int,
    eps: float,
    all_reduce: Callable[[torch.Tensor], torch.Tensor] | None,
    of_counterpart: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalises this rank's q and k rows by the statistics of all ranks.

    Args:
        q: [tokens, q heads a rank * head_dim], any float dtype, rows may be strided.
        k: [tokens, KV heads a rank * head_dim], same dtype and tokens.
        q_weight, k_weight: this rank's shard of the norm's weight, any float dtype.
        q_count, k_count: how many values the all-reduced sum covers, replicas included: replicas * hidden_size.
        eps: added to the mean of squares.
        all_reduce: sums a float32 tensor over the attention-TP ranks, or over those of this node where there is a
            counterpart; None on a single rank.
        of_counterpart: q and k, before their norm, of a rank of the other node, if any (:mod:`minimax_counterpart`).

    Returns:
        q and k, normed, contiguous, in their own dtype.
    """
    triton_kernels = q.is_cuda
    sums = (sums_of_squares_triton if triton_kernels else sums_of_squares)(q, k, *of_counterpart)
    if all_reduce is not None:
        sums = all_reduce(sums)
    scale = scale_rows_triton if triton_kernels else scale_rows
    return scale(q, k, q_weight, k_weight, sums, q_count, k_count, eps)


def sums_of_squares(q: torch.Tensor, k: torch.Tensor, *of_counterpart: torch.Tensor) -> torch.Tensor:
    """[tokens rounded up to ``ALIGNED_ROWS``, 2] float32: each row's sum of squares of q and of k; padding is zero.

    ``of_counterpart``: another q and k of the same tokens and widths, whose squares are added.
    """
    tokens = q.shape[0]
    sums = torch.zeros(_aligned(tokens), 2, dtype=torch.float32, device=q.device)
    sums[:tokens, 0] = q.float().square().sum(dim=-1)
    sums[:tokens, 1] = k.float().square().sum(dim=-1)
    return sums + sums_of_squares(*of_counterpart) if of_counterpart else sums


def scale_rows(q, k, q_weight, k_weight, sums, q_count: int, k_count: int, eps: float):
    """x * rsqrt(sums / count + eps) * weight for q and for k, in float32, cast once to the dtype of x."""
    tokens = q.shape[0]

    def scaled(x: torch.Tensor, weight: torch.Tensor, total: torch.Tensor, count: int) -> torch.Tensor:
        inverse_rms = torch.rsqrt(total / count + eps)
        return (x.float() * inverse_rms[:, None] * weight.float()).to(x.dtype)

    return scaled(q, q_weight, sums[:tokens, 0], q_count), scaled(k, k_weight, sums[:tokens, 1], k_count)


def sums_of_squares_triton(q: torch.Tensor, k: torch.Tensor, *of_counterpart: torch.Tensor) -> torch.Tensor:
    """:func:`sums_of_squares` in one launch. The counterpart's rows are as far apart as the own."""
    tokens = q.shape[0]
    rows = _aligned(tokens)
    sums = torch.empty(rows, 2, dtype=torch.float32, device=q.device)
    other_q, other_k = of_counterpart or (q, k)
    _sums_of_squares_kernel[(rows,)](
        q, k, other_q, other_k, sums, tokens, q.stride(0), k.stride(0), q.shape[1], k.shape[1],
        triton.next_power_of_2(q.shape[1]), triton.next_power_of_2(k.shape[1]), bool(of_counterpart),
    )  # fmt: skip
    return sums


def scale_rows_triton(q, k, q_weight, k_weight, sums, q_count: int, k_count: int, eps: float):
    """:func:`scale_rows` in one launch."""
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    _scale_rows_kernel[(q.shape[0],)](
        q, k, q_weight, k_weight, sums, q_out, k_out, q.stride(0), k.stride(0), q.shape[1], k.shape[1],
        q_count, k_count, eps, triton.next_power_of_2(q.shape[1]), triton.next_power_of_2(k.shape[1]),
    )  # fmt: skip
    return q_out, k_out


def _aligned(tokens: int) -> int:
    return (tokens + ALIGNED_ROWS - 1) // ALIGNED_ROWS * ALIGNED_ROWS


@triton.jit
def _row_sum_of_squares(x_ptr, row, stride, width, is_token, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row.to(tl.int64) * stride + column, mask=(column < width) & is_token, other=0.0).to(tl.float32)
    return tl.sum(x * x, axis=0)


@triton.jit
def _sums_of_squares_kernel(
    q_ptr, k_ptr, other_q_ptr, other_k_ptr, sums_ptr, tokens, q_stride, k_stride, q_width, k_width,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, COUNTERPART: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    is_token = row < tokens
    q_sum = _row_sum_of_squares(q_ptr, row, q_stride, q_width, is_token, Q_BLOCK)
    k_sum = _row_sum_of_squares(k_ptr, row, k_stride, k_width, is_token, K_BLOCK)
    if COUNTERPART:
        q_sum += _row_sum_of_squares(other_q_ptr, row, q_stride, q_width, is_token, Q_BLOCK)
        k_sum += _row_sum_of_squares(other_k_ptr, row, k_stride, k_width, is_token, K_BLOCK)
    tl.store(sums_ptr + row * 2, q_sum)
    tl.store(sums_ptr + row * 2 + 1, k_sum)


@triton.jit
def _scale_row(x_ptr, weight_ptr, out_ptr, row, stride, width, total, count, eps, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row.to(tl.int64) * stride + column, mask=inside)
    weight = tl.load(weight_ptr + column, mask=inside).to(tl.float32)
    normed = x.to(tl.float32) * tl.rsqrt(total / count + eps) * weight
    tl.store(out_ptr + row.to(tl.int64) * width + column, normed.to(x.dtype), mask=inside)


@triton.jit
def _scale_rows_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, sums_ptr, q_out_ptr, k_out_ptr, q_stride, k_stride, q_width, k_width,
    q_count, k_count, eps, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    q_total = tl.load(sums_ptr + row * 2)
    k_total = tl.load(sums_ptr + row * 2 + 1)
    _scale_row(q_ptr, q_weight_ptr, q_out_ptr, row, q_stride, q_width, q_total, q_count, eps, Q_BLOCK)
    _scale_row(k_ptr, k_weight_ptr, k_out_ptr, row, k_stride, k_width, k_total, k_count, eps, K_BLOCK)
