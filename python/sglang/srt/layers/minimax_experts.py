"""The experts of MiniMax-M2 for few tokens: FP8 weights with a float32 scale for each block of 128 x 128.

For token t, its experts e = topk_ids[t] and their weights p = topk_weights[t]:

    gate, up = x[t] @ w13[e].T                          # 2 x [width]
    out[t]   = sum over e of p[e] * (silu(gate) * up) @ w2[e].T

The engine takes eight launches: two sort routes, two quantise, two multiply, one is the SiLU, one the sum. For few
tokens all that must be done is to read the weights of the experts that were chosen. So here are three launches, or two:
gate and up with the SiLU; down; and the sum, which for the fewest tokens the down projection makes itself. Nothing is
sorted. There is a CTA for each route (a token's choice of an expert) and tile of the output; of the routes that lead to
one expert the first one's CTA works for all of them, and the others leave.

An FP8 weight is converted to bfloat16 or float16, exactly, and so activations need not be rounded to FP8 as they are in
the engine's experts; a plan may do that too. Sums, SiLU and routing weights are float32; what is rounded, to bfloat16,
is silu(gate) * up and the output. No atomics: the same inputs give the same bits.
"""

# ruff: noqa: RUF005  a Triton function cannot unpack a tuple into another

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from sglang.srt.compilation.piecewise_context_manager import is_in_piecewise_cuda_graph
from sglang.srt.layers.moe import get_moe_a2a_backend, should_use_flashinfer_cutlass_moe_fp4_allgather
from sglang.srt.layers.moe.topk import TopKOutput, TopKOutputChecker
from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod
from sglang.srt.server_args import get_global_server_args
from sglang.srt.utils import is_cuda, log_info_on_rank0
from sglang.srt.utils.custom_op import register_custom_op
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

logger = logging.getLogger(__name__)

Experts = Callable[[torch.nn.Module, torch.Tensor, TopKOutput], torch.Tensor]
BLOCK = 128  # of the scales
MAX_PREFETCH = 96 * 4  # bytes of weights that a thread may hold before its inputs are there


class Projection(NamedTuple):
    """How the CTAs of gate and up, or of down, divide their work.

    Attributes:
        routes: of one expert, that a CTA takes at once, 16 or more. Of down also 1: a CTA takes a token with all its
            experts and leaves nothing to sum. Weights that tokens share are read again then, from the L2 cache at best.
        activations: what they are multiplied as; sums are float32 with each, and with 1 route so are the products.
            bfloat16    as they are
            float16     in groups of 128 with a power of two for each, which costs them nothing that float32 sums keep
            float8      quantised in groups of 128 with scale = absmax / 448, as the engine does
        weights_first: weights are the left operand of a product, of which a warp group's instruction takes 64 rows.
        columns: of silu(gate) * up, or of the output, that are a CTA's; a power of two up to 128.
        warps: of a CTA.
        stages: blocks of 128 inputs that are in flight.
    """

    routes: int
    activations: str
    weights_first: bool
    columns: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """Both projections."""

    gate_up: Projection
    down: Projection


# Measured on one H200, 256 experts of width 384: benchmark/results/experts_h200.json. From 16 tokens on, evenly
# routed, the engine's kernels are faster.
PLANS = {  # up to so many tokens
    1: Plan(Projection(16, "bfloat16", False, 32, 4, 4), Projection(1, "bfloat16", False, 8, 2, 1)),
    2: Plan(Projection(16, "bfloat16", False, 32, 4, 4), Projection(16, "float16", False, 128, 4, 3)),
    4: Plan(Projection(16, "bfloat16", False, 32, 4, 6), Projection(16, "float16", False, 128, 4, 3)),
    8: Plan(Projection(16, "bfloat16", False, 32, 4, 4), Projection(16, "float16", False, 128, 4, 3)),
}
MAX_TOKENS = max(PLANS)
"""No more are planned for; above it the engine's experts run."""


def plan_for(tokens: int) -> Plan:
    """The plan for ``tokens`` in 1 to ``MAX_TOKENS``."""
    return next(plan for limit, plan in PLANS.items() if tokens <= limit)


