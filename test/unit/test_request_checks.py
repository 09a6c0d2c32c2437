"""What a request may hold: everything that ranks would fail on is refused, and nothing that they can answer."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from sglang_minimax.request_checks import (
    answer_bad_grammars,
    check_request,
    check_requests_first,
    check_sampling_params,
    compile_or_refuse,
    with_finite_biases,
)

VOCAB, HIDDEN = 1000, 3


def request(**fields):
    """As the engine's, with nothing given."""
    inputs = ("text", "input_ids", "input_embeds")
    logprobs = ("token_ids_logprob", "top_logprobs_num", "logprob_start_len")
    names = (*inputs, *logprobs, "session_params", "sampling_params")
    return SimpleNamespace(**(dict.fromkeys(names) | fields))


def check(has_tokenizer: bool = True, **fields) -> None:
    check_request(request(**fields), VOCAB, HIDDEN, has_tokenizer=has_tokenizer)


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
        {"sampling_params": {"stop": {"a", "b"}, "stop_token_ids": {3}}},
        {"sampling_params": {"logit_bias": {"3": -math.inf, "4": 1}, "sampling_seed": 2**40, "min_new_tokens": 2}},
        {"input_ids": [[np.int64(5)]], "sampling_params": {"temperature": np.float32(0.5), "top_k": np.int32(3)}},
        {"text": "a", "input_ids": [1], "sampling_params": {"stop_regex": "a|b", "temperature": 1e300}},
        {"text": ["a", "b"], "input_ids": [[1], [2]], "sampling_params": [{}, {}], "top_logprobs_num": [1, 2]},
        {"text": ["a"], "sampling_params": [{}]},
        {"input_embeds": [[0.5, 1.0, -1e29]]},
        {"input_embeds": [[[0.5, 1, 2]], [[1, 2, 3], [4, 5, 6]]], "top_logprobs_num": [1, 2]},
        {"input_ids": [1], "input_embeds": [["not looked at"]]},
        {"text": "a", "input_embeds": [["not looked at"]]},
        {"input_ids": [[1], [2]], "token_ids_logprob": [[1], [2, 3]]},
        {"input_ids": [[1], [2]], "token_ids_logprob": [2, 3]},
        {"text": "a", "session_params": {"id": "x", "rid": None, "offset": -1, "replace": True, "unknown": [1]}},
        {"sampling_params": {"spaces_between_special_tokens": False, "n": 4096, "repetition_penalty": 1e-6}},
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
        ({"text": "a", "token_ids_logprob": [[1], [2, 3]]}, "token_ids_logprob is one list for a single prompt"),
        ({"input_ids": [[1], [2]], "token_ids_logprob": [[1]]}, "token_ids_logprob has a list for each of 2 prompts"),
        ({"session_params": ["x"]}, "session_params is an object"),
        ({"session_params": {"id": ["x"]}}, r"session_params\[id\] is a string"),
        ({"session_params": {"id": "x", "rid": {}}}, r"session_params\[rid\] is a string"),
        ({"session_params": {"id": "x", "offset": "1"}}, r"session_params\[offset\] is an integer"),
        ({"session_params": {"id": "x", "replace": 1}}, r"session_params\[replace\] is true or false"),
        ({"session_params": {"id": "x", "drop_previous_output": "no"}}, r"\[drop_previous_output\] is true or false"),
        ({"sampling_params": {"n": 4097}}, "n is an integer from 1 to 4096"),
        ({"top_logprobs_num": VOCAB + 1}, r"top_logprobs_num is from 0 to 1000"),
        ({"input_ids": [[1], [2]], "top_logprobs_num": [1, -1]}, r"top_logprobs_num=-1"),
        ({"logprob_start_len": -2}, r"logprob_start_len is -1 \(output tokens only\) or more"),
        ({"sampling_params": "x"}, r"sampling_params is an object"),
        ({"input_ids": [1], "top_logprobs_num": [1]}, r"top_logprobs_num is no list for a single prompt"),
        ({"input_ids": [1], "logprob_start_len": [0]}, r"logprob_start_len is no list for a single prompt"),
        ({"text": "a", "sampling_params": [{}]}, r"sampling_params is no list for a single prompt"),
        ({"input_ids": [[1], [2]], "top_logprobs_num": [1]}, r"top_logprobs_num has a value for each of 2 prompts"),
        ({"text": ["a", "b"], "sampling_params": []}, r"sampling_params has a value for each of 2 prompts"),
        ({"input_ids": [[1]], "top_logprobs_num": [None]}, r"top_logprobs_num=None"),
        ({"input_ids": [[1]], "logprob_start_len": ["1"]}, r"logprob_start_len='1'"),
        ({"text": "a", "input_ids": [[1]]}, r"input_ids is a list for each text"),
        ({"text": ["a", "b"], "input_ids": [1, 2]}, r"input_ids is a list for each text"),
        ({"text": ["a", "b"], "input_ids": [[1]]}, r"input_ids is a list for each text"),
        ({"input_embeds": []}, r"input_embeds is a list of vectors of 3 numbers"),
        ({"input_embeds": [[]]}, r"input_embeds is a list of vectors"),
        ({"input_embeds": [[[1.0, 2.0, 3.0]], []]}, r"input_embeds is a list of vectors"),
        ({"input_embeds": [[1.0, 2.0]]}, r"input_embeds=\[1.0, 2.0\]"),
        ({"input_embeds": [[1.0, 2.0, 3.0], [1.0]]}, r"input_embeds=\[1.0\]"),
        ({"input_embeds": [[1.0, 2.0, math.nan]]}, r"input_embeds is a list of vectors"),
        ({"input_embeds": [[1.0, 2.0, -math.inf]]}, r"input_embeds is a list of vectors"),
        ({"input_embeds": [[1.0, 2.0, 1e39]]}, r"input_embeds is a list of vectors"),
        ({"input_embeds": [[1e30, 0.0, 1e29]]}, r"input_embeds is a list of vectors .* and no sum over 1e30"),
        ({"input_embeds": [[1, 2, 3]], "sampling_params": [{}]}, "sampling_params is no list for a single prompt"),
        ({"input_embeds": [[1.0, 2.0, 10**400]]}, r"input_embeds is a list of vectors"),
        ({"input_embeds": [["a", "b", "c"]]}, r"input_embeds is a list of vectors"),
        ({"input_ids": [[1], [2]], "sampling_params": [{}, {"n": 0}]}, r"n=0 cannot be: n is an integer from 1"),
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
    ("name", "first", "last"),
    [
        *((name, -(2**31), 2**31 - 1) for name in ("max_new_tokens", "min_new_tokens", "top_k")),
        ("sampling_seed", -(2**63), 2**63 - 1),
        ("stream_interval", 1, 2**31 - 1),
        ("n", 1, 4096),
    ],
)
def test_integers_fit_the_tensors_that_the_scheduler_puts_them_into(name, first, last):
    for value in (first, last):
        check_sampling_params({name: value}, VOCAB, has_tokenizer=True)
    for value in (first - 1, last + 1):
        with pytest.raises(ValueError, match=f"^{name}={value} .*is an integer from {first} to {last}"):
            check_sampling_params({name: value}, VOCAB, has_tokenizer=True)


