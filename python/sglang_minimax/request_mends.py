"""Requests that are right, and for which the engine's own code would end the server or lose the answer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from sglang_minimax.adjustments import EngineModule, EngineObject


def pass_over_requests_without_token_ids(module: EngineModule) -> None:
    """Beside one with ``token_ids_logprob``, a request that asks for other log-probabilities.

    In a prefill the engine makes a tensor of its token ids, of which there are none; in decode it leaves a list where
    it later wants a tensor.
    """
    of_token_ids = module.get_token_ids_logprobs_raw

    @functools.wraps(of_token_ids)
    def of_token_ids_or_none(logprobs: Any, token_ids: Sequence[list[int] | None], *args: Any, **kwargs: Any) -> Any:
        return of_token_ids(logprobs, [ids or [] for ids in token_ids], *args, **kwargs)

    module.get_token_ids_logprobs_raw = of_token_ids_or_none


def replace_all_of_a_session(module: EngineModule) -> None:
    """``replace`` without ``rid``: the engine takes requests out of a dictionary while it goes through it."""
    create_req = module.Session.create_req

    @functools.wraps(create_req)
    def create_after_clearing(self: EngineObject, req: EngineObject, *args: Any, **kwargs: Any) -> Any:
        parameters = req.session_params
        if not self.streaming and parameters.replace and parameters.rid is None:
            for node in self.req_nodes.values():
                node.abort()
                node.children = []
            self.req_nodes.clear()
        return create_req(self, req, *args, **kwargs)

    module.Session.create_req = create_after_clearing


def find_calls_behind_reasoning(module: EngineModule) -> None:
    """Whole answers with ``--reasoning-parser minimax-append-think``, which begin with the reasoning.

    Where calls are required, what is behind it is JSON: the engine reads all of it as JSON and finds none. Else it
    finds those, too, that the model only quoted while it thought.
    """
    process = module.OpenAIServingChat._process_tool_calls

    @functools.wraps(process)
    def behind_reasoning(self: EngineObject, text: str, *args: Any, **kwargs: Any) -> Any:
        reasoning, end, answer = text.partition("</think>")
        if not end or self.reasoning_parser != "minimax-append-think":
            return process(self, text, *args, **kwargs)
        result = process(self, answer, *args, **kwargs)
        return result._replace(remaining_text=reasoning + end + result.remaining_text)

    module.OpenAIServingChat._process_tool_calls = behind_reasoning


ADJUSTMENTS = [
    ("sglang.srt.entrypoints.openai.serving_chat", find_calls_behind_reasoning),
    ("sglang.srt.layers.utils.logprob", pass_over_requests_without_token_ids),
    ("sglang.srt.managers.session_controller", replace_all_of_a_session),
]
