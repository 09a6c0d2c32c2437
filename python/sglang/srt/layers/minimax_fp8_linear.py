"""FP8 linear layers of MiniMax-M2's attention for few tokens: bfloat16 in and out, e4m3 weights in blocks of 128 x 128.

    q, scale = quantise(x)                              # e4m3, a scale for each token and 128 inputs
    out = (q * scale) @ (weight * weight_scale).T       # float32 sums, cast to bfloat16 once

For few tokens the engine launches one kernel that quantises and one that multiplies, made for many rows. Here one
kernel reads the activations as they are: a tile of 128 inputs of a token is one group, so whoever multiplies can
quantise. Each group's product is summed over its 128 inputs, as in the engine's kernels, and only then scaled and added
in float32. Where the inputs are divided over several CTAs, a second kernel adds their float32 parts in a fixed order:
no atomics, the same inputs give the same bits.

Weights do not depend on the kernel before: they are read, or fetched into the L2 cache, before the wait for it
(programmatic dependent launch). So whatever writes weights must be done two launches earlier, as it is in a model.
"""

# ruff: noqa: RUF005  a Triton function cannot unpack a tuple into another

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from sglang.srt.layers import minimax_fp8_quantise
from sglang.srt.layers.minimax_fp8_quantise import GROUP, _scale_of
from sglang.srt.layers.minimax_log import log_once
from sglang.srt.layers.minimax_nvlink import has_programmatic_launch
from sglang.srt.layers.minimax_parts import Parts
from sglang.srt.layers.minimax_watchers import reason_of_watchers
from sglang.srt.layers.quantization import fp8_utils
from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
from sglang.srt.layers.quantization.fp8_utils import get_fp8_gemm_runner_backend
from sglang.srt.server_args import get_global_server_args
from sglang.srt.utils import get_device_capability, is_cuda
from sglang.srt.utils.custom_op import register_custom_op
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

Projection = Callable[[torch.Tensor], torch.Tensor]


class Plan(NamedTuple):
    """How the kernel divides its work: a CTA makes a tile of ``block_tokens`` x ``block_n`` outputs.

    ``splits``: CTAs that share the inputs of a tile; a second kernel adds their parts.
    ``stages``: of the pipeline of loads; 0: all weights of a CTA are in registers before the wait for the activations.
    ``swap``: weights are the rows of the tensor cores' product, of which there are 64 at least, and not tokens.
    """

    block_tokens: int
    block_n: int
    splits: int
    warps: int
    stages: int = 0
    swap: bool = True

    def steps(self, groups: int) -> int:
        """How many of ``groups`` a CTA multiplies, one after the other."""
        return triton.cdiv(groups, self.splits)

    def tiles(self, tokens: int, outputs: int) -> tuple[int, int]:
        return triton.cdiv(outputs, self.block_n), triton.cdiv(tokens, self.block_tokens)


# (inputs, outputs): up to so many tokens, as long as the engine's cutlass kernels take longer. Measured on one H200,
# benchmark/results/fp8_linear_h200.json; those of TP16 are guessed from TP8's.
PLANS: dict[tuple[int, int], dict[int, Plan]] = {
    (3072, 2048): {  # qkv and output of TP4
        16: Plan(16, 64, 6, 4),
        32: Plan(32, 128, 12, 8),
        64: Plan(64, 128, 6, 8, stages=3, swap=False),
        128: Plan(64, 128, 4, 8, stages=3, swap=False),
    },
    (1536, 3072): {16: Plan(16, 64, 6, 4), 32: Plan(32, 64, 6, 4), 64: Plan(64, 64, 4, 4)},
    (3072, 4096): {  # TP2
        16: Plan(16, 128, 6, 8),
        32: Plan(32, 128, 8, 8, stages=3),
        64: Plan(64, 128, 4, 8, stages=3, swap=False),
    },
    (3072, 3072): {
        16: Plan(16, 128, 8, 8),
        32: Plan(32, 128, 8, 8),
        64: Plan(64, 128, 8, 8, stages=3, swap=False),
    },
    (3072, 8192): {16: Plan(16, 128, 6, 8)},  # TP1
    (6144, 3072): {
        16: Plan(16, 64, 8, 4),
        32: Plan(32, 128, 4, 8, stages=6),
        64: Plan(64, 128, 8, 8, stages=3, swap=False),
    },
    (3072, 1024): {  # TP8
        16: Plan(16, 128, 12, 8),
        32: Plan(32, 128, 12, 8),
        64: Plan(64, 64, 12, 4),
        128: Plan(64, 128, 12, 8, stages=3, swap=False),
    },
    (768, 3072): {
        16: Plan(16, 64, 4, 4),
        32: Plan(32, 64, 6, 4),
        64: Plan(64, 64, 6, 4, stages=3, swap=False),
        128: Plan(64, 128, 2, 8, stages=3, swap=False),
    },
    (3072, 640): {16: Plan(16, 64, 12, 4), 32: Plan(32, 64, 12, 4), 64: Plan(64, 64, 12, 4)},  # TP16
    (384, 3072): {16: Plan(16, 64, 3, 4), 32: Plan(32, 64, 3, 4), 64: Plan(64, 64, 3, 4)},
}


