"""Activations in FP8 for many tokens, as in a prefill: a float32 scale for each row and 128 columns.

    scale = max(largest magnitude of the group, 1e-10) / 448
    q     = e4m3(x / scale)

and the same of silu(gate) * up, whose bfloat16 is then never written. The formula is the engine's, divisions rounded
once, so that what follows has the bits that it has behind the engine's own kernel.

The engine has a kernel with a group for each CTA, before its linear layers, and one that reads its input twice, before
its experts. Here a CTA has several groups, and reads each once, 16 bytes a thread at a time.

These functions are called in operators only, those of the experts and of a projection, into which no compiler looks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from sglang.srt.layers.quantization.fp8_kernel import create_per_token_group_quant_fp8_output_scale

GROUP = 128
"""Columns under one scale; of weights, rows too: the published checkpoint's blocks."""
E4M3_MAX = 448.0
EPS = 1e-10  # the engine's: what a group of zeros is scaled by, times 448

# Groups of a CTA, and its warps: of four plans the fastest at 2048 rows or within 3% of it from 512 to 8192, of x as of
# silu(gate) * up. Measured on one H200, benchmark/results/fp8_quantise_h200.json.
PLAN = (16, 4)

Quantised = tuple[torch.Tensor, torch.Tensor]


def quantise(
    x: torch.Tensor, column_major: bool = False, tma_aligned: bool = False, plan: tuple[int, int] | None = None
) -> Quantised:
    """Any number of rows in FP8.

    Args:
        x: [rows, columns] bfloat16, each row contiguous, columns a multiple of 128.
        column_major: the scales of a column of groups lie beside each other, as the engine's linear layers want them.
        tma_aligned: and each such column starts at a multiple of 16 bytes (DeepGEMM).
        plan: groups of a CTA, a power of two, and its warps.

    Returns:
        [rows, columns] e4m3, contiguous, and the scales: [rows, columns / 128] float32.
    """
    return _quantised(x, x.shape[1], column_major, tma_aligned, plan or PLAN)


def quantise_activated(gate_up: torch.Tensor, plan: tuple[int, int] | None = None) -> Quantised:
    """silu(gate) * up, rounded to bfloat16, in FP8.

    Args:
        gate_up: [rows, 2 * columns] bfloat16, each row contiguous: gate, then up; columns a multiple of 128.
        plan: as for :func:`quantise`.

    Returns:
        [rows, columns] e4m3 and [rows, columns / 128] float32, both contiguous.
    """
    return _quantised(gate_up, gate_up.shape[1] // 2, False, False, plan or PLAN)


def _quantised(
    x: torch.Tensor, columns: int, column_major: bool, tma_aligned: bool, plan: tuple[int, int]
) -> Quantised:
    """Of x where it has as many ``columns``, else of silu(gate) * up."""
    if columns % GROUP or columns == 0:
        raise ValueError(f"{columns} columns are no multiple of {GROUP}, the group of a scale: leave them unquantised")
    assert x.dtype == torch.bfloat16 and x.stride(1) == 1, f"rows of bfloat16, each contiguous, and not {x.dtype}"
    assert x.stride(0) % 8 == 0, f"rows start at multiples of 16 bytes, and these are {x.stride(0)} values apart"
    shape, (block, warps) = (x.shape[0], columns), plan
    values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = create_per_token_group_quant_fp8_output_scale(shape, x.device, GROUP, column_major, tma_aligned, False)
    if groups := shape[0] * (columns // GROUP):
        _quantise_kernel[(triton.cdiv(groups, block),)](
            x, values, scale, groups, x.stride(0), scale.stride(0), scale.stride(1), columns // GROUP,
            x.shape[1] != columns, block, num_warps=warps,
        )  # fmt: skip
    return values, scale


def quantise_reference(x: torch.Tensor) -> Quantised:
    """:func:`quantise` in plain torch."""
    groups, scale = groups_and_scales(x)
    return (groups / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).flatten(1), scale.squeeze(-1)


def groups_and_scales(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, groups, GROUP] and [rows, groups, 1] float32, in plain torch: x, and what its groups are divided by."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True).clamp(min=EPS)
    return groups, largest / torch.full_like(largest, E4M3_MAX)  # by a number, CUDA would multiply with its inverse


def activated_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up as :func:`quantise_activated` quantises it, but from float64: [rows, columns] bfloat16."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).bfloat16()


@triton.jit
def _scale_of(x):
    """[groups, 1]: what each group of x [groups, 128] float32 is divided by."""
    return tl.div_rn(tl.maximum(tl.max(tl.abs(x), axis=1, keep_dims=True), 1e-10), 448.0)


@triton.jit
def _divide(x, divisor):
    """x / divisor rounded once, [groups, 128] by [groups, 1], with one division a group.

    The remainder of x * (1 / divisor), which is exact, corrects it. That this gives the e4m3 value of the division
    holds for every bfloat16 x and largest magnitude of its group: the test tries them all.
    """
    inverse = tl.div_rn(1.0, divisor)
    quotient = x * inverse
    remainder = tl.fma(-quotient, tl.broadcast_to(divisor, x.shape), x)
    return tl.fma(remainder, tl.broadcast_to(inverse, x.shape), quotient)


@triton.jit(do_not_specialize=["groups", "scale_row_stride", "scale_group_stride"])
def _quantise_kernel(
    x_ptr, values_ptr, scale_ptr, groups, x_stride, scale_row_stride, scale_group_stride, GROUPS: tl.constexpr,
    ACTIVATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A CTA has ``BLOCK`` groups, of which a row has ``GROUPS``."""
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_group = group < groups
    row, place = (group // GROUPS).to(tl.int64), group % GROUPS
    column = tl.arange(0, 128)[None, :]
    source = x_ptr + (row * x_stride + place * 128)[:, None] + column
    x = tl.load(source, mask=is_group[:, None], other=0.0).to(tl.float32)
    if ACTIVATE:
        up = tl.load(source + GROUPS * 128, mask=is_group[:, None], other=0.0).to(tl.float32)
        x = (x / (1.0 + tl.exp(-x)) * up).to(tl.bfloat16).to(tl.float32)
    scale = _scale_of(x)
    # The largest is 448 but for the last bit, and rounds to it.
    values = _divide(x, scale).to(tl.float8e4nv)
    tl.store(values_ptr + group.to(tl.int64)[:, None] * 128 + column, values, mask=is_group[:, None])
    scales = scale_ptr + (row * scale_row_stride + place * scale_group_stride)[:, None]
    tl.store(scales, scale, mask=is_group[:, None])
