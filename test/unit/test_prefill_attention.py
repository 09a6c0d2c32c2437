"""When a prefill's attention is ours, when it has a graph of its own, and what the kernel computes when interpreted."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers import minimax_decode_attention as decode
from sglang.srt.layers import minimax_log
from sglang.srt.layers import minimax_prefill_attention as prefill
from sglang.srt.layers import minimax_prefill_graphs as graphs
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from unit.interpreted import assert_passes_interpreted

from sglang_minimax.cpu_host import has_no_accelerator

OPTIONS = [
    "enable_deterministic_inference", "enable_pdmux", "enable_two_batch_overlap", "enable_memory_saver",
    "disable_piecewise_cuda_graph", "enforce_piecewise_cuda_graph", "enable_return_hidden_states",
]  # fmt: skip
OF_GRAPHS = [
    ({"disable_piecewise_cuda_graph": True}, "no graphs here"),
    ({"enforce_piecewise_cuda_graph": True}, "--enforce-piecewise-cuda-graph"),
    ({"enable_return_hidden_states": True}, "--enable-return-hidden-states"),
    ({"piecewise_cuda_graph_compiler": "inductor"}, "--piecewise-cuda-graph-compiler inductor"),
    ({"of_another_rank": "a node has none"}, "a node has none"),
]
OF_ATTENTION = [({"backend": "fa3"}, "prefill has fa3"), ({"backend": "flashinfer"}, "prefill has flashinfer")]
OF_BOTH = [
    ({"head_dim": 64}, "64 dimensions, not 128"),
    ({"stores": False}, "stored by the backend"),
    ({"stores": None}, "stored by the backend"),
    ({"cuda": False}, "Hopper"),
    ({"capability": 10}, "Hopper"),
    ({"dtype": torch.float32}, "torch.float32"),
    ({"enable_deterministic_inference": True}, "deterministic"),
    ({"attn_cp_size": 2}, "context-parallel"),
    ({"enable_pdmux": True}, "--enable-pdmux"),
    ({"enable_two_batch_overlap": True}, "--enable-two-batch-overlap"),
    ({"enable_memory_saver": True}, "--enable-memory-saver"),
    ({"forward_hooks": [{}]}, "--forward-hooks"),
]


@pytest.mark.skipif(not has_no_accelerator(), reason="the kernel runs here: test/gpu/test_prefill_attention.py")
def test_the_kernel_in_tritons_interpreter():
    assert_passes_interpreted("prefill_attention_interpreted.py")


@pytest.fixture
def chosen(monkeypatch):
    """What a server with some options gives a model, (attention, graphs), and the lines that it logs."""
    said = []
    monkeypatch.setattr(minimax_log, "log_info_on_rank0", lambda logger, text: said.append(text))

    def choose(
        cuda=True, capability=9, dtype=torch.bfloat16, backend="triton", head_dim=128, stores: bool | None = True,
        of_another_rank=None, **options,
    ):  # fmt: skip
        monkeypatch.setattr(decode, "is_cuda", lambda: cuda)
        monkeypatch.setattr(decode, "get_device_capability", lambda: (capability, 0))
        monkeypatch.setattr(torch, "get_default_dtype", lambda: dtype)
        of_engine = dict.fromkeys(OPTIONS, False) | {"attn_cp_size": 1, "piecewise_cuda_graph_compiler": "eager"}
        arguments = SimpleNamespace(**of_engine | options)
        arguments.get_attention_backends = lambda: (backend, "flashinfer")
        for module in (prefill, graphs):
            monkeypatch.setattr(module, "get_global_server_args", lambda: arguments)
        inputs = None if stores is None else SimpleNamespace(stores=stores)
        attention = SimpleNamespace(attn=SimpleNamespace(head_dim=head_dim), fused_inputs=inputs)
        model = SimpleNamespace(layers=[SimpleNamespace(self_attn=attention)], start_layer=0)
        others = [None, of_another_rank]
        world = SimpleNamespace(all_gather_object=lambda reason: [*others, reason])
        monkeypatch.setattr(graphs, "get_world_group", lambda: world)
        minimax_log.log_once.cache_clear()
        found = prefill.choose_prefill_attention(attention), graphs.choose_prefill_graphs(model)
        minimax_log.log_once.cache_clear()
        return *found, said

    return choose


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_hopper_prefills_take_the_kernel_and_short_ones_a_graph(chosen, dtype):
    attention, of_short, said = chosen(dtype=dtype)
    assert attention.dtype == of_short.dtype == dtype
    assert said == [
        "A prefill's attention is ours, for batches of up to 255 requests. SGLANG_MINIMAX_PREFILL_ATTENTION=0 turns "
        "it off."
    ]


@pytest.mark.parametrize(("option", "reason"), OF_GRAPHS + OF_BOTH)
def test_each_reason_leaves_short_prefills_to_the_engines_pieces(chosen, option, reason):
    _, of_short, said = chosen(**option)
    assert of_short is None
    assert said[-1].startswith("Short prefills have no graph of their own") and reason in said[-1]


@pytest.mark.parametrize(("option", "reason"), OF_ATTENTION + OF_BOTH)
def test_each_reason_leaves_attention_to_the_backend(chosen, option, reason):
    attention, _, said = chosen(**option)
    assert attention is None
    assert said[0].startswith("A prefill's attention is the attention backend's") and reason in said[0]


def test_another_backend_leaves_graphs_as_they_are(chosen):
    """Attention in a graph is ours whatever attends in longer prefills."""
    for option, _ in OF_ATTENTION:
        assert chosen(**option)[1] is not None


def test_each_switch_turns_off_its_own(chosen, monkeypatch):
    monkeypatch.setenv(prefill.SWITCH, "0")
    attention, of_short, said = chosen()
    assert attention is None and of_short is not None and f"{prefill.SWITCH}=0" in said[0]
    monkeypatch.delenv(prefill.SWITCH)
    monkeypatch.setenv(graphs.SWITCH, "0")
    attention, of_short, said = chosen()
    assert attention is not None and of_short is None and f"{graphs.SWITCH}=0" in said[-1]


def batch_of(requests: int = 2, **other):
    """A prefill as the engine describes it, but for ``other``."""
    pool = object.__new__(MHATokenToKVPool)
    pool.store_dtype, pool.dtype, pool.layer_transfer_counter = torch.bfloat16, torch.bfloat16, None
    several = torch.ones(requests, dtype=torch.int32)
    plain = dict(
        forward_mode=ForwardMode.EXTEND, spec_info=None, token_to_kv_pool=pool, batch_size=requests,
        extend_seq_lens=several, seq_lens=2 * several.long(), req_pool_indices=several.long(), seq_lens_cpu=2 * several,
        attn_backend="the backend",
    )  # fmt: skip
    return SimpleNamespace(**plain | other)


@pytest.mark.parametrize(
    ("other", "is_taken"),
    [
        ({}, True),
        ({"forward_mode": ForwardMode.MIXED}, True),
        ({"requests": prefill.MAX_REQUESTS}, True),
        ({"requests": prefill.MAX_REQUESTS + 1}, False),
        ({"requests": 0}, False),
        ({"forward_mode": ForwardMode.TARGET_VERIFY}, False),
        ({"forward_mode": ForwardMode.DRAFT_EXTEND}, False),
        ({"forward_mode": ForwardMode.SPLIT_PREFILL}, False),
        ({"forward_mode": ForwardMode.DECODE}, False),
        ({"forward_mode": ForwardMode.IDLE}, False),
        ({"spec_info": "drafts"}, False),
        ({"token_to_kv_pool": SimpleNamespace(store_dtype=torch.bfloat16, dtype=torch.bfloat16)}, False),
        ({"batch_size": 3}, False),
        ({"seq_lens": torch.ones(3, dtype=torch.int64)}, False),
        ({"req_pool_indices": torch.ones(3, dtype=torch.int64)}, False),
    ],
    ids=str,
)
def test_which_batches_are_prefills_of_ours(other, is_taken):
    batch = batch_of(**other)
    assert prefill.is_prefill_of(batch, torch.bfloat16) is is_taken
    assert not prefill.is_prefill_of(batch, torch.float16)


def test_a_request_longer_than_a_graph_takes_is_left_to_the_pieces():
    short = graphs.PrefillGraphs(None)
    short.dtype = torch.bfloat16
    assert short.takes(batch_of(seq_lens_cpu=torch.tensor([1, graphs.MAX_LENGTH])))
    assert not short.takes(batch_of(seq_lens_cpu=torch.tensor([1, graphs.MAX_LENGTH + 1])))


def test_more_requests_than_a_graph_takes_are_left_to_the_pieces():
    short = graphs.PrefillGraphs(None)
    short.dtype = torch.bfloat16
    assert short.takes(batch_of(requests=prefill.GRAPH_REQUESTS))
    assert not short.takes(batch_of(requests=prefill.GRAPH_REQUESTS + 1))


def test_a_prefix_that_is_still_on_its_way_is_left_to_the_pieces():
    """The pool waits for a layer's keys where it is asked for them, which a graph does not."""
    short = graphs.PrefillGraphs(None)
    short.dtype, batch = torch.bfloat16, batch_of()
    assert short.takes(batch)
    batch.token_to_kv_pool.layer_transfer_counter = "of LMCache"
    assert not short.takes(batch) and prefill.is_prefill_of(batch, torch.bfloat16)


