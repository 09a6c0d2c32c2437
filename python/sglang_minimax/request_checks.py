"""Refuses requests that the engine would let through to its scheduler, where they end the server.

The engine checks lengths and most ranges while a request still belongs to one client. What it does not look at
reaches the ranks, where every request shares a batch: an empty prompt, a token id outside the vocabulary, a
string where a number belongs raise there, and the engine answers an error in a rank by ending all of them.

:func:`check_request` runs before anything of a request is kept or sent. It raises ``ValueError``, which the
engine's endpoints turn into HTTP 400 (a stream that has begun carries it as its only event).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from sglang_minimax.adjustments import EngineModule, EngineObject
from sglang_minimax.server_arguments import is_minimax

_INT32 = range(-(2**31), 2**31)
_INT64 = range(-(2**63), 2**63)

# The scheduler puts these into tensors of that width, or counts with them.
_INTEGERS = {
    "max_new_tokens": _INT32,
    "min_new_tokens": _INT32,
    "top_k": _INT32,
    "n": range(1, 2**31),
    "stream_interval": range(1, 2**31),
    "sampling_seed": _INT64,
}
_NUMBERS = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
_MAY_BE_NULL = ("max_new_tokens", "stream_interval", "sampling_seed")
_STRINGS = ("json_schema", "regex", "ebnf", "structural_tag")
_STRINGS_OR_LISTS = ("stop", "stop_regex")


def check_requests_first(tokenizer_manager: EngineModule) -> None:
    """Runs the checks where every endpoint hands its request over; once, after the engine's module was imported.

    Only for this architecture: in a multimodal model an id outside the vocabulary may mean an image.
    """
    manager = tokenizer_manager.TokenizerManager
    generate, validate = manager.generate_request, manager._validate_one_request

    @functools.wraps(generate)
    def generate_request(self: EngineObject, obj: EngineObject, request: EngineObject = None) -> Any:
        if isinstance(obj, tokenizer_manager.GenerateReqInput) and is_minimax(self.model_config):
            check_request(obj, self.model_config.vocab_size, has_tokenizer=self.tokenizer is not None)
        return generate(self, obj, request)

    @functools.wraps(validate)
    def validate_one_request(self: EngineObject, obj: EngineObject, input_ids: list[int] | None) -> None:
        try:
            if input_ids is not None and len(input_ids) == 0 and is_minimax(self.model_config):
                raise ValueError("the prompt has no token: there is nothing to continue. Give at least one.")
            validate(self, obj, input_ids)
        except ValueError:
            # The engine has taken the request down by now, and would keep it, and its id, for ever.
            self.rid_to_state.pop(obj.rid, None)
            raise

    manager.generate_request = generate_request
    manager._validate_one_request = validate_one_request


ADJUSTMENTS = [("sglang.srt.managers.tokenizer_manager", check_requests_first)]


def check_request(request: EngineObject, vocab_size: int, *, has_tokenizer: bool) -> None:
    """Checks one request or batch as it came, an engine's ``GenerateReqInput``.

    Args:
        request: its ``input_ids`` are a list of token ids or a list of such lists, if given.
        vocab_size: token ids are from 0 up to this, exclusive.
        has_tokenizer: whether the server has one; ``min_new_tokens`` cannot work without.

    Raises:
        ValueError: names the field, the value and the rule.
    """
    for ids in _each(request.input_ids):
        _check_token_ids("input_ids", ids, vocab_size)
        _check(len(ids) > 0, "input_ids", ids, "needs at least one token: there is nothing to continue")
    for ids in _each(request.token_ids_logprob):
        _check_token_ids("token_ids_logprob", ids, vocab_size)
    for number in _listed(request.top_logprobs_num):
        _check(number is None or 0 <= number <= vocab_size, "top_logprobs_num", number, f"is from 0 to {vocab_size}")
    for number in _listed(request.logprob_start_len):
        _check(number is None or number >= -1, "logprob_start_len", number, "is -1 (output tokens only) or more")
    for parameters in _listed(request.sampling_params):
        _check(isinstance(parameters, Mapping), "sampling_params", parameters, "is an object, or a list of objects")
        check_sampling_params(parameters, vocab_size, has_tokenizer=has_tokenizer)


def check_sampling_params(parameters: Mapping[str, Any], vocab_size: int, *, has_tokenizer: bool) -> None:
    """Checks the types of all, and of what the engine does not look at, the range. Unknown names are the engine's.

    Raises:
        ValueError: names the field, the value and the rule.
    """
    for name, value in parameters.items():
        if value is None and name in _MAY_BE_NULL:
            continue
        if name in _INTEGERS:
            span = _INTEGERS[name]
            rule = f"is an integer from {span.start} to {span.stop - 1}"
            _check(_is_integer(value) and value in span, name, value, rule)
        elif name in _NUMBERS:
            # NaN and Infinity are no JSON, but Python's parser takes them.
            _check(_is_number(value) and math.isfinite(value), name, value, "is a finite number")
        elif name in _STRINGS:
            _check(value is None or isinstance(value, str), name, value, "is a string")
        elif name in _STRINGS_OR_LISTS:
            strings = value is None or all(isinstance(each, str) for each in _listed(value))
            _check(strings, name, value, "is a string or a list of strings")
    if parameters.get("stop_token_ids") is not None:
        _check_token_ids("stop_token_ids", parameters["stop_token_ids"], vocab_size)
    if parameters.get("logit_bias") is not None:
        _check_logit_bias(parameters["logit_bias"], vocab_size)
    wanted = parameters.get("min_new_tokens", 0)
    rule = "holds back the tokenizer's end token, and this server has no tokenizer: start it without "
    _check(has_tokenizer or wanted == 0, "min_new_tokens", wanted, rule + "--skip-tokenizer-init, or use ignore_eos")


def _check_token_ids(name: str, ids: Any, vocab_size: int) -> None:
    _check(isinstance(ids, (list, tuple)), name, ids, "is a list of token ids")
    for position, token in enumerate(ids):
        if not (_is_integer(token) and 0 <= token < vocab_size):
            rule = f"token ids are integers from 0 to {vocab_size - 1}, the vocabulary of this model"
            raise ValueError(f"{name}[{position}] is {_shown(token)}: {rule}.")


def _check_logit_bias(bias: Any, vocab_size: int) -> None:
    _check(isinstance(bias, Mapping), "logit_bias", bias, "is an object from token ids to numbers")
    for token, value in bias.items():
        in_vocabulary = str(token).isdecimal() and int(token) < vocab_size
        _check(in_vocabulary, "logit_bias", token, f"has token ids from 0 to {vocab_size - 1} for its keys")
        _check(_is_number(value) and not math.isnan(value), f"logit_bias[{token}]", value, "is a number")


def _each(ids: Any) -> Iterable[Any]:
    """``ids`` as a list of prompts, whether one was given or several."""
    if ids is None:
        return []
    return ids if len(ids) and isinstance(ids[0], (list, tuple)) else [ids]


def _listed(value: Any) -> Iterable[Any]:
    if value is None:
        return []
    return value if isinstance(value, (list, tuple)) else [value]


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_integer(value)


def _check(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}={_shown(value)} cannot be: {name} {rule}.")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
