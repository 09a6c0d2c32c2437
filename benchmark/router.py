#!/usr/bin/env python3
"""Times the router of MiniMax-M2, from bfloat16 activations to logits and to chosen experts: the engine's way and ours.

    python benchmark/router.py --tokens 16 1 64 --time-limit 120 --json out.json
    python benchmark/router.py --prefill --time-limit 45 --json prefill.json

--prefill times ``PREFILL_PLANS`` and other tiles at 512 to 32768 tokens.

Protocol: a CUDA graph of 32 layers, each with its own weights (3 MB; together more than the L2 cache, as in a model,
where the experts' weights pass between two routers). From 4096 tokens on it holds fewer layers, but 4 at least. Before
each router a kernel multiplies the activations by 1, as in a model a norm would write them: ours start while it still
runs. 10 replays to warm up, then 100, each between two events. Reported: medians, in microseconds a layer, less the
median of a graph with these multiplications alone. Timed:
    stock logits    cast to float32 and F.linear
    stock           these, then the engine's topk_sigmoid
    partials        our first kernel, partial sums
    logits          both of ours, for the plans of each method whose first kernel is fastest
    two steps       the logits that a server has, then the engine's topk_sigmoid
    choice          the choice in our second kernel, for the same plans as logits, by its warps
    late            choice by the plan that a server has, each kernel launched after the one before it has ended; not
                    for prefill
The error is the largest difference of a logit from float64, in units of the root mean square of the logits. A plan
whose experts or weights are not those of float64, as near as rounding lets them be, is reported and not timed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import statistics
import time

import graph_timing
import torch
import triton
from compilers import compilers

TOKENS, EXPERTS, HIDDEN_SIZE, TOP_K = [16, 1, 64, 4, 32, 2, 8, 48, 128, 256], 256, 3072, 8
PREFILL_TOKENS = [2048, 512, 8192, 1024, 4096, 32768]
TILES = [  # tokens, experts and columns of a tile, warps, stages; how many such CTAs an H200 holds at once
    (128, 64, 64, 4, 4, 264),
    (128, 128, 64, 8, 4, 132),
    (128, 64, 64, 4, 3, 264),
    (64, 64, 64, 4, 4, 264),
    (128, 64, 32, 4, 6, 264),
    (64, 128, 64, 8, 4, 132),
]
LAYERS, WARM_UP, REPLAYS = 32, 10, 100
WARPS = (4, 1, 2, 8)
FASTEST = 3  # so many plans of each method go on to the second kernel


def prefill_plans(tokens: int):
    """The plan of this many tokens, and its like with half the parts; then other tiles, each with the most equal parts
    that make no more than one wave of CTAs."""
    from sglang.srt.layers.minimax_router import Plan, plan_for

    found = [plan_for(tokens)]
    if found[0].splits(HIDDEN_SIZE) > 1:
        found.append(found[0]._replace(steps=2 * found[0].steps))
    for block_tokens, block_experts, block_k, warps, stages, ctas in TILES:
        tiles, blocks = triton.cdiv(tokens, block_tokens) * triton.cdiv(EXPERTS, block_experts), HIDDEN_SIZE // block_k
        splits = next((n for n in (16, 12, 8, 6, 4, 3, 2) if blocks % n == 0 and tiles * n <= ctas), 1)
        found.append(Plan("tiles", block_tokens, block_experts, block_k, blocks // splits, warps, stages))
    return list(dict.fromkeys(found))


def plans(tokens: int):
    """Plans of the first kernel worth timing at this many tokens."""
    from sglang.srt.layers.minimax_router import PLANS, Plan

    if tokens > max(PLANS):
        yield from prefill_plans(tokens)
        return
    rows = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    parts = [(32, 128, 1, 4), (64, 128, 1, 8), (16, 256, 1, 4), (16, 256, 1, 8), (64, 128, 1, 4), (16, 128, 2, 4)]
    parts += [(16, 128, 1, 4), (32, 256, 1, 8), (32, 128, 2, 4), (32, 128, 2, 8), (64, 64, 2, 4), (64, 128, 2, 8)]
    block = {1: 1, 2: 2}.get(tokens, 4)
    reduce = [(8, 256, 1, 4), (8, 512, 1, 8), (16, 256, 1, 4), (16, 128, 2, 4), (16, 256, 1, 8)]
    of_reduce = [Plan("reduce", block, *rest) for rest in reduce] if tokens <= 4 else []
    of_parts = [Plan("parts", rows, *rest) for rest in parts]
    yield from of_reduce + of_parts if tokens <= 2 else of_parts + of_reduce


def compile_plan(plan, tokens: int) -> None:
    """Into Triton's cache on disk; a plan that fails here fails again, and is reported, when it is timed."""
    from sglang_minimax import overlay

    overlay.install()
    from sglang.srt.layers import minimax_router as router

    def meta(*size, dtype=torch.float32):
        return torch.empty(size, device="meta", dtype=dtype)

    x, partials = meta(tokens, HIDDEN_SIZE, dtype=torch.bfloat16), meta(plan.splits(HIDDEN_SIZE), tokens, EXPERTS)
    options = {**router._launch_options(torch.device("cuda")), "num_warps": plan.warps, "grid": (1,)}
    tensors = x, meta(EXPERTS, HIDDEN_SIZE), partials, tokens, EXPERTS, HIDDEN_SIZE, HIDDEN_SIZE
    with contextlib.suppress(Exception):
        if plan.method == "tiles":
            whole = HIDDEN_SIZE % (plan.block_k * plan.steps) == 0
            router._tiled_partial_logits_kernel.warmup(*tensors, *plan[1:5], plan.stages, whole, **options)
        else:
            router._partial_logits_kernel.warmup(*tensors, *plan[:5], **options)