@pytest.mark.parametrize("name", ["max_new_tokens", "min_new_tokens", "top_k", "n", "stream_interval", "sampling_seed"])
def test_null_is_what_the_engine_has_a_default_for(name):
    """Its own ``SamplingParams``: a field that it leaves None, or compares with a number."""
    from sglang.srt.sampling.sampling_params import SamplingParams

    try:
        SamplingParams(**{name: None}).verify(VOCAB)
        may_be_null = name != "n"  # which the engine only counts with, later
    except TypeError:
        may_be_null = False
    with contextlib.nullcontext() if may_be_null else pytest.raises(ValueError, match=f"^{name}=None"):
        check_sampling_params({name: None}, VOCAB, has_tokenizer=True)


@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"]
)
@pytest.mark.parametrize("value", ["x", None, True, [1], math.nan, math.inf, -math.inf, 10**400])
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
        {"logit_bias": {"3": math.inf}},
        {"logit_bias": {"3": 1e39}},
        {"logit_bias": {"3": -1e39}},
        {"logit_bias": {"3": 10**400}},
        {"repetition_penalty": 0},
        {"repetition_penalty": 1e-300},
        {"skip_special_tokens": None},
        {"skip_special_tokens": 1},
        {"spaces_between_special_tokens": []},
        {"structural_tag": ""},
        {"stop_regex": "(["},
        {"stop_regex": ["a", "a{2,1}"]},
        {"stop_regex": "a{99999999999999999999}"},  # an OverflowError of Python's compiler
        {"stop_regex": "(" * 5000 + ")" * 5000},  # a RecursionError
    ],
)
def test_other_sampling_parameters(parameters):
    with pytest.raises(ValueError, match=f"^{next(iter(parameters))}"):
        check_sampling_params(parameters, VOCAB, has_tokenizer=True)


