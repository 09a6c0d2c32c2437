"""Every layout gives the log-probabilities that transformers computes in float32, on one core a rank over gloo."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from layouts.harness import run_layout
from sglang_minimax.checkpoints import SmallModel, write_checkpoint
from sglang_minimax.reference import Reference

STEPS = 16
CHUNK = 16
PROMPT_LENGTHS = (5, 21, 40, 9)  # one chunk, two, three
TOLERANCE = 1e-4  # float32, another order of summation: 1e-5 is seen

SHAPES = {
    "2 KV heads": SmallModel(num_key_value_heads=2),
    "8 KV heads": SmallModel(num_key_value_heads=8),
    "13 experts": SmallModel(num_key_value_heads=2, num_local_experts=13),
}
ALL_ON_ONE = ((0, 1, 2, 3),)


@dataclasses.dataclass(frozen=True)
class Case:
    """One layout of one shape; ``placed`` says which prompts each DP rank has."""

    shape: str
    tp: int
    dp: int = 1
    ep: int = 1
    placed: tuple[tuple[int, ...], ...] = ALL_ON_ONE


CASES = {
    "tp1": Case("2 KV heads", tp=1),
    "tp4_kv2": Case("2 KV heads", tp=4),
    "tp16_kv8": Case("8 KV heads", tp=16),
    "tp4_dp2": Case("2 KV heads", tp=4, dp=2, placed=((0, 1), (2, 3))),
    "tp4_dp2_uneven": Case("2 KV heads", tp=4, dp=2, placed=((0, 1, 2), (3,))),
    "tp4_dp2_one_idle": Case("2 KV heads", tp=4, dp=2, placed=((), (0, 1, 2, 3))),
    "tp4_dp4_three_idle": Case("2 KV heads", tp=4, dp=4, placed=((), (), (0, 1, 2, 3), ())),
    "tp4_dp4_one_idle": Case("2 KV heads", tp=4, dp=4, placed=((0,), (1, 2), (), (3,))),
    "tp4_ep4": Case("2 KV heads", tp=4, ep=4),
    "tp4_dp2_ep2": Case("2 KV heads", tp=4, dp=2, ep=2, placed=((0, 1), (2, 3))),
    "tp4_13_experts": Case("13 experts", tp=4),
}


class Answers:
    """Checkpoints and transformers' answers, each made once and when first asked for."""

    def __init__(self, folder) -> None:
        self.folder = folder
        generator = np.random.default_rng(seed=0)
        self.prompts = [generator.integers(0, 1000, length).tolist() for length in PROMPT_LENGTHS]
        self._made: dict = {}

    def of(self, shape: str) -> tuple[str, list[list[int]], list[np.ndarray]]:
        """(checkpoint, tokens [prompts][STEPS], log-probabilities [prompts] of float64 [STEPS, vocab])."""
        if shape not in self._made:
            model = SHAPES[shape]
            path = write_checkpoint(self.folder / shape.replace(" ", "_"), model)
            completions = Reference(path).greedy(self.prompts, STEPS, top_k=model.vocab_size)
            logprobs = [np.array([_by_token(step) for step in completion.top]) for completion in completions]
            self._made[shape] = str(path), [completion.tokens for completion in completions], logprobs
        return self._made[shape]


def _by_token(distribution: list[tuple[int, float]]) -> list[float]:
    return [logprob for _, logprob in sorted(distribution)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> Answers:
    return Answers(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("name", CASES)
def test_logprobs_are_those_of_transformers(name, answers):
    case = CASES[name]
    checkpoint, tokens, logprobs = answers.of(case.shape)
    result = run_layout(
        checkpoint,
        tp=case.tp,
        dp=case.dp,
        ep=case.ep,
        prompts_by_dp_rank=[[answers.prompts[index] for index in mine] for mine in case.placed],
        steps=STEPS,
        chunk=CHUNK,
    )
    for mine, got_tokens, got_logprobs in zip(case.placed, result.tokens, result.logprobs, strict=True):
        for index, got, got_distribution in zip(mine, got_tokens, got_logprobs, strict=True):
            assert got_distribution.shape == logprobs[index].shape
            difference = np.abs(got_distribution - logprobs[index]).max()
            assert difference < TOLERANCE, f"prompt {index}: log-probabilities differ by up to {difference:.2e}"
            assert got == tokens[index]


def record_padding_modes(runner):
    """A probe: the names of the ways in which DP ranks' tokens were padded, one a forward pass."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    seen = []
    prepare = ForwardBatch.prepare_mlp_sync_batch

    def prepare_and_record(self, model_runner):
        prepare(self, model_runner)
        seen.append((self.dp_padding_mode.name, getattr(self, "_original_forward_mode", self.forward_mode).name))

    ForwardBatch.prepare_mlp_sync_batch = prepare_and_record
    return lambda: seen


def test_idle_ranks_meet_both_padding_modes(answers):
    """The DP cases above are worth what they reach: idle batches, padded to the longest and packed."""
    checkpoint, tokens, _ = answers.of("2 KV heads")
    seen = set()
    for placed in ((0,), (1,), (2,), ()), ((0, 1, 2, 3), (), (), ()):
        result = run_layout(
            checkpoint,
            tp=4,
            dp=4,
            prompts_by_dp_rank=[[answers.prompts[index] for index in mine] for mine in placed],
            steps=3,
            probe=record_padding_modes,
        )
        assert result.tokens[0] == [tokens[index][:3] for index in placed[0]]
        seen |= {mode for modes in result.probed for mode in modes}
    assert {"MAX_LEN", "SUM_LEN"} <= {padding for padding, forward in seen if forward == "IDLE"}
    assert ("SUM_LEN", "EXTEND") in seen and ("MAX_LEN", "DECODE") in seen


def test_bfloat16_stays_near_float32(tmp_path):
    """The same bfloat16 weights: transformers computes in float32, the ranks in bfloat16, on the same tokens."""
    path = write_checkpoint(tmp_path, SmallModel(num_key_value_heads=2, dtype="bfloat16"))
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8]]
    expected = Reference(path).greedy(prompts, STEPS)
    result = run_layout(
        path,
        tp=4,
        dtype="bfloat16",
        prompts_by_dp_rank=[prompts],
        forced_tokens=[[completion.tokens for completion in expected]],
        steps=STEPS,
    )
    for completion, rows in zip(expected, result.logprobs[0], strict=True):
        got = rows[np.arange(STEPS), completion.tokens]
        assert np.abs(got - completion.logprobs).mean() < 0.1
        assert np.abs(got - completion.logprobs).max() < 0.5
