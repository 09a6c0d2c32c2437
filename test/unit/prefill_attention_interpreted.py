"""The kernel of short prefills' attention in Triton's interpreter, on a CPU, against float64.

``test_prefill_attention.py`` runs this file in a process of its own, since Triton reads TRITON_INTERPRET when it is
imported.
"""

from __future__ import annotations

import pytest
import torch
from sglang.srt.layers.minimax_prefill_attention import GRAPH_REQUESTS, MAX_REQUESTS, Plan, prefill_attention
from unit.interpreted import compute_as_a_gpu
from unit.prefill_batches import check, prefill_of

PLANS = [Plan(16, 16, 4, 2), Plan(32, 16, 4, 3), Plan(16, 64, 4, 2)]
REQUESTS = {
    "a token": ([(1, 0)], 0),
    "a token behind others": ([(1, 40)], 3),
    "one": ([(37, 0)], 11),
    "one behind others": ([(20, 33)], 0),
    "several": ([(5, 0), (1, 70), (17, 16), (9, 1)], 5),
    "as many as a graph takes": ([(1, 2)] * GRAPH_REQUESTS, 1),
    "one more": ([(1, 2)] * (GRAPH_REQUESTS + 1), 1),
    "as many as it takes": ([(1, 2), (2, 0), (1, 5)] * (MAX_REQUESTS // 3), 3),
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    compute_as_a_gpu(monkeypatch)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: "/".join(map(str, plan)))
@pytest.mark.parametrize("name", REQUESTS)
def test_every_batch_is_the_attention_of_float64(plan, name):
    given = prefill_of(*REQUESTS[name], 6, 1)
    given.fill()
    check(prefill_attention(*given.arguments, plan), given)


@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 2), (3, 3), (16, 1), (14, 7), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_and_dtypes(heads, kv_heads, dtype):
    given = prefill_of([(7, 9), (13, 0)], 2, heads, kv_heads, dtype)
    given.fill()
    check(prefill_attention(*given.arguments), given)


def test_a_batch_leaves_nothing_of_the_one_before():
    """As graphs share the memory in which a batch is described."""
    several, one = prefill_of([(5, 3), (6, 0), (4, 4)], 5, 6, 1), prefill_of([(20, 0)], 0, 6, 1)
    table = several.batch.table
    for given in (several, one, several):
        given.batch.table = table
        given.fill()
        check(prefill_attention(*given.arguments), given)


def test_more_requests_than_a_table_holds_are_an_error():
    given = prefill_of([(1, 0)] * (MAX_REQUESTS + 1), 0, 6, 1)
    with pytest.raises(AssertionError, match=f"{MAX_REQUESTS + 1} requests"):
        given.fill()