def test_min_new_tokens_needs_the_tokenizer():
    check(sampling_params={"min_new_tokens": 0}, has_tokenizer=False)
    with pytest.raises(ValueError, match=r"min_new_tokens=2.*--skip-tokenizer-init"):
        check(sampling_params={"min_new_tokens": 2}, has_tokenizer=False)


@pytest.mark.parametrize(("name", "value"), [("stop", ["x"]), ("stop", "x"), ("stop_regex", "x+")])
def test_what_is_looked_for_in_text_needs_the_tokenizer(name, value):
    check(sampling_params={name: value})
    check(sampling_params={name: []}, has_tokenizer=False)
    with pytest.raises(
        ValueError, match=rf"{name} is looked for in text.*--skip-tokenizer-init, or use stop_token_ids"
    ):
        check(sampling_params={name: value}, has_tokenizer=False)


def test_a_session_has_no_embeddings():
    embeddings = {"text": None, "input_embeds": [[0.5] * HIDDEN]}
    check(**embeddings, session_params={"id": None})
    with pytest.raises(ValueError, match="session_params goes with token ids or text"):
        check(**embeddings, session_params={"id": "x"})


def test_a_request_whose_client_leaves_before_it_is_sent_is_forgotten():
    class Waiting(Manager):
        async def generate_request(self, obj, request):
            self._req_stats_init(obj, request)
            yield await asyncio.Event().wait()  # as while generation is paused

    check_requests_first(SimpleNamespace(TokenizerManager=Waiting, GenerateReqInput=SimpleNamespace))
    manager = Waiting({"other": state(sent=False)})

    async def leave():
        answers = manager.generate_request(request(rid=["a"], text=["good"]), None)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(answers), 0.05)

    asyncio.run(leave())
    assert manager.rid_to_state.keys() == {"other"}


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(ValueError) as error:
        check(sampling_params={"temperature": "hot" * 50})
    assert len(str(error.value)) < 150


def test_one_bad_id_among_many_is_found_wherever_it_stands():
    generator = random.Random(0)
    for _ in range(200):
        ids = [generator.randrange(VOCAB) for _ in range(generator.randint(1, 50))]
        check(input_ids=ids)
        position = generator.randrange(len(ids))
        ids[position] = generator.choice([-1, VOCAB, VOCAB + 7, -(2**40), None, "1"])
        with pytest.raises(ValueError, match=rf"input_ids\[{position}\] is "):
            check(input_ids=ids)


def test_a_bias_of_minus_infinity_leaves_probabilities_that_are_numbers():
    """In float32, over the lowest temperature, also where every other token is masked: see the engine's sampler."""
    torch = pytest.importorskip("torch")
    bias = {"0": -math.inf, "1": -math.inf, "2": 5}
    [given] = with_finite_biases([{"logit_bias": bias, "temperature": 1}])
    assert given["temperature"] == 1 and given["logit_bias"]["2"] == 5 and bias["0"] == -math.inf
    logits = torch.tensor([1.0, 2.0, -math.inf])  # a grammar allows 0 and 1 only
    for token, value in given["logit_bias"].items():
        logits[int(token)] += value
    for temperature in (1e-6, 1.0):
        assert (logits / temperature).softmax(0).tolist() == [0.5, 0.5, 0.0]
    for unchanged in (None, {}, {"logit_bias": {"1": 2}}):
        assert with_finite_biases(unchanged) is unchanged


