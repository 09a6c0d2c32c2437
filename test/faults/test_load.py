"""A server under DP attention whose ranks are busy and idle by turns: many requests at once, clients that leave,
requests that make no sense. One server for all of it, so each test also shows that the ones before left it whole."""

from __future__ import annotations

import asyncio
import collections
import json
import random
import threading
import time

import aiohttp
import pytest
from faults.serving import Client, check_answer, chosen, generate_body, reference_beside, serve

from sglang_minimax.checkpoints import SmallModel, write_checkpoint
from sglang_minimax.cpu_host import has_no_accelerator

pytestmark = pytest.mark.skipif(not has_no_accelerator(), reason="this host has an accelerator: see test/gpu")

SHAPE = SmallModel(num_hidden_layers=2, num_local_experts=8, intermediate_size=128)
LAYOUT = "--tp 4 --dp 4 --ep 4 --enable-dp-attention --skip-tokenizer-init"
NUM_REQUESTS = 500


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), SHAPE)


@pytest.fixture(scope="module")
def reference(checkpoint):
    with reference_beside(checkpoint) as reference:
        yield reference


@pytest.fixture(scope="module")
def running(checkpoint, tmp_path_factory):
    with serve(checkpoint, tmp_path_factory.mktemp("log") / "server.log", *LAYOUT.split()) as both:
        yield both


@pytest.fixture
def client(running) -> Client:
    return running[1]


@pytest.fixture(autouse=True)
def server_goes_on(running, reference):
    """After each test the server answers as ever, is empty, and no rank has said that something went wrong."""
    server, client = running
    yield
    prompt = [7, 70, 700]
    check_answer(client.generate(prompt, 4), prompt, 4, reference)
    flush_when_empty(client)
    assert "Scheduler hit an exception" not in server.log.read_text(errors="replace")


def flush_when_empty(client: Client) -> None:
    """The engine empties its prefix cache only when no request runs or waits on any rank."""
    deadline = time.monotonic() + 20
    while (status := client.send("/flush_cache", {})[0]) != 200:
        assert time.monotonic() < deadline, f"requests are left on a rank: /flush_cache answers {status}"
        time.sleep(0.2)


# --- Many at once ----------------------------------------------------------------------------------------


def random_requests(generator: random.Random) -> list[tuple[list[int], int, int]]:
    """(prompt, steps, DP rank): rank 3 has nothing all along, rank 2 little, ranks 0 and 1 the rest.

    Every tenth prompt begins as the one before it, so that the prefix cache has something to do.
    """
    requests = []
    for index in range(NUM_REQUESTS):
        prompt = [generator.randrange(SHAPE.vocab_size) for _ in range(generator.randint(1, 48))]
        if index % 10 == 9:
            prompt = [*requests[-1][0], *prompt[:8]]
        rank = 2 if index % 50 == 0 else generator.randrange(2)
        requests.append((prompt, generator.randint(1, 12), rank))
    return requests


async def all_at_once(url: str, bodies: list[dict]) -> list[dict]:
    connections = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=170)
    async with aiohttp.ClientSession(connector=connections, timeout=timeout, trust_env=False) as session:

        async def one(body: dict) -> dict:
            async with session.post(f"{url}/generate", json=body) as reply:
                assert reply.status == 200, await reply.text()
                return await reply.json()

        return await asyncio.gather(*map(one, bodies))


def test_500_concurrent_requests_answer_as_each_alone(client, reference):
    requests = random_requests(random.Random(0))
    bodies = [generate_body(prompt, steps, routed_dp_rank=rank) for prompt, steps, rank in requests]
    answers = asyncio.run(all_at_once(client.url, bodies))
    ties = 0
    for answer, (prompt, steps, _) in zip(answers, requests, strict=True):
        ties += check_answer(answer, prompt, steps, reference)
    total = sum(steps for _, steps, _ in requests)
    assert ties <= total // 1000, f"{ties} of {total} tokens differ from the reference's, if all by ties"
    for index in range(0, NUM_REQUESTS, 100):  # and the server alone says the same as the reference and the crowd
        prompt, steps, _ = requests[index]
        assert chosen(client.generate(prompt, steps))[0] == chosen(answers[index])[0]


# --- Clients that leave ----------------------------------------------------------------------------------


