"""Decode attention below the server, on CPU ranks in Triton's interpreter, with the engine's own Triton backend.

The kernel, the batches that it reads and the model's choice of it are those of a GPU; so is the engine's prefill.
``test_decode_attention.py`` runs this file in a process of its own, since Triton reads TRITON_INTERPRET when it is
imported.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layouts import simulations
from layouts.harness import run_layout
from layouts.matrix import Oracles, distributions
from layouts.rows import CHUNK, SHAPES, STEPS, TOLERANCE, small
from sglang.srt.layers.minimax_decode_attention import DecodeAttention
from sglang.srt.models import minimax_m2
from unit.interpreted import compute_as_a_gpu

SHAPE, LAYERS = "heads of 128", 2
LAYOUTS = {
    "TP1": dict(tp=1, prompts=[[0, 1, 2, 3]]),
    "TP4, replicas": dict(tp=4, prompts=[[0, 1, 2, 3]]),
    "TP2 DP2, one idle": dict(tp=2, dp=2, prompts=[[], [0, 1, 2, 3]]),
}


def watch_decodes(runner):
    """A probe: (decode steps of this rank, how often a layer attended in one, how often ours did)."""
    counts = {"steps": 0, "layers": 0, "ours": 0}
    forward, attend = runner.forward, DecodeAttention.__call__

    def count_steps(forward_batch, *args, **kwargs):
        counts["steps"] += forward_batch.forward_mode.is_decode()
        return forward(forward_batch, *args, **kwargs)

    def count_layers(self, q, forward_batch, layer_id):
        out = attend(self, q, forward_batch, layer_id)
        counts["layers"] += forward_batch.forward_mode.is_decode()
        counts["ours"] += out is not None
        return out

    runner.forward = count_steps
    DecodeAttention.__call__ = count_layers
    return lambda: counts


@pytest.fixture(scope="module")
def oracles(tmp_path_factory):
    return Oracles(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_decode_step_is_ours_and_gives_the_references_answers(name, oracles, monkeypatch):
    compute_as_a_gpu(monkeypatch)
    monkeypatch.setitem(SHAPES, SHAPE, small(num_key_value_heads=2, head_dim=128, num_hidden_layers=LAYERS))
    checkpoint, _, completions = oracles.of(SHAPE)
    simulations.one_kernel(monkeypatch)

    def choose(heads, kv_heads, head_dim, is_stored):
        return DecodeAttention(kv_heads, torch.device("cpu")) if is_stored else None

    monkeypatch.setattr(minimax_m2, "choose_decode_attention", choose)
    layout = dict(LAYOUTS[name])
    placed = layout.pop("prompts")
    result = run_layout(
        checkpoint, **layout, steps=STEPS, chunk=CHUNK, probe=watch_decodes,
        prompts_by_dp_rank=[[oracles.prompts[index] for index in own] for own in placed],
        forced_tokens=[[completions[index].tokens for index in own] for own in placed],
        server_arguments={"attention_backend": "triton"},
    )  # fmt: skip
    for own, answers in zip(placed, result.logprobs, strict=True):
        for index, found in zip(own, answers, strict=True):
            assert np.abs(found - distributions(completions[index])).max() < TOLERANCE
    for rank, counts in enumerate(result.probed):
        has_prompts = placed[rank // (layout["tp"] // layout.get("dp", 1))]
        assert (counts["steps"] > 0) == bool(has_prompts)
        assert counts["ours"] == counts["layers"] == LAYERS * counts["steps"]
