#!/usr/bin/env python3
"""Times QK norm + partial RoPE + KV-cache store of MiniMax-M2: ours beside other engines, on the GPUs of one host.

    python benchmark/qk_norm_rope.py                                    # ours alone
    python benchmark/qk_norm_rope.py --stock STOCK_PATH --peer PEER_PATH --json out.json

STOCK_PATH and PEER_PATH are what PYTHONPATH must be for that engine: sglang 0.5.10.post1 without the overlay, and
sglang 0.5.11, whose own fused QK norm is then switched on. Each engine runs in processes of its own, one a GPU. All of
them start, compile and warm up together; then they measure one after the other, so that nothing else uses the GPUs.
A layout is q heads : KV heads : GPUs; 24:4:2 gives each of two GPUs the rows of TP4, with one peer instead of three.

Protocol: a CUDA graph of 8 layers, each with its own random qkv and cache; 20 replays to warm up, then 200, each
between two events; the time of a layer is a replay's time / 8. Reported: the median over replays, and the 10th and 90th
percentile, of the slowest rank. What is timed is all that lies between the qkv projection and attention:
    ours    one launch
    stock   copies of q and k, sums, all-reduce, scaling; RoPE; KV store
    peer    fused QK norm; RoPE; KV store
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import graph_timing

HEAD_DIM, ROTARY_DIM, EPS, THETA = 128, 64, 1e-6, 5_000_000
LAYERS, WARM_UP, REPLAYS, MAX_POSITION = 8, 20, 200, 32768
TOKENS = [1, 4, 16, 64, 128, 256, 512, 1024, 4096, 16384]
ENGINES = ("ours", "stock", "peer")


class Layout(NamedTuple):
    """Heads of the whole model, and the attention-TP ranks that share them."""

    heads: int
    kv_heads: int
    ranks: int

    @classmethod
    def parse(cls, text: str) -> Layout:
        return cls(*map(int, text.split(":")))

    def __str__(self) -> str:
        return ":".join(map(str, self))


# ---------------------------------------------------------------- one rank of one engine


class NoServer:
    """Stands in for the server's arguments: every option off."""

    def __getattr__(self, name):
        return None


def start_rank(rank: int, world: int, port: int, max_tokens: int):
    import torch
    from sglang.srt import server_args
    from sglang.srt.distributed import parallel_state

    arguments = NoServer()
    arguments.chunked_prefill_size = arguments.max_prefill_tokens = max_tokens
    server_args.set_global_server_args_for_scheduler(arguments)
    torch.cuda.set_device(rank)
    parallel_state.set_custom_all_reduce(True)
    parallel_state.init_distributed_environment(world, rank, f"tcp://127.0.0.1:{port}", rank, "nccl")
    parallel_state.initialize_model_parallel(world)
    return parallel_state


