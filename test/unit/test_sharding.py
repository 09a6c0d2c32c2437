"""The sharding arithmetic, against brute force and against the engine's own QKVParallelLinear."""

from __future__ import annotations

import math

import pytest
import torch
from sglang.srt.layers.linear import QKVParallelLinear
from sglang.srt.layers.minimax_sharding import (
    ExpertShape,
    attention_tp_size,
    check_vocabulary,
    nearest_rank_counts,
    padded_vocabulary,
    quantisation_block,
    shard_attention,
    shard_heads,
    working_ep_sizes,
    working_tp_sizes,
)

MOST = 64
VALID = [(t, h) for t in range(1, MOST + 1) for h in range(1, MOST + 1) if h % t == 0 or t % h == 0]
INVALID = [(t, h) for t in range(1, MOST + 1) for h in range(1, MOST + 1) if h % t != 0 and t % h != 0]
PUBLISHED = ExpertShape(num_experts=256, width=1536, block=128)


def test_every_valid_pair_holds_every_head_equally_often():
    for ranks, heads in VALID:
        shards = shard_heads(heads, ranks)
        held = [head for rank in range(ranks) for head in shards.heads_of(rank)]
        assert sorted(held) == sorted(list(range(heads)) * shards.replicas), (ranks, heads)
        assert shards.num_shards * shards.heads_per_rank == heads


def test_every_other_pair_is_refused_with_both_numbers_and_the_nearest_that_work():
    assert len(VALID) + len(INVALID) == MOST * MOST
    for ranks, heads in INVALID:
        with pytest.raises(ValueError) as error:
            shard_heads(heads, ranks)
        works = [n for n in range(1, 2 * MOST + 1) if heads % n == 0 or n % heads == 0]
        below, above = max(n for n in works if n < ranks), min(n for n in works if n > ranks)
        assert nearest_rank_counts(heads, ranks) == [below, above]
        for number in (str(ranks), str(heads), f"{below}, {above}"):
            assert number in str(error.value)


def test_agrees_with_the_engines_qkv_projection_on_every_rank_for_every_valid_pair():
    """Each KV head's row holds its own number, so what a rank loaded tells which heads it holds."""
    for ranks, kv_heads in VALID:
        q_heads = math.lcm(ranks, kv_heads)
        k = torch.arange(kv_heads, dtype=torch.float32)[:, None]
        q = torch.arange(q_heads, dtype=torch.float32)[:, None]
        shards = shard_attention(q_heads, kv_heads, ranks)
        for rank in range(ranks):
            layer = QKVParallelLinear(1, 1, q_heads, kv_heads, bias=False, tp_rank=rank, tp_size=ranks)
            for shard, weight in (("q", q), ("k", k), ("v", k)):
                layer.weight.weight_loader(layer.weight, weight, shard)
            loaded = layer.weight.detach().flatten().int().tolist()
            own_q, own_kv = list(shards.q.heads_of(rank)), list(shards.kv.heads_of(rank))
            assert loaded == own_q + own_kv + own_kv, (ranks, kv_heads, rank)


def test_a_rank_outside_the_group_is_an_error():
    for rank in (-1, 16):
        with pytest.raises(ValueError, match=f"rank {rank} is not one of the 16 ranks"):
            shard_heads(8, 16).shard_of(rank)


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "ranks", "message"),
    [
        (48, 8, 5, "8 KV heads cannot be divided over 5"),
        (48, 8, 32, "48 q heads cannot be divided over 32 .* 1, 2, 4, 8, 16, 24, 48"),
        (12, 8, 4, "12 q heads cannot share 8 KV heads"),
    ],
)
def test_attention_that_cannot_be_divided(q_heads, kv_heads, ranks, message):
    with pytest.raises(ValueError, match=message):
        shard_attention(q_heads, kv_heads, ranks)


def test_the_published_model_at_tp16():
    shards = shard_attention(48, 8, 16)
    assert (shards.q.heads_per_rank, shards.kv.heads_per_rank, shards.kv.replicas) == (3, 1, 2)
    assert [shards.kv.shard_of(rank) for rank in (0, 1, 2, 15)] == [0, 0, 1, 7]