@functools.cache
def plans_for(inputs: int, outputs: int) -> dict[int, Plan]:
    """The plans of a shape by the most tokens that they are for; those of the shape nearest to it by both sides."""

    def distance(shape: tuple[int, int]) -> float:
        return max(shape[0] / inputs, inputs / shape[0]) * max(shape[1] / outputs, outputs / shape[1])

    return PLANS[min(PLANS, key=distance)]


def plan_for(tokens: int, inputs: int, outputs: int) -> Plan | None:
    """The plan for ``tokens`` of at least 1, or None where there are more than were measured."""
    return next((plan for limit, plan in plans_for(inputs, outputs).items() if tokens <= limit), None)


def choose_projection(owner: torch.nn.Module, name: str) -> Projection:
    """What computes the linear layer ``name`` of ``owner``, without a bias, from [tokens, inputs] to [tokens, outputs].

    Called once, while the layer is built, under the model's default dtype, which is that of its activations. The
    engine's layer is looked up at each call: LoRA puts one of its own in its place once the model is loaded.
    """
    linear = getattr(owner, name)
    reason = reason_against_layer(linear) or reason_against_server()
    if reason is not None:
        _log_against(reason)
        return lambda x: getattr(owner, name)(x)[0]
    projection, (outputs, inputs) = Fp8Linear(linear), linear.weight.shape
    up_to = f"up to {projection.max_tokens} tokens"
    log_once(f"Projections of {inputs} to {outputs} quantise and multiply in one kernel {up_to}.")
    return projection


def reason_against_server() -> str | None:
    """The first of the server's choices that these kernels do not go with, as a clause, or None."""
    arguments = get_global_server_args()
    if not is_cuda() or get_device_capability()[0] != 9:
        return "its plans are for NVIDIA GPUs of compute capability 9 (Hopper)"
    if torch.get_default_dtype() != torch.bfloat16:
        return f"activations are {torch.get_default_dtype()}, and it quantises bfloat16"
    if not get_fp8_gemm_runner_backend().is_auto():
        return f"--fp8-gemm-backend {get_fp8_gemm_runner_backend().value} was asked for"
    if arguments.enable_deterministic_inference:
        return "deterministic inference wants sums in an order that no batch size changes"
    if arguments.enable_lora or arguments.lora_paths:
        return "LoRA wraps the layer"
    if arguments.enable_symm_mem:
        return "--enable-symm-mem wants outputs in its own memory"
    return reason_of_watchers(arguments)