def test_a_request_sees_its_tokens_also_where_its_prefix_is_counted_too_long(monkeypatch):
    """As for a request that decodes beside a new one, behind a prefill in which it was not."""
    given = []
    monkeypatch.setattr(prefill.PrefillBatch, "fill", lambda self, *arguments: given.append(arguments))
    batch = batch_of(extend_prefix_lens=torch.tensor([2, 2], dtype=torch.int32))
    prefill.PrefillBatch(torch.zeros(2, 4, dtype=torch.int32)).describe(batch, 2)
    (lengths, totals, rows, tokens) = given[0]
    assert lengths.tolist() == [1, 1] and totals.tolist() == [2, 2] and rows is batch.req_pool_indices and tokens == 2


def test_the_backend_is_replaced_for_one_pass_also_where_that_fails(monkeypatch):
    monkeypatch.setattr(prefill.PrefillBatch, "describe", lambda self, forward_batch, tokens: None)
    batch = batch_of(req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(2, 4, dtype=torch.int32)))
    with pytest.raises(ValueError, match="a layer"), prefill.PrefillAttention(torch.bfloat16).of(batch, 2):
        assert isinstance(batch.attn_backend, prefill._Backend) and batch.attn_backend.upper() == "THE BACKEND"
        raise ValueError("a layer's")
    assert batch.attn_backend == "the backend"


