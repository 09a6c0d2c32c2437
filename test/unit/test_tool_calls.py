"""Tool calls of MiniMax-M2: what a client gets is what the model wrote, in whatever pieces it comes."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.environ import envs
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.function_call.minimax_m2 import MinimaxM2Detector, value_of

from sglang_minimax.request_mends import StreamReader

OPTIONAL_TEXT = {"anyOf": [{"type": "string"}, {"type": "null"}]}  # as Pydantic and zod write an optional string
PROPERTIES = {
    "text": {"type": "string"},
    "optional": OPTIONAL_TEXT,
    "count": {"type": "integer"},
    "share": {"type": ["number", "null"]},
    "sure": {"type": "boolean"},
    "names": {"$ref": "#/$defs/Names"},
    "record": {"type": "object"},
    "number_or_text": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
    "level": {"enum": [1, 2, None]},
    "colour": {"enum": ["red", "1"]},
    "circle": {"$ref": "#/properties/circle"},
    "again": {"$ref": "#"},
    "large": {"enum": [10**400]},
    "says_nothing": {},
    "far": {"$ref": "#/$defs/a~1b%20c/anyOf/1"},
    "user's > own": {"type": "integer"},
    "odd": {"type": [{}, "Integer"], "enum": [float("inf")]},
}
DEFINITIONS = {"Names": {"type": "array"}, "a/b c": {"anyOf": [{"type": "string"}, {"type": "object"}]}}
SCHEMA = {"type": "object", "properties": PROPERTIES, "$defs": DEFINITIONS}


def tools(*names: str) -> list[Tool]:
    return [Tool(type="function", function={"name": name, "parameters": SCHEMA}) for name in names]


def written(name: str, **values: str) -> str:
    parameters = "".join(f'<parameter name="{key}">{value}</parameter>\n' for key, value in values.items())
    return f'<invoke name="{name}">\n{parameters}</invoke>\n'


def block(*calls: str) -> str:
    return "<minimax:tool_call>\n" + "".join(calls) + "</minimax:tool_call>"


def streamed(pieces: list[str], *names: str):
    """(text, [name, arguments as text] of each call, the parser), as a client puts a stream together."""
    detector, text, calls = FunctionCallParser(tools(*names), "minimax-m2").detector, "", {}
    parser = StreamReader(detector, tools(*names), begins_with_reasoning=False)
    for left, piece in reversed(list(enumerate(reversed(pieces)))):
        parser.is_last = left == 0
        normal, items = parser.parse_stream_chunk(piece)
        text += normal
        for item in items:
            call = calls.setdefault(item.tool_index, [item.name, ""])
            call[1] += item.parameters
    return text, [calls[index] for index in sorted(calls)], parser


def read(answer: str, *names: str):
    """(text, [name, arguments] of each call) of a whole answer, the same in pieces of a character and in one."""
    text, items = FunctionCallParser(tools(*names), "minimax-m2").parse_non_stream(answer)
    found = text, [[item.name, item.parameters] for item in items]
    assert [item.tool_index for item in items] == list(range(len(items)))
    assert streamed(list(answer), *names)[:2] == found == streamed([answer], *names)[:2]
    return text, [(name, json.loads(arguments)) for name, arguments in found[1]]


@pytest.mark.parametrize(
    ("parameter", "text", "value"),
    [
        ("text", "fi; }", "fi; }"), ("text", "{", "{"), ("text", "", ""),
        ("text", "\n  two\nlines\n", "\n  two\nlines\n"),
        ("text", "</invoke> </minimax:tool_call>", "</invoke> </minimax:tool_call>"), ("text", '"quoted"', '"quoted"'),
        ("text", "none", "none"), ("text", "nil", "nil"), ("text", "null", None), ("text", "5", "5"),
        ("optional", "here", "here"), ("optional", "null", None), ("optional", '"quoted"', '"quoted"'),
        ("count", "7", 7), ("count", "007", 7), ("count", "3.0", 3), ("count", "null", None), ("count", "many", "many"),
        ("share", "0.5", 0.5), ("share", "1e400", "1e400"), ("share", "NaN", "NaN"), ("share", "None", None),
        ("sure", "true", True), ("sure", "True", True), ("sure", "0", False), ("sure", "maybe", "maybe"),
        ("names", '["a", 1]', ["a", 1]), ("names", "a, b", "a, b"), ("record", '{"a": {"b": "}"}}', {"a": {"b": "}"}}),
        ("record", '{"half": "\\ud800"}', '{"half": "\\ud800"}'), ("number_or_text", "12", 12),
        ("number_or_text", "012", "012"), ("number_or_text", "true", "true"), ("level", "2", 2),
        ("level", "null", None), ("colour", "1", "1"),
        ("far", '{"a": 1}', {"a": 1}), ("user's > own", "1", 1), ("odd", "1", 1), ("circle", "x", "x"),
        ("again", '{"text": "a"}', {"text": "a"}), ("large", "1", 1),
        ("says_nothing", "[1]", "[1]"), ("not_in_the_schema", "1", "1"),
    ],
)  # fmt: skip
def test_a_value_is_of_a_type_that_its_schema_names(parameter, text, value):
    assert read(block(written("do", **{parameter: text})), "do") == ("", [("do", {parameter: value})])


def test_calls_are_in_their_order_with_the_text_around_them():
    first, second = written("do", text="} {"), written("look")
    answer = f"Now.\n{block(first, second)} and <b> then\n{block(first)}Done."
    calls = [("do", {"text": "} {"}), ("look", {})]
    assert read(answer, "do", "look") == ("Now.\n and <b> then\nDone.", [*calls, calls[0]])


def test_a_tool_that_was_not_offered_is_passed_over_unless_the_server_forwards_it(monkeypatch):
    answer = block(written("other", text="a"), written("do", text="b"))
    assert read(answer, "do") == ("", [("do", {"text": "b"})])
    with envs.SGLANG_FORWARD_UNKNOWN_TOOLS.override(True):
        assert read(answer, "do") == ("", [("other", {"text": "a"}), ("do", {"text": "b"})])


def test_the_first_of_two_values_counts():
    twice = '<invoke name="do"><parameter name="text">a</parameter><parameter name="text">b</parameter></invoke>'
    assert read(block(twice), "do") == ("", [("do", {"text": "a"})])


@pytest.mark.parametrize("end", ["", "\n", "</minimax:tool"])
def test_a_call_that_ended_counts_where_its_block_did_not(end):
    answer = block(written("do", text="a")).removesuffix("</minimax:tool_call>") + end
    assert read(answer, "do") == ("", [("do", {"text": "a"})])


def test_a_call_that_was_cut_off():
    """A whole answer keeps it as text; of a stream, which cannot take a name back, the engine closes the JSON."""
    started = '<invoke name="do">\n<parameter name="text">a}</parameter>\n<parameter name="count">1'
    answer = "So. <minimax:tool_call>\n" + started
    assert FunctionCallParser(tools("do"), "minimax-m2").parse_non_stream(answer) == (answer, [])
    ended = "So. <minimax:tool_call>\n" + written("look")
    normal, [call] = FunctionCallParser(tools("do", "look"), "minimax-m2").parse_non_stream(ended + started)
    assert (normal, call.name, call.parameters) == ("So. " + started, "look", "{}")
    text, [[name, arguments]], parser = streamed(list(answer), "do")
    chat, content = OpenAIServingChat.__new__(OpenAIServingChat), {"meta_info": {"id": "0"}}
    closing = chat._check_for_unstreamed_tool_args(parser, content, SimpleNamespace(model="m"), 0)
    [delta] = json.loads(closing.removeprefix("data: "))["choices"][0]["delta"]["tool_calls"]
    assert (text, name) == ("So. ", "do")
    assert json.loads(arguments + delta["function"]["arguments"]) == {"text": "a}"}


def test_the_engine_adds_nothing_to_a_call_that_ended():
    chat, content = OpenAIServingChat.__new__(OpenAIServingChat), {"meta_info": {"id": "0"}}
    for call in (written("do"), written("do", text="}", record='{"a": 1}')):
        parser = streamed([block(call)], "do")[2]
        assert chat._check_for_unstreamed_tool_args(parser, content, SimpleNamespace(model="m"), 0) is None


@pytest.mark.parametrize(
    "written_so",
    [
        "<invoke name='do'><parameter name='text'>a</parameter></invoke>",
        "<invoke  name=do >\r\n<parameter\nname=text>a</parameter>\r\n</invoke>",
        '<invoke> <invoke name="do">?<b><parameter>b</parameter> <parameter name="text">a</parameter></invoke>',
        '<invoke name="do"><parameter name="text">a</parameter>',
        '<invoke name="no"><parameter name="text">b</parameter> <invoke name="do"><parameter name="text">a</parameter>',
    ],
    ids=["single quotes", "none, and other blanks", "tags that are none", "its end is the block's", "or the next's"],
)
def test_a_call_that_is_written_otherwise(written_so):
    answer = f"<minimax:tool_call>{written_so}</minimax:tool_call>"
    assert read(f"{answer}\n{answer}\nDone.\n", "do") == ("\nDone.\n", [("do", {"text": "a"})] * 2)


def test_blanks_behind_a_block_are_no_text():
    assert read(f"Now.\n{block(written('do'))}\n\n{block(written('do'))}\n ", "do") == ("Now.\n", [("do", {})] * 2)


@pytest.mark.parametrize(
    "endless",
    ["<invoke name=\"a" + " " * 50_000, "<invoke" + " " * 50_000, "<invoke name=\"" * 4_000, "<" * 50_000,
     written("do", text="x" * 50_000)[:-30]],
    ids=["a name", "blanks", "openings", "brackets", "a value"],
)  # fmt: skip
def test_no_answer_takes_long_however_it_is_cut(endless):
    """Stock's reader takes 3 s of this last one, and a search that starts anew for each piece minutes of the first."""
    answer = "<minimax:tool_call>" + endless
    begin = time.process_time()
    streamed([answer[i : i + 4] for i in range(0, len(answer), 4)], "do")
    assert time.process_time() - begin < 2


