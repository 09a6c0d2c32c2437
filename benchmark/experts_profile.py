#!/usr/bin/env python3
"""Profiles the kernels of one layer's experts as a decode step of a server runs them, and says what each takes.

    python benchmark/experts_profile.py --json out.json

The call is the engine's own ``inplace_fused_experts`` on FP8 experts of TP4 (256 experts, width 384, hidden size 3072)
with its default configuration; each order of batch sizes runs in a process of its own, with an empty torch.compile
cache, because what torch.compile makes of the sum over experts depends on which shapes came first:
    server      64, 16, 1, as a server captures its graphs (--cuda-graph-bs 1 16 64)
    all         64 to 1, as a server does that captures all sizes
    ascending   1 to 64
Reported: means over the replays of a CUDA graph of 8 layers, from torch.profiler, in microseconds a layer; and which
configurations torch.compile had to choose from, and which it chose.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import os
import subprocess
import sys
import tempfile

ORDERS = {
    "server": [64, 16, 1],
    "all": [64, 56, 48, 40, 32, 24, 16, 12, 8, 4, 2, 1],
    "ascending": [1, 2, 4, 8, 12, 16, 24, 32, 64],
}
LAYERS, REPLAYS = 8, 20


def compiled_sums() -> list[dict]:
    """What torch.compile generated for the sum over experts in this process."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    found = []
    for one in gc.get_objects():
        # By the object's type: isinstance would ask weak proxies, whose objects may be gone, for their class.
        if issubclass(type(one), CachingAutotuner):
            chosen = [str(launcher.config) for launcher in getattr(one, "launchers", [])]
            meta = {key: str(one.inductor_meta.get(key)) for key in ("kernel_name", "reduction_hint")}
            offered = [str(config) for config in (getattr(one, "configs", None) or [])]
            found.append({**meta, "size_hints": str(one.size_hints), "offered": offered, "chosen": chosen})
    return found


def profile(order: list[int]) -> dict:
    import expert_gemms as gemms
    import torch
    from torch.profiler import ProfilerActivity

    kernels = gemms.engine()
    gemms.use_tables(None)
    from sglang.srt.layers.moe.fused_moe_triton.fused_moe import inplace_fused_experts

    torch.manual_seed(0)
    rows: dict = {}
    with torch.inference_mode():
        weights = gemms.Weights(gemms.Shape(256, 384))
        for tokens in order:
            problem = gemms.Problem(kernels, weights, tokens)
            problem.routings = problem.routings[:LAYERS]
            buffer = problem.hidden.clone()

            def run(problem=problem, buffer=buffer):
                for ids in problem.routings:
                    buffer.copy_(problem.hidden)
                    problem.hidden, kept = buffer, problem.hidden
                    problem.whole_of(inplace_fused_experts, ids)
                    problem.hidden = kept

            graph = problem.graph(run)
            microseconds = problem.time(graph, REPLAYS)
            with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
                for _ in range(REPLAYS):
                    graph.replay()
                torch.cuda.synchronize()
            total: collections.Counter = collections.Counter()
            for event in profiler.events():
                if event.device_type == torch.autograd.DeviceType.CUDA:
                    total[event.name[:70]] += event.device_time
            kernel_times = {name: spent / REPLAYS / len(problem.routings) for name, spent in total.most_common()}
            rows[tokens] = {"graph": microseconds, "kernels": kernel_times}
    return {"rows": rows, "compiled": compiled_sums()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="where to write all numbers")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--order", choices=ORDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.order:
        print("\n" + json.dumps(profile(ORDERS[options.order])))
        return
    results = {}
    for order in options.orders:
        with tempfile.TemporaryDirectory() as cache:
            done = subprocess.run(
                [sys.executable, __file__, "--order", order],
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
                capture_output=True,
                text=True,
            )
        if done.returncode:
            print(f"{order} failed: {done.stderr[-1500:]}")
            continue
        results[order] = result = json.loads(done.stdout.splitlines()[-1])
        print(f"\n{order}: batch sizes {ORDERS[order]}, us a layer")
        for tokens, row in result["rows"].items():
            if tokens in ("1", "16", "32", "64"):
                print(f"  {tokens} tokens: {row['graph']:.1f} in all")
                for name, spent in list(row["kernels"].items())[:9]:
                    print(f"    {spent:7.2f}  {name}")
        for one in result["compiled"]:
            print(f"  {one['kernel_name']} {one['size_hints']} {one['reduction_hint']}: chose {one['chosen']}")
            print(f"    of {one['offered']}")
        sys.stdout.flush()
    if options.json:
        with open(options.json, "w", encoding="utf-8") as stream:
            json.dump(results, stream, indent=1)


if __name__ == "__main__":
    main()
