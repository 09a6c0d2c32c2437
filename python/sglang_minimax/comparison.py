"""Compares a server's greedy completions with the reference's, number by number.

Both go the same way for as long as they choose the same token, and each such step gives one difference of
log-probabilities. Where they part, the step gives a difference too: how much less likely the reference finds
its own second choice. It is tiny where two tokens are nearly tied and rounding decides, and large where the
server is wrong; after it the two continue different texts and there is nothing left to compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_minimax.reference import Completion

# Float32 on a CPU: other orders of summation, nothing else.
FLOAT32_TOLERANCE = 1e-4

# With less precision a router's choice can tip over at a near tie, and a few numbers then move a lot, in the
# reference run with that precision just as in the server. So the bulk is judged, not the worst.
_BULK = 0.9
_ALLOWED_RATIO = 3.0


@dataclass(frozen=True)
class Answer:
    """What the server said to one prompt: ``tokens`` are ids, or the tokens' texts where an API gives no ids."""

    prompt: str
    text: str
    tokens: Sequence[int] | Sequence[str]
    logprobs: Sequence[float]


@dataclass(frozen=True)
class Comparison:
    """One answer against the reference. ``differences`` has one entry a compared step, in nats."""

    answer: Answer
    expected_text: str
    differences: tuple[float, ...]
    num_steps: int
    parted_at: int | None

    @property
    def largest(self) -> float:
        return max(self.differences)

    @property
    def same_tokens(self) -> bool:
        return self.parted_at is None

    @property
    def same_text(self) -> bool:
        # A character whose last bytes are still to come may be written as a replacement or left out.
        return self.answer.text.rstrip("\ufffd") == self.expected_text.rstrip("\ufffd")


@dataclass(frozen=True)
class Tolerance:
    """``share`` of all differences must be at most ``limit`` (nats); ``why`` says where the limit comes from."""

    limit: float
    share: float
    why: str

    def accepts(self, comparisons: Sequence[Comparison]) -> bool:
        """Whether the answers agree with the reference. Without any answer they do not."""
        differences = [difference for one in comparisons for difference in one.differences]
        if any(one.same_tokens and not one.same_text for one in comparisons):
            return False
        if self.share == 1.0 and not all(one.same_tokens for one in comparisons):
            return False
        return bool(differences) and quantile(differences, self.share) <= self.limit


def exact() -> Tolerance:
    """Every log-probability within 1e-4 and every token the same."""
    return Tolerance(FLOAT32_TOLERANCE, 1.0, "float32 on CPU: only the order of summation differs")


def from_rounding(precise: Sequence[Completion], rounded: Sequence[Completion], dtype: str) -> Tolerance:
    """The tolerance for a server that computes in ``dtype``, from what that precision does to the reference.

    Args:
        precise: the reference's greedy completions in float32.
        rounded: the reference's scores of the same tokens, computed in ``dtype``.
        dtype: its name, for the explanation.
    """
    differences = [
        abs(a - b)
        for one, other in zip(precise, rounded, strict=True)
        for a, b in zip(one.logprobs, other.logprobs, strict=True)
    ]
    scale = quantile(differences, _BULK)
    return Tolerance(
        _ALLOWED_RATIO * scale,
        _BULK,
        f"{_ALLOWED_RATIO:g} times what {dtype} does to {_BULK:.0%} of the reference's own numbers, {scale:.3g}",
    )


def compare(answer: Answer, reference: Completion, token_texts: Sequence[str], text: str) -> Comparison:
    """Compares one answer with the reference's completion of the same prompt.

    Args:
        answer: the server's.
        reference: greedy, with ``top_k`` of at least 2.
        token_texts: the text of each of the reference's tokens, to compare with an answer that has no ids.
        text: the text of the reference's whole completion.

    Raises:
        ValueError: the answer is not as long as the reference's, or a log-probability is not a number.
    """
    expected: Sequence[int | str] = reference.tokens
    if answer.tokens and isinstance(answer.tokens[0], str):
        expected = token_texts
    if not len(answer.tokens) == len(answer.logprobs) == len(expected):
        raise ValueError(
            f"the server gave {len(answer.tokens)} tokens and {len(answer.logprobs)} log-probabilities "
            f"for {answer.prompt!r} where {len(expected)} were asked for"
        )
    if not all(isinstance(value, float) and math.isfinite(value) for value in answer.logprobs):
        raise ValueError(f"a log-probability for {answer.prompt!r} is not finite: {list(answer.logprobs)}")
    differences = []
    for step, (token, logprob) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        if token != expected[step]:
            (_, best), (_, second) = reference.top[step][:2]
            differences.append(max(best - second, abs(logprob - best)))
            return Comparison(answer, text, tuple(differences), len(expected), step)
        differences.append(abs(logprob - reference.logprobs[step]))
    return Comparison(answer, text, tuple(differences), len(expected), None)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of ``values`` that at least ``share`` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