@pytest.mark.parametrize("digits", [400, 5000], ids=str)
def test_an_integer_that_no_float_holds(digits):
    """Of 4300 digits and more Python makes no integer."""
    for text in ("9" * digits, "-" + "9" * digits):
        for name in ("count", "share", "number_or_text"):
            assert value_of(text, SCHEMA, name) == (int(text) if digits < 4300 else text)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/Args", "$defs": {"Args": {"properties": {"count": {"type": "integer"}}}}},
        {"oneOf": [{"properties": {"kind": {"const": "a"}}}, {"properties": {"count": {"type": "integer"}}}]},
        {"allOf": [{"properties": {"count": {}}}], "properties": {"count": {"type": "integer"}}},
    ],
    ids=lambda schema: next(iter(schema)),
)
def test_the_properties_of_a_schema_that_is_made_of_others(schema):
    """As Pydantic writes a model that refers to itself, and zod a union."""
    assert value_of("5", schema, "count") == 5
    assert value_of("5", schema, "kind") == value_of("5", schema, "other") == "5"


def test_schemas_that_refer_to_each_other_take_no_long_time():
    """With a way for each of the references that lead in circles, there are more of them than anyone can go."""
    ways = {"anyOf": [{"$ref": f"#/properties/{name}"} for name in ("many", "others", "count")] * 100}
    schema = {"type": "object", "properties": {"many": ways, "others": {**ways}, "count": {"type": "integer"}}}
    begin = time.process_time()
    assert value_of("5", schema, "many") == 5
    assert time.process_time() - begin < 2


