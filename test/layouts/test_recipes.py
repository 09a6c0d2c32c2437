"""The commands of docs/serving.md that need no GPU, run as they stand there; and the ones for a client, on that server.

What the page shows of the log and of ``/server_info`` is compared with what this server says.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from sglang_minimax.cpu_host import has_no_accelerator
from sglang_minimax.ports import free_port, port_flags
from sglang_minimax.server_process import Server
from sglang_minimax.server_report import BLOCK_BEGINS

pytestmark = pytest.mark.skipif(not has_no_accelerator(), reason="this host has an accelerator: see test/gpu")

DOCS = Path(__file__).parents[2] / "docs"
SERVING = (DOCS / "serving.md").read_text(encoding="utf-8")


def commands(page: str, beginning: str) -> list[list[str]]:
    """The words of each command in the page's blocks that begins so; continued lines are one."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S):
        joined = block.replace("\\\n", " ")
        lines = [joined] if joined.startswith("curl ") else joined.splitlines()
        found += [shlex.split(line) for line in lines if line.startswith(beginning)]
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The page's two commands for a machine without a GPU, one after the other, with a port and the page's parsers."""
    folder, port = tmp_path_factory.mktemp("recipes"), free_port()
    [write] = commands(SERVING, "python -m sglang_minimax.checkpoints ")
    subprocess.run([sys.executable, *write[1:]], cwd=folder, check=True, timeout=120)
    [serve] = [words for words in commands(SERVING, "python -m sglang.launch_server ") if "--device" in words]
    [parsers] = [
        words for words in commands(SERVING, "python -m sglang.launch_server ") if "--tool-call-parser" in words
    ]
    serve += parsers[parsers.index("--tool-call-parser") :]
    before = Path.cwd()
    os.chdir(folder)
    try:
        with Server([sys.executable, *serve[1:], *port_flags(port)], folder / "server.log", port=port) as started:
            started.wait_until_ready(240, on_progress=lambda reached: None)
            yield started, port
    finally:
        os.chdir(before)


def run(words: list[str], timeout_s: float = 120) -> str:
    direct = {**os.environ, "NO_PROXY": "localhost,127.0.0.1", "no_proxy": "localhost,127.0.0.1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, env=direct)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_block_on_the_page_is_the_one_in_the_log(server):
    log = server[0].log.read_text(errors="replace")
    (said,) = re.findall(rf"^\[[^]]* DP0 TP0\] ({BLOCK_BEGINS} .*\n(?:  .*\n)+)", log, re.M)
    (shown,) = re.findall(rf"^```text\n({BLOCK_BEGINS} .*?)^```", SERVING, re.M | re.S)
    assert shown == said


def test_what_the_page_shows_of_server_info_is_there(server):
    info = json.loads(server[0].get("/server_info"))["sglang_minimax"]
    (shown,) = re.findall(r"^```json\n(.*?)^```", SERVING, re.M | re.S)
    shown = json.loads(shown)["sglang_minimax"]
    assert shown["version"] == info["version"] and shown["engine_version"] == info["engine_version"]
    assert shown["paths"].items() <= info["paths"].items() and shown["paths"]
    assert shown["ranks"] == info["ranks"][:1]


def test_the_command_that_asks_for_it(server):
    [ask] = [words for words in commands(SERVING, "curl ") if words[-1].endswith("/server_info")]
    words = [word.replace(":30000", f":{server[1]}") for word in ask]
    assert "sglang_minimax" in json.loads(run(words))


def test_the_request_with_a_tool_is_answered(server):
    [ask] = [words for words in commands(SERVING, "curl ") if "-d" in words]
    body = json.loads(ask[ask.index("-d") + 1])
    ask[ask.index("-d") + 1] = json.dumps(body | {"max_tokens": 8})  # a random model goes on to the end of its context
    reply = json.loads(run([word.replace(":30000", f":{server[1]}") for word in ask]))
    [choice] = reply["choices"]
    assert choice["message"]["content"].startswith("<think>"), "minimax-append-think puts it back"
    assert choice["finish_reason"] == "length" and reply["usage"]["completion_tokens"] == 8


def test_the_benchmark_runs(server, tmp_path):
    """With fewer and shorter requests than on the page: two CPU cores, and nothing is timed here."""
    [words] = commands(SERVING, "python -m sglang.bench_serving ")
    smaller = {"--random-input-len": "16", "--random-output-len": "4", "--num-prompts": "8", "--port": str(server[1])}
    for flag, value in smaller.items():
        words[words.index(flag) + 1] = value
    output = run([sys.executable, *words[1:], "--output-file", str(tmp_path / "bench.jsonl")], 240)
    assert re.search(r"Successful requests:\s+8\b", output), output
    assert re.search(r"Total generated tokens:\s+32\b", output), output


def test_py_spy_shows_where_a_rank_is(server):
    [words] = commands((DOCS / "troubleshooting.md").read_text(encoding="utf-8"), "py-spy ")
    ranks = [process for process in server[0].members() if "scheduler" in " ".join(process.cmdline())]
    assert len(ranks) == 4
    words = [str(Path(sys.executable).parent / words[0]), *words[1:]]
    words[words.index("PID")] = str(ranks[0].pid)
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    if done.returncode != 0 and "ermission" in done.stderr:
        pytest.skip("this host does not let a process look into another one of the same user")
    assert done.returncode == 0, done.stderr
    assert "event_loop" in done.stdout and isinstance(ranks[0], psutil.Process)
