"""Requests that are right, and for which the engine's own code would end the server or lose the answer."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
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


_TOOL_CALLS, _APPEND_THINK, _END_OF_REASONING = "minimax-m2", "minimax-append-think", "</think>"


def find_calls_behind_reasoning(module: EngineModule) -> None:
    """Whole answers with ``--reasoning-parser minimax-append-think``, which begin with the reasoning.

    Where calls are required, what is behind it is JSON: the engine reads all of it as JSON and finds none. Else it
    finds those, too, that the model only quoted while it thought. And an answer in which our reader finds no call,
    as where the model names a tool that was not offered, did not end with calls: streamed it ends with ``stop``.
    """
    process = module.OpenAIServingChat._process_tool_calls

    @functools.wraps(process)
    def behind_reasoning(
        self: EngineObject, text: str, tools: Any, finish_reason: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        reasoning, end, answer = text.partition(_END_OF_REASONING)
        if not end or self.reasoning_parser != _APPEND_THINK:
            reasoning, end, answer = "", "", text
        ended = dict(finish_reason)
        result = process(self, answer, tools, finish_reason, *args, **kwargs)
        if not result.tool_calls and self.tool_call_parser == _TOOL_CALLS:
            result = result._replace(tool_calls=None, finish_reason=ended)
        return result._replace(remaining_text=reasoning + end + result.remaining_text)

    module.OpenAIServingChat._process_tool_calls = behind_reasoning


def stream_what_whole_answers_say(module: EngineModule) -> None:
    """Streams with ``--tool-call-parser minimax-m2``.

    With ``minimax-append-think`` the engine gives the parser the reasoning, too, and takes for calls what is quoted
    there. When a stream ends it does not ask for text that the parser held back. And of calls that are required, which
    are JSON, its own parser loses the arguments of one without any, what follows that, and what comes in one piece.
    """
    chat = module.OpenAIServingChat
    process = chat._process_tool_call_stream

    @functools.wraps(process)
    async def to_the_end(
        self: EngineObject, index: int, delta: str, parsers: Any, content: Any, request: Any, *args: Any, **kwargs: Any
    ) -> AsyncIterator[str]:
        if self.tool_call_parser == _TOOL_CALLS:
            if index not in parsers:
                is_json = request.tool_choice == "required" or isinstance(request.tool_choice, module.ToolChoice)
                parser = None if is_json else module.FunctionCallParser(request.tools, _TOOL_CALLS)
                detector = JsonCalls(module.ToolCallItem) if parser is None else parser.detector
                reasons = self.reasoning_parser == _APPEND_THINK
                parsers[index] = StreamReader(detector, request.tools, begins_with_reasoning=reasons)
            parsers[index].is_last = content["meta_info"].get("finish_reason") is not None
        async for chunk in process(self, index, delta, parsers, content, request, *args, **kwargs):
            yield chunk

    chat._process_tool_call_stream = to_the_end


class StreamReader:
    """In the place of the engine's ``FunctionCallParser`` or ``JsonArrayParser`` of one streamed answer.

    Its text and calls, put together, are those of the whole answer.

    Args:
        detector: the reader of what is behind the reasoning; the engine looks here for JSON that was cut off.
        tools: of the request.
        begins_with_reasoning: whether that is part of the text that comes.
    """

    def __init__(self, detector: EngineObject, tools: Any, *, begins_with_reasoning: bool) -> None:
        self.detector = detector
        self.is_last = False  # whether nothing follows the next piece
        self._tools = tools
        self._reasons = begins_with_reasoning
        self._held = ""  # of the reasoning: what may turn out to be a call, or the reasoning's end

    def parse_stream_chunk(self, chunk: str) -> tuple[str, list[Any]]:
        """(text, calls) of the next piece; the name is the engine's."""
        reasoning, answer = self._split(chunk) if self._reasons else ("", chunk)
        found = self.detector.parse_streaming_increment(answer, self._tools)
        return reasoning + found.normal_text + (self.detector.rest_of_text() if self.is_last else ""), found.calls

    def _split(self, chunk: str) -> tuple[str, str]:
        """What of the text so far is reasoning, and what is behind it.

        A call in it is one if the reasoning has no end, as in whole answers; JSON is text there.
        """
        held = self._held + chunk
        reasoning, end, answer = held.partition(_END_OF_REASONING)
        if end:
            self._reasons = False
            return reasoning + end, answer
        if self.is_last:
            return ("", held) if self.detector.bot_token else (held, "")
        tags = [tag for tag in (_END_OF_REASONING, self.detector.bot_token) if tag]
        said = min(held.find(tag) if tag in held else len(held) - _begun(tag, held) for tag in tags)
        self._held = held[said:]
        return held[:said], ""


