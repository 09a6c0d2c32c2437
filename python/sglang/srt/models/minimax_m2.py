"""MiniMax-M2 (M2, M2.1, M2.5, M2.7) for inference: grouped-query attention with QK RMSNorm over all heads and
partial RoPE, and in every layer a mixture of experts routed by sigmoid scores with a selection bias.

Reference: ``transformers.models.minimax_m2``. Read in the order in which data flows: QK norm, attention, experts,
decoder layer, model, causal LM, weights.

Three groups of ranks carry it, and every place names the one that it means:
    attention TP    embedding, attention and norms: all of TP, or TP / DP ranks under DP attention
    experts         all of TP, divided into experts (EP) and widths (experts TP)
    pipeline        whole layers
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from enum import Enum, auto

import torch
from sglang.srt.batch_overlap import two_batch_overlap
from sglang.srt.batch_overlap.operations import YieldOperation
from sglang.srt.batch_overlap.operations_strategy import OperationsStrategy
from sglang.srt.distributed import (
    attention_tensor_model_parallel_all_reduce,
    get_moe_data_parallel_world_size,
    get_pp_group,
    get_pp_indices,
    get_tensor_model_parallel_world_size,
    get_tp_group,
    moe_expert_parallel_all_reduce,
    moe_tensor_model_parallel_all_reduce,
    tensor_model_parallel_all_reduce,
)
from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
from sglang.srt.eplb.expert_location import ModelConfigForExpertLocation
from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo
from sglang.srt.layers import flashinfer_comm_fusion  # type: ignore[attr-defined]
from sglang.srt.layers.communicator import (
    FUSE_ALLREDUCE_MAX_BATCH_SIZE,
    LayerCommunicator,
    LayerScatterModes,
    ScatterMode,
    apply_flashinfer_allreduce_fusion,
)
from sglang.srt.layers.dp_attention import (
    get_attention_tp_rank,
    get_attention_tp_size,
    is_dp_attention_enabled,
)
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import QKVParallelLinear, ReplicatedLinear, RowParallelLinear
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.minimax_qk_norm import norm_qk, scale_rows, sums_of_squares
from sglang.srt.layers.minimax_router import choose_router_logits
from sglang.srt.layers.minimax_sharding import expert_shape_of, shard_attention, shard_heads
from sglang.srt.layers.moe import (
    get_moe_a2a_backend,
    get_moe_runner_backend,
    should_use_flashinfer_cutlass_moe_fp4_allgather,
)
from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class
from sglang.srt.layers.moe.token_dispatcher import DeepEPConfig
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.layers.moe.utils import filter_moe_weight_param_global_expert
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.layers.utils import PPMissingLayer
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode, PPProxyTensors
from sglang.srt.models.minimax_m2_weights import CheckedWeights
from sglang.srt.server_args import get_global_server_args
from sglang.srt.utils import add_prefix, is_cuda, log_info_on_rank0, make_layers
from sglang.srt.utils.hf_transformers_utils import get_rope_config
from torch import nn
from transformers import PretrainedConfig

logger = logging.getLogger(__name__)


class MiniMaxM2RMSNormTP(nn.Module):
    """RMSNorm over all heads of q (or of k), of which each attention-TP rank holds its own.

    With T ranks and H heads, H % T == 0 gives a rank H / T heads of its own; T % H == 0 gives it one head that it
    shares with its T / H - 1 neighbours, as ``QKVParallelLinear`` does. A shared head is in the all-reduced sum of
    squares once for each rank that holds it, so that sum covers ``replicas * hidden_size`` values.

    Args:
        hidden_size: values of all heads together, num_heads * head_dim.
        num_heads: heads of the whole model.
        eps: added to the mean of squares.

    Raises:
        ValueError: the heads cannot be divided over the ranks, or hidden_size over the heads.
    """

    def __init__(self, hidden_size: int, num_heads: int, eps: float = 1e-6) -> None:
        super().__init__()
        if hidden_size % num_heads != 0:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
        self.shards = shard_heads(num_heads, get_attention_tp_size())
        self.rank = get_attention_tp_rank()
        self.hidden_size = hidden_size
        self.head_dim = hidden_size // num_heads
        self.variance_epsilon = eps
        self.weight = nn.Parameter(torch.ones(self.shards.heads_per_rank * self.head_dim))
        self.weight.weight_loader = self.weight_loader

    @property
    def reduced_count(self) -> int:
        """How many squares the sum over the attention-TP ranks covers, shared heads counted as often as held."""
        return self.shards.replicas * self.hidden_size

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor) -> None:
        """Copies this rank's shard of a checkpoint's ``[hidden_size]`` weight.

        Raises:
            ValueError: the tensor is not the weight of all heads, or ``param`` not that of this rank's.
        """
        if tuple(loaded_weight.shape) != (self.hidden_size,):
            raise ValueError(
                f"a norm over {self.shards.num_heads} heads of {self.head_dim} needs a weight of shape "
                f"({self.hidden_size},), and the checkpoint's has {tuple(loaded_weight.shape)}"
            )
        size = self.shards.heads_per_rank * self.head_dim
        if tuple(param.shape) != (size,):
            raise ValueError(f"rank {self.rank} holds a weight of shape {tuple(param.shape)} where ({size},) belongs")
        start = self.shards.shard_of(self.rank) * size
        param.data.copy_(loaded_weight[start : start + size])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norms [tokens, heads a rank * head_dim] alone; attention norms q and k together, in one collective."""
        sums = sums_of_squares(x, x)
        if self.shards.num_ranks > 1:
            sums = attention_tensor_model_parallel_all_reduce(sums)
        return scale_rows(
            x, x, self.weight, self.weight, sums, self.reduced_count, self.reduced_count, self.variance_epsilon
        )[0]

    @staticmethod
    def forward_qk(
        q_norm: MiniMaxM2RMSNormTP, k_norm: MiniMaxM2RMSNormTP, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Norms q and k, [tokens, heads a rank * head_dim] each, rows may be strided, with one all-reduce for both."""
        return norm_qk(
            q, k, q_norm.weight, k_norm.weight, q_norm.reduced_count, k_norm.reduced_count, q_norm.variance_epsilon,
            attention_tensor_model_parallel_all_reduce if q_norm.shards.num_ranks > 1 else None,
        )  # fmt: skip


class MiniMaxM2Attention(nn.Module):
    """Attention of one layer on the attention-TP group; its output is this rank's part of a sum over that group."""

    def __init__(
        self, config: PretrainedConfig, layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        attn_tp_rank, attn_tp_size = get_attention_tp_rank(), get_attention_tp_size()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shards = shard_attention(config.num_attention_heads, config.num_key_value_heads, attn_tp_size)
        self.q_size = shards.q.heads_per_rank * head_dim
        self.kv_size = shards.kv.heads_per_rank * head_dim

        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, head_dim, config.num_attention_heads, config.num_key_value_heads,
            bias=False, quant_config=quant_config, prefix=add_prefix("qkv_proj", prefix),
            tp_rank=attn_tp_rank, tp_size=attn_tp_size,
        )  # fmt: skip
        self.q_norm, self.k_norm = _qk_norms(config, head_dim)
        rope_theta, rope_scaling = get_rope_config(config)
        self.rotary_emb = get_rope(
            head_dim,
            rotary_dim=_rotary_dim(config, head_dim),
            max_position=getattr(config, "max_position_embeddings", 8192),
            base=rope_theta,
            rope_scaling=rope_scaling,
        )
        self.attn = RadixAttention(
            num_heads=shards.q.heads_per_rank,
            head_dim=head_dim,
            scaling=head_dim**-0.5,
            num_kv_heads=shards.kv.heads_per_rank,
            layer_id=layer_id,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * head_dim, config.hidden_size,
            bias=False, reduce_results=False, quant_config=quant_config, prefix=add_prefix("o_proj", prefix),
            tp_rank=attn_tp_rank, tp_size=attn_tp_size,
        )  # fmt: skip

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        return self.forward_core(self.forward_prepare(positions, hidden_states, forward_batch))

    def forward_prepare(self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: ForwardBatch):
        """From [tokens, hidden_size] to (hidden_states, batch, (q, k, v)), or (hidden_states, batch, None) when there
        is nothing to attend to: no tokens, or an idle batch, whose tokens are padding."""
        if hidden_states.shape[0] == 0 or forward_batch.forward_mode.is_idle():
            assert not self.o_proj.reduce_results, (
                "attention without tokens returns before o_proj, so o_proj must not all-reduce: the other ranks of "
                "the group would wait for this one for ever. Build o_proj with reduce_results=False; the layer "
                "communicator reduces."
            )
            return hidden_states, forward_batch, None
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        if self.q_norm is not None:
            q, k = MiniMaxM2RMSNormTP.forward_qk(self.q_norm, self.k_norm, q, k)
        else:
            q, k = q.contiguous(), k.contiguous()
        q, k = self.rotary_emb(positions, q, k)
        return hidden_states, forward_batch, (q, k, v)

    def forward_core(self, prepared) -> torch.Tensor:
        hidden_states, forward_batch, qkv = prepared
        if qkv is None:
            return hidden_states
        output, _ = self.o_proj(self.attn(*qkv, forward_batch))
        return output

    # The two stages of attention in two-batch overlap.
    def op_prepare(self, state) -> None:
        state.attn_intermediate_state = self.forward_prepare(
            positions=state.positions,
            hidden_states=state.pop("hidden_states_after_comm_pre_attn"),
            forward_batch=state.forward_batch,
        )

    def op_core(self, state) -> None:
        state.hidden_states_after_attn = self.forward_core(state.pop("attn_intermediate_state"))


def _qk_norms(config: PretrainedConfig, head_dim: int):
    """The norms of q and k, or (None, None) for a config that has none."""
    if not getattr(config, "use_qk_norm", True):
        return None, None
    kind = getattr(config, "qk_norm_type", "per_layer")
    if kind != "per_layer":
        raise ValueError(
            f"qk_norm_type {kind!r} is not supported: MiniMax-M2 norms q and k over all heads of a layer, 'per_layer'"
        )
    q_heads, kv_heads, eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
    return (
        MiniMaxM2RMSNormTP(q_heads * head_dim, q_heads, eps),
        MiniMaxM2RMSNormTP(kv_heads * head_dim, kv_heads, eps),
    )


def _rotary_dim(config: PretrainedConfig, head_dim: int) -> int:
    """How many of a head's values are rotated: the published configs say rotary_dim, transformers' say a fraction."""
    rotary_dim = getattr(config, "rotary_dim", None)
    if rotary_dim is None:
        rope_parameters = getattr(config, "rope_parameters", None) or {}
        rotary_dim = int(head_dim * rope_parameters.get("partial_rotary_factor", 1.0))
    return rotary_dim


class ExpertReduction(Enum):
    """Who sums the ranks' parts of the experts' output. Exactly one of them does."""

    MODEL = auto()  # an all-reduce right after the experts
    NEXT_NORM = auto()  # the all-reduce fused into the next layer's norm
    REDUCE_SCATTER = auto()  # the layer communicator, which also gives each DP rank its tokens back
    DISPATCHER = auto()  # the experts' token dispatcher: an a2a backend, or FP4 all-gather with reduce-scatter

    @classmethod
    def of(cls, communicator: LayerCommunicator, forward_batch: ForwardBatch) -> ExpertReduction:
        if _has_dispatcher():
            return cls.DISPATCHER
        if communicator.should_use_reduce_scatter(forward_batch):
            return cls.REDUCE_SCATTER
        if communicator.should_fuse_mlp_allreduce_with_next_layer(forward_batch):
            return cls.NEXT_NORM
        return cls.MODEL


def _has_dispatcher() -> bool:
    """Whether tokens travel to their experts, each from one rank. Without, every rank routes all tokens."""
    return not get_moe_a2a_backend().is_none() or should_use_flashinfer_cutlass_moe_fp4_allgather()


class MiniMaxM2MoE(nn.Module):
    """Mixture of experts: sigmoid scores, the top k of score + bias, weights renormalised over the chosen."""

    def __init__(
        self, config: PretrainedConfig, layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        _check_routing_stays_here()
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
        self.experts = get_moe_impl_class(quant_config)(
            num_experts=config.num_local_experts + get_global_server_args().ep_num_redundant_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            layer_id=layer_id,
            quant_config=quant_config,
            prefix=add_prefix("experts", prefix),
        )

    def forward(
        self, hidden_states: torch.Tensor, forward_batch: ForwardBatch, reduction: ExpertReduction
    ) -> torch.Tensor:
        """From and to [tokens, hidden_size]; with ``ExpertReduction.MODEL`` the sum over all ranks, else my part."""
        topk_output = self._route(hidden_states, forward_batch, reduction)
        output = self.experts(hidden_states, topk_output)
        return self._all_reduce(output) if reduction is ExpertReduction.MODEL else output

    def _route(self, hidden_states: torch.Tensor, forward_batch: ForwardBatch, reduction: ExpertReduction):
        if hidden_states.shape[0] == 0:
            return self.topk.empty_topk_output(hidden_states.device)
        return self.topk(
            hidden_states, self._router_logits(hidden_states), **self._routing_info(forward_batch, reduction)
        )

    def _router_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[tokens, num_local_experts] float32."""
        return self.router_logits(hidden_states, self.gate)

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
        state.router_logits = self._router_logits(hidden_states) if hidden_states.shape[0] != 0 else None

    def op_select_experts(self, state) -> None:
        router_logits, hidden_states = state.pop("router_logits"), state.hidden_states_mlp_input
        if router_logits is None:
            state.topk_output = self.topk.empty_topk_output(hidden_states.device)
            return
        with _recorded_as(self.layer_id):
            state.topk_output = self.topk(
                hidden_states, router_logits, **self._routing_info(state.forward_batch, ExpertReduction.DISPATCHER)
            )

    def op_dispatch_a(self, state) -> None:
        self.experts.dispatcher.dispatch_a(
            hidden_states=state.pop("hidden_states_mlp_input"),
            topk_output=state.pop("topk_output"),
            tbo_subbatch_index=state.get("tbo_subbatch_index"),
        )

    def op_dispatch_b(self, state) -> None:
        with _recorded_as(self.layer_id):
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


def _check_routing_stays_here() -> None:
    """Some MoE kernels route by themselves, from the router's logits, and know softmax or groups of experts only."""
    backend = get_moe_runner_backend()
    if backend.is_flashinfer_trtllm() or backend.is_flashinfer_mxfp4() or backend.is_triton_kernels():
        raise ValueError(
            f"--moe-runner-backend {backend.value} chooses the experts in its kernel, by rules other than MiniMax-M2's "
            f"sigmoid scores with a selection bias, and would answer wrongly. Use auto, triton, deep_gemm, cutlass, "
            f"flashinfer_cutlass or flashinfer_trtllm_routed"
        )


def _recorded_as(layer_id: int):
    """Names the layer to the recorder of expert loads, which piecewise CUDA graphs cannot trace through."""
    if not get_global_server_args().disable_piecewise_cuda_graph:
        return nullcontext()
    return get_global_expert_distribution_recorder().with_current_layer(layer_id)


class MiniMaxM2DecoderLayer(nn.Module):
    """Norm, attention, norm, experts. The layer communicator moves tokens between the groups and reduces."""

    def __init__(
        self, config: PretrainedConfig, layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.self_attn = MiniMaxM2Attention(config, layer_id, quant_config, add_prefix("self_attn", prefix))
        self.block_sparse_moe = MiniMaxM2MoE(config, layer_id, quant_config, add_prefix("block_sparse_moe", prefix))
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layer_scatter_modes = LayerScatterModes.init_new(
            layer_id=layer_id,
            num_layers=config.num_hidden_layers,
            is_layer_sparse=True,
            is_previous_layer_sparse=True,
            is_next_layer_sparse=True,
        )
        self.layer_communicator = LayerCommunicator(
            layer_scatter_modes=self.layer_scatter_modes,
            input_layernorm=self.input_layernorm,
            post_attention_layernorm=self.post_attention_layernorm,
            allow_reduce_scatter=True,
            is_last_layer=_is_last_of_stage(layer_id, config.num_hidden_layers),
        )

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: ForwardBatch,
        residual: torch.Tensor | None,
        captured: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where ``captured`` is given, the sum that enters this layer is appended to it (EAGLE3)."""
        hidden_states, residual = self.layer_communicator.prepare_attn_and_capture_last_layer_outputs(
            hidden_states, residual, forward_batch, captured_last_layer_outputs=captured
        )
        hidden_states = self.self_attn(positions, hidden_states, forward_batch)
        hidden_states, residual = self.layer_communicator.prepare_mlp(hidden_states, residual, forward_batch)
        return self._experts_and_postprocess(hidden_states, residual, forward_batch)

    def _experts_and_postprocess(self, hidden_states, residual, forward_batch: ForwardBatch):
        reduction = ExpertReduction.of(self.layer_communicator, forward_batch)
        hidden_states = self.block_sparse_moe(hidden_states, forward_batch, reduction)
        if reduction is ExpertReduction.NEXT_NORM:
            hidden_states._sglang_needs_allreduce_fusion = True  # the engine's sign to the next layer
            return hidden_states, residual
        return self.layer_communicator.postprocess_layer(hidden_states, residual, forward_batch)

    # The stages of a layer in two-batch overlap.
    def op_comm_prepare_attn(
        self, state, positions, hidden_states, forward_batch, residual, zero_allocator=None, tbo_subbatch_index=None
    ) -> None:
        state.hidden_states_after_comm_pre_attn, state.residual_after_input_ln = self.layer_communicator.prepare_attn(
            hidden_states, residual, forward_batch
        )
        state.update(
            {
                "positions": positions,
                "forward_batch": forward_batch,
                "zero_allocator": zero_allocator,
                "tbo_subbatch_index": tbo_subbatch_index,
            }
        )

    def op_comm_prepare_mlp(self, state) -> None:
        state.hidden_states_mlp_input, state.residual_after_comm_pre_mlp = self.layer_communicator.prepare_mlp(
            state.pop("hidden_states_after_attn"), state.pop("residual_after_input_ln"), state.forward_batch
        )

    def op_mlp(self, state) -> dict:
        """Experts without a dispatcher and the end of the layer, in one stage."""
        return self._overlap_output(
            state,
            *self._experts_and_postprocess(
                state.pop("hidden_states_mlp_input"), state.pop("residual_after_comm_pre_mlp"), state.forward_batch
            ),
        )

    def op_comm_postprocess_layer(self, state) -> dict:
        return self._overlap_output(
            state,
            *self.layer_communicator.postprocess_layer(
                state.pop("hidden_states_mlp_output"), state.pop("residual_after_comm_pre_mlp"), state.forward_batch
            ),
        )

    @staticmethod
    def _overlap_output(state, hidden_states, residual) -> dict:
        output = {
            name: state.pop(name) for name in ("positions", "forward_batch", "zero_allocator", "tbo_subbatch_index")
        }
        return {**output, "hidden_states": hidden_states, "residual": residual}

    def overlap_strategy(self, forward_mode: ForwardMode) -> OperationsStrategy:
        """The stages of this layer, with a yield to the other half batch wherever this half waits for the network."""
        attention, experts, wait = self.self_attn, self.block_sparse_moe, YieldOperation()
        to_experts = [self.op_comm_prepare_attn, attention.op_prepare, attention.op_core, self.op_comm_prepare_mlp]
        if get_moe_a2a_backend().is_none():
            return OperationsStrategy(operations=[*to_experts, self.op_mlp], tbo_delta_stages=0)
        route = [experts.op_gate, experts.op_select_experts]
        compute = [experts.op_dispatch_b, experts.op_experts, experts.op_combine_a]
        finish = [experts.op_combine_b, self.op_comm_postprocess_layer]
        if forward_mode == ForwardMode.EXTEND:
            return OperationsStrategy(
                operations=[*to_experts, *route, experts.op_dispatch_a, wait, *compute, wait, *finish],
                tbo_delta_stages=0,
                deep_gemm_num_sms=_sms_beside_deepep(),
            )
        prepare, rest = to_experts[:2], to_experts[2:]
        return OperationsStrategy(
            operations=[
                *[*prepare, wait, *rest, *route, wait],
                *[experts.op_dispatch_a, wait, *compute, wait, *finish, wait],
            ],
            tbo_delta_stages=2,
        )


def _is_last_of_stage(layer_id: int, num_layers: int) -> bool:
    """The last layer of a pipeline stage has no next norm on this rank that could take its reduction over."""
    pp_group = get_pp_group()
    _, end = get_pp_indices(num_layers, pp_group.rank_in_group, pp_group.world_size)
    return layer_id == end - 1


def _sms_beside_deepep() -> int | None:
    """Multiprocessors left to GEMMs while DeepEP communicates in a prefill."""
    if not (is_cuda() and get_moe_a2a_backend().is_deepep()):
        return None
    return torch.cuda.get_device_properties("cuda").multi_processor_count - DeepEPConfig.get_instance().num_sms


class MiniMaxM2Model(nn.Module):
    """Embedding, the layers of this pipeline stage, final norm."""

    fall_back_to_pt_during_load = False

    def __init__(self, config: PretrainedConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""):
        super().__init__()
        self.pp_group = get_pp_group()
        self.embed_tokens = PPMissingLayer()
        if self.pp_group.is_first_rank or (config.tie_word_embeddings and self.pp_group.is_last_rank):
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                use_attn_tp_group=is_dp_attention_enabled(),
                prefix=add_prefix("embed_tokens", prefix),
            )
        self.layers, self.start_layer, self.end_layer = make_layers(
            config.num_hidden_layers,
            lambda idx, prefix: MiniMaxM2DecoderLayer(config, idx, quant_config, prefix),
            pp_rank=self.pp_group.rank_in_group,
            pp_size=self.pp_group.world_size,
            prefix=add_prefix("layers", prefix),
        )
        self.norm = PPMissingLayer(return_tuple=True)
        if self.pp_group.is_last_rank:
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers_to_capture: list[int] = []  # EAGLE3 wants the sums that enter these layers

    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
    ) -> torch.Tensor | PPProxyTensors | tuple[torch.Tensor, list[torch.Tensor]]:
        if self.pp_group.is_first_rank:
            hidden_states = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
            residual = None
        else:
            assert pp_proxy_tensors is not None, "a later pipeline stage needs the tensors of the stage before it"
            hidden_states, residual = pp_proxy_tensors["hidden_states"], pp_proxy_tensors["residual"]

        captured: list[torch.Tensor] = []
        # Overlapped stages neither capture nor start from a pipeline's scattered tensors: then one after the other.
        if forward_batch.can_run_tbo and not self.layers_to_capture and self.pp_group.world_size == 1:
            hidden_states, residual = self._forward_overlapped(positions, hidden_states, forward_batch, residual)
        else:
            hidden_states, residual = self._forward_layers(
                positions, hidden_states, forward_batch, residual, captured
            )

        if not self.pp_group.is_last_rank:
            return PPProxyTensors({"hidden_states": hidden_states, "residual": residual})
        if self.end_layer in self.layers_to_capture:
            captured.append(hidden_states if residual is None else hidden_states + residual)
        if hidden_states.shape[0] != 0:
            if residual is None:
                hidden_states = self.norm(hidden_states)
            else:
                hidden_states, _ = self.norm(hidden_states, residual)
        return (hidden_states, captured) if self.layers_to_capture else hidden_states

    def _forward_layers(self, positions, hidden_states, forward_batch, residual, captured):
        for layer_id in range(self.start_layer, self.end_layer):
            with _recorded_as(layer_id):
                hidden_states, residual = self.layers[layer_id](
                    positions,
                    hidden_states,
                    forward_batch,
                    residual,
                    captured if layer_id in self.layers_to_capture else None,
                )
        return hidden_states, residual

    def _forward_overlapped(self, positions, hidden_states, forward_batch, residual):
        """Two halves of the batch in turn, one computing while the other's tokens travel.

        The engine finds the stages of a layer by its class name and does not know this one, so they are given here.
        """
        layers = self.layers[self.start_layer : self.end_layer]
        return two_batch_overlap._model_forward_tbo(
            inputs={
                "positions": positions,
                "hidden_states": hidden_states,
                "forward_batch": forward_batch,
                "residual": residual,
                "zero_allocator": None,
            },
            operations_strategy=OperationsStrategy.concat(
                [layer.overlap_strategy(forward_batch.global_forward_mode) for layer in layers]
            ),
            input_data_scatter_mode=ScatterMode.model_input_output(),
            layer_input_scatter_mode=layers[0].layer_scatter_modes.layer_input_mode,
        )


class MiniMaxM2ForCausalLM(nn.Module):
    """The model with its language-model head, and what the engine asks of a model."""

    # Names of the checkpoint's projections by the fused projection that holds them.
    packed_modules_mapping = {  # noqa: RUF012 (the engine reads a plain class attribute)
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, config: PretrainedConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""):
        super().__init__()
        _check_experts(config)
        self.config = config
        self.quant_config = quant_config
        self.pp_group = get_pp_group()
        self.model = MiniMaxM2Model(config, quant_config, prefix=add_prefix("model", prefix))
        self.lm_head = PPMissingLayer()
        if self.pp_group.is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=None,
                prefix=add_prefix("lm_head", prefix),
                use_attn_tp_group=get_global_server_args().enable_dp_lm_head,
            )
        self.logits_processor = LogitsProcessor(config)
        self.capture_aux_hidden_states = False
        self.weights_loaded = False
        _prepare_fused_all_reduce(config.hidden_size)

    # The engine makes a KV cache for the layers from start_layer to end_layer, and for all of the model's without them.
    @property
    def start_layer(self) -> int:
        return self.model.start_layer

    @property
    def end_layer(self) -> int:
        return self.model.end_layer

    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.get_input_embeddings(input_ids)

    def get_embed_and_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.embed_tokens.weight, self.lm_head.weight

    @property
    def routed_experts_weights_of_layer(self) -> dict[int, list[torch.Tensor]]:
        """The experts' weights of this stage's layers, for EPLB."""
        layers = range(self.model.start_layer, self.model.end_layer)
        return {layer_id: self.model.layers[layer_id].block_sparse_moe.expert_weights() for layer_id in layers}

    def set_eagle3_layers_to_capture(self, layer_ids: list[int] | None = None) -> None:
        """Asks for the outputs of ``layer_ids`` (0-based), or, where none were asked for before, of EAGLE3's three.

        The engine calls this with the draft model's layers, and once more without any before it captures graphs.

        Raises:
            ValueError: an unknown layer, or a pipeline, whose earlier stages could not pass their outputs on.
        """
        if not self.pp_group.is_last_rank:
            return
        if self.pp_group.world_size > 1:
            raise ValueError(f"EAGLE3 needs all layers on one pipeline stage, and --pp is {self.pp_group.world_size}")
        num_layers = self.config.num_hidden_layers
        if layer_ids is not None:
            entering = [layer_id + 1 for layer_id in layer_ids]
        else:
            entering = self.model.layers_to_capture or [2, num_layers // 2, num_layers - 3]
        if not all(1 <= layer_id <= num_layers for layer_id in entering):
            raise ValueError(f"EAGLE3 asks for outputs of layers {[i - 1 for i in entering]} of {num_layers}")
        self.model.layers_to_capture = entering
        self.capture_aux_hidden_states = True

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
    ):
        hidden_states = self.model(input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors)
        if not self.pp_group.is_last_rank:
            return hidden_states
        captured = None
        if self.capture_aux_hidden_states:
            hidden_states, captured = hidden_states
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch, captured)

    @classmethod
    def get_model_config_for_expert_location(cls, config: PretrainedConfig) -> ModelConfigForExpertLocation:
        return ModelConfigForExpertLocation(
            num_layers=config.num_hidden_layers, num_logical_experts=config.num_local_experts, num_groups=None
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads ``weights`` and returns the names of the parameters that they filled.

        The first load must fill every parameter, unless the weights are dummies; later ones may bring a part, as
        weight updates do.

        Raises:
            ValueError: names, shapes or dtypes that do not fit, or parameters left unfilled; all in one message.
        """
        filled = CheckedWeights(self).load(weights, whole=not self.weights_loaded and not _weights_are_dummies())
        self.weights_loaded = True
        return filled


def _weights_are_dummies() -> bool:
    return get_global_server_args().load_format == "dummy"


def _check_experts(config: PretrainedConfig) -> None:
    """Refuses a division of the experts that cannot work, before any of their weights is allocated."""
    server_args = get_global_server_args()
    tp_size, ep_size = get_tensor_model_parallel_world_size(), server_args.ep_size
    shape = expert_shape_of(config, server_args.ep_num_redundant_experts)
    reason = shape.reason_against(tp_size, ep_size, server_args.moe_dp_size)
    if reason is not None:
        raise ValueError(f"the experts cannot be divided over --tp {tp_size} --ep {ep_size}: {reason}")
    if server_args.ep_num_redundant_experts and server_args.ep_dispatch_algorithm and not _has_dispatcher():
        raise ValueError(
            f"--ep-num-redundant-experts {server_args.ep_num_redundant_experts} --ep-dispatch-algorithm "
            f"{server_args.ep_dispatch_algorithm} need an a2a backend: without one each rank routes all tokens and "
            f"chooses among an expert's copies for itself, so that copies are summed twice or not at all. Add "
            f"--moe-a2a-backend, or leave the redundant experts out."
        )
    quantisation = getattr(config, "quantization_config", None) or {}
    if quantisation.get("quant_method") == "gptq" and tp_size > ep_size * server_args.moe_dp_size:
        raise ValueError(
            f"GPTQ experts cannot be divided over --tp {tp_size} --ep {ep_size}: the engine allocates the scales of an "
            f"expert's whole width on each of the ranks that share it, and then cuts them. Use --ep {tp_size}, which "
            f"keeps experts whole."
        )


def _prepare_fused_all_reduce(hidden_size: int) -> None:
    """Makes sure that FlashInfer's fused all-reduce + norm works on every rank, or turns it off on all of them.

    The engine makes its workspace in the middle of the first forward pass; where that fails it goes on with a norm
    of one rank's part, without the all-reduce.
    """
    if get_attention_tp_size() == 1 or not apply_flashinfer_allreduce_fusion(batch_size=1):
        return
    works = flashinfer_comm_fusion.ensure_workspace_initialized(
        max_token_num=FUSE_ALLREDUCE_MAX_BATCH_SIZE, hidden_dim=hidden_size, dtype=torch.get_default_dtype()
    )
    agreed = torch.tensor([int(works)], device="cpu")
    torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MIN, group=get_tp_group().cpu_group)
    if not agreed.item():
        get_global_server_args().enable_flashinfer_allreduce_fusion = False
        log_info_on_rank0(
            logger, "FlashInfer's fused all-reduce + norm is not available here: all-reduce and norm run apart, slower."
        )


EntryClass = MiniMaxM2ForCausalLM
