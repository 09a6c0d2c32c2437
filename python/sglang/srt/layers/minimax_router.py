"""The router of MiniMax-M2: bfloat16 activations, float32 weights, products and sums.

    logits = x.float() @ weight.T                       # [tokens, experts]
    scores = sigmoid(logits)
    ids = the top k of scores + bias, of equal ones the lowest
    weights = scores[ids], divided by their sum

For few tokens the engine runs a cast, an SGEMM, a split-K pass and a kernel that chooses, though all that must be done
is to read 3 MB of weights. Here a first kernel reads x and weights once and leaves sums over parts of the hidden size,
and a second adds these in a fixed order and chooses. No atomics: the same inputs give the same bits. Each kernel loads
its weights before it waits for the launch before it (programmatic dependent launch), so that launch must not be the one
that writes them.

For many tokens the product is what takes time. There is another first kernel for them, which takes tiles through a
pipeline.

Where the engine does more than choose (:func:`reason_against_choice`), the second kernel leaves the logits to its
``TopK``.
"""

# ruff: noqa: RUF005  a Triton function cannot unpack a tuple into another

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
from sglang.srt.layers.minimax_log import log_once
from sglang.srt.layers.minimax_nvlink import has_programmatic_launch
from sglang.srt.layers.minimax_watchers import reason_of_watchers
from sglang.srt.layers.moe import get_moe_a2a_backend
from sglang.srt.layers.moe.routed_experts_capturer import get_global_experts_capturer
from sglang.srt.layers.moe.topk import StandardTopKOutput, TopK, TopKConfig, TopKOutputFormat, fused_topk
from sglang.srt.server_args import get_global_server_args
from sglang.srt.utils import get_device_capability, is_cuda
from sglang.srt.utils.custom_op import register_custom_op
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

RouterLogits = Callable[[torch.Tensor, torch.nn.Module], torch.Tensor]
Route = Callable[[torch.Tensor, torch.nn.Module, TopK], StandardTopKOutput]


class Plan(NamedTuple):
    """How the first kernel divides its work.

    ``method`` is how a tile is multiplied:
        reduce  float32 products and a sum over lanes
        parts   on tensor cores. A float32 weight is the sum of three bfloat16 values, exactly: 24 bits are three
                times 8. A product of two bfloat16 values is exact in the accumulators, which are float32. So nothing
                is rounded but the sums, as in any float32 matrix product: this is no TF32.
        tiles   the same for many tokens: ``steps`` blocks of ``block_k`` one after the other, loaded ``stages - 1``
                blocks ahead. Tensor cores cut off what an accumulator cannot hold, so they sum over one block only;
                blocks are added in registers, by additions that round to nearest.
    """

    method: str
    block_tokens: int
    block_experts: int
    block_k: int
    steps: int
    warps: int
    stages: int = 1

    def splits(self, hidden_size: int) -> int:
        """Into how many parts the hidden size is divided."""
        return triton.cdiv(hidden_size, self.block_k * self.steps)


# For each range one of the fastest whose error, against float64, is no larger than that of the stock float32 product
# at any count measured: benchmark/results/router_h200.json, of one H200, 256 experts and hidden size 3072.
PLANS = {  # up to so many tokens
    1: Plan("reduce", 1, 8, 512, 1, 8),
    2: Plan("reduce", 2, 8, 256, 1, 4),
    16: Plan("parts", 16, 64, 128, 1, 8),
    32: Plan("parts", 32, 64, 128, 1, 8),
    64: Plan("parts", 64, 16, 128, 1, 4),
    128: Plan("parts", 64, 32, 128, 1, 4),
    256: Plan("parts", 64, 64, 128, 1, 4),
}
# Two CTAs fit a multiprocessor, so that one multiplies while the other takes weights apart, and there are as many parts
# as make 256 CTAs of the largest count, one wave on 132 multiprocessors. That of 2048 tokens was measured.
PREFILL_PLANS = {
    512: Plan("tiles", 128, 64, 64, 3, 4, 4),
    1024: Plan("tiles", 128, 64, 64, 6, 4, 4),
    2048: Plan("tiles", 128, 64, 64, 12, 4, 4),
    4096: Plan("tiles", 128, 64, 64, 24, 4, 4),
    1 << 20: Plan("tiles", 128, 64, 64, 48, 4, 4),
}
MAX_TOKENS = max(PREFILL_PLANS)
"""Above it the float32 linear layer runs: 32 bits no longer count the sums of 2048 experts."""