class Layer:
    """One layer's inputs, and what an engine does with them between projection and attention."""

    def __init__(self, engine: str, layout: Layout, layer_id: int, tokens: int, rope) -> None:
        import torch

        self.layout = layout
        self.heads, self.kv_heads = layout.heads // layout.ranks, max(1, layout.kv_heads // layout.ranks)
        self.sizes = [n * HEAD_DIM for n in (self.heads, self.kv_heads, self.kv_heads)]
        self.qkv = torch.randn(tokens, sum(self.sizes), device="cuda", dtype=torch.bfloat16)
        self.positions = torch.randint(0, MAX_POSITION, (tokens,), device="cuda")
        self.slots = torch.randperm(tokens + 64, device="cuda")[:tokens]
        shape = (tokens + 64, self.kv_heads, HEAD_DIM)
        self.k_cache, self.v_cache = (torch.zeros(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self.rope = rope
        self.run = getattr(self, "build_" + engine)(layer_id)

    def weights(self, dtype):
        import torch

        return [1 + 0.1 * torch.randn(size, device="cuda").to(dtype) for size in self.sizes[:2]]

    def build_ours(self, layer_id: int):
        import torch
        from sglang.srt.distributed import parallel_state
        from sglang.srt.layers.minimax_qk_norm_rope import QKNormRope

        group, device = parallel_state.get_attn_tp_group(), self.qkv.device
        heads, kv_heads, _ = self.layout
        operator = QKNormRope(heads, kv_heads, HEAD_DIM, ROTARY_DIM, EPS, group, layer_id, device)
        weights = self.weights(torch.bfloat16)
        cos_sin, cache = self.rope.cos_sin_cache, (self.k_cache, self.v_cache, self.slots)
        return lambda: operator(self.qkv, *weights, self.positions, cos_sin, *cache)

    def build_stock(self, layer_id: int):
        from sglang.srt.models.minimax_m2 import MiniMaxM2RMSNormTP

        norms = self.norms(lambda heads: MiniMaxM2RMSNormTP(heads * HEAD_DIM, eps=EPS))

        def run():
            q, k, v = self.qkv.split(self.sizes, dim=-1)
            q, k = MiniMaxM2RMSNormTP.forward_qk(*norms, q.contiguous(), k.contiguous())
            q, k = self.rope(self.positions, q, k)
            self.store(k, v)

        return run

    def build_peer(self, layer_id: int):
        from sglang.srt.models.minimax_m2 import MiniMaxM2QKRMSNorm, MiniMaxM2RMSNormTP

        norm = MiniMaxM2QKRMSNorm(*self.norms(lambda heads: MiniMaxM2RMSNormTP(heads * HEAD_DIM, heads, eps=EPS)))

        def run():
            q, k, v = self.qkv.split(self.sizes, dim=-1)
            q, k = norm.forward(q, k)
            q, k = self.rope(self.positions, q, k)
            self.store(k, v)

        return run

    def norms(self, build):
        import torch

        built = []
        for heads, weight in zip(self.layout[:2], self.weights(torch.bfloat16), strict=True):
            norm = build(heads)
            norm.weight = torch.nn.Parameter(weight, requires_grad=False)
            built.append(norm)
        return built

    def store(self, k, v) -> None:
        from sglang.jit_kernel.kvcache import store_cache

        width = self.kv_heads * HEAD_DIM
        caches = self.k_cache.view(-1, width), self.v_cache.view(-1, width)
        store_cache(k.view(-1, width), v.view(-1, width), *caches, self.slots, row_bytes=width * 2)


def build_rope():
    import torch
    from sglang.srt.layers.rotary_embedding import get_rope

    with torch.device("cuda"):
        return get_rope(HEAD_DIM, ROTARY_DIM, MAX_POSITION, THETA, is_neox_style=True, dtype=torch.bfloat16)


def warm_up(engine: str, layout: Layout, tokens: list[int], rope) -> None:
    import torch

    for count in tokens:
        layer = Layer(engine, layout, 0, count, rope)
        layer.run()
        layer.run()
    torch.cuda.synchronize()


def replay_times(parallel_state, layers: list[Layer]) -> list[float]:
    """Microseconds a layer of every replay."""
    import torch

    for layer in layers:
        layer.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with parallel_state.graph_capture() as context, torch.cuda.graph(graph, stream=context.stream):
        for layer in layers:
            layer.run()
    torch.distributed.barrier()
    return graph_timing.replay_times(graph, len(layers), WARM_UP, REPLAYS)


def summary(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    at = {"p10": ordered[len(ordered) // 10], "p90": ordered[len(ordered) * 9 // 10]}
    return {"median": statistics.median(ordered), **at}


def slowest(of_this_rank: dict[str, float], world: int) -> dict[str, float]:
    import torch

    everyone = [None] * world
    torch.distributed.all_gather_object(everyone, of_this_rank)
    return max(everyone, key=lambda one: one["median"])


def measure_rank(engine: str, layout: Layout, rank: int, port: int, tokens: list[int], gate: Path) -> None:
    """Writes the file ready, waits for the file go, measures, and lets rank 0 write the result."""
    world = layout.ranks
    if engine == "ours":
        from sglang_minimax import overlay

        overlay.install()
    import torch

    parallel_state = start_rank(rank, world, port, max(tokens))
    with torch.inference_mode():
        rope = build_rope()
        warm_up(engine, layout, tokens, rope)
        (gate / f"ready.{engine}.{layout}.{rank}").touch()
        while not (gate / f"go.{engine}.{layout}").exists():
            time.sleep(0.01)
        result = {}
        for count in tokens:
            torch.manual_seed(count + rank)
            layers = [Layer(engine, layout, layer_id, count, rope) for layer_id in range(LAYERS)]
            result[count] = slowest(summary(replay_times(parallel_state, layers)), world)
            del layers
    if rank == 0:
        import sglang
        import triton

        versions = {"sglang": sglang.__version__, "torch": torch.__version__, "triton": triton.__version__}
        host = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "versions": versions}
        (gate / f"result.{engine}.{layout}.json").write_text(json.dumps({"host": host, "us_a_layer": result}))
    torch.distributed.barrier()
    os._exit(0)  # communicators of three engines end in three ways; nothing is left to save


# ---------------------------------------------------------------- all engines, one host


def start(engine: str, path: str | None, layout: Layout, options, gate: Path) -> list[subprocess.Popen]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = dict(os.environ)
    if path:
        environment["PYTHONPATH"] = path
        environment["SGLANG_MINIMAX_OVERLAY"] = "0"
    if engine == "peer":
        environment["SGLANG_USE_FUSED_PARALLEL_QKNORM"] = "1"
    numbers = ["--tokens", *map(str, options.tokens), "--gate", str(gate)]
    ranks = []
    for rank in range(layout.ranks):
        log = (gate / f"log.{engine}.{layout}.{rank}").open("w")
        command = [sys.executable, __file__, "--rank", engine, str(layout), str(rank), str(port), *numbers]
        ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return ranks


def wait_for(done, ranks: list[subprocess.Popen], seconds: float) -> bool:
    """Polls ``done`` until it holds; False once a rank failed or the time is over."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline or any(rank.poll() not in (None, 0) for rank in ranks):
            return False
        time.sleep(0.05)
    return True


def measure(paths: dict[str, str | None], layouts: list[Layout], options) -> dict:
    """{"engine layout": what rank 0 of it wrote}; an engine that fails is reported and left out."""
    gate = Path(tempfile.mkdtemp(prefix="qk_norm_rope."))
    started = {(e, layout): start(e, path, layout, options, gate) for layout in layouts for e, path in paths.items()}
    results, failed = {}, []
    for (engine, layout), ranks in started.items():
        ready = [gate / f"ready.{engine}.{layout}.{rank}" for rank in range(layout.ranks)]
        if not wait_for(lambda ready=ready: all(file.exists() for file in ready), ranks, options.seconds):
            failed.append((engine, layout))
            stop(ranks)
    for engine, layout in (key for key in started if key not in failed):
        ranks, result = started[engine, layout], gate / f"result.{engine}.{layout}.json"
        (gate / f"go.{engine}.{layout}").touch()
        if wait_for(result.exists, ranks, options.seconds):
            time.sleep(0.2)  # the file is there before its text is
            results[f"{engine} {layout}"] = json.loads(result.read_text())
        else:
            failed.append((engine, layout))
        stop(ranks)
    for engine, layout in failed:
        log = (gate / f"log.{engine}.{layout}.0").read_text()
        print(f"{engine} at {layout} failed: {log[-1500:]}", file=sys.stderr)
    return results


def stop(ranks: list[subprocess.Popen]) -> None:
    for rank in ranks:
        rank.kill()
        rank.wait()


def print_table(results: dict, layouts: list[Layout], tokens: list[int]) -> None:
    for layout in layouts:
        columns = [engine for engine in ENGINES if f"{engine} {layout}" in results]
        print(f"\n{layout} (q heads : KV heads : GPUs), microseconds a layer: median (10th to 90th percentile)")
        ratios = [f"{engine}/{columns[0]}" for engine in columns[1:]]
        print(f"{'tokens':>7}", *(f"{engine:>22}" for engine in columns), *(f"{ratio:>12}" for ratio in ratios))
        for count in tokens:
            at = [results[f"{engine} {layout}"]["us_a_layer"][str(count)] for engine in columns]
            cells = [f"{one['median']:7.2f} ({one['p10']:5.2f} to {one['p90']:5.2f})" for one in at]
            ratios = [f"{one['median'] / at[0]['median']:.2f}" for one in at[1:]]
            print(f"{count:>7}", *(f"{cell:>22}" for cell in cells), *(f"{ratio:>12}" for ratio in ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", type=Layout.parse, nargs="+", help="default: 48:8 on 1, 2, 4, 8 GPUs")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--stock", metavar="PATH", help="PYTHONPATH of sglang 0.5.10.post1")
    parser.add_argument("--peer", metavar="PATH", help="PYTHONPATH of sglang 0.5.11")
    parser.add_argument("--json", type=Path, help="write all numbers, with GPU and versions, here")
    parser.add_argument("--seconds", type=float, default=300, help="how long an engine may take to start or to measure")
    parser.add_argument("--rank", nargs=4, metavar=("ENGINE", "LAYOUT", "RANK", "PORT"), help=argparse.SUPPRESS)
    parser.add_argument("--gate", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        engine, layout, rank, port = options.rank
        return measure_rank(engine, Layout.parse(layout), int(rank), int(port), options.tokens, options.gate)

    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    layouts = options.layouts or [Layout(48, 8, n) for n in (1, 2, 4, 8) if n <= gpus]
    most = max((layout.ranks for layout in layouts), default=1)
    if most > gpus:
        sys.exit(f"{most} attention-TP ranks need {most} GPUs, one each, and this host has {gpus}: ask for less")
    paths = {"ours": None, **{e: p for e, p in (("stock", options.stock), ("peer", options.peer)) if p}}
    results = measure(paths, layouts, options)
    print_table(results, layouts, options.tokens)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
