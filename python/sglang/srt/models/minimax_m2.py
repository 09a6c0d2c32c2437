"""MiniMax-M2 (M2, M2.1, M2.5, M2.7) for inference: grouped-query attention with QK RMSNorm over all heads and
partial RoPE, and in every layer a mixture of experts routed by sigmoid scores with a selection bias.

Reference: ``transformers.models.minimax_m2``. This file is read in the order in which data flows: QK norm, attention,
decoder layer, model, causal LM. The rest lies beside it:
    minimax_m2_moe.py                   the experts: routing, who sums their output, what layouts are refused
    minimax_m2_overlap.py               attention, layer and model as stages of two-batch overlap
    minimax_m2_weights.py, _files.py    loading a checkpoint, and accounting for every tensor of it
    layers/minimax_router.py            the router's logits and the choice of experts, in two launches
    layers/minimax_expert_kernels.py    what computes the experts: for few tokens layers/minimax_experts.py, for many
                                        ..._experts_prefill.py, between whose GEMMs ..._fp8_quantise.py quantises
    layers/minimax_sharding.py          how heads, experts and layers are divided over ranks
    layers/minimax_qk_norm.py           QK norm in launches of its own
    layers/minimax_counterpart.py       its sums over two nodes, without a collective between these
    layers/minimax_attention_inputs.py  whether QK norm, RoPE and KV store are one kernel instead; it is in
                                        layers/minimax_qk_norm_rope.py, its exchange between GPUs in
                                        layers/minimax_sum_exchange.py, the rules in layers/minimax_qk_norm_paths.py
    layers/minimax_decode_attention.py  attention of a decode step, in one launch
    layers/minimax_prefill_attention.py  that of a prefill, which a graph may hold, and layers/minimax_prefill_graphs.py
                                        the graphs of short prefills
    layers/minimax_fp8_linear.py        attention's projections in FP8 for few tokens, quantised in the same launch
    layers/minimax_parts.py             rows that are left in parts, which a later kernel adds up
    layers/minimax_layer_communicator.py  whether all-reduce, residual add and norm are one kernel; it is in
                                        layers/minimax_all_reduce_norm.py, its exchange between GPUs in
                                        layers/minimax_row_exchange.py, the rules in ..._all_reduce_norm_paths.py

Three groups of ranks carry it, and every place names the one that it means:
    attention TP    embedding, attention and norms: all of TP, or TP / DP ranks under DP attention
    experts         all of TP, divided into experts (EP) and widths (experts TP)
    pipeline        whole layers
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from sglang.srt.distributed import (
    attention_tensor_model_parallel_all_reduce,
    get_moe_data_parallel_world_size,
    get_pp_group,
    get_pp_indices,
)
from sglang.srt.eplb.expert_location import ModelConfigForExpertLocation
from sglang.srt.layers.communicator import LayerScatterModes
from sglang.srt.layers.dp_attention import (
    get_attention_tp_rank,
    get_attention_tp_size,
    is_dp_attention_enabled,
    set_dp_buffer_len,
)
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import RowParallelLinear
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.minimax_attention_inputs import choose_inputs
from sglang.srt.layers.minimax_counterpart import build_qkv_proj, choose_counterpart
from sglang.srt.layers.minimax_decode_attention import choose_decode_attention
from sglang.srt.layers.minimax_fp8_linear import Fp8Linear, choose_projection
from sglang.srt.layers.minimax_layer_communicator import (
    MiniMaxM2LayerCommunicator,
    one_launch_for,
    prepare_fused_all_reduce,
)
from sglang.srt.layers.minimax_parts import Parts
from sglang.srt.layers.minimax_prefill_attention import attend_if_captured, choose_prefill_attention
from sglang.srt.layers.minimax_prefill_graphs import choose_prefill_graphs, run_model
from sglang.srt.layers.minimax_qk_norm import norm_qk, scale_rows, sums_of_squares
from sglang.srt.layers.minimax_sharding import shard_attention, shard_heads
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.layers.utils import PPMissingLayer
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.lora.utils import get_hidden_dim
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, PPProxyTensors
from sglang.srt.models.minimax_m2_moe import (
    ExpertReduction,
    MiniMaxM2MoE,
    check_adapted_experts,
    check_experts,
    method_of,
    recorded_as,
)
from sglang.srt.models.minimax_m2_overlap import AttentionStages, LayerStages, forward_overlapped
from sglang.srt.models.minimax_m2_weights import CheckedWeights, engine_fills_weights
from sglang.srt.server_args import get_global_server_args
from sglang.srt.utils import add_prefix, make_layers
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
        q_norm: MiniMaxM2RMSNormTP,
        k_norm: MiniMaxM2RMSNormTP,
        q: torch.Tensor,
        k: torch.Tensor,
        of_counterpart: Sequence[torch.Tensor] = (),
        node=None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Norms q and k, [tokens, heads a rank * head_dim] each, rows may be strided, with one all-reduce for both.

        ``of_counterpart``: q and k of this rank's counterpart on the other node, if it has one; the all-reduce is then
        over ``node``, the ranks of this one.
        """
        all_reduce = attention_tensor_model_parallel_all_reduce if q_norm.shards.num_ranks > 1 else None
        return norm_qk(
            q, k, q_norm.weight, k_norm.weight, q_norm.reduced_count, k_norm.reduced_count, q_norm.variance_epsilon,
            all_reduce if node is None else node.all_reduce, of_counterpart,
        )  # fmt: skip


