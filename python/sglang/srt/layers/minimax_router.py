"""The router's logits of MiniMax-M2 for few tokens: bfloat16 activations, float32 weights, products and sums.

    logits = x.float() @ weight.T                       # [tokens, experts]

For few tokens that is a cast, an SGEMM and a split-K pass, though all that must be done is to read 3 MB of weights.
Here a first kernel reads x and weights once and leaves sums over parts of the hidden size, and a second adds these in a
fixed order. No atomics: the same inputs give the same bits. The choice of experts stays with the engine's ``TopK``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from sglang.srt.server_args import get_global_server_args
from sglang.srt.utils import is_cuda, log_info_on_rank0
from sglang.srt.utils.custom_op import register_custom_op

logger = logging.getLogger(__name__)

RouterLogits = Callable[[torch.Tensor, torch.nn.Module], torch.Tensor]


class Plan(NamedTuple):
    """How the first kernel divides its work.

    ``method`` is how a tile is multiplied:
        fma     ``tl.dot`` on the floating-point units
        reduce  float32 products and a sum over lanes
        parts   on tensor cores. A float32 weight is the sum of three bfloat16 values, exactly: 24 bits are three
                times 8. A product of two bfloat16 values is exact in the accumulators, which are float32. So nothing
                is rounded but the sums, as in any float32 matrix product: this is no TF32.
    """

    method: str
    block_tokens: int
    block_experts: int
    block_k: int
    steps: int
    warps: int

    def splits(self, hidden_size: int) -> int:
        """Into how many parts the hidden size is divided."""
        return triton.cdiv(hidden_size, self.block_k * self.steps)


# For each range one of the fastest whose error, against float64, is no larger than that of the stock float32 product
# at any count measured: benchmark/results/router_h200.json, of one H200, 256 experts and hidden size 3072.
PLANS = {  # up to so many tokens
    1: Plan("reduce", 1, 8, 512, 1, 8),
    2: Plan("reduce", 2, 8, 256, 1, 4),
    16: Plan("parts", 16, 32, 128, 1, 4),
    32: Plan("parts", 32, 64, 128, 1, 8),
    128: Plan("parts", 64, 32, 128, 1, 4),
    256: Plan("parts", 64, 64, 128, 1, 4),
}
MAX_TOKENS = max(PLANS)
"""No more were measured; above it the float32 linear layer runs."""


def plan_for(tokens: int) -> Plan:
    """The plan for ``tokens`` in 1 to ``MAX_TOKENS``."""
    return next(plan for limit, plan in PLANS.items() if tokens <= limit)


def choose_router_logits(gate: torch.nn.Module) -> RouterLogits:
    """What computes a layer's logits, a function of (x [tokens, hidden_size], gate): [tokens, experts] float32.

    Called once, while the layer is built, under the model's default dtype, which is that of its activations.
    """
    reason = reason_against_plans(
        on_cuda=is_cuda(),
        activations=torch.get_default_dtype(),
        weights=gate.weight.dtype,
        deterministic=bool(get_global_server_args().enable_deterministic_inference),
    )
    _log_once(reason)
    return fused_router_logits if reason is None else linear_router_logits


def reason_against_plans(
    *, on_cuda: bool, activations: torch.dtype, weights: torch.dtype, deterministic: bool
) -> str | None:
    """The first condition of the kernels here that does not hold, as a clause, or None."""
    if not on_cuda:
        return "its kernels are for NVIDIA GPUs"
    if activations != torch.bfloat16:
        return f"activations are {activations}, and its plans were measured with bfloat16"
    if weights != torch.float32:
        return f"the router's weights are {weights}, and it takes apart float32"
    if deterministic:
        return "deterministic inference wants sums in an order that no batch size changes"
    return None


@functools.lru_cache
def _log_once(reason: str | None) -> None:
    what = f"two kernels up to {MAX_TOKENS} tokens" if reason is None else f"a float32 linear layer, since {reason}"
    log_info_on_rank0(logger, f"The router's logits come from {what}.")


def linear_router_logits(x: torch.Tensor, gate: torch.nn.Module) -> torch.Tensor:
    """[tokens, experts] float32, through the layer itself: the reference."""
    return gate(x.to(torch.float32))[0]


def fused_router_logits(x: torch.Tensor, gate: torch.nn.Module) -> torch.Tensor:
    """:func:`linear_router_logits` through the plan for this many tokens."""
    return minimax_router_logits(x, gate.weight)


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


def partial_logits(x: torch.Tensor, weight: torch.Tensor, plan: Plan) -> torch.Tensor:
    """[splits, tokens, experts] float32: each part's sum."""
    assert x.stride(1) == 1 and weight.is_contiguous(), "a row of x, and all of the weight, must be contiguous"
    assert x.dtype == torch.bfloat16 or plan.method != "parts", f"parts multiplies bfloat16, and x is {x.dtype}"
    tokens, hidden_size = x.shape
    experts, splits = weight.shape[0], plan.splits(hidden_size)
    partials = torch.empty(splits, tokens, experts, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(experts, plan.block_experts), splits, triton.cdiv(tokens, plan.block_tokens))
    _partial_logits_kernel[grid](
        x, weight, partials, tokens, experts, hidden_size, x.stride(0), plan.method, plan.block_tokens,
        plan.block_experts, plan.block_k, plan.steps, num_warps=plan.warps,
    )  # fmt: skip
    return partials


def add_partials(partials: torch.Tensor) -> torch.Tensor:
    """[tokens, experts] float32: the sum of the parts, in their order."""
    splits, tokens, experts = partials.shape
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=partials.device)
    _add_partials_kernel[(tokens,)](
        partials, logits, tokens, experts, splits, triton.next_power_of_2(experts), num_warps=4
    )
    return logits


@triton.jit
def _partial_logits_kernel(
    x_ptr, weight_ptr, partials_ptr, tokens, experts, hidden_size, x_stride,
    METHOD: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
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
        x = tl.load(x_rows + k[None, :], mask=(token[:, None] < tokens) & inside, other=0.0)
        if METHOD == "fma":
            sums = tl.dot(x.to(tl.float32), tl.trans(weight), sums, input_precision="ieee")
        elif METHOD == "reduce":
            sums += tl.sum(x.to(tl.float32)[:, None, :] * weight[None, :, :], axis=2)
        else:
            first = weight.to(tl.bfloat16)
            rest = weight - first.to(tl.float32)
            second = rest.to(tl.bfloat16)
            third = (rest - second.to(tl.float32)).to(tl.bfloat16)
            # The smallest first: added to what is large already, they would lose their last bits.
            sums = tl.dot(x, tl.trans(third), sums)
            sums = tl.dot(x, tl.trans(second), sums)
            sums = tl.dot(x, tl.trans(first), sums)
    place = partials_ptr + (split * tokens + token[:, None]) * experts + expert[None, :]
    tl.store(place, sums, mask=(token[:, None] < tokens) & (expert[None, :] < experts))


@triton.jit
def _add_partials_kernel(partials_ptr, logits_ptr, tokens, experts, SPLITS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr):
    token = tl.program_id(0)
    expert = tl.arange(0, BLOCK_EXPERTS)
    inside = expert < experts
    total = tl.load(partials_ptr + token * experts + expert, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partials_ptr + (split * tokens + token) * experts + expert, mask=inside, other=0.0)
    tl.store(logits_ptr + token * experts + expert, total, mask=inside)
