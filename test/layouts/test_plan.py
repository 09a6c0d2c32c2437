"""What the planner says of a rank's bytes, against ranks that have loaded a checkpoint and made their KV cache."""

from __future__ import annotations

import pytest
from layouts.harness import run_layout

from sglang_minimax.checkpoints import SmallModel, write_checkpoint
from sglang_minimax.plan import memory
from sglang_minimax.plan.hardware import GPUS
from sglang_minimax.plan.layout import Flags, settle
from sglang_minimax.plan.shape import read_model


def loaded_bytes(runner):
    """A probe: bytes of the parameters, and of the KV cache for each token that it has room for."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in runner.model.parameters())
    cache = [*runner.token_to_kv_pool.k_buffer, *runner.token_to_kv_pool.v_buffer]
    a_token = sum(buffer[0].numel() * buffer.element_size() for buffer in cache)
    return lambda: (weights, a_token)


@pytest.mark.parametrize(
    "flags",
    [Flags(tp=16, nnodes=2), Flags(tp=4, dp=2, ep=2, enable_dp_attention=True), Flags(tp=2, pp=2)],
    ids=lambda flags: " ".join(flags.words()),
)
def test_a_loaded_rank_holds_the_planned_bytes(tmp_path, flags):
    checkpoint = write_checkpoint(tmp_path, SmallModel(num_hidden_layers=3, vocab_size=1024))
    model = read_model(str(checkpoint))
    layout = settle(flags, model, GPUS["h200"])
    prompts = [[[300, 301]]] * flags.dp
    result = run_layout(
        checkpoint, tp=flags.tp, dp=flags.dp, ep=layout.ep, pp=flags.pp, prompts_by_dp_rank=prompts, steps=1,
        probe=loaded_bytes, server_arguments={"nnodes": flags.nnodes},
    )  # fmt: skip
    for rank, loaded in enumerate(result.probed):
        stage = rank // flags.tp
        weights = sum(memory.weight_bytes(model, layout, stage).values())
        assert loaded == (weights, memory.kv_bytes_per_token(model, layout, stage)), rank
