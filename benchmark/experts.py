#!/usr/bin/env python3
"""Times the experts of MiniMax-M2 for few tokens, from hidden states to their sum: the engine's way and ours, by plan.

    python benchmark/experts.py --json out.json [--shapes 256:384] [--tokens 16 1] [--time-limit 100]
    python benchmark/experts.py --dry-run          # no GPU: compiles for sm90, times nothing

A shape is local experts : a rank's part of an expert's width, as in tune_experts.py. Two routings: ``uniform``, each
token's experts at random among 256; and ``same``, where all tokens take the same eight, as with dummy weights. With
fewer than 256 local experts the others are those of other ranks.

Protocol: a CUDA graph of 16 layers, each with a routing of its own, so that a layer's experts are not in the L2 cache;
each replay between two events; the time of a layer is a replay's time / 16, and the median is reported, in
microseconds. First each candidate of each projection over 15 replays, ours alone: gate and up with the SiLU; down with
the sum; both from lists of work made before. Then the four best pairs, the served plan and the engine over 100 replays,
with the list. The engine runs as a MiniMax-M2 server has it: with this repository's tables where there is one, and its
own kernel for the sum. Processes of their own compile ahead of the one that measures.

What a candidate computes is compared with float64, of the same FP8 activations where it quantises, before it is timed,
and left out if it is wrong. The error of a pair, and the engine's, is the norm of the difference from float64 on
unquantised activations, relative.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import statistics
import time
from typing import Any, NamedTuple

import expert_gemms as gemms
import graph_timing
import torch

SHAPES, TOKENS, ROUTINGS = ["256:384", "256:768"], [16, 1, 64, 8, 4], ["uniform", "same"]
LAYERS, WARM_UP, QUICK, REPLAYS, PAIRS = 16, 5, 15, 100, 4
TOLERANCE = 0.004  # of one projection's error: bfloat16's rounding of what comes out


class Candidate(NamedTuple):
    """A projection, and how many routes of an expert its CTAs take at once."""

    routes: int
    how: Any  # experts.Projection

    def __str__(self) -> str:
        activations, *rest = self.how
        return "/".join(map(str, [activations, *([] if activations == "float32" else [self.routes]), *rest]))


def candidates(tokens: int) -> dict[str, list[Candidate]]:
    """What is worth timing, by projection, the likeliest first."""
    from sglang.srt.layers.minimax_experts import Projection

    def tensor(routes, *how):
        return Candidate(routes, Projection(*how))

    gate_up = [
        tensor(16, "float8", 32, 4, 7, 3), tensor(16, "float8", 32, 4, 10, 2), tensor(16, "float8", 32, 4, 4, 5),
        tensor(16, "float8", 64, 4, 4, 3),
    ]  # fmt: skip
    down = [
        tensor(16, "float8", 128, 4, 3, 3), tensor(16, "float8", 128, 4, 4, 2), tensor(16, "float8", 64, 4, 4, 4),
        tensor(16, "float8", 128, 8, 4, 2),
    ]  # fmt: skip
    if tokens <= 4:
        gate_up = [Candidate(16, Projection("float32", columns, columns // 2)) for columns in (8, 4)] + gate_up
        down = [Candidate(16, Projection("float32", columns, columns // 4)) for columns in (8, 16)] + down
    if tokens > 16:
        gate_up += [tensor(routes, "float8", 32, 4, 5, 2) for routes in (32, 64)]
        down += [tensor(routes, "float8", 128, warps, 2, 2) for routes, warps in ((32, 4), (64, 8))]
        gate_up += [tensor(64, "float8", 64, 8, 4, 1)]
        down += [tensor(64, "float8", 64, 4, 2, 2)]
    return {"gate_up": gate_up, "down": down}


def plan_of(gate_up: Candidate, down: Candidate):
    """Both in one plan, or None if they want lists of different items."""
    from sglang.srt.layers.minimax_experts import Plan

    routes = {one.routes for one in (gate_up, down) if one.how.activations != "float32"}
    return Plan(max(routes, default=16), gate_up.how, down.how) if len(routes) <= 1 else None


# Compilation, in processes of their own.


class Compiled:
    """Takes a kernel's place, and compiles what it is launched with into Triton's cache on disk."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.kernel.warmup(*args, grid=(1,), **kwargs)


def start_compiler(dry_run: bool) -> None:
    from sglang_minimax import overlay

    overlay.install()
    if dry_run:
        gemms.engine_pretending_sm90()
    from sglang.srt.layers import minimax_experts as experts

    for name in [name for name in vars(experts) if name.endswith("_kernel")]:
        setattr(experts, name, Compiled(getattr(experts, name)))
    experts.has_programmatic_launch = lambda device: True


