"""What a rank says while it loads: when, how many bytes, and at what rate."""

from __future__ import annotations

import time

import pytest
import torch
from sglang.srt.models.minimax_m2_progress import INTERVAL_SECONDS, LoadProgress


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def tensors(sizes_and_seconds, clock: Clock):
    """Tensors of so many bytes, each of which takes so many seconds to come."""
    for i, (size, seconds) in enumerate(sizes_and_seconds):
        clock.now += seconds
        yield f"tensor.{i}", torch.empty(int(size), dtype=torch.uint8, device="meta")


def load(sizes_and_seconds, **options) -> list[str]:
    clock, said = Clock(), []
    progress = LoadProgress(clock=clock, say=said.append, **options)
    names = [name for name, _ in progress.over(tensors(sizes_and_seconds, clock))]
    assert names == [f"tensor.{i}" for i in range(len(sizes_and_seconds))]
    progress.finish([torch.empty(250_000_000, dtype=torch.float64, device="meta")])
    return said


def test_a_line_each_interval_with_the_rate_since_the_last_and_one_at_the_end():
    assert INTERVAL_SECONDS == 10
    assert load([(2e9, 4), (3e9, 4), (5e9, 4), (1e9, 9), (1e9, 1), (4e9, 5)]) == [
        "Loading weights: 10.00 GB of the checkpoint after 12 s, now at 0.83 GB/s",
        "Loading weights: 12.00 GB of the checkpoint after 22 s, now at 0.20 GB/s",
        "Loaded weights: 16.00 GB of the checkpoint in 27.0 s, 0.59 GB/s; this rank keeps 2.00 GB",
    ]


def test_a_short_load_says_its_last_line_only():
    assert load([(5e8, 0.5), (5e8, 0.5)]) == [
        "Loaded weights: 1.00 GB of the checkpoint in 1.0 s, 1.00 GB/s; this rank keeps 2.00 GB"
    ]
    assert load([]) == ["Loaded weights: 0.00 GB of the checkpoint in 0.0 s, in no time; this rank keeps 2.00 GB"]


@pytest.mark.parametrize(("seconds", "lines"), [(1, 0), (11, 2)])
def test_an_update_of_weights_speaks_only_where_it_takes_long(seconds, lines):
    assert len(load([(1e9, seconds)], always=False)) == lines


def test_a_load_that_fails_has_no_last_line():
    clock, said = Clock(), []

    def broken():
        yield from tensors([(1e9, 11)], clock)
        raise RuntimeError("the disk is gone")

    progress = LoadProgress(clock=clock, say=said.append)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        list(progress.over(broken()))
    assert len(said) == 1 and said[0].startswith("Loading weights: 1.00 GB")


def test_as_many_tensors_as_the_published_checkpoint_cost_no_time_that_matters():
    """62 layers of 256 experts with three weights and three scales each, and the rest: fewer than 96,000 tensors.

    A load takes a minute at the least, so that half a second, a hundred times what is seen, is under a hundredth.
    """
    tensor = torch.empty(1)
    progress = LoadProgress(say=lambda line: None)
    started = time.process_time()
    counted = sum(1 for _ in progress.over(("name", tensor) for _ in range(96_000)))
    assert counted == 96_000
    assert time.process_time() - started < 0.5
