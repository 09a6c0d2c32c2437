"""The router of MiniMax-M2: float32 logits from bfloat16 activations, and from them the experts of a token.

    logits = x.float() @ weight.T                       # [tokens, experts], float32 products and sums
    scores = sigmoid(logits)
    ids = the top k of scores + bias
    weights = scores[ids] / scores[ids].sum()

For few tokens the engine casts x, runs an SGEMM with a split-K pass, and chooses in a kernel of its own. To read 3 MB
of weights is all that must be done, so here a first kernel reads x and weights once and leaves sums over parts of the
hidden size, and a second adds these in a fixed order and chooses. No atomics: the same inputs give the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Plan(NamedTuple):
    """How the first kernel divides its work.

    ``method`` is how a tile is multiplied, in float32 by each of them:
        fma     ``tl.dot`` on the floating-point units
        reduce  products and a sum over lanes
        parts   the weight as a sum of three bfloat16 values, which is exact, each times bfloat16 activations on tensor
                cores with float32 accumulators
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


def route(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The whole router in plain torch.

    Args:
        x: [tokens, hidden_size], any float dtype.
        weight: [experts, hidden_size] float32.
        bias: [experts] float32, added to the scores for the choice only; or None.
        top_k: experts of a token.

    Returns:
        logits [tokens, experts] float32, weights [tokens, top_k] float32, ids [tokens, top_k] int32, best first.
    """
    logits = torch.nn.functional.linear(x.float(), weight)
    scores = logits.sigmoid()
    ids = (scores if bias is None else scores + bias).topk(top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    return logits, weights / weights.sum(dim=-1, keepdim=True), ids.to(torch.int32)


def partial_logits(x: torch.Tensor, weight: torch.Tensor, plan: Plan) -> torch.Tensor:
    """[splits, tokens, experts] float32: each part's sum."""
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
    _finish_kernel[(tokens,)](
        partials, None, logits, None, None, tokens, experts, splits, 1, 1, triton.next_power_of_2(experts), False,
        num_warps=4,
    )  # fmt: skip
    return logits


def choose_experts(
    partials: torch.Tensor, bias: torch.Tensor | None, top_k: int, warps: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`add_partials`, and what :func:`route` does after the logits, in one launch."""
    splits, tokens, experts = partials.shape
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=partials.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=partials.device)
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=partials.device)
    _finish_kernel[(tokens,)](
        partials, bias, logits, weights, ids, tokens, experts, splits, top_k, triton.next_power_of_2(top_k),
        triton.next_power_of_2(experts), True, num_warps=warps,
    )  # fmt: skip
    return logits, weights, ids


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
            sums = tl.dot(x, tl.trans(third), sums)
            sums = tl.dot(x, tl.trans(second), sums)
            sums = tl.dot(x, tl.trans(first), sums)
    place = partials_ptr + (split * tokens + token[:, None]) * experts + expert[None, :]
    tl.store(place, sums, mask=(token[:, None] < tokens) & (expert[None, :] < experts))


@triton.jit
def _sum_of_parts(partials_ptr, token, tokens, expert, experts, mask, SPLITS: tl.constexpr):
    total = tl.load(partials_ptr + token * experts + expert, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partials_ptr + (split * tokens + token) * experts + expert, mask=mask, other=0.0)
    return total


@triton.jit
def _finish_kernel(
    partials_ptr, bias_ptr, logits_ptr, weights_ptr, ids_ptr, tokens, experts,
    SPLITS: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, CHOOSE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    expert = tl.arange(0, BLOCK_EXPERTS)
    inside = expert < experts
    logits = _sum_of_parts(partials_ptr, token, tokens, expert, experts, inside, SPLITS)
    tl.store(logits_ptr + token * experts + expert, logits, mask=inside)
    if CHOOSE:
        choice = tl.sigmoid(logits)
        if bias_ptr is not None:
            choice += tl.load(bias_ptr + expert, mask=inside, other=0.0)
        choice = tl.where(inside, choice, -float("inf"))
        slot = tl.arange(0, SLOTS)
        ids = tl.zeros((SLOTS,), tl.int32)
        for rank in tl.static_range(TOP_K):
            best = tl.argmax(choice, axis=0)  # of equals the first, as the engine's kernel takes
            ids = tl.where(slot == rank, best, ids)
            choice = tl.where(expert == best, -float("inf"), choice)
        taken = slot < TOP_K
        # Added up again in the same order: the chosen logits lie in other lanes.
        scores = tl.sigmoid(_sum_of_parts(partials_ptr, token, tokens, ids, experts, taken, SPLITS))
        scores = tl.where(taken, scores, 0.0)
        tl.store(weights_ptr + token * TOP_K + slot, scores / tl.sum(scores, axis=0), mask=taken)
        tl.store(ids_ptr + token * TOP_K + slot, ids, mask=taken)
