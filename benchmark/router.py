#!/usr/bin/env python3
"""Times the router's logits of MiniMax-M2, from bfloat16 activations to float32: the engine's way and ours, by plan.

    python benchmark/router.py --json out.json

Protocol: a CUDA graph of 32 layers, each with its own weights (3 MB; together more than the L2 cache, as in a model,
where the experts' weights pass between two routers); 10 replays to warm up, then 100, each between two events; the time
of a layer is a replay's time / 32. Reported: medians, in microseconds. What is timed:
    stock           cast to float32 and F.linear
    partials        our first kernel, partial sums
    logits          both of ours, for the three plans of each method whose first kernel is fastest
The error is the largest difference of a logit from float64, in units of the root mean square of the logits.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import statistics

import graph_timing
import torch

TOKENS, EXPERTS, HIDDEN_SIZE = [1, 2, 4, 8, 16, 32, 48, 64, 128, 256], 256, 3072
LAYERS, WARM_UP, REPLAYS = 32, 10, 100


def plans(tokens: int):
    """Plans worth timing at this many tokens."""
    from sglang.srt.layers.minimax_router import Plan

    rows = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    parts = [(16, 128, 2, 4), (16, 256, 1, 4), (16, 256, 1, 8), (32, 128, 1, 4), (32, 128, 2, 4), (32, 128, 2, 8)]
    parts += [(64, 64, 2, 4), (64, 128, 1, 4), (64, 128, 1, 8), (64, 128, 2, 8)]
    yield from (Plan("parts", rows, *rest) for rest in parts)
    fma = [(16, 64, 4, 4), (16, 128, 2, 4), (16, 128, 1, 4), (32, 64, 2, 4), (32, 128, 1, 4), (32, 128, 1, 8)]
    fma += [(32, 32, 4, 4), (64, 32, 4, 8), (64, 64, 2, 8)]
    yield from (Plan("fma", rows, *rest) for rest in fma)
    block = {1: 1, 2: 2}.get(tokens, 4)
    reduce = [(8, 256, 1, 4), (8, 512, 1, 8), (16, 128, 2, 4), (16, 256, 1, 4), (16, 256, 1, 8)]
    if tokens <= 16:
        yield from (Plan("reduce", block, *rest) for rest in reduce)


def compile_plan(plan, tokens: int) -> None:
    """Into Triton's cache on disk; a plan that fails here fails again, and is reported, when it is timed."""
    from sglang_minimax import overlay

    overlay.install()
    from sglang.srt.layers import minimax_router as router

    def meta(*size, dtype=torch.float32):
        return torch.empty(size, device="meta", dtype=dtype)

    x, partials = meta(tokens, HIDDEN_SIZE, dtype=torch.bfloat16), meta(plan.splits(HIDDEN_SIZE), tokens, EXPERTS)
    with contextlib.suppress(Exception):
        router._partial_logits_kernel.warmup(
            x, meta(EXPERTS, HIDDEN_SIZE), partials, tokens, EXPERTS, HIDDEN_SIZE, HIDDEN_SIZE, *plan[:5],
            num_warps=plan.warps, grid=(1,),
        )  # fmt: skip


def compile_plans(tokens: list[int]) -> None:
    """In parallel processes: one after the other takes minutes."""
    jobs = {(plan, count if count in (1, 2) else count % 16) for count in tokens for plan in plans(count)}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), context) as pool:
        list(pool.map(compile_plan, *zip(*((plan, count or 16) for plan, count in jobs), strict=True)))


def replay_time(layers: list) -> float:
    """Median microseconds of one of ``layers``, callables that are captured one after the other."""
    layers[0]()
    torch.cuda.synchronize()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        for layer in layers:
            layer()
        graph.capture_end()
    return statistics.median(graph_timing.replay_times(graph, len(layers), WARM_UP, REPLAYS))


def of_layers(function, inputs: list, weights: list) -> list:
    return [lambda x=x, w=w: function(x, w) for x, w in zip(inputs, weights, strict=True)]


def error_of(logits: torch.Tensor, exact: torch.Tensor) -> float:
    return float((logits.double() - exact).abs().max() / exact.square().mean().sqrt())


def stock(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x.to(torch.float32), weight)


def measure(tokens: int, weights: list) -> dict:
    from sglang.srt.layers import minimax_router as router

    inputs = [torch.randn(tokens, HIDDEN_SIZE, device="cuda").bfloat16() for _ in weights]
    exact = inputs[0].double() @ weights[0].double().T
    row = {
        "stock": replay_time(of_layers(stock, inputs, weights)),
        "stock error": error_of(stock(inputs[0], weights[0]), exact),
        "served": router.plan_for(tokens),
        "plans": [],
    }
    for plan in plans(tokens):
        try:
            partials = router.partial_logits(inputs[0], weights[0], plan)
        except Exception as reason:  # too much shared memory, or a shape that this method does not take
            row["plans"].append({"plan": plan, "failed": f"{type(reason).__name__}: {reason}"[:200]})
            continue
        first = replay_time(of_layers(lambda x, w, p=plan: router.partial_logits(x, w, p), inputs, weights))
        error = error_of(router.add_partials(partials), exact)
        row["plans"].append({"plan": plan, "partials": first, "error": error})
    for method in ("fma", "reduce", "parts"):
        timed = [one for one in row["plans"] if one["plan"].method == method and "partials" in one]
        for one in sorted(timed, key=lambda one: one["partials"])[:3]:
            one["logits"] = replay_time(
                of_layers(
                    lambda x, w, p=one["plan"]: router.add_partials(router.partial_logits(x, w, p)), inputs, weights
                )
            )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="where to write all numbers")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    options = parser.parse_args()
    from sglang_minimax import overlay

    overlay.install()
    compile_plans(options.tokens)
    torch.manual_seed(0)
    weights = [torch.randn(EXPERTS, HIDDEN_SIZE, device="cuda") * HIDDEN_SIZE**-0.5 for _ in range(LAYERS)]
    results: dict = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "us_a_layer": {}}
    with torch.inference_mode():
        for tokens in options.tokens:
            results["us_a_layer"][tokens] = row = measure(tokens, weights)
            print(f"{tokens:4} tokens: stock {row['stock']:.2f}, error {row['stock error']:.1e}")
            for one in row["plans"]:
                if "logits" in one:
                    print(
                        f"     {'/'.join(map(str, one['plan'])):<24} partials {one['partials']:5.2f} "
                        f"logits {one['logits']:5.2f} error {one['error']:.1e}"
                        + ("  (served)" if one["plan"] == row["served"] else ""),
                        flush=True,
                    )
            failed = sum("failed" in one for one in row["plans"])
            print(f"     {len(row['plans'])} plans, {failed} not possible", flush=True)
            if options.json:
                with open(options.json, "w", encoding="utf-8") as stream:
                    json.dump(results, stream, indent=1)


if __name__ == "__main__":
    main()
