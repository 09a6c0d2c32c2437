"""A server on CPU ranks for the tests of this folder, its requests, and the judge of its answers."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sglang_minimax.ports import free_port, port_flags
from sglang_minimax.reference import Reference
from sglang_minimax.server_process import Server

START_SECONDS = 150
REPLY_SECONDS = 60
TOLERANCE = 1e-4  # float32, another order of summation: 1e-5 is seen
TIE = 1e-5  # nats between the two likeliest tokens, within which rounding may choose


class Client:
    """Requests to a server on this host, without a proxy. Replies are (HTTP status, body as text)."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def send(self, path: str, body: Any, *, timeout_seconds: float = REPLY_SECONDS) -> tuple[int, str]:
        """Raises OSError if the server gives no reply at all."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=timeout_seconds) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def generate(self, prompt: Sequence[int], steps: int, **fields: Any) -> dict:
        status, text = self.send("/generate", generate_body(prompt, steps, **fields))
        assert status == 200, text
        return json.loads(text)

    @contextlib.contextmanager
    def stream(self, body: dict) -> Iterator[Iterator[dict]]:
        """The events of a streamed reply; leaving the block closes the connection, read to its end or not."""
        data = json.dumps(body | {"stream": True}).encode()
        request = urllib.request.Request(self.url + "/generate", data, {"Content-Type": "application/json"})
        with self._opener.open(request, timeout=REPLY_SECONDS) as reply:
            lines = (line.decode().removeprefix("data: ").strip() for line in reply)
            yield (json.loads(line) for line in lines if line and line != "[DONE]")


def generate_body(prompt: Sequence[int], steps: int, **fields: Any) -> dict:
    sampling = {"temperature": 0, "max_new_tokens": steps, "ignore_eos": True}
    return {"input_ids": list(prompt), "sampling_params": sampling, "return_logprob": True, **fields}


@contextlib.contextmanager
def serve(
    checkpoint: Path,
    log: Path,
    *flags: str,
    port: int | None = None,
    device: str = "cpu",
    start_seconds: float = START_SECONDS,
) -> Iterator[tuple[Server, Client]]:
    """A server that is ready, and its client; it is ended with all its processes."""
    port = port or free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(checkpoint), "--device", device]
    with Server([*command, *port_flags(port), *flags], log, port=port) as server:
        server.wait_until_ready(start_seconds, on_progress=lambda reached: None)
        yield server, Client(port)


@contextlib.contextmanager
def reference_beside(checkpoint: Path) -> Iterator[Reference]:
    """transformers in one thread: with more, each step waits for a thread that gets no core beside the ranks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield Reference(checkpoint)
    finally:
        torch.set_num_threads(before)


def chosen(answer: dict) -> tuple[list[int], list[float]]:
    """Tokens of an answer and their log-probabilities."""
    steps = answer["meta_info"]["output_token_logprobs"]
    return [token for _, token, *_ in steps], [logprob for logprob, *_ in steps]


def check_answer(answer: dict, prompt: Sequence[int], steps: int, reference: Reference) -> int:
    """Checks that ``answer`` is what transformers gives to ``prompt`` alone, and returns how many ties it broke.

    The answer's own tokens are scored, all steps in one pass: each must be the reference's likeliest, or as
    likely as that within ``TIE``, and have the reference's log-probability within ``TOLERANCE``.
    """
    tokens, logprobs = chosen(answer)
    assert len(tokens) == steps
    [expected] = reference.score([prompt], [tokens])
    ties = 0
    for step, ((likeliest, best),) in enumerate(expected.top):
        where = f"step {step} of {prompt} -> {tokens}"
        assert abs(logprobs[step] - expected.logprobs[step]) <= TOLERANCE, f"{where}: {expected.logprobs[step]}"
        if tokens[step] != likeliest:
            assert best - expected.logprobs[step] <= TIE, f"{where}: {likeliest} is likelier"
            ties += 1
    return ties


class LongRequest(threading.Thread):
    """A request that outlives the test; ``failure`` is what ended it."""

    def __init__(self, client: Client, dp_rank: int | None) -> None:
        super().__init__(daemon=True)
        self.client, self.dp_rank = client, dp_rank
        self.failure: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.client.generate([1, 2, 3], 4000, routed_dp_rank=self.dp_rank)
        except (OSError, AssertionError, ValueError) as error:
            self.failure = error


def rank_process(server: Server, name: str):
    [process] = [process for process in server.members() if process.cmdline() and name in process.cmdline()[0]]
    return process


def signal_while_serving(
    server: Server, client: Client, signum: int, rank: str, dp_ranks: Sequence[int | None], end_seconds: float
) -> float:
    """Sends ``signum`` to a rank in the middle of a request to each of ``dp_ranks`` (None: the server has none).

    Returns the seconds until the server has ended with all its processes, at most ``end_seconds``.
    """
    requests = [LongRequest(client, dp_rank) for dp_rank in dp_ranks]
    time.sleep(2)
    assert all(request.is_alive() for request in requests), "the requests ended before the rank did"
    rank_process(server, rank).send_signal(signum)
    sent = time.monotonic()
    while not server.has_ended() or server.members():
        elapsed = time.monotonic() - sent
        assert elapsed < end_seconds, f"{len(server.members())} processes left after {elapsed:.0f} s"
        time.sleep(0.2)
    elapsed = time.monotonic() - sent
    for request in requests:
        request.join(timeout=5)
        assert request.failure is not None, "a client still waits for a server that has ended, or was answered"
    return elapsed
