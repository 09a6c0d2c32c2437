#!/usr/bin/env python3
"""Times all-reduce + residual add + RMSNorm of MiniMax-M2: the engine's two launches and our one, by plan.

    python benchmark/all_reduce_norm.py --json out.json                 # on all GPUs of the host
    python benchmark/all_reduce_norm.py --ranks 2 --flashinfer --time-limit 240 --json out.json
    python benchmark/all_reduce_norm.py --plans 16/1 --time-limit 90 --json out.json     # what is served, in a minute

A process a rank. Protocol: a CUDA graph of 16 layers, each with its own x, residual and weight; 10 replays to warm up,
then 120, each between two events; the time of a layer is a replay's time / 16. Reported: the median over replays, in
microseconds, of the slowest rank. What is timed:
    stock         the engine's custom all-reduce, then its residual add + RMSNorm
    flashinfer    FlashInfer's fused kernel, with --flashinfer; its first use compiles for a minute or more
    warps/ctas    ours, by plan: warps of a CTA, CTAs that must fit on a multiprocessor together
Before a way is timed its output is compared with float64, and its bits over the ranks; the error is the root mean
square of the normed values' differences over that of the values, in units of 2^-8, of which one rounding to bfloat16
costs up to a half. Between two layers nothing else runs: what another kernel
there would cost or hide is not in these numbers.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import graph_timing

TOKENS, HIDDEN_SIZE, EPS = [1, 16, 64, 4, 128, 256, 512], 3072, 1e-6
LAYERS, WARM_UP, REPLAYS = 16, 10, 120
FEW = 2  # so many plans the ranks compile by themselves
PLANS = [(16, 1), (8, 1), (4, 1), (16, 2), (8, 2), (8, 4), (4, 4)]  # (warps, CTAs a multiprocessor)


def plan(text: str) -> tuple[int, int]:
    warps, ctas = map(int, text.split("/"))
    return warps, ctas


class NoServer:
    """Stands in for the server's arguments: every option off."""

    def __getattr__(self, name):
        return None


def plans(tokens: int, multiprocessors: int) -> list[tuple[int, int]]:
    """Plans that hold all rows, without those that would be the same launch."""
    return [plan for plan in PLANS if tokens <= plan[1] * multiprocessors and (plan[1] == 1 or tokens > 64)]


def compile_plan(plan: tuple[int, int], ranks: int) -> None:
    """Into Triton's cache on disk; a plan that fails here fails again, and is reported, when it is timed."""
    from sglang_minimax import overlay

    overlay.install()
    import torch
    from sglang.srt.layers import minimax_all_reduce_norm as module
    from sglang.srt.layers.minimax_nvlink import has_programmatic_launch

    def meta(dtype):
        return torch.empty(16, dtype=dtype, device="meta")

    row, messages, of_plan = meta(torch.bfloat16), module.messages_per_row(HIDDEN_SIZE), module.Plan(*plan)
    options: dict = {"num_warps": of_plan.num_warps, "maxnreg": of_plan.registers_per_thread}
    if pdl := has_programmatic_launch(torch.device("cuda", 0)):
        options["launch_pdl"] = True
    with contextlib.suppress(Exception):
        module._all_reduce_norm_kernel.warmup(
            row, row, row, row, meta(torch.int64), meta(torch.int32), EPS, 512, 0, 0, 1000,
            HIDDEN_SIZE=HIDDEN_SIZE, MESSAGES=messages, BLOCK=32 * of_plan.num_warps, RANKS=ranks, PDL=pdl,
            POLL=module.poll_assembly(ranks, messages), OPERANDS=module.poll_operands(ranks), grid=(1,), **options,
        )  # fmt: skip


