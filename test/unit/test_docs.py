"""README and docs/ against the code: commands, links, quoted messages and the table of heads.

A command is not run here, but read: by the engine's own argument parser, and for a server its layout is checked
with the published shape. One that was not run to the end anywhere says so in a line under it, ``*Not run: ...*``.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sglang_minimax.checkpoints import SmallModel

REPOSITORY = Path(__file__).parents[2]
DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
PAGES = [REPOSITORY / "README.md", *DOCS, *REPOSITORY.glob("CONTRIBUTING.md")]
PUBLISHED = SmallModel(
    num_hidden_layers=62,
    hidden_size=3072,
    num_attention_heads=48,
    num_key_value_heads=8,
    head_dim=128,
    num_local_experts=256,
    num_experts_per_tok=8,
    intermediate_size=1536,
)

# Runs what docs/serving.md has for a machine without a GPU and for a client, as it stands there.
RUN_ON_A_SERVER = "test/layouts/test_recipes.py"

# Commands that are no server: what else in the repository runs them, or None where reading them is all there is.
OTHERS = {
    "bash scripts/demo.sh": None,
    "bash scripts/test.sh": None,
    "bash scripts/release.sh": "test/release/test_script.py",
    "pip install": "test/unit/test_overlay.py",
    "uv pip install": "test/unit/test_overlay.py",
    "pip uninstall sglang-minimax": "test/unit/test_overlay.py",
    "python -m sglang_minimax.": "python/sglang_minimax",
    "sglang-minimax ": "python/sglang_minimax",
    "python -m pytest": "test",
    "python -m uv build": "test/unit/test_overlay.py",
    "python -m uv tool run": ".pre-commit-config.yaml",
    "python test/registered/": "test/registered/test_registered_job.py",
    "py-spy dump": RUN_ON_A_SERVER,
    "pre-commit": ".pre-commit-config.yaml",
    "mkdocs": "mkdocs.yml",
    "git ": None,
    "cd ": None,
}
NEEDS_HARDWARE = ("python benchmark/", "export ")


@dataclass(frozen=True)
class Block:
    """A code block of a page: its language, its text, and the line of prose under it."""

    page: str
    line: int
    language: str
    text: str
    below: str

    @property
    def says_not_run(self) -> bool:
        return self.below.startswith("*Not run: ") and self.below.endswith("*")

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@functools.cache
def blocks() -> list[Block]:
    return [block for page in PAGES for block in _blocks_of(page)]


def _blocks_of(page: Path) -> Iterator[Block]:
    """Fenced blocks, and paragraphs that are indented by four spaces, which Markdown shows alike."""
    lines = page.read_text(encoding="utf-8").splitlines()
    i = 0
    while i < len(lines):
        start = i
        if lines[i].startswith("```"):
            language = lines[i][3:].split()[0] if lines[i][3:].strip() else ""
            end = next(n for n in range(i + 1, len(lines)) if lines[n].startswith("```"))
            content, i = lines[i + 1 : end], end + 1
        elif lines[i].startswith("    ") and (i == 0 or not lines[i - 1].strip()):
            while i < len(lines) and lines[i].startswith("    "):
                i += 1
            language, content = "", [line[4:] for line in lines[start:i]]
        else:
            i += 1
            continue
        below = next((line for line in lines[i : i + 2] if line.strip()), "")
        yield Block(page.name, start + 1, language, "\n".join(content), below)


def commands(block: Block) -> list[list[str]]:
    """The words of each command in a block; comments and environment assignments are left out."""
    joined = re.sub(r"\\\n\s*", " ", block.text)
    lines = [joined] if joined.startswith("curl ") else joined.splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [_without_assignments(words) for words in split if words]


def _without_assignments(words: list[str]) -> list[str]:
    return words[next(i for i, word in enumerate(words) if not re.match(r"[A-Z0-9_]+=", word)) :]


def all_commands() -> list:
    starts = ("python ", "pip ", "uv ", "bash ", "export ", "curl ", "git ", "mkdocs ", "SGLANG", "sglang-minimax ")
    return [
        pytest.param(block, words, id=f"{block}-{n}")
        for block in blocks()
        if block.language == "bash" or (not block.language and block.text.startswith(starts))
        for n, words in enumerate(commands(block))
    ]


@pytest.mark.parametrize(("block", "words"), all_commands())
def test_a_command_is_read_by_what_it_calls(block, words, monkeypatch):
    command = " ".join(words)
    if words[:3] == ["python", "-m", "sglang.launch_server"]:
        check_server(words[3:])
        small = "--device" in words  # of which there is one, and RUN_ON_A_SERVER starts it
        assert small or block.page == "README.md" or _not_run(block), f"{block} must say that it was not run"
    elif words[:3] == ["python", "-m", "sglang.bench_serving"]:
        check_benchmark(words[3:], monkeypatch)
        assert block.page == "serving.md" or _not_run(block), f"{block} must say that it was not run"
    elif words[:2] == ["sglang-minimax", "bench"]:
        check_bench(words[1:], monkeypatch)
    elif words[0] == "curl":
        if "-d" in words:
            check_chat(words)
        assert block.page == "serving.md" and (REPOSITORY / RUN_ON_A_SERVER).exists()
    elif command.startswith(NEEDS_HARDWARE):
        measured = block.page in ("performance.md", "performance-earlier.md", "kernels.md")
        assert measured or _not_run(block), f"{block} must say that it was not run"
    else:
        known = [start for start in OTHERS if command.startswith(start)]
        assert known, f"{block}: nothing checks {command!r}; add it here, or what runs it"
        runs = OTHERS[known[0]]
        assert runs is None or (REPOSITORY / runs).exists()
        check_paths(words)


def _not_run(block: Block) -> bool:
    """Whether the block, or the next one of several that belong together, says so."""
    later = [other for other in blocks() if other.page == block.page and 0 <= other.line - block.line <= 8]
    return any(other.says_not_run for other in later)


def check_server(arguments: list[str]) -> None:
    """The engine's parser takes the arguments, and the overlay's decisions take the layout."""
    from sglang.srt.layers.minimax_sharding import ExpertShape, attention_tp_size, shard_attention
    from sglang.srt.server_args import ServerArgs

    from sglang_minimax.server_arguments import settle_ep_size

    parser = argparse.ArgumentParser(exit_on_error=False)
    ServerArgs.add_cli_args(parser)
    args = parser.parse_args([word.replace("FIRST_NODE", "10.0.0.1") for word in arguments])
    shape = PUBLISHED if args.device != "cpu" else SmallModel()
    ranks = attention_tp_size(args.tensor_parallel_size, args.data_parallel_size if args.enable_dp_attention else 1)
    shard_attention(shape.num_attention_heads, shape.num_key_value_heads, ranks)
    block = 1 if args.quantization == "modelopt_fp4" or args.device == "cpu" else 128
    experts = ExpertShape(shape.num_local_experts, shape.intermediate_size, block)
    left_alone = not {"--ep", "--ep-size"} & set(arguments)
    assert settle_ep_size(experts, args.tensor_parallel_size, args.expert_parallel_size, left_alone) >= 1
    assert args.tensor_parallel_size % args.nnodes == 0 and 0 <= args.node_rank < args.nnodes


def check_benchmark(arguments: list[str], monkeypatch) -> None:
    """The benchmark's own parser, which its script builds, takes the arguments."""
    from sglang import bench_serving

    class Read(Exception):
        pass

    original = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *given, **options):
        original(self, *given, **options)
        raise Read

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", ["bench_serving", *arguments])
    with pytest.raises(Read):
        runpy.run_path(bench_serving.__file__, run_name="__main__")