class ChoicePlan(NamedTuple):
    """The first kernel's plan where the second one chooses too, and the warps that the second has for a token."""

    logits: Plan
    warps: int


# The logits' own plans are the fastest here too, and 2 warps of 1, 2, 4 and 8: more load more in parallel, but each
# chooses for itself. For one token there are but 6 parts to load, and no barrier with 1; for many tokens warps are busy
# with other tokens anyhow.
CHOICE_PLANS = {
    limit: ChoicePlan(plan, 2 if 1 < limit <= max(PLANS) else 1) for limit, plan in (PLANS | PREFILL_PLANS).items()
}
CHUNK = tl.constexpr(128)
"""So many experts lie in one tensor: 32 lanes of four values, which a warp compares without shared memory."""


def plan_for(tokens: int) -> Plan:
    """The plan for ``tokens`` in 1 to ``MAX_TOKENS``."""
    return choice_plan_for(tokens).logits


def choice_plan_for(tokens: int) -> ChoicePlan:
    """The plan for ``tokens`` in 1 to ``MAX_TOKENS`` where the experts are chosen too."""
    return next(plan for limit, plan in CHOICE_PLANS.items() if tokens <= limit)


def choose_router_logits(gate: torch.nn.Module) -> RouterLogits:
    """What computes a layer's logits, a function of (x [tokens, hidden_size], gate): [tokens, experts] float32.

    Called once, while the layer is built, under the model's default dtype, which is that of its activations.
    """
    reason = reason_against_logits(gate)
    _log_way(reason)
    return fused_router_logits if reason is None else linear_router_logits


def choose_route(gate: torch.nn.Module, topk: TopK) -> Route | None:
    """What takes a layer from activations to chosen experts, a function of (x [tokens, hidden_size], gate, topk) for at
    least one token; None where logits and ``topk`` are two steps.

    Called once, as :func:`choose_router_logits` is, whose conditions hold here too.
    """
    reason = reason_against_logits(gate) or reason_against_route(topk)
    _log_choice(reason)
    return fused_route if reason is None else None


def reason_against_logits(gate: torch.nn.Module) -> str | None:
    """Why this layer's logits do not come from the kernels here, as a clause, or None."""
    return reason_of_watchers(get_global_server_args()) or reason_against_plans(
        on_cuda=is_cuda(),
        hopper=is_cuda() and get_device_capability()[0] == 9,
        activations=torch.get_default_dtype(),
        weights=gate.weight.dtype,
        deterministic=bool(get_global_server_args().enable_deterministic_inference),
    )


def reason_against_route(topk: TopK) -> str | None:
    """Why a kernel here that has the logits does not also choose this layer's experts, as a clause, or None."""
    server_args = get_global_server_args()
    return reason_against_choice(
        topk.topk_config,
        dispatch_algorithm=server_args.ep_dispatch_algorithm,
        exchanges_tokens=not get_moe_a2a_backend().is_none(),
        symmetric_memory=bool(server_args.enable_symm_mem),
    )


def reason_against_plans(
    *, on_cuda: bool, hopper: bool, activations: torch.dtype, weights: torch.dtype, deterministic: bool
) -> str | None:
    """The first condition of the kernels here that does not hold, as a clause, or None."""
    if not on_cuda:
        return "its kernels are for NVIDIA GPUs"
    if not hopper:
        return "its plans, and the error of its sums, were measured on compute capability 9 (Hopper) only"
    if activations != torch.bfloat16:
        return f"activations are {activations}, and its plans were measured with bfloat16"
    if weights != torch.float32:
        return f"the router's weights are {weights}, and it takes apart float32"
    if deterministic:
        return "deterministic inference wants sums in an order that no batch size changes"
    return None


