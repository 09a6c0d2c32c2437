"""What a request may hold: everything that ranks would fail on is refused, and nothing that they can answer."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest

from sglang_minimax.request_checks import check_request, check_sampling_params

VOCAB = 1000


def request(**fields):
    """As the engine's, with nothing given."""
    names = ("input_ids", "token_ids_logprob", "top_logprobs_num", "logprob_start_len", "sampling_params")
    return SimpleNamespace(**(dict.fromkeys(names) | fields))


def check(has_tokenizer: bool = True, **fields) -> None:
    check_request(request(**fields), VOCAB, has_tokenizer=has_tokenizer)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"input_ids": [0, VOCAB - 1]},
        {"input_ids": [[0], [5, 6]], "sampling_params": [{}, {"n": 2}]},
        {"input_ids": [1], "top_logprobs_num": 0, "logprob_start_len": -1, "token_ids_logprob": [VOCAB - 1]},
        {"input_ids": [[1], [2]], "top_logprobs_num": [0, VOCAB], "logprob_start_len": [0, 7]},
        {"sampling_params": {"temperature": 0, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "max_new_tokens": None}},
        {"sampling_params": {"stop": "a", "stop_regex": ["b", "c"], "stop_token_ids": [3], "regex": "a*"}},
        {"sampling_params": {"logit_bias": {"3": -math.inf, "4": 1}, "sampling_seed": 2**40, "min_new_tokens": 2}},
        {"sampling_params": {"ignore_eos": True, "custom_params": {"a": object()}, "skip_special_tokens": False}},
    ],
)
def test_what_can_be_answered_passes(fields):
    check(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_ids": []}, r"input_ids=\[\] cannot be: input_ids needs at least one token"),
        ({"input_ids": [[1], []]}, r"needs at least one token"),
        ({"input_ids": [1, VOCAB]}, rf"input_ids\[1\] is {VOCAB}: token ids are integers from 0 to {VOCAB - 1}"),
        ({"input_ids": [-1]}, r"input_ids\[0\] is -1"),
        ({"input_ids": [[1], [2, 2**70]]}, r"input_ids\[1\] is 1180591620717411303424"),
        ({"input_ids": [True]}, r"input_ids\[0\] is True"),
        ({"input_ids": [1.0]}, r"input_ids\[0\] is 1.0"),
        ({"input_ids": [[1], 2]}, r"input_ids=2 cannot be: input_ids is a list of token ids"),
        ({"token_ids_logprob": [VOCAB]}, r"token_ids_logprob\[0\]"),
        ({"top_logprobs_num": VOCAB + 1}, r"top_logprobs_num is from 0 to 1000"),
        ({"top_logprobs_num": [1, -1]}, r"top_logprobs_num=-1"),
        ({"logprob_start_len": -2}, r"logprob_start_len is -1 \(output tokens only\) or more"),
        ({"sampling_params": ["x"]}, r"sampling_params is an object"),
        ({"sampling_params": [{}, {"n": 0}]}, r"n=0 cannot be: n is an integer from 1"),
    ],
)
def test_what_ranks_would_fail_on_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        check(**fields)


@pytest.mark.parametrize("name", ["max_new_tokens", "min_new_tokens", "top_k", "n", "stream_interval", "sampling_seed"])
@pytest.mark.parametrize("value", ["x", 1.5, True, 2**70, [1], math.nan])
def test_integers_are_integers(name, value):
    with pytest.raises(ValueError, match=f"^{name}=.*is an integer from"):
        check_sampling_params({name: value}, VOCAB, has_tokenizer=True)


@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"]
)
@pytest.mark.parametrize("value", ["x", None, True, [1], math.nan, math.inf, -math.inf])
def test_numbers_are_finite_numbers(name, value):
    with pytest.raises(ValueError, match=f"^{name}=.*is a finite number"):
        check_sampling_params({name: value}, VOCAB, has_tokenizer=True)


@pytest.mark.parametrize(
    "parameters",
    [
        {"regex": 5},
        {"json_schema": {"type": "object"}},
        {"stop": 5},
        {"stop_regex": ["a", 1]},
        {"stop_token_ids": [VOCAB]},
        {"stop_token_ids": [[1]]},
        {"stop_token_ids": 5},
        {"logit_bias": [1]},
        {"logit_bias": {"-1": 1.0}},
        {"logit_bias": {str(VOCAB): 1.0}},
        {"logit_bias": {"x": 1.0}},
        {"logit_bias": {"3": "x"}},
        {"logit_bias": {"3": math.nan}},
    ],
)
def test_other_sampling_parameters(parameters):
    with pytest.raises(ValueError, match=f"^{next(iter(parameters))}"):
        check_sampling_params(parameters, VOCAB, has_tokenizer=True)


def test_min_new_tokens_needs_the_tokenizer():
    check(sampling_params={"min_new_tokens": 0}, has_tokenizer=False)
    with pytest.raises(ValueError, match=r"min_new_tokens=2.*--skip-tokenizer-init"):
        check(sampling_params={"min_new_tokens": 2}, has_tokenizer=False)


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(ValueError) as error:
        check(sampling_params={"temperature": "hot" * 1000})
    assert len(str(error.value)) < 200


def test_one_bad_id_among_many_is_found_wherever_it_stands():
    generator = random.Random(0)
    for _ in range(200):
        ids = [generator.randrange(VOCAB) for _ in range(generator.randint(1, 50))]
        check(input_ids=ids)
        position = generator.randrange(len(ids))
        ids[position] = generator.choice([-1, VOCAB, VOCAB + 7, -(2**40), None, "1"])
        with pytest.raises(ValueError, match=rf"input_ids\[{position}\] is "):
            check(input_ids=ids)