def check_bench(arguments: list[str], monkeypatch) -> None:
    """Our own parser takes the arguments, and what belongs to single contestants names those that there are."""
    from sglang_minimax import cli
    from sglang_minimax.bench import command, contestants

    def read(options: argparse.Namespace) -> int:
        names = re.sub("=[^,]*", f"={REPOSITORY / 'test'}", options.compare or "")
        assert all(contestant.name for contestant in contestants.parse(names, options.env, options.extra))
        return 0

    monkeypatch.setattr(command, "run", read)
    assert cli.main(arguments) == 0


def check_chat(words: list[str]) -> None:
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    request = ChatCompletionRequest(**json.loads(words[words.index("-d") + 1]))
    assert request.tools


def check_paths(words: list[str]) -> None:
    """Files and modules of this repository that a command names are there."""
    for word in words:
        if word.startswith(("test/", "scripts/", "python/", "benchmark/")):
            assert (REPOSITORY / word.split("::")[0]).exists(), f"{word} does not exist"
        if word.startswith("sglang_minimax."):
            assert importlib.util.find_spec(word), f"{word} does not exist"


def test_the_parsers_of_the_recipes_are_the_engines():
    from sglang.srt.function_call.function_call_parser import FunctionCallParser
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    text = (REPOSITORY / "docs/serving.md").read_text()
    for name in re.findall(r"--tool-call-parser ([\w-]+)", text):
        assert name in FunctionCallParser.ToolCallParserEnum
    for name in re.findall(r"--reasoning-parser ([\w-]+)", text):
        assert name in ReasoningParser.DetectorMap


CALL = """I look it up.
<minimax:tool_call>
<invoke name="weather">
<parameter name="city">Oslo</parameter>
</invoke>
</minimax:tool_call>"""


def test_the_tool_parser_does_what_the_page_says():
    from sglang.srt.entrypoints.openai.protocol import Tool
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    curl = next(words for block in blocks() for words in commands(block) if words[0] == "curl" and "-d" in words)
    tools = [Tool(**tool) for tool in json.loads(curl[curl.index("-d") + 1])["tools"]]
    text, calls = FunctionCallParser(tools, "minimax-m2").parse_non_stream(CALL)
    assert text.strip() == "I look it up."
    assert [(call.name, json.loads(call.parameters)) for call in calls] == [("weather", {"city": "Oslo"})]


