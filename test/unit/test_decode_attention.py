"""When decode attention is the kernel of ours, for which batches, and what it computes when interpreted."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers import minimax_decode_attention as decode
from sglang.srt.layers import minimax_log
from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from unit.decode_batches import batch
from unit.interpreted import assert_passes_interpreted

from sglang_minimax.cpu_host import has_no_accelerator

OPTIONS = ["enable_deterministic_inference", "enable_pdmux", "enable_two_batch_overlap", "enable_memory_saver"]


@pytest.mark.skipif(not has_no_accelerator(), reason="the kernel runs here: test/gpu/test_decode_attention.py")
def test_the_kernel_in_tritons_interpreter():
    assert_passes_interpreted("decode_attention_interpreted.py")


@pytest.fixture
def chosen(monkeypatch):
    """What a server with some options gives a layer, and the lines that it logs."""
    said = []
    monkeypatch.setattr(minimax_log, "log_info_on_rank0", lambda logger, text: said.append(text))

    def choose(heads=(12, 2, 128, True), cuda=True, capability=9, dtype=torch.bfloat16, backend="fa3", **options):
        monkeypatch.setattr(decode, "is_cuda", lambda: cuda)
        monkeypatch.setattr(decode, "get_device_capability", lambda: (capability, 0))
        monkeypatch.setattr(torch, "get_default_dtype", lambda: dtype)
        monkeypatch.setattr(decode, "DecodeAttention", lambda num_kv_heads, device: (num_kv_heads, device))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        arguments = SimpleNamespace(**{**dict.fromkeys(OPTIONS, False), "page_size": 1, "attn_cp_size": 1, **options})
        arguments.get_attention_backends = lambda: ("flashinfer", backend)
        monkeypatch.setattr(decode, "get_global_server_args", lambda: arguments)
        minimax_log.log_once.cache_clear()
        attentions = [decode.choose_decode_attention(*heads) for _ in range(3)]
        minimax_log.log_once.cache_clear()
        return attentions[-1], said

    return choose


@pytest.mark.parametrize("backend", ["fa3", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_published_heads_on_hopper_take_the_kernel(chosen, backend, dtype):
    attention, said = chosen(backend=backend, dtype=dtype)
    assert attention == (2, torch.device("cuda", 0))
    assert said == [
        "A decode step's attention is one launch of ours, for batches of up to 1024 requests. "
        "SGLANG_MINIMAX_DECODE_ATTENTION=0 turns it off."
    ]


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"heads": (12, 2, 64, True)}, "not 12 of 64 for 2"),
        ({"heads": (34, 2, 128, True)}, "up to 16 of q"),
        ({"heads": (12, 2, 128, False)}, "stored by the backend"),
        ({"cuda": False}, "Hopper"),
        ({"capability": 10}, "Hopper"),
        ({"dtype": torch.float32}, "torch.float32"),
        ({"backend": "flashinfer"}, "decode has flashinfer"),
        ({"page_size": 64}, "pages of 1 token, not 64"),
        ({"enable_deterministic_inference": True}, "deterministic"),
        ({"attn_cp_size": 2}, "context-parallel"),
        ({"enable_pdmux": True}, "--enable-pdmux"),
        ({"enable_two_batch_overlap": True}, "--enable-two-batch-overlap"),
        ({"enable_memory_saver": True}, "--enable-memory-saver"),
        ({"forward_hooks": [{}]}, "--forward-hooks"),
    ],
)
def test_each_reason_leaves_attention_to_the_backend(chosen, option, reason):
    attention, said = chosen(**option)
    assert attention is None
    assert (
        len(said) == 1
        and said[0].startswith("A decode step's attention is the attention backend's")
        and (reason in said[0])
    )


def test_the_benchmark_takes_contexts_and_refuses_others(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmark"))
    import decode_attention as benchmark

    for context in ("1", "516", "mixed", "spread:4", *benchmark.CONTEXTS):
        assert benchmark.context_named(context) == context and min(benchmark.lengths_of(context, 2)) > 0
    for context in ("0", "-5", "5.5", "mix", "spread", "spread:", "spread:x", "spread:3", "spread:mixed"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no number of tokens"):
            benchmark.context_named(context)


def test_every_batch_has_the_plan_of_its_kv_heads():
    limits, plans = list(decode.PLANS), [*decode.PLANS.values(), decode.PLAN_OF_MORE]
    assert limits == sorted(limits)
    assert [decode.plan_for(limit, 1) for limit in limits] == plans[:-1]
    assert decode.plan_for(limits[-1] // 8 + 1, 8) == decode.plan_for(decode.MAX_REQUESTS, 8) == plans[-1]
    assert all(plan.shortest % plan.block == 0 for plan in plans), "a part of so many tokens has whole tiles"


def made(kind, **attributes):
    """An object of an engine's class, of which nothing but ``attributes`` is there."""
    one = object.__new__(kind)
    for name, value in attributes.items():
        object.__setattr__(one, name, value)
    return one