@pytest.mark.parametrize("tag", ["{}", "[]", '{"structures": [{}], "triggers": []}', '{"structures": []}'])
def test_a_grammar_whose_compiler_raises_anything_is_refused(tag):
    """The engine's own backend, up to where it would call the library that compiles."""
    from sglang.srt.constrained.base_grammar_backend import BaseGrammarBackend, InvalidGrammarObject
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend

    class Backend(XGrammarGrammarBackend):
        def __init__(self):
            BaseGrammarBackend.__init__(self)

    backend, key = Backend(), ("structural_tag", tag)
    future, _ = backend.get_cached_or_future_value(key, False)
    assert isinstance(future.exception(), (AssertionError, AttributeError, KeyError)), "the engine refuses it by itself"
    compile_or_refuse(backend, InvalidGrammarObject)
    future, _ = backend.get_cached_or_future_value(key, False)
    refusal = future.result()
    assert isinstance(refusal, InvalidGrammarObject) and "Error" in refusal.error_message


@pytest.mark.parametrize(
    ("architecture", "has_backend", "mended"),
    [("MiniMaxM2ForCausalLM", True, True), ("MiniMaxM2ForCausalLM", False, False), ("LlamaForCausalLM", True, False)],
)
def test_the_grammar_backend_of_a_scheduler_is_mended_if_it_has_one(architecture, has_backend, mended):
    """With --grammar-backend none it has none."""

    class Engines:
        def __init__(self, scheduler):
            self.grammar_backend = SimpleNamespace(_init_value_dispatch=lambda key, reasoning: 1 / 0)
            self.grammar_backend = self.grammar_backend if has_backend else None

    module = SimpleNamespace(GrammarManager=Engines, InvalidGrammarObject=str)
    answer_bad_grammars(module)
    config = SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]))
    backend = module.GrammarManager(SimpleNamespace(model_config=config)).grammar_backend
    assert (backend is not None) == has_backend
    if mended:
        assert backend._init_value_dispatch(("regex", "a"), False) == "ZeroDivisionError: division by zero"
    elif has_backend:
        with pytest.raises(ZeroDivisionError):
            backend._init_value_dispatch(("regex", "a"), False)


class Manager:
    """Takes requests down as the engine's does, before anything of them is looked at; ``text`` says what happens."""

    model_config = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["MiniMaxM2ForCausalLM"]), vocab_size=VOCAB, hidden_size=HIDDEN
    )
    tokenizer = None

    def __init__(self, in_flight):
        self.rid_to_state = dict(in_flight)

    async def generate_request(self, obj, request):
        if isinstance(obj.rid, str):
            obj.rid = [f"{obj.rid}_{i}" for i in range(len(obj.text))]
        if set(obj.rid) & self.rid_to_state.keys():
            raise ValueError("duplicate")
        self._req_stats_init(obj, request)
        for rid, text in zip(obj.rid, obj.text, strict=True):
            if text == "bad":
                raise TypeError(text)
            self.rid_to_state[rid] = state(sent=True)
            yield text

    def _req_stats_init(self, obj, request):
        for rid in obj.rid:
            self.rid_to_state[rid] = state(sent=False)

    def _validate_one_request(self, obj, input_ids): ...


def state(sent: bool):
    return SimpleNamespace(time_stats=SimpleNamespace(api_server_dispatch_time=float(sent)))


@pytest.mark.parametrize(
    ("rids", "texts", "fields", "error", "left"),
    [
        (["a", "b", "c"], ["good", "bad", "good"], {}, TypeError, {"other", "a"}),
        (["a", "other"], ["good", "good"], {}, ValueError, {"other"}),
        ("other", ["good", "good"], {}, ValueError, {"other", "other_0"}),
        (["a"], ["good"], {"sampling_params": {"n": 0}}, ValueError, {"other"}),
        (["a", "b"], ["good", "good"], {}, None, {"other", "a", "b"}),
    ],
    ids=["the second of three", "an id in flight", "an id that the engine numbers", "refused here", "all sent"],
)
def test_only_requests_that_were_sent_are_kept(rids, texts, fields, error, left):
    """And those of others: a request that is refused for an id in flight leaves what has it."""

    class Mended(Manager): ...

    check_requests_first(SimpleNamespace(TokenizerManager=Mended, GenerateReqInput=SimpleNamespace))
    other = state(sent=False)  # as one that is being tokenised
    manager = Mended({"other": other} | ({"other_0": state(sent=False)} if rids == "other" else {}))

    async def ask():
        return [answer async for answer in manager.generate_request(request(rid=rids, text=texts, **fields), None)]

    with pytest.raises(error) if error else contextlib.nullcontext():
        assert asyncio.run(ask()) == texts
    assert manager.rid_to_state.keys() == left and manager.rid_to_state["other"] is other