def reason_against_layer(linear: torch.nn.Module) -> str | None:
    """Why a layer's weights, as they are now, are none for these kernels, as a clause, or None."""
    method, weight = getattr(linear, "quant_method", None), getattr(linear, "weight", None)
    if not isinstance(method, Fp8LinearMethod) or weight is None or weight.dtype != torch.float8_e4m3fn:
        return "weights are not in the checkpoint's FP8"
    if method.use_mxfp8 or method.use_marlin or list(method.quant_config.weight_block_size or []) != [GROUP, GROUP]:
        return f"weights are not scaled in blocks of {GROUP} x {GROUP} alone"
    if linear.bias is not None:
        return "it has a bias"
    scale = linear.weight_scale_inv
    outputs, inputs = weight.shape
    if inputs % GROUP or not weight.is_contiguous():
        return f"weights of shape {tuple(weight.shape)} and strides {weight.stride()} are not whole, contiguous groups"
    if scale.dtype != torch.float32 or scale.shape != (triton.cdiv(outputs, GROUP), inputs // GROUP):
        return f"scales of the weights are {scale.dtype} of shape {tuple(scale.shape)}"
    return None if scale.is_contiguous() else "scales of the weights are not contiguous"


def _log_against(reason: str) -> None:
    log_once(f"The qkv and output projections are the engine's linear layers, since {reason}.")


class Fp8Linear:
    """A linear layer of the engine through the plan for each number of tokens; above them, its own product.

    Args:
        linear: with weights for which :func:`reason_against_layer` has no reason.
    """

    def __init__(self, linear: torch.nn.Module) -> None:
        self.linear = linear
        self.outputs, inputs = linear.weight.shape
        self.max_tokens = max(plans_for(inputs, self.outputs))
        self.weights_fit: bool | None = None
        self.of_many: Projection = self._engine
        self.compiles_later = False
        self._handle = len(_layers)
        _layers.append(self)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """From [tokens, inputs] bfloat16, rows at any stride, to [tokens, outputs] bfloat16, contiguous."""
        return minimax_fp8_linear(self._handle, x) if torch.compiler.is_compiling() else self.run(x)

    def in_parts(self, x: torch.Tensor) -> torch.Tensor | Parts:
        """The same not summed yet, where the plan divides the inputs; not in compiled graphs, which know no parts."""
        return self.run(x, in_parts=True)

    def run(self, x: torch.Tensor, in_parts: bool = False) -> torch.Tensor | Parts:
        """The operator itself, which a compiled graph calls."""
        if self.weights_fit is None:  # the first forward: whatever was loaded is there, and laid out as it stays
            reason = reason_against_layer(self.linear)
            self.weights_fit = reason is None
            if reason is not None:
                _log_against(reason)
            else:
                self.of_many = choose_product(self.linear) or self._engine
                way = self.linear.quant_method.w8a8_block_fp8_linear
                self.compiles_later = way is fp8_utils.deepgemm_w8a8_block_fp8_linear_with_fallback
        tokens, inputs = x.shape
        if tokens == 0:
            return x.new_empty(0, self.outputs)
        plan = plan_for(tokens, inputs, self.outputs)
        if not self.weights_fit or plan is None:
            self.compiles_later = False
            return self.of_many(x)
        if self.compiles_later and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            # DeepGEMM compiles a shape for every number of tokens at its first product, for minutes. That belongs into
            # the engine's warm-up, whose few tokens would not come to it, and not into the first long prompt.
            self.compiles_later = False
            self.of_many(x)
        return fp8_linear(x, self.linear.weight, self.linear.weight_scale_inv, plan, in_parts)

    def _engine(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)[0]


_layers: list[Fp8Linear] = []  # a compiled graph names a layer by its place here


def _no_outputs(layer: int, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], _layers[layer].outputs)


# An op of its own, so that torch.compile, to which the number of tokens is a symbol, does not look at the branch.
@register_custom_op(fake_impl=_no_outputs)
def minimax_fp8_linear(layer: int, x: torch.Tensor) -> torch.Tensor:
    """:meth:`Fp8Linear.run` as a torch operator."""
    return _layers[layer].run(x)


def choose_product(linear: torch.nn.Module) -> Projection | None:
    """The engine's product for many tokens on activations that are quantised here, or None: all of it is the engine's.

    Args:
        linear: with weights for which :func:`reason_against_layer` has no reason.
    """
    way, outputs = linear.quant_method.w8a8_block_fp8_linear, linear.weight.shape[0]
    chosen: Projection | None = None
    # Other outputs the engine gives to another kernel. Weights are looked up at each call: an update may replace them.
    if way is fp8_utils.cutlass_w8a8_block_fp8_linear_with_fallback and outputs % GROUP == 0:

        def chosen(x: torch.Tensor) -> torch.Tensor:
            q, scale = minimax_fp8_quantise.quantise(x, column_major=True)
            weight, weight_scale = linear.weight, linear.weight_scale_inv
            return fp8_utils.fp8_blockwise_scaled_mm(q, weight.T, scale, weight_scale.T, out_dtype=x.dtype)

    elif way is fp8_utils.deepgemm_w8a8_block_fp8_linear_with_fallback and outputs % 64 == 0:

        def chosen(x: torch.Tensor) -> torch.Tensor:
            q, scale = minimax_fp8_quantise.quantise(x, column_major=True, tma_aligned=True)
            weight, weight_scale = linear.weight, linear.weight_scale_inv
            return fp8_utils.w8a8_block_fp8_matmul_deepgemm(
                q, weight, scale, weight_scale, [GROUP, GROUP], output_dtype=x.dtype
            )

    said = "in a launch of ours" if chosen is not None else f"by the engine, whose product is {way.__name__}"
    log_once(f"Activations of many tokens are quantised for projections {said}.")
    return chosen


