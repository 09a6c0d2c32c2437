"""Tool calls as MiniMax-M2 writes them, in blocks among its text:

    <minimax:tool_call>
    <invoke name="weather">
    <parameter name="city">Oslo</parameter>
    </invoke>
    </minimax:tool_call>

The format, and that ``null`` is null for any type, is the publisher's (docs/tool_calling_guide.md of
github.com/MiniMax-AI/MiniMax-M2.5). The chat template writes a string as it is, so here none of its characters is taken
away, and a value ends at its own closing tag and nowhere else; a value of another type is JSON. One reader takes text
in pieces of any size, and a whole answer is one piece: the calls that a client gets do not depend on the pieces.
"""

from __future__ import annotations

import json
import logging
import math
import re
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.environ import envs
from sglang.srt.function_call.base_format_detector import BaseFormatDetector
from sglang.srt.function_call.core_types import StreamingParseResult, ToolCallItem, _GetInfoFunc

logger = logging.getLogger(__name__)

BLOCK, END_OF_BLOCK = "<minimax:tool_call>", "</minimax:tool_call>"
CALL, END_OF_CALL = "<invoke", "</invoke>"
PARAMETER, END_OF_PARAMETER = "<parameter", "</parameter>"
_NAME = re.compile(r"""\s+name=(?:(?P<quote>["'])(?P<quoted>[^<]*?)(?P=quote)|(?P<bare>[^"'<>\s]*))\s*>""")
LONGEST_TAG = 1024  # characters; what is longer is none


@dataclass
class _Call:
    """A call that is being read. ``index``: its place among the answer's calls; None: it is passed over."""

    name: str
    index: int | None
    text: str  # as it was written so far
    arguments: dict[str, Any] = field(default_factory=dict)