def test_the_reasoning_parsers_do_what_the_page_says():
    """The template has written <think> already, so the model's text begins behind it."""
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    text = "Oslo is cold.</think>Take a coat."
    assert ReasoningParser("minimax-append-think").parse_non_stream(text) == ("", "<think>" + text)
    assert ReasoningParser("minimax").parse_non_stream(text) == ("Oslo is cold.", "Take a coat.")


# ------------------------------------------------------------------------------------------------ links


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), flags=re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    for name in re.findall(r"`((?:test|scripts|python|benchmark|docs)/[\w./-]+)`", page.read_text()):
        assert (REPOSITORY / name).exists(), f"{page.name} names {name}"


# --------------------------------------------------------------------------------------------- messages

# What torch and Python themselves say where stock fails.
SAID_BY_OTHERS = {
    "cannot reshape tensor of 0 elements into shape [0, -1, 128]": lambda: _torch().empty(0, 1536).view(0, -1, 128),
    "not enough values to unpack (expected 2, got 0)": lambda: _unpack_two(_torch().empty(0, 128)),
}


def _torch():
    import torch

    return torch


def _unpack_two(values) -> None:
    _, _ = values


def messages() -> list:
    lines = {
        line.strip(): f"{block}"
        for block in blocks()
        if block.page == "troubleshooting.md" and block.language == "text"
        for line in block.text.splitlines()
    }
    return [pytest.param(line, id=where) for line, where in lines.items()]


@functools.cache
def templates() -> list[list[str]]:
    """Every string of our code, and of what the page quotes of the engine, as its fixed pieces in order."""
    engine = Path(importlib.util.find_spec("sglang").submodule_search_locations[-1])
    files = [*(REPOSITORY / "python").rglob("*.py"), engine / "srt/layers/quantization/fp8.py"]
    return [pieces for file in files for pieces in _strings(ast.parse(file.read_text()))]


def _strings(tree: ast.AST) -> Iterator[list[str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield ["" if isinstance(part, ast.FormattedValue) else part.value for part in node.values]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n\n" not in node.value:
            yield re.split(r"%[sd]", node.value)


@pytest.mark.parametrize("message", messages())
def test_a_quoted_message_is_one_that_the_code_gives(message):
    if message in SAID_BY_OTHERS:
        with pytest.raises((RuntimeError, ValueError), match=re.escape(message)):
            SAID_BY_OTHERS[message]()
        return
    covered = set()
    for pieces in templates():
        literal = [piece.strip() for piece in pieces if piece.strip()]
        if sum(map(len, literal)) < 8:
            continue
        pattern = ".{0,200}?".join(f"({re.escape(piece)})" for piece in literal)
        for match in re.finditer(pattern, message):
            for group in range(1, len(literal) + 1):
                covered.update(range(*match.span(group)))
    for value in re.finditer(r"[\w-]+(\.[\w-]+)+", message):  # names of modules and of files
        covered.update(range(*value.span()))
    words = re.findall(r"[A-Za-z]{4,}", "".join(" " if i in covered else c for i, c in enumerate(message)))
    assert len(words) <= 2 and len(covered) >= len(message) / 3, f"no string of the code says {words or message}"


# ------------------------------------------------------------------------------------------------ heads


def test_the_table_of_heads_is_the_models_arithmetic():
    from sglang.srt.layers.minimax_sharding import shard_attention

    text = (REPOSITORY / "docs/heads.md").read_text()
    rows = [[int(cell) for cell in row] for row in re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.M)]
    assert [row[0] for row in rows] == [1, 2, 4, 8, 16]
    for ranks, heads, replicas, num_bytes in rows:
        kv = shard_attention(48, 8, ranks).kv
        assert (heads, replicas) == (kv.heads_per_rank, kv.replicas)
        assert num_bytes == 2 * kv.heads_per_rank * PUBLISHED.head_dim * 2 * PUBLISHED.num_hidden_layers


def test_the_picture_of_heads_is_the_models_arithmetic():
    from sglang.srt.layers.minimax_sharding import shard_attention

    picture = re.search(r"<pre.*?</pre>", (REPOSITORY / "docs/heads.md").read_text(), re.S).group()
    q_heads = re.search(r"q heads │(.+)│", picture).group(1).split("│")
    kv_heads = re.search(r"KV head │(.+)│", picture).group(1).replace("│", " ").split()
    shards = shard_attention(48, 8, 16)
    for rank in range(16):
        held = shards.q.heads_of(rank)
        assert q_heads[rank].strip() == f"{held[0]}-{held[-1]}"
        assert [int(kv_heads[rank])] == list(shards.kv.heads_of(rank))


PASSED_TO_CHILDREN = {"SGLANG_MINIMAX_WARNED", "SGLANG_MINIMAX_BENCH_TURN"}  # set by this package, not by people


def test_the_page_of_switches_has_every_one():
    sources = [path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "python").rglob("*.py"))]
    read = {name for text in sources for name in re.findall(r"SGLANG_MINIMAX_[A-Z_]+[A-Z]", text)} - PASSED_TO_CHILDREN
    page = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
    section = page.split("\n## Switches\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(SGLANG_MINIMAX_[A-Z_]+)`", section, re.M)) == read
