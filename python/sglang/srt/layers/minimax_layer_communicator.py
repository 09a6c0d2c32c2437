"""The layer communicator of MiniMax-M2: the engine's, with all-reduce, residual add and norm in one launch of ours.

The rules are in :mod:`minimax_all_reduce_norm_paths`, the kernel is in :mod:`minimax_all_reduce_norm`; here the
engine's objects are turned into what those two know, once for all layers of a model.
"""

from __future__ import annotations

import torch
from sglang.srt.distributed import get_moe_data_parallel_world_size, get_tp_group
from sglang.srt.layers import flashinfer_comm_fusion  # type: ignore[attr-defined]
from sglang.srt.layers.communicator import (
    FUSE_ALLREDUCE_MAX_BATCH_SIZE,
    LayerCommunicator,
    apply_flashinfer_allreduce_fusion,
)
from sglang.srt.layers.dp_attention import get_attention_tp_size, is_dp_attention_enabled
from sglang.srt.layers.minimax_all_reduce_norm import AllReduceNorm, row_exchange_of
from sglang.srt.layers.minimax_all_reduce_norm_paths import (
    FLASHINFER_BY_DEFAULT,
    reason_against_one_launch,
    reason_against_peers,
)
from sglang.srt.layers.minimax_log import log_once
from sglang.srt.layers.minimax_nvlink import peers_are_reachable
from sglang.srt.layers.minimax_watchers import reason_of_watchers
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.server_args import get_global_server_args
from sglang.srt.utils import is_cuda
from torch import nn


