"""Sharding as properties: for any layout that is valid the shards cover the model, and no other layout is loaded.

Cases are drawn by hypothesis, 10,000 or more in all. What is expected comes from brute force over heads, experts and
rows, or from float64, and the shards are those that the engine's own layers load, built for every rank in turn.
"""

from __future__ import annotations

import collections
import contextlib
import math
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sglang.srt.layers import vocab_parallel_embedding
from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.minimax_qk_norm import norm_qk, sums_of_squares
from sglang.srt.layers.minimax_sharding import ExpertShape, attention_tp_size, shard_attention, shard_heads
from sglang.srt.layers.moe.fused_moe_triton import layer as fused_moe
from sglang.srt.models import minimax_m2, minimax_m2_moe, minimax_m2_weights

MOST_RANKS = 16
EPS = 1e-6


def cases(number: int):
    return settings(
        max_examples=number,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


def divides(one: int, other: int) -> bool:
    return one % other == 0 or other % one == 0


@st.composite
def attention_layouts(draw):
    """(q heads, KV heads, ranks) that work: head counts are multiples of one another as attention needs them."""
    ranks = draw(st.integers(1, MOST_RANKS))
    kv_heads = draw(st.sampled_from([heads for heads in range(1, 33) if divides(heads, ranks)]))
    return math.lcm(ranks, kv_heads) * draw(st.integers(1, 3)), kv_heads, ranks


@contextlib.contextmanager
def on_rank(module, rank: int, ranks: int):
    """``module`` finds itself on ``rank`` of an attention-TP group of ``ranks``, without a process group."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "get_attention_tp_rank", lambda: rank)
        monkeypatch.setattr(module, "get_attention_tp_size", lambda: ranks)
        yield


def numbered(rows: int, columns: int = 1) -> torch.Tensor:
    """[rows, columns] float32 in which every value says which one it is."""
    return torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)


# --- Attention -------------------------------------------------------------------------------------------


@cases(1250)
@given(layout=attention_layouts(), head_dim=st.integers(1, 3))
def test_attention_is_covered_and_every_q_head_meets_its_kv_head(layout, head_dim):
    """The projections are the engine's, their norms ours: what they loaded must be the same heads on every rank."""
    q_heads, kv_heads, ranks = layout
    shards = shard_attention(q_heads, kv_heads, ranks)
    held = {name: collections.Counter() for name in "qkvo"}
    for rank in range(ranks):
        q, k, v = loaded_projections(q_heads, kv_heads, head_dim, rank, ranks)
        assert q == rows_of(shards.q.heads_of(rank), head_dim) and k == v == rows_of(shards.kv.heads_of(rank), head_dim)
        assert loaded_norm(q_heads, head_dim, rank, ranks) == q
        assert loaded_norm(kv_heads, head_dim, rank, ranks) == k
        own_kv = [row // head_dim for row in k[::head_dim]]
        for position, row in enumerate(q[::head_dim]):
            # Attention pairs a rank's q heads with its KV heads by their places on the rank.
            paired = own_kv[position * len(own_kv) // (len(q) // head_dim)]
            assert paired == row // head_dim * kv_heads // q_heads, (layout, rank)
        for name, rows in zip("qkvo", (q, k, v, loaded_output(q_heads, head_dim, rank, ranks)), strict=True):
            held[name].update(rows)
    replicas = max(1, ranks // kv_heads)
    for name, heads, times in (("q", q_heads, 1), ("k", kv_heads, replicas), ("v", kv_heads, replicas)):
        assert held[name] == dict.fromkeys(range(heads * head_dim), times), (name, layout)
    assert held["o"] == dict.fromkeys(range(q_heads * head_dim), 1)


def rows_of(heads: range, head_dim: int) -> list[int]:
    return [head * head_dim + row for head in heads for row in range(head_dim)]


def loaded_projections(q_heads: int, kv_heads: int, head_dim: int, rank: int, ranks: int) -> list[list[int]]:
    """The rows of q, k and v that the engine's fused projection holds on ``rank``."""
    layer = QKVParallelLinear(1, head_dim, q_heads, kv_heads, bias=False, tp_rank=rank, tp_size=ranks)
    for shard, heads in (("q", q_heads), ("k", kv_heads), ("v", kv_heads)):
        layer.weight.weight_loader(layer.weight, numbered(heads * head_dim), shard)
    rows = layer.weight.detach().flatten().int().tolist()
    q_size, kv_size = layer.num_heads * head_dim, layer.num_kv_heads * head_dim
    return [rows[:q_size], rows[q_size : q_size + kv_size], rows[q_size + kv_size :]]


def loaded_output(q_heads: int, head_dim: int, rank: int, ranks: int) -> list[int]:
    """The columns of the output projection that ``rank`` holds: they must be its q heads' values."""
    layer = RowParallelLinear(q_heads * head_dim, 1, bias=False, reduce_results=False, tp_rank=rank, tp_size=ranks)
    layer.weight.weight_loader(layer.weight, numbered(1, q_heads * head_dim))
    return layer.weight.detach().flatten().int().tolist()


def loaded_norm(heads: int, head_dim: int, rank: int, ranks: int) -> list[int]:
    with on_rank(minimax_m2, rank, ranks):
        norm = minimax_m2.MiniMaxM2RMSNormTP(heads * head_dim, heads)
    norm.weight.weight_loader(norm.weight, numbered(heads * head_dim).flatten())
    return norm.weight.detach().int().tolist()


@cases(1250)
@given(
    layout=attention_layouts(),
    head_dim=st.sampled_from([1, 2, 4, 8]),
    tokens=st.integers(0, 3),
    scale=st.sampled_from([1e-4, 1e-2, 1.0, 1e3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_qk_norm_of_any_sharding_is_the_unsharded_one(layout, head_dim, tokens, scale, seed):
    q_heads, kv_heads, ranks = layout
    generator = torch.Generator().manual_seed(seed)
    whole, weights = {}, {}
    for name, heads in (("q", q_heads), ("k", kv_heads)):
        size = 2.0 ** torch.randint(-2, 3, (heads,), generator=generator)  # heads of different size
        x = torch.randn(tokens, heads, head_dim, generator=generator) * size[:, None] * scale
        whole[name] = x.flatten(1)
        weights[name] = torch.rand(heads * head_dim, generator=generator) + 0.5
    norms = [sharded_norms(layout, head_dim, weights, rank) for rank in range(ranks)]
    parts = [tuple(whole[name][:, columns] for name, columns in held) for held, *_ in norms]
    total = sum(sums_of_squares(*part) for part in parts)
    for (held, q_norm, k_norm), part in zip(norms, parts, strict=True):
        got = norm_qk(
            *part, q_norm.weight, k_norm.weight, q_norm.reduced_count, k_norm.reduced_count, EPS, lambda _: total
        )
        for (name, columns), normed in zip(held, got, strict=True):
            x = whole[name].double()
            expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weights[name].double()
            torch.testing.assert_close(normed.double(), expected[:, columns], rtol=1e-5, atol=1e-7)


def sharded_norms(layout, head_dim: int, weights, rank: int):
    """([("q", columns of the whole row), ("k", columns)], q norm, k norm) of ``rank``; columns by brute force."""
    q_heads, kv_heads, ranks = layout
    held, norms = [], []
    for name, heads in (("q", q_heads), ("k", kv_heads)):
        with on_rank(minimax_m2, rank, ranks):
            norm = minimax_m2.MiniMaxM2RMSNormTP(heads * head_dim, heads, EPS)
        norm.weight.weight_loader(norm.weight, weights[name])
        first, behind = rank * heads // ranks, max((rank + 1) * heads // ranks, rank * heads // ranks + 1)
        held.append((name, slice(first * head_dim, behind * head_dim)))
        norms.append(norm)
    return held, *norms


# --- Experts and embedding -------------------------------------------------------------------------------


@pytest.fixture
def no_server(monkeypatch):
    """Experts look at the server's arguments while they are built: here those of a server with none given."""
    arguments = SimpleNamespace(kt_weight_path=None)
    monkeypatch.setattr(fused_moe, "get_global_server_args", lambda: arguments)
    monkeypatch.setattr(fused_moe, "create_kt_config_from_server_args", lambda *_: None)
    monkeypatch.setattr(fused_moe, "create_moe_dispatcher", lambda config: None)


@st.composite
def expert_layouts(draw):
    """(experts, width, TP, EP) that work."""
    tp = draw(st.integers(1, MOST_RANKS))
    ep = draw(st.sampled_from([size for size in range(1, tp + 1) if tp % size == 0]))
    return ep * draw(st.integers(1, 3)), tp // ep * draw(st.integers(1, 4)), tp, ep


@cases(1000)
@given(layout=expert_layouts())
def test_every_row_of_every_expert_is_on_one_rank(no_server, layout):
    """Loaded tensor by tensor, as a checkpoint brings them, into the engine's fused experts."""
    num_experts, width, tp, ep = layout
    assert ExpertShape(num_experts, width).works(tp, ep)
    gate, up, down = (collections.Counter() for _ in range(3))
    for rank in range(tp):
        experts = loaded_experts(num_experts, width, ep, *divmod(rank, tp // ep), tp // ep)
        w13, w2 = experts.w13_weight.detach().squeeze(-1).int(), experts.w2_weight.detach().squeeze(-2).int()
        half = width // (tp // ep)
        assert (w13[:, half:] == w13[:, :half] + 10**6).all(), "gate and up rows of a rank must be the same rows"
        assert (w2 == w13[:, :half]).all(), "down columns of a rank must be its gate rows"
        gate.update(w13[:, :half].flatten().tolist())
        up.update((w13[:, half:] - 10**6).flatten().tolist())
        down.update(w2.flatten().tolist())
    assert gate == up == down == dict.fromkeys(range(num_experts * width), 1)


def loaded_experts(num_experts: int, width: int, ep: int, ep_rank: int, moe_tp_rank: int, moe_tp: int):
    """The engine's experts on one rank, every expert's tensor loaded; a value is expert * width + row, w3's + 10**6."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in (
            ("get_moe_expert_parallel_world_size", ep),
            ("get_moe_expert_parallel_rank", ep_rank),
            ("get_moe_tensor_parallel_world_size", moe_tp),
            ("get_moe_tensor_parallel_rank", moe_tp_rank),
        ):
            monkeypatch.setattr(fused_moe, name, lambda value=value: value)
        experts = fused_moe.FusedMoE(num_experts, 1, width, 0, top_k=1)
    for expert in range(num_experts):
        rows = numbered(width) + expert * width
        for shard, name, tensor in (
            ("w1", "w13_weight", rows), ("w3", "w13_weight", rows + 10**6), ("w2", "w2_weight", rows.T),
        ):  # fmt: skip
            target = minimax_m2_weights.Target(name, shard, expert)
            minimax_m2_weights._call_loader(getattr(experts, name), tensor, target)
    return experts


@cases(1000)
@given(words=st.integers(1, 2000), blocks=st.integers(1, 3), ranks=st.sampled_from([1, 2, 4, 8, 16]))
def test_every_row_of_the_embedding_is_on_one_rank(words, blocks, ranks):
    held, padding = collections.Counter(), 64 * blocks
    for rank in range(ranks):
        with on_rank(vocab_parallel_embedding, rank, ranks):
            layer = vocab_parallel_embedding.VocabParallelEmbedding(
                words, 1, use_attn_tp_group=True, padding_size=padding, enable_tp=True
            )
        layer.weight.weight_loader(layer.weight, numbered(words) + 1)
        rows = layer.weight.detach().flatten().int().tolist()
        assert len(rows) * ranks >= words
        held.update(row - 1 for row in rows if row > 0)
        full = minimax_m2_weights.full_shape(layer, layer.weight, minimax_m2_weights.Target("embed"))
        assert full == (words, 1)
    assert held == dict.fromkeys(range(words), 1)


# --- What is refused -------------------------------------------------------------------------------------


@cases(2500)
@given(q_heads=st.integers(1, 96), kv_heads=st.integers(1, 96), ranks=st.integers(1, 64))
def test_attention_is_divided_exactly_where_brute_force_can(q_heads, kv_heads, ranks):
    """Brute force: whole heads a rank, each q head's KV head on its rank, and the same count on every rank."""
    if q_heads % kv_heads == 0 and q_heads % ranks == 0 and divides(kv_heads, ranks):
        shards = shard_attention(q_heads, kv_heads, ranks)
        assert shards.q.replicas == 1 and shards.kv.replicas == max(1, ranks // kv_heads)
        return
    with pytest.raises(ValueError) as refused:
        shard_attention(q_heads, kv_heads, ranks)
    numbers = set(map(int, re.findall(r"\d+", str(refused.value))))
    assert numbers & {q_heads, kv_heads} and len(str(refused.value)) > 60


class Loaded(Exception):
    """Weights were allocated."""


@cases(2500)
@given(
    heads=st.integers(1, 48), group=st.integers(1, 8), tp=st.integers(1, 32), dp=st.integers(1, 8),
    experts=st.integers(1, 32), width=st.integers(1, 64), ep=st.integers(1, 32), block=st.sampled_from([1, 2, 8]),
)  # fmt: skip
def test_the_model_refuses_every_invalid_layout_before_it_allocates_a_weight(
    heads, group, tp, dp, experts, width, ep, block
):
    """``heads`` KV heads of ``group`` q heads each; valid layouts get as far as the first weight, no other does."""
    valid = (
        tp % dp == 0
        and heads * group % (tp // dp) == 0
        and divides(heads, tp // dp)
        and tp % ep == 0
        and experts % ep == 0
        and width % (tp // ep * block) == 0
    )
    with pytest.raises((ValueError, Loaded)) as stopped:
        build_layer(heads * group, heads, tp, dp, experts, width, ep, block)
    assert isinstance(stopped.value, Loaded) == valid, str(stopped.value)
    if not valid:
        assert re.search(r"--tp \d+|attention-TP ranks", str(stopped.value)), str(stopped.value)


def build_layer(q_heads: int, kv_heads: int, tp: int, dp: int, experts: int, width: int, ep: int, block: int) -> None:
    """The model's own checks and constructors, in the order in which it calls them, up to the first weight.

    Raises:
        Loaded: nothing was refused.
    """
    config = SimpleNamespace(
        num_local_experts=experts, intermediate_size=width, hidden_size=q_heads, num_attention_heads=q_heads,
        num_key_value_heads=kv_heads, head_dim=1, quantization_config={"weight_block_size": [block, block]},
    )  # fmt: skip

    def allocate(*args, **kwargs):
        raise Loaded

    arguments = SimpleNamespace(ep_size=ep, ep_num_redundant_experts=0, moe_dp_size=1)
    attn_tp = attention_tp_size(tp, dp)
    with on_rank(minimax_m2, 0, attn_tp), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(minimax_m2_moe, "get_global_server_args", lambda: arguments)
        monkeypatch.setattr(minimax_m2_moe, "get_tensor_model_parallel_world_size", lambda: tp)
        monkeypatch.setattr(minimax_m2, "_qk_norms", allocate)
        minimax_m2_moe.check_experts(config)
        minimax_m2.MiniMaxM2Attention(config, 0, None, "")


@cases(500)
@given(heads=st.integers(1, 64), ranks=st.integers(1, 64))
def test_a_norm_is_built_exactly_where_its_heads_divide(heads, ranks):
    with on_rank(minimax_m2, 0, ranks):
        if divides(heads, ranks):
            norm = minimax_m2.MiniMaxM2RMSNormTP(heads * 2, heads)
            assert norm.reduced_count == heads * 2 * max(1, ranks // heads)
            with pytest.raises(ValueError, match=f"needs a weight of shape \\({heads * 2},\\)"):
                norm.weight.weight_loader(norm.weight, torch.ones(heads * 2 + 1))
            return
        with pytest.raises(ValueError, match=f"{heads} heads cannot be divided over {ranks} attention-TP ranks"):
            minimax_m2.MiniMaxM2RMSNormTP(heads * 2, heads)


@cases(1000)
@given(heads=st.integers(1, 512), ranks=st.integers(1, 512))
def test_a_refusal_names_rank_counts_that_work(heads, ranks):
    """The nearest below and above, by trying all."""
    if divides(heads, ranks):
        assert shard_heads(heads, ranks).heads_per_rank == max(1, heads // ranks)
        return
    with pytest.raises(ValueError) as refused:
        shard_heads(heads, ranks)
    works = [number for number in range(1, 1025) if divides(heads, number)]
    below, above = max(n for n in works if n < ranks), min(n for n in works if n > ranks)
    assert str(refused.value).endswith(f"{below}, {above}")
