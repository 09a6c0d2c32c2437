"""The kernel of decode attention in Triton's interpreter, on a CPU, against float64.

``test_decode_attention.py`` runs this file in a process of its own, since Triton reads TRITON_INTERPRET when it is
imported.
"""

from __future__ import annotations

import pytest
import torch
from sglang.srt.layers.minimax_decode_attention import Plan, decode_attention
from unit.decode_batches import batch, check
from unit.interpreted import compute_as_a_gpu

PLANS = [Plan(16, 4, 2, 1, 16), Plan(32, 4, 2, 3, 32), Plan(64, 4, 2, 2, 128)]
LENGTHS = [[1], [200], [1, 1, 1], [17, 64, 1, 33], [5, 0, 130, 16, 16], [3] * 19, [90, 1, 2, 1, 1]]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    compute_as_a_gpu(monkeypatch)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: "/".join(map(str, plan)))
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("ragged", [True, False])
def test_every_batch_is_the_attention_of_float64(plan, lengths, ragged):
    given = batch(lengths, 6, 1)
    out = decode_attention(*given.arguments, given.cached(ragged), given.counters, plan)
    check(out, given)
    assert torch.equal(decode_attention(*given.arguments, given.cached(ragged), given.counters, plan), out)


@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 2), (3, 3), (16, 1), (8, 1), (14, 7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_and_dtypes(heads, kv_heads, dtype):
    given = batch([70, 9, 40], heads, kv_heads, dtype)
    for ragged in (True, False):
        check(decode_attention(*given.arguments, given.cached(ragged), given.counters, PLANS[1]), given)


def test_more_slots_than_the_batch_has_are_not_read():
    """A captured graph's list of slots is as long as it may ever get, and ends in those of a batch before."""
    given = batch([40, 20], 6, 1)
    cached = given.cached(True)
    longer = cached._replace(slots=torch.cat([cached.slots, torch.full((50,), 10**6)]))
    check(decode_attention(*given.arguments, longer, given.counters, PLANS[0]), given)
