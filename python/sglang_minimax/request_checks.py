"""Refuses requests that the engine would let through to its scheduler, where they end the server.

The engine checks lengths and most ranges while a request still belongs to one client. What it does not look at
reaches the ranks, where every request shares a batch: an empty prompt, a token id outside the vocabulary, a
string where a number belongs raise there, and the engine answers an error in a rank by ending all of them.

:func:`check_request` runs before anything of a request is kept or sent. It raises ``ValueError``, which the
engine's endpoints turn into HTTP 400 (a stream that has begun carries it as its only event).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import numbers
import re
import sys
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
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
    "n": range(1, 4097),  # each is a request, which the HTTP server makes before it serves another
    "stream_interval": range(1, 2**31),
    "sampling_seed": _INT64,
}
_NUMBERS = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
_MAY_BE_NULL = ("max_new_tokens", "stream_interval", "sampling_seed")
_STRINGS = ("json_schema", "regex", "ebnf", "structural_tag")
_STRINGS_OR_LISTS = ("stop", "stop_regex")

# One value for all prompts, or a list with one for each.
_ONE_OR_EACH = ("sampling_params", "top_logprobs_num", "logprob_start_len")

# Divided by the lowest temperature, 1e-6, logits that were changed by these are float32 numbers still.
_LARGEST_BIAS = 1e30
_SMALLEST_REPETITION_PENALTY = 1e-6

_TAKEN_DOWN = "sglang_minimax_taken_down"
"""The attribute of a request whose ids were new to the engine, and are in its books."""

_TAKEN_DOWN_HERE: ContextVar[set[str] | None] = ContextVar("taken down here", default=None)
"""The ids that are taken down one by one while a request is served: its own, or those of n answers."""


def check_requests_first(tokenizer_manager: EngineModule) -> None:
    """Runs the checks where every endpoint hands its request over; once, after the engine's module was imported.

    Only for this architecture: in a multimodal model an id outside the vocabulary may mean an image.
    """
    manager = tokenizer_manager.TokenizerManager
    generate, validate, take_down = manager.generate_request, manager._validate_one_request, manager._req_stats_init

    @functools.wraps(generate)
    async def generate_request(self: EngineObject, obj: EngineObject, request: EngineObject = None) -> Any:
        config = self.model_config
        if isinstance(obj, tokenizer_manager.GenerateReqInput) and is_minimax(config):
            check_request(obj, config.vocab_size, config.hidden_size, has_tokenizer=self.tokenizer is not None)
            obj.sampling_params = with_finite_biases(obj.sampling_params)
        taken_down: set[str] = set()
        _TAKEN_DOWN_HERE.set(taken_down)
        try:
            async with contextlib.aclosing(generate(self, obj, request)) as answers:
                async for answer in answers:
                    yield answer
        except (Exception, asyncio.CancelledError):  # the latter where a client leaves before its request was sent
            if getattr(obj, _TAKEN_DOWN, False):
                forget_unsent(self.rid_to_state, _ids(obj))
            raise
        finally:
            # Where the client of a stream left, the engine aborts the ids that came; n answers go on under others.
            for rid in (taken_down - _ids(obj)) & self.rid_to_state.keys():
                self.abort_request(rid)

    @functools.wraps(take_down)
    def req_stats_init(self: EngineObject, obj: EngineObject, *args: Any, **kwargs: Any) -> None:
        # Only behind this are the ids in the engine's books this request's, and no other's of the same name.
        setattr(obj, _TAKEN_DOWN, True)
        take_down(self, obj, *args, **kwargs)
        # The engine names each of n answers to a prompt here, and then anew when it sends them: of these names it uses
        # and frees the first of each prompt, and would keep the others and their prompts, and never end for them.
        if getattr(obj, "parallel_sample_num", 1) > 1 and isinstance(obj.rid, list):
            for rid in obj.rid[obj.batch_size :]:
                del self.rid_to_state[rid]
        elif isinstance(obj.rid, str) and (taken_down := _TAKEN_DOWN_HERE.get()) is not None:
            taken_down.add(obj.rid)

    @functools.wraps(validate)
    def validate_one_request(self: EngineObject, obj: EngineObject, input_ids: list[int] | None) -> None:
        if input_ids is not None and len(input_ids) == 0 and is_minimax(self.model_config):
            raise ValueError("the prompt has no token: there is nothing to continue. Give at least one.")
        validate(self, obj, input_ids)

    manager.generate_request, manager._req_stats_init = generate_request, req_stats_init
    manager._validate_one_request = validate_one_request


def forget_unsent(states: dict[str, EngineObject], ids: Iterable[str]) -> None:
    """Frees those of ``ids`` whose requests raised before they were sent.

    The engine takes a request down before it looks at it, and would keep one that it then refuses, and its id, for
    ever. ``states`` is its ``rid_to_state``.
    """
    for rid in ids:
        if rid in states and not states[rid].time_stats.api_server_dispatch_time:
            del states[rid]


def _ids(request: EngineObject) -> set[str]:
    return {rid for rid in _listed(request.rid) if isinstance(rid, str)}


def answer_bad_grammars(grammar_manager: EngineModule) -> None:
    """A grammar that does not compile is its request's error, whichever exception its compiler raises.

    The engine expects two or three kinds of them; any other, as of a structural tag without its fields, ends the rank.
    """
    manager = grammar_manager.GrammarManager
    initialise = manager.__init__

    @functools.wraps(initialise)
    def __init__(self: EngineObject, scheduler: EngineObject) -> None:
        initialise(self, scheduler)
        if self.grammar_backend is not None and is_minimax(scheduler.model_config):
            compile_or_refuse(self.grammar_backend, grammar_manager.InvalidGrammarObject)

    manager.__init__ = __init__


def compile_or_refuse(backend: EngineObject, refusal: type) -> None:
    """Lets ``backend``, an engine's ``BaseGrammarBackend``, answer with ``refusal(message)`` instead of raising."""
    compile_grammar = backend._init_value_dispatch

    @functools.wraps(compile_grammar)
    def init_value_dispatch(key: tuple[str, str], require_reasoning: bool) -> Any:
        try:
            return compile_grammar(key, require_reasoning)
        except Exception as error:
            return refusal(f"{type(error).__name__}: {error}")

    backend._init_value_dispatch = init_value_dispatch


