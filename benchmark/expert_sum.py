#!/usr/bin/env python3
"""Times the sum over a token's experts, for few tokens, as the engine does it and as its own other kernel does it.

    python benchmark/expert_sum.py [--json out.json]

The engine sums [tokens, 8 experts, hidden_size] through torch.compile up to 32 tokens, and through a kernel of
sgl_kernel above. Protocol: a CUDA graph of 16 sums over different inputs; 20 replays to warm up, then 200, each between
two events; the time of a sum is a replay's time / 16. Reported: the median, and the 10th and 90th percentile. Both are
compared with float64 first.
"""

from __future__ import annotations

import argparse
import json
import statistics

import torch

TOKENS, EXPERTS, HIDDEN_SIZE = [1, 2, 4, 8, 16, 24, 32], 8, 3072
SUMS, WARM_UP, REPLAYS = 16, 20, 200


def replay_times(function, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> list[float]:
    """Microseconds a sum, for each of ``REPLAYS`` replays."""
    for _ in range(3):
        function(inputs[0], outputs[0], 1.0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one, out in zip(inputs, outputs, strict=True):
            function(one, out, 1.0)
    times = []
    for replay in range(WARM_UP + REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= WARM_UP:
            times.append(begin.elapsed_time(end) * 1000 / SUMS)
    return times


def check(function, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> float:
    """The largest relative error (of the norm) against float64, after poisoning the outputs."""
    worst = 0.0
    for one, out in zip(inputs, outputs, strict=True):
        out.fill_(float("nan"))
        function(one, out, 1.0)
        exact = one.double().sum(dim=1)
        worst = max(worst, float((out.double() - exact).norm() / exact.norm()))
    assert worst < 2**-8, f"a relative error of {worst} is more than bfloat16 explains"
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="where to write all numbers")
    options = parser.parse_args()
    from sglang.srt.layers.moe.fused_moe_triton import fused_moe

    functions = {"torch.compile": fused_moe.moe_sum_reduce_torch_compile, "sgl_kernel": fused_moe.moe_sum_reduce}
    results: dict = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "microseconds": {}, "error": {}}
    for tokens in TOKENS:
        inputs = [torch.randn(tokens, EXPERTS, HIDDEN_SIZE, device="cuda").bfloat16() for _ in range(SUMS)]
        outputs = [torch.empty(tokens, HIDDEN_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(SUMS)]
        for name, function in functions.items():
            results["error"][f"{name} {tokens}"] = check(function, inputs, outputs)
            times = sorted(replay_times(function, inputs, outputs))
            spread = times[len(times) // 10], times[-len(times) // 10]
            results["microseconds"][f"{name} {tokens}"] = [spread[0], statistics.median(times), spread[1]]
    print(f"{results['gpu']}, torch {results['torch']}")
    print("tokens  " + "  ".join(f"{name:>22}" for name in functions))
    for tokens in TOKENS:
        cells = (results["microseconds"][f"{name} {tokens}"] for name in functions)
        print(f"{tokens:6}  " + "  ".join(f"{m:8.2f} ({low:.2f}-{high:.2f})" for low, m, high in cells))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as stream:
            json.dump(results, stream, indent=1)


if __name__ == "__main__":
    main()
