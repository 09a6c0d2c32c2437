#!/usr/bin/env python3
"""Times FP8 linear layers (blocks of 128 x 128) at the sizes of MiniMax-M2's attention: the engine's, and ours by plan.

    python benchmark/fp8_linear.py --json out.json [--backends cutlass triton] [--ranks 4]
    python benchmark/fp8_linear.py --plans --json out.json [--time-limit 120] [--ranks 4 2] [--tokens 1 16 64]

A backend is a value of the engine's --fp8-gemm-backend, and what is timed is the engine's function behind it: the
activations' quantisation and the GEMM. ``quantise`` is the quantisation alone, as that backend does it. Each backend
runs in a process of its own, since some compile, or are not there. Protocol: a CUDA graph of 24 layers, each with its
own weights; 10 replays to warm up, then 60, each between two events. Reported: the median, in microseconds a layer; and
the relative error of the norm against the same FP8 values in float64. A backend that runs out of its time keeps what it
had by then.

``--plans`` times the backends of ``--stock`` and all plans of ``minimax_fp8_linear.py`` worth it in one process, and
other processes compile ahead of it. The graph has a copy of the activations before each layer: no kernel before ours
lets it start early, as none does in a model, and its weights are not read while another layer computes. The copy's own
time, of a graph of copies, is subtracted. 24 layers or 160 MB of weights, whichever is more, since the L2 cache holds
50; 10 replays to warm up, then 20, and 100 for stock, for the 8 best plans and for the one that a server has. A plan is
timed if its output has the bits of a second run and is as near to float64 of the same FP8 values as bfloat16 allows.
Written: stock, the plan that a server has, and the 3 best of each kind (``kind_of``); a plan is named by its fields.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time

import graph_timing
from compilers import compilers

HIDDEN_SIZE, HEADS, KV_HEADS, HEAD_DIM, BLOCK = 3072, 48, 8, 128, 128
TOKENS, LAYERS, WARM_UP, REPLAYS = [1, 4, 16, 32, 64, 128, 256, 1024], 24, 10, 60
PLAN_RANKS, PLAN_TOKENS, L2_BYTES = [4, 2, 8, 1, 16], [1, 16, 64, 8, 32, 4, 2, 128], 160_000_000
QUICK, LONG, LONG_PLANS, KEPT = 20, 100, 8, 3  # replays for every plan, and once more for the best of them
ALLOWED_ERROR = 2.5e-3  # relative, of the norm: rounding to bfloat16 makes 1.7e-3
ROW = "row: "
# The engine's name of the function behind a backend, and how that one lays the activations' scales out.
BACKENDS = {
    "cutlass": ("cutlass_w8a8_block_fp8_linear_with_fallback", {"column_major_scales": True}),
    "triton": ("triton_w8a8_block_fp8_linear", {}),
    "deep_gemm": (
        "deepgemm_w8a8_block_fp8_linear_with_fallback",
        {"column_major_scales": True, "scale_tma_aligned": True},
    ),
    "flashinfer_deepgemm": ("flashinfer_deepgemm_w8a8_block_fp8_linear_with_fallback", None),
}


def shapes(ranks: int) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a rank's projections, by attention TP."""
    kv_heads = max(1, KV_HEADS // ranks)
    query = HEADS // ranks * HEAD_DIM
    return {"qkv": (query + 2 * kv_heads * HEAD_DIM, HIDDEN_SIZE), "o": (HIDDEN_SIZE, query)}


def graph_time(function, arguments: list, replays: int = REPLAYS) -> float:
    return graph_timing.graph_time(function, arguments, WARM_UP, replays)


def measure(backend: str, ranks: list[int], token_counts: list[int]) -> None:
    """Prints a row of JSON for each projection and number of tokens, as it comes."""
    import expert_gemms as gemms
    import torch

    gemms.engine()
    from sglang.srt.layers.quantization import fp8_kernel, fp8_utils

    name, scales = BACKENDS[backend]
    linear, quantise = getattr(fp8_utils, name), fp8_kernel.sglang_per_token_group_quant_fp8
    torch.manual_seed(0)
    with torch.inference_mode():
        for rank_count in ranks:
            for projection, (outputs, inputs) in shapes(rank_count).items():
                weights = []
                for _ in range(LAYERS):
                    weight = torch.randn(outputs, inputs, device="cuda").to(torch.float8_e4m3fn)
                    scale = (0.5 + torch.rand(outputs // BLOCK, inputs // BLOCK, device="cuda")) * inputs**-0.5
                    weights.append((weight, scale))
                for tokens in token_counts:
                    x = torch.randn(tokens, inputs, device="cuda").bfloat16()
                    arguments = [(x, weight, [BLOCK, BLOCK], scale) for weight, scale in weights]
                    error = relative_error(linear(*arguments[0]), *quantise(x, BLOCK), *weights[0])
                    row = {"us": graph_time(linear, arguments), "error": error}
                    if scales is not None:
                        row["quantise"] = graph_time(lambda x, s=scales: quantise(x, BLOCK, **s), [(x,)] * LAYERS)
                    print(ROW + json.dumps({f"TP{rank_count} {projection} {tokens}": row}), flush=True)


def candidates(tokens: int, inputs: int, outputs: int) -> list:
    """Plans worth timing, with about as many CTAs as the GPU has multiprocessors, or up to three times as many."""
    from sglang.srt.layers.minimax_fp8_linear import Plan, plan_for

    groups, splits_tried = inputs // BLOCK, (1, 2, 3, 4, 6, 8, 12)
    found = [plan for plan in [plan_for(tokens, inputs, outputs)] if plan is not None]

    def add(plan: Plan) -> None:
        tiles = -(-outputs // plan.block_n)
        ctas = tiles * plan.splits * -(-tokens // plan.block_tokens)
        fewest = min(90, tiles * max(1, groups // 2))
        if plan not in found and fewest <= ctas <= max(400, tiles) and plan.splits <= groups:
            found.append(plan)

    rows = next(rows for rows in (16, 32, 64, 128) if tokens <= rows)
    for block_n, warps in ((64, 4), (128, 8)):  # the weights are the 64 rows of wgmma
        for splits in splits_tried:
            steps = -(-groups // splits)
            if steps <= 6 and rows * steps <= 192:
                add(Plan(rows, block_n, splits, warps))
            if steps > 2 and rows <= 64:
                add(Plan(rows, block_n, splits, warps, stages=min(steps, 6 if rows <= 32 else 4)))
    if rows >= 64:  # tokens are
        for block_n, warps in ((32, 4), (64, 4), (128, 8)):
            for splits in splits_tried[1:]:
                add(Plan(64, block_n, splits, warps, stages=3, swap=False))
    return found


def name_of(plan) -> str:
    return "/".join(map(str, plan))


def kind_of(plan) -> str:
    """What is the rows of the tensor cores' product, and for weights whether all are loaded before the activations."""
    return ("weights, pipelined" if plan.stages else "weights, all ahead") if plan.swap else "tokens"


def compile_plan(plan, inputs: int, outputs: int) -> None:
    """Into Triton's cache on disk; a plan that fails here fails again, and is reported, when it is timed."""
    import torch
    from sglang.srt.layers import minimax_fp8_linear as fp8

    def meta(*size: int, dtype=torch.float32):
        return torch.empty(size, device="meta", dtype=dtype)

    x, weight = meta(16, inputs, dtype=torch.bfloat16), meta(outputs, inputs, dtype=torch.float8_e4m3fn)
    parts, groups = meta(16, outputs, dtype=torch.float32 if plan.splits > 1 else torch.bfloat16), inputs // BLOCK
    with contextlib.suppress(Exception):
        fp8._fp8_linear_kernel.warmup(
            x, weight, meta(-(-outputs // BLOCK), groups), parts, 16, inputs, outputs, groups, plan.block_tokens,
            plan.block_n, plan.splits, plan.steps(groups), plan.swap, plan.stages == 0, True,
            num_warps=plan.warps, num_stages=max(plan.stages, 1), launch_pdl=True, grid=(1,),
        )  # fmt: skip


def cases(ranks: list[int], tokens: list[int]) -> list[tuple[int, str, int]]:
    """(attention TP, projection, tokens), the most important first: TP4 at 1, 16 and 64 tokens, then other layouts at
    these, then other counts."""
    every = [(rank, name, count) for rank in ranks for count in tokens for name in shapes(rank)]
    return sorted(every, key=lambda case: (case[2] not in (1, 16, 64), case[0] != 4))


def measure_plans(options: argparse.Namespace) -> None:
    """Times stock and plans case by case, until the time is up, and writes what there is after each."""
    import expert_gemms as gemms
    import torch
    import triton

    from sglang_minimax import overlay

    deadline = time.monotonic() + options.time_limit
    overlay.install()
    gemms.engine()
    todo = cases(options.ranks or PLAN_RANKS, options.tokens or PLAN_TOKENS)
    workers = compilers()
    compiling: dict = {}
    for rank, name, tokens in todo:
        outputs, inputs = shapes(rank)[name]
        for plan in candidates(tokens, inputs, outputs):
            if (plan, inputs, outputs) not in compiling:
                compiling[plan, inputs, outputs] = workers.submit(compile_plan, plan, inputs, outputs)
    print(f"{len(todo)} cases, {len(compiling)} plans of a shape to compile", flush=True)
    results: dict = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    results["us_a_layer"] = rows = {}
    weights: dict = {}
    torch.manual_seed(0)
    with torch.inference_mode():
        for rank, name, tokens in todo:
            shape = outputs, inputs = shapes(rank)[name]
            if time.monotonic() > deadline:
                print(f"no time left for TP{rank} {name} at {tokens} tokens and what comes after", flush=True)
                break
            if shape not in weights:
                weights.clear()
                weights |= {size: random_weights(*size) for size in shapes(rank).values()}
            plans = candidates(tokens, inputs, outputs)
            row = measure_case(tokens, weights[shape], plans, compiling, options.stock, deadline)
            rows[f"TP{rank} {name} {tokens}"] = row
            print_case(f"TP{rank} {name} {tokens}", row)
            if options.json:
                write(options.json, results)
    workers.shutdown(wait=False, cancel_futures=True)
    print("\nthe best of each case")
    for key, row in rows.items():
        print_case(key, row)
    sys.stdout.flush()
    os._exit(0)  # a worker that still compiles is not waited for


def random_weights(outputs: int, inputs: int) -> list:
    import torch

    made = []
    for _ in range(max(LAYERS, -(-L2_BYTES // (outputs * inputs)))):
        weight = torch.randn(outputs, inputs, device="cuda").to(torch.float8_e4m3fn)
        scale = (0.5 + torch.rand(-(-outputs // BLOCK), inputs // BLOCK, device="cuda")) * inputs**-0.5
        made.append((weight, scale))
    return made


def relative_error(out, q, row_scale, weight, weight_scale) -> float:
    """Of the norm, against float64 of the same FP8 values."""
    wide = weight_scale.double().repeat_interleave(BLOCK, 0)[: len(weight)].repeat_interleave(BLOCK, 1)
    exact = (q.double() * row_scale.double().repeat_interleave(BLOCK, 1)) @ (weight.double() * wide).T
    return float((out.double() - exact).norm() / exact.norm())


def measure_case(tokens: int, weights: list, plans: list, compiling: dict, stock: list[str], deadline: float) -> dict:
    import torch
    from sglang.srt.layers import minimax_fp8_linear as fp8
    from sglang.srt.layers.quantization import fp8_kernel, fp8_utils

    outputs, inputs = weights[0][0].shape
    source = torch.randn(tokens, inputs, device="cuda").bfloat16()
    x = torch.empty_like(source)
    x.copy_(source)
    copies = graph_time(lambda *_: x.copy_(source), weights, LONG)

    def time_of(function, replays: int) -> float:
        def copy_and_multiply(weight, scale):
            x.copy_(source)
            function(weight, scale)

        return round(graph_time(copy_and_multiply, weights, replays) - copies, 2)

    row: dict = {"copy": round(copies, 2)}
    for backend in stock:
        linear = getattr(fp8_utils, BACKENDS[backend][0])
        try:
            out = linear(x, weights[0][0], [BLOCK, BLOCK], weights[0][1])
            # The engine rounds to FP8 its own way: a value between two may go to the other.
            error = relative_error(out, *fp8_kernel.sglang_per_token_group_quant_fp8(x, BLOCK), *weights[0])
            us = time_of(lambda w, s, linear=linear: linear(x, w, [BLOCK, BLOCK], s), LONG)
            row[backend] = {"us": us, "error": float(f"{error:.1e}")}
        except Exception as reason:  # a backend that this host does not have
            row[backend] = {"failed": f"{type(reason).__name__}: {reason}"[:200]}
    served, failed, times, errors = fp8.plan_for(tokens, inputs, outputs), [], {}, {}
    for plan in plans:
        if time.monotonic() > deadline:
            row["cut off"] = True
            break
        try:
            compiling[plan, inputs, outputs].result(timeout=max(1.0, deadline - time.monotonic()))
            torch.cuda.synchronize()
            out, again = (fp8.fp8_linear(x, *weights[0], plan) for _ in range(2))
            errors[plan] = relative_error(out, *fp8.quantise_reference(x), *weights[0])
            assert errors[plan] < ALLOWED_ERROR, f"wrong by {errors[plan]:.1e}"
            assert torch.equal(out, again), "other bits in a second run"
            times[plan] = time_of(lambda w, s, plan=plan: fp8.fp8_linear(x, w, s, plan), QUICK)
        except Exception as reason:  # too much shared memory, a shape that the compiler does not take
            failed.append(f"{name_of(plan)}: {type(reason).__name__}: {reason}"[:200])
    for plan in {*sorted(times, key=times.__getitem__)[:LONG_PLANS], *({served} & times.keys())}:
        times[plan] = time_of(lambda w, s, plan=plan: fp8.fp8_linear(x, w, s, plan), LONG)
    if served in times:
        row["served"] = {"plan": name_of(served), "us": times[served], "error": float(f"{errors[served]:.1e}")}
    row |= {"tried": len(times) + len(failed), "failed": failed, "best": {}}
    for plan in sorted(times, key=times.__getitem__):
        of_kind = row["best"].setdefault(kind_of(plan), {})
        if len(of_kind) < KEPT:
            of_kind[name_of(plan)] = times[plan]
    return row


def write(path: str, results: dict) -> None:
    """As JSON, a line a case."""
    head = json.dumps({key: value for key, value in results.items() if key != "us_a_layer"})
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in results["us_a_layer"].items())
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(f'{head[:-1]}, "us_a_layer": {{\n{lines}\n}}}}\n')


def print_case(name: str, row: dict) -> None:
    stock = [f"{key} {one.get('us', 'failed')}" for key, one in row.items() if key in BACKENDS]
    served = "served {plan} {us}, error {error:.1e}".format(**row["served"]) if "served" in row else "none served"
    best = [f"{kind}: {plan} {us}" for kind, of_kind in row["best"].items() for plan, us in list(of_kind.items())[:1]]
    print(f"{name:<12} {', '.join(stock)}; {served}; of {row['tried']}: {'; '.join(best)}", flush=True)
    if row["failed"]:
        print(f"    {len(row['failed'])} failed: {row['failed'][0][:110]}", flush=True)


def rows_of(output: bytes | str | None) -> dict[str, dict]:
    """What :func:`measure` had printed, up to its end or to that of its time."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    rows: dict[str, dict] = {}
    for line in text.splitlines(keepends=True):
        if line.startswith(ROW) and line.endswith("\n"):
            rows |= json.loads(line.removeprefix(ROW))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="where to write all numbers")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--ranks", type=int, nargs="+", help="attention TP: 4 2, or with --plans 4 2 8 1 16")
    parser.add_argument("--seconds", type=float, default=120, help="how long one backend may take")
    parser.add_argument("--backend", choices=BACKENDS, help=argparse.SUPPRESS)
    parser.add_argument("--plans", action="store_true", help="time the plans of minimax_fp8_linear.py beside --stock")
    parser.add_argument("--stock", nargs="+", choices=BACKENDS, default=["cutlass"])
    parser.add_argument("--tokens", type=int, nargs="+", help="of a layer; a prefill has 512 to 8192")
    parser.add_argument("--time-limit", type=float, default=180, help="with --plans: seconds, compilation included")
    options = parser.parse_args()
    if options.plans:
        measure_plans(options)
        return
    options.ranks, options.tokens = options.ranks or [4, 2], options.tokens or TOKENS
    if options.backend:
        measure(options.backend, options.ranks, options.tokens)
        return
    results: dict[str, dict] = {}
    for backend in options.backends:
        command = [sys.executable, __file__, "--backend", backend, "--ranks", *map(str, options.ranks)]
        command += ["--tokens", *map(str, options.tokens)]
        # Without PRECOMPILE the engine compiles DeepGEMM's kernels for the shapes at hand only, not for all of them.
        deep_gemm = {
            "SGLANG_ENABLE_JIT_DEEPGEMM": str(int(backend == "deep_gemm")),
            "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0",
        }
        environment = {**os.environ, **deep_gemm}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=options.seconds)
            output, failure = done.stdout, f"failed: {done.stderr[-600:]}" if done.returncode else None
        except subprocess.TimeoutExpired as late:
            output, failure = late.stdout, f"not done in {options.seconds:.0f} s"
        results[backend] = rows_of(output)
        if failure:
            print(f"{backend}: {len(results[backend])} rows, {failure}", flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as stream:
            json.dump(results, stream, indent=1)
    print(f"{'':<14}" + "".join(f"{backend:>28}" for backend in results) + "   us (quantisation alone), error")
    for key in dict.fromkeys(key for rows in results.values() for key in rows):
        cells = (rows.get(key) for rows in results.values())
        print(f"{key:<14}" + "".join(f"{cell_text(cell):>28}" for cell in cells))


def cell_text(row: dict | None) -> str:
    if row is None:
        return "-"
    return f"{row['us']:.2f} ({row.get('quantise', float('nan')):.2f}) {row['error']:.0e}"


if __name__ == "__main__":
    main()
