"""Batches for the tests and the benchmark of ``minimax_decode_attention``, and attention over them in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sglang.srt.layers.minimax_decode_attention import HEAD_DIM, CachedTokens

# What rounding a value once can change of it, of its magnitude.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@dataclass
class Batch:
    """q, caches, and the slots of each request in them, in any order; slots of nobody hold what must not be read."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    slots: list[torch.Tensor]
    counters: torch.Tensor

    def cached(self, ragged: bool) -> CachedTokens:
        device = self.q.device
        lengths = torch.tensor([len(one) for one in self.slots])
        if ragged:
            bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(device, torch.int32)
            return CachedTokens(bounds, torch.cat([*self.slots, self.slots[0][:0]]), True)
        table = torch.full((len(self.slots), int(lengths.max()) + 3), 0, dtype=torch.int32, device=device)
        for row, one in zip(table, self.slots, strict=True):
            row[: len(one)] = one
        return CachedTokens(lengths.to(device, torch.int32), table, False)

    @property
    def arguments(self) -> tuple:
        return self.q, self.k_cache, self.v_cache


def batch(
    lengths: list[int], heads: int, kv_heads: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> Batch:
    """Random values; the scores of some tokens stand out, so that weights differ."""
    generator = torch.Generator().manual_seed(sum(lengths) * 101 + heads * 11 + kv_heads)
    used = sum(lengths)
    order, caches = slots_and_caches(used, kv_heads, generator)
    q = 2 * torch.randn(len(lengths), heads * HEAD_DIM, generator=generator)
    k_cache, v_cache = (cache.to(dtype).to(device) for cache in caches)
    counters = torch.zeros(len(lengths) * kv_heads, dtype=torch.int32, device=device)
    slots = list(order.to(device).split(lengths))
    return Batch(q.to(dtype).to(device), k_cache, v_cache, slots, counters)


def slots_and_caches(used: int, kv_heads: int, generator: torch.Generator) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """``used`` slots in any order, and caches of keys and values for them, float32; slots of nobody hold NaN, the first
    one too."""
    order = 1 + torch.randperm(used + 5, generator=generator)[:used]
    caches = [torch.randn(used + 6, kv_heads, HEAD_DIM, generator=generator) for _ in range(2)]
    free = torch.ones(used + 6, dtype=torch.bool)
    free[order] = False
    for cache in caches:
        cache[free] = float("nan")
    return order, caches


def check(out: torch.Tensor, given: Batch) -> None:
    """Against float64. Weights are rounded to the values' dtype, and so is the result."""
    assert out.shape == given.q.shape and out.dtype == given.q.dtype and not given.counters.any()
    kv_heads, rounding = given.k_cache.shape[1], ROUNDING[out.dtype]
    q = given.q.double().view(len(given.slots), kv_heads, -1, HEAD_DIM)
    found = out.double().view_as(q)
    for one, slots, result in zip(q, given.slots, found, strict=True):
        if len(slots) == 0:
            assert not result.any()
            continue
        k, v = (cache[slots].double().transpose(0, 1) for cache in (given.k_cache, given.v_cache))
        weights = (one @ k.transpose(1, 2) * HEAD_DIM**-0.5).softmax(-1)
        exact, magnitudes = weights @ v, weights @ v.abs()
        error, bound = (result - exact).abs(), exact.abs() * rounding + magnitudes * (rounding + 2**-14)
        assert (error <= bound).all(), f"{(error / bound).max():.2f} of what is allowed"
