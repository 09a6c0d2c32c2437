"""Stand-ins, exact and slow, for what only GPUs have: each takes a path through the model that a CPU would not.

They are put in place in the test's own process and reach the ranks through the fork. What a test shows with one of
these is that the model does its part on that path; the real kernel's numbers are not what is tested.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from sglang.srt.distributed import attention_tensor_model_parallel_all_reduce, get_tp_group
from sglang.srt.layers import communicator, flashinfer_comm_fusion
from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.layers.moe.fused_moe_triton import layer as fused_moe
from sglang.srt.layers.moe.token_dispatcher.base import BaseDispatcher
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput, StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput, TopK
from sglang.srt.models import minimax_m2


def fused_all_reduce(monkeypatch) -> None:
    """FlashInfer's all-reduce + residual + RMSNorm as three steps in float32, wherever the engine would use it."""

    def fused(input_tensor, residual, weight, eps, use_attn_tp_group=True, **_):
        assert use_attn_tp_group
        total = attention_tensor_model_parallel_all_reduce(input_tensor).float() + residual.float()
        normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight.float()
        return normed.to(input_tensor.dtype), total.to(residual.dtype)

    monkeypatch.setattr(
        communicator, "apply_flashinfer_allreduce_fusion", lambda tokens: tokens > 0 and not is_dp_attention_enabled()
    )
    monkeypatch.setattr(flashinfer_comm_fusion, "flashinfer_allreduce_residual_rmsnorm", fused)


def token_exchange(monkeypatch) -> None:
    """An a2a backend: asked for as ``moe_a2a_backend="customized"``, which the engine has a name for and no code."""
    monkeypatch.setattr(fused_moe, "create_moe_dispatcher", TokenExchange)
    forward_native = TopK.forward_native

    def with_padding(self, hidden_states, router_logits, *, num_token_non_padded=None, **info):
        """A real backend does not send padding. The engine's top-k in plain torch cannot mark it: here it travels."""
        return forward_native(self, hidden_states, router_logits, **info)

    monkeypatch.setattr(TopK, "forward_native", with_padding)


def fp4_all_gather(monkeypatch) -> None:
    """The FP4 all-gather's path with tokens that are gathered as they are, not quantised."""
    for module in (communicator, minimax_m2):
        monkeypatch.setattr(module, "should_use_flashinfer_cutlass_moe_fp4_allgather", lambda: True)
    token_exchange(monkeypatch)


class TokenExchange(BaseDispatcher):
    """Every rank gets every rank's tokens, computes its own experts' part, and gives each rank its tokens' sum."""

    def __init__(self, config) -> None:
        super().__init__()
        group = get_tp_group()
        self.rank, self.ranks, self.group = group.rank_in_group, group.world_size, group.cpu_group
        first = self.rank * config.num_local_experts
        self.own = torch.full((config.num_experts,), -1)
        self.own[first : first + config.num_local_experts] = torch.arange(config.num_local_experts)
        self.sizes: dict[int, list[int]] = {}
        self.pending: dict[int, object] = {}

    def dispatch(self, hidden_states, topk_output) -> StandardDispatchOutput:
        self.dispatch_a(hidden_states, topk_output)
        return self.dispatch_b()

    def combine(self, combine_input) -> torch.Tensor:
        self.combine_a(combine_input)
        return self.combine_b()

    def dispatch_a(self, hidden_states, topk_output, tbo_subbatch_index=None) -> None:
        half = tbo_subbatch_index or 0
        sizes: list = [None] * self.ranks
        dist.all_gather_object(sizes, hidden_states.shape[0], group=self.group)
        self.sizes[half] = sizes
        gathered = [self._gather(part, sizes) for part in (hidden_states, topk_output.topk_weights)]
        ids = self.own[self._gather(topk_output.topk_ids.long(), sizes)]
        self.pending[half] = StandardDispatchOutput(
            gathered[0], None, StandardTopKOutput(gathered[1], ids.int(), topk_output.router_logits)
        )

    def dispatch_b(self, tbo_subbatch_index=None) -> StandardDispatchOutput:
        return self.pending.pop(tbo_subbatch_index or 0)

    def combine_a(self, combine_input: StandardCombineInput, tbo_subbatch_index=None) -> None:
        half = tbo_subbatch_index or 0
        total = combine_input.hidden_states.clone()
        dist.all_reduce(total, group=self.group)
        start = sum(self.sizes[half][: self.rank])
        self.pending[half] = total[start : start + self.sizes[half][self.rank]].clone()

    def combine_b(self, tbo_subbatch_index=None) -> torch.Tensor:
        return self.pending.pop(tbo_subbatch_index or 0)

    def _gather(self, part: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        parts = [part.new_empty(size, *part.shape[1:]) for size in sizes]
        for rank, received in enumerate(parts):
            if rank == self.rank:
                received.copy_(part)
            dist.broadcast(received, dist.get_global_rank(self.group, rank), group=self.group)
        return torch.cat(parts)
