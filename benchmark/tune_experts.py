#!/usr/bin/env python3
"""Tunes the engine's Triton expert GEMMs for MiniMax-M2 in FP8 (blocks of 128 x 128) on the GPU of this host.

    python benchmark/tune_experts.py --out FOLDER [--shapes 256:384 128:768] [--time-limit 300]
    python benchmark/tune_experts.py --out FOLDER --shapes 256:384 --tokens 1024 2048 4096 8192 --onto TABLES
    python benchmark/tune_experts.py --out FOLDER --near TABLES     # few candidates, a shape sooner
    python benchmark/tune_experts.py --out FOLDER --dry-run        # no GPU: compiles for sm90, times nothing

A shape is local experts : a rank's part of an expert's width, E : N in the engine's file names. The published model
has 256 experts of width 1536 and hidden size 3072, so 256:384 is TP4, 128:384 TP8 with the EP2 that FP8 needs there,
64:384 TP16 with EP4, and 32:1536 TP8 with EP8. Each shape gives two tables in the engine's format,
FOLDER/configs/triton_X_Y_Z/*.json: one for gate_up, one (``_down``) for down. The engine wants the same BLOCK_SIZE_M in
both, so BLOCK_SIZE_M is what is best for the sum of the two.

What is timed is the engine's own kernel (``expert_gemms.py``), on uniform random routing; with fewer
than 256 local experts most routes lead elsewhere (-1), as they do under EP. A CUDA graph holds 4 to 16 invocations with
a routing each, so that few tokens do not find their experts in the L2 cache. Every candidate is timed over 5 replays;
those within 8 % of the best are timed again over 30. Then the whole of ``fused_experts`` runs with the engine's
default and with the tables, read back from the files: compared with float32 arithmetic on the same FP8 values, and
timed. A shape is written once all of its token counts are done and right. Compilation runs in parallel processes,
which launch nothing, while the one process that owns the GPU measures. With ``--onto`` the tables written have, for
the token counts that were not tuned, what those under TABLES/configs have. With ``--near`` the candidates of a token
count are those that a table under TABLES/configs, of any shape and stage, has for a count within four times it, and
one in five of the usual.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from expert_gemms import (
    BLOCK,
    DOWN,
    GATE_UP,
    STAGES,
    Config,
    Problem,
    Shape,
    Stage,
    Weights,
    engine,
    engine_pretending_sm90,
    launch_arguments,
    specialisation,
    use_tables,
)

TOKENS = [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096]
SHAPES = [  # by importance
    "256:384", "128:384", "64:384", "256:768", "32:1536", "64:1536", "128:768", "64:768", "128:1536", "256:1536",
]  # fmt: skip
QUICK, LONG, NEAR = 5, 30, 1.08  # replays, replays, ratio
ONE_IN = 5  # of the usual candidates beside those of tables that are at hand
TOLERANCE = 0.02  # of the relative error of the norm


def config(m: int, n: int, warps: int, stages: int, group: int = 1, k: int = BLOCK, tma: bool = False) -> Config:
    sizes = {"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n, "BLOCK_SIZE_K": k, "GROUP_SIZE_M": group}
    return {**sizes, "num_warps": warps, "num_stages": stages, **({"USE_TMA": True} if tma else {})}


DEFAULT = config(64, 128, 4, 3, group=32)  # what the engine takes without a table


def candidates(tokens: int, stage: Stage, near: Path | None = None) -> list[Config]:
    """Configurations worth timing. With T tokens an expert has about T / 32 routes, whatever the layout."""
    found = [DEFAULT]
    if near is not None:
        for path in sorted(near.glob("configs/*/*.json")):
            table = json.loads(path.read_text())
            found += [block for count, block in table.items() if tokens <= 4 * int(count) and int(count) <= 4 * tokens]
        found += candidates(tokens, stage)[::ONE_IN]
        ours = [block for block in found if stage is DOWN or not block.get("USE_TMA")]
        return [block for place, block in enumerate(ours) if block not in ours[:place]]
    if tokens <= 128:
        found += [config(16, 64, 4, stages) for stages in (3, 4, 5, 6)]
        found += [config(16, 128, warps, stages) for warps in (4, 8) for stages in (2, 3, 4, 5)]
        found += [config(16, 256, *rest) for rest in ((4, 3), (8, 3), (8, 4))]
        found += [config(16, 32, 4, stages) for stages in (4, 6)]
        found += [config(16, 128, 4, 4, group=16), config(16, 128, 4, 5, k=64), config(16, 64, 4, 6, k=64)]
    if 64 <= tokens <= 128:
        found += [config(32, n, 4, stages) for n in (64, 128) for stages in (3, 4)]
    if 256 <= tokens <= 512:
        found += [config(16, n, 4, stages) for n in (64, 128) for stages in (3, 4, 5)]
        found += [config(m, n, 4, stages) for m in (32, 64) for n in (64, 128) for stages in (3, 4)]
        found += [config(m, 128, 8, stages) for m in (16, 32, 64) for stages in (3, 4)]
        found += [config(32, 128, 4, 4, group=16), config(64, 256, 8, 3)]
    if tokens >= 1024:
        found += [config(m, 128, 4, stages, group) for m in (32, 64) for stages in (3, 4) for group in (1, 16)]
        found += [config(64, n, 8, stages, group) for n in (128, 256) for stages in (3, 4) for group in (1, 16)]
        found += [config(128, 128, w, stages, group) for w in (4, 8) for stages in (3, 4) for group in (1, 16)]
        found += [config(128, 64, 4, 4), config(128, 64, 4, 4, 16), config(128, 256, 8, 3), config(128, 256, 8, 3, 16)]
        found += [config(m, 64, 4, stages, group=16) for m in (32, 64) for stages in (3, 4)]
        found += [config(64, 128, 4, 4, group=32), config(128, 128, 8, 3, group=32)]
    if tokens >= 1024 and stage is DOWN:
        found += [config(m, 128, warps, 3, tma=True) for m in (64, 128) for warps in (4, 8)]
    return found


# Compilation, in processes of their own.

_kernels: Any = None


def start_compiler(dry_run: bool) -> None:
    global _kernels
    _kernels = engine_pretending_sm90() if dry_run else engine()


def compile_one(shape: Shape, stage: Stage, tokens: int, block: Config) -> str | None:
    """Compiles into Triton's cache on disk, from which the measuring process loads; a failure's text, or None."""
    args, kwargs = launch_arguments(_kernels, shape, stage, tokens, block)
    try:
        _kernels.fused_moe_kernel.warmup(*args, grid=(1,), **kwargs)
    except Exception as error:  # what cannot be compiled is no candidate; the summary counts them
        return f"{type(error).__name__}: {error}"[:300]
    return None


class Compilers:
    """One job a specialisation, in the order in which they will be measured."""

    def __init__(self, kernels, processes: int, dry_run: bool) -> None:
        import multiprocessing

        self.kernels, self.jobs = kernels, {}
        self.pool = ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), initializer=start_compiler, initargs=(dry_run,)
        )

    def submit(self, shape: Shape, stage: Stage, tokens: int, block: Config) -> Future:
        key = specialisation(*launch_arguments(self.kernels, shape, stage, tokens, block))
        if key not in self.jobs:
            self.jobs[key] = self.pool.submit(compile_one, shape, stage, tokens, block)
        return self.jobs[key]

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def tune(problem: Problem, compilers: Compilers, failures: list[str], near: Path | None = None) -> dict[Stage, Config]:
    """The best pair of configurations with one BLOCK_SIZE_M for a token count."""
    graphs: dict[Stage, list[tuple[float, Config, Any]]] = {stage: [] for stage in STAGES}
    for stage in STAGES:
        for block in candidates(problem.tokens, stage, near):
            error = compilers.submit(problem.shape, stage, problem.tokens, block).result()
            if error is None:
                try:
                    graph = problem.graph(lambda stage=stage, block=block: problem.gemms(stage, block))
                    graphs[stage].append((problem.time(graph, QUICK), block, graph))
                    continue
                except Exception as problem_of_candidate:
                    if "out of resource" not in str(problem_of_candidate):
                        raise
                    error = str(problem_of_candidate)
            failures.append(f"{stage.name} {block}: {error}")
    best = pairs(graphs)
    near = {m for m, (total, _) in best.items() if total <= NEAR * min(total for total, _ in best.values())}
    again: dict[Stage, list[tuple[float, Config, Any]]] = {stage: [] for stage in STAGES}
    for stage in STAGES:
        for m in near:
            of_m = sorted((one for one in graphs[stage] if one[1]["BLOCK_SIZE_M"] == m), key=lambda one: one[0])
            kept = [one for one in of_m if one[0] <= NEAR * of_m[0][0]][:6]
            again[stage] += [(problem.time(graph, LONG), block, graph) for _, block, graph in kept]
    return min(pairs(again).values(), key=lambda pair: pair[0])[1]


def pairs(timed: dict[Stage, list[tuple[float, Config, Any]]]) -> dict[int, tuple[float, dict[Stage, Config]]]:
    """For each BLOCK_SIZE_M that both stages have: the least time of both together, and with what."""
    found = {}
    for m in sorted({block["BLOCK_SIZE_M"] for _, block, _ in timed[GATE_UP]}):
        of_m = {s: [one for one in timed[s] if one[1]["BLOCK_SIZE_M"] == m] for s in STAGES}
        if all(of_m.values()):
            chosen = {stage: min(of_m[stage], key=lambda one: one[0]) for stage in STAGES}
            found[m] = sum(one[0] for one in chosen.values()), {stage: one[1] for stage, one in chosen.items()}
    return found


def table_files(root: Path, shape: Shape) -> dict[Stage, Path]:
    """Where the engine looks for the two tables of a shape, if SGLANG_MOE_CONFIG_DIR is ``root``."""
    import triton
    from sglang.srt.layers.moe.fused_moe_triton.fused_moe_triton_config import get_config_file_name

    folder = root / "configs" / f"triton_{triton.__version__.replace('.', '_')}"
    return {
        stage: folder
        / get_config_file_name(shape.experts, shape.width, "fp8_w8a8", [BLOCK, BLOCK], down_moe=stage is DOWN)
        for stage in STAGES
    }


def write_tables(root: Path, shape: Shape, best: dict[int, dict[Stage, Config]], onto: Path | None = None) -> None:
    """Into ``root``: the best by token count, and for other counts what the tables under ``onto`` have."""
    before = table_files(onto, shape) if onto else {}
    for stage, path in table_files(root, shape).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        table = json.loads(before[stage].read_text()) if before else {}
        table |= {str(tokens): chosen[stage] for tokens, chosen in best.items()}
        path.write_text(json.dumps({count: table[count] for count in sorted(table, key=int)}, indent=4) + "\n")


def compare(problem: Problem, root: Path) -> dict[str, float]:
    """The whole of the experts without a table and with it: microseconds, and the relative error of each."""
    exact, row = problem.reference(), {}
    for name, tables in (("default", None), ("tuned", root)):
        use_tables(tables)
        row[f"{name}_error"] = float((problem.whole().float() - exact).norm() / exact.norm())
        row[f"{name}_us"] = problem.time(problem.graph(problem.whole), LONG)
    use_tables(None)
    return row


def tune_shape(kernels, shape: Shape, compilers: Compilers, options, deadline: float) -> dict:
    """Tunes, checks, writes and times one shape.

    Raises:
        TimeoutError: the time limit came first; nothing is written then.
        RuntimeError: the reference and the engine's default disagree, so that nothing can be said of the tuned result.
    """
    import torch

    begin, failures, best = time.monotonic(), [], {}
    weights = Weights(shape)
    for tokens in options.tokens:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the time limit came at {tokens} tokens")
        best[tokens] = tune(Problem(kernels, weights, tokens), compilers, failures, options.near)
    tried = options.out / "tried"
    write_tables(tried, shape, best)
    rows = {tokens: compare(Problem(kernels, weights, tokens), tried) for tokens in options.tokens}
    for tokens, row in rows.items():
        if not row["default_error"] < TOLERANCE:
            raise RuntimeError(f"at {tokens} tokens the engine's default itself has an error of {row['default_error']}")
        # What is wrong, or slower as a whole, must not be shipped: there the table says what the engine's default is.
        if not row["tuned_error"] < TOLERANCE or row["tuned_us"] > row["default_us"]:
            best[tokens], row["kept_default"] = dict.fromkeys(STAGES, DEFAULT), 1.0
    write_tables(options.out, shape, best, options.onto)
    del weights
    torch.cuda.empty_cache()
    chosen = {t: {stage.name: block for stage, block in pair.items()} for t, pair in best.items()}
    return {"rows": rows, "chosen": chosen, "failures": failures, "seconds": time.monotonic() - begin}


def short(block: Config) -> str:
    names = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
    return "/".join(str(block[name]) for name in names) + ("/TMA" if block.get("USE_TMA") else "")


def print_table(shape: Shape, result: dict) -> None:
    print(
        f"\n{shape}: whole of the experts, us a layer; block m/n/k, group, warps, stages "
        f"({result['seconds']:.0f} s, {len(result['failures'])} candidates not possible)"
    )
    print(f"{'tokens':>6} {'default':>8} {'tuned':>8} {'ratio':>6} {'error':>8}  {'gate_up':<20} down")
    for tokens, row in result["rows"].items():
        blocks = result["chosen"][tokens]
        print(
            f"{tokens:>6} {row['default_us']:8.1f} {row['tuned_us']:8.1f} {row['default_us'] / row['tuned_us']:6.2f} "
            f"{row['tuned_error']:8.5f}  {short(blocks['gate_up']):<20} {short(blocks['down'])}"
            + ("  (default kept)" if "kept_default" in row else "")
        )


def dry_run(options) -> None:
    """Compiles what would be measured, for sm90, and says what cannot be compiled."""
    kernels = engine_pretending_sm90()
    compilers = Compilers(kernels, options.processes, dry_run=True)
    jobs = []
    for shape in options.shapes:
        for tokens in options.tokens:
            for stage in STAGES:
                for block in candidates(tokens, stage, options.near)[: options.first]:
                    jobs.append((stage, block, compilers.submit(shape, stage, tokens, block)))
    print(f"{len(jobs)} measurements, {len(compilers.jobs)} kernels to compile")
    errors = {f"{stage.name} {short(block)}: {job.result()}" for stage, block, job in jobs if job.result()}
    compilers.close()
    print("\n".join(sorted(errors)) or "all compile")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for configs/ and tune_experts.json")
    parser.add_argument("--shapes", type=Shape.parse, nargs="+", default=[Shape.parse(text) for text in SHAPES])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--onto", type=Path, metavar="TABLES", help="folder with configs/ whose other counts are kept")
    parser.add_argument("--near", type=Path, metavar="TABLES", help="folder with configs/ that has the candidates")
    parser.add_argument("--time-limit", type=float, default=1800, help="seconds; a shape that is not done is left out")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that compile")
    parser.add_argument("--dry-run", action="store_true", help="compile for sm90 without a GPU and stop")
    parser.add_argument("--first", type=int, help="of a dry run: only so many candidates of each list")
    options = parser.parse_args()
    if options.dry_run:
        return dry_run(options)

    import torch
    import triton

    if not torch.cuda.is_available():
        sys.exit("tuning needs a GPU and this host has none: --dry-run compiles the candidates without one")
    deadline = time.monotonic() + options.time_limit
    kernels = engine()
    compilers = Compilers(kernels, options.processes, dry_run=False)
    for shape in options.shapes:
        for tokens in options.tokens:
            for stage in STAGES:
                for block in candidates(tokens, stage, options.near):
                    compilers.submit(shape, stage, tokens, block)
    print(f"{len(compilers.jobs)} kernels to compile in {options.processes} processes", flush=True)
    results = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    torch.manual_seed(0)
    with torch.inference_mode():
        for shape in options.shapes:
            try:
                results[str(shape)] = result = tune_shape(kernels, shape, compilers, options, deadline)
            except (TimeoutError, RuntimeError) as reason:
                print(f"\n{shape} left out: {type(reason).__name__}: {reason}", flush=True)
                torch.cuda.empty_cache()
                continue
            print_table(shape, result)
            sys.stdout.flush()
            (options.out / "tune_experts.json").write_text(json.dumps(results, indent=1) + "\n")
    compilers.close()
    return None


if __name__ == "__main__":
    main()
