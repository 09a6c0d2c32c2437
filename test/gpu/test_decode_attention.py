"""The kernel of decode attention on a GPU against float64: any batch and plan, in graphs captured for other lengths."""

from __future__ import annotations

import pytest
import torch

from sglang_minimax import overlay

overlay.install()

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs an NVIDIA GPU of compute capability 9 (Hopper)", allow_module_level=True)

from sglang.srt.layers.minimax_decode_attention import PLAN_OF_MORE, PLANS, Plan, decode_attention, plan_for  # noqa: E402
from unit.decode_batches import batch, check  # noqa: E402

TRIED = [*PLANS.values(), PLAN_OF_MORE, Plan(32, 4, 7, 4, 64, 1024), Plan(64, 4, 3, 1, 256, 8)]
LENGTHS = [
    [1], [63], [64], [65], [3000], [70000], [1] * 64, [513] * 16, [0, 7, 0, 900], list(range(1, 257)),
    [40000] + [9] * 63, [300] * 1024,
]  # fmt: skip


@pytest.mark.parametrize("plan", TRIED, ids=lambda plan: "/".join(map(str, plan)))
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}-of-{sum(lengths)}")
def test_every_batch_is_the_attention_of_float64(plan, lengths):
    given = batch(lengths, 12, 2, device="cuda")
    torch.cuda.synchronize()  # the launch before must not be the one that writes keys and values of earlier tokens
    for ragged in (True, False):
        cached = given.cached(ragged)
        torch.cuda.synchronize()
        out = decode_attention(*given.arguments, cached, given.counters, plan)
        check(out, given)
        for _ in range(5):
            assert torch.equal(decode_attention(*given.arguments, cached, given.counters, plan), out)


@pytest.mark.parametrize(("heads", "kv_heads"), [(48, 8), (24, 4), (6, 1), (3, 1), (16, 1), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_and_dtypes(heads, kv_heads, dtype):
    given = batch([700, 9, 4000], heads, kv_heads, dtype, "cuda")
    cached = given.cached(True)
    torch.cuda.synchronize()
    check(decode_attention(*given.arguments, cached, given.counters, plan_for(3, kv_heads)), given)


def test_a_graph_serves_any_lengths_of_its_requests():
    """As a server replays it: the lengths, and so the division, are those of the step."""
    first = batch([1] * 8, 12, 2, device="cuda")
    most = batch([900] * 8, 12, 2, device="cuda")
    bounds = torch.zeros(9, dtype=torch.int32, device="cuda")
    slots = torch.zeros(8000, dtype=torch.int64, device="cuda")
    q, k_cache, v_cache = (torch.empty_like(one) for one in most.arguments)
    cached = first.cached(True)._replace(bounds=bounds, slots=slots)
    counters = torch.zeros(16, dtype=torch.int32, device="cuda")

    def fill(given):
        now = given.cached(True)
        bounds.copy_(now.bounds)
        slots[: len(now.slots)] = now.slots
        q.copy_(given.q)
        for mine, its in ((k_cache, given.k_cache), (v_cache, given.v_cache)):
            mine.fill_(float("nan"))[: len(its)] = its
        torch.cuda.synchronize()

    fill(first)
    decode_attention(q, k_cache, v_cache, cached, counters, plan_for(8, 2))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k_cache, v_cache, cached, counters, plan_for(8, 2))
    for lengths in ([1] * 8, [900] * 8, [6000, 1, 1, 1, 1, 1, 1, 1], [3, 40, 500, 64, 65, 128, 129, 1]):
        given = batch(lengths, 12, 2, device="cuda")
        fill(given)
        graph.replay()
        torch.cuda.synchronize()
        given.counters = counters
        check(out, given)
