"""The kernel of decode attention in Triton's interpreter, on a CPU, against float64.

``test_decode_attention.py`` runs this file in a process of its own, since Triton reads TRITON_INTERPRET when it is
imported.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import triton
import triton.language as tl
from sglang.srt.layers.minimax_decode_attention import Plan, _my_part, decode_attention
from unit.decode_batches import batch, check
from unit.interpreted import compute_as_a_gpu

PLANS = [Plan(16, 4, 2, 1, 16, 2), Plan(32, 4, 2, 3, 32, 64), Plan(64, 4, 2, 2, 128, 64)]
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


@triton.jit
def parts_kernel(out_ptr, bounds_ptr, requests, aim, shortest, most, RAGGED: tl.constexpr, BLOCK: tl.constexpr):
    cta = tl.program_id(0)
    request, start, begin, end, first, parts = _my_part(cta, bounds_ptr, requests, aim, shortest, most, RAGGED, BLOCK)
    tl.store(out_ptr + cta * 6 + 0, request)
    tl.store(out_ptr + cta * 6 + 1, start)
    tl.store(out_ptr + cta * 6 + 2, begin)
    tl.store(out_ptr + cta * 6 + 3, end)
    tl.store(out_ptr + cta * 6 + 4, first)
    tl.store(out_ptr + cta * 6 + 5, parts)


def division(lengths, aim, shortest, most, ragged):
    """For each request its parts [begin, end), in the order of their CTAs."""
    counts = torch.tensor(lengths, dtype=torch.int32)
    bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int() if ragged else counts
    out = torch.zeros(aim + len(lengths), 6, dtype=torch.int32)
    block = max(16, triton.next_power_of_2(len(lengths)))
    parts_kernel[(len(out),)](out, bounds, len(lengths), aim, shortest, most, ragged, block)
    found = [[] for _ in lengths]
    for cta, (request, start, begin, end, first, parts) in enumerate(out.tolist()):
        if request < len(lengths):
            assert start == (sum(lengths[:request]) if ragged else lengths[request])
            found[request].append((begin, end))
            assert cta == first + len(found[request]) - 1 and len(found[request]) <= parts
            if cta == first + parts - 1:
                assert len(found[request]) == parts
    return found


BATCHES = [[70000], [0] * 5, [516] * 24, [5, 0, 130, 16, 16], [40000] + [9] * 11, list(range(1, 34))]


@pytest.mark.parametrize("lengths", BATCHES, ids=lambda lengths: f"{len(lengths)}-of-{sum(lengths)}")
@pytest.mark.parametrize(("aim", "shortest", "most"), [(33, 128, 20), (16, 16, 1024), (1, 64, 64)])
def test_parts_cover_each_request_once_and_are_alike(lengths, aim, shortest, most):
    ragged = len(lengths) % 2 == 0
    for length, parts in zip(lengths, division(lengths, aim, shortest, most, ragged), strict=True):
        assert parts[0][0] == 0 and parts[-1][1] == length
        assert all(before[1] == after[0] for before, after in itertools.pairwise(parts))
        sizes = [end - begin for begin, end in parts]
        assert max(sizes) - min(sizes) <= 1 and (min(sizes) > 0 or length == 0)
        assert len(parts) <= max(1, min(most, -(-length // shortest)))


@pytest.mark.parametrize("requests", [1, 5, 11, 16, 18, 29, 48])
def test_requests_alike_have_as_many_parts_as_run_at_once(requests):
    """No part waits for a place, and a request has as many as that allows, but for a sixteenth of the places left over.

    Of 18, the shares to the nearest would be 3 parts, more than run at once.
    """
    aim = 48
    (parts,) = {len(one) for one in division([516] * requests, aim, 1, 10**6, True)}
    assert (aim - aim // 16) // requests <= parts <= aim // requests


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_part_is_much_longer_than_others(seed):
    """Here shares of all places, to the nearest, would be more parts than run at once; rounded down, 81 of 96 places
    have a part, and the longest part is 1.7 times the mean of 90."""
    draw = random.Random(seed)
    lengths = [draw.randrange(128, 1024) for _ in range(32)]
    found = division(lengths, 96, 1, 10**6, True)
    assert sum(map(len, found)) <= 96
    assert max(end - begin for parts in found for begin, end in parts) <= 1.5 * sum(lengths) / 90
