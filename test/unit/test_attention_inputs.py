"""The choice of one kernel for QK norm, RoPE and KV store: its rules, its logging, and what it stores."""

from __future__ import annotations

import contextlib
import logging
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from sglang.srt import server_args as engine
from sglang.srt.compilation.piecewise_context_manager import set_forward_context
from sglang.srt.layers import minimax_attention_inputs as inputs
from sglang.srt.layers import minimax_log, minimax_qk_norm_rope
from sglang.srt.layers.minimax_qk_norm_paths import (
    reason_against_exchange,
    reason_against_one_kernel,
    reason_against_store,
)
from sglang.srt.layers.minimax_qk_norm_rope import QKNormRope
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MHATokenToKVPoolFP4
from sglang.srt.model_executor.forward_batch_info import ForwardMode

PUBLISHED = dict(has_norms=True, cuda=True, head_dim=128, rotary_dim=64, dtype_bytes=2)


def test_the_published_models_take_one_kernel():
    assert reason_against_one_kernel(**PUBLISHED) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"has_norms": False}, "no QK norm"),
        ({"cuda": False}, "NVIDIA GPUs"),
        ({"rotary_dim": 128}, "not 128 of 128"),
        ({"head_dim": 96, "rotary_dim": 48}, "not 48 of 96"),
        ({"head_dim": 2, "rotary_dim": 1}, "not 1 of 2"),
        ({"dtype_bytes": 4}, "bfloat16 and float16"),
        ({"plain_rope": False}, "rotary embedding"),
        ({"deterministic": True}, "not deterministic"),
        ({"pdmux": True}, "--enable-pdmux"),
        ({"memory_saver": True}, "--enable-memory-saver"),
    ],
)
def test_each_condition_stands_against_one_kernel_by_itself(change, said):
    assert said in reason_against_one_kernel(**{**PUBLISHED, **change})


@pytest.mark.parametrize(
    ("ranks", "reachable", "shares_gpu", "said"),
    [
        (2, True, False, None),
        (8, True, False, None),
        (8, False, False, "NVLink peers"),
        (16, True, False, "for 2, 4, 8 ranks of one host, and these are 16"),
        (6, True, False, "for 2, 4, 8 ranks of one host, and these are 6"),
        (8, True, True, "two-batch overlap"),
    ],
)
def test_the_exchange_needs_a_few_peers_within_reach_and_the_gpu_for_itself(ranks, reachable, shares_gpu, said):
    reason = reason_against_exchange(ranks, reachable, shares_gpu)
    assert (reason is None) if said is None else (said in reason)


@pytest.mark.parametrize("backend", engine.ATTENTION_BACKEND_CHOICES)
def test_a_store_is_left_to_attention_backends_that_are_not_known_to_do_without_their_own(backend):
    known = backend in ("fa3", "fa4", "flashinfer", "flex_attention", "torch_native", "triton", "trtllm_mha")
    assert (reason_against_store([backend, backend]) is None) == known
    assert (reason_against_store(["fa3", backend]) is None) == known
    assert "context-parallel" in reason_against_store([backend], attn_cp_size=2)


@pytest.fixture
def arguments(monkeypatch):
    settled = engine.ServerArgs(model_path="dummy", device="cpu")
    monkeypatch.setattr(engine, "_global_server_args", settled)
    return settled