def quantise_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel makes of activations, in plain torch.

    Args:
        x: [tokens, inputs], inputs a multiple of ``GROUP``.

    Returns:
        [tokens, inputs] e4m3 and [tokens, inputs / GROUP] float32, whose product is about ``x``.
    """
    groups, scale = minimax_fp8_quantise.groups_and_scales(x)
    return (groups * scale.reciprocal()).to(torch.float8_e4m3fn).flatten(1), scale.squeeze(-1)


def fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, plan: Plan, in_parts: bool = False
) -> torch.Tensor | Parts:
    """The product by one plan.

    Args:
        x: [tokens, inputs] bfloat16, rows at any stride; at least one token.
        weight: [outputs, inputs] e4m3, contiguous, inputs a multiple of ``GROUP``.
        weight_scale: [ceil(outputs / GROUP), inputs / GROUP] float32, contiguous.
        in_parts: leaves the sum over the CTAs that share a tile to the caller, if there are several.

    Returns:
        [tokens, outputs] bfloat16.
    """
    tokens, inputs = x.shape
    outputs, groups = weight.shape[0], inputs // GROUP
    assert x.dtype == torch.bfloat16 and x.stride(1) == 1, f"x must be rows of bfloat16: {x.dtype}, {x.stride()}"
    assert weight.is_contiguous() and weight_scale.is_contiguous(), "weights and their scales must be contiguous"
    assert GROUP % plan.block_n == 0, f"a tile of {plan.block_n} outputs would have more than one scale"
    if plan.splits > 1:
        parts = torch.empty(plan.splits, tokens, outputs, dtype=torch.float32, device=x.device)
    else:
        parts = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    tiles = plan.tiles(tokens, outputs)
    pdl = has_programmatic_launch(x.device)
    options = {"launch_pdl": True} if pdl else {}
    _fp8_linear_kernel[(tiles[0], plan.splits, tiles[1])](
        x, weight, weight_scale, parts, tokens, x.stride(0), outputs, groups, plan.block_tokens, plan.block_n,
        plan.splits, plan.steps(groups), plan.swap, plan.stages == 0, pdl,
        num_warps=plan.warps, num_stages=max(plan.stages, 1), **options,
    )  # fmt: skip
    if plan.splits == 1:
        return parts
    if in_parts:
        return Parts(parts)
    out, block = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device), 512
    _add_parts_kernel[(triton.cdiv(tokens * outputs, block),)](
        parts, out, tokens * outputs, plan.splits, block, pdl, num_warps=4, **options
    )
    return out


@triton.jit
def _quantise(x):
    """[tokens, 128] of any float to e4m3 and its scales [tokens, 1]: those of :func:`quantise_reference`."""
    x = x.to(tl.float32)
    scale = _scale_of(x)
    # Largest is 448 but for the last bit, so nothing is clamped.
    return (x * tl.div_rn(1.0, scale)).to(tl.float8e4nv), scale


@triton.jit
def _prefetch(pointers):
    """The line of each address into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _keep_here(weight):
    """Itself. Without it the compiler puts the way to the tensor cores, through shared memory, right behind each load,
    and so waits for one load before it issues the next."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [weight], dtype=weight.dtype, is_pure=False, pack=4)


@triton.jit
def _scaled_product(x, weight, weight_scale, SWAP: tl.constexpr):
    """x [tokens, 128], e4m3 weights [outputs, 128], their one scale: [tokens, outputs] float32; swapped, transposed."""
    q, x_scale = _quantise(x)
    if SWAP:
        return tl.dot(weight, tl.trans(q)) * (tl.trans(x_scale) * weight_scale)
    else:
        return tl.dot(q, tl.trans(weight)) * (x_scale * weight_scale)


@triton.jit
def _load(pointers, mask, WHOLE: tl.constexpr):
    """Zeros where ``mask`` does not hold; WHOLE: it holds everywhere."""
    if WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def _fp8_linear_kernel(
    x_ptr, weight_ptr, scale_ptr, parts_ptr, tokens, x_stride, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, STEPS: tl.constexpr, SWAP: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """CTA (i, j, t): tile i of the outputs, part j of the inputs, tile t of the tokens; to [splits, tokens, outputs],
    in the dtype of ``parts_ptr``."""
    INPUTS: tl.constexpr = GROUPS * 128
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(2) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    k = tl.arange(0, 128)
    first = split * STEPS
    # Pointers to the first of this part's groups.
    x_pointers = x_ptr + token[:, None].to(tl.int64) * x_stride + first * 128 + k[None, :]
    weight_pointers = weight_ptr + n[:, None] * INPUTS + first * 128 + k[None, :]
    scale_pointer = scale_ptr + (tile * BLOCK_N // 128) * GROUPS + first
    is_token, is_n = token[:, None] < tokens, n[:, None] < OUTPUTS
    # Masks that always hold cost instructions and layouts.
    WHOLE: tl.constexpr = (SPLITS * STEPS == GROUPS) & (OUTPUTS % BLOCK_N == 0)
    sums = tl.zeros((BLOCK_N, BLOCK_TOKENS) if SWAP else (BLOCK_TOKENS, BLOCK_N), tl.float32)
    if AHEAD:
        weights, scales = (), ()
        for step in tl.static_range(STEPS):
            weights = weights + (_load(weight_pointers + step * 128, is_n & (first + step < GROUPS), WHOLE),)
        # After all of the weights: what becomes of a number may wait for it.
        for step in tl.static_range(STEPS):
            scales = scales + (_load(scale_pointer + step, first + step < GROUPS, WHOLE),)
        if PDL:
            gdc_wait()  # before the first read of x, and the first write of what the launch before may still read
            gdc_launch_dependents()
        next_x = tl.load(x_pointers, mask=is_token & (first < GROUPS), other=0.0)
        for step in tl.static_range(STEPS):
            x = next_x
            if step + 1 < STEPS:
                is_next = is_token & (first + (step + 1) < GROUPS)
                next_x = tl.load(x_pointers + (step + 1) * 128, mask=is_next, other=0.0)
            weight = _keep_here(weights[step]) if PDL else weights[step]
            sums += _scaled_product(x, weight, scales[step], SWAP)
    else:
        if PDL:
            row = tl.minimum(n, OUTPUTS - 1)
            for step in range(STEPS):
                _prefetch(weight_ptr + row * INPUTS + tl.minimum(first + step, GROUPS - 1) * 128)
            gdc_wait()
            gdc_launch_dependents()
        for step in range(STEPS):
            is_group = first + step < GROUPS
            x = tl.load(x_pointers + step * 128, mask=is_token & is_group, other=0.0)
            weight = _load(weight_pointers + step * 128, is_n & is_group, WHOLE)
            sums += _scaled_product(x, weight, _load(scale_pointer + step, is_group, WHOLE), SWAP)
    if SWAP:
        sums = tl.trans(sums)
    place = token[:, None] * OUTPUTS + n[None, :]
    wanted = (token[:, None] < tokens) & (n[None, :] < OUTPUTS)
    tl.store(parts_ptr + split * tokens * OUTPUTS + place, sums.to(parts_ptr.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["count"])
def _add_parts_kernel(
    parts_ptr, out_ptr, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """[splits, count] float32 to their sums in bfloat16."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wanted = place < count
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.load(parts_ptr + place, mask=wanted, other=0.0)
    for part in tl.static_range(1, SPLITS):
        total += tl.load(parts_ptr + part * count + place, mask=wanted, other=0.0)
    tl.store(out_ptr + place, total.to(tl.bfloat16), mask=wanted)
