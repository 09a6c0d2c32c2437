"""Two-batch overlap: MiniMax-M2's attention, layer and model as stages, with yields where the network is waited for.

The stages of the experts are with the experts, in ``minimax_m2_moe.py``. What computes is in ``minimax_m2.py``, whose
classes take their stages from here.
"""

from __future__ import annotations

import torch
from sglang.srt.batch_overlap import two_batch_overlap
from sglang.srt.batch_overlap.operations import YieldOperation
from sglang.srt.batch_overlap.operations_strategy import OperationsStrategy
from sglang.srt.layers.communicator import ScatterMode
from sglang.srt.layers.moe import get_moe_a2a_backend
from sglang.srt.layers.moe.token_dispatcher import DeepEPConfig
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.utils import is_cuda
from torch import nn


class AttentionStages(nn.Module):
    """The two stages of ``MiniMaxM2Attention``."""

    def op_prepare(self, state) -> None:
        state.attn_intermediate_state = self.forward_prepare(
            positions=state.positions,
            hidden_states=state.pop("hidden_states_after_comm_pre_attn"),
            forward_batch=state.forward_batch,
        )

    def op_core(self, state) -> None:
        state.hidden_states_after_attn = self.forward_core(state.pop("attn_intermediate_state"))


class LayerStages(nn.Module):
    """The stages of ``MiniMaxM2DecoderLayer``, and their order with those of its attention and its experts."""

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


def _sms_beside_deepep() -> int | None:
    """Multiprocessors left to GEMMs while DeepEP communicates in a prefill."""
    if not (is_cuda() and get_moe_a2a_backend().is_deepep()):
        return None
    return torch.cuda.get_device_properties("cuda").multi_processor_count - DeepEPConfig.get_instance().num_sms


def forward_overlapped(layers, positions, hidden_states, forward_batch, residual):
    """Through ``layers`` in two halves of the batch by turns, one computing while the other's tokens travel.

    The engine finds the stages of a layer by its class name and does not know this one, so they are given here.
    """
    return two_batch_overlap._model_forward_tbo(
        inputs=first_inputs(positions, hidden_states, forward_batch, residual),
        operations_strategy=stages_of(layers, forward_batch.global_forward_mode),
        input_data_scatter_mode=ScatterMode.model_input_output(),
        layer_input_scatter_mode=layers[0].layer_scatter_modes.layer_input_mode,
    )


def first_inputs(positions, hidden_states, forward_batch, residual) -> dict:
    """What enters the first stage, under the names that the stages know."""
    return {
        "positions": positions,
        "hidden_states": hidden_states,
        "forward_batch": forward_batch,
        "residual": residual,
        "zero_allocator": None,
    }


def stages_of(layers, forward_mode: ForwardMode) -> OperationsStrategy:
    """The stages of all ``layers``, one after the other."""
    return OperationsStrategy.concat([layer.overlap_strategy(forward_mode) for layer in layers])
