"""What the benchmarks of single kernels share: replays of a CUDA graph, each between two events, none waited for."""

from __future__ import annotations


def replay_times(graph, launches: int, warm_up: int, replays: int) -> list[float]:
    """Microseconds of one of the ``launches`` alike that ``graph`` holds, for each replay after the warm-up."""
    import torch

    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(warm_up + replays)]
    for before, after in events:
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) * 1000 / launches for before, after in events[warm_up:]]
