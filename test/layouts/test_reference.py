"""Sixteen greedy tokens, chosen by the ranks themselves, are transformers' tokens with transformers' log-probabilities.

The rows of the matrix are given the tokens and go six steps; these few of them go on by themselves for sixteen.
"""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from layouts.harness import run_layout
from layouts.matrix import distributions
from layouts.rows import FIFTH, PROMPT_LENGTHS, ROWS, SHAPES, TOLERANCE
from safetensors.torch import load_file, save_file

from sglang_minimax.checkpoints import SmallModel, write_checkpoint
from sglang_minimax.reference import Reference

STEPS = 16
CASES = ["tp1", "tp4_kv2", "tp16_kv8", "tp4_dp2", "tp4_dp4_one_idle", "tp4_dp4_three_idle", "tp4_ep4"]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """(checkpoint, prompts, greedy completions with all log-probabilities) of a shape, made once each."""
    made: dict = {}

    def of(shape: str):
        if shape not in made:
            generator = np.random.default_rng(seed=1)
            words = SHAPES[shape].vocab_size - 3  # without the special tokens
            prompts = [generator.integers(0, words, length).tolist() for length in PROMPT_LENGTHS]
            path = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), SHAPES[shape])
            made[shape] = path, prompts, Reference(path).greedy(prompts, STEPS, top_k=SHAPES[shape].vocab_size)
        return made[shape]

    return of


@pytest.mark.parametrize("name", CASES)
def test_sixteen_greedy_tokens(oracle, name):
    row = ROWS[name]
    checkpoint, prompts, expected = oracle(row.shape)
    placed = [[index for index in own if index != FIFTH] for own in row.placed]  # which shares a prefix of the matrix's
    result = run_layout(
        checkpoint,
        tp=row.tp,
        dp=row.dp,
        ep=row.ep,
        prompts_by_dp_rank=[[prompts[index] for index in own] for own in placed],
        steps=STEPS,
        timeout_s=240,
    )
    for own, tokens, logprobs in zip(placed, result.tokens, result.logprobs, strict=True):
        for index, answer, rows in zip(own, tokens, logprobs, strict=True):
            assert answer == expected[index].tokens
            reference = distributions(expected[index])
            assert rows.shape == reference.shape == (STEPS, reference.shape[1])
            assert np.abs(rows - reference).max() < TOLERANCE


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": SmallModel.rope_theta}
QK_NORMS = r"\.(q|k)_norm\."
KINDS = {  # what of the config is otherwise, and which tensors are left out, than in the published models
    "eps": ({}, None),
    "YaRN": ({"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, None),
    "a fraction that is rotated": ({"rotary_dim": None}, None),
    "tied embeddings": ({"tie_word_embeddings": True}, r"^lm_head\."),
    "a head beside tied embeddings": ({"tie_word_embeddings": True}, None),
    "no bias of the router": ({"use_routing_bias": False}, r"\.e_score_correction_bias$"),
    "no QK norm": ({"use_qk_norm": False}, QK_NORMS),
}


@pytest.mark.parametrize(("kind", "pp"), [*((kind, 1) for kind in KINDS), ("tied embeddings", 2)])
def test_a_config_unlike_the_published_ones_is_served_as_transformers_reads_it(tmp_path, kind, pp):
    """In all of them eps is so large that a norm with another one shows, and q and k are drawn to be of its size."""
    changes, left_out = KINDS[kind]
    shape = dataclasses.replace(SHAPES["2 KV heads"], rms_norm_eps=0.05)
    for folder in ("served", "meant"):
        write_checkpoint(tmp_path / folder, shape)
        path = tmp_path / folder / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    tensors = load_file(tmp_path / "served" / "model.safetensors")
    served = {name: tensor for name, tensor in tensors.items() if left_out is None or not re.search(left_out, name)}
    save_file(served, tmp_path / "served" / "model.safetensors", metadata={"format": "pt"})
    # transformers always has a head of its own in a file, a bias, which then adds nothing, and QK norms.
    instead = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    meant = {name: tensor if name in served else instead.get(name, tensor * 0) for name, tensor in tensors.items()}
    save_file(meant, tmp_path / "meant" / "model.safetensors", metadata={"format": "pt"})
    reference = Reference(tmp_path / "meant")
    if left_out == QK_NORMS:
        for layer in reference.model.model.layers:
            layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
    prompts = [list(range(300, 340)), [7, 8, 9]]
    expected = reference.greedy(prompts, 3, top_k=shape.vocab_size)
    result = run_layout(
        tmp_path / "served", tp=2, pp=pp, steps=3, prompts_by_dp_rank=[prompts],
        forced_tokens=[[completion.tokens for completion in expected]],
    )  # fmt: skip
    for completion, rows in zip(expected, result.logprobs[0], strict=True):
        assert np.abs(rows - distributions(completion)).max() < TOLERANCE