def test_clients_that_leave_in_mid_stream(client, reference):
    """The ranks let go of their requests, while the one client that stays gets its whole answer."""
    staying, steps, answers = [5, 6, 7, 8], 80, []
    stays = threading.Thread(target=lambda: answers.append(client.generate(staying, steps)))
    stays.start()
    for index in range(12):
        body = generate_body([index + 1, 300, 301], 3000, routed_dp_rank=index % 4)
        with client.stream(body) as events:
            first = [next(events), next(events)]
        assert all(not event["meta_info"]["finish_reason"] for event in first)
    flush_after = time.monotonic()
    stays.join(timeout=60)
    assert answers, "the client that stayed has no answer"
    assert check_answer(answers[0], staying, steps, reference) <= 1
    flush_when_empty(client)  # 12 requests of 3000 tokens would run for minutes
    assert time.monotonic() - flush_after < 60


def test_a_request_that_is_aborted_by_its_id(client):
    with client.stream(generate_body([1, 2, 3], 3000, rid="to-be-aborted")) as events:
        next(events)
        assert client.send("/abort_request", {"rid": "to-be-aborted"})[0] == 200
        *_, last = events
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert last["meta_info"]["completion_tokens"] < 3000


def test_what_some_requests_of_a_batch_ask_for_is_not_looked_for_in_the_others(client, reference):
    """Where a server has it not to give, too: stock ends."""
    prompts = [[1, 2, 3 + i] for i in range(4)]
    answers: dict[int, list[dict]] = {}

    def ask(number: int) -> None:
        body = generate_body(prompts, 8, return_routed_experts=bool(number % 2), return_logprob=True)
        status, text = client.send("/generate", body)
        answers[number] = json.loads(text) if status == 200 else [{"error": text}]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own in answers.values():
        for prompt, answer in zip(prompts, own, strict=True):
            check_answer(answer, prompt, 8, reference)


def test_a_session_is_opened_on_all_dp_ranks(client):
    assert client.send("/open_session", {"capacity_of_str_len": 1000, "session_id": "s"})[0] == 200
    answer = client.generate([1, 2, 3], 2, session_params={"id": "s"})
    assert answer["meta_info"]["completion_tokens"] == 2
    assert client.send("/close_session", {"session_id": "s"})[0] == 200


# --- Requests that make no sense -------------------------------------------------------------------------


def sampled(**parameters) -> dict:
    return {"input_ids": [1, 2], "sampling_params": {"temperature": 1, "max_new_tokens": 4, **parameters}}