def compile_sum(splits: int) -> None:
    """The second kernel where it does not choose, which has one form for any number of tokens."""
    from sglang_minimax import overlay

    overlay.install()
    from sglang.srt.layers import minimax_router as router

    with contextlib.suppress(Exception):
        router._add_partials_kernel.warmup(
            torch.empty(splits, 1, EXPERTS, device="meta"), torch.empty(1, EXPERTS, device="meta"), 1, EXPERTS, splits,
            triton.next_power_of_2(EXPERTS), **router._launch_options(torch.device("cuda")), num_warps=4, grid=(1,),
        )  # fmt: skip


def compile_choice(splits: int, warps: int) -> None:
    """The second kernel, which has one form for any number of tokens."""
    from sglang_minimax import overlay

    overlay.install()
    from sglang.srt.layers import minimax_router as router

    def meta(*size, dtype=torch.float32):
        return torch.empty(size, device="meta", dtype=dtype)

    with contextlib.suppress(Exception):
        router._choose_experts_kernel.warmup(
            meta(splits, 1, EXPERTS), meta(EXPERTS), meta(1, EXPERTS), meta(1, TOP_K),
            meta(1, TOP_K, dtype=torch.int32), 1, EXPERTS, splits, triton.next_power_of_2(splits),
            triton.cdiv(EXPERTS, router.CHUNK.value), TOP_K, triton.next_power_of_2(TOP_K),
            **router._launch_options(torch.device("cuda")), num_warps=warps, grid=(1,),
        )  # fmt: skip


def compile_all(tokens: list[int]) -> None:
    """In parallel processes: one after the other takes minutes."""
    of_plans = dict.fromkeys(
        (plan, count if count == 1 else count % 16 or 16) for count in tokens for plan in plans(count)
    )
    splits = dict.fromkeys(plan.splits(HIDDEN_SIZE) for plan, _ in of_plans)
    with compilers() as pool:
        jobs = [pool.submit(compile_plan, plan, count) for plan, count in of_plans]
        jobs += [pool.submit(compile_choice, count, warps) for count in splits for warps in WARPS]
        jobs += [pool.submit(compile_sum, count) for count in splits if count > 1]
        concurrent.futures.wait(jobs)


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