def compile_one(shape: gemms.Shape, tokens: int, projection: str, candidate: Candidate) -> str | None:
    """A failure's text, or None."""
    from sglang.srt.layers import minimax_experts as experts

    def meta(*size, dtype):
        return torch.empty(size, device="meta", dtype=dtype)

    plan = plan_of(candidate, candidate)
    routes = tokens, gemms.TOP_K
    routing = experts.Routing(meta(*routes, dtype=torch.int32), meta(*routes, dtype=torch.float32), 0, shape.experts)
    stage = gemms.GATE_UP if projection == "gate_up" else gemms.DOWN
    outputs, inputs = gemms.sizes_of(shape, stage)
    weight = meta(shape.experts, outputs, inputs, dtype=torch.float8_e4m3fn)
    scale = meta(shape.experts, outputs // gemms.BLOCK, inputs // gemms.BLOCK, dtype=torch.float32)
    x = meta(tokens, gemms.HIDDEN_SIZE, dtype=torch.bfloat16)
    try:
        work = experts.list_work(x, routing, plan) if plan.lists else None
        if stage is gemms.GATE_UP:
            experts.gate_up(x, routing, work, weight, scale, plan)
        else:
            activated = meta(tokens * gemms.TOP_K, inputs, dtype=torch.bfloat16)
            experts.down(activated, routing, work, weight, scale, plan)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return None


class Compilation:
    """Every candidate of every shape, in the order in which they will be measured."""

    def __init__(self, shapes, counts, processes: int, dry_run: bool) -> None:
        self.pool = concurrent.futures.ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), initializer=start_compiler, initargs=(dry_run,)
        )
        self.jobs: dict[tuple, concurrent.futures.Future] = {}
        for shape, tokens in itertools.product(shapes, counts):
            for projection, found in candidates(tokens).items():
                for candidate in found:
                    key = self.key(shape, tokens, projection, candidate)
                    if key not in self.jobs:
                        self.jobs[key] = self.pool.submit(compile_one, shape, tokens, projection, candidate)

    @staticmethod
    def key(shape, tokens: int, projection: str, candidate: Candidate) -> tuple:
        return shape, max(16, tokens), projection, candidate  # counts of tokens share kernels where they are padded

    def failure(self, *job) -> str | None:
        return self.jobs[self.key(*job)].result()

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


# Measuring.


class Batch:
    """``LAYERS`` routings of some tokens over one rank's experts."""

    def __init__(self, problem: gemms.Problem, routing: str) -> None:
        self.problem, self.weights, tokens = problem, problem.weights, problem.tokens
        self.routings = problem.routings[:LAYERS]
        if routing == "same":
            eight = torch.arange(gemms.TOP_K, device="cuda", dtype=torch.int32) * (gemms.EXPERTS // gemms.TOP_K)
            ids = [(eight + layer).repeat(tokens, 1) for layer in range(LAYERS)]
            self.routings = [torch.where(one < problem.shape.experts, one, -1).to(torch.int32) for one in ids]
        self.x, self.topk_weights = problem.hidden, problem.topk_weights
        self.w13, self.w2 = ((self.weights.b[s], self.weights.scale[s]) for s in gemms.STAGES)
        self.local = self.routings[0].flatten() >= 0

        self.works: dict[tuple, Any] = {}

    def routing(self, ids):
        from sglang.srt.layers.minimax_experts import Routing

        return Routing(ids, self.topk_weights, 0, self.problem.shape.experts)

    def work(self, ids, plan):
        """The list for a routing, made once."""
        from sglang.srt.layers.minimax_experts import list_work

        if not plan.lists:
            return None
        key = ids.data_ptr(), plan.routes
        if key not in self.works:
            self.works[key] = list_work(self.x, self.routing(ids), plan)
        return self.works[key]

    def gate_up(self, ids, plan) -> torch.Tensor:
        from sglang.srt.layers import minimax_experts as experts

        return experts.gate_up(self.x, self.routing(ids), self.work(ids, plan), *self.w13, plan)

    def down(self, activated, ids, plan) -> torch.Tensor:
        from sglang.srt.layers import minimax_experts as experts

        return experts.down(activated, self.routing(ids), self.work(ids, plan), *self.w2, plan)

    def whole(self, ids, plan) -> torch.Tensor:
        from sglang.srt.layers import minimax_experts as experts

        return experts.run_plan(plan, self.x, self.topk_weights, ids, *self.w13, *self.w2, 0)

    def exact(self) -> dict[str, dict[bool, torch.Tensor]]:
        """Float64 of the first routing, by projection and by whether its inputs are quantised to FP8: silu(gate) * up
        of each route; the down projection of what that is in bfloat16, from unquantised activations."""
        ids = self.routings[0]
        x = {False: self.x.double(), True: quantised(self.x)}
        activated = {
            fp8: torch.zeros(ids.numel(), self.problem.shape.width, device="cuda", dtype=torch.float64) for fp8 in x
        }
        out = {fp8: torch.zeros(self.x.shape, device="cuda", dtype=torch.float64) for fp8 in x}
        for expert in ids[ids >= 0].unique().tolist():
            token, choice = (ids == expert).nonzero(as_tuple=True)
            route = token * ids.shape[1] + choice
            of_gate_up, of_down = (self.expert(stage, expert).T for stage in gemms.STAGES)
            for fp8 in x:
                gate, up = (x[fp8][token] @ of_gate_up).chunk(2, dim=-1)
                activated[fp8][route] = torch.nn.functional.silu(gate) * up
            inner = activated[False][route].bfloat16()
            for fp8 in x:
                part = (quantised(inner) if fp8 else inner.double()) @ of_down
                out[fp8].index_add_(0, token, part * self.topk_weights[token, choice, None].double())
        return {"gate_up": activated, "down": out}

    def expert(self, stage, index: int) -> torch.Tensor:
        scale = self.weights.scale[stage][index].double()
        return self.weights.b[stage][index].double() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)

    def time(self, layer, replays: int) -> float:
        """Median microseconds of ``layer``, a function of a routing."""
        layer(self.routings[0])
        torch.cuda.synchronize()
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            graph.capture_begin()
            for ids in self.routings:
                layer(ids)
            graph.capture_end()
        return statistics.median(graph_timing.replay_times(graph, len(self.routings), WARM_UP, replays))


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def quantised(x: torch.Tensor) -> torch.Tensor:
    """Float64 of what FP8 makes of x."""
    from sglang.srt.layers.minimax_fp8_linear import quantise_reference

    q, scale = quantise_reference(x)
    return q.double() * scale.double().repeat_interleave(128, -1)