class JsonCalls:
    """A list of calls in JSON, in pieces of any size. A call is said once its last character is there.

    Args:
        call: the engine's ``ToolCallItem``.
    """

    bot_token = ""  # nothing in the reasoning is a call

    def __init__(self, call: Callable[..., Any]) -> None:
        # The engine looks at both for JSON that it could complete.
        self.prev_tool_call_arr: list[dict[str, Any]] = []
        self.streamed_args_for_tool: list[str] = []
        self._call = call
        self._count = self._depth = 0
        self._in_string = self._is_escaped = self._is_no_call = False
        self._unsaid: list[str] = []  # since the end of the last call

    def parse_streaming_increment(self, new_text: str, tools: Any) -> SimpleNamespace:
        calls = []
        for character in new_text:
            self._unsaid.append(character)
            if self._is_no_call or not self._ends_call(character):
                continue
            if (call := self._read()) is None:
                self._is_no_call = True  # nor is anything behind it, as in a whole answer
                continue
            calls.append(self._call(tool_index=self._count, name=call[0], parameters=call[1]))
            self._count += 1
            self._unsaid = []
        return SimpleNamespace(normal_text="", calls=calls)

    def rest_of_text(self) -> str:
        """An answer without a call is text, as where it was cut off in the first."""
        return "" if self._count else "".join(self._unsaid)

    def _ends_call(self, character: str) -> bool:
        """Goes on by a character; whether it ends an object of the outermost list."""
        if self._is_escaped:
            self._is_escaped = False
        elif character == '"':
            self._in_string = not self._in_string
        elif self._in_string:
            self._is_escaped = character == "\\"
        elif character in "[{":
            self._depth += 1
        elif character in "]}":
            self._depth -= 1
            return character == "}" and self._depth == 1
        return False

    def _read(self) -> tuple[str, str] | None:
        """(name, arguments) of the call that has just ended, or None: it is none."""
        written = "".join(self._unsaid)
        try:
            call = json.loads(written[written.index("{") :])
            arguments = json.dumps(call["parameters"], ensure_ascii=False, allow_nan=False)
            arguments.encode()  # raises for half a surrogate pair, which no answer can hold
            return call["name"], arguments
        # Without a grammar backend a model writes what it likes; with one still 1e400, or lists of great depth.
        except (ValueError, KeyError, RecursionError):
            return None


def _begun(tag: str, text: str) -> int:
    """How many characters of ``tag`` the text ends with."""
    return next(length for length in range(len(tag) - 1, -1, -1) if text.endswith(tag[:length]))


def forget_what_was_aborted_in_the_queue(module: EngineModule) -> None:
    """A request whose client left, or that was aborted, before it ran.

    The engine keeps it and its prompt for ever, refuses its id from then on, and waits for it when it is to end.
    """
    handle = module.TokenizerManager._handle_abort_req

    @functools.wraps(handle)
    def handle_and_forget(self: EngineObject, aborted: EngineObject) -> None:
        state = self.rid_to_state.get(aborted.rid)
        if state is None:  # forgotten when it was aborted before
            return
        handle(self, aborted)
        if state.finished:  # who waits for its answer has the state itself
            del self.rid_to_state[aborted.rid]

    module.TokenizerManager._handle_abort_req = handle_and_forget