class Problem:
    """Inputs of all layers at one number of tokens, and how anything that takes them is timed and checked."""

    def __init__(self, tokens: int, weights: list, bias: torch.Tensor) -> None:
        self.weights, self.bias = weights, bias
        self.inputs = [torch.randn(tokens, HIDDEN_SIZE, device="cuda").bfloat16() for _ in weights]
        self.x, self.weight = self.inputs[0], weights[0]
        self.exact = self.x.double() @ self.weight.double().T
        self.before = replay_time([lambda x=x: x * 1 for x in self.inputs])

    def time_of(self, function) -> float:
        """Microseconds of ``function(x, weight)``."""
        pairs = zip(self.inputs, self.weights, strict=True)
        return replay_time([lambda x=x, w=w: function(x * 1, w) for x, w in pairs]) - self.before

    def error_of(self, logits: torch.Tensor) -> float:
        return float((logits.double() - self.exact).abs().max() / self.exact.square().mean().sqrt())

    def check(self, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        """Against float64: the choice at each place, whichever of two near equals is there, and the weights."""
        torch.testing.assert_close(logits.double(), self.exact, rtol=0, atol=1e-4)
        scores = self.exact.sigmoid()
        choice = scores + self.bias.double()
        belongs = choice.sort(dim=-1, descending=True).values[:, :TOP_K]
        torch.testing.assert_close(choice.gather(1, ids.long()), belongs, rtol=0, atol=1e-4)
        chosen = scores.gather(1, ids.long())
        torch.testing.assert_close(weights.double(), chosen / chosen.sum(-1, keepdim=True), rtol=0, atol=1e-4)


def why(reason: Exception) -> str:
    return f"{type(reason).__name__}: {reason}"[:200]


def time_plans(problem: Problem, row: dict, deadline: float) -> None:
    """Each plan's first kernel; of the fastest by method, both kernels, with and without the choice."""
    from sglang.srt.layers import minimax_router as router

    for plan in plans(len(problem.x)):
        one = {"plan": plan}
        row["plans"].append(one)
        if time.monotonic() > deadline:
            one["failed"] = "no time left"
            continue
        try:
            logits = router.add_partials(router.partial_logits(problem.x, problem.weight, plan))
            one["error"] = problem.error_of(logits)
            assert one["error"] < 1e-5, f"logits are wrong by {one['error']:.1e}"
            one["partials"] = problem.time_of(lambda x, w, p=plan: router.partial_logits(x, w, p))
        except Exception as reason:  # too much shared memory, or a shape that this method does not take
            one["failed"] = why(reason)
    for method in ("parts", "reduce", "tiles"):
        timed = [one for one in row["plans"] if one["plan"].method == method and "partials" in one]
        for one in sorted(timed, key=lambda one: one["partials"])[:FASTEST]:
            if time.monotonic() > deadline:
                return
            plan, one["choice"] = one["plan"], {}
            one["logits"] = problem.time_of(lambda x, w, p=plan: router.add_partials(router.partial_logits(x, w, p)))
            for warps in WARPS:

                def choose(x, w, p=plan, n=warps):
                    return router.choose_experts(router.partial_logits(x, w, p), problem.bias, TOP_K, n)

                try:
                    problem.check(*choose(problem.x, problem.weight))
                    one["choice"][warps] = problem.time_of(choose)
                except Exception as reason:
                    one.setdefault("choice failed", {})[warps] = why(reason)


def measure(tokens: int, weights: list, bias: torch.Tensor, deadline: float) -> dict:
    from sglang.srt.layers import minimax_router as router
    from sglang.srt.layers.moe.topk import fused_topk

    problem = Problem(tokens, weights[: max(4, 2 * max(PREFILL_TOKENS) // tokens)], bias)

    def stock_logits(x, weight):
        return torch.nn.functional.linear(x.to(torch.float32), weight)

    def and_engines_choice(logits_of):
        def both(x, weight):
            logits = logits_of(x, weight)
            return logits, *fused_topk(x, logits, TOP_K, True, bias, "sigmoid")

        return both

    def served(x, weight):
        return router.minimax_route(x, weight, bias, TOP_K)

    whole = {
        "stock": and_engines_choice(stock_logits),
        "two steps": and_engines_choice(router.minimax_router_logits),
        "served": served,
    }
    row: dict = {"served plan": router.choice_plan_for(tokens), "plans": []}
    row["stock error"] = problem.error_of(stock_logits(problem.x, problem.weight))
    row["stock logits"] = problem.time_of(stock_logits)
    for name, function in whole.items():
        try:
            problem.check(*function(problem.x, problem.weight))
            row[name] = problem.time_of(function)
        except Exception as reason:
            row[f"{name} failed"] = why(reason)
    if tokens <= max(router.PLANS):
        time_late(problem, row, served)
    time_plans(problem, row, deadline)
    return row


def time_late(problem: Problem, row: dict, served) -> None:
    from sglang.srt.layers import minimax_router as router

    early = router.has_programmatic_launch
    router.has_programmatic_launch = lambda device: False
    try:
        row["late"] = problem.time_of(served)
    except Exception as reason:
        row["late failed"] = why(reason)
    finally:
        router.has_programmatic_launch = early


def tell(tokens: int, row: dict) -> None:
    """A few lines for a person; all numbers are in the JSON."""

    def microseconds(name: str) -> str:
        return f"{name} {row[name]:.2f}" if name in row else f"{name}: {row.get(name + ' failed')}"

    names = ["stock logits", "stock", "two steps", "served"] + ["late"] * ("late" in row or "late failed" in row)
    print(f"{tokens:5} tokens: {', '.join(map(microseconds, names))}; stock's error {row['stock error']:.1e}")
    for one in row["plans"]:
        if "logits" in one:
            choice = " ".join(f"{warps}:{time_us:.2f}" for warps, time_us in one["choice"].items())
            print(
                f"     {'/'.join(map(str, one['plan'])):<24} partials {one['partials']:5.2f} logits "
                f"{one['logits']:5.2f} choice by warps {choice} error {one['error']:.1e}"
                + ("  (served)" if one["plan"] == row["served plan"].logits else "")
                + "".join(f"  {warps} warps: {said}" for warps, said in one.get("choice failed", {}).items())
            )
    failed = [one["failed"] for one in row["plans"] if "failed" in one]
    print(f"     {len(row['plans'])} plans, {len(failed)} not timed" + (f": {failed[0][:90]}" if failed else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="where to write all numbers")
    parser.add_argument("--tokens", type=int, nargs="+", help="in this order")
    parser.add_argument("--prefill", action="store_true", help="more tokens, by the plans for them")
    parser.add_argument("--time-limit", type=float, default=600, help="seconds after which nothing new is begun")
    options = parser.parse_args()
    deadline = time.monotonic() + options.time_limit
    from sglang_minimax import overlay

    overlay.install()
    options.tokens = options.tokens or (PREFILL_TOKENS if options.prefill else TOKENS)
    compile_all(options.tokens)
    print(f"compiled, {deadline - time.monotonic():.0f} s left", flush=True)
    torch.manual_seed(0)
    weights = [torch.randn(EXPERTS, HIDDEN_SIZE, device="cuda") * HIDDEN_SIZE**-0.5 for _ in range(LAYERS)]
    bias = torch.rand(EXPERTS, device="cuda")
    rows: dict = {}
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    results = {"gpu": torch.cuda.get_device_name(), **versions, "us_a_layer": rows}
    with torch.inference_mode():
        for tokens in options.tokens:
            if time.monotonic() > deadline:
                print(f"no time left for {tokens} tokens")
                continue
            rows[tokens] = measure(tokens, weights, bias, deadline)
            if options.json:
                with open(options.json, "w", encoding="utf-8") as stream:
                    json.dump(results, stream, indent=1)
    for tokens, row in rows.items():
        tell(tokens, row)


if __name__ == "__main__":
    main()