GOOD, LONG = [1, 2], SHAPE.max_position_embeddings
MALFORMED = {
    "token ids": {
        "none": generate_body([], 4),
        "none in a batch": generate_body([GOOD, []], 4),
        "a batch of none": generate_body([[]], 4),
        "past the vocabulary": generate_body([1, SHAPE.vocab_size], 4),
        "past the vocabulary in a batch": generate_body([GOOD, [SHAPE.vocab_size]], 4),
        "past 32 bits": generate_body([2**40], 4),
        "past 64 bits": generate_body([2**70], 4),
        "negative": generate_body([1, -1], 4),
        "negative in a batch": generate_body([GOOD, [-5]], 4),
        "a string": generate_body("abc", 4),
        "strings": generate_body(["a", "b"], 4),
        "fractions": generate_body([1.5], 4),
        "null": generate_body([1, None], 4),
        "ids and lists": generate_body([1, [2]], 4),
        "lists and ids": generate_body([[1], 2], 4),
    },
    "lengths": {
        "prompt": generate_body([5] * (LONG + 1), 4),
        "prompt and answer": generate_body([5] * (LONG - 10), 11),
        "negative": sampled(max_new_tokens=-1),
        "a fraction": sampled(max_new_tokens=1.5),
        "a string": sampled(max_new_tokens="x"),
    },
    "sampling": {
        "no object": {"input_ids": GOOD, "sampling_params": "x"},
        "temperature: a string": sampled(temperature="hot"),
        "temperature: negative": sampled(temperature=-1),
        "temperature: NaN": sampled(temperature=float("nan")),
        "top_p": sampled(top_p=2),
        "top_k: a string": sampled(top_k="a"),
        "top_k: past 32 bits": sampled(top_k=2**40),
        "n": sampled(n=0),
        "logit_bias: past the vocabulary": sampled(logit_bias={str(SHAPE.vocab_size): 1.0}),
        "logit_bias: a string": sampled(logit_bias={"3": "x"}),
        "stop_token_ids: past the vocabulary": sampled(stop_token_ids=[SHAPE.vocab_size]),
        "min_new_tokens: no tokenizer": sampled(min_new_tokens=2),
        "regex: a number": sampled(regex=5),
        "stop: a number": sampled(stop=5),
        "stop: no tokenizer": sampled(stop=["x"]),
        "stop_regex: no pattern": sampled(stop_regex="(["),
        "skip_special_tokens: null": sampled(skip_special_tokens=None),
        "logit_bias: past 32 bits": sampled(logit_bias={"3": 1e39}),
        "repetition_penalty: nothing": sampled(repetition_penalty=0),
        "a list for one prompt": {"input_ids": GOOD, "sampling_params": [{}]},
    },
    "log-probabilities": {
        "token_ids_logprob": generate_body(GOOD, 4, token_ids_logprob=[SHAPE.vocab_size]),
        "top_logprobs_num: negative": generate_body(GOOD, 4, top_logprobs_num=-3),
        "top_logprobs_num: past the vocabulary": generate_body(GOOD, 4, top_logprobs_num=SHAPE.vocab_size + 1),
        "top_logprobs_num: a list for one prompt": generate_body(GOOD, 4, top_logprobs_num=[1]),
        "top_logprobs_num: one for two prompts": generate_body([GOOD, GOOD], 4, top_logprobs_num=[1]),
        "logprob_start_len: a list for one prompt": generate_body(GOOD, 4, logprob_start_len=[0]),
        "logprob_start_len: negative": generate_body(GOOD, 4, logprob_start_len=-7),
        "logprob_start_len: past the prompt": generate_body(GOOD, 4, logprob_start_len=50),
    },
    "requests": {
        "no prompt": {"sampling_params": {}},
        "text without a tokenizer": {"text": "hello"},
        "text that is none": {"text": 5},
        "no such DP rank": generate_body(GOOD, 4, routed_dp_rank=9),
        "no JSON": b"{nope",
        "no object": b"[1, 2]",
    },
}


@pytest.mark.parametrize("group", MALFORMED)
def test_malformed_requests_are_refused_and_others_go_on(group, client, reference):
    prompt, steps = [9, 90, 900], 24
    with client.stream(generate_body(prompt, steps)) as events:  # shares its rank with whatever gets through
        next(events)
        for name, body in MALFORMED[group].items():
            status, text = client.send("/generate", body, timeout_seconds=20)
            assert status == 400 and len(text) > 20, f"{name}: {status} {text}"
        *_, last = events
    assert check_answer(last, prompt, steps, reference) == 0


def test_malformed_streams_end_with_an_error(client):
    """The engine begins a stream before it looks at the request: status 200, and the error is the only event."""
    for name, body in MALFORMED["token ids"].items():
        if not name.startswith(("past", "negative", "none")):
            continue
        with client.stream(body) as events:
            [event] = events
        assert "input_ids" in event["error"]["message"], (name, event)


def test_malformed_completions_of_the_openai_api(client):
    for prompt in ([], [SHAPE.vocab_size], [-1], [1.5], [1] * (LONG + 1)):
        status, text = client.send("/v1/completions", {"model": "m", "prompt": prompt, "max_tokens": 2})
        assert status == 400 and json.loads(text)["message"], (prompt, text)


def test_nothing_is_kept_of_requests_that_were_refused(client):
    """The id of a refused request is free again: the engine refuses ids that it thinks are in flight."""
    refused = collections.Counter()
    for body in (
        generate_body([-1], 4, rid="again"),
        generate_body([5] * (LONG + 1), 4, rid="again"),
        generate_body(GOOD, 4, rid="again", lora_path="absent"),
        {**sampled(top_k=0), "rid": "again"},
        {"text": "hello", "rid": "again"},
    ):
        refused[client.send("/generate", body)[0]] += 1
    assert refused == {400: 5}
    assert client.generate(GOOD, 4, rid="again")["meta_info"]["id"] == "again"
