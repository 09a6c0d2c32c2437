"""QK norm over two nodes: who is whose counterpart, what its projection loads, and that one node's sums cover all."""

from __future__ import annotations

import collections
import logging
from types import SimpleNamespace

import pytest
import torch
from sglang.srt import server_args as engine
from sglang.srt.entrypoints.engine import _calculate_rank_ranges
from sglang.srt.layers import minimax_counterpart, minimax_log
from sglang.srt.layers.linear import QKVParallelLinear
from sglang.srt.layers.minimax_counterpart import QKVWithCounterpart, build_qkv_proj, choose_counterpart
from sglang.srt.layers.minimax_qk_norm_paths import reason_against_counterpart
from sglang.srt.layers.minimax_sharding import counterpart_of, shard_attention, tp_ranks_per_node
from sglang.srt.layers.quantization import fp8 as fp8_method
from sglang.srt.layers.quantization.fp8 import Fp8Config

LAYOUTS = [  # q heads, KV heads, ranks
    (q, kv, ranks)
    for ranks in range(2, 33, 2)
    for kv in range(1, 33)
    for q in (kv * ranks,)
    if kv % ranks == 0 or ranks % kv == 0
]


def test_nodes_hold_the_ranks_that_the_engine_starts_on_them():
    for nnodes in (1, 2, 3, 4, 8):
        for pp in (1, 2, 4, 8):
            if nnodes % pp and pp % nnodes:
                continue
            tp = 4 * max(nnodes // pp, 1)
            each = tp_ranks_per_node(tp, pp, nnodes)
            for node in range(nnodes):
                stages, ranks, _, _ = _calculate_rank_ranges(nnodes, pp, tp, node)
                assert len(ranks) == each
                if len(stages) == 1:  # all ranks of the server, in order: a node's are as many in a row
                    assert ranks[0] + tp * stages[0] == node * each


def test_the_ranks_of_a_node_and_their_counterparts_hold_each_head_as_often_as_there_are_replicas():
    checked = 0
    for q_heads, kv_heads, ranks in LAYOUTS:
        shards, half = shard_attention(q_heads, kv_heads, ranks), ranks // 2
        for node in (range(half), range(half, ranks)):
            both = [*node, *(counterpart_of(rank, ranks) for rank in node)]
            assert sorted(both) == list(range(ranks))
            for part in (shards.q, shards.kv):
                held = collections.Counter(head for rank in both for head in part.heads_of(rank))
                assert held == dict.fromkeys(range(part.num_heads), part.replicas), (q_heads, kv_heads, ranks)
        by_head = collections.defaultdict(set)
        for rank in range(ranks):
            by_head[shards.kv.heads_of(rank)].add(rank // half)
        refused = reason_against_counterpart(ranks, half, shards.kv.replicas) is not None
        assert refused == any(len(nodes) == 2 for nodes in by_head.values()), (q_heads, kv_heads, ranks)
        checked += 1
    assert checked > 50


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(num_ranks=16, ranks_per_node=8, kv_replicas=2), None),
        (dict(num_ranks=16, ranks_per_node=4, kv_replicas=2), "16 ranks with 4 a node do not lie on two nodes"),
        (dict(num_ranks=4, ranks_per_node=3, kv_replicas=1), "do not lie on two nodes"),
        (dict(num_ranks=4, ranks_per_node=2, kv_replicas=4), "4 ranks share a KV head, on both nodes"),
        (dict(num_ranks=6, ranks_per_node=3, kv_replicas=2), "2 ranks share a KV head, on both nodes"),
        (dict(num_ranks=16, ranks_per_node=8, kv_replicas=2, loads_alike=False), "otherwise than in FP8 blocks"),
        (dict(num_ranks=16, ranks_per_node=8, kv_replicas=2, lora=True), "--enable-lora"),
        (dict(num_ranks=16, ranks_per_node=8, kv_replicas=2, pdmux=True), "--enable-pdmux"),
        (dict(num_ranks=16, ranks_per_node=8, kv_replicas=2, switched_off=True), "SGLANG_MINIMAX_COUNTERPART=0"),
    ],
)
def test_each_condition_stands_against_a_counterpart_by_itself(arguments, said):
    reason = reason_against_counterpart(**arguments)
    assert reason is None if said is None else said in reason


# --- The projection --------------------------------------------------------------------------------------

HEAD_DIM, HIDDEN = 4, 3


def rows(x: torch.Tensor, heads: range, head_dim: int = HEAD_DIM) -> torch.Tensor:
    return x[heads.start * head_dim : heads.stop * head_dim]