class MiniMaxM2Attention(AttentionStages):
    """Attention of one layer on the attention-TP group; its output is this rank's part of a sum over that group."""

    def __init__(
        self, config: PretrainedConfig, layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        attn_tp_rank, attn_tp_size = get_attention_tp_rank(), get_attention_tp_size()
        head_dim = _head_dim(config)
        shards = shard_attention(config.num_attention_heads, config.num_key_value_heads, attn_tp_size)
        self.q_norm, self.k_norm = _qk_norms(config, head_dim)
        qkv_prefix = add_prefix("qkv_proj", prefix)
        counterpart = choose_counterpart(attn_tp_rank, shards, quant_config, qkv_prefix) if self.q_norm else None
        self.node = counterpart and counterpart.node  # over which squares are summed, if not over all of attention TP
        self.qkv_proj = build_qkv_proj(
            counterpart, config.hidden_size, head_dim, config.num_attention_heads, config.num_key_value_heads,
            bias=False, quant_config=quant_config, prefix=qkv_prefix, tp_rank=attn_tp_rank, tp_size=attn_tp_size,
        )  # fmt: skip
        self.qkv_sizes = self.qkv_proj.output_partition_sizes
        if shards.kv.replicas > 1 and counterpart is None:
            # LoRA finds q, k and v of an adapter by these, and an adapter has no replicas.
            self.qkv_proj.output_sizes = [
                heads * head_dim for heads in (shards.q.num_heads, shards.kv.num_heads, shards.kv.num_heads)
            ]
        self.project_qkv = choose_projection(self, "qkv_proj")
        rope_theta, rope_scaling = _rope(config)
        self.rotary_emb = get_rope(
            head_dim,
            rotary_dim=_rotary_dim(config, head_dim),
            max_position=getattr(config, "max_position_embeddings", 8192),
            base=rope_theta,
            rope_scaling=rope_scaling,
        )
        self.fused_inputs = choose_inputs(self.q_norm, self.k_norm, self.rotary_emb, head_dim, layer_id, self.node)
        self.attn = RadixAttention(
            num_heads=shards.q.heads_per_rank,
            head_dim=head_dim,
            scaling=head_dim**-0.5,
            num_kv_heads=shards.kv.heads_per_rank,
            layer_id=layer_id,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )
        self.decode_attention = choose_decode_attention(
            shards.q.heads_per_rank, shards.kv.heads_per_rank, head_dim,
            is_stored=self.fused_inputs is not None and self.fused_inputs.stores,
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * head_dim, config.hidden_size,
            bias=False, reduce_results=False, quant_config=quant_config, prefix=add_prefix("o_proj", prefix),
            tp_rank=attn_tp_rank, tp_size=attn_tp_size,
        )  # fmt: skip
        self.reduces_output = self.o_proj.reduce_results
        self.project_output = choose_projection(self, "o_proj")

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: ForwardBatch,
        in_parts: bool = False,
    ) -> torch.Tensor | Parts:
        """From and to [tokens, hidden_size]; ``in_parts``: what the output projection leaves may be summed later."""
        return self.forward_core(self.forward_prepare(positions, hidden_states, forward_batch), in_parts)

    def forward_prepare(self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: ForwardBatch):
        """From [tokens, hidden_size] to (hidden_states, batch, (q, k, v, stored)), or (hidden_states, batch, None) when
        there is nothing to attend to: no tokens, or an idle batch, whose tokens are padding.

        stored: k and v are in the KV cache already. Whether there is nothing to do is the same on all ranks of an
        attention-TP group, which share one batch: none of them waits for sums of a rank that returned.
        """
        if hidden_states.shape[0] == 0 or forward_batch.forward_mode.is_idle():
            assert not self.reduces_output, (
                "attention without tokens returns before o_proj, so o_proj must not all-reduce: the other ranks of "
                "the group would wait for this one for ever. Build o_proj with reduce_results=False; the layer "
                "communicator reduces."
            )
            return hidden_states, forward_batch, None
        if self.fused_inputs is not None:
            project = self.project_qkv
            if isinstance(project, Fp8Linear) and self.fused_inputs.adds_parts():
                project = project.in_parts
            inputs = self.fused_inputs(project(hidden_states), positions, forward_batch)
            return hidden_states, forward_batch, inputs
        qkv = self.project_qkv(hidden_states)
        q, k, v, *of_counterpart = qkv.split(self.qkv_sizes, dim=-1)
        if self.q_norm is not None:
            q, k = MiniMaxM2RMSNormTP.forward_qk(self.q_norm, self.k_norm, q, k, of_counterpart, self.node)
        else:
            q, k = q.contiguous(), k.contiguous()
        q, k = self.rotary_emb(positions, q, k)
        return hidden_states, forward_batch, (q, k, v, False)

    def forward_core(self, prepared, in_parts: bool = False) -> torch.Tensor | Parts:
        hidden_states, forward_batch, inputs = prepared
        if inputs is None:
            return hidden_states
        q, k, v, stored = inputs
        attended = attend_if_captured(q, forward_batch, self.attn.layer_id) if stored else None
        if stored and attended is None and self.decode_attention is not None:
            attended = self.decode_attention(q, forward_batch, self.attn.layer_id)
        if attended is None:
            attended = self.attn(q, k, v, forward_batch, save_kv_cache=not stored)
        if in_parts and isinstance(self.project_output, Fp8Linear):
            return self.project_output.in_parts(attended)
        return self.project_output(attended)


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


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope(config: PretrainedConfig) -> tuple[float, dict | None]:
    """RoPE's base, and its parameters, as YaRN's. transformers puts ``rope_theta`` among the parameters.

    Raises:
        ValueError: there is no base, or there are two; as overrides of a config leave it.
    """
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    beside, among = getattr(config, "rope_theta", None), (parameters or {}).get("rope_theta")
    bases = {base for base in (beside, among) if base is not None}
    if len(bases) != 1:
        raise ValueError(
            f"RoPE needs one base: the config has rope_theta {beside} and, among rope_parameters, {among}. "
            f"In --json-model-override-args rope_scaling and rope_parameters replace all parameters, and rope_theta "
            f"beside them changes none: give rope_parameters whole, with rope_theta and partial_rotary_factor."
        )
    return bases.pop(), parameters


