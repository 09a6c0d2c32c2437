#!/usr/bin/env python3
"""Times the engine's FP8 linear layers (blocks of 128 x 128) at the sizes of MiniMax-M2's attention, by backend.

    python benchmark/fp8_linear.py --json out.json [--backends cutlass triton] [--ranks 4]

A backend is a value of the engine's --fp8-gemm-backend, and what is timed is the engine's function behind it: the
activations' quantisation and the GEMM. ``quantise`` is the quantisation alone, as that backend does it. Each backend
runs in a process of its own, since some compile, or are not there. Protocol: a CUDA graph of 24 layers, each with its
own weights; 10 replays to warm up, then 60, each between two events. Reported: the median, in microseconds a layer; and
the relative error of the norm against the same FP8 values in float32. A backend that runs out of its time keeps what it
had by then.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

import graph_timing

HIDDEN_SIZE, HEADS, KV_HEADS, HEAD_DIM, BLOCK = 3072, 48, 8, 128, 128
TOKENS, LAYERS, WARM_UP, REPLAYS = [1, 4, 16, 32, 64, 128, 256, 1024], 24, 10, 60
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


def graph_time(function, arguments: list) -> float:
    import torch

    function(*arguments[0])
    torch.cuda.synchronize()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        function(*arguments[0])
        torch.cuda.synchronize()
        graph.capture_begin()
        for one in arguments:
            function(*one)
        graph.capture_end()
    return statistics.median(graph_timing.replay_times(graph, len(arguments), WARM_UP, REPLAYS))


def measure(backend: str, ranks: list[int]) -> None:
    """Prints a row of JSON for each projection and number of tokens, as it comes."""
    import torch
    import tune_experts as tuner

    tuner.engine()
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
                for tokens in TOKENS:
                    x = torch.randn(tokens, inputs, device="cuda").bfloat16()
                    arguments = [(x, weight, [BLOCK, BLOCK], scale) for weight, scale in weights]
                    q, row_scale = quantise(x, BLOCK)
                    weight, scale = weights[0]
                    exact_x = q.float() * row_scale.repeat_interleave(BLOCK, 1)
                    exact_w = weight.float() * scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
                    exact = exact_x @ exact_w.T
                    error = float((linear(*arguments[0]).float() - exact).norm() / exact.norm())
                    row = {"us": graph_time(linear, arguments), "error": error}
                    if scales is not None:
                        row["quantise"] = graph_time(lambda x, s=scales: quantise(x, BLOCK, **s), [(x,)] * LAYERS)
                    print(ROW + json.dumps({f"TP{rank_count} {projection} {tokens}": row}), flush=True)


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
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--seconds", type=float, default=120, help="how long one backend may take")
    parser.add_argument("--backend", choices=BACKENDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.backend:
        measure(options.backend, options.ranks)
        return
    results: dict[str, dict] = {}
    for backend in options.backends:
        command = [sys.executable, __file__, "--backend", backend, "--ranks", *map(str, options.ranks)]
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
