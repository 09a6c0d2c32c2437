#!/usr/bin/env python3
"""Times the experts of MiniMax-M2 for few tokens, from hidden states to their sum: the engine's way and ours, by plan.

    python benchmark/experts.py --json out.json [--shapes 256:384] [--tokens 16 1] [--time-limit 240]
    python benchmark/experts.py --dry-run          # no GPU: compiles for sm90, times nothing

A shape is local experts : a rank's part of an expert's width, as in tune_experts.py. Two routings: ``uniform``, each
token's experts at random among 256; and ``same``, where all tokens take the same eight, as with dummy weights. With
fewer than 256 local experts the others are those of other ranks.

Protocol: a CUDA graph of 16 layers, each with a routing of its own, so that a layer's experts are not in the L2 cache;
each replay between two events; the time of a layer is a replay's time / 16, and the median is reported, in
microseconds. First each candidate of each projection over 15 replays, ours alone: gate and up with the SiLU; down with
the sum. Then the four best pairs, the served plan and the engine over 100 replays. The engine runs as a MiniMax-M2
server has it: with this repository's tables where there is one, and its own kernel for the sum.

What a candidate computes is compared with float64 before it is timed, and left out if it is wrong. The error is the
norm of the difference from float64 on the same FP8 weights, relative; the engine's has the rounding of its activations
to FP8 in it.
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
from typing import Any

import graph_timing
import torch
import tune_experts as tuner

SHAPES, TOKENS, ROUTINGS = ["256:384", "256:768", "256:1536", "64:1536"], [16, 1, 64, 4, 8, 32, 2], ["uniform", "same"]
LAYERS, WARM_UP, QUICK, REPLAYS, PAIRS = 16, 5, 15, 100, 4
TOLERANCE = {"bfloat16": 0.004, "float16": 0.004, "float8": 0.06}  # of one projection's error


def candidates(tokens: int) -> dict[str, list]:
    """Plans worth timing, by projection, the likeliest first."""
    from sglang.srt.layers.minimax_experts import Projection

    few = 16 if tokens <= 32 else 32
    gate_up = [
        *(Projection(16, kind, False, 32, 4, stages) for kind in ("float16", "bfloat16") for stages in (4, 6)),
        *(Projection(16, "float16", False, 16, 4, stages) for stages in (4, 8)),
        Projection(16, "float16", False, 64, 4, 4), Projection(16, "float16", False, 64, 8, 4),
        Projection(16, "float16", False, 32, 8, 5), Projection(16, "float8", False, 32, 4, 5),
        *(Projection(16, "float8", True, columns, 4, stages) for columns, stages in ((32, 4), (32, 6), (64, 4))),
        Projection(16, "float16", True, 32, 4, 5), Projection(16, "bfloat16", True, 32, 4, 5),
        *([Projection(few, "float16", False, 32, 4, 4)] if few > 16 else []),
    ]  # fmt: skip
    down = [
        *(Projection(16, kind, False, columns, 4, 4) for kind in ("float16", "bfloat16") for columns in (64, 32)),
        Projection(16, "float16", False, 128, 4, 3), Projection(16, "float16", False, 128, 8, 3),
        *(Projection(16, "float8", True, columns, 4, 4) for columns in (64, 128)),
        Projection(16, "float16", True, 64, 4, 4),
    ]  # fmt: skip
    by_token = [Projection(1, "bfloat16", False, columns, warps, 1) for columns, warps in ((16, 4), (8, 2), (32, 8))]
    return {"gate_up": gate_up, "down": by_token + down if tokens <= 8 else down}


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
        tuner.engine_pretending_sm90()
    from sglang.srt.layers import minimax_experts as experts

    for name in ("_gate_up_kernel", "_down_kernel", "_down_by_token_kernel", "_sum_kernel"):
        setattr(experts, name, Compiled(getattr(experts, name)))
    experts._has_programmatic_launch = lambda device: True


def compile_one(shape: tuner.Shape, tokens: int, projection: str, plan) -> str | None:
    """A failure's text, or None."""
    from sglang.srt.layers import minimax_experts as experts

    def meta(*size, dtype):
        return torch.empty(size, device="meta", dtype=dtype)

    routes = tokens, tuner.TOP_K
    ids, weights = meta(*routes, dtype=torch.int32), meta(*routes, dtype=torch.float32)
    stage = tuner.GATE_UP if projection == "gate_up" else tuner.DOWN
    outputs, inputs = tuner.sizes_of(shape, stage)
    weight = meta(shape.experts, outputs, inputs, dtype=torch.float8_e4m3fn)
    scale = meta(shape.experts, outputs // tuner.BLOCK, inputs // tuner.BLOCK, dtype=torch.float32)
    x = meta(tokens if stage is tuner.GATE_UP else tokens * tuner.TOP_K, inputs, dtype=torch.bfloat16)
    try:
        if stage is tuner.GATE_UP:
            experts.gate_up(x, ids, weight, scale, 0, plan)
        else:
            experts.down(x, weights, ids, weight, scale, 0, plan)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return None


def compile_all(shapes, counts, processes: int, dry_run: bool) -> dict:
    """Failures' texts, by (shape, tokens, projection, plan)."""
    jobs = {}
    with concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=start_compiler, initargs=(dry_run,)
    ) as pool:
        compiled = {}
        for shape, tokens in itertools.product(shapes, counts):
            for projection, plans in candidates(tokens).items():
                for plan in plans:
                    # Counts of tokens share a kernel where they are padded to the same.
                    key = shape.width, max(16, tokens), projection, plan
                    if key not in compiled:
                        compiled[key] = pool.submit(compile_one, shape, tokens, projection, plan)
                    jobs[shape, tokens, projection, plan] = compiled[key]
    return {job: future.result() for job, future in jobs.items() if future.result()}


