"""Many short requests to one server: its memory grows by what its caches may take, and by nothing else.

Outside the default run:

    python -m pytest test/faults/test_soak.py -m soak -s                      10,000 requests
    SOAK_REQUESTS=1000 python -m pytest test/faults/test_soak.py -m soak -s
"""

from __future__ import annotations

import asyncio
import os
import random
import time

import aiohttp
import pytest
from faults.serving import check_answer, generate_body, reference_beside, serve

from sglang_minimax.checkpoints import SmallModel, write_checkpoint
from sglang_minimax.cpu_host import has_no_accelerator

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(0),
    pytest.mark.skipif(not has_no_accelerator(), reason="this host has an accelerator: see test/gpu"),
]

NUM_REQUESTS = int(os.environ.get("SOAK_REQUESTS", "10000"))
AT_ONCE = 32
MEASUREMENTS = 10
CHECKED_EVERY = 100
LAYOUT = "--tp 2 --dp 2 --enable-dp-attention --skip-tokenizer-init --max-total-tokens 2048"
# Pools of the allocator and of Python settle for a while, and a process gains or loses some with each measurement.
# A leak of one hidden state a token (256 values of 4 bytes) would be 65 MB in the second half of 10,000 requests.
ALLOWED_GROWTH_MB = 30


def memory_mb(server) -> float:
    """Memory that the server's processes have for themselves (USS, 10^6 bytes), all together."""
    return sum(process.memory_full_info().uss for process in server.members()) / 1e6


async def send_all(url: str, bodies: list[dict], on_progress) -> list[dict]:
    """At most ``AT_ONCE`` in flight; ``on_progress`` is called a few times on the way, with none in flight."""
    answers: list[dict] = []
    async with aiohttp.ClientSession(trust_env=False) as session:
        places = asyncio.Semaphore(AT_ONCE)

        async def one(body: dict) -> dict:
            async with places, session.post(f"{url}/generate", json=body) as reply:
                assert reply.status == 200, await reply.text()
                return await reply.json()

        share = -(-len(bodies) // MEASUREMENTS)
        for first in range(0, len(bodies), share):
            answers += await asyncio.gather(*map(one, bodies[first : first + share]))
            on_progress(len(answers))
    return answers


def test_memory_stays_where_it_is(tmp_path):
    generator = random.Random(0)
    shape = SmallModel(num_hidden_layers=2, num_local_experts=8, intermediate_size=128)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", shape)
    requests = [
        ([generator.randrange(shape.vocab_size) for _ in range(generator.randint(1, 24))], generator.randint(1, 4))
        for _ in range(NUM_REQUESTS)
    ]
    with serve(checkpoint, tmp_path / "server.log", *LAYOUT.split()) as (server, client):
        measured: list[tuple[int, float]] = []
        started = time.monotonic()

        def measure(done: int) -> None:
            measured.append((done, memory_mb(server)))
            print(f"{done:6} requests, {time.monotonic() - started:5.0f} s: {measured[-1][1]:7.1f} MB", flush=True)

        measure(0)
        answers = asyncio.run(send_all(client.url, [generate_body(*request) for request in requests], measure))
        with reference_beside(checkpoint) as reference:
            for (prompt, steps), answer in list(zip(requests, answers, strict=True))[::CHECKED_EVERY]:
                check_answer(answer, prompt, steps, reference)
        log = server.log.read_text(errors="replace")
    assert "leak" not in log and "Traceback" not in log  # the engine counts its KV slots whenever it is idle
    half_way = measured[len(measured) // 2][1]
    grown = measured[-1][1] - half_way
    assert grown <= ALLOWED_GROWTH_MB, f"{grown:.1f} MB more than half-way: {measured}"
