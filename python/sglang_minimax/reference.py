"""What the model should answer: transformers in float32, one prompt at a time, without padding or batching.

    python -m sglang_minimax.reference --model-path CHECKPOINT < request.json > answers.json

As a command it keeps transformers in a process of its own, so that its memory is free again before a server
starts. The request is one JSON object:

    {"prompts": [[1, 2, 3], ...], "max_new_tokens": 16}            decode greedily
    {"prompts": [[1, 2, 3], ...], "continuations": [[7, 8], ...]}  score given continuations

with an optional ``"top_k"``; the answer is a list with one :class:`Completion` a prompt, as an object.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TokenIds = Sequence[int]


@dataclass(frozen=True)
class Completion:
    """A continuation of ``prompt`` and how likely the model finds each of its tokens.

    ``logprobs[i]`` is the natural log-probability of ``tokens[i]`` after the prompt and the tokens before it.
    ``top[i]`` holds the ``top_k`` likeliest ``(token, log-probability)`` at that step, likeliest first.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]


class Reference:
    """MiniMax-M2 as transformers computes it, with eager attention and eager experts.

    Args:
        checkpoint: a folder in the published format, not quantised.
        dtype: ``float32`` is the oracle; ``bfloat16`` shows how far rounding alone moves an answer.
        device: where torch runs it.

    Raises:
        ValueError: the checkpoint is quantised, or transformers found tensors missing in it.
    """

    def __init__(self, checkpoint: str | Path, *, dtype: str = "float32", device: str = "cpu") -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(checkpoint)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                f"{checkpoint} is quantised, and the reference computes with the weights as they are: "
                f"give it the unquantised checkpoint"
            )
        self.model, report = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
        # transformers fills what it does not find with random numbers and says so in a warning only.
        missing = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
        if missing:
            raise ValueError(f"{checkpoint} lacks {len(missing)} tensors of the model, first {missing[:3]}")
        self.model.to(device).eval()
        self.device = device

    def greedy(self, prompts: Sequence[TokenIds], max_new_tokens: int, *, top_k: int = 1) -> list[Completion]:
        """The likeliest token at each of ``max_new_tokens`` steps; an end token does not end it."""
        return [self._decode(prompt, max_new_tokens, top_k) for prompt in prompts]

    def score(
        self, prompts: Sequence[TokenIds], continuations: Sequence[TokenIds], *, top_k: int = 1
    ) -> list[Completion]:
        """The log-probability of each token of each continuation, the tokens before it taken as given.

        Raises:
            ValueError: there are not as many continuations as prompts.
        """
        if len(prompts) != len(continuations):
            raise ValueError(f"{len(prompts)} prompts need as many continuations, not {len(continuations)}")
        return [self._forced(prompt, given, top_k) for prompt, given in zip(prompts, continuations, strict=True)]

    def _decode(self, prompt: TokenIds, max_new_tokens: int, top_k: int) -> Completion:
        import torch

        completion = Completion(_checked(prompt), [], [], [])
        cache, step = None, completion.prompt
        with torch.inference_mode():
            for _ in range(max_new_tokens):
                ids = torch.tensor([step], device=self.device)
                output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = output.past_key_values
                distribution = _log_softmax(output.logits[0, -1])
                token = int(distribution.argmax())
                _append(completion, token, distribution, top_k)
                step = [token]
        return completion

    def _forced(self, prompt: TokenIds, given: TokenIds, top_k: int) -> Completion:
        """All steps in one forward pass without a cache: another path through the model than decoding."""
        import torch

        completion = Completion(_checked(prompt), [], [], [])
        with torch.inference_mode():
            ids = torch.tensor([[*completion.prompt, *given]], device=self.device)
            logits = self.model(input_ids=ids, use_cache=False).logits[0]
        for position, token in enumerate(given, start=len(completion.prompt) - 1):
            _append(completion, int(token), _log_softmax(logits[position]), top_k)
        return completion


def _checked(prompt: TokenIds) -> list[int]:
    if not len(prompt):
        raise ValueError("a prompt needs at least one token: there is nothing to continue")
    return [int(token) for token in prompt]


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """``[vocab]`` natural log-probabilities in float64, so that the softmax adds no error to the logits."""
    return logits.double().log_softmax(dim=-1)


def _append(completion: Completion, token: int, distribution: torch.Tensor, top_k: int) -> None:
    top = distribution.topk(top_k)
    completion.tokens.append(token)
    completion.logprobs.append(float(distribution[token]))
    completion.top.append(list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))


def answer(request: dict[str, Any], reference: Reference) -> list[dict[str, Any]]:
    """What the command replies to ``request``: see the module's docstring.

    Raises:
        ValueError: the request has neither or both of ``max_new_tokens`` and ``continuations``.
    """
    top_k = request.get("top_k", 1)
    match ("max_new_tokens" in request, "continuations" in request):
        case (True, False):
            completions = reference.greedy(request["prompts"], request["max_new_tokens"], top_k=top_k)
        case (False, True):
            completions = reference.score(request["prompts"], request["continuations"], top_k=top_k)
        case _:
            raise ValueError("a request has either max_new_tokens or continuations")
    return [dataclasses.asdict(completion) for completion in completions]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_minimax.reference",
        description="Answers a JSON request on standard input with transformers' completions as JSON.",
    )
    parser.add_argument("--model-path", required=True, type=Path, help="a checkpoint in the published format")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    request = json.load(sys.stdin)
    # Libraries print to standard output now and then; the answer must be all there is on it.
    with contextlib.redirect_stdout(sys.stderr):
        reference = Reference(options.model_path, dtype=options.dtype, device=options.device)
        reply = answer(request, reference)
    json.dump(reply, sys.stdout)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
