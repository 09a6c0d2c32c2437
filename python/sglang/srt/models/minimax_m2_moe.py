"""The experts of a MiniMax-M2 layer: routing, who sums their output over the ranks, and what is refused before any is
allocated. ``minimax_m2.py`` is the model around them.
"""

from __future__ import annotations

from contextlib import nullcontext
from enum import Enum, auto

import torch
from sglang.srt.distributed import (
    get_moe_data_parallel_world_size,
    get_tensor_model_parallel_world_size,
    moe_expert_parallel_all_reduce,
    moe_tensor_model_parallel_all_reduce,
    tensor_model_parallel_all_reduce,
)
from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo
from sglang.srt.layers.communicator import LayerCommunicator
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.minimax_expert_kernels import choose_expert_kernels
from sglang.srt.layers.minimax_parts import Parts
from sglang.srt.layers.minimax_router import choose_route, choose_router_logits
from sglang.srt.layers.minimax_sharding import expert_shape_of, reason_against_runner
from sglang.srt.layers.moe import (
    get_moe_a2a_backend,
    get_moe_runner_backend,
    should_use_flashinfer_cutlass_moe_fp4_allgather,
)
from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.layers.moe.utils import filter_moe_weight_param_global_expert
from sglang.srt.layers.quantization.awq import AWQMarlinConfig, is_layer_skipped_awq
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.lora.layers import FusedMoEWithLoRA
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.server_args import get_global_server_args
from sglang.srt.utils import add_prefix, is_blackwell_supported
from torch import nn
from transformers import PretrainedConfig


class ExpertReduction(Enum):
    """Who sums the ranks' parts of the experts' output. Exactly one of them does."""

    MODEL = auto()  # an all-reduce right after the experts
    NEXT_NORM = auto()  # the all-reduce fused into the next layer's norm
    REDUCE_SCATTER = auto()  # the layer communicator, which also gives each DP rank its tokens back
    DISPATCHER = auto()  # the experts' token dispatcher: an a2a backend, or FP4 all-gather with reduce-scatter

    @classmethod
    def of(cls, communicator: LayerCommunicator, forward_batch: ForwardBatch) -> ExpertReduction:
        if has_dispatcher():
            return cls.DISPATCHER
        if communicator.should_use_reduce_scatter(forward_batch):
            return cls.REDUCE_SCATTER
        if communicator.should_fuse_mlp_allreduce_with_next_layer(forward_batch):
            return cls.NEXT_NORM
        return cls.MODEL


def has_dispatcher() -> bool:
    """Whether tokens travel to their experts, each from one rank. Without, every rank routes all tokens."""
    return not get_moe_a2a_backend().is_none() or should_use_flashinfer_cutlass_moe_fp4_allgather()


def quantisation_of_experts(quant_config: QuantizationConfig | None, prefix: str) -> QuantizationConfig | None:
    """``quant_config``, or None for experts that an AWQ checkpoint left as they were.

    The engine asks its AWQ config that for linear layers only; its other configs know it of experts too.
    """
    if isinstance(quant_config, AWQMarlinConfig) and is_layer_skipped_awq(prefix, quant_config.modules_to_not_convert):
        return None
    return quant_config