def measure(batch: Batch, compilation: Compilation) -> dict:
    from sglang.srt.layers import minimax_experts as experts
    from sglang.srt.layers.moe.fused_moe_triton.fused_moe import outplace_fused_experts

    problem = batch.problem
    exact = batch.exact()
    activated = exact["gate_up"][False].bfloat16()
    served = experts.plan_for(problem.tokens, problem.shape.width)
    row: dict[str, Any] = {"served": served, "gate_up": [], "down": [], "whole": []}
    for projection, found in candidates(problem.tokens).items():
        for candidate in found:
            row[projection].append(one := {"candidate": candidate, "text": str(candidate)})
            one["failed"] = compilation.failure(problem.shape, problem.tokens, projection, candidate)
            if one["failed"]:
                continue
            plan = plan_of(candidate, candidate)
            if projection == "gate_up":
                layer = lambda ids, plan=plan: batch.gate_up(ids, plan)  # noqa: E731
            else:
                layer = lambda ids, plan=plan: batch.down(activated, ids, plan)  # noqa: E731
            try:
                for ids in batch.routings:
                    batch.work(ids, plan)  # not within a graph
                output, wanted = layer(batch.routings[0]), exact[projection][candidate.how.activations == "float8"]
                rows = batch.local if projection == "gate_up" else slice(None)
                one["error"] = relative(output[rows], wanted[rows])
                if not one["error"] < TOLERANCE:
                    one["failed"] = f"an error of {one['error']:.2e}"
                    continue
                one["us"] = batch.time(layer, QUICK)
            except Exception as error:  # too much shared memory, mostly
                one["failed"] = f"{type(error).__name__}: {error}"[:300]
    lists = next(one for one in candidates(problem.tokens)["gate_up"] if one.how.activations == "float8")
    plan = plan_of(lists, lists)
    row["list"] = batch.time(lambda ids: experts.list_work(batch.x, batch.routing(ids), plan), QUICK)
    timed = [[one for one in row[projection] if "us" in one] for projection in ("gate_up", "down")]
    pairs = []
    for gate_up, down in itertools.product(*timed):
        if plan := plan_of(gate_up["candidate"], down["candidate"]):
            pairs.append((gate_up["us"] + down["us"] + row["list"] * plan.lists, plan))
    plans = [plan for _, plan in sorted(pairs, key=lambda pair: pair[0])[:PAIRS]]
    for plan in dict.fromkeys([*plans, *([served] if served else [])]):
        ours = lambda ids, plan=plan: batch.whole(ids, plan)  # noqa: E731
        try:
            error = relative(ours(batch.routings[0]), exact["down"][False])
            row["whole"].append({"plan": plan, "error": error, "us": batch.time(ours, REPLAYS)})
        except Exception as error:
            row["whole"].append({"plan": plan, "failed": f"{type(error).__name__}: {error}"[:300]})

    def engine(ids):
        return problem.whole_of(outplace_fused_experts, ids)

    error = relative(engine(batch.routings[0]), exact["down"][False])
    row["engine"] = {"error": error, "us": batch.time(engine, REPLAYS)}
    return row