def reason_against_choice(
    config: TopKConfig, *, dispatch_algorithm: str | None, exchanges_tokens: bool, symmetric_memory: bool
) -> str | None:
    """What the engine's ``TopK`` would do beyond choosing as this kernel does, as a clause, or None."""
    if config.scoring_func != "sigmoid" or not config.renormalize or config.routed_scaling_factor not in (None, 1.0):
        return (
            f"scores are {config.scoring_func}, renormalised: {config.renormalize}, times "
            f"{config.routed_scaling_factor}, and the kernel has sigmoid scores whose sum is 1"
        )
    if config.use_grouped_topk or config.num_fused_shared_experts or config.custom_routing_function is not None:
        return "it has groups of experts, shared experts or a function of its own"
    if config.correction_bias is not None and config.correction_bias.dtype != torch.float32:
        return f"the selection bias is {config.correction_bias.dtype}, and the kernel adds float32"
    if config.output_format not in (None, TopKOutputFormat.STANDARD):
        return f"the experts want {config.output_format.name}, and the kernel writes weights and ids"
    if dispatch_algorithm is not None:
        return f"--ep-dispatch-algorithm {dispatch_algorithm} names places of experts, not experts"
    if exchanges_tokens:
        return "with an a2a backend it also marks padding, which is not sent"
    if symmetric_memory:
        return "--enable-symm-mem wants its result in memory of the engine's own"
    return None


def _log_way(reason: str | None) -> None:
    what = f"two kernels up to {MAX_TOKENS} tokens" if reason is None else f"a float32 linear layer, since {reason}"
    log_once(f"The router's logits come from {what}.")


def _log_choice(reason: str | None) -> None:
    what = f"the router's second kernel up to {MAX_TOKENS} tokens" if reason is None else f"TopK, since {reason}"
    log_once(f"The experts of a token are chosen by {what}.")


def linear_router_logits(x: torch.Tensor, gate: torch.nn.Module) -> torch.Tensor:
    """[tokens, experts] float32, through the layer itself: the reference."""
    return gate(x.to(torch.float32))[0]


def fused_router_logits(x: torch.Tensor, gate: torch.nn.Module) -> torch.Tensor:
    """:func:`linear_router_logits` through the plan for this many tokens."""
    return minimax_router_logits(x, gate.weight)


def fused_route(x: torch.Tensor, gate: torch.nn.Module, topk: TopK) -> StandardTopKOutput:
    """What ``topk`` answers to the logits, told to all who listen there: the capturer and the recorder of experts."""
    config = topk.topk_config
    logits, weights, ids = minimax_route(x, gate.weight, config.correction_bias, config.top_k)
    get_global_experts_capturer().capture(layer_id=topk.layer_id, topk_ids=ids)
    get_global_expert_distribution_recorder().on_select_experts(topk_ids=ids)
    return StandardTopKOutput(weights, ids, logits)


def route_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`minimax_route` in plain torch, in the dtype of ``weight``."""
    logits = torch.nn.functional.linear(x.to(weight.dtype), weight)
    scores = logits.sigmoid()
    choice = scores if bias is None else scores + bias
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen = scores.gather(1, ids)
    return logits, chosen / chosen.sum(dim=-1, keepdim=True), ids.int()


def _no_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


# An op of its own, so that torch.compile, to which the number of tokens is a symbol, does not look at the branch.
@register_custom_op(fake_impl=_no_logits)
def minimax_router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The logits of any number of tokens.

    Args:
        x: [tokens, hidden_size] bfloat16, rows at any stride.
        weight: [experts, hidden_size] float32, contiguous and finite.

    Returns:
        [tokens, experts] float32.
    """
    tokens = x.shape[0]
    if not 0 < tokens <= MAX_TOKENS:
        return torch.nn.functional.linear(x.to(torch.float32), weight)
    return add_partials(partial_logits(x, weight, plan_for(tokens)))


def _no_route(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, top_k: int):
    weights = x.new_empty(x.shape[0], top_k, dtype=torch.float32)
    return _no_logits(x, weight), weights, torch.empty_like(weights, dtype=torch.int32)