class MinimaxM2Detector(BaseFormatDetector):
    """The engine's ``--tool-call-parser minimax-m2``: one for each answer."""

    def __init__(self) -> None:
        super().__init__()
        self.bot_token, self.eot_token = BLOCK, END_OF_BLOCK
        self._buffer = ""  # what was not read yet
        self._searched = 0  # its first characters, in which nothing is that is looked for
        self._in_block = self._behind_block = False
        self._call: _Call | None = None
        self._parameter: str | None = None  # whose value is being read
        # The first block and what follows, as it was written, until a call begins: if none does, it is all text.
        self._unsure: list[str] = []
        self._text_behind = ""  # the part of that which is text even if one does

    def has_tool_call(self, text: str) -> bool:
        return BLOCK in text

    def supports_structural_tag(self) -> bool:
        return False

    def structure_info(self) -> _GetInfoFunc:
        raise NotImplementedError("this format is no structural tag: supports_structural_tag() is False")

    def detect_and_parse(self, text: str, tools: list[Tool]) -> StreamingParseResult:
        """The calls of a whole answer, and its text without them. A call that was cut off stays text."""
        reader = type(self)()
        found = reader.parse_streaming_increment(text, tools)
        unfinished = reader._call
        rest = reader.rest_of_text()
        if unfinished and not reader._unsure:  # where no call began, that has what was cut off, and all before it
            rest = unfinished.text + reader._buffer
        calls: dict[int, ToolCallItem] = {}
        for item in found.calls:
            call = calls.setdefault(item.tool_index, ToolCallItem(tool_index=item.tool_index, name="", parameters=""))
            call.name, call.parameters = call.name or item.name, call.parameters + item.parameters
        if unfinished and unfinished.index is not None:
            del calls[unfinished.index]
        return StreamingParseResult(normal_text=found.normal_text + rest, calls=list(calls.values()))

    def parse_streaming_increment(self, new_text: str, tools: list[Tool]) -> StreamingParseResult:
        """What a further piece of the answer completes: a call's name first, then each parameter as its end is read.

        The strings of a call, put together, are one JSON object.
        """
        self._buffer += new_text
        if self._unsure:
            self._unsure.append(new_text)
        result = StreamingParseResult()
        while self._step(result, {tool.function.name: tool.function.parameters for tool in tools}):
            pass
        return result

    def rest_of_text(self) -> str:
        """What was held back of the text of a stream that has ended, since more could have followed.

        A call that was cut off is none of it: its name was said.
        """
        if self._unsure:
            return "".join(self._unsure)
        if self._call is not None:
            return self._call.text + self._buffer if self._call.index is None else ""
        return self._buffer if not self._in_block and self._buffer.strip() else ""

    def _step(self, result: StreamingParseResult, schemas: dict[str | None, Any]) -> bool:
        """Reads up to the end of one tag; False: what is looked for is not there yet, or not all of it."""
        if not self._in_block:
            return self._read_text(result)
        if self._parameter is not None:
            return self._read_value(result, schemas)
        if (found := self._next_tag(*self._tags())) is None:
            return False
        start, end, name = found
        tag, before = self._buffer[start:end], self._take(end)[:start]
        if self._call is not None and name is not None and tag.startswith(PARAMETER):
            self._call.text += before + tag
            self._parameter = name
            return True
        if self._call is not None:  # its end, its block's, or the next call where it has none
            self._end(result)
        if name is not None:
            self._begin(name, tag, result, schemas)
        self._in_block = tag != END_OF_BLOCK
        return True

    def _tags(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """How a tag with a name begins, and the tags without one, that are looked for in a block."""
        if self._call is None:
            return (CALL,), (END_OF_BLOCK,)
        return (PARAMETER, CALL), (END_OF_CALL, END_OF_BLOCK)

    def _read_text(self, result: StreamingParseResult) -> bool:
        text, found, _ = self._buffer.partition(BLOCK)
        kept = 0 if found else self._ends_with_partial_token(text, BLOCK)
        said = text[: len(text) - kept]
        if self._behind_block and not said.strip():  # blanks that say nothing unless text follows
            said, kept = "", len(text)
        if self._unsure:
            self._text_behind += said
        else:
            result.normal_text += said
        if found and not self._unsure and not self.prev_tool_call_arr:
            self._unsure = [self._buffer[len(text) :]]
        self._take(len(text) + len(BLOCK) if found else len(text) - kept)
        self._in_block = bool(found)
        self._behind_block = self._in_block or (self._behind_block and not said)
        return self._in_block

    def _read_value(self, result: StreamingParseResult, schemas: dict[str | None, Any]) -> bool:
        assert self._call is not None and self._parameter is not None, "a value is a call's parameter's"
        end = self._buffer.find(END_OF_PARAMETER, self._searched)
        if end < 0:
            self._searched = max(0, len(self._buffer) - len(END_OF_PARAMETER) + 1)
            return False
        written = self._take(end + len(END_OF_PARAMETER))
        self._call.text += written
        self._add(self._parameter, written[:end], result, schemas)
        self._parameter = None
        return True

    def _next_tag(self, openings: tuple[str, ...], endings: tuple[str, ...]) -> tuple[int, int, str | None] | None:
        """(start, end, name) of the next tag in the buffer, which has no name if it is one of ``endings``; None: there
        is none yet. What else stands there is passed over, and looked at once."""
        start = self._buffer.find("<", self._searched)
        while start >= 0:
            for ending in endings:
                if self._buffer.startswith(ending, start):
                    return start, start + len(ending), None
            rest = self._buffer[start : start + LONGEST_TAG]
            opening = next((tag for tag in openings if rest.startswith(tag)), None)
            named = None if opening is None else _NAME.match(rest, len(opening))
            if named is not None:
                return start, start + named.end(), (named["quoted"] or named["bare"] or "").strip()
            following = self._buffer.find("<", start + 1)
            begun = opening is not None or any(tag.startswith(rest) for tag in (*openings, *endings))
            if following < 0 and len(rest) < LONGEST_TAG and begun:  # no name has a "<", so that more may complete it
                self._searched = start
                return None
            start = following
        self._searched = len(self._buffer)
        return None

    def _take(self, length: int) -> str:
        """The first characters of the buffer, which then begins behind them."""
        taken, self._buffer, self._searched = self._buffer[:length], self._buffer[length:], 0
        return taken

    def _begin(self, name: str, text: str, result: StreamingParseResult, schemas: dict[str | None, Any]) -> None:
        self._call = _Call(name, None, text)
        if name not in schemas:
            logger.warning("The model called %r, which is no tool of its request", name[:100])
            if not envs.SGLANG_FORWARD_UNKNOWN_TOOLS.get():
                return
        result.normal_text += self._text_behind
        self._unsure, self._text_behind = [], ""
        self.current_tool_id = self._call.index = len(self.prev_tool_call_arr)
        # The engine looks at both when an answer ends, and completes the last call's JSON where it was cut off.
        self.prev_tool_call_arr.append({"name": name, "arguments": self._call.arguments})
        self.streamed_args_for_tool.append("")
        result.calls.append(ToolCallItem(tool_index=self._call.index, name=name, parameters=""))

    def _add(self, name: str, value: str, result: StreamingParseResult, schemas: dict[str | None, Any]) -> None:
        call = self._call
        assert call is not None, "a parameter is one of a call"
        if name in call.arguments:  # the first was said already
            logger.warning("The model gave %r of %r twice; the first counts", name[:100], call.name[:100])
            return
        call.arguments[name] = value_of(value, schemas.get(call.name), name)
        pair = json.dumps({name: call.arguments[name]}, ensure_ascii=False)[1:-1]
        self._say(("{" if len(call.arguments) == 1 else ", ") + pair, result)

    def _end(self, result: StreamingParseResult) -> None:
        assert self._call is not None, "only a call that began ends"
        self._say("}" if self._call.arguments else "{}", result)
        self._call = None

    def _say(self, part: str, result: StreamingParseResult) -> None:
        """A further part of the call's JSON."""
        assert self._call is not None, "JSON is a call's"
        if self._call.index is not None:
            self.streamed_args_for_tool[self._call.index] += part
            result.calls.append(ToolCallItem(tool_index=self._call.index, name=None, parameters=part))


def value_of(text: str, schema: Any, name: str) -> Any:
    """A parameter's value, of one of the types that the tool's schema names for it.

    Args:
        text: as the model wrote it.
        schema: JSON schema of the tool's parameters, or anything, which says nothing.
        name: of the parameter.

    Returns:
        None for ``null``; JSON of a type that is named; else, where strings are allowed or nothing is named, the text;
        else what is nearest to a type that is named, or the text.
    """
    if text.strip().lower() == "null":
        return None
    types: set[str] = set()
    for way in _ways(schema, schema):
        properties = way.get("properties")
        types |= types_of(properties.get(name) if isinstance(properties, dict) else None, schema)
    types = types or {"string"}
    value = _NO_JSON if types == {"string"} else _json(text)
    if value is not _NO_JSON and not isinstance(value, str) and types & _types_of_value(value):
        return int(value) if isinstance(value, float) and "number" not in types else value
    if "string" in types:
        return text
    for kind, convert in _NEAREST.items():
        if kind in types:
            try:
                return convert(text.strip().lower())
            except (ValueError, OverflowError, KeyError):
                continue
    return text if value is _NO_JSON else value


def types_of(schema: Any, root: Any) -> set[str]:
    """The JSON types that a schema allows, by the names that it uses; empty: it does not say.

    Args:
        root: where its references lead.
    """
    types: set[str] = set()
    for way in _ways(schema, root):
        named = way.get("type")
        names = [one.lower() for one in (named if isinstance(named, list) else [named]) if isinstance(one, str)]
        types |= {_SYNONYMS.get(one, one) for one in names}
        values = list(way["enum"]) if isinstance(way.get("enum"), list) else []
        for value in values + ([way["const"]] if "const" in way else []):
            types |= {"null"} if value is None else {"string"} if isinstance(value, str) else _types_of_value(value)
    return types


def _ways(schema: Any, root: Any) -> Iterator[dict[str, Any]]:
    """A schema, those that it combines and those that it refers to; each once, since references lead in circles."""
    left, seen = [schema], set()
    while left:
        one = left.pop()
        if not isinstance(one, dict) or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        for key in ("anyOf", "oneOf", "allOf"):
            left += one[key] if isinstance(one.get(key), list) else []
        if isinstance(reference := one.get("$ref"), str) and re.match("#(/|$)", reference):
            left.append(_target(root, reference[1:]))


def _target(root: Any, pointer: str) -> Any:
    """What a JSON pointer (RFC 6901) in a URI leads to, or None."""
    for key in urllib.parse.unquote(pointer).split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if isinstance(root, list):
            root = root[int(key)] if key.isdecimal() and int(key) < len(root) else None
        else:
            root = root.get(key) if isinstance(root, dict) else None
    return root


_SYNONYMS = {"str": "string", "text": "string", "int": "integer", "float": "number", "bool": "boolean"}
_NO_JSON = object()


def _json(text: str) -> Any:
    """Of text, or ``_NO_JSON``, as for what no answer can hold: infinities, halves of surrogate pairs."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return _NO_JSON
    return value


def _types_of_value(value: Any) -> set[str]:
    """Of what JSON gave, strings left out."""
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, (int, float)):  # an integer may be too large for any float
        return {"integer", "number"} if isinstance(value, int) or value.is_integer() else {"number"}
    return {"object"} if isinstance(value, dict) else {"array"} if isinstance(value, list) else set()


def _number(text: str) -> int | float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"JSON has no {value}")
    return int(value) if value == int(value) else value


_TRUTH = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)
_NEAREST: dict[str, Callable[[str], Any]] = {  # for text that is no JSON of a type that is named: +3, 007, True, none
    "null": {"none": None, "nil": None, "": None}.__getitem__,
    "integer": int,
    "number": _number,
    "boolean": _TRUTH.__getitem__,
}