def open_sessions_once(module: EngineModule) -> None:
    """``/open_session`` with several DP ranks, each of which answers: the engine ends at the second answer."""
    handle = module.TokenizerManager._handle_open_session_req_output

    @functools.wraps(handle)
    def handle_the_first(self: EngineObject, opened: EngineObject) -> None:
        future = self.session_futures.get(opened.session_id)
        if future is not None and not future.done():
            handle(self, opened)

    module.TokenizerManager._handle_open_session_req_output = handle_the_first


def take_known_labels_alone(module: EngineModule) -> None:
    """``custom_labels`` of a request, with ``--enable-metrics``: one that the server was not started with ends it."""
    labels_of = module.TokenizerManager.generate_request

    @functools.wraps(labels_of)
    async def with_known_labels(self: EngineObject, obj: EngineObject, *args: Any, **kwargs: Any) -> Any:
        if labels := getattr(obj, "custom_labels", None):
            known = self.server_args.tokenizer_metrics_allowed_custom_labels or ()
            obj.custom_labels = {name: value for name, value in labels.items() if name in known}
        async with contextlib.aclosing(labels_of(self, obj, *args, **kwargs)) as answers:
            async for answer in answers:
                yield answer

    module.TokenizerManager.generate_request = with_known_labels


_ASKED_FOR = ("return_hidden_states", "return_routed_experts")


def keep_places_of_what_some_ask_for(module: EngineModule) -> None:
    """Hidden states, or experts of tokens, that some requests of a batch ask for and others do not.

    The engine leaves those of the others out, and then looks for each by its request's place in the batch: the server
    ends, or a client gets what belongs to another.
    """
    mixin = module.SchedulerOutputProcessorMixin
    stream = mixin.stream_output_generation

    @functools.wraps(stream)
    def with_all_places(self: EngineObject, reqs: Sequence[EngineObject], *args: Any, **kwargs: Any) -> Any:
        asked_for = [name for name in _ASKED_FOR if any(getattr(req, name) for req in reqs)]
        added = [(req, name) for name in asked_for for req in reqs if not getattr(req, name)]
        for req, name in added:
            setattr(req, name, True)
        try:
            return stream(self, reqs, *args, **kwargs)
        finally:
            for req, name in added:
                setattr(req, name, False)

    mixin.stream_output_generation = with_all_places


def prefill_embeddings_apart(module: EngineModule) -> None:
    """Embeddings, and token ids beside them: in one prefill the engine has rows for the former alone, and ends.

    So the requests of a prefill are of one kind, and those of the other have the next.
    """
    add = module.PrefillAdder.add_one_req

    @functools.wraps(add)
    def add_of_one_kind(self: EngineObject, req: EngineObject, *args: Any, **kwargs: Any) -> Any:
        begun = self.can_run_list
        if begun and (begun[0].input_embeds is None) != (req.input_embeds is None):
            return module.AddReqResult.OTHER
        return add(self, req, *args, **kwargs)

    module.PrefillAdder.add_one_req = add_of_one_kind


ADJUSTMENTS = [
    ("sglang.srt.entrypoints.openai.serving_chat", find_calls_behind_reasoning),
    ("sglang.srt.entrypoints.openai.serving_chat", stream_what_whole_answers_say),
    ("sglang.srt.layers.utils.logprob", pass_over_requests_without_token_ids),
    ("sglang.srt.managers.schedule_policy", prefill_embeddings_apart),
    ("sglang.srt.managers.scheduler_output_processor_mixin", keep_places_of_what_some_ask_for),
    ("sglang.srt.managers.session_controller", replace_all_of_a_session),
    ("sglang.srt.managers.tokenizer_manager", forget_what_was_aborted_in_the_queue),
    ("sglang.srt.managers.tokenizer_manager", open_sessions_once),
    ("sglang.srt.managers.tokenizer_manager", take_known_labels_alone),
]