def choose_experts(experts: torch.nn.Module) -> Experts:
    """What computes a layer's experts, a function of (experts, hidden_states, topk_output): [tokens, hidden_size].

    Called once, when the layer is built: to these weights the engine does nothing on Hopper after they are loaded.
    """
    reason = reason_against_plans(experts)
    _log_once(reason)
    return few_or_many_tokens if reason is None else engine_experts


def engine_experts(experts: torch.nn.Module, hidden_states: torch.Tensor, topk_output: TopKOutput) -> torch.Tensor:
    """The engine's kernels."""
    return experts(hidden_states, topk_output)


def few_or_many_tokens(experts: torch.nn.Module, hidden_states: torch.Tensor, topk_output: TopKOutput) -> torch.Tensor:
    """The kernels here up to ``MAX_TOKENS`` tokens, and the engine's above."""
    # Piecewise graphs are for prefill, and the engine has an op for its experts in them.
    if is_in_piecewise_cuda_graph() or not 0 < hidden_states.shape[0] <= MAX_TOKENS:
        return experts(hidden_states, topk_output)
    assert TopKOutputChecker.format_is_standard(topk_output), f"the chosen experts as numbers, not {type(topk_output)}"
    return minimax_experts(
        hidden_states, topk_output.topk_weights, topk_output.topk_ids, experts.w13_weight,
        experts.w13_weight_scale_inv, experts.w2_weight, experts.w2_weight_scale_inv,
        experts.moe_ep_rank * experts.num_local_experts,
    )  # fmt: skip


def reason_against_plans(experts: torch.nn.Module) -> str | None:
    """The first condition of the kernels here that does not hold, as a clause, or None."""
    if not is_cuda() or torch.cuda.get_device_capability() != (9, 0):
        return "its kernels are planned for NVIDIA GPUs of compute capability 9.0"
    server_args, method, config = get_global_server_args(), experts.quant_method, experts.moe_runner_config
    if not get_moe_a2a_backend().is_none() or should_use_flashinfer_cutlass_moe_fp4_allgather():
        return "a dispatcher moves tokens to their experts"
    if not isinstance(method, Fp8MoEMethod) or not method.block_quant or method.use_mxfp8:
        return f"it reads FP8 weights in blocks, and these experts are {type(method).__name__}'s"
    if list(method.quant_config.weight_block_size) != [BLOCK, BLOCK]:
        return f"its blocks are {BLOCK} x {BLOCK}, and these are {method.quant_config.weight_block_size}"
    if not hasattr(experts, "runner") or not experts.runner.runner_backend.is_triton():
        return f"--moe-runner-backend {server_args.moe_runner_backend} asks for other kernels"
    if experts.hidden_size % BLOCK or experts.intermediate_size_per_partition % BLOCK:
        return f"a width of {experts.intermediate_size_per_partition} is no multiple of {BLOCK}"
    if torch.get_default_dtype() != torch.bfloat16:
        return f"activations are {torch.get_default_dtype()}, and it takes bfloat16"
    if config.top_k is None or config.top_k & (config.top_k - 1):
        return f"{config.top_k} experts a token are no power of two"
    if (
        config.activation != "silu" or not config.is_gated or config.apply_router_weight_on_input or config.no_combine
        or config.num_fused_shared_experts or config.gemm1_alpha is not None or config.gemm1_clamp_limit is not None
        or config.routed_scaling_factor not in (None, 1.0) or experts.reduce_results
    ):  # fmt: skip
        return "it knows SiLU(gate) * up, summed with the routing weights on this rank, and these experts do otherwise"
    if server_args.enable_lora or server_args.lora_paths:
        return "LoRA adapters have a part in the experts"
    if server_args.cpu_offload_gb or server_args.offload_group_size > 0:
        return "weights are offloaded, and come back where the engine's own experts run"
    if server_args.enable_symm_mem:
        return "--enable-symm-mem wants the output in memory of its own"
    if server_args.enable_deterministic_inference:
        return "deterministic inference wants sums in an order that no batch size changes"
    return None


@functools.lru_cache
def _log_once(reason: str | None) -> None:
    fused = f"two or three kernels up to {MAX_TOKENS} tokens"
    what = fused if reason is None else f"the engine's kernels, since {reason}"
    log_info_on_rank0(logger, f"The experts' output comes from {what}.")


