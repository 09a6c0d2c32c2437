"""Which kernels compute a layer's experts, chosen when it is built.

Those of few tokens are in :mod:`minimax_experts`, those of many in :mod:`minimax_experts_prefill`; the rest is the
engine's. Here the engine's layer of experts is turned into the tensors that these take.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from sglang.srt.compilation.piecewise_context_manager import is_in_piecewise_cuda_graph
from sglang.srt.layers.minimax_experts import BLOCK, minimax_experts, planned, plans_for, run_plan
from sglang.srt.layers.minimax_experts_prefill import Experts, choose_experts_of_many
from sglang.srt.layers.minimax_log import log_once
from sglang.srt.layers.minimax_parts import Parts
from sglang.srt.layers.minimax_watchers import reason_of_watchers
from sglang.srt.layers.moe import get_moe_a2a_backend, should_use_flashinfer_cutlass_moe_fp4_allgather
from sglang.srt.layers.moe.topk import TopKOutput, TopKOutputChecker
from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod
from sglang.srt.server_args import get_global_server_args
from sglang.srt.utils import is_cuda


def max_tokens(experts: torch.nn.Module) -> int:
    """Up to how many tokens there is a plan for a layer's experts."""
    return max(plans_for(experts.intermediate_size_per_partition))


def choose_expert_kernels(experts: torch.nn.Module) -> Callable[..., torch.Tensor | Parts]:
    """What computes a layer's experts, a function of (experts, hidden_states, topk_output): [tokens, hidden_size].

    With ``in_parts``, the fourth argument, it may leave the sum over a token's experts to the caller. Called once, when
    the layer is built: to these weights the engine does nothing on Hopper after they are loaded.
    """
    if (reason := reason_against_plans(experts)) is not None:
        log_once(f"The experts' output comes from the engine's kernels, since {reason}.")
        return engine_experts
    limit = max_tokens(experts)
    log_once(f"The experts' output comes from two or four kernels up to {limit} tokens.")
    return functools.partial(few_or_many_tokens, limit, choose_experts_of_many(experts) or engine_experts)


def engine_experts(
    experts: torch.nn.Module, hidden_states: torch.Tensor, topk_output: TopKOutput, in_parts: bool = False
) -> torch.Tensor:
    """The engine's kernels, which always make the sum."""
    return experts(hidden_states, topk_output)


def few_or_many_tokens(
    limit: int,
    many: Experts,
    experts: torch.nn.Module,
    hidden_states: torch.Tensor,
    topk_output: TopKOutput,
    in_parts: bool = False,
) -> torch.Tensor | Parts:
    """The kernels of few tokens up to ``limit``, for which there are plans, and ``many`` above."""
    # Piecewise graphs are traced for any number of tokens. --enable-torch-compile traces this too, but not plan_for,
    # which is behind the operator.
    if is_in_piecewise_cuda_graph() or not 0 < hidden_states.shape[0] <= limit:
        return many(experts, hidden_states, topk_output)
    assert TopKOutputChecker.format_is_standard(topk_output), f"the chosen experts as numbers, not {type(topk_output)}"
    ids = topk_output.topk_ids.to(torch.int32)  # int64 where EPLB, or --init-expert-location, names the experts' places
    given = (
        hidden_states, topk_output.topk_weights, ids, experts.w13_weight, experts.w13_weight_scale_inv,
        experts.w2_weight, experts.w2_weight_scale_inv, experts.moe_ep_rank * experts.num_local_experts,
    )  # fmt: skip
    if in_parts:
        return run_plan(planned(hidden_states.shape[0], experts.w2_weight.shape[2]), *given, in_parts=True)
    return minimax_experts(*given)


def reason_against_plans(experts: torch.nn.Module) -> str | None:
    """The first condition of the kernels of few tokens that does not hold, as a clause, or None."""
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
    return reason_of_watchers(server_args)