@pytest.mark.parametrize(
    ("architecture", "ids", "refused"),
    [
        ("MiniMaxM2ForCausalLM", [], True),
        ("MiniMaxM2ForCausalLM", [1], False),
        ("MiniMaxM2ForCausalLM", None, False),  # embeddings instead
        ("LlamaForCausalLM", [], False),
    ],
)
def test_a_text_that_gives_no_token_is_refused_and_all_others_are_the_engines_to_validate(architecture, ids, refused):
    validated = []

    class Mended(Manager):
        model_config = SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]))

        def _validate_one_request(self, obj, input_ids):
            validated.append((obj, input_ids))

    check_requests_first(SimpleNamespace(TokenizerManager=Mended, GenerateReqInput=SimpleNamespace))
    with pytest.raises(ValueError, match="the prompt has no token") if refused else contextlib.nullcontext():
        Mended({})._validate_one_request("request", ids)
    assert validated == ([] if refused else [("request", ids)])


def test_leaving_a_stream_closes_the_engines():
    """Which holds a lock for as long as it lives, that an update of weights waits for."""
    closed = []

    class Mended(Manager):
        async def generate_request(self, obj, request):
            try:
                yield 1
                yield 2
            finally:
                closed.append(True)

    check_requests_first(SimpleNamespace(TokenizerManager=Mended, GenerateReqInput=SimpleNamespace))

    async def leave():
        stream = Mended({}).generate_request(request(rid="a", text="good"))
        assert await stream.__anext__() == 1
        await stream.aclose()
        assert closed == [True]  # by now, and not when the loop ends, or finds it left behind

    asyncio.run(leave())


@pytest.mark.parametrize(
    ("text", "rid", "used"),
    [("a", "x", {"x_0"}), (["a", "b"], "x", {"x_0", "x_1"}), (["a", "b"], ["x", "y"], {"x", "y"}), (["a"], None, None)],
)
def test_no_id_is_kept_of_answers_that_get_another(text, rid, used):
    manager = object.__new__(TokenizerManager)
    manager.rid_to_state, manager.disaggregation_mode = {}, DisaggregationMode.NULL
    manager.server_args = SimpleNamespace(enable_trace=False)
    request = GenerateReqInput(text=text, rid=rid, sampling_params={"n": 3}, received_time=0.0)
    request.normalize_batch_and_arguments()
    manager._req_stats_init(request, None)
    assert set(manager.rid_to_state) == (used or {request.rid[0]})
    one = request[0]
    one.regenerate_rid()  # as the engine does for each answer that it sends
    manager._req_stats_init(one)
    assert one.rid in manager.rid_to_state


class Sampler(Manager):
    """Sends two answers under ids of their own, the second of which has ended, and takes down its own id first."""

    aborted = ()

    async def generate_request(self, obj, request):
        self.rid_to_state[obj.rid] = state(sent=True)
        for rid in (obj.rid, "first", "second"):
            self._req_stats_init(SimpleNamespace(rid=rid))
        del self.rid_to_state["second"]
        yield "a"
        yield "b"

    def _req_stats_init(self, obj):
        self.rid_to_state[obj.rid] = state(sent=True)

    def abort_request(self, rid):
        self.aborted += (rid,)


def test_answers_whose_client_left_are_aborted():
    class Mended(Sampler): ...

    check_requests_first(SimpleNamespace(TokenizerManager=Mended, GenerateReqInput=SimpleNamespace))
    manager = Mended({"other": state(sent=True)})

    async def ask():
        async with contextlib.aclosing(manager.generate_request(request(rid="own", text="?"), None)) as answers:
            await anext(answers)
            assert manager.aborted == ()

    asyncio.run(ask())
    assert manager.aborted == ("first",)
