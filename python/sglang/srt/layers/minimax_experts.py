"""The experts of MiniMax-M2 for few tokens: FP8 weights with a float32 scale for each block of 128 x 128.

For token t, its experts e = topk_ids[t] and their weights p = topk_weights[t]:

    gate, up = x[t] @ w13[e].T                          # 2 x [width]
    out[t]   = sum over e of p[e] * (silu(gate) * up) @ w2[e].T

The engine takes eight launches: two sort routes, two quantise, two multiply, one is the SiLU, one the sum. Here are
four, or for one or two tokens two. A *route* is a token's choice of an expert.

    list    the work: for each expert that was chosen its routes; and x quantised to FP8
    gate up silu(gate) * up of each route
    down    its product with w2, weighted, in float32
    sum     over a token's experts

For the fewest tokens, whose routes seldom share an expert, nothing is listed, and a CTA of the down projection takes
all of its token's experts and so makes the sum. Else as many CTAs as fit on the GPU go through the list: none is
started only to find that it has no work.

Sums, SiLU and routing weights are float32; FP8 sums are those of the engine's kernels, float32 over groups of 128.
What is rounded, to bfloat16, is silu(gate) * up and the output. No float atomics: the same inputs give the same bits.
"""

# ruff: noqa: RUF005  a Triton function cannot unpack a tuple into another

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from sglang.srt.layers.minimax_fp8_linear import _prefetch, _quantise
from sglang.srt.layers.minimax_nvlink import has_programmatic_launch, num_multiprocessors
from sglang.srt.layers.minimax_parts import Parts
from sglang.srt.utils.custom_op import register_custom_op
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BLOCK = 128  # of the scales
MAX_HELD = 96 * 4  # bytes of weights that a thread may hold before its inputs are there


class Projection(NamedTuple):
    """How the CTAs of gate and up, or of down, divide their work.

    Attributes:
        activations: what they are multiplied as, and so by whom:
            float32   on the floating-point units, by a CTA for each route (gate and up) or token (down): weights that
                      tokens share are read again, from the L2 cache at best
            float8    on tensor cores, quantised in groups of 128 with scale = absmax / 448, as the engine does; an
                      instruction takes 64 rows of weights, so no fewer are a CTA's
        columns: of silu(gate) * up, or of the output, that are a CTA's; a power of two up to 128.
        warps: of a CTA.
        stages: blocks of 128 inputs that are in flight; with float32 all are.
        ctas: of an SM, which go through the list.
    """

    activations: str
    columns: int
    warps: int
    stages: int = 1
    ctas: int = 1


class Plan(NamedTuple):
    """Both projections, and how many routes of one expert a CTA takes at once: 16 or more, a power of two."""

    routes: int
    gate_up: Projection
    down: Projection

    @property
    def lists(self) -> bool:
        """Whether one of the projections goes through the list of work."""
        return "float8" in (self.gate_up.activations, self.down.activations)


_FEWEST = Plan(16, Projection("float32", 8, 4), Projection("float32", 16, 4))
_FEW = Plan(16, Projection("float8", 32, 4, 7, 3), Projection("float8", 128, 4, 3, 3))

# Local width of an expert: up to so many tokens. docs/kernels.md has what was measured on one H200, and at which
# counts the engine's kernels take less.
PLANS: dict[int, dict[int, Plan]] = {
    384: {2: _FEWEST, 64: _FEW},
    768: {16: _FEW, 64: _FEW._replace(gate_up=Projection("float8", 64, 4, 4, 3))},
}


@functools.cache
def plans_for(width: int) -> dict[int, Plan]:
    """The plans of a width by the most tokens that they are for; those of the width nearest to it."""
    return PLANS[min(PLANS, key=lambda planned: max(planned / width, width / planned))]


def plan_for(tokens: int, width: int) -> Plan | None:
    """The plan for ``tokens`` of 1 or more; None: no more are planned for, and the engine's experts run."""
    return next((plan for limit, plan in plans_for(width).items() if tokens <= limit), None)


