"""The choice between one kernel and separate launches from the qkv projection to attention, made when a layer is built.

The rules are in :mod:`minimax_qk_norm_paths`, the kernel is in :mod:`minimax_qk_norm_rope`; here the engine's objects
are turned into what those two know.
"""

from __future__ import annotations

import torch
from sglang.srt.compilation.piecewise_context_manager import get_forward_context
from sglang.srt.layers.dp_attention import get_attention_tp_group
from sglang.srt.layers.minimax_log import log_once
from sglang.srt.layers.minimax_parts import Parts
from sglang.srt.layers.minimax_qk_norm_paths import reason_against_one_kernel, reason_against_store
from sglang.srt.layers.minimax_qk_norm_rope import QKNormRope, operators
from sglang.srt.layers.minimax_watchers import reason_of_watchers
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.server_args import get_global_server_args
from sglang.srt.utils import is_cuda
from sglang.srt.utils.custom_op import register_custom_op
from torch import nn


class FusedAttentionInputs:
    """QK norm over all ranks, RoPE and KV-cache store of one layer in one kernel; made by :func:`choose_inputs`."""

    def __init__(
        self,
        operator: QKNormRope,
        q_norm: nn.Module,
        k_norm: nn.Module,
        rotary_emb,
        stores: bool,
        contiguous: bool = False,
    ) -> None:
        """``stores``: where it can. ``contiguous``: prefill's attention copies k and v that are views of qkv."""
        self.operator, self.q_norm, self.k_norm, self.rotary_emb = operator, q_norm, k_norm, rotary_emb
        self.stores, self.contiguous = stores, contiguous

    def adds_parts(self) -> bool:
        """Whether the projection may leave its output in parts."""
        return self.operator.adds_parts and not torch.compiler.is_compiling()

    def __call__(
        self, qkv: torch.Tensor | Parts, positions: torch.Tensor, forward_batch: ForwardBatch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
        """From the output of the qkv projection, [tokens, (heads + 2 KV heads) a rank * head_dim] and a counterpart's q
        and k if there is one, which is overwritten, to q, k, v and whether k and v are in the KV cache already."""
        if self.stores and torch.compiler.is_compiling() and is_piece_of_graphs(forward_batch, qkv.dtype):
            return *self._of_piece(qkv, positions), True
        cache = kv_cache_of(forward_batch, self.operator.layer_id, qkv.dtype) if self.stores else None
        q, k, v = self.operator(qkv, *self._given(positions), *(cache or ()))
        return q, k, v, cache is not None

    def _given(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the operator takes behind qkv."""
        return self.q_norm.weight, self.k_norm.weight, positions, self.rotary_emb.cos_sin_cache

    def _of_piece(self, qkv: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What attention between two pieces would launch is in the piece before it, where a launch costs no host."""
        q = qkv.new_empty(qkv.shape[0], self.operator.sizes[0])
        minimax_stored_attention_inputs(self.operator.handle, qkv, q, *self._given(positions))
        _, k, v, *_ = qkv.split(self.operator.row_sizes, dim=-1)
        return (q, k.contiguous(), v.contiguous()) if self.contiguous else (q, k, v)


@register_custom_op(mutates_args=["qkv", "q"])
def minimax_stored_attention_inputs(
    operator: int,
    qkv: torch.Tensor,
    q: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
) -> None:
    """A layer's q, its k in ``qkv``, and k and v in the KV cache of the batch whose forward pass this is.

    For piecewise CUDA graphs, whose batches all have their slots at one address. The caches are no arguments, since
    those of all layers would be inputs of the graphs, to be compared at each call."""
    qk_norm_rope, context = operators[operator], get_forward_context()
    assert context is not None, "this graph was compiled as a piece, and is called as none"
    cache = kv_cache_of(context.forward_batch, qk_norm_rope.layer_id, qkv.dtype)
    assert cache is not None, "this graph was compiled to store to the KV cache, which is of another kind now"
    qk_norm_rope.run(qkv, q, q_weight, k_weight, positions, cos_sin_cache, *cache)


def choose_inputs(
    q_norm: nn.Module, k_norm: nn.Module, rotary_emb, head_dim: int, layer_id: int, node=None
) -> FusedAttentionInputs | None:
    """The one kernel for a layer's norms and rotary embedding, or None where the separate launches are taken.

    Collective over the attention-TP group, whose ranks build their layers in the same order. The norms are
    ``MiniMaxM2RMSNormTP``, or both None. ``node``: the group of this node's ranks, where the projection gives a
    counterpart's q and k too.
    """
    server_args = get_global_server_args()
    reason = reason_against_fusing(q_norm, rotary_emb, head_dim)
    if reason is not None:
        log_once(f"QK norm, RoPE and KV store are separate launches, not one kernel: {reason}")
        return None
    against_store = reason_against_store(server_args.get_attention_backends(), server_args.attn_cp_size)
    if against_store is not None:
        log_once(f"The KV store is a launch of its own: {against_store}")
    q_heads, kv_heads = q_norm.shards.num_heads, k_norm.shards.num_heads
    operator = QKNormRope(
        q_heads, kv_heads, head_dim, rotary_emb.rotary_dim, q_norm.variance_epsilon, get_attention_tp_group(),
        layer_id, q_norm.weight.device, shares_gpu=server_args.enable_two_batch_overlap,
        node=node,
    )  # fmt: skip
    copies = server_args.get_attention_backends()[0] == "triton"
    return FusedAttentionInputs(operator, q_norm, k_norm, rotary_emb, against_store is None, contiguous=copies)


def reason_against_fusing(q_norm: nn.Module | None, rotary_emb, head_dim: int) -> str | None:
    """Why a layer takes the separate launches, or None where it takes the one kernel."""
    server_args = get_global_server_args()
    weight = getattr(q_norm, "weight", None)
    return reason_of_watchers(server_args) or reason_against_one_kernel(
        has_norms=weight is not None,
        cuda=weight is not None and weight.is_cuda and is_cuda(),
        head_dim=head_dim,
        rotary_dim=getattr(rotary_emb, "rotary_dim", 0),
        dtype_bytes=torch.get_default_dtype().itemsize,
        plain_rope=rotates_plainly(rotary_emb),
        deterministic=server_args.enable_deterministic_inference,
        pdmux=server_args.enable_pdmux,
        memory_saver=server_args.enable_memory_saver,
    )


def rotates_plainly(rotary_emb) -> bool:
    """Neox pairs by one cache of cosines and sines. A scaling that only fills that cache otherwise still counts."""
    return (
        isinstance(rotary_emb, RotaryEmbedding)
        and rotary_emb.is_neox_style
        and type(rotary_emb).forward_cuda is RotaryEmbedding.forward_cuda
        and type(rotary_emb).forward_native is RotaryEmbedding.forward_native
    )


def kv_cache_of(
    forward_batch: ForwardBatch, layer_id: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """(k_cache, v_cache, out_cache_loc) for a kernel that stores what ``set_kv_buffer`` would, or None.

    None: a cache of another dtype (FP8, with or without scales), one that is laid out or addressed in another way
    (sliding windows, double sparsity, FP4), or a compiled graph, of which the caches of all layers would be inputs;
    pieces of graphs have :func:`minimax_stored_attention_inputs`.

    Padding stores to slot 0, which belongs to nobody, as it does in the engine's own store. The public
    ``get_kv_buffer`` is not called: it waits until the layer's keys of a prefix are back from the host (HiCache), which
    is for those who read. Attention does, and waits then.
    """
    pool = forward_batch.token_to_kv_pool
    if torch.compiler.is_compiling() or not _is_plain(pool, dtype):
        return None
    return pool._get_key_buffer(layer_id), pool._get_value_buffer(layer_id), forward_batch.out_cache_loc


def is_piece_of_graphs(forward_batch: ForwardBatch, dtype: torch.dtype) -> bool:
    """Whether a prefill is being compiled for piecewise CUDA graphs, on a KV cache to which a kernel can store."""
    return (
        get_forward_context() is not None
        and forward_batch.forward_mode.is_extend()
        and _is_plain(forward_batch.token_to_kv_pool, dtype)
    )


def _is_plain(pool, dtype: torch.dtype) -> bool:
    return type(pool) is MHATokenToKVPool and pool.store_dtype == dtype