@pytest.mark.parametrize(
    "answer",
    ["a <minimax:tool", "a <", "Say <minimax:tool_call> to call.\n\n", "<minimax:tool_call>\n</minimax:tool_call> So.",
     f"So. {block(written('other', text='a'))} It is <b>.\n", "<minimax:tool_call>\n" + written("other")[:-12]],
    ids=["half a tag", "a bracket", "a tag", "an empty block", "another tool", "half a call of another tool"],
)  # fmt: skip
def test_what_turns_out_to_be_no_call_is_text(answer):
    assert read(answer, "do") == (answer, [])


@pytest.mark.parametrize("text", [" <", " <minimax:tool_call", " So."])
def test_text_behind_a_call_is_said_when_the_answer_ends(text):
    assert read(block(written("do")) + text, "do") == (text, [("do", {})])


def test_a_call_of_another_tool_that_was_cut_off_is_text():
    half = written("other", text="a")[:-12]
    assert read(f"{block(written('do'))} <minimax:tool_call>{half}", "do") == (half, [("do", {})])


def test_no_text_is_lost_before_a_second_call_of_another_tool_that_was_cut_off():
    answer = f"One{block(written('other'))} two <minimax:tool_call>{written('other', text='a')[:-12]}"
    assert read(answer, "do") == (answer, [])
    assert MinimaxM2Detector().detect_and_parse(answer, tools("do")).normal_text == answer


def test_text_behind_a_block_without_a_call_is_said_once_a_call_begins():
    answer = f"One{block(written('other'))} two{block(written('do'))}three"
    assert read(answer, "do") == ("One twothree", [("do", {})])


texts = st.text(max_size=20).filter(lambda text: "</parameter>" not in text and text.strip().lower() != "null") | (
    st.sampled_from(["{", "}", "fi; }", '"', "\\", "</invoke>", "<invoke name='do'>", "<minimax:tool_call>", "\n"])
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
).filter(lambda value: "</parameter>" not in json.dumps(value, ensure_ascii=False))
values = st.fixed_dictionaries(
    {},
    optional={
        "text": texts, "optional": texts | st.none(), "count": st.integers(), "sure": st.booleans(),
        "share": st.floats(allow_nan=False, allow_infinity=False) | st.none(),
        "names": st.lists(json_values, max_size=3), "record": st.dictionaries(texts, json_values, max_size=3),
    },
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(calls=st.lists(st.tuples(st.sampled_from(["do", "look"]), values), max_size=4), data=st.data())
def test_what_a_model_means_is_what_a_client_gets_however_it_is_cut(calls, data):
    """Values are written as the chat template writes them: strings as they are, and JSON of everything else."""

    def as_text(value) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    answer = "Now. " + block(
        *(written(name, **{key: as_text(value) for key, value in arguments.items()}) for name, arguments in calls)
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=12)))
    pieces = [answer[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    text, found, _ = streamed(pieces, "do", "look")
    assert text == ("Now. " if calls else answer)
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