ADJUSTMENTS = [
    ("sglang.srt.managers.tokenizer_manager", check_requests_first),
    ("sglang.srt.constrained.grammar_manager", answer_bad_grammars),
]


def check_request(request: EngineObject, vocab_size: int, hidden_size: int, *, has_tokenizer: bool) -> None:
    """Checks one request or batch as it came, an engine's ``GenerateReqInput``.

    Args:
        request: its ``input_ids`` are a list of token ids or a list of such lists, if given, and its ``input_embeds``
            a list of vectors or a list of such lists.
        vocab_size: token ids are from 0 up to this, exclusive.
        hidden_size: numbers in each vector of ``input_embeds``.
        has_tokenizer: whether the server has one; ``min_new_tokens`` cannot work without.

    Raises:
        ValueError: names the field, the value and the rule.
    """
    for ids in _each(request.input_ids):
        _check_token_ids("input_ids", ids, vocab_size)
        _check(len(ids) > 0, "input_ids", ids, "needs at least one token: there is nothing to continue")
    if request.input_ids is None and request.text is None and request.input_embeds is not None:
        _check_embeddings(request.input_embeds, hidden_size)
    _check_counts(request)
    for ids in _each(request.token_ids_logprob):
        _check_token_ids("token_ids_logprob", ids, vocab_size)
    for number in _listed(request.top_logprobs_num):
        holds = _is_integer(number) and 0 <= number <= vocab_size
        _check(holds, "top_logprobs_num", number, f"is from 0 to {vocab_size}")
    for number in _listed(request.logprob_start_len):
        holds = _is_integer(number) and number >= -1
        _check(holds, "logprob_start_len", number, "is -1 (output tokens only) or more")
    _check_session(request.session_params)
    if request.input_embeds is not None and request.session_params is not None:
        rule = "goes with token ids or text: a session keeps ids, which input_embeds has not"
        _check(not request.session_params.get("id"), "session_params", request.session_params, rule)
    for parameters in _listed(request.sampling_params):
        _check(isinstance(parameters, Mapping), "sampling_params", parameters, "is an object, or a list of objects")
        check_sampling_params(parameters, vocab_size, has_tokenizer=has_tokenizer)