@register_custom_op(fake_impl=_no_route)
def minimax_route(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The experts of any number of tokens.

    Args:
        x: [tokens, hidden_size] bfloat16, rows at any stride.
        weight: [experts, hidden_size] float32, contiguous and finite.
        bias: [experts] float32, added for the choice only; None: nothing is.
        top_k: how many experts a token has, at most ``experts``.

    Returns:
        logits: [tokens, experts] float32.
        weights: [tokens, top_k] float32, each row's sum is 1; the best choice first.
        ids: [tokens, top_k] int32.
    """
    tokens = x.shape[0]
    if tokens == 0:
        return _no_route(x, weight, bias, top_k)
    if tokens > MAX_TOKENS:
        logits = torch.nn.functional.linear(x.to(torch.float32), weight)
        return logits, *fused_topk(x, logits, top_k, True, bias, "sigmoid")
    plan = choice_plan_for(tokens)
    return choose_experts(partial_logits(x, weight, plan.logits), bias, top_k, plan.warps)


def partial_logits(x: torch.Tensor, weight: torch.Tensor, plan: Plan) -> torch.Tensor:
    """[splits, tokens, experts] float32: each part's sum."""
    assert x.stride(1) == 1 and weight.is_contiguous(), "a row of x, and all of the weight, must be contiguous"
    assert x.dtype == torch.bfloat16 or plan.method != "parts", f"parts multiplies bfloat16, and x is {x.dtype}"
    tokens, hidden_size = x.shape
    experts, splits = weight.shape[0], plan.splits(hidden_size)
    partials = torch.empty(splits, tokens, experts, dtype=torch.float32, device=x.device)
    assert partials.numel() < 2**31, f"{partials.shape} sums are more than 32 bits count: divide the tokens"
    grid = (triton.cdiv(experts, plan.block_experts), splits, triton.cdiv(tokens, plan.block_tokens))
    tensors = x, weight, partials, tokens, experts, hidden_size, x.stride(0)
    blocks = plan.block_tokens, plan.block_experts, plan.block_k, plan.steps
    options = {**_launch_options(x.device), "num_warps": plan.warps}
    if plan.method == "tiles":
        whole = hidden_size % (plan.block_k * plan.steps) == 0
        _tiled_partial_logits_kernel[grid](*tensors, *blocks, plan.stages, whole, **options)
    else:
        _partial_logits_kernel[grid](*tensors, plan.method, *blocks, **options)
    return partials


def _launch_options(device: torch.device) -> dict:
    """Of every kernel: whether it starts while the launch before it still runs."""
    return {"PDL": True, "launch_pdl": True} if has_programmatic_launch(device) else {"PDL": False}


def add_partials(partials: torch.Tensor) -> torch.Tensor:
    """[tokens, experts] float32: the sum of the parts, in their order."""
    splits, tokens, experts = partials.shape
    if splits == 1:
        return partials[0]
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=partials.device)
    _add_partials_kernel[(tokens,)](
        partials, logits, tokens, experts, splits, triton.next_power_of_2(experts),
        **_launch_options(partials.device), num_warps=4,
    )  # fmt: skip
    return logits


