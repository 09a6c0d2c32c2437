"""Batches for the tests and the benchmark of ``minimax_prefill_attention``, and attention over them in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sglang.srt.layers.minimax_prefill_attention import HEAD_DIM, PrefillBatch
from unit.decode_batches import ROUNDING, slots_and_caches


@dataclass
class Given:
    """q of all tokens, padding last; caches; and of each request its slots, how many of them are cached, its row.

    Slots of nobody, and of tokens behind a request's last, hold what must not be read."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    slots: list[torch.Tensor]
    lengths: list[int]
    cached: list[int]
    batch: PrefillBatch

    def fill(self) -> None:
        device = self.q.device
        self.batch.fill(
            torch.tensor(self.lengths, dtype=torch.int32, device=device),
            torch.tensor([len(slots) for slots in self.slots], device=device),
            torch.tensor(self.rows, device=device), len(self.q),
        )  # fmt: skip

    @property
    def rows(self) -> list[int]:
        """Rows of the table of slots, none of them the first, in another order than the batch's."""
        return [3 * number + 1 for number in reversed(range(len(self.lengths)))]

    @property
    def arguments(self) -> tuple:
        return self.q, self.k_cache, self.v_cache, self.batch


def prefill_of(
    requests: list[tuple[int, int]], padding: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> Given:  # fmt: skip
    """``requests``: (new tokens, tokens in the cache before). Random values; some tokens' scores stand out."""
    lengths, cached = [new for new, _ in requests], [before for _, before in requests]
    sizes = [new + before for new, before in requests]
    used, tokens = sum(sizes), sum(lengths) + padding
    generator = torch.Generator().manual_seed(used * 101 + tokens * 11 + heads * 3 + kv_heads)
    order, caches = slots_and_caches(used, kv_heads, generator)
    q = 2 * torch.randn(tokens, heads * HEAD_DIM, generator=generator)
    nobodys = int(caches[0].isnan().all(-1).all(-1).nonzero()[-1])
    slots = torch.full((3 * len(requests), max(sizes) + 3), nobodys, dtype=torch.int32)
    k_cache, v_cache = (cache.to(dtype).to(device) for cache in caches)
    given = Given(
        q.to(dtype).to(device), k_cache, v_cache, list(order.split(sizes)), lengths, cached,
        PrefillBatch(slots.to(device)),
    )  # fmt: skip
    for row, own in zip(given.rows, given.slots, strict=True):
        given.batch.slots[row, : len(own)] = own.to(device, torch.int32)
    return given


def check(out: torch.Tensor, given: Given) -> None:
    """Against float64. Weights are rounded to the values' dtype, and so is the result."""
    assert out.shape == given.q.shape and out.dtype == given.q.dtype
    kv_heads, rounding, at = given.k_cache.shape[1], ROUNDING[out.dtype], 0
    for slots, new, before in zip(given.slots, given.lengths, given.cached, strict=True):
        q = given.q[at : at + new].double().view(new, kv_heads, -1, HEAD_DIM).permute(1, 2, 0, 3)
        result = out[at : at + new].double().view(new, kv_heads, -1, HEAD_DIM).permute(1, 2, 0, 3)
        own = slots.to(out.device)
        k, v = (cache[own].double().transpose(0, 1)[:, None] for cache in (given.k_cache, given.v_cache))
        hidden = torch.ones(new, new + before, dtype=torch.bool, device=out.device).triu(before + 1)
        scores = (q @ k.transpose(2, 3) * HEAD_DIM**-0.5).masked_fill(hidden, float("-inf"))
        weights = scores.softmax(-1)
        exact, magnitudes = weights @ v, weights @ v.abs()
        error, bound = (result - exact).abs(), exact.abs() * rounding + magnitudes * (rounding + 2**-14)
        assert (error <= bound).all(), f"{(error / bound).max():.2f} of what is allowed"
        at += new
    assert not out[at:].any(), "tokens that pad the batch see nothing, and get zeros"