class Rank:
    """One rank's part: its group, the ways that it knows, and a layer's inputs."""

    def __init__(self, rank: int, world: int, port: int, tokens: list[int], flashinfer: bool) -> None:
        from sglang_minimax import overlay

        overlay.install()
        import torch
        from sglang.srt import server_args
        from sglang.srt.distributed import parallel_state
        from sglang.srt.layers import minimax_all_reduce_norm as module
        from sglang.srt.layers.minimax_nvlink import inbox_on_symmetric_memory, peers_are_reachable, smallest_gpu

        arguments = NoServer()
        arguments.attn_cp_size, arguments.tp_size = 1, world
        server_args.set_global_server_args_for_scheduler(arguments)
        torch.cuda.set_device(rank)
        parallel_state.set_custom_all_reduce(True)
        parallel_state.init_distributed_environment(world, rank, f"tcp://127.0.0.1:{port}", rank, "nccl")
        parallel_state.initialize_model_parallel(world)
        self.rank, self.world, self.parallel_state, self.module = rank, world, parallel_state, module
        self.group, device = parallel_state.get_tp_group(), torch.device("cuda", rank)
        assert peers_are_reachable(self.group, device), "these GPUs have no NVLink between every pair"
        self.multiprocessors = smallest_gpu(self.group, device)
        most = min(max(tokens), self.multiprocessors * max(ctas for _, ctas in PLANS))
        size = module.inbox_bytes(world, HIDDEN_SIZE, most)
        exchange = module.RowExchange(
            *inbox_on_symmetric_memory(self.group, device, size), rank, HIDDEN_SIZE, most, self.multiprocessors
        )
        self.operator = module.AllReduceNorm(self.group, exchange, peer_timeout_seconds=60)
        self.flashinfer = flashinfer and self._start_flashinfer(max(tokens))

    def _start_flashinfer(self, tokens: int) -> bool:
        import torch
        from sglang.srt.layers import flashinfer_comm_fusion

        try:
            return flashinfer_comm_fusion.ensure_workspace_initialized(
                max_token_num=tokens, hidden_dim=HIDDEN_SIZE, dtype=torch.bfloat16
            )
        except Exception as reason:  # it is not installed, or cannot compile here
            print(f"rank {self.rank}: no FlashInfer: {type(reason).__name__}: {reason}"[:300], flush=True)
            return False

    def ways(self, tokens: int) -> dict:
        """By name a function of (x, residual, weight) that gives (normed, residual), the residual written in place."""
        from sgl_kernel import fused_add_rmsnorm

        def stock(x, residual, weight):
            total = self.group.all_reduce(x)
            fused_add_rmsnorm(total, residual, weight, EPS)
            return total, residual

        ways = {"stock": stock}
        if self.flashinfer:
            from sglang.srt.layers.flashinfer_comm_fusion import flashinfer_allreduce_residual_rmsnorm

            ways["flashinfer"] = lambda x, residual, weight: flashinfer_allreduce_residual_rmsnorm(
                input_tensor=x, residual=residual, weight=weight, eps=EPS, use_attn_tp_group=True
            )
        for plan in plans(tokens, self.multiprocessors):

            def ours(x, residual, weight, plan=plan):
                return self.operator.launch(self.module.Plan(*plan), x, residual, weight, EPS, 0), residual

            ways["/".join(map(str, plan))] = ours
        return ways

    def layers(self, tokens: int) -> list[tuple]:
        """(x, residual, weight) of each; residual and weight are the same on every rank."""
        import torch

        def normal(seed, *shape):
            generator = torch.Generator("cuda").manual_seed(seed)
            return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

        return [
            (
                normal(1000 * layer + self.rank, tokens, HIDDEN_SIZE),
                normal(1000 * layer + 100, tokens, HIDDEN_SIZE),
                normal(1000 * layer + 101, HIDDEN_SIZE),
            )
            for layer in range(LAYERS)
        ]

    def error(self, way, x, residual, weight) -> float:
        """Against float64, and bit by bit against the other ranks."""
        import torch

        parts = [torch.empty_like(x) for _ in range(self.world)]
        torch.distributed.all_gather(parts, x, group=self.group.device_group)
        total = torch.stack([part.double() for part in parts]).sum(0) + residual.double()
        want = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS) * weight.double()
        normed, kept = way(x.clone(), residual.clone(), weight)
        everyone = [torch.empty_like(normed) for _ in range(self.world)]
        torch.distributed.all_gather(everyone, normed.contiguous(), group=self.group.device_group)
        assert all(torch.equal(one, normed) for one in everyone), "ranks have different bits"
        errors = []
        for got, expected in ((kept, total), (normed, want)):
            difference = got.double() - expected
            assert (difference.abs() <= 2**-4 * (expected.abs() + expected.square().mean().sqrt())).all(), (
                "wrong values"
            )
            errors.append((difference.square().mean() / expected.square().mean()).sqrt().item() * 2**8)
        assert max(errors) < 1.5, f"wrong: residual and normed values are off by {errors} units of 2^-8"
        return errors[1]

    def time(self, way, layers: list[tuple]) -> float:
        """Median microseconds of a layer on this rank."""
        import torch

        copies = [(x.clone(), residual.clone(), weight) for x, residual, weight in layers]
        for layer in copies:
            way(*layer)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with self.parallel_state.graph_capture() as context, torch.cuda.graph(graph, stream=context.stream):
            for layer in copies:
                way(*layer)
        torch.distributed.barrier()
        return statistics.median(graph_timing.replay_times(graph, len(copies), WARM_UP, REPLAYS))

    def agreed(self, value: float) -> float:
        """The largest of all ranks' values."""
        import torch

        whole = torch.tensor([value], dtype=torch.float64)
        torch.distributed.all_reduce(whole, torch.distributed.ReduceOp.MAX, group=self.group.cpu_group)
        return whole.item()

    def measure(self, tokens: int, deadline: float) -> dict:
        """{way: {us, error} or {failed}}; a way that fails on one rank is given up on all of them."""
        import torch

        row: dict = {}
        layers = self.layers(tokens)
        for name, way in self.ways(tokens).items():
            if self.agreed(float(time.time() > deadline)):
                break
            reason, error = "", 0.0
            try:
                error = self.error(way, *layers[0])
                torch.cuda.synchronize()
            except Exception as failed:  # a plan that does not compile, or is wrong
                reason = f"{type(failed).__name__}: {failed}"[:200]
            if self.agreed(float(bool(reason))):
                row[name] = {"failed": reason or "on another rank"}
                continue
            us = self.agreed(self.time(way, layers))
            row[name] = {"us": us, "error": self.agreed(error)}
        return row