def choose_experts(
    partials: torch.Tensor, bias: torch.Tensor | None, top_k: int, warps: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits, weights and ids of :func:`minimax_route`, from [splits, tokens, experts] partial sums.

    A single part is the logits already, and is returned as such.
    """
    splits, tokens, experts = partials.shape
    logits = partials[0] if splits == 1 else partials.new_empty(tokens, experts)
    weights = partials.new_empty(tokens, top_k)
    ids = torch.empty_like(weights, dtype=torch.int32)
    _choose_experts_kernel[(tokens,)](
        partials, bias, logits, weights, ids, tokens, experts, splits, triton.next_power_of_2(splits),
        triton.cdiv(experts, CHUNK.value), top_k, triton.next_power_of_2(top_k),
        **_launch_options(partials.device), num_warps=warps,
    )  # fmt: skip
    return logits, weights, ids


@triton.jit
def _upper_half(value):
    """A float32 cut off to what bfloat16 holds, as float32. Unlike a rounded one it is finite for every finite value,
    and takes no conversion, of which a GPU does few at a time."""
    return (value.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _parts(weight):
    """Three float32 values whose sum is the weight and of which bfloat16 holds each, the largest first."""
    first = _upper_half(weight)
    rest = weight - first
    second = _upper_half(rest)
    return first, second, rest - second


@triton.jit
def _partial_logits_kernel(
    x_ptr, weight_ptr, partials_ptr, tokens, experts, hidden_size, x_stride,
    METHOD: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0) * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS)
    split = tl.program_id(1)
    token = tl.program_id(2) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    x_rows = x_ptr + token[:, None].to(tl.int64) * x_stride
    weight_rows = weight_ptr + expert[:, None] * hidden_size
    sums = tl.zeros((BLOCK_TOKENS, BLOCK_EXPERTS), tl.float32)
    for step in tl.static_range(STEPS):
        k = (split * STEPS + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = k[None, :] < hidden_size
        weight = tl.load(weight_rows + k[None, :], mask=(expert[:, None] < experts) & inside, other=0.0)
        if PDL and step == 0:
            gdc_wait()
            gdc_launch_dependents()
        x = tl.load(x_rows + k[None, :], mask=(token[:, None] < tokens) & inside, other=0.0)
        if METHOD == "reduce":
            sums += tl.sum(x.to(tl.float32)[:, None, :] * weight[None, :, :], axis=2)
        else:
            first, second, third = _parts(weight)
            # The smallest first: added to what is large already, they would lose their last bits.
            sums = tl.dot(x, tl.trans(third.to(tl.bfloat16)), sums)
            sums = tl.dot(x, tl.trans(second.to(tl.bfloat16)), sums)
            sums = tl.dot(x, tl.trans(first.to(tl.bfloat16)), sums)
    place = partials_ptr + (split * tokens + token[:, None]) * experts + expert[None, :]
    tl.store(place, sums, mask=(token[:, None] < tokens) & (expert[None, :] < experts))


@triton.jit(do_not_specialize=["tokens"])
def _tiled_partial_logits_kernel(
    x_ptr, weight_ptr, partials_ptr, tokens, experts, hidden_size, x_stride,
    BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr, WHOLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Experts are the rows of a tile, since the tensor cores of Hopper read rows from registers, where the weights are
    taken apart, and columns from shared memory, where x lies as it was loaded.

    What is lost: an addition in registers rounds to 2^-24 of the sum so far, once a block. Within a block tensor cores
    add 16 products at once, 3 * BLOCK_K / 16 times, and may cut off 2^-23 of the largest value from every one of them.

    WHOLE: the hidden size is a multiple of BLOCK_K * STEPS.
    """
    expert = tl.program_id(0) * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS)
    split = tl.program_id(1)
    token = tl.program_id(2) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    k = split * STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
    # Beyond the last row the last one is read again, which takes no mask; its sums are not stored.
    x_places = x_ptr + tl.minimum(token, tokens - 1)[:, None].to(tl.int64) * x_stride + k[None, :]
    weight_places = weight_ptr + tl.minimum(expert, experts - 1)[:, None] * hidden_size + k[None, :]
    sums = tl.zeros((BLOCK_EXPERTS, BLOCK_TOKENS), tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for step in tl.range(STEPS, num_stages=STAGES):
        if WHOLE:
            weight = tl.load(weight_places + step * BLOCK_K)
            x = tl.load(x_places + step * BLOCK_K)
        else:
            inside = (k + step * BLOCK_K < hidden_size)[None, :]
            weight = tl.load(weight_places + step * BLOCK_K, mask=inside, other=0.0)
            x = tl.load(x_places + step * BLOCK_K, mask=inside, other=0.0)
        first, second, third = _parts(weight)
        # The smallest first, as above.
        block = tl.dot(third.to(tl.bfloat16), tl.trans(x))
        block = tl.dot(second.to(tl.bfloat16), tl.trans(x), block)
        sums += tl.dot(first.to(tl.bfloat16), tl.trans(x), block)
    place = partials_ptr + (split * tokens + token[:, None]) * experts + expert[None, :]
    tl.store(place, tl.trans(sums), mask=(token[:, None] < tokens) & (expert[None, :] < experts))


@triton.jit(do_not_specialize=["tokens"])
def _add_partials_kernel(
    partials_ptr, logits_ptr, tokens, experts, SPLITS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0)
    expert = tl.arange(0, BLOCK_EXPERTS)
    inside = expert < experts
    total = tl.load(partials_ptr + token * experts + expert, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partials_ptr + (split * tokens + token) * experts + expert, mask=inside, other=0.0)
    tl.store(logits_ptr + token * experts + expert, total, mask=inside)


@triton.jit
def _ordered(bits):
    """The bits of a float32 as an int32 that compares as it does, and back. A GPU finds the largest of a warp's 32
    integers in one instruction."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["tokens"])
def _choose_experts_kernel(
    partials_ptr, bias_ptr, logits_ptr, weights_ptr, ids_ptr, tokens, experts, SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, CHUNKS: tl.constexpr, TOP_K: tl.constexpr, BLOCK_TOP_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token a CTA. The parts are divided over the warps, and their sums lie in each of them, so that each finds
    the experts by itself, without a barrier."""
    LOWEST: tl.constexpr = -0x80000000  # below every choice
    token = tl.program_id(0)
    split = tl.arange(0, BLOCK_SPLITS)[:, None]
    biases = ()
    for chunk in tl.static_range(CHUNKS):
        expert = chunk * CHUNK + tl.arange(0, CHUNK)
        bias = tl.zeros((CHUNK,), tl.float32)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + expert, mask=expert < experts, other=0.0)
        biases = biases + (bias,)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    parts = ()
    for chunk in tl.static_range(CHUNKS):
        expert = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
        place = partials_ptr + (split * tokens + token) * experts + expert
        parts = parts + (tl.load(place, mask=(split < SPLITS) & (expert < experts), other=0.0),)
    logits, scores, choices = (), (), ()
    for chunk in tl.static_range(CHUNKS):
        expert = chunk * CHUNK + tl.arange(0, CHUNK)
        logits = logits + (tl.sum(parts[chunk], axis=0),)
        scores = scores + (tl.sigmoid(logits[chunk]),)
        choice = _ordered((scores[chunk] + biases[chunk]).to(tl.int32, bitcast=True))
        choices = choices + (tl.where(expert < experts, choice, LOWEST),)

    slot = tl.arange(0, BLOCK_TOP_K)
    ids = tl.zeros((BLOCK_TOP_K,), tl.int32)
    for rank in tl.static_range(TOP_K):
        largest = choices[0]
        for chunk in tl.static_range(1, CHUNKS):
            largest = tl.maximum(largest, choices[chunk])
        best = tl.max(largest, axis=0)
        first = tl.where(choices[0] == best, tl.arange(0, CHUNK), CHUNKS * CHUNK)
        for chunk in tl.static_range(1, CHUNKS):
            expert = chunk * CHUNK + tl.arange(0, CHUNK)
            first = tl.minimum(first, tl.where(choices[chunk] == best, expert, CHUNKS * CHUNK))
        chosen = tl.min(first, axis=0)  # of equals the first, as the engine's kernel and torch's stable sort take
        rest = ()
        for chunk in tl.static_range(CHUNKS):
            expert = chunk * CHUNK + tl.arange(0, CHUNK)
            rest = rest + (tl.where(expert == chosen, LOWEST, choices[chunk]),)
        choices = rest
        ids = tl.where(slot == rank, chosen, ids)
    # Not read back as choice - bias, in which a score has been rounded beside the bias, or is lost.
    weights = tl.zeros((BLOCK_TOP_K,), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        score = tl.gather(scores[chunk], ids % CHUNK, 0)
        weights = tl.where((slot < TOP_K) & (ids // CHUNK == chunk), score, weights)
    tl.store(weights_ptr + token * TOP_K + slot, weights * (1.0 / tl.sum(weights, axis=0)), mask=slot < TOP_K)
    tl.store(ids_ptr + token * TOP_K + slot, ids, mask=slot < TOP_K)
    if SPLITS > 1:  # last, since it takes a turn through shared memory that nobody waits for
        for chunk in tl.static_range(CHUNKS):
            expert = chunk * CHUNK + tl.arange(0, CHUNK)
            tl.store(logits_ptr + token * experts + expert, logits[chunk], mask=expert < experts)