class MiniMaxM2LayerCommunicator(LayerCommunicator):
    """The engine's ``LayerCommunicator``, which sums the ranks' parts and norms the sum in one launch where it may.

    Both sums of a layer take it: that of attention, before the experts, and that of the experts, whose output carries
    the engine's sign of a deferred all-reduce to the next layer. With more tokens than the launch is for, the engine's
    way runs, as it does without tokens. A compiled graph serves every number of tokens, so it does not ask.

    Args:
        layer_id: of the layer, for errors.
        all_reduce_norm: of :func:`one_launch_for`, or None: the engine's way everywhere.
        arguments: those of ``LayerCommunicator``.
    """

    def __init__(self, layer_id: int, all_reduce_norm: AllReduceNorm | None, **arguments) -> None:
        super().__init__(**arguments)
        self.layer_id, self.all_reduce_norm = layer_id, all_reduce_norm
        # To whoever looks, a module returns tensors.
        self.takes_parts = reason_of_watchers(get_global_server_args()) is None

    def prepare_attn(
        self, hidden_states, residual, forward_batch, quant_format="", post_residual_addition=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        deferred = getattr(hidden_states, "_sglang_needs_allreduce_fusion", False)
        if self.all_reduce_norm is None or not deferred:
            return super().prepare_attn(hidden_states, residual, forward_batch, quant_format, post_residual_addition)
        if post_residual_addition is not None:
            residual = residual + post_residual_addition
        return self._all_reduce_and_norm(hidden_states, residual, self.input_layernorm)

    def prepare_mlp(self, hidden_states, residual, forward_batch, cache=None) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._takes(hidden_states.shape[0]):
            return super().prepare_mlp(hidden_states, residual, forward_batch, cache)
        return self._all_reduce_and_norm(hidden_states, residual, self.post_attention_layernorm)

    def should_fuse_mlp_allreduce_with_next_layer(self, forward_batch: ForwardBatch) -> bool:
        if get_moe_data_parallel_world_size() > 1:
            return False  # that sum is over all of TP, and the experts' is over each of their data-parallel groups
        if self.all_reduce_norm is None:
            return super().should_fuse_mlp_allreduce_with_next_layer(forward_batch)
        return not self.is_last_layer and self._takes(forward_batch.input_ids.shape[0])

    def adds_parts(self, tokens: int) -> bool:
        """Whether what is summed next over the ranks may come in parts (:mod:`minimax_parts`), of so many tokens."""
        return self.takes_parts and self._takes(tokens) and not torch.compiler.is_compiling()

    def _takes(self, tokens: int) -> bool:
        if self.all_reduce_norm is None:
            return False
        return torch.compiler.is_compiling() or 0 < tokens <= self.all_reduce_norm.max_tokens

    def _all_reduce_and_norm(self, hidden_states, residual, norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.all_reduce_norm is not None
        return self.all_reduce_norm(hidden_states, residual, norm.weight, norm.variance_epsilon, layer_id=self.layer_id)


_operators: dict[tuple, AllReduceNorm] = {}


def one_launch_for(norm: nn.Module) -> AllReduceNorm | None:
    """The one launch for norms like ``norm``, or None where all-reduce and norm stay the engine's.

    Collective over the TP group, and the same answer on every rank. Where there is one, FlashInfer's fused
    all-reduce + norm, which had been turned on for want of it, is turned off.
    """
    reason = reason_against(norm)
    if reason is not None:
        log_once(f"All-reduce, residual add and RMSNorm: not one launch of ours: {reason}.")
        return None
    group = get_tp_group()
    key = group.unique_name, norm.hidden_size, norm.weight.device
    if key not in _operators:
        _operators[key] = build(group, norm)
    operator = _operators[key]
    log_once(
        f"All-reduce, residual add and RMSNorm: one launch up to {operator.max_tokens} tokens, rows exchanged "
        f"between {group.world_size} GPUs over NVLink."
    )
    get_global_server_args().enable_flashinfer_allreduce_fusion = False
    return operator


def build(group, norm: nn.Module) -> AllReduceNorm:
    """Allocates the exchange, and uses it once between these very GPUs; collective over ``group``.

    Raises:
        RuntimeError: on every rank, where one of them got a wrong sum, or none.
    """
    operator = AllReduceNorm(group, row_exchange_of(group, norm.weight.device, norm.hidden_size))
    failure = None
    try:
        wrong = operator.check(norm.weight.data)
    except Exception as error:  # whatever it is: the peers, whose own launches fail for want of this rank, must hear it
        wrong, failure = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", error
    raise_if_wrong(group, wrong, failure)
    return operator


def raise_if_wrong(group, wrong: str | None, failure: Exception | None = None) -> None:
    """Ends all ranks of ``group`` if something is wrong on one, ``failure`` being this rank's cause; collective."""
    said = group.all_gather_object(wrong)
    if any(said):
        found = "; ".join(f"rank {rank}: {what}" for rank, what in enumerate(said) if what)
        raise RuntimeError(
            f"all-reduce and norm in one launch over NVLink gave wrong results or none when it was tried out between "
            f"these GPUs, so nothing is served with it ({found}). Start with --disable-custom-all-reduce, which takes "
            f"other ways, run sglang-minimax doctor, and please report this line"
        ) from failure


def reason_against(norm: nn.Module) -> str | None:
    """Why not one launch, or None. Collective over the TP group; it takes every rank the same way."""
    args, group = get_global_server_args(), get_tp_group()
    by_default = getattr(args, FLASHINFER_BY_DEFAULT, False)
    reason = reason_against_one_launch(
        num_ranks=group.world_size,
        cuda=norm.weight.is_cuda and is_cuda(),
        bfloat16=norm.weight.dtype == torch.get_default_dtype() == torch.bfloat16,
        hidden_size=norm.hidden_size,
        dp_attention=is_dp_attention_enabled(),
        attn_cp_size=args.attn_cp_size,
        moe_dp_size=get_moe_data_parallel_world_size(),
        moe_a2a_backend=args.moe_a2a_backend,
        two_batch_overlap=args.enable_two_batch_overlap,
        deterministic=bool(args.enable_deterministic_inference),
        pdmux=args.enable_pdmux,
        memory_saver=args.enable_memory_saver,
        flashinfer=args.enable_flashinfer_allreduce_fusion and not by_default,
    )
    reason = reason or reason_of_watchers(args)
    return reason or reason_against_peers(peers_are_reachable(group, norm.weight.device))


def prepare_fused_all_reduce(hidden_size: int) -> None:
    """Makes sure that FlashInfer's fused all-reduce + norm works on every rank, or turns it off on all of them.

    Where the layers have one launch of ours for this, it is off already.

    The engine makes its workspace in the middle of the first forward pass; where that fails it goes on with a norm
    of one rank's part, without the all-reduce. Here ``--enable-memory-saver`` would take the workspace's pointers away
    with the weights, beside which they are allocated.
    """
    if get_attention_tp_size() == 1 or not apply_flashinfer_allreduce_fusion(batch_size=1):
        return
    if get_global_server_args().enable_memory_saver:
        get_global_server_args().enable_flashinfer_allreduce_fusion = False
        log_once("FlashInfer's fused all-reduce + norm is off: --enable-memory-saver would take its pointers away.")
        return
    works = flashinfer_comm_fusion.ensure_workspace_initialized(
        max_token_num=FUSE_ALLREDUCE_MAX_BATCH_SIZE, hidden_dim=hidden_size, dtype=torch.get_default_dtype()
    )
    if not all(get_tp_group().all_gather_object(works)):
        get_global_server_args().enable_flashinfer_allreduce_fusion = False
        log_once("FlashInfer's fused all-reduce + norm is not available here: all-reduce and norm run apart, slower.")