def measure_rank(rank: int, world: int, port: int, options) -> None:
    """What each process does; rank 0 writes the result as it grows."""
    import sglang
    import torch
    import triton

    mine = Rank(rank, world, port, options.tokens, options.flashinfer)
    versions = {"sglang": sglang.__version__, "torch": torch.__version__, "triton": triton.__version__}
    result: dict = {"gpu": torch.cuda.get_device_name(), "ranks": world, "versions": versions, "us_a_layer": {}}
    with torch.inference_mode():
        for tokens in options.tokens:
            if mine.agreed(float(time.time() > options.deadline)):
                break
            result["us_a_layer"][str(tokens)] = mine.measure(tokens, options.deadline)
            if rank == 0:
                options.result.write_text(json.dumps(result, indent=1))
    torch.cuda.synchronize()
    torch.distributed.barrier()
    os._exit(0)  # communicators end in several ways; nothing is left to save


def print_table(result: dict) -> None:
    rows = result["us_a_layer"]
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    print(f"{result['ranks']} x {result['gpu']}, microseconds a layer (error in units of 2^-8)")
    print(f"{'tokens':>7}", *(f"{name:>14}" for name in names), f"{'stock / best':>14}")
    for tokens, row in rows.items():
        cells = []
        for name in names:
            one = row.get(name, {})
            cells.append(f"{one['us']:7.2f} ({one['error']:.2f})" if "us" in one else "failed" if one else "")
        ours = [one["us"] for name, one in row.items() if "us" in one and "/" in name]
        ratio = f"{row['stock']['us'] / min(ours):.2f}" if ours and "us" in row.get("stock", {}) else ""
        print(f"{tokens:>7}", *(f"{cell:>14}" for cell in cells), f"{ratio:>14}")
    for tokens, row in rows.items():
        for name, one in row.items():
            if "failed" in one:
                print(f"{tokens} tokens, {name}: {one['failed']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="GPUs; default: the most of 2, 4 and 8 that there are")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="the most important ones first")
    parser.add_argument("--flashinfer", action="store_true", help="FlashInfer's fused kernel too")
    parser.add_argument("--time-limit", type=float, default=600, help="seconds; what is done by then is written")
    parser.add_argument("--json", type=Path, help="write all numbers, with GPU and versions, here")
    parser.add_argument("--rank", nargs=3, type=int, metavar=("RANK", "WORLD", "PORT"), help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plans", type=plan, nargs="+", default=PLANS, metavar="WARPS/CTAS", help="ours to time")
    options = parser.parse_args()
    PLANS[:] = options.plans
    if options.rank:
        return measure_rank(*options.rank, options)

    import torch

    deadline = time.time() + options.time_limit
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = options.ranks or max((n for n in (2, 4, 8) if n <= gpus), default=2)
    if ranks > gpus:
        sys.exit(f"{ranks} ranks need {ranks} GPUs, one each, and this host has {gpus}: ask for fewer with --ranks")
    context = multiprocessing.get_context("spawn")
    if len(PLANS) > FEW:  # in a process each, which has to start too
        with concurrent.futures.ProcessPoolExecutor(min(len(PLANS), (os.cpu_count() or 2)), context) as pool:
            list(pool.map(compile_plan, PLANS, [ranks] * len(PLANS)))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="all_reduce_norm."))
    result = options.json or folder / "result.json"
    command = [sys.executable, __file__, "--tokens", *map(str, options.tokens), "--deadline", str(deadline)]
    command += ["--plans", *(f"{warps}/{ctas}" for warps, ctas in PLANS)]
    command += ["--result", str(result), *(["--flashinfer"] if options.flashinfer else [])]
    logs = [(folder / f"log.{rank}").open("w") for rank in range(ranks)]
    processes = [
        subprocess.Popen([*command, "--rank", str(rank), str(ranks), str(port)], stdout=log, stderr=subprocess.STDOUT)
        for rank, log in enumerate(logs)
    ]
    while any(process.poll() is None for process in processes):
        # A rank that failed leaves the others waiting for it; 30 s are for the measurement that was under way.
        if any(process.poll() for process in processes) or time.time() > deadline + 30:
            time.sleep(2)
            for process in processes:
                process.kill()
        time.sleep(0.1)
    for rank, process in enumerate(processes):
        if process.returncode:
            print(f"rank {rank} ended with {process.returncode}:", (folder / f"log.{rank}").read_text()[-1500:])
    if result.exists():
        print_table(json.loads(result.read_text()))
    return None


if __name__ == "__main__":
    main()