def build(q_heads, kv_heads, rank, ranks, head_dim=HEAD_DIM, hidden=HIDDEN, quant_config=None):
    return QKVWithCounterpart(
        hidden, head_dim, q_heads, kv_heads, bias=False, quant_config=quant_config, prefix="qkv_proj", tp_rank=rank,
        tp_size=ranks, counterpart_rank=counterpart_of(rank, ranks),
    )  # fmt: skip


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("q_heads", "kv_heads", "ranks"), [(48, 8, 16), (16, 8, 4), (16, 2, 4), (8, 2, 2)])
def test_own_rows_are_the_engines_and_those_behind_them_the_counterparts(q_heads, kv_heads, ranks, fused):
    whole = {name: torch.randn(n * HEAD_DIM, HIDDEN) for name, n in (("q", q_heads), ("k", kv_heads), ("v", kv_heads))}
    shards = shard_attention(q_heads, kv_heads, ranks)
    x = torch.randn(5, HIDDEN)
    for rank in range(ranks):
        layer = build(q_heads, kv_heads, rank, ranks)
        layer.weight.data.fill_(float("nan"))
        if fused:
            layer.weight.weight_loader(layer.weight, torch.cat([*whole.values()]))
        else:
            for name in "kvq":
                layer.weight.weight_loader(layer.weight, whole[name], name)
        other = counterpart_of(rank, ranks)
        expected = [
            rows(whole["q"], shards.q.heads_of(rank)), *(rows(whole[n], shards.kv.heads_of(rank)) for n in "kv"),
            rows(whole["q"], shards.q.heads_of(other)), rows(whole["k"], shards.kv.heads_of(other)),
        ]  # fmt: skip
        assert torch.equal(layer.weight, torch.cat(expected))
        parts = layer(x)[0].split(layer.output_partition_sizes, dim=-1)
        for part, weight in zip(parts, expected, strict=True):
            torch.testing.assert_close(part.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


def test_scales_of_fp8_blocks_go_where_their_rows_go(monkeypatch):
    monkeypatch.setattr(fp8_method, "get_tensor_model_parallel_world_size", lambda: 16)
    config = Fp8Config(True, "dynamic", None, [128, 128])
    for rank in (0, 5, 8, 15):
        layer = build(48, 8, rank, 16, 128, 256, config)
        scales = layer.weight_scale_inv
        assert scales.shape == (2 * 3 + 3, 2)
        whole = {"q": torch.arange(96.0).view(48, 2), "k": 100 + torch.arange(16.0).view(8, 2), "v": torch.ones(8, 2)}
        for name, loaded in whole.items():
            scales.weight_loader(scales, loaded, name)
            bits = torch.randint(0, 100, (loaded.shape[0] * 128, 256), dtype=torch.uint8)
            layer.weight.weight_loader(layer.weight, bits.view(torch.float8_e4m3fn), name)
        other = (rank + 8) % 16
        q, k = whole["q"], whole["k"]
        own = [q[3 * rank : 3 * rank + 3], k[rank // 2][None], torch.ones(1, 2)]
        assert torch.equal(scales, torch.cat([*own, q[3 * other : 3 * other + 3], k[other // 2][None]]))


def test_without_a_counterpart_the_projection_is_the_engines():
    layer = build_qkv_proj(None, HIDDEN, HEAD_DIM, 8, 2, bias=False, tp_rank=0, tp_size=2)
    assert type(layer) is QKVParallelLinear


# --- The choice ------------------------------------------------------------------------------------------


@pytest.fixture
def two_nodes(monkeypatch):
    arguments = engine.ServerArgs(model_path="dummy", device="cpu", tp_size=16)
    arguments.nnodes = 2
    monkeypatch.setattr(engine, "_global_server_args", arguments)
    monkeypatch.setattr(minimax_counterpart, "_node_group", lambda ranks: f"group of {ranks}")
    monkeypatch.delenv(minimax_counterpart.SWITCH, raising=False)
    told_to_others(monkeypatch)
    yield arguments
    minimax_counterpart._choices_of_any_rank.cache_clear()


def told_to_others(monkeypatch, **told: bool) -> None:
    """Has a rank of the other node say so when all ranks are asked."""
    world = SimpleNamespace(all_gather_object=lambda mine: [mine, dict.fromkeys(mine, False) | told, mine])
    minimax_counterpart._choices_of_any_rank.cache_clear()
    monkeypatch.setattr(minimax_counterpart, "get_world_group", lambda: world)


def choose(rank: int = 3, ranks: int = 16, quant_config=None):
    return choose_counterpart(rank, shard_attention(48, 8, ranks), quant_config, "model.layers.0.self_attn.qkv_proj")


def test_the_counterpart_is_at_the_same_place_of_the_other_node(two_nodes):
    chosen = choose(3)
    assert (chosen.rank, chosen.node) == (11, "group of 8") and choose(11).rank == 3
    assert choose(3, ranks=8) is None  # DP attention: its group lies on one node
    two_nodes.pp_size = 2
    assert choose(3) is None  # a stage a node: all ranks of one are together
    two_nodes.nnodes = 4
    assert choose(3).node == "group of 8"
    two_nodes.nnodes = two_nodes.pp_size = 1
    assert choose(3) is None


@pytest.mark.parametrize("what", ["lora", "pdmux", "memory_saver", "switched_off"])
def test_what_the_other_node_was_told_holds_here_too(two_nodes, monkeypatch, what):
    told_to_others(monkeypatch, **{what: True})
    assert choose() is None


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("enable_lora", True),
        ("lora_paths", ["one"]),
        ("enable_pdmux", True),
        ("enable_memory_saver", True),
        (None, None),
    ],
)
def test_what_this_node_was_told_holds(two_nodes, monkeypatch, option, value):
    if option is None:
        monkeypatch.setenv(minimax_counterpart.SWITCH, "0")
    else:
        setattr(two_nodes, option, value)
    assert choose() is None


def test_the_group_of_a_node_is_made_as_the_engines_groups_are(monkeypatch):
    world = SimpleNamespace(world_size=8, local_rank=1, device_group=None)
    monkeypatch.setattr(minimax_counterpart, "get_world_group", lambda: world)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group: "gloo")
    made = []

    def init(nodes, local_rank, backend, group_name):
        made.append((nodes, local_rank, torch.empty(1).device.type))

    monkeypatch.setattr(minimax_counterpart, "init_model_parallel_group", init)
    with torch.device("meta"):
        minimax_counterpart._node_group.__wrapped__(4)
    assert made == [([[0, 1, 2, 3], [4, 5, 6, 7]], 1, "cpu")]


@pytest.mark.parametrize(
    ("quant_config", "taken"),
    [
        (Fp8Config(True, "dynamic", None, [128, 128]), True),
        (Fp8Config(True, "dynamic", ["model.layers.0.self_attn.qkv_proj"], None), True),
        (Fp8Config(True, "dynamic", None, None), False),  # one scale of the whole
        (Fp8Config(False, "dynamic", None, None), False),  # quantised while it loads, by one scale
        (Fp8Config(True, "dynamic", None, [1, 32], use_mxfp8=True), False),  # whose scales are laid out anew
    ],
)
def test_weights_with_a_scale_of_the_whole_are_left_to_the_engine(two_nodes, quant_config, taken):
    assert (choose(quant_config=quant_config) is not None) == taken


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "stay within a node: each of 8 ranks also projects q and k of a rank of the other node"),
        ({"enable_lora": True}, "go over the network between the nodes: --enable-lora"),
        ({"nnodes": 4}, "go over the network between the nodes: 16 ranks with 4 a node"),
    ],
)
def test_the_choice_is_logged_once(two_nodes, caplog, monkeypatch, change, said):
    minimax_log.log_once.cache_clear()
    for name, value in change.items():
        setattr(two_nodes, name, value)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr("sglang.srt.distributed.get_tensor_model_parallel_rank", lambda: 0)
    with caplog.at_level(logging.INFO):
        assert len({choose(0) is None for _ in range(3)}) == 1
    [line] = [line for line in caplog.messages if "sums of QK norm" in line]
    assert said in line


@pytest.mark.parametrize(("ranks", "nnodes"), [(8, 2), (16, 1)])  # DP attention over two nodes; a single node
def test_ranks_of_one_node_ask_no_others_and_nothing_is_said_of_a_network(
    two_nodes, caplog, monkeypatch, ranks, nnodes
):
    minimax_log.log_once.cache_clear()
    two_nodes.nnodes = nnodes
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr("sglang.srt.distributed.get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: pytest.fail("asked"))
    with caplog.at_level(logging.INFO):
        assert choose(0, ranks=ranks) is None
    assert not [line for line in caplog.messages if "QK norm" in line]


def test_two_nodes_come_to_the_same_bits(monkeypatch):
    """Of rows that are equal in bits: both nodes add the same pairs, and these in the same order."""
    from sglang.srt.layers.minimax_qk_norm_rope import QKNormRope

    torch.manual_seed(0)
    ranks, q_size, k_size = 8, 2 * 8, 8
    parts = [(torch.randn(5, q_size), torch.randn(5, k_size)) for _ in range(ranks)]
    sums, rank_sums = [], []

    def keep(of_rank):
        rank_sums.append(of_rank)
        return of_rank

    for node in (range(4), range(4, 8)):
        rank_sums.clear()
        for rank in node:
            row = torch.cat([*parts[rank], torch.zeros(5, k_size), *parts[counterpart_of(rank, ranks)]], -1)
            group = SimpleNamespace(world_size=4, rank_in_group=rank % 4, all_reduce=keep)
            operator = QKNormRope(
                16, 8, 8, 4, 1e-6, SimpleNamespace(world_size=ranks, rank_in_group=rank), 0, "cpu", node=group
            )
            assert (operator.q_count, operator.k_count) == (16 * 8, 8 * 8)
            operator(row, torch.ones(q_size), torch.ones(k_size), torch.zeros(5, dtype=torch.long), torch.ones(1, 4))
        sums.append(sum(rank_sums))
    squares = [sum(pair[i].double().square().sum(-1) for pair in parts) for i in (0, 1)]
    assert torch.equal(sums[0], sums[1])
    torch.testing.assert_close(sums[0][:5].double(), torch.stack(squares, -1), rtol=1e-6, atol=0)
