"""The QK norm of any sharding equals the unsharded one, in float64 by hand."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.layers.minimax_qk_norm import ALIGNED_ROWS, norm_qk, scale_rows, sums_of_squares
from sglang.srt.layers.minimax_sharding import shard_attention, shard_heads
from sglang.srt.models import minimax_m2
from sglang.srt.models.minimax_m2 import MiniMaxM2RMSNormTP

EPS = 1e-6
LAYOUTS = [(1, 48, 8), (4, 48, 8), (8, 48, 8), (16, 48, 8), (4, 16, 2), (6, 48, 3), (3, 24, 3), (16, 16, 1), (6, 48, 6)]


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def heads(x: torch.Tensor, of: range, head_dim: int) -> torch.Tensor:
    return x[..., of.start * head_dim : of.stop * head_dim]


@pytest.mark.parametrize(("ranks", "q_heads", "kv_heads"), LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rank_norms_its_heads_as_one_rank_norms_all(ranks, q_heads, kv_heads, tokens, dtype):
    head_dim = 4
    generator = torch.Generator().manual_seed(ranks * 100 + q_heads)
    # Heads of different size, and so small that eps counts: a mean over the wrong heads or count shows.
    q = (torch.randn(tokens, q_heads * head_dim, generator=generator) * torch.rand(1, 1) * 3e-3).to(dtype)
    k = (torch.randn(tokens, kv_heads * head_dim, generator=generator) * 2e-3).to(dtype)
    k *= torch.linspace(0.5, 2, kv_heads).repeat_interleave(head_dim).to(dtype)
    q_weight, k_weight = torch.rand(q_heads * head_dim) + 0.5, torch.rand(kv_heads * head_dim) + 0.5
    shards = shard_attention(q_heads, kv_heads, ranks)
    own = [
        (heads(q, shards.q.heads_of(rank), head_dim), heads(k, shards.kv.heads_of(rank), head_dim))
        for rank in range(ranks)
    ]
    all_sums = [sums_of_squares(*pair) for pair in own]

    for rank, (own_q, own_k) in enumerate(own):
        normed_q, normed_k = norm_qk(
            own_q,
            own_k,
            heads(q_weight, shards.q.heads_of(rank), head_dim),
            heads(k_weight, shards.kv.heads_of(rank), head_dim),
            shards.q.replicas * q.shape[1],
            shards.kv.replicas * k.shape[1],
            EPS,
            lambda mine, rank=rank: sum(all_sums) + 0 * (mine - all_sums[rank]),
        )
        rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
        for normed, x, weight, of in (
            (normed_q, q, q_weight, shards.q.heads_of(rank)),
            (normed_k, k, k_weight, shards.kv.heads_of(rank)),
        ):
            assert normed.dtype == dtype and normed.is_contiguous()
            expected = heads(reference(x, weight), of, head_dim)
            torch.testing.assert_close(normed.double(), expected, rtol=rounding, atol=rounding)


def test_sums_are_padded_for_the_collective_with_zeros():
    q, k = torch.ones(3, 4), torch.ones(3, 2)
    sums = sums_of_squares(q, k)
    assert sums.shape == (4, 2) and sums.numel() * sums.element_size() % 16 == 0
    assert sums.tolist() == [[4, 2]] * 3 + [[0, 0]]
    assert ALIGNED_ROWS * 2 * 4 == 16


def test_squares_that_float16_cannot_hold_are_summed():
    """300 squared is beyond 65504, float16's largest number."""
    q, k = (torch.randn(3, width).mul(300).half() for width in (8, 4))
    normed = norm_qk(q, k, torch.ones(8), torch.ones(4), 8, 4, EPS, None)
    for got, x in zip(normed, (q, k), strict=True):
        torch.testing.assert_close(got.double(), reference(x, torch.ones(x.shape[1])), rtol=2**-10, atol=0)