@pytest.mark.parametrize(
    ("scaling", "plain"),
    [
        (None, True),
        ({"rope_type": "linear", "factor": 2.0}, True),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, True),
        ({"rope_type": "dynamic", "factor": 2.0}, True),
        ({"rope_type": "default", "mrope_section": [2, 3, 3]}, False),
        ({"rope_type": "deepseek_yarn", "factor": 2.0, "original_max_position_embeddings": 64}, False),  # its own way
    ],
)
def test_a_scaling_that_only_fills_the_cosines_is_still_plain_rope(arguments, scaling, plain):
    rope = get_rope(32, rotary_dim=16, max_position=64, base=1e4, rope_scaling=scaling)
    assert inputs.rotates_plainly(rope) == plain
    rope = get_rope(32, rotary_dim=16, max_position=64, base=1e4, is_neox_style=False)
    assert not inputs.rotates_plainly(rope)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "attn_factor": 1.5},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
    ],
    ids=lambda scaling: scaling and scaling["rope_type"],
)  # fmt: skip
def test_a_plain_rope_rotates_as_the_engines_does_also_once_its_cache_has_grown(arguments, scaling):
    """A longer context gives the embedding another cache after the layers were built; later positions are in it."""
    torch.manual_seed(0)
    rope = get_rope(HEAD_DIM, rotary_dim=ROTARY_DIM, max_position=64, base=1e4, rope_scaling=scaling)
    assert inputs.rotates_plainly(rope)
    operator = QKNormRope(HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM, 1e-6, None, 0, "cpu")
    norms = [SimpleNamespace(weight=torch.rand(heads * HEAD_DIM)) for heads in (HEADS, KV_HEADS)]
    fused = inputs.FusedAttentionInputs(operator, *norms, rope, stores=False)
    before = rope.cos_sin_cache
    rope._ensure_cos_sin_cache_length(300)
    assert rope.cos_sin_cache.shape[0] > 300 and rope.cos_sin_cache is not before
    qkv = torch.randn(4, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    positions = torch.tensor([0, 1, 63, 300])
    normed = [
        (x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight.double()).float()
        for x, norm in zip(qkv.split(operator.sizes, dim=-1), norms, strict=False)
    ]
    expected = rope.forward_native(positions, *normed)
    q, k, _, stored = fused(qkv.clone(), positions, None)
    assert not stored
    for got, wanted in zip((q, k), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_whoever_looks_at_modules_sees_those_of_the_separate_launches(arguments, monkeypatch):
    rope = get_rope(32, rotary_dim=16, max_position=64, base=1e4)
    norm = SimpleNamespace(weight=SimpleNamespace(is_cuda=True))
    monkeypatch.setattr(inputs, "is_cuda", lambda: True)
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    assert inputs.reason_against_fusing(norm, rope, 32) is None
    arguments.forward_hooks = [{}]
    assert "--forward-hooks" in inputs.reason_against_fusing(norm, rope, 32)


def test_the_reason_for_separate_launches_is_logged_once(arguments, caplog):
    minimax_log.log_once.cache_clear()
    rope = get_rope(32, rotary_dim=16, max_position=64, base=1e4)
    norm = SimpleNamespace(weight=torch.ones(4))
    with caplog.at_level(logging.INFO), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr("sglang.srt.distributed.get_tensor_model_parallel_rank", lambda: 0)
        assert [inputs.choose_inputs(norm, norm, rope, 32, layer_id) for layer_id in range(3)] == [None] * 3
    said = [line for line in caplog.messages if "separate launches" in line]
    assert len(said) == 1 and "NVIDIA GPUs" in said[0]


# --- The store -------------------------------------------------------------------------------------------

HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM, START_LAYER = 4, 2, 32, 16, 3


def pool_of(dtype: torch.dtype, cls=MHATokenToKVPool):
    return cls(
        size=16, page_size=1, dtype=dtype, head_num=KV_HEADS, head_dim=HEAD_DIM, layer_num=2, device="cpu",
        enable_memory_saver=False, start_layer=START_LAYER,
    )  # fmt: skip


def fused_inputs(layer_id: int, contiguous: bool = False):
    operator = QKNormRope(HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM, 1e-6, None, layer_id, "cpu")
    rope = SimpleNamespace(cos_sin_cache=torch.randn(8, ROTARY_DIM))
    norms = [SimpleNamespace(weight=torch.rand(heads * HEAD_DIM)) for heads in (HEADS, KV_HEADS)]
    return inputs.FusedAttentionInputs(operator, *norms, rope, stores=True, contiguous=contiguous)


@pytest.mark.parametrize("loc_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("layer_id", [START_LAYER, START_LAYER + 1])
def test_the_cache_holds_what_the_engines_own_store_would_put_there(layer_id, loc_dtype):
    """Of a later pipeline stage, and with rows of padding, which all go to slot 0."""
    torch.manual_seed(layer_id)
    pool, stock = pool_of(torch.bfloat16), pool_of(torch.bfloat16)
    batch = SimpleNamespace(token_to_kv_pool=pool, out_cache_loc=torch.tensor([5, 16, 2, 0, 0], dtype=loc_dtype))
    fused = fused_inputs(layer_id)
    qkv = torch.randn(5, (HEADS + 2 * KV_HEADS) * HEAD_DIM).bfloat16()
    _, k, v, stored = fused(qkv, torch.tensor([1, 7, 3, 0, 0]), batch)
    assert stored
    rows = [x.unflatten(-1, (KV_HEADS, HEAD_DIM)) for x in (k, v)]
    stock.set_kv_buffer(SimpleNamespace(layer_id=layer_id), batch.out_cache_loc.long(), *rows)
    for ours, theirs in zip(pool.k_buffer + pool.v_buffer, stock.k_buffer + stock.v_buffer, strict=True):
        assert torch.equal(ours[1:], theirs[1:]), "slot 0 holds any of the rows of padding"
    assert pool.k_buffer[layer_id - START_LAYER][[2, 5, 16]].any()


def test_the_store_waits_for_no_transfer_from_the_host():
    pool = pool_of(torch.bfloat16)
    pool.register_layer_transfer_counter(SimpleNamespace(wait_until=lambda layer: pytest.fail("waited")))
    batch = SimpleNamespace(token_to_kv_pool=pool, out_cache_loc=torch.arange(3))
    k_cache, v_cache, slots = inputs.kv_cache_of(batch, START_LAYER + 1, torch.bfloat16)
    assert k_cache is pool.k_buffer[1] and v_cache is pool.v_buffer[1] and slots is batch.out_cache_loc


@pytest.mark.parametrize("what", ["fp8", "fp4", "subclass", "other pool", "float16"])
def test_a_cache_of_another_kind_is_left_to_the_engine(what):
    class Subclass(MHATokenToKVPool):
        pass

    pool = {
        "fp8": lambda: pool_of(torch.float8_e4m3fn),
        "fp4": lambda: MHATokenToKVPoolFP4.__new__(MHATokenToKVPoolFP4),
        "subclass": lambda: pool_of(torch.bfloat16, Subclass),
        "other pool": SimpleNamespace,
        "float16": lambda: pool_of(torch.float16),
    }[what]()
    batch = SimpleNamespace(token_to_kv_pool=pool, out_cache_loc=torch.arange(3))
    assert inputs.kv_cache_of(batch, START_LAYER, torch.bfloat16) is None


def test_a_compiled_graph_leaves_the_store_to_attention_which_runs_outside_of_it(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")  # a host without a GPU sets it to 1
    fused = fused_inputs(START_LAYER)
    pool = pool_of(torch.bfloat16)
    batch = SimpleNamespace(token_to_kv_pool=pool, out_cache_loc=torch.tensor([5, 16, 2]))
    positions, qkv = torch.tensor([1, 7, 3]), torch.randn(3, (HEADS + 2 * KV_HEADS) * HEAD_DIM).bfloat16()
    stored_in_graph = []

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(row):
        q, k, v, stored = fused(row * 1.0, positions, batch)
        stored_in_graph.append(stored)
        return q + 0, k + 0, v + 0

    got = compiled(qkv)
    assert stored_in_graph == [False] and not any(buffer.any() for buffer in pool.k_buffer + pool.v_buffer)
    *want, stored = fused(qkv.clone(), positions, batch)
    assert stored and all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@pytest.mark.parametrize("contiguous", [False, True])
def test_a_piece_of_piecewise_graphs_stores_to_the_slots_of_the_batch_that_it_is_called_for(monkeypatch, contiguous):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")  # a host without a GPU sets it to 1
    torch._dynamo.reset()  # what another case compiled of the same function
    torch.manual_seed(0)
    fused = fused_inputs(START_LAYER + 1, contiguous)
    positions, pools = torch.tensor([1, 7, 3, 0]), [pool_of(torch.bfloat16) for _ in range(4)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(row, batch):
        q, k, v, stored = fused(row * 1.0, positions, batch)
        return q + 0, k + 0, v + 0, (stored, k.is_contiguous(), v.is_contiguous())

    def batch_of(pool, slots):
        return SimpleNamespace(
            token_to_kv_pool=pool, out_cache_loc=torch.tensor(slots), forward_mode=ForwardMode.EXTEND
        )

    for slots, pool, want_pool in (([5, 16, 2, 0], *pools[:2]), ([1, 3, 9, 4], *pools[2:])):
        row = torch.randn(4, (HEADS + 2 * KV_HEADS) * HEAD_DIM).bfloat16()
        batch = batch_of(pool, slots)
        one_graph = torch._dynamo.config.patch(error_on_recompile=True)  # of both batches
        with one_graph, set_forward_context(batch, [], None, [], []):
            *got, of_graph = compiled(row, batch)
        assert of_graph == (True, contiguous, contiguous)
        *want, _ = fused(row.clone(), positions, batch_of(want_pool, slots))
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
        for ours, theirs in zip(pool.k_buffer + pool.v_buffer, want_pool.k_buffer + want_pool.v_buffer, strict=True):
            assert torch.equal(ours, theirs)
        assert pool.k_buffer[1][slots].any() and pool.v_buffer[1][slots].any()


@pytest.mark.parametrize("what", ["fp8", "decode", "no context"])
def test_what_is_no_piece_that_can_store_leaves_the_store_to_attention(what):
    pool = pool_of(torch.float8_e4m3fn if what == "fp8" else torch.bfloat16)
    mode = ForwardMode.DECODE if what == "decode" else ForwardMode.EXTEND
    batch = SimpleNamespace(token_to_kv_pool=pool, forward_mode=mode)
    with contextlib.nullcontext() if what == "no context" else set_forward_context(batch, [], None, [], []):
        assert not inputs.is_piece_of_graphs(batch, torch.bfloat16)


def test_a_projection_leaves_parts_but_in_a_compiled_graph_whose_operator_takes_none(monkeypatch):
    operator = QKNormRope(HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM, 1e-6, None, START_LAYER, "cpu")
    fused = inputs.FusedAttentionInputs(operator, None, None, None, stores=True)
    assert fused.adds_parts()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not fused.adds_parts()


# --- Which way the operator takes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "reachable", "overlap", "way"),
    [
        (1, False, True, "_run_alone"),
        (4, True, False, "_run_exchange"),
        (4, False, False, "_run_collective"),
        (16, True, False, "_run_collective"),
        (4, True, True, "_run_collective"),
    ],
)
def test_a_layer_on_a_gpu_is_built_with_the_way_that_the_rules_say(
    arguments, monkeypatch, ranks, reachable, overlap, way
):
    """With a group of which only the size is there, and an exchange that is only asked for."""
    group = SimpleNamespace(world_size=ranks, rank_in_group=0, unique_name="attention")
    asked = []

    def exchange_of(*asked_for):
        asked.append(asked_for)
        return SimpleNamespace(num_ranks=ranks)

    monkeypatch.setattr(minimax_qk_norm_rope, "peers_are_reachable", lambda group, device: reachable)
    monkeypatch.setattr(minimax_qk_norm_rope, "exchange_of", exchange_of)
    monkeypatch.setattr(inputs, "get_attention_tp_group", lambda: group)
    monkeypatch.setattr(inputs, "reason_against_one_kernel", lambda **_: None)
    arguments.enable_two_batch_overlap, arguments.attention_backend = overlap, "fa3"
    rope = get_rope(32, rotary_dim=16, max_position=64, base=1e4)

    def norm(heads):
        weight = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
        return SimpleNamespace(weight=weight, shards=SimpleNamespace(num_heads=heads), variance_epsilon=1e-5)

    fused = inputs.choose_inputs(norm(48), norm(16), rope, 32, layer_id=7)
    operator = fused.operator
    assert operator._run.__name__ == way and len(asked) == (way == "_run_exchange")
    assert (operator.layer_id, operator.eps, operator.num_heads, operator.rotary_dim) == (7, 1e-5, 48 // ranks, 16)
    assert operator.num_kv_heads == 16 // ranks
    assert fused.stores
    arguments.attn_cp_size = 2
    assert not inputs.choose_inputs(norm(48), norm(16), rope, 32, layer_id=7).stores
    arguments.attn_cp_size, arguments.attention_backend = 1, "dual_chunk_flash_attn"
    assert not inputs.choose_inputs(norm(48), norm(16), rope, 32, layer_id=7).stores


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        ("enable_deterministic_inference", True, "not deterministic"),
        ("enable_pdmux", True, "--enable-pdmux"),
        ("enable_memory_saver", True, "--enable-memory-saver"),
        ("is_cuda", False, "NVIDIA GPUs"),  # on ROCm a tensor's is_cuda is true as well
        ("get_default_dtype", torch.float32, "bfloat16 and float16 activations"),
    ],
)
def test_each_rule_of_the_one_kernel_reads_what_the_server_runs_with(arguments, monkeypatch, argument, value, said):
    monkeypatch.setattr(inputs, "is_cuda", lambda: True)
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    rope = get_rope(32, rotary_dim=16, max_position=64, base=1e4)
    norm = SimpleNamespace(weight=SimpleNamespace(is_cuda=True))
    assert inputs.reason_against_fusing(norm, rope, 32) is None
    if hasattr(arguments, argument):
        setattr(arguments, argument, value)
    else:
        monkeypatch.setattr(inputs if argument == "is_cuda" else torch, argument, lambda: value)
    assert said in inputs.reason_against_fusing(norm, rope, 32)
