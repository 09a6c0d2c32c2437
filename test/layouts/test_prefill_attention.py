"""Prefill attention on CPU ranks, as with Triton's backend on a GPU: prompts in chunks, cached prefixes, DP attention.

What the kernel would launch is plain torch, over the memory in which a batch is described.
"""

from __future__ import annotations

import numpy as np
import pytest
from layouts import simulations
from layouts.harness import run_layout
from layouts.matrix import Oracles, distributions
from layouts.rows import CHUNK, NUM_LAYERS, STEPS, TOLERANCE
from sglang.srt.layers import minimax_prefill_attention

SHAPE = "8 KV heads"
LAYOUTS = {
    "TP1": dict(tp=1, prompts=[[0, 1, 2, 3]]),
    "TP2, no more than two requests": dict(tp=2, prompts=[[0, 1, 2, 3]], most=2),
    "TP2 DP2, one idle": dict(tp=2, dp=2, prompts=[[], [0, 1, 2, 3]]),
    "TP4 DP2": dict(tp=4, dp=2, prompts=[[0, 1], [2, 3]]),
}


@pytest.fixture(scope="module")
def oracles(tmp_path_factory):
    return Oracles(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_prefill_is_ours_and_gives_the_references_answers(name, oracles, monkeypatch):
    checkpoint, _, completions = oracles.of(SHAPE)
    simulations.one_kernel(monkeypatch)
    simulations.prefill_attention(monkeypatch)
    layout = dict(LAYOUTS[name])
    placed, most = layout.pop("prompts"), layout.pop("most", minimax_prefill_attention.MAX_REQUESTS)
    monkeypatch.setattr(minimax_prefill_attention, "MAX_REQUESTS", most)
    result = run_layout(
        checkpoint, **layout, steps=STEPS, chunk=CHUNK, probe=simulations.watch_prefills,
        prompts_by_dp_rank=[[oracles.prompts[index] for index in own] for own in placed],
        forced_tokens=[[completions[index].tokens for index in own] for own in placed],
    )  # fmt: skip
    for own, answers in zip(placed, result.logprobs, strict=True):
        for index, found in zip(own, answers, strict=True):
            assert np.abs(found - distributions(completions[index])).max() < TOLERANCE
    for rank, prefills in enumerate(result.probed):
        if not placed[rank // (layout["tp"] // layout.get("dp", 1))]:
            continue
        assert any(one.longest > one.tokens for one in prefills), "some have a part in the KV cache"
        for one in prefills:
            assert one.launches == NUM_LAYERS * (one.requests <= most), one
        assert {one.requests <= most for one in prefills} == ({True, False} if "most" in LAYOUTS[name] else {True})