class MiniMaxM2MoE(nn.Module):
    """Mixture of experts: sigmoid scores, the top k of score + bias, weights renormalised over the chosen."""

    def __init__(
        self, config: PretrainedConfig, layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        check_routing_stays_here()
        self.layer_id = layer_id
        self.tp_size = get_tensor_model_parallel_world_size()
        self.e_score_correction_bias = None
        if getattr(config, "use_routing_bias", True):
            self.e_score_correction_bias = nn.Parameter(torch.empty(config.num_local_experts, dtype=torch.float32))
        # The router is small and decides everything: float32 weights and activations, as in the reference.
        self.gate = ReplicatedLinear(
            config.hidden_size, config.num_local_experts,
            bias=False, params_dtype=torch.float32, quant_config=None, prefix=add_prefix("gate", prefix),
        )  # fmt: skip
        self.router_logits = choose_router_logits(self.gate)
        self.topk = TopK(
            top_k=config.num_experts_per_tok,
            layer_id=layer_id,
            renormalize=True,
            scoring_func=getattr(config, "scoring_func", "sigmoid"),
            correction_bias=self.e_score_correction_bias,
            routed_scaling_factor=1.0,
        )
        self.route_at_once = choose_route(self.gate, self.topk)
        experts_prefix = add_prefix("experts", prefix)
        quant_config = quantisation_of_experts(quant_config, experts_prefix)
        self.experts = get_moe_impl_class(quant_config)(
            num_experts=config.num_local_experts + get_global_server_args().ep_num_redundant_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            layer_id=layer_id,
            quant_config=quant_config,
            prefix=experts_prefix,
        )
        self.run_experts = choose_expert_kernels(self.experts)

    def forward(
        self,
        hidden_states: torch.Tensor,
        forward_batch: ForwardBatch,
        reduction: ExpertReduction,
        in_parts: bool = False,
    ) -> torch.Tensor | Parts:
        """From and to [tokens, hidden_size]; with ``ExpertReduction.MODEL`` the sum over all ranks, else my part.

        ``in_parts``: the sum over a token's experts may be left to the next norm.
        """
        topk_output = self._route(hidden_states, forward_batch, reduction)
        output = self.run_experts(self.experts, hidden_states, topk_output, in_parts)
        return self._all_reduce(output) if reduction is ExpertReduction.MODEL else output

    def _route(self, hidden_states: torch.Tensor, forward_batch: ForwardBatch, reduction: ExpertReduction):
        if hidden_states.shape[0] == 0:
            return self.topk.empty_topk_output(hidden_states.device)
        if self.route_at_once is not None:
            return self.route_at_once(hidden_states, self.gate, self.topk)
        router_logits = self.router_logits(hidden_states, self.gate)
        return self._choose(hidden_states, router_logits, forward_batch, reduction)

    def _choose(self, hidden_states, router_logits, forward_batch: ForwardBatch, reduction: ExpertReduction):
        """The engine's choice, for a dispatcher in int32: that is what ranks without tokens send, and EPLB's maps of
        places would make it int64 on the others."""
        chosen = self.topk(hidden_states, router_logits, **self._routing_info(forward_batch, reduction))
        return chosen._replace(topk_ids=chosen.topk_ids.int()) if has_dispatcher() else chosen

    def _routing_info(self, forward_batch: ForwardBatch, reduction: ExpertReduction) -> dict:
        """Where EPLB has put the experts; and how many of my own tokens are padding, which a dispatcher must not send.

        Without a dispatcher the tokens here are those of all DP ranks, to which my count does not apply.
        """
        info = {}
        if get_global_server_args().ep_dispatch_algorithm is not None:
            info["expert_location_dispatch_info"] = ExpertLocationDispatchInfo.init_new(layer_id=self.layer_id)
        if reduction is ExpertReduction.DISPATCHER and not get_moe_a2a_backend().is_none():
            info["num_token_non_padded"] = forward_batch.num_token_non_padded
        return info

    def _all_reduce(self, output: torch.Tensor) -> torch.Tensor:
        if self.tp_size == 1:
            return output
        if get_moe_data_parallel_world_size() == 1:
            return tensor_model_parallel_all_reduce(output)
        # Experts in data-parallel groups: TP as a whole also spans ranks with other tokens.
        return moe_tensor_model_parallel_all_reduce(moe_expert_parallel_all_reduce(output))

    def expert_weights(self) -> list[torch.Tensor]:
        """What belongs to single experts of this rank, [local experts, ...] each: EPLB moves these between ranks."""
        return [
            param.data
            for name, param in self.experts.named_parameters()
            if filter_moe_weight_param_global_expert(name, param, self.experts.num_local_experts)
        ]

    # The stages of experts with a dispatcher in two-batch overlap.
    def op_gate(self, state) -> None:
        hidden_states = state.hidden_states_mlp_input
        # An idle batch may hold padding, which is routed as well: the dispatcher takes as many routes as tokens.
        is_empty = hidden_states.shape[0] == 0
        state.router_logits = None if is_empty else self.router_logits(hidden_states, self.gate)

    def op_select_experts(self, state) -> None:
        router_logits, hidden_states = state.pop("router_logits"), state.hidden_states_mlp_input
        if router_logits is None:
            state.topk_output = self.topk.empty_topk_output(hidden_states.device)
            return
        with recorded_as(self.layer_id):
            state.topk_output = self._choose(
                hidden_states, router_logits, state.forward_batch, ExpertReduction.DISPATCHER
            )

    def op_dispatch_a(self, state) -> None:
        self.experts.dispatcher.dispatch_a(
            hidden_states=state.pop("hidden_states_mlp_input"),
            topk_output=state.pop("topk_output"),
            tbo_subbatch_index=state.get("tbo_subbatch_index"),
        )

    def op_dispatch_b(self, state) -> None:
        with recorded_as(self.layer_id):
            state.dispatch_output = self.experts.dispatcher.dispatch_b(
                tbo_subbatch_index=state.get("tbo_subbatch_index")
            )

    def op_experts(self, state) -> None:
        state.combine_input = self.experts.run_moe_core(dispatch_output=state.pop("dispatch_output"))

    def op_combine_a(self, state) -> None:
        self.experts.dispatcher.combine_a(
            combine_input=state.pop("combine_input"), tbo_subbatch_index=state.get("tbo_subbatch_index")
        )

    def op_combine_b(self, state) -> None:
        state.hidden_states_mlp_output = self.experts.dispatcher.combine_b(
            tbo_subbatch_index=state.get("tbo_subbatch_index")
        )


def check_routing_stays_here() -> None:
    """Some MoE kernels route by themselves, from the router's logits, and know softmax or groups of experts only."""
    backend = get_moe_runner_backend()
    if backend.is_flashinfer_trtllm() or backend.is_flashinfer_mxfp4() or backend.is_triton_kernels():
        raise ValueError(
            f"--moe-runner-backend {backend.value} chooses the experts in its kernel, by rules other than MiniMax-M2's "
            f"sigmoid scores with a selection bias, and would answer wrongly. Leave it out"
        )


def recorded_as(layer_id: int):
    """Names the layer to the recorder of expert loads, which piecewise CUDA graphs cannot trace through."""
    if not get_global_server_args().disable_piecewise_cuda_graph:
        return nullcontext()
    return get_global_expert_distribution_recorder().with_current_layer(layer_id)


def method_of(quant_config: QuantizationConfig | None) -> str | None:
    """The quantisation under the engine's name, that of compressed-tensors with its format, of which it has several."""
    if isinstance(quant_config, CompressedTensorsConfig):
        return f"{quant_config.get_name()} {quant_config.quant_format}"
    return quant_config and quant_config.get_name()


_MARLIN = ("awq", "awq_marlin", "gptq", "gptq_marlin")


def check_experts(config: PretrainedConfig, method: str | None = None) -> None:
    """Refuses a division of the experts that cannot work, before any of their weights is allocated.

    Args:
        method: of quantisation, as :func:`method_of` names it.
    """
    server_args = get_global_server_args()
    tp_size, ep_size = get_tensor_model_parallel_world_size(), server_args.ep_size
    shape = expert_shape_of(config, server_args.ep_num_redundant_experts)
    reason = shape.reason_against(tp_size, ep_size, server_args.moe_dp_size)
    if reason is not None:
        raise ValueError(f"the experts cannot be divided over --tp {tp_size} --ep {ep_size}: {reason}")
    if server_args.ep_num_redundant_experts and server_args.ep_dispatch_algorithm and not has_dispatcher():
        raise ValueError(
            f"--ep-num-redundant-experts {server_args.ep_num_redundant_experts} --ep-dispatch-algorithm "
            f"{server_args.ep_dispatch_algorithm} need an a2a backend: without one each rank routes all tokens and "
            f"chooses among an expert's copies for itself, so that copies are summed twice or not at all. Add "
            f"--moe-a2a-backend, with --deepep-mode normal or low_latency for --enable-eplb, or leave the redundant "
            f"experts out."
        )
    against_runner = reason_against_runner(
        method, get_moe_runner_backend().value, tp_size, ep_size, is_blackwell_supported(),
        get_moe_a2a_backend().value, shape.width * ep_size * server_args.moe_dp_size // tp_size,
    )  # fmt: skip
    if against_runner is not None:
        raise ValueError(f"{against_runner}.")
    stored = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    _check_4_bit_experts(method, stored, tp_size, ep_size, server_args.moe_dp_size)


def _check_4_bit_experts(method: str | None, stored: str | None, tp_size: int, ep_size: int, moe_dp_size: int) -> None:
    """Refuses what the engine would load wrongly, or multiply with what lies beside the weights.

    Args:
        stored: the method that the checkpoint names.
    """
    by_width = "--quantization moe_wna16"  # the one for GPTQ that loads an expert's part
    if method == "moe_wna16" and stored == "awq" and ep_size > 1:
        raise ValueError(
            f"AWQ experts by --quantization moe_wna16 and --ep {ep_size}: the engine's loader puts zero points where "
            f"the experts of all ranks would have them. Leave --ep out."
        )
    if method in _MARLIN and ep_size > 1:
        also = f", and give {by_width}" if method.startswith("gptq") and tp_size > moe_dp_size else ""
        raise ValueError(
            f"{method} experts and --ep {ep_size}: for these the engine's kernels do not pass over routes to other "
            f"ranks' experts, and would read beside the weights. Leave --ep out{also}."
        )
    if method in ("gptq", "gptq_marlin") and tp_size > moe_dp_size:
        raise ValueError(
            f"GPTQ experts cannot be divided over --tp {tp_size}: the engine allocates the scales of an expert's whole "
            f"width on each of the ranks that share it, and then cuts them. Add {by_width}, which allocates a part."
        )


def check_adapted_experts(experts: nn.Module) -> None:
    """Refuses LoRA adapters of experts that the engine would leave out, or end at, once a request asks for one.

    Args:
        experts: of any layer, after the engine has put its LoRA layers into the model.

    Raises:
        ValueError: names the division or quantisation of the experts, and what to give instead.
    """
    attention_alone = "or adapters of attention alone: --lora-target-modules q_proj k_proj v_proj o_proj"
    if not isinstance(experts, FusedMoEWithLoRA):
        raise ValueError(
            f"LoRA adapters of experts need gate_up_proj and down_proj together: for one of them the engine reads "
            f"adapters and leaves their part of the answer out. Add --lora-target-modules gate_up_proj down_proj, "
            f"{attention_alone}."
        )
    tp_size, sharing = get_tensor_model_parallel_world_size(), experts.base_layer.moe_tp_size
    if sharing != tp_size:
        shares = "1 rank shares" if sharing == 1 else f"{sharing} ranks share"
        raise ValueError(
            f"LoRA adapters of experts are cut into --tp {tp_size} parts, and {shares} each expert: the first request "
            f"for one would end the server. Use --ep 1 and --moe-dp-size 1, {attention_alone}."
        )
    if not isinstance(experts.quant_method, UnquantizedFusedMoEMethod):
        raise ValueError(
            f"LoRA adapters of experts need experts that are not quantised: beside adapters the engine multiplies "
            f"{type(experts.quant_method).__name__}'s weights without their scales. Serve a bfloat16 checkpoint, "
            f"{attention_alone}."
        )