@pytest.fixture
def step():
    """(q, forward batch, slots) of a decode step of three requests under Triton attention."""
    given = batch([3, 9, 1], 4, 2)
    cached = given.cached(True)
    metadata = SimpleNamespace(kv_indptr=cached.bounds, kv_indices=cached.slots)
    pool = made(
        MHATokenToKVPool, store_dtype=torch.bfloat16, dtype=torch.bfloat16, start_layer=0, layer_transfer_counter=None,
        k_buffer=[None, given.k_cache], v_buffer=[None, given.v_cache],
    )  # fmt: skip
    forward_batch = SimpleNamespace(
        forward_mode=ForwardMode.DECODE, spec_info=None, token_to_kv_pool=pool,
        attn_backend=made(TritonAttnBackend, forward_metadata=metadata),
    )  # fmt: skip
    return given.q, forward_batch, cached


@pytest.fixture
def attention():
    return decode.DecodeAttention(2, torch.device("cpu"))


def test_a_plain_decode_step_is_taken_with_the_layers_cache(step, attention, monkeypatch):
    q, forward_batch, cached = step
    calls = []
    monkeypatch.setattr(decode, "decode_attention", lambda *arguments: calls.append(arguments) or q)
    assert attention(q, forward_batch, layer_id=1) is q
    (of_q, k_cache, v_cache, found, counters, plan), pool = calls[0], forward_batch.token_to_kv_pool
    assert plan == decode.plan_for(3, 2)
    assert of_q is q and k_cache is pool.k_buffer[1] and v_cache is pool.v_buffer[1]
    assert found.bounds is cached.bounds and found.slots is cached.slots and found.ragged and found.requests == 3
    assert counters.numel() == 2 * decode.MAX_REQUESTS and not counters.any()


def test_the_backend_for_decode_is_asked_where_prefill_has_another(step, attention):
    q, forward_batch, cached = step
    forward_batch.attn_backend = made(HybridAttnBackend, decode_backend=forward_batch.attn_backend)
    assert attention.cached_tokens(q, forward_batch).slots is cached.slots


def test_flash_attentions_batches_are_rows_of_a_table(step, attention, monkeypatch):
    q, forward_batch, _ = step
    lengths, table = torch.tensor([3, 9, 1], dtype=torch.int32), torch.zeros(3, 9, dtype=torch.int32)
    backend = type("FlashAttentionBackend", (), {})
    backend.__module__ = "sglang.srt.layers.attention.flashattention_backend"
    forward_batch.attn_backend = backend()
    forward_batch.attn_backend.forward_metadata = SimpleNamespace(cache_seqlens_int32=lengths, page_table=table)
    found = attention.cached_tokens(q, forward_batch)
    assert found.bounds is lengths and found.slots is table and not found.ragged and found.requests == 3


def test_a_switch_leaves_attention_to_the_backend(chosen, monkeypatch):
    monkeypatch.setenv(decode.SWITCH, "0")
    attention, said = chosen()
    assert attention is None and "SGLANG_MINIMAX_DECODE_ATTENTION=0" in said[0]
    monkeypatch.setenv(decode.SWITCH, "1")
    assert chosen()[0] is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda q, one: setattr(one, "forward_mode", ForwardMode.EXTEND),
        lambda q, one: setattr(one, "forward_mode", ForwardMode.IDLE),
        lambda q, one: setattr(one, "forward_mode", ForwardMode.TARGET_VERIFY),
        lambda q, one: setattr(one, "spec_info", object()),
        lambda q, one: setattr(one, "attn_backend", SimpleNamespace(forward_metadata=None)),
        lambda q, one: setattr(one.token_to_kv_pool, "store_dtype", torch.uint8),
        lambda q, one: setattr(one.token_to_kv_pool, "dtype", torch.float8_e4m3fn),
        lambda q, one: setattr(one, "token_to_kv_pool", SimpleNamespace(store_dtype=q.dtype, dtype=q.dtype)),
        lambda q, one: setattr(one.attn_backend.forward_metadata, "kv_indptr", torch.zeros(9, dtype=torch.int32)),
    ],
    ids=["prefill", "idle", "verify", "draft", "backend", "stored", "FP8", "pool", "padded"],
)
def test_any_other_batch_is_left_to_the_backend(step, attention, change):
    q, forward_batch, _ = step
    assert attention.cached_tokens(q, forward_batch) is not None
    change(q, forward_batch)
    assert attention(q, forward_batch, layer_id=1) is None


def test_more_requests_than_a_cta_looks_through_are_left_to_the_backend(step, attention):
    _, forward_batch, _ = step
    for requests, taken in ((decode.MAX_REQUESTS, True), (decode.MAX_REQUESTS + 1, False)):
        forward_batch.attn_backend.forward_metadata.kv_indptr = torch.zeros(requests + 1, dtype=torch.int32)
        q = torch.empty(requests, 4 * 128, dtype=torch.bfloat16)
        assert (attention.cached_tokens(q, forward_batch) is not None) == taken
