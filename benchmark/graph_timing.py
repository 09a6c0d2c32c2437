"""What the benchmarks of single kernels share: replays of a CUDA graph, each between two events, none waited for."""

from __future__ import annotations

import statistics


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


def graph_time(function, arguments: list[tuple], warm_up: int, replays: int) -> float:
    """Median microseconds of one of the calls of a graph that has one for each of ``arguments``."""
    import torch

    function(*arguments[0])  # compiles, on the stream whose inputs are ready
    torch.cuda.synchronize()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        function(*arguments[0])
        torch.cuda.synchronize()
        graph.capture_begin()
        for one in arguments:
            function(*one)
        graph.capture_end()
    return statistics.median(replay_times(graph, len(arguments), warm_up, replays))