# Measuring.


class Batch:
    """``LAYERS`` routings of some tokens over one rank's experts."""

    def __init__(self, problem: tuner.Problem, routing: str) -> None:
        self.problem, self.weights, tokens = problem, problem.weights, problem.tokens
        self.routings = problem.routings[:LAYERS]
        if routing == "same":
            eight = torch.arange(tuner.TOP_K, device="cuda", dtype=torch.int32) * (tuner.EXPERTS // tuner.TOP_K)
            ids = [(eight + layer).repeat(tokens, 1) for layer in range(LAYERS)]
            self.routings = [torch.where(one < problem.shape.experts, one, -1).to(torch.int32) for one in ids]
        self.x, self.topk_weights = problem.hidden, problem.topk_weights
        self.w13, self.w2 = ((self.weights.b[s], self.weights.scale[s]) for s in tuner.STAGES)
        self.local = self.routings[0].flatten() >= 0

    def gate_up(self, ids, plan) -> torch.Tensor:
        from sglang.srt.layers import minimax_experts as experts

        return experts.gate_up(self.x, ids, *self.w13, 0, plan)

    def down(self, activated, ids, plan) -> torch.Tensor:
        from sglang.srt.layers import minimax_experts as experts

        return experts.down(activated, self.topk_weights, ids, *self.w2, 0, plan)

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Float64 of the first routing: silu(gate) * up of each route; the down projection of its bfloat16."""
        ids = self.routings[0]
        activated = torch.zeros(ids.numel(), self.problem.shape.width, device="cuda", dtype=torch.float64)
        out = torch.zeros(self.x.shape, device="cuda", dtype=torch.float64)
        for expert in ids[ids >= 0].unique().tolist():
            token, choice = (ids == expert).nonzero(as_tuple=True)
            route = token * ids.shape[1] + choice
            gate, up = (self.x[token].double() @ self.expert(tuner.GATE_UP, expert).T).chunk(2, dim=-1)
            activated[route] = torch.nn.functional.silu(gate) * up
            part = activated[route].bfloat16().double() @ self.expert(tuner.DOWN, expert).T
            out.index_add_(0, token, part * self.topk_weights[token, choice, None].double())
        return activated, out

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


def measure(batch: Batch, failures: dict) -> dict:
    from sglang.srt.layers import minimax_experts as experts
    from sglang.srt.layers.moe.fused_moe_triton.fused_moe import outplace_fused_experts

    problem = batch.problem
    exact_activated, exact_out = batch.exact()
    activated = exact_activated.bfloat16()
    row: dict[str, Any] = {"served": experts.plan_for(problem.tokens), "gate_up": [], "down": [], "whole": []}
    for projection, plans in candidates(problem.tokens).items():
        for plan in plans:
            row[projection].append(one := {"plan": plan})
            one["failed"] = failures.get((problem.shape, problem.tokens, projection, plan))
            if one["failed"]:
                continue
            try:
                if projection == "gate_up":
                    found, wanted = batch.gate_up(batch.routings[0], plan)[batch.local], exact_activated[batch.local]
                    layer = lambda ids, plan=plan: batch.gate_up(ids, plan)  # noqa: E731
                else:
                    found, wanted = batch.down(activated, batch.routings[0], plan), exact_out
                    layer = lambda ids, plan=plan: batch.down(activated, ids, plan)  # noqa: E731
                one["error"] = relative(found, wanted)
                if not one["error"] < TOLERANCE["bfloat16" if plan.routes == 1 else plan.activations]:
                    one["failed"] = f"an error of {one['error']:.2e}"
                    continue
                one["us"] = batch.time(layer, QUICK)
            except Exception as error:  # too much shared memory, mostly
                one["failed"] = f"{type(error).__name__}: {error}"[:300]
    timed = [sorted((one for one in row[p] if "us" in one), key=lambda one: one["us"]) for p in ("gate_up", "down")]
    pairs = sorted(itertools.product(*(t[:PAIRS] for t in timed)), key=lambda pair: sum(one["us"] for one in pair))
    plans = [experts.Plan(*(one["plan"] for one in pair)) for pair in pairs[:PAIRS]]
    for plan in dict.fromkeys([*plans, row["served"]]):

        def ours(ids, plan=plan):
            return batch.down(batch.gate_up(ids, plan.gate_up), ids, plan.down)

        try:
            error = relative(ours(batch.routings[0]), exact_out)
            row["whole"].append({"plan": plan, "error": error, "us": batch.time(ours, REPLAYS)})
        except Exception as error:
            row["whole"].append({"plan": plan, "failed": f"{type(error).__name__}: {error}"[:300]})

    def engine(ids):
        return problem.whole_of(outplace_fused_experts, ids)

    row["engine"] = {"error": relative(engine(batch.routings[0]), exact_out), "us": batch.time(engine, REPLAYS)}
    return row


def sum_as_served() -> None:
    """The engine's sum for few tokens in its kernel, as ``sglang_minimax.expert_sum`` has it in a server."""
    from sglang.srt.layers.moe.fused_moe_triton import fused_moe

    fused_moe.moe_sum_reduce_torch_compile = fused_moe.moe_sum_reduce


def text(plan) -> str:
    return "/".join(str(int(value) if isinstance(value, bool) else value) for value in plan)


def print_rows(results: dict) -> None:
    print("microseconds a layer; a projection is routes/activations/weights first/columns/warps/stages")
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
            f"{text(best['plan'].gate_up)} {text(best['plan'].down)}"
        )


