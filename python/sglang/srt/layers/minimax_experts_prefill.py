"""The experts of MiniMax-M2 for many tokens: the engine's two expert GEMMs, on activations that are quantised here.

The engine reads and writes bfloat16 between them: SiLU(gate) * up in one launch, its quantisation in the next. Here
one launch does both (:mod:`minimax_fp8_quantise`), and a faster one quantises the tokens. GEMMs, their tables, the
order of routes and the sum over a token's experts are the engine's, so what comes out differs where a SiLU lies beside
a limit between two bfloat16 values, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from sglang.srt.layers.minimax_fp8_quantise import GROUP, Quantised, quantise, quantise_activated
from sglang.srt.layers.minimax_log import log_once
from sglang.srt.layers.moe.fused_moe_triton import fused_moe
from sglang.srt.layers.moe.topk import TopKOutput, TopKOutputChecker
from sglang.srt.server_args import get_global_server_args
from sglang.srt.utils.custom_op import register_custom_op

MOST = 64 * 1024  # tokens of one pass: so many the engine takes at once

Experts = Callable[[torch.nn.Module, torch.Tensor, TopKOutput], torch.Tensor]


def choose_experts_of_many(experts: torch.nn.Module) -> Experts | None:
    """What computes a layer's experts for more tokens than there are plans for, or None: the engine.

    Args:
        experts: a layer against whose plans for few tokens there is no reason.
    """
    if (reason := reason_against(experts)) is not None:
        log_once(f"Activations of many tokens are quantised for the experts by the engine's kernels, since {reason}.")
        return None
    log_once("Activations of many tokens are quantised for the experts in two launches of ours.")
    return experts_of_many_tokens


def reason_against(experts: torch.nn.Module) -> str | None:
    """The first condition that does not hold, beyond those of the kernels for few tokens, as a clause, or None."""
    config = experts.moe_runner_config
    if config.num_experts is None or config.num_experts != config.num_local_experts:
        return "routes to experts of other ranks have no rows that could be quantised"
    if get_global_server_args().enable_fused_moe_sum_all_reduce:
        return "--enable-fused-moe-sum-all-reduce sums in the down projection"
    return None


def experts_of_many_tokens(
    experts: torch.nn.Module, hidden_states: torch.Tensor, topk_output: TopKOutput
) -> torch.Tensor:
    """The engine's GEMMs on activations quantised here."""
    assert TopKOutputChecker.format_is_standard(topk_output), f"the chosen experts as numbers, not {type(topk_output)}"
    ids = topk_output.topk_ids.to(torch.int32)  # int64 where --init-expert-location names the experts' places
    return minimax_experts_of_many(
        hidden_states, topk_output.topk_weights, ids, experts.w13_weight, experts.w13_weight_scale_inv,
        experts.w2_weight, experts.w2_weight_scale_inv,
    )  # fmt: skip


# An op of its own: piecewise graphs, which hold a prefill, trace the forward pass with a symbol for the tokens.
@register_custom_op(out_shape="hidden_states")
def minimax_experts_of_many(
    hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, w13: torch.Tensor,
    w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The experts of any number of tokens, all of them on this rank.

    Args:
        hidden_states: [tokens, hidden_size] bfloat16, rows at any stride that is a multiple of 8.
        topk_weights: [tokens, top_k] float32.
        topk_ids: [tokens, top_k] int32.
        w13: [experts, 2 * width, hidden_size] float8_e4m3fn: the rows of gate, then those of up.
        w13_scale: [experts, 2 * width / 128, hidden_size / 128] float32.
        w2: [experts, hidden_size, width] float8_e4m3fn.
        w2_scale: [experts, hidden_size / 128, width / 128] float32.

    Returns:
        [tokens, hidden_size] bfloat16.
    """
    if hidden_states.shape[0] == 0:
        return torch.empty_like(hidden_states)
    parts = zip(hidden_states.split(MOST), topk_weights.split(MOST), topk_ids.split(MOST), strict=True)
    outputs = [_one_pass(*part, w13, w13_scale, w2, w2_scale) for part in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _one_pass(x, weights, ids, w13, w13_scale, w2, w2_scale) -> torch.Tensor:
    (tokens, top_k), (experts, outputs, hidden_size) = ids.shape, w13.shape
    config, (down_config, _) = fused_moe.try_get_optimal_moe_config(
        w13.shape, w2.shape, top_k, "fp8_w8a8", tokens, block_shape=[GROUP, GROUP], return_down_config=True
    )
    down_config = down_config or config
    tma = down_config.get("USE_TMA", False) and fused_moe.support_tensor_descriptor()
    down_config = {name: value for name, value in down_config.items() if name != "USE_TMA"}
    # With TMA the routes lie in the order of their experts, each expert's filled up to whole blocks.
    filling = min(tokens * top_k, experts + 1) * (config["BLOCK_SIZE_M"] - 1) if tma else 0
    aligned = fused_moe.moe_align_block_size(ids, config["BLOCK_SIZE_M"], experts)

    gate_up = torch.empty(tokens * top_k + filling, outputs, dtype=x.dtype, device=x.device)
    _multiply(quantise(x), w13, w13_scale, gate_up, weights, ids, aligned, False, top_k, config, c_sorted=tma)
    activated = quantise_activated(gate_up)
    del gate_up  # its memory is the first of the next tensor's
    parts = torch.empty(tokens, top_k, hidden_size, dtype=x.dtype, device=x.device)
    _multiply(activated, w2, w2_scale, parts, weights, ids, aligned, True, 1, down_config, a_use_tma=tma, b_use_tma=tma)
    out = torch.empty(tokens, hidden_size, dtype=x.dtype, device=x.device)
    fused_moe.moe_sum_reduce(parts, out, 1.0)
    return out


def _multiply(
    x: Quantised, weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, topk_weights: torch.Tensor,
    topk_ids: torch.Tensor, aligned: tuple, weighted: bool, routes_of_a_row: int, config: dict[str, Any],
    **layout: bool,
) -> None:  # fmt: skip
    """The engine's expert GEMM; ``sglang_minimax.quantised_inputs`` lets it take ``x`` as it is."""
    fused_moe.invoke_fused_moe_kernel(
        x, weight, None, out, None, scale, None, topk_weights, topk_ids, *aligned, weighted, routes_of_a_row, config,
        compute_type=tl.bfloat16, use_fp8_w8a8=True, use_int8_w8a8=False, use_int8_w8a16=False, use_int4_w4a16=False,
        per_channel_quant=False, block_shape=[GROUP, GROUP], filter_expert=False, router_topk=topk_ids.shape[1],
        **layout,
    )  # fmt: skip