def test_the_vocabulary_divides_as_the_engines_embedding_does_or_is_refused():
    from sglang.srt.layers.vocab_parallel_embedding import pad_vocab_size, vocab_range_from_global_vocab_size

    for vocab_size in (1, 64, 1000, 1152, 200064):
        padded = pad_vocab_size(vocab_size)
        assert padded_vocabulary(vocab_size) == padded
        for ranks in range(1, 33):
            try:
                vocab_range_from_global_vocab_size(padded, 0, ranks)
            except AssertionError:
                with pytest.raises(ValueError, match=f"{vocab_size} words, padded to {padded}, .* over {ranks} ranks"):
                    check_vocabulary(vocab_size, ranks)
            else:
                check_vocabulary(vocab_size, ranks)


def test_attention_tp_size_divides_or_refuses():
    assert attention_tp_size(16, dp_size=2) == 8
    assert attention_tp_size(16, attn_cp_size=2) == 8 and attention_tp_size(16, dp_size=2, attn_cp_size=4) == 2
    with pytest.raises(ValueError, match="--tp 8 must be a multiple of --dp 3"):
        attention_tp_size(8, dp_size=3)


@pytest.mark.parametrize(("tp", "ep"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (8, [2, 4, 8]), (16, [4, 8, 16])])
def test_ep_sizes_of_the_published_fp8_checkpoint(tp, ep):
    """1536 / 8 = 192 and 1536 / 16 = 96 are not multiples of 128, so plain TP8 and TP16 need EP."""
    assert working_ep_sizes(PUBLISHED, tp) == ep


def test_ep_sizes_against_brute_force():
    for experts in (1, 7, 96, 179, 256):
        for width in (96, 1536):
            for block in (1, 32, 128):
                shape = ExpertShape(experts, width, block)
                for tp in range(1, 17):
                    expected = [
                        ep
                        for ep in range(1, tp + 1)
                        if tp % ep == 0 and experts % ep == 0 and width % (tp // ep * block) == 0
                    ]
                    assert working_ep_sizes(shape, tp) == expected, (shape, tp)


@pytest.mark.parametrize("ep", [0, -1, -8])
def test_an_ep_size_below_one_is_a_broken_rule_and_not_a_division_by_zero(ep):
    """-1 divides everything without a remainder."""
    assert PUBLISHED.reason_against(8, ep) == f"--tp 8 is not a multiple of --ep {ep}"
    said = f"--tp 8 is not a multiple of --ep {ep} times --moe-dp-size 2"
    assert PUBLISHED.reason_against(8, ep, 2) == said


def test_an_odd_number_of_experts_has_tp_sizes_that_work():
    assert working_ep_sizes(ExpertShape(179, 1536, 128), 8) == []
    assert working_tp_sizes(ExpertShape(179, 1536, 128), 16) == [1, 2, 3, 4, 6, 12]
    assert working_tp_sizes(ExpertShape(179, 1536, 128), 12)[-1] == 12  # up to the given one, which is in


@pytest.mark.parametrize(
    ("config", "block"),
    [
        (None, 1),
        ({"quant_method": "fp8"}, 1),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 128),
        ({"quant_method": "fp8", "weight_block_size": [64, 96]}, 192),
        ({"config_groups": {"group_0": {"weights": {"block_structure": [128, 128]}}}}, 128),
        ({"config_groups": {"group_0": {"weights": {"block_structure": None}}}}, 1),
        ({"config_groups": {"group_0": {"weights": {"strategy": "group", "group_size": 128}}}}, 128),
        ({"config_groups": {"group_0": {"weights": {"strategy": "tensor_group", "group_size": 16}}}}, 1),
        ({"config_groups": {"group_0": {"weights": {"strategy": "channel", "group_size": None}}}}, 1),
        (
            {
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": {"strategy": "group", "group_size": 32}}},
            },
            64,
        ),
    ],
)
def test_quantisation_block(config, block):
    assert quantisation_block(config) == block