def _check_counts(request: EngineObject) -> None:
    """A list of values is for as many prompts, and for a single prompt there is no list."""
    if request.text is not None:
        num_prompts = None if isinstance(request.text, str) else len(request.text)
        if request.input_ids is not None:
            alike = _is_nested(request.input_ids) == (num_prompts is not None)
            fits = alike and len(request.input_ids) >= (num_prompts or 0)
            _check(fits, "input_ids", request.input_ids, "is a list for each text, where both are given")
    else:
        prompts, depth = (request.input_ids, 1) if request.input_ids is not None else (request.input_embeds, 2)
        num_prompts = len(prompts) if prompts is not None and _is_nested(prompts, depth) else None
    for name in _ONE_OR_EACH:
        values = getattr(request, name)
        if isinstance(values, (list, tuple)):
            _check(num_prompts is not None, name, values, "is no list for a single prompt")
            rule = f"has a value for each of {num_prompts} prompts, or is one for all"
            _check(len(values) >= (num_prompts or 0), name, values, rule)
    if _is_nested(lists := request.token_ids_logprob):
        _check(num_prompts is not None, "token_ids_logprob", lists, "is one list for a single prompt")
        rule = f"has a list for each of {num_prompts} prompts, or is one for all"
        _check(len(lists) >= (num_prompts or 0), "token_ids_logprob", lists, rule)


def _check_session(parameters: Any) -> None:
    if parameters is None:
        return
    _check(isinstance(parameters, Mapping), "session_params", parameters, "is an object")
    for name, value in parameters.items():
        if value is None:
            continue
        if name in ("id", "rid"):
            _check(isinstance(value, str), f"session_params[{name}]", value, "is a string")
        elif name == "offset":
            _check(_is_integer(value), f"session_params[{name}]", value, "is an integer")
        elif name in ("replace", "drop_previous_output"):
            _check(isinstance(value, bool), f"session_params[{name}]", value, "is true or false")


def _check_embeddings(embeddings: Any, hidden_size: int) -> None:
    rule = f"is a list of vectors of {hidden_size} numbers, finite and no sum over 1e30, or a list of such lists"
    _check(isinstance(embeddings, (list, tuple)) and len(embeddings) > 0, "input_embeds", embeddings, rule)
    for prompt in embeddings if _is_nested(embeddings, 2) else [embeddings]:
        _check(isinstance(prompt, (list, tuple)) and len(prompt) > 0, "input_embeds", prompt, rule)
        for vector in prompt:
            _check(isinstance(vector, (list, tuple)) and len(vector) == hidden_size, "input_embeds", vector, rule)
            # One pass in C for thousands of numbers: NaN, infinity and what is no number all show in the sum.
            try:
                total = sum(map(abs, vector))
            except (TypeError, OverflowError):
                total = math.nan
            _check(total <= 1e30, "input_embeds", vector, rule)


