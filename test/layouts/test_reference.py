"""Sixteen greedy tokens, chosen by the ranks themselves, are transformers' tokens with transformers' log-probabilities.

The rows of the matrix are given the tokens and go six steps; these few of them go on by themselves for sixteen.
"""

from __future__ import annotations

import numpy as np
import pytest
from layouts.harness import run_layout
from layouts.matrix import FIFTH, PROMPT_LENGTHS, ROWS, SHAPES, TOLERANCE, distributions

from sglang_minimax.checkpoints import write_checkpoint
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
