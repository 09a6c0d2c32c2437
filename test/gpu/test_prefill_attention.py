"""The kernel of short prefills' attention on a GPU against float64: any batch and plan, in a graph for any requests."""

from __future__ import annotations

import pytest
import torch

from sglang_minimax import overlay

overlay.install()

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs an NVIDIA GPU of compute capability 9 (Hopper)", allow_module_level=True)

from sglang.srt.layers.minimax_prefill_attention import PLAN_OF_MORE, PLANS, Plan, prefill_attention  # noqa: E402
from unit.prefill_batches import check, prefill_of  # noqa: E402

TRIED = [*dict.fromkeys([*PLANS.values(), PLAN_OF_MORE]), Plan(32, 64, 4, 2), Plan(128, 128, 8, 2)]
BATCHES = {
    "a token": ([(1, 0)], 0),
    "a token behind many": ([(1, 8000)], 3),
    "one": ([(128, 0)], 0),
    "one, padded": ([(500, 0)], 524),
    "one behind many": ([(100, 8000)], 28),
    "several": ([(5, 0), (1, 700), (170, 16), (90, 1)], 22),
    "alike": ([(16, 100)] * 32, 0),
    "as many as a graph takes": ([(1, 2)] * 63, 1),
    "one more": ([(1, 2)] * 64, 0),
    "as many as it takes": ([(20, 30)] * 255, 20),
    "long": ([(3000, 0), (1000, 3000)], 96),
}


@pytest.mark.parametrize("plan", TRIED, ids=lambda plan: "/".join(map(str, plan)))
@pytest.mark.parametrize("name", BATCHES)
def test_every_batch_is_the_attention_of_float64(plan, name):
    given = prefill_of(*BATCHES[name], 12, 2, device="cuda")
    given.fill()
    torch.cuda.synchronize()  # the launch before must not be the one that describes the batch
    out = prefill_attention(*given.arguments, plan)
    check(out, given)
    assert torch.equal(prefill_attention(*given.arguments, plan), out)


@pytest.mark.parametrize(("heads", "kv_heads"), [(48, 8), (24, 4), (6, 1), (3, 1), (5, 1), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_and_dtypes(heads, kv_heads, dtype):
    given = prefill_of([(200, 9), (13, 300)], 43, heads, kv_heads, dtype, "cuda")
    given.fill()
    torch.cuda.synchronize()
    check(prefill_attention(*given.arguments), given)


def test_a_graph_serves_any_requests_of_its_tokens():
    """As a server replays it: how many requests there are, and how long they are, is that of the prefill."""
    batches = [([(128, 0)], 0), ([(1, 3000)], 127), ([(2, 5)] * 63, 2), ([(7, 0), (90, 700), (1, 1)], 30)]
    most = prefill_of([(128, 8000)], 0, 12, 2, device="cuda")
    q, k_cache, v_cache = (torch.empty_like(one) for one in (most.q, most.k_cache, most.v_cache))
    batch, slots = most.batch, most.batch.slots.new_zeros(200, 8200)
    batch.slots = slots

    def load(given) -> None:
        q.copy_(given.q)
        for mine, its in ((k_cache, given.k_cache), (v_cache, given.v_cache)):
            mine.fill_(float("nan"))[: len(its)] = its
        slots.fill_(len(k_cache) - 1)[: len(given.batch.slots), : given.batch.slots.shape[1]] = given.batch.slots
        given.batch = batch
        given.fill()
        torch.cuda.synchronize()

    load(prefill_of(*batches[0], 12, 2, device="cuda"))
    prefill_attention(q, k_cache, v_cache, batch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = prefill_attention(q, k_cache, v_cache, batch)
    for one in [*batches, batches[0]]:
        given = prefill_of(*one, 12, 2, device="cuda")
        load(given)
        graph.replay()
        torch.cuda.synchronize()
        check(out, given)