@register_custom_op(out_shape="hidden_states")
def minimax_experts(
    hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, w13: torch.Tensor,
    w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor, first_expert: int,
) -> torch.Tensor:  # fmt: skip
    """The experts of as many tokens as :func:`plan_for` has a plan for, or none.

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
    tokens, width = hidden_states.shape[0], w2.shape[2]
    if tokens == 0:
        return torch.empty_like(hidden_states)
    plan = planned(tokens, width)
    return run_plan(plan, hidden_states, topk_weights, topk_ids, w13, w13_scale, w2, w2_scale, first_expert)


def planned(tokens: int, width: int) -> Plan:
    """:func:`plan_for`, or a ValueError where no plan is for so many tokens."""
    if (plan := plan_for(tokens, width)) is None:
        raise ValueError(f"{tokens} tokens: plans go up to {max(plans_for(width))}; call the engine's experts for more")
    return plan


def run_plan(
    plan: Plan, hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, w13: torch.Tensor,
    w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor, first_expert: int, in_parts: bool = False,
) -> torch.Tensor | Parts:  # fmt: skip
    """:func:`minimax_experts` by one plan, for any number of tokens but none.

    ``in_parts``: the sum over a token's experts is left to the caller, where it would take a launch of its own.
    """
    routing = Routing(topk_ids, topk_weights, first_expert, w13.shape[0])
    work = list_work(hidden_states, routing, plan) if plan.lists else None
    activated = gate_up(hidden_states, routing, work, w13, w13_scale, plan)
    return down(activated, routing, work, w2, w2_scale, plan, in_parts)


class Routing(NamedTuple):
    """Who goes where: ids and weights [tokens, top_k], and which of all experts are here."""

    ids: torch.Tensor
    weights: torch.Tensor
    first_expert: int
    experts: int


class Work(NamedTuple):
    """What one launch prepares for the tensor cores.

    Attributes:
        items: [1 + items, 2 + routes] int32. Row 0 begins with the number of items; each row after it is an item: an
            expert of this rank, the number of its routes, and these. The rest holds anything.
        x, x_scale: the activations in FP8, [tokens, hidden_size] e4m3 and [tokens, hidden_size / 128] float32.
    """

    items: torch.Tensor
    x: torch.Tensor
    x_scale: torch.Tensor


def list_work(x: torch.Tensor, routing: Routing, plan: Plan) -> Work:
    """The list of work for ``plan``, whose items are in the order of their experts."""
    (tokens, hidden_size), routes = x.shape, routing.ids.numel()
    most = min(routes, routing.experts + routes // plan.routes)  # an expert has at most one item that is not full
    items = torch.empty(1 + most, 2 + plan.routes, dtype=torch.int32, device=x.device)
    quantised = torch.empty(tokens, hidden_size, dtype=torch.float8_e4m3fn, device=x.device)
    x_scale = torch.empty(tokens, hidden_size // BLOCK, dtype=torch.float32, device=x.device)
    pdl = has_programmatic_launch(x.device)
    _list_kernel[(tokens,)](
        x, routing.ids, items, quantised, x_scale, tokens, routing.first_expert, routing.experts, x.stride(0),
        routing.ids.shape[1], hidden_size, triton.next_power_of_2(max(tokens, 16)),
        triton.next_power_of_2(routing.experts), plan.routes, pdl, num_warps=4, **_options(pdl),
    )  # fmt: skip
    return Work(items, quantised, x_scale)


def gate_up(
    x: torch.Tensor, routing: Routing, work: Work | None, w13: torch.Tensor, w13_scale: torch.Tensor, plan: Plan
) -> torch.Tensor:
    """[tokens * top_k, width] bfloat16: silu(gate) * up of each route; other ranks' experts' are not written."""
    _check(x, routing.ids, w13, w13_scale)
    hidden_size, top_k, width, how = x.shape[1], routing.ids.shape[1], w13.shape[1] // 2, plan.gate_up
    activated = torch.empty(routing.ids.numel(), width, dtype=x.dtype, device=x.device)
    pdl, tiles = has_programmatic_launch(x.device), width // how.columns
    if how.activations == "float32":
        _gate_up_by_route_kernel[(tiles, routing.ids.numel())](
            x, routing.ids, w13, w13_scale, activated, routing.first_expert, routing.experts, x.stride(0), top_k,
            hidden_size, width, how.columns, pdl, num_warps=how.warps, **_options(pdl),
        )  # fmt: skip
        return activated
    assert work is not None, "tensor cores want a list of work: list_work"
    _gate_up_kernel[(_ctas(work, tiles, how),)](
        work.x, work.x_scale, work.items, w13, w13_scale, activated, work.x.stride(0), top_k, hidden_size, width,
        plan.routes, how.columns, how.stages, pdl, num_warps=how.warps, **_options(pdl),
    )  # fmt: skip
    return activated


def down(
    activated: torch.Tensor, routing: Routing, work: Work | None, w2: torch.Tensor, w2_scale: torch.Tensor, plan: Plan,
    in_parts: bool = False,
) -> torch.Tensor | Parts:  # fmt: skip
    """[tokens, hidden_size] bfloat16: the down projections of a token's experts, weighted and summed."""
    ids, weights, first_expert, experts = routing
    _check(activated, ids, w2, w2_scale)
    assert weights.is_contiguous() and weights.dtype == torch.float32, "float32 weights, [tokens, top_k]"
    (tokens, top_k), (hidden_size, width), how = ids.shape, w2.shape[1:], plan.down
    pdl, tiles = has_programmatic_launch(w2.device), hidden_size // how.columns
    if how.activations == "float32":
        out = torch.empty(tokens, hidden_size, dtype=activated.dtype, device=activated.device)
        fits = top_k * how.columns * width <= MAX_HELD * 32 * how.warps
        _down_by_token_kernel[(tiles, tokens)](
            activated, weights, ids, w2, w2_scale, out, first_expert, experts, top_k, hidden_size, width, how.columns,
            fits, pdl, num_warps=how.warps, **_options(pdl),
        )  # fmt: skip
        return out
    assert work is not None, "tensor cores want a list of work: list_work"
    parts = torch.empty(tokens * top_k, hidden_size, dtype=torch.float32, device=activated.device)
    _down_kernel[(_ctas(work, tiles, how),)](
        activated, weights, work.items, w2, w2_scale, parts, hidden_size, width, plan.routes, how.columns, how.stages,
        pdl, num_warps=how.warps, **_options(pdl),
    )  # fmt: skip
    if in_parts:
        return Parts(parts.view(tokens, top_k, hidden_size).transpose(0, 1), ids, first_expert, experts)
    out = torch.empty(tokens, hidden_size, dtype=activated.dtype, device=activated.device)
    columns = 1024 if hidden_size % 1024 == 0 else BLOCK
    _sum_kernel[(hidden_size // columns, tokens)](
        parts, ids, out, first_expert, experts, top_k, hidden_size, columns, pdl, num_warps=4, **_options(pdl)
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
        f"weights {list(weight.shape)}, scales {list(scale.shape)} of {BLOCK} x {BLOCK}, activations of {x.shape[1]}"
    )


def _ctas(work: Work, tiles: int, how: Projection) -> int:
    """CTAs for a list of this length: as many as the GPU holds, or as there is work for."""
    return min((work.items.shape[0] - 1) * tiles, num_multiprocessors(work.items.device) * how.ctas)


def _options(pdl: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if pdl else {}  # other platforms do not know the option


@triton.jit(do_not_specialize=["tokens", "first_expert", "experts"])
def _list_kernel(
    x_ptr, topk_ids_ptr, items_ptr, quantised_ptr, x_scale_ptr, tokens, first_expert, experts, x_stride,
    TOP_K: tl.constexpr, HIDDEN_SIZE: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, ROUTES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A CTA for each token finds the places of its routes in the list, and quantises it."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0)
    blocks = ()
    for block in tl.static_range(triton.cdiv(HIDDEN_SIZE, 1024)):  # all loads at once, ahead of what takes them
        place = block * 1024 + tl.arange(0, 8)[:, None] * 128 + tl.arange(0, 128)[None, :]
        x = tl.load(x_ptr + token.to(tl.int64) * x_stride + place, mask=place < HIDDEN_SIZE, other=0.0)
        blocks = blocks + (x,)
    other = tl.arange(0, TOKENS * TOP_K)
    others = tl.load(topk_ids_ptr + other, mask=other < tokens * TOP_K, other=-1)
    is_local = (others >= first_expert) & (others < first_expert + experts)
    others = tl.where(is_local, others - first_expert, -1)
    route = token * TOP_K + tl.arange(0, TOP_K)
    expert = tl.load(topk_ids_ptr + route) - first_expert
    for block in tl.static_range(triton.cdiv(HIDDEN_SIZE, 1024)):
        group = block * 8 + tl.arange(0, 8)[:, None]
        place = group * 128 + tl.arange(0, 128)[None, :]
        quantised, scale = _quantise(blocks[block])
        tl.store(quantised_ptr + token * HIDDEN_SIZE + place, quantised, mask=place < HIDDEN_SIZE)
        tl.store(x_scale_ptr + token * (HIDDEN_SIZE // 128) + group, scale, mask=group < HIDDEN_SIZE // 128)
    counts = tl.histogram(tl.where(is_local, others, 0), EXPERTS, mask=is_local)
    items = (counts + (ROUTES - 1)) // ROUTES
    firsts = tl.cumsum(items, 0) - items
    is_expert = expert[:, None] == tl.arange(0, EXPERTS)[None, :]
    count = tl.sum(tl.where(is_expert, counts[None, :], 0), axis=1)
    first = tl.sum(tl.where(is_expert, firsts[None, :], 0), axis=1)
    is_earlier = (expert[:, None] == others[None, :]) & (other[None, :] < route[:, None])
    earlier = tl.sum(is_earlier.to(tl.int32), axis=1)
    expert_is_local = (expert >= 0) & (expert < experts)
    row = items_ptr + (1 + first + earlier // ROUTES) * (2 + ROUTES)
    tl.store(row + 2 + earlier % ROUTES, route, mask=expert_is_local)
    leads = expert_is_local & (earlier % ROUTES == 0)
    tl.store(row, expert, mask=leads)
    tl.store(row + 1, tl.minimum(count - earlier, ROUTES), mask=leads)
    if token == 0:
        tl.store(items_ptr, tl.sum(items))


@triton.jit
def _item(items_ptr, item, ROUTES: tl.constexpr):
    """The expert of an item, int64, and its routes: [ROUTES], -1 where there are no more."""
    row = items_ptr + (1 + item) * (2 + ROUTES)
    lane = tl.arange(0, ROUTES)
    route = tl.load(row + 2 + lane)
    return tl.load(row).to(tl.int64), tl.where(lane < tl.load(row + 1), route, -1)


@triton.jit
def _silu_and_up(sums, COLUMNS: tl.constexpr, ROUTES: tl.constexpr):
    """silu(gate) * up [ROUTES, COLUMNS] of sums [ROUTES, 2 * COLUMNS], of gate and up in turn."""
    gate, up = tl.split(tl.reshape(sums, (ROUTES, COLUMNS, 2)))
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _gate_up_kernel(
    x_ptr, x_scale_ptr, items_ptr, weight_ptr, scale_ptr, activated_ptr, x_stride, TOP_K: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr, WIDTH: tl.constexpr, ROUTES: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """CTAs take tiles of silu(gate) * up in turn, those of one item after each other."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()  # from here on the list is there for the next kernel, which reads it before its wait
    TILES: tl.constexpr = WIDTH // COLUMNS
    GROUPS: tl.constexpr = HIDDEN_SIZE // 128
    # Rows of gate and up in turn: so their sums end up beside each other.
    row = tl.arange(0, 2 * COLUMNS)
    is_up = row % 2
    k = tl.arange(0, 128)
    for tile in range(tl.program_id(0), tl.load(items_ptr) * TILES, tl.num_programs(0)):
        expert, route = _item(items_ptr, tile // TILES, ROUTES)
        is_route = route >= 0
        column = tile % TILES * COLUMNS
        rows = expert * (2 * WIDTH) + column + row // 2 + is_up * WIDTH
        weight_rows = weight_ptr + rows[:, None] * HIDDEN_SIZE + k[None, :]
        token = (tl.maximum(route, 0) // TOP_K).to(tl.int64)
        x_rows = x_ptr + token[:, None] * x_stride + k[None, :]
        gate_scales = scale_ptr + (expert * (2 * WIDTH // 128) + column // 128) * GROUPS
        up_scales = gate_scales + WIDTH // 128 * GROUPS
        sums = tl.zeros((2 * COLUMNS, ROUTES), tl.float32)
        for block in tl.range(GROUPS, num_stages=STAGES):
            x = tl.load(x_rows + block * 128, mask=is_route[:, None], other=0.0)
            weight = tl.load(weight_rows + block * 128)
            scale = tl.where(is_up == 1, tl.load(up_scales + block), tl.load(gate_scales + block))
            x_scale = tl.load(x_scale_ptr + token * GROUPS + block)
            sums += tl.dot(weight, tl.trans(x)) * (scale[:, None] * x_scale[None, :])
        activated = _silu_and_up(tl.trans(sums), COLUMNS, ROUTES)
        place = activated_ptr + route[:, None] * WIDTH + column + tl.arange(0, COLUMNS)[None, :]
        tl.store(place, activated.to(activated_ptr.dtype.element_ty), mask=is_route[:, None])


@triton.jit
def _add_block(sums, weight, x_ptr, scale, is_local, k, COLUMNS: tl.constexpr):
    """``sums`` [columns, 8] and the products of one block of 128 inputs, each summed over 16 of these."""
    # A thread has 16 inputs beside each other, and reads what it multiplies: nothing passes through shared memory.
    x = tl.load(x_ptr + tl.zeros((COLUMNS, 1), tl.int32) + k[None, :], mask=is_local, other=0.0)
    product = weight.to(tl.float32) * x.to(tl.float32)
    return sums + tl.sum(tl.reshape(product, (COLUMNS, 8, 16)), axis=2) * scale


@triton.jit(do_not_specialize=["first_expert", "experts"])
def _gate_up_by_route_kernel(
    x_ptr, topk_ids_ptr, weight_ptr, scale_ptr, activated_ptr, first_expert, experts, x_stride, TOP_K: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()  # from here on the choice of experts is there for the next kernel too
    GROUPS: tl.constexpr = HIDDEN_SIZE // 128
    route = tl.program_id(1)
    expert = tl.load(topk_ids_ptr + route).to(tl.int64) - first_expert
    if (expert < 0) | (expert >= experts):
        return
    column = tl.program_id(0) * COLUMNS
    row = tl.arange(0, 2 * COLUMNS)
    is_up = row % 2
    k = tl.arange(0, 128)
    rows = expert * (2 * WIDTH) + column + row // 2 + is_up * WIDTH
    weight_rows = weight_ptr + rows[:, None] * HIDDEN_SIZE + k[None, :]
    scale_row = scale_ptr + (expert * (2 * WIDTH // 128) + column // 128 + is_up * (WIDTH // 128)) * GROUPS
    weights, scales = (), ()
    for block in tl.static_range(GROUPS):
        weights = weights + (tl.load(weight_rows + block * 128),)
    for block in tl.static_range(GROUPS):
        scales = scales + (tl.load(scale_row + block),)
    # All are in flight at once, since no load moves down past a barrier: the assembler would put each before its use.
    tl.debug_barrier()
    sums = tl.zeros((2 * COLUMNS, 8), tl.float32)
    x_row = x_ptr + (route // TOP_K).to(tl.int64) * x_stride
    for block in tl.static_range(GROUPS):
        sums = _add_block(sums, weights[block], x_row + block * 128, scales[block][:, None], True, k, 2 * COLUMNS)
    activated = _silu_and_up(tl.sum(sums, axis=1)[None, :], COLUMNS, 1)
    place = activated_ptr + route * WIDTH + column + tl.arange(0, COLUMNS)[None, :]
    tl.store(place, activated.to(activated_ptr.dtype.element_ty))


@triton.jit
def _down_kernel(
    activated_ptr, topk_weights_ptr, items_ptr, weight_ptr, scale_ptr, parts_ptr, HIDDEN_SIZE: tl.constexpr,
    WIDTH: tl.constexpr, ROUTES: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """CTAs take tiles of the routes' outputs in turn, those of one item after each other."""
    TILES: tl.constexpr = HIDDEN_SIZE // COLUMNS
    GROUPS: tl.constexpr = WIDTH // 128
    row = tl.arange(0, COLUMNS)
    k = tl.arange(0, 128)
    tiles = tl.load(items_ptr) * TILES
    if PDL:
        gdc_launch_dependents()
        if tl.program_id(0) < tiles:  # the first tile's weights into the L2 cache, while gate and up still run
            expert, _ = _item(items_ptr, tl.program_id(0) // TILES, ROUTES)
            rows = expert * HIDDEN_SIZE + tl.program_id(0) % TILES * COLUMNS + row
            for block in tl.static_range(GROUPS):
                _prefetch(weight_ptr + rows * WIDTH + block * 128)
        gdc_wait()
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        expert, route = _item(items_ptr, tile // TILES, ROUTES)
        is_route = route >= 0
        column = tile % TILES * COLUMNS
        weight_rows = weight_ptr + (expert * HIDDEN_SIZE + column + row)[:, None] * WIDTH + k[None, :]
        x_rows = activated_ptr + tl.maximum(route, 0)[:, None] * WIDTH + k[None, :]
        scales = scale_ptr + (expert * (HIDDEN_SIZE // 128) + column // 128) * GROUPS
        routing_weight = tl.load(topk_weights_ptr + tl.maximum(route, 0))
        sums = tl.zeros((COLUMNS, ROUTES), tl.float32)
        for block in tl.range(GROUPS, num_stages=STAGES):
            x = tl.load(x_rows + block * 128, mask=is_route[:, None], other=0.0)
            weight = tl.load(weight_rows + block * 128)
            scale = tl.load(scales + block)
            x, x_scale = _quantise(x)
            sums += tl.dot(weight, tl.trans(x)) * (tl.trans(x_scale) * scale)
        place = parts_ptr + route[:, None] * HIDDEN_SIZE + column + row[None, :]
        tl.store(place, tl.trans(sums) * routing_weight[:, None], mask=is_route[:, None])


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
            routing_weight = tl.load(topk_weights_ptr + token * TOP_K + choice, mask=is_local[choice], other=0.0)
            for block in tl.static_range(WIDTH // 128):
                place = weight_block + expert * (HIDDEN_SIZE * WIDTH) + block * 128
                weights = weights + (tl.load(place, mask=is_local[choice], other=0.0),)
                scale = tl.load(scale_row + expert * (HIDDEN_SIZE // 128 * (WIDTH // 128)) + block)
                scales = scales + (scale * routing_weight,)
    if PDL:
        gdc_wait()
    sums = tl.zeros((COLUMNS, 8), tl.float32)
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
            routing_weight = tl.load(topk_weights_ptr + token * TOP_K + choice, mask=local, other=0.0)
            for block in tl.static_range(WIDTH // 128):
                weight = tl.load(weight_block + expert * (HIDDEN_SIZE * WIDTH) + block * 128, mask=local, other=0.0)
                scale = tl.load(scale_row + expert * (HIDDEN_SIZE // 128 * (WIDTH // 128)) + block) * routing_weight
                sums = _add_block(sums, weight, x_row + block * 128, scale, local, k, COLUMNS)
    tl.store(out_ptr + token * HIDDEN_SIZE + row, tl.sum(sums, axis=1).to(out_ptr.dtype.element_ty))