def _no_output(
    hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, w13: torch.Tensor,
    w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor, first_expert: int,
) -> torch.Tensor:  # fmt: skip
    return hidden_states.new_empty(hidden_states.shape)


@register_custom_op(fake_impl=_no_output)
def minimax_experts(
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    first_expert: int,
) -> torch.Tensor:
    """The experts of 0 to ``MAX_TOKENS`` tokens.

    Args:
        hidden_states: [tokens, hidden_size] bfloat16, rows at any stride.
        topk_weights: [tokens, top_k] float32, contiguous.
        topk_ids: [tokens, top_k] int32, contiguous: numbers among all ranks' experts. A token's are distinct, but for
            those that are not of this rank, -1 too, which count nothing.
        w13: [experts, 2 * width, hidden_size] float8_e4m3fn: the rows of gate, then those of up.
        w13_scale: [experts, 2 * width / 128, hidden_size / 128] float32.
        w2: [experts, hidden_size, width] float8_e4m3fn.
        w2_scale: [experts, hidden_size / 128, width / 128] float32.
        first_expert: the number, among all ranks' experts, of this rank's first.

    Returns:
        [tokens, hidden_size] bfloat16: the sum over the experts of this rank.

    Raises:
        ValueError: more tokens than there is a plan for.
    """
    tokens = hidden_states.shape[0]
    if tokens == 0:
        return torch.empty_like(hidden_states)
    if tokens > MAX_TOKENS:
        raise ValueError(f"{tokens} tokens: there are plans up to {MAX_TOKENS}; call the engine's experts for more")
    plan = plan_for(tokens)
    activated = gate_up(hidden_states, topk_ids, w13, w13_scale, first_expert, plan.gate_up)
    return down(activated, topk_weights, topk_ids, w2, w2_scale, first_expert, plan.down)