def with_finite_biases(parameters: Any) -> Any:
    """Sampling parameters, or a list of them, with the lowest number in place of each ``logit_bias`` of -infinity.

    Both give a token no chance beside any other. Where no other is left, as behind a grammar, -infinity would give
    probabilities of 0 / 0, for which a rank ends.
    """
    if isinstance(parameters, (list, tuple)):
        return [with_finite_biases(each) for each in parameters]
    bias = (parameters or {}).get("logit_bias")
    if not bias or -math.inf not in bias.values():
        return parameters
    return {**parameters, "logit_bias": {token: max(value, -_LARGEST_BIAS) for token, value in bias.items()}}


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
            _check(_is_integer(value) and span.start <= value < span.stop, name, value, rule)
        elif name in _NUMBERS:
            # NaN and Infinity are no JSON, but Python's parser takes them, and integers that no float holds.
            _check(_is_number(value) and abs(value) <= sys.float_info.max, name, value, "is a finite number")
        elif name in _STRINGS:
            _check(value is None or isinstance(value, str), name, value, "is a string")
        elif name in _STRINGS_OR_LISTS:
            strings = value is None or all(isinstance(each, str) for each in _listed(value))
            _check(strings, name, value, "is a string or a list of strings")
        elif name in ("skip_special_tokens", "spaces_between_special_tokens"):
            _check(isinstance(value, bool), name, value, "is true or false")
    penalty = parameters.get("repetition_penalty", 1)
    rule = f"is from {_SMALLEST_REPETITION_PENALTY:g} to 2: logits are divided by it"
    _check(penalty >= _SMALLEST_REPETITION_PENALTY, "repetition_penalty", penalty, rule)
    _check(parameters.get("structural_tag") != "", "structural_tag", "", "is a JSON object in a string")
    for pattern in _listed(parameters.get("stop_regex")):
        _check_pattern("stop_regex", pattern)
    if parameters.get("stop_token_ids") is not None:
        stops = parameters["stop_token_ids"]
        _check_token_ids("stop_token_ids", list(stops) if isinstance(stops, (set, frozenset)) else stops, vocab_size)
    if parameters.get("logit_bias") is not None:
        _check_logit_bias(parameters["logit_bias"], vocab_size)
    for name in _STRINGS_OR_LISTS:
        rule = "is looked for in text, and this server has no tokenizer: start it without --skip-tokenizer-init, or "
        given = parameters.get(name)
        _check(has_tokenizer or not given, name, given, rule + "use stop_token_ids")
    wanted = parameters.get("min_new_tokens", 0)
    rule = "holds back the tokenizer's end token, and this server has no tokenizer: start it without "
    _check(has_tokenizer or wanted == 0, "min_new_tokens", wanted, rule + "--skip-tokenizer-init, or use ignore_eos")


def _check_token_ids(name: str, ids: Any, vocab_size: int) -> None:
    _check(isinstance(ids, (list, tuple)), name, ids, "is a list of token ids")
    # A long prompt holds up other requests meanwhile, so first what takes no loop in Python.
    if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size):
        return
    for position, token in enumerate(ids):
        if not (_is_integer(token) and 0 <= token < vocab_size):
            rule = f"token ids are integers from 0 to {vocab_size - 1}, the vocabulary of this model"
            raise ValueError(f"{name}[{position}] is {_shown(token)}: {rule}.")


def _check_logit_bias(bias: Any, vocab_size: int) -> None:
    _check(isinstance(bias, Mapping), "logit_bias", bias, "is an object from token ids to numbers")
    for token, value in bias.items():
        in_vocabulary = str(token).isdecimal() and int(token) < vocab_size
        _check(in_vocabulary, "logit_bias", token, f"has token ids from 0 to {vocab_size - 1} for its keys")
        holds = _is_number(value) and (abs(value) <= _LARGEST_BIAS or value == -math.inf)
        rule = f"is a number from -{_LARGEST_BIAS:g} to {_LARGEST_BIAS:g}, or -Infinity"
        _check(holds, f"logit_bias[{token}]", value, rule)


def _check_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{name}={_shown(pattern)} cannot be: it is no regular expression ({error}).") from error


def _each(ids: Any) -> Iterable[Any]:
    """``ids`` as a list of prompts, whether one was given or several."""
    if ids is None:
        return []
    return ids if _is_nested(ids) else [ids]


def _is_nested(values: Any, depth: int = 1) -> bool:
    """Whether ``values`` holds lists, at ``depth`` levels, judged by the first at each as the engine does."""
    for _ in range(depth):
        if not (isinstance(values, (list, tuple)) and len(values) and isinstance(values[0], (list, tuple))):
            return False
        values = values[0]
    return True


def _listed(value: Any) -> Iterable[Any]:
    if value is None:
        return []
    return value if isinstance(value, (list, tuple, set, frozenset)) else [value]


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)  # numpy's too


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}={_shown(value)} cannot be: {name} {rule}.")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
