"""Right requests for which the engine's own code would end the server."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, Tool, ToolChoice, ToolChoiceFuncName
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.function_call.minimax_m2 import MinimaxM2Detector
from sglang.srt.layers.utils import logprob
from sglang.srt.layers.utils.logprob import LogprobStage
from sglang.srt.managers import session_controller
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.tokenizer_manager import ReqState, TokenizerManager

from sglang_minimax import request_mends
from sglang_minimax.request_mends import JsonCalls, StreamReader


def test_a_request_without_token_ids_is_passed_over_in_a_prefill_beside_one_with_some():
    logprobs = torch.arange(20.0).view(4, 5)
    lengths, token_ids = [2, 1, 1], [[3, 0], None, [4]]
    engines = logprob.get_token_ids_logprobs_raw.__wrapped__
    with pytest.raises(TypeError):  # or there is nothing left to mend
        engines(logprobs, token_ids, LogprobStage.PREFILL, lengths)
    values, ids = logprob.get_token_ids_logprobs_raw(logprobs, token_ids, LogprobStage.PREFILL, lengths)
    assert values == [[[3.0, 0.0], [8.0, 5.0]], [[]], [[19.0]]]
    assert ids == [[[3, 0], [3, 0]], [[]], [[4]]]
    values, ids = logprob.get_token_ids_logprobs_raw(logprobs, [None, [1]], LogprobStage.DECODE)
    assert values == [[], [6.0]] and ids == [[], [1]]
    values, _ = logprob.get_token_ids_logprobs_raw(logprobs, [None, [1]], LogprobStage.DECODE, no_copy_to_cpu=True)
    assert [value.tolist() for value in values] == [[], [6.0]]


ENGINES = OpenAIServingChat._process_tool_calls.__wrapped__


def required(text: str, parser: str = "minimax-append-think", choice="required", process=None):
    """What the engine makes of a whole answer: (its text, [name, arguments] of its calls or None)."""
    chat = OpenAIServingChat.__new__(OpenAIServingChat)
    chat.tool_call_parser, chat.reasoning_parser = "minimax-m2", parser
    process = process or OpenAIServingChat._process_tool_calls
    calls, rest, finish = process(chat, text, offered(), {"type": "stop", "matched": 1}, choice, 0)
    assert finish["type"] == ("tool_calls" if calls else "stop") or process is ENGINES
    return rest, calls and [(call.function.name, call.function.arguments) for call in calls]


def test_calls_that_are_required_are_found_behind_the_reasoning():
    thought, call = "<think>I list [1] them.</think>", '\n\n[{"name": "ls", "parameters": {"path": "</think>"}}]'
    assert required(thought + call, process=ENGINES) == (thought + call, None), "or there is nothing left to mend"
    found = [("ls", '{"path": "</think>"}')]
    assert required(thought + call) == (thought, found)
    named = ToolChoice(type="function", function=ToolChoiceFuncName(name="ls"))
    assert required(thought + call, choice=named) == (thought, found)
    assert required(thought + " no JSON") == (thought + " no JSON", None)
    assert required(call, parser="minimax") == ("", found), "whose reasoning is taken away before"


def test_calls_that_are_not_required_are_read_as_before():
    call = '<minimax:tool_call>\n<invoke name="ls">\n</invoke>\n</minimax:tool_call>'
    assert required("<think>So.</think>" + call, choice="auto") == ("<think>So.</think>", [("ls", "{}")])
    assert required("<think>So." + call, choice="auto") == ("<think>So.", [("ls", "{}")]), "it may think no further"


def test_calls_that_are_quoted_in_the_reasoning_are_none():
    quoted = '<think>I could write <minimax:tool_call><invoke name="ls"></invoke></minimax:tool_call>.</think>No.'
    assert required(quoted, choice="auto") == (quoted, None)


def test_an_answer_without_calls_ended_otherwise():
    """The engine takes each with the tag for one that ended with calls, of which it then gives none."""
    chat = OpenAIServingChat.__new__(OpenAIServingChat)
    chat.tool_call_parser, chat.reasoning_parser, tools = "minimax-m2", "minimax", offered()
    unknown = "<minimax:tool_call><invoke name='rm'></invoke></minimax:tool_call>"
    ours = OpenAIServingChat._process_tool_calls
    for process, ended in ((ENGINES, ([], unknown, "tool_calls")), (ours, (None, unknown, "stop"))):
        calls, rest, finish = process(chat, unknown, tools, {"type": "stop", "matched": 1}, "auto", 0)
        assert (calls, rest, finish["type"]) == ended
    assert finish == {"type": "stop", "matched": 1}


def offered() -> list[Tool]:
    return [Tool(type="function", function={"name": "ls", "parameters": {}})]


def streamed(pieces: list[str], parser: str = "minimax-append-think", choice="auto", process=None):
    """What a client puts together of a stream: (its text, [name, arguments] of its calls or None)."""
    chat = OpenAIServingChat.__new__(OpenAIServingChat)
    chat.tool_call_parser, chat.reasoning_parser = "minimax-m2", parser
    messages = [{"role": "user", "content": ""}]
    request = ChatCompletionRequest(messages=messages, model="", tools=offered(), tool_choice=choice)
    process, text, calls, parsers = process or type(chat)._process_tool_call_stream, "", {}, {}

    async def deltas():
        for left, piece in reversed(list(enumerate(reversed(pieces)))):
            content = {"meta_info": {"id": "0", "finish_reason": None if left else {"type": "stop"}}}
            async for chunk in process(chat, 0, piece, parsers, content, request, {}):
                yield json.loads(chunk.removeprefix("data: "))["choices"][0]["delta"]

    async def together():
        nonlocal text
        async for delta in deltas():
            text += delta["content"] or ""
            for call in delta["tool_calls"] or []:
                name, said = calls.get(call["index"], (call["function"]["name"], ""))
                calls[call["index"]] = name, said + call["function"]["arguments"]

    asyncio.run(together())
    return text, list(calls.values()) or None


CALL = "<minimax:tool_call><invoke name='ls'></invoke></minimax:tool_call>"
JSON = '[{"name": "ls", "parameters": {"path": "[a, b]", "depth": 1}}, {"name": "ls", "parameters": {}}]'


BRACKETS = json.dumps([{"name": "ls", "parameters": {"path": "}]{\"'\\"}}, *json.loads(JSON)], indent=2)


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        (f"<think>I could {CALL}</think>No. {CALL} <", "auto"),  # quoted, then meant
        (f"<think>So {CALL}", "auto"),  # it thinks no further
        (f"<think>{CALL[:20]}</think>", "auto"),
        ("<think>So </thi", "auto"),
        (f"</think>{CALL}", "auto"),
        (f"<think>I list [1] {JSON} {CALL}</think>{JSON}", "required"),
        (f"<think>{JSON} </", "required"),
        (f"</think>\n{BRACKETS}", "required"),
        (f"</think>{JSON[:30]}", "required"),
        ("</think> I [1] would {2} [{}].", "required"),
        ('</think>[{"name": "ls", "parameters": {"size": 1e400}}]', "required"),
        ('</think>[{"name": "ls", "parameters": {"half": "\\ud800"}}]', "required"),
        (f'</think>[{{"name": "ls", "parameters": {{"deep": {"[" * 2000 + "]" * 2000}}}}}]', "required"),
    ],
    ids=lambda value: value if value in ("auto", "required") else None,
)
def test_a_stream_says_what_the_whole_answer_says(answer, choice):
    whole = required(answer, choice=choice)
    for size in (1, 3, 7, len(answer)):
        assert streamed([answer[i : i + size] for i in range(0, len(answer), size)], choice=choice) == whole


def test_reasoning_is_said_as_it_comes():
    """Only what may be the beginning of a tag waits for what follows."""
    reader = StreamReader(MinimaxM2Detector(), offered(), begins_with_reasoning=True)
    said = [reader.parse_stream_chunk(piece)[0] for piece in ("<think>", "a < b", " <", "b", "</th", "ink>", "c")]
    assert said == ["<think>", "a < b", " ", "<b", "", "</think>", "c"]


@pytest.fixture
def session():
    """With a request, one that continues it, and one beside them."""
    session = session_controller.Session(1000, "session")
    parent = None
    for rid in ("first", "second", "other"):
        req = SimpleNamespace(rid=rid, finished_reason=None, to_finish=None)
        node = session_controller.SessionReqNode(req, parent if rid == "second" else None)
        session.req_nodes[rid], parent = node, node
    return session


class Cleared(Exception):
    """The engine goes on to make a request, which wants more than is here."""


def asked_to_replace(rid: str | None):
    def input_ids(self):
        raise Cleared

    parameters = SimpleNamespace(replace=True, rid=rid, offset=None, drop_previous_output=None)
    return type("Asked", (), {"session_params": parameters, "input_ids": property(input_ids), "rid": "new"})()


def test_a_session_is_replaced_as_a_whole(session):
    nodes = [node.req for node in session.req_nodes.values()]
    with pytest.raises(RuntimeError, match="changed size during iteration"):  # or there is nothing left to mend
        session_controller.Session.create_req.__wrapped__(session, asked_to_replace(None), None, 100)
    first, *others = (session_controller.SessionReqNode(req) for req in nodes)
    again = session_controller.SessionReqNode(first.req, others[0])  # the first's id, taken once more
    session.req_nodes.update((node.req.rid, node) for node in (first, *others, again))
    with pytest.raises(Cleared):
        session.create_req(asked_to_replace(None), None, 100)
    assert session.req_nodes == {} and all(req.to_finish is not None for req in nodes)


@pytest.mark.parametrize(("streaming", "replace"), [(True, True), (False, False)])
def test_a_session_that_is_not_replaced_keeps_its_requests(session, streaming, replace):
    """The engine refuses to replace a streaming one, and what does not replace begins anew beside the others."""
    session.streaming, asked, before = streaming, asked_to_replace(None), dict(session.req_nodes)
    asked.session_params.replace = replace
    with pytest.raises(Cleared):
        session.create_req(asked, None, 100)
    assert session.req_nodes == before and all(node.req.to_finish is None for node in before.values())


def test_replacing_one_request_is_left_to_the_engine(session):
    with pytest.raises((Cleared, AttributeError)):  # it goes on with the tokens of the first, which has none here
        session.create_req(asked_to_replace("first"), None, 100)
    assert set(session.req_nodes) == {"first", "other"}, "what continued it is gone"


@pytest.mark.parametrize("process", ["ours", "the engine's"])
def test_a_request_that_was_aborted_in_the_queue_is_forgotten(process):
    manager = object.__new__(TokenizerManager)
    manager.server_args = SimpleNamespace(weight_version="")
    times = SimpleNamespace(set_finished_time=lambda: None, get_e2e_latency=lambda: 1.0)
    aborted, other = (ReqState([], False, asyncio.Event(), SimpleNamespace(), times) for _ in range(2))
    manager.rid_to_state = {"aborted": aborted, "other": other}
    handle = TokenizerManager._handle_abort_req
    if process == "the engine's":
        handle.__wrapped__(manager, AbortReq(rid="aborted"))
        assert "aborted" in manager.rid_to_state, "or there is nothing left to mend"
        return
    for _ in range(2):
        handle(manager, AbortReq(rid="aborted"))
    assert manager.rid_to_state == {"other": other} and not other.finished
    [answer] = aborted.out_list
    assert answer["meta_info"]["finish_reason"]["type"] == "abort" and aborted.event.is_set()


def test_behind_what_is_no_call_nothing_is_read_again(monkeypatch):
    """Each reading is of all that was not said, so that a model without a grammar would hold the server up."""
    read, readings = JsonCalls._read, []
    monkeypatch.setattr(JsonCalls, "_read", lambda self: readings.append(1) or read(self))
    calls = JsonCalls(lambda **call: call)
    text = '[{"name": "f", "parameters": {}}, ' + '{"a": {}}, ' * 100
    found = calls.parse_streaming_increment(text, []).calls
    assert found == [{"tool_index": 0, "name": "f", "parameters": "{}"}] and len(readings) == 2


def test_the_first_dp_rank_that_opened_a_session_answers():
    opened = []

    class Manager:
        def _handle_open_session_req_output(self, output):
            opened.append(output.success)
            self.session_futures[output.session_id].set_result(output.session_id)

    request_mends.open_sessions_once(SimpleNamespace(TokenizerManager=Manager))

    async def answers():
        manager = Manager()
        manager.session_futures = {"s": asyncio.get_running_loop().create_future()}
        for _ in range(2):
            manager._handle_open_session_req_output(SimpleNamespace(session_id="s", success=True))
        future = manager.session_futures.pop("s")
        manager._handle_open_session_req_output(SimpleNamespace(session_id="s", success=True))
        return await future

    assert asyncio.run(answers()) == "s" and opened == [True]


@pytest.mark.parametrize(("allowed", "left"), [(None, {}), (["user"], {"user": "me"})])
def test_labels_that_the_server_does_not_know_are_left_out(allowed, left):
    class Manager:
        server_args = SimpleNamespace(tokenizer_metrics_allowed_custom_labels=allowed)

        async def generate_request(self, obj, request=None):
            yield obj.custom_labels

    request_mends.take_known_labels_alone(SimpleNamespace(TokenizerManager=Manager))

    async def ask(labels):
        return [answer async for answer in Manager().generate_request(SimpleNamespace(custom_labels=labels))]

    assert asyncio.run(ask({"user": "me", "other": "x"})) == [left]
    assert asyncio.run(ask(None)) == [None]


def test_what_some_of_a_batch_ask_for_has_a_place_for_each():
    """As the engine does: it appends for those that asked, and reads by the place in the batch."""
    from sglang.srt.managers.scheduler_output_processor_mixin import SchedulerOutputProcessorMixin

    assert hasattr(SchedulerOutputProcessorMixin, "stream_output_generation")

    class Mixin:
        def stream_output_generation(self, reqs, return_logprob):
            return [req.name for req in reqs if req.return_routed_experts], any(r.return_hidden_states for r in reqs)

    request_mends.keep_places_of_what_some_ask_for(SimpleNamespace(SchedulerOutputProcessorMixin=Mixin))

    def batch(*asking: bool):
        fields = {"return_hidden_states": False}
        return [SimpleNamespace(name=i, return_routed_experts=one, **fields) for i, one in enumerate(asking)]

    some = batch(False, True, False)
    assert Mixin().stream_output_generation(some, False) == ([0, 1, 2], False)
    assert [req.return_routed_experts for req in some] == [False, True, False]
    assert Mixin().stream_output_generation(batch(False, False), False) == ([], False)


@pytest.mark.parametrize("kinds", [[None, None, [0.5]], [[0.5], [0.5], None]])
def test_a_prefill_has_embeddings_or_token_ids(kinds):
    class Adder:
        def __init__(self):
            self.can_run_list = []

        def add_one_req(self, req, has_chunked_req, truncation_align_size):
            self.can_run_list.append(req)
            return "continue"

    results = SimpleNamespace(OTHER="another prefill")
    request_mends.prefill_embeddings_apart(SimpleNamespace(PrefillAdder=Adder, AddReqResult=results))
    adder, requests = Adder(), [SimpleNamespace(input_embeds=kind) for kind in kinds]
    said = [adder.add_one_req(req, has_chunked_req=False, truncation_align_size=None) for req in requests]
    assert said == ["continue", "continue", "another prefill"] and adder.can_run_list == requests[:2]
    assert Adder().add_one_req(requests[2], False, None) == "continue"