def sum_as_served() -> None:
    """The engine's sum for few tokens in its kernel, as ``sglang_minimax.expert_sum`` has it in a server."""
    from sglang.srt.layers.moe.fused_moe_triton import fused_moe

    fused_moe.moe_sum_reduce_torch_compile = fused_moe.moe_sum_reduce


def text(plan) -> str:
    return " ".join(str(Candidate(plan.routes, how)) for how in (plan.gate_up, plan.down))


def print_rows(results: dict) -> None:
    print(
        "microseconds a layer; a projection is activations/routes (but for float32)/columns/warps/stages/CTAs of an SM"
    )
    print(f"{'shape':>9} {'tokens':>6} {'routing':>8} {'engine':>7} {'best':>7} {'ratio':>5} {'served':>7} errors")
    for key, row in results.items():
        shape, tokens, routing = key.split()
        timed = [one for one in row["whole"] if "us" in one]
        if not timed:
            print(f"{shape:>9} {tokens:>6} {routing:>8} {row['engine']['us']:7.1f}, and nothing of ours ran")
            continue
        best = min(timed, key=lambda one: one["us"])
        served = next((one["us"] for one in timed if one["plan"] == row["served"]), float("nan"))
        print(
            f"{shape:>9} {tokens:>6} {routing:>8} {row['engine']['us']:7.1f} {best['us']:7.1f} "
            f"{row['engine']['us'] / best['us']:5.2f} {served:7.1f} {row['engine']['error']:.4f} {best['error']:.4f}  "
            f"{text(best['plan'])}"
        )


def print_candidates(key: str, row: dict) -> None:
    print(key)
    for projection in ("gate_up", "down"):
        timed = sorted((one for one in row[projection] if "us" in one), key=lambda one: one["us"])
        print(f"  {projection}: " + ", ".join(f"{one['text']} {one['us']:.2f}" for one in timed))
        for one in row[projection]:
            if one.get("failed"):
                print(f"    {one['text']} left out: {one['failed'][:120]}")
    print(f"  list: {row['list']:.2f}")
    print("  whole: " + ", ".join(f"{text(one['plan'])} {one.get('us', float('nan')):.2f}" for one in row["whole"]))
    for one in row["whole"]:
        if "failed" in one:
            print(f"    {text(one['plan'])} left out: {one['failed'][:120]}")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="where to write all numbers")
    parser.add_argument("--shapes", type=gemms.Shape.parse, nargs="+", default=[*map(gemms.Shape.parse, SHAPES)])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=ROUTINGS)
    parser.add_argument("--time-limit", type=float, default=100, help="seconds, after which no other batch is begun")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that compile")
    parser.add_argument("--dry-run", action="store_true", help="compile for sm90 without a GPU")
    options = parser.parse_args()
    deadline = time.monotonic() + options.time_limit
    from sglang_minimax import overlay

    overlay.install()
    compilation = Compilation(options.shapes, options.tokens, options.processes, options.dry_run)
    if options.dry_run:
        failures = {job: failure for job, done in compilation.jobs.items() if (failure := done.result())}
        for (shape, tokens, projection, candidate), failure in failures.items():
            print(f"{shape} {tokens} {projection} {candidate}: {failure}")
        print(f"{len(failures)} of {len(compilation.jobs)} do not compile")
        compilation.close()
        return
    kernels = gemms.engine()
    sum_as_served()
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "us_a_layer": {}}
    rows = results["us_a_layer"]
    torch.manual_seed(0)
    with torch.inference_mode():
        for shape in options.shapes:
            if time.monotonic() > deadline:
                break
            weights = gemms.Weights(shape)
            print(f"{shape}: {deadline - time.monotonic():.0f} s left", flush=True)
            for routing, tokens in itertools.product(options.routings, options.tokens):
                if time.monotonic() > deadline:
                    print(f"the time limit came before {shape} {tokens} {routing}")
                    break
                key = f"{shape} {tokens} {routing}"
                rows[key] = measure(Batch(gemms.Problem(kernels, weights, tokens), routing), compilation)
                print_candidates(key, rows[key])
                if options.json:
                    with open(options.json, "w", encoding="utf-8") as stream:
                        json.dump(results, stream, indent=1)
            del weights
            torch.cuda.empty_cache()
    compilation.close()
    print_rows(rows)


if __name__ == "__main__":
    main()