def print_candidates(key: str, row: dict) -> None:
    print(key)
    for projection in ("gate_up", "down"):
        timed = sorted((one for one in row[projection] if "us" in one), key=lambda one: one["us"])
        print(f"  {projection}: " + ", ".join(f"{text(one['plan'])} {one['us']:.2f}" for one in timed[:6]))
        for one in row[projection]:
            if one.get("failed"):
                print(f"    {text(one['plan'])} left out: {one['failed'][:120]}")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="where to write all numbers")
    parser.add_argument("--shapes", type=tuner.Shape.parse, nargs="+", default=[*map(tuner.Shape.parse, SHAPES)])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=ROUTINGS)
    parser.add_argument("--time-limit", type=float, default=240, help="seconds, after which no other batch is begun")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that compile")
    parser.add_argument("--dry-run", action="store_true", help="compile for sm90 without a GPU")
    options = parser.parse_args()
    deadline = time.monotonic() + options.time_limit
    from sglang_minimax import overlay

    overlay.install()
    if options.dry_run:
        failures = compile_all(options.shapes, options.tokens, options.processes, True)
        for (shape, tokens, projection, plan), failure in failures.items():
            print(f"{shape} {tokens} {projection} {text(plan)}: {failure}")
        print(f"{len(failures)} do not compile")
        return
    kernels = tuner.engine()
    sum_as_served()
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "us_a_layer": {}}
    rows = results["us_a_layer"]
    torch.manual_seed(0)
    with torch.inference_mode():
        for shape in options.shapes:
            if time.monotonic() > deadline:
                break
            failures = compile_all([shape], options.tokens, options.processes, False)
            print(f"{shape}: compiled, {deadline - time.monotonic():.0f} s left", flush=True)
            weights = tuner.Weights(shape)
            for tokens, routing in itertools.product(options.tokens, options.routings):
                if time.monotonic() > deadline:
                    print(f"the time limit came before {shape} {tokens} {routing}")
                    break
                key = f"{shape} {tokens} {routing}"
                rows[key] = measure(Batch(tuner.Problem(kernels, weights, tokens), routing), failures)
                print_candidates(key, rows[key])
                if options.json:
                    with open(options.json, "w", encoding="utf-8") as stream:
                        json.dump(results, stream, indent=1)
            del weights
            torch.cuda.empty_cache()
    print_rows(rows)


if __name__ == "__main__":
    main()