def _rotary_dim(config: PretrainedConfig, head_dim: int) -> int:
    """How many of a head's values are rotated: the published configs say rotary_dim, transformers' say a fraction."""
    rotary_dim = getattr(config, "rotary_dim", None)
    if rotary_dim is None:
        rope_parameters = getattr(config, "rope_parameters", None) or {}
        rotary_dim = int(head_dim * rope_parameters.get("partial_rotary_factor", 1.0))
    return rotary_dim


class MiniMaxM2DecoderLayer(LayerStages):
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
        self.layer_communicator = MiniMaxM2LayerCommunicator(
            layer_id,
            one_launch_for(self.input_layernorm),
            layer_scatter_modes=self.layer_scatter_modes,
            input_layernorm=self.input_layernorm,
            post_attention_layernorm=self.post_attention_layernorm,
            # Over all of TP it would add the same experts once for each of their data-parallel groups.
            allow_reduce_scatter=get_moe_data_parallel_world_size() == 1,
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
        in_parts = self.layer_communicator.adds_parts(hidden_states.shape[0])
        hidden_states = self.self_attn(positions, hidden_states, forward_batch, in_parts)
        hidden_states, residual = self.layer_communicator.prepare_mlp(hidden_states, residual, forward_batch)
        return self._experts_and_postprocess(hidden_states, residual, forward_batch)

    def _experts_and_postprocess(self, hidden_states, residual, forward_batch: ForwardBatch):
        reduction = ExpertReduction.of(self.layer_communicator, forward_batch)
        in_parts = reduction is ExpertReduction.NEXT_NORM and self.layer_communicator.adds_parts(hidden_states.shape[0])
        hidden_states = self.block_sparse_moe(hidden_states, forward_batch, reduction, in_parts)
        if reduction is ExpertReduction.NEXT_NORM:
            hidden_states._sglang_needs_allreduce_fusion = True  # the engine's sign to the next layer
            return hidden_states, residual
        return self.layer_communicator.postprocess_layer(hidden_states, residual, forward_batch)


def _is_last_of_stage(layer_id: int, num_layers: int) -> bool:
    """The last layer of a pipeline stage has no next norm on this rank that could take its reduction over."""
    pp_group = get_pp_group()
    _, end = get_pp_indices(num_layers, pp_group.rank_in_group, pp_group.world_size)
    return layer_id == end - 1


class MiniMaxM2Model(nn.Module):
    """Embedding, the layers of this pipeline stage, final norm."""

    fall_back_to_pt_during_load = False

    def __init__(self, config: PretrainedConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""):
        super().__init__()
        self.pp_group = get_pp_group()
        if is_dp_attention_enabled():
            # A later stage gathers what it received before its first forward pass, in which the engine would set this.
            set_dp_buffer_len(0, 0, False)
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
            if input_embeds is None:
                hidden_states = self.embed_tokens(input_ids)
            else:  # in bfloat16, to which the engine casts a request's vectors whatever the model is in
                hidden_states = input_embeds.to(self.embed_tokens.weight.dtype)
            residual = None
        else:
            assert pp_proxy_tensors is not None, "a later pipeline stage needs the tensors of the stage before it"
            hidden_states, residual = pp_proxy_tensors["hidden_states"], pp_proxy_tensors["residual"]

        captured: list[torch.Tensor] = []
        # Overlapped stages neither capture nor start from a pipeline's scattered tensors: then one after the other.
        if forward_batch.can_run_tbo and not self.layers_to_capture and self.pp_group.world_size == 1:
            layers = self.layers[self.start_layer : self.end_layer]
            hidden_states, residual = forward_overlapped(layers, positions, hidden_states, forward_batch, residual)
        else:
            hidden_states, residual = self._forward_layers(positions, hidden_states, forward_batch, residual, captured)

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
            with recorded_as(layer_id):
                hidden_states, residual = self.layers[layer_id](
                    positions,
                    hidden_states,
                    forward_batch,
                    residual,
                    captured if layer_id in self.layers_to_capture else None,
                )
        return hidden_states, residual


class MiniMaxM2ForCausalLM(nn.Module):
    """The model with its language-model head, and what the engine asks of a model."""

    # Names of the checkpoint's projections by the fused projection that holds them.
    packed_modules_mapping = {  # noqa: RUF012 (the engine reads a plain class attribute)
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, config: PretrainedConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""):
        super().__init__()
        check_experts(config, method_of(quant_config))
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
        self.prefill_attention = choose_prefill_attention(self.model.layers[self.model.start_layer].self_attn)
        self.prefill_graphs = choose_prefill_graphs(self.model)
        prepare_fused_all_reduce(config.hidden_size)

    # The engine makes a KV cache for the layers from start_layer to end_layer, and for all of the model's without them.
    @property
    def start_layer(self) -> int:
        return self.model.start_layer

    @property
    def end_layer(self) -> int:
        return self.model.end_layer

    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.get_input_embeddings(input_ids)

    def get_hidden_dim(self, module_name: str, layer_idx: int) -> tuple[int, int]:
        """Inputs and outputs of a module that LoRA adapts, from which the engine makes a rank's buffers.

        It divides the outputs by the ranks, so a replicated KV head counts as often as it is held.

        Raises:
            ValueError: it would leave adapters of that module out, or fail at them later.
        """
        if module_name in ("gate_up_proj_moe", "down_proj_moe"):
            check_adapted_experts(self.model.layers[self.start_layer].block_sparse_moe.experts)
        inputs, outputs = get_hidden_dim(module_name, self.config, self.model, layer_idx)
        if module_name == "qkv_proj":
            head_dim = _head_dim(self.config)
            shards = shard_attention(
                self.config.num_attention_heads, self.config.num_key_value_heads, get_attention_tp_size()
            )
            outputs = head_dim * (shards.q.num_heads + 2 * shards.kv.replicas * shards.kv.num_heads)
        return inputs, outputs

    def get_embed_and_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.embed_tokens.weight, self.lm_head.weight

    @property
    def routed_experts_weights_of_layer(self) -> dict[int, list[torch.Tensor]]:
        """The experts' weights of this stage's layers, for EPLB."""
        layers = range(self.model.start_layer, self.model.end_layer)
        return {layer_id: self.model.layers[layer_id].block_sparse_moe.expert_weights() for layer_id in layers}

    def set_eagle3_layers_to_capture(self, layer_ids: list[int] | None = None) -> None:
        """Asks for the outputs of ``layer_ids`` (0-based), or, where none were asked for before, of EAGLE3's three.

        The engine calls this without any before it captures graphs, and with the draft model's layers after that; that
        it has these when graphs are captured is :mod:`sglang_minimax.eagle3`'s doing.

        Raises:
            ValueError: an unknown layer, or a pipeline, whose earlier stages could not pass their outputs on.
        """
        if not self.pp_group.is_last_rank:
            return
        if self.pp_group.world_size > 1:
            raise ValueError(
                f"EAGLE3 needs all layers on one pipeline stage, and --pp-size is {self.pp_group.world_size}"
            )
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
        hidden_states = run_model(self, input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors)
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

        The first load of a checkpoint must fill every parameter. Those after it may bring a part, as weight updates do,
        and so may all where the engine filled the parameters without this method: dummies, its own sharded format, a
        copy from another server.

        Raises:
            ValueError: names, shapes or dtypes that do not fit, or parameters left unfilled; all in one message.
        """
        filled = CheckedWeights(self).load(weights, whole=not self.weights_loaded and not engine_fills_weights())
        self.weights_loaded = True
        return filled


EntryClass = MiniMaxM2ForCausalLM