def test_strided_rows_are_read_where_they_lie():
    qkv = torch.randn(3, 4 + 2 + 2)
    q, k, _ = qkv.split([4, 2, 2], dim=-1)
    assert not q.is_contiguous()
    ones = torch.ones
    normed_q, normed_k = norm_qk(q, k, ones(4), ones(2), 4, 2, EPS, None)
    torch.testing.assert_close(normed_q.double(), reference(q, ones(4)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(normed_k.double(), reference(k, ones(2)), rtol=1e-5, atol=1e-6)


def test_eps_is_added_to_the_mean():
    """A row of zeros but for one value whose square is eps * count: the mean is eps, and rsqrt sees 2 * eps."""
    count = 16
    q = torch.zeros(1, count)
    q[0, 0] = (EPS * count) ** 0.5
    normed, _ = scale_rows(q, q, torch.ones(count), torch.ones(count), sums_of_squares(q, q), count, count, EPS)
    assert normed[0, 0].item() == pytest.approx((EPS * count / (2 * EPS)) ** 0.5, rel=1e-5)


@pytest.fixture
def rank_of(monkeypatch):
    def place(rank: int, ranks: int) -> None:
        monkeypatch.setattr(minimax_m2, "get_attention_tp_rank", lambda: rank)
        monkeypatch.setattr(minimax_m2, "get_attention_tp_size", lambda: ranks)

    return place


@pytest.mark.parametrize(("ranks", "num_heads"), [(1, 8), (4, 8), (8, 8), (16, 8), (6, 3), (16, 1)])
def test_the_loader_takes_the_shard_of_the_ranks_heads(rank_of, ranks, num_heads):
    head_dim = 4
    weight = torch.arange(num_heads * head_dim, dtype=torch.float32)
    seen = []
    for rank in range(ranks):
        rank_of(rank, ranks)
        norm = MiniMaxM2RMSNormTP(num_heads * head_dim, num_heads, EPS)
        norm.weight.weight_loader(norm.weight, weight)
        assert norm.weight.numel() % head_dim == 0
        seen.append(norm.weight.tolist())
    replicas = max(1, ranks // num_heads)
    assert [value for own in seen[::replicas] for value in own] == weight.tolist()
    assert all(seen[rank] == seen[rank // replicas * replicas] for rank in range(ranks))


@pytest.mark.parametrize(("ranks", "num_heads"), [(1, 8), (4, 8), (16, 8)])
def test_a_norm_called_alone_is_over_all_heads_too(rank_of, monkeypatch, ranks, num_heads):
    tokens, head_dim, shards = 4, 4, shard_heads(num_heads, ranks)
    x, weight = torch.randn(tokens, num_heads * head_dim) * 2e-3, torch.rand(num_heads * head_dim) + 0.5
    total = x.double().square().sum(-1, keepdim=True).float() * shards.replicas  # of all ranks
    monkeypatch.setattr(minimax_m2, "attention_tensor_model_parallel_all_reduce", total.expand_as)
    for rank in range(ranks):
        rank_of(rank, ranks)
        norm = MiniMaxM2RMSNormTP(num_heads * head_dim, num_heads, EPS)
        norm.weight_loader(norm.weight, weight)
        own = shards.heads_of(rank)
        expected = heads(reference(x, weight), own, head_dim)
        torch.testing.assert_close(norm(heads(x, own, head_dim)).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [31, 33, 16, 0])
def test_the_loader_refuses_a_weight_of_another_size(rank_of, size):
    rank_of(3, 16)
    norm = MiniMaxM2RMSNormTP(32, 8, EPS)
    with pytest.raises(ValueError, match=rf"8 heads of 4 needs a weight of shape \(32,\).*\({size},\)"):
        norm.weight_loader(norm.weight, torch.ones(size))


def test_the_loader_refuses_a_parameter_of_another_size(rank_of):
    rank_of(0, 4)
    norm = MiniMaxM2RMSNormTP(32, 8, EPS)
    with pytest.raises(ValueError, match=r"holds a weight of shape \(4,\) where \(8,\) belongs"):
        norm.weight_loader(torch.nn.Parameter(torch.ones(4)), torch.ones(32))


def test_heads_that_do_not_divide_are_refused(rank_of):
    rank_of(0, 5)
    with pytest.raises(ValueError, match=r"8 heads cannot be divided over 5 .* 4, 8"):
        MiniMaxM2RMSNormTP(32, 8, EPS)
    with pytest.raises(ValueError, match="hidden_size 33 is not a multiple of num_heads 8"):
        MiniMaxM2RMSNormTP(33, 8, EPS)