def test_what_the_kernel_does_not_do_is_the_backends(monkeypatch):
    """New tokens that are still to be stored, sinks, or rows that are not those of the batch."""
    calls = []
    behind = SimpleNamespace(forward=lambda *arguments, **kwargs: calls.append((arguments[5], kwargs)))
    described = SimpleNamespace(tokens=4)
    backend = prefill._Backend(behind, described)
    q = torch.zeros(4, 128)
    backend.forward(q, q, q, "layer", "batch")
    backend.forward(q, q, q, "layer", "batch", False, sinks=q)
    backend.forward(q[:3], q, q, "layer", "batch", False)
    assert [stores for stores, _ in calls] == [True, False, False] and list(calls[1][1]) == ["sinks"]


def test_every_prefill_has_the_plan_of_its_rows():
    limits, plans = list(prefill.PLANS), [*prefill.PLANS.values(), prefill.PLAN_OF_MORE]
    assert limits == sorted(limits)
    assert [prefill.plan_for(1, limit) for limit in limits] == plans[:-1]
    assert prefill.plan_for(limits[-1] // 8 + 1, 8) == plans[-1]


def test_the_benchmark_takes_batches_and_refuses_others(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmark"))
    import prefill_attention as benchmark

    assert benchmark.batch_named("128") == ("128", 1, 128, 0)
    assert benchmark.batch_named("16x64+2000")[1:] == (16, 64, 2000)
    assert all(benchmark.batch_named(name)[0] == name for name in benchmark.BATCHES)
    for text in ("", "x16", "16x", "128+", "-3", "12.5", "a"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no batch"):
            benchmark.batch_named(text)