def gate_up(
    x: torch.Tensor, topk_ids: torch.Tensor, w13: torch.Tensor, w13_scale: torch.Tensor, first_expert: int,
    plan: Projection,
) -> torch.Tensor:  # fmt: skip
    """[tokens * top_k, width] bfloat16: silu(gate) * up of each route; other ranks' experts' are not written."""
    _check(x, topk_ids, w13, w13_scale)
    (tokens, hidden_size), top_k, width = x.shape, topk_ids.shape[1], w13.shape[1] // 2
    activated = torch.empty(tokens * top_k, width, dtype=x.dtype, device=x.device)
    pdl = _has_programmatic_launch(x.device)
    _gate_up_kernel[(width // plan.columns, tokens * top_k)](
        x, topk_ids, w13, w13_scale, activated, tokens, first_expert, w13.shape[0], x.stride(0), top_k, hidden_size,
        width, _lanes(tokens, plan), plan.routes, plan.columns, plan.stages, plan.activations, plan.weights_first, pdl,
        num_warps=plan.warps, **_options(pdl),
    )  # fmt: skip
    return activated


def down(
    activated: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, w2: torch.Tensor,
    w2_scale: torch.Tensor, first_expert: int, plan: Projection,
) -> torch.Tensor:  # fmt: skip
    """[tokens, hidden_size] bfloat16: the down projections of a token's experts, weighted and summed."""
    _check(activated, topk_ids, w2, w2_scale)
    assert topk_weights.is_contiguous() and topk_weights.dtype == torch.float32, "float32 weights, [tokens, top_k]"
    (tokens, top_k), (experts, hidden_size, width) = topk_ids.shape, w2.shape
    pdl, bytes_held = _has_programmatic_launch(w2.device), MAX_PREFETCH * 32 * plan.warps
    out = torch.empty(tokens, hidden_size, dtype=activated.dtype, device=activated.device)
    if plan.routes == 1:
        _down_by_token_kernel[(hidden_size // plan.columns, tokens)](
            activated, topk_weights, topk_ids, w2, w2_scale, out, first_expert, experts, top_k, hidden_size, width,
            plan.columns, top_k * plan.columns * width <= bytes_held, pdl, num_warps=plan.warps, **_options(pdl),
        )  # fmt: skip
        return out
    parts = torch.empty(tokens * top_k, hidden_size, dtype=torch.float32, device=activated.device)
    _down_kernel[(hidden_size // plan.columns, tokens * top_k)](
        activated, topk_weights, topk_ids, w2, w2_scale, parts, tokens, first_expert, experts, top_k, hidden_size,
        width, _lanes(tokens, plan), plan.routes, plan.columns, plan.stages, plan.activations, plan.weights_first,
        plan.columns * width <= bytes_held, pdl, num_warps=plan.warps, **_options(pdl),
    )  # fmt: skip
    columns = 1024 if hidden_size % 1024 == 0 else BLOCK
    _sum_kernel[(hidden_size // columns, tokens)](
        parts, topk_ids, out, first_expert, experts, top_k, hidden_size, columns, pdl, num_warps=4, **_options(pdl)
    )
    return out


def experts_reference(
    hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, w13: torch.Tensor,
    w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor, first_expert: int,
) -> torch.Tensor:  # fmt: skip
    """:func:`minimax_experts` in plain torch and float64, rounded nowhere: [tokens, hidden_size] float64."""
    out = torch.zeros(hidden_states.shape, dtype=torch.float64, device=hidden_states.device)
    local = topk_ids - first_expert
    for expert in local[(local >= 0) & (local < w13.shape[0])].unique().tolist():
        token, choice = (local == expert).nonzero(as_tuple=True)
        of_gate_up, of_down = (
            weight[expert].double() * scale[expert].double().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            for weight, scale in ((w13, w13_scale), (w2, w2_scale))
        )
        gate, up = (hidden_states[token].double() @ of_gate_up.T).chunk(2, dim=-1)
        part = (torch.nn.functional.silu(gate) * up) @ of_down.T
        out.index_add_(0, token, part * topk_weights[token, choice, None].double())
    return out


def _check(x: torch.Tensor, topk_ids: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
    assert x.dtype == torch.bfloat16 and x.stride(1) == 1, f"rows of bfloat16, each contiguous, and not {x.dtype}"
    assert x.stride(0) % 8 == 0, f"rows start at multiples of 16 bytes, and these are {x.stride(0)} values apart"
    assert topk_ids.dtype == torch.int32 and topk_ids.is_contiguous(), f"int32 ids, and not {topk_ids.dtype}"
    assert weight.is_contiguous() and scale.is_contiguous(), "weights and their scales must be contiguous"
    assert weight.shape[1] == scale.shape[1] * BLOCK and weight.shape[2] == scale.shape[2] * BLOCK == x.shape[1], (
        f"weights {list(weight.shape)} have a scale for each {BLOCK} x {BLOCK}, but these are {list(scale.shape)}, for "
        f"activations of {x.shape[1]}"
    )


def _lanes(tokens: int, plan: Projection) -> int:
    """How many tokens a CTA looks through for its expert's."""
    return max(plan.routes, triton.next_power_of_2(tokens))


@functools.cache
def _has_programmatic_launch(device: torch.device) -> bool:
    """Whether a kernel may start while its predecessor in the stream still runs: Hopper and later."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _options(pdl: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if pdl else {}  # other platforms do not know the option


@triton.jit
def _routes_alike(topk_ids_ptr, route, tokens, TOP_K: tl.constexpr, TOKENS: tl.constexpr):
    """The expert of ``route``; for each token its route to that expert, or -1; how many of these precede ``route``."""
    token = tl.arange(0, TOKENS)
    choice = tl.arange(0, TOP_K)
    expert = tl.load(topk_ids_ptr + route)
    routes = token[:, None] * TOP_K + choice[None, :]
    ids = tl.load(topk_ids_ptr + routes, mask=token[:, None] < tokens, other=-1)
    alike = tl.max(tl.where((ids == expert) & (token[:, None] < tokens), routes, -1), axis=1)
    return expert, alike, tl.sum(((alike >= 0) & (alike < route)).to(tl.int32))


@triton.jit
def _next_routes(alike, earlier, TOKENS: tl.constexpr, ROUTES: tl.constexpr):
    """Of the routes in ``alike`` those after the first ``earlier``: [ROUTES], -1 where there are no more."""
    if TOKENS == ROUTES:  # ``earlier`` is 0, and gaps do no harm
        found = alike
    else:
        is_route = alike >= 0
        place = tl.cumsum(is_route.to(tl.int32), 0) - 1 - earlier
        chosen = is_route[None, :] & (place[None, :] == tl.arange(0, ROUTES)[:, None])
        found = tl.max(tl.where(chosen, alike[None, :], -1), axis=1)
    return found


@triton.jit
def _to_bfloat16(weight, ASSEMBLY: tl.constexpr):
    """FP8 to bfloat16, exactly. The compiler's own way converts one value at a time, slower than they arrive."""
    if ASSEMBLY:
        # A byte's exponent and mantissa at their places in bfloat16 mean 2^-120 of what they meant; the sign moves up.
        result = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, sign_low, sign_high;
            prmt.b32 low, $2, 0, 0x4140;
            prmt.b32 high, $2, 0, 0x4342;
            and.b32 sign_low, low, 0x00800080;
            and.b32 sign_high, high, 0x00800080;
            mul.lo.u32 low, low, 16;
            mul.lo.u32 high, high, 16;
            mad.lo.u32 low, sign_low, 0xF0, low;
            mad.lo.u32 high, sign_high, 0xF0, high;
            mov.b32 sign_low, 0x7B807B80;
            mul.rn.bf16x2 $0, low, sign_low;
            mul.rn.bf16x2 $1, high, sign_low;
            }""",
            "=r,=r,r", [weight], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        result = weight.to(tl.bfloat16)
    return result


@triton.jit
def _product(x, weight, ACTIVATIONS: tl.constexpr, WEIGHTS_FIRST: tl.constexpr, ASSEMBLY: tl.constexpr):
    """x @ weight.T, or its transpose for ``WEIGHTS_FIRST``, over 128 inputs: x [routes, 128], weight [columns, 128]."""
    scale = tl.full((x.shape[0],), 1.0, tl.float32)
    if ACTIVATIONS == "bfloat16":
        weight = _to_bfloat16(weight, ASSEMBLY)
    else:
        value = x.to(tl.float32)
        most = tl.max(tl.abs(value), axis=1)
        if ACTIVATIONS == "float16":
            # A power of two that brings the largest below 2^15; the others keep all bits down to 2^-29 of it.
            exponent = tl.maximum(most.to(tl.int32, bitcast=True) >> 23, 27)
            scale = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
            inverse = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
            x = (value * inverse[:, None]).to(tl.float16)
            weight = weight.to(tl.float16)
        else:
            scale = tl.div_rn(tl.maximum(most, 1e-10), 448.0)
            # By division: a product with the inverse may fall on the other side of the middle of two FP8 values.
            x = tl.div_rn(value, tl.broadcast_to(scale[:, None], value.shape)).to(tl.float8e4nv)
    product = tl.dot(weight, tl.trans(x)) if WEIGHTS_FIRST else tl.dot(x, tl.trans(weight))
    if ACTIVATIONS != "bfloat16":
        product *= scale[None, :] if WEIGHTS_FIRST else scale[:, None]
    return product


@triton.jit(do_not_specialize=["tokens", "first_expert", "experts"])
def _gate_up_kernel(
    x_ptr, topk_ids_ptr, weight_ptr, scale_ptr, activated_ptr, tokens, first_expert, experts, x_stride,
    TOP_K: tl.constexpr, HIDDEN_SIZE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, ROUTES: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr, ACTIVATIONS: tl.constexpr, WEIGHTS_FIRST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        # From here on the choice of experts is there for the next kernel too, which reads it before its own wait.
        gdc_launch_dependents()
    expert, alike, earlier = _routes_alike(topk_ids_ptr, tl.program_id(1), tokens, TOP_K, TOKENS)
    expert -= first_expert
    if (expert < 0) | (expert >= experts) | (earlier % ROUTES != 0):
        return
    route = _next_routes(alike, earlier, TOKENS, ROUTES)
    column = tl.program_id(0) * COLUMNS
    # Rows of gate and up in turn: so their sums end up beside each other, in one thread.
    row = tl.arange(0, 2 * COLUMNS)
    is_up = row % 2
    k = tl.arange(0, 128)
    rows = expert.to(tl.int64) * (2 * WIDTH) + column + row // 2 + is_up * WIDTH
    weight_rows = weight_ptr + rows[:, None] * HIDDEN_SIZE + k[None, :]
    x_rows = x_ptr + (route // TOP_K)[:, None].to(tl.int64) * x_stride + k[None, :]
    gate_scales = scale_ptr + (expert * (2 * WIDTH // 128) + column // 128) * (HIDDEN_SIZE // 128)
    up_scales = gate_scales + WIDTH // 128 * (HIDDEN_SIZE // 128)
    sums = tl.zeros((2 * COLUMNS, ROUTES) if WEIGHTS_FIRST else (ROUTES, 2 * COLUMNS), tl.float32)
    for block in tl.range(HIDDEN_SIZE // 128, num_stages=STAGES):
        x = tl.load(x_rows + block * 128, mask=route[:, None] >= 0, other=0.0)
        weight = tl.load(weight_rows + block * 128)
        scale = tl.where(is_up == 1, tl.load(up_scales + block), tl.load(gate_scales + block))
        sums += _product(x, weight, ACTIVATIONS, WEIGHTS_FIRST, PDL) * (
            scale[:, None] if WEIGHTS_FIRST else scale[None, :]
        )
    if WEIGHTS_FIRST:
        sums = tl.trans(sums)
    gate, up = tl.split(tl.reshape(sums, (ROUTES, COLUMNS, 2)))
    activated = gate / (1.0 + tl.exp(-gate)) * up
    place = activated_ptr + route[:, None] * WIDTH + column + tl.arange(0, COLUMNS)[None, :]
    tl.store(place, activated.to(activated_ptr.dtype.element_ty), mask=route[:, None] >= 0)


@triton.jit(do_not_specialize=["tokens", "first_expert", "experts"])
def _down_kernel(
    activated_ptr, topk_weights_ptr, topk_ids_ptr, weight_ptr, scale_ptr, parts_ptr, tokens, first_expert, experts,
    TOP_K: tl.constexpr, HIDDEN_SIZE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, ROUTES: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr, ACTIVATIONS: tl.constexpr, WEIGHTS_FIRST: tl.constexpr,
    PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    expert, alike, earlier = _routes_alike(topk_ids_ptr, tl.program_id(1), tokens, TOP_K, TOKENS)
    expert -= first_expert
    if (expert < 0) | (expert >= experts) | (earlier % ROUTES != 0):
        return
    column = tl.program_id(0) * COLUMNS
    k = tl.arange(0, 128)
    rows = expert.to(tl.int64) * HIDDEN_SIZE + column + tl.arange(0, COLUMNS)
    weight_rows = weight_ptr + rows[:, None] * WIDTH + k[None, :]
    scales = scale_ptr + (expert * (HIDDEN_SIZE // 128) + column // 128) * (WIDTH // 128)
    weights = ()
    if PREFETCH:  # while the kernel before this one still runs
        for block in tl.static_range(WIDTH // 128):
            weights = weights + (tl.load(weight_rows + block * 128),)
    route = _next_routes(alike, earlier, TOKENS, ROUTES)
    x_rows = activated_ptr + route[:, None] * WIDTH + k[None, :]
    routing_weight = tl.load(topk_weights_ptr + route, mask=route >= 0, other=0.0)
    if PDL:
        gdc_wait()
    sums = tl.zeros((COLUMNS, ROUTES) if WEIGHTS_FIRST else (ROUTES, COLUMNS), tl.float32)
    if PREFETCH:
        inputs = ()
        for block in tl.static_range(WIDTH // 128):
            inputs = inputs + (tl.load(x_rows + block * 128, mask=route[:, None] >= 0, other=0.0),)
        for block in tl.static_range(WIDTH // 128):
            sums += _product(inputs[block], weights[block], ACTIVATIONS, WEIGHTS_FIRST, PDL) * tl.load(scales + block)
    else:
        for block in tl.range(WIDTH // 128, num_stages=STAGES):
            x = tl.load(x_rows + block * 128, mask=route[:, None] >= 0, other=0.0)
            weight = tl.load(weight_rows + block * 128)
            sums += _product(x, weight, ACTIVATIONS, WEIGHTS_FIRST, PDL) * tl.load(scales + block)
    if WEIGHTS_FIRST:
        sums = tl.trans(sums)
    place = parts_ptr + route[:, None] * HIDDEN_SIZE + column + tl.arange(0, COLUMNS)[None, :]
    tl.store(place, sums * routing_weight[:, None], mask=route[:, None] >= 0)


@triton.jit(do_not_specialize=["first_expert", "experts"])
def _sum_kernel(
    parts_ptr, topk_ids_ptr, out_ptr, first_expert, experts, TOP_K: tl.constexpr, HIDDEN_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for choice in tl.static_range(TOP_K):
        route = token * TOP_K + choice
        expert = tl.load(topk_ids_ptr + route) - first_expert
        total += tl.load(parts_ptr + route * HIDDEN_SIZE + column, mask=(expert >= 0) & (expert < experts), other=0.0)
    tl.store(out_ptr + token * HIDDEN_SIZE + column, total.to(out_ptr.dtype.element_ty))


@triton.jit
def _add_block(sums, weight, x_ptr, scale, is_local, k, COLUMNS: tl.constexpr):
    """``sums`` [columns, 128] and the products of one block of 128 inputs, not yet summed over these."""
    # Each thread reads what it multiplies: an address a product, so that nothing passes through shared memory.
    x = tl.load(x_ptr + tl.zeros((COLUMNS, 1), tl.int32) + k[None, :], mask=is_local, other=0.0)
    return sums + weight.to(tl.float32) * (x.to(tl.float32) * scale)


@triton.jit(do_not_specialize=["first_expert", "experts"])
def _down_by_token_kernel(
    activated_ptr, topk_weights_ptr, topk_ids_ptr, weight_ptr, scale_ptr, out_ptr, first_expert, experts,
    TOP_K: tl.constexpr, HIDDEN_SIZE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    token = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS
    row = column + tl.arange(0, COLUMNS)
    k = tl.arange(0, 128)
    weight_block = weight_ptr + row[:, None] * WIDTH + k[None, :]
    scale_row = scale_ptr + column // 128 * (WIDTH // 128)
    weights, scales, is_local = (), (), ()
    if PREFETCH:  # while the kernel before this one still runs
        for choice in tl.static_range(TOP_K):
            expert = tl.load(topk_ids_ptr + token * TOP_K + choice) - first_expert
            is_local = is_local + ((expert >= 0) & (expert < experts),)
            expert = tl.where(is_local[choice], expert, 0).to(tl.int64)
            routing_weight = tl.load(topk_weights_ptr + token * TOP_K + choice)
            for block in tl.static_range(WIDTH // 128):
                place = weight_block + expert * (HIDDEN_SIZE * WIDTH) + block * 128
                weights = weights + (tl.load(place, mask=is_local[choice], other=0.0),)
                scale = tl.load(scale_row + expert * (HIDDEN_SIZE // 128 * (WIDTH // 128)) + block)
                scales = scales + (scale * routing_weight,)
    if PDL:
        gdc_wait()
    sums = tl.zeros((COLUMNS, 128), tl.float32)
    if PREFETCH:
        for choice in tl.static_range(TOP_K):
            x_row = activated_ptr + (token * TOP_K + choice) * WIDTH
            for block in tl.static_range(WIDTH // 128):
                sums = _add_block(
                    sums, weights[choice * (WIDTH // 128) + block], x_row + block * 128,
                    scales[choice * (WIDTH // 128) + block], is_local[choice], k, COLUMNS,
                )  # fmt: skip
    else:
        for choice in range(TOP_K):
            x_row = activated_ptr + (token * TOP_K + choice) * WIDTH
            expert = tl.load(topk_ids_ptr + token * TOP_K + choice) - first_expert
            local = (expert >= 0) & (expert < experts)
            expert = tl.where(local, expert, 0).to(tl.int64)
            routing_weight = tl.load(topk_weights_ptr + token * TOP_K + choice)
            for block in tl.static_range(WIDTH // 128):
                place = weight_block + expert * (HIDDEN_SIZE * WIDTH) + block * 128
                weight = tl.load(place, mask=local, other=0.0)
                scale = tl.load(scale_row + expert * (HIDDEN_SIZE // 128 * (WIDTH // 128)) + block) * routing_weight
                sums = _add_block(sums, weight, x_row + block * 128, scale, local, k, COLUMNS)
    tl.store(out_ptr + token * HIDDEN_SIZE + row, tl.sum(sums, axis=1).to(out_ptr.dtype.element_ty))
