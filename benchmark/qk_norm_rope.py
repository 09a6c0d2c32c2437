#!/usr/bin/env python3
"""Times QK norm + partial RoPE + KV-cache store of MiniMax-M2: ours beside other engines, on the GPUs of one host.

    python benchmark/qk_norm_rope.py                                    # ours alone
    python benchmark/qk_norm_rope.py --stock STOCK_PATH --peer PEER_PATH --json out.json

STOCK_PATH and PEER_PATH are what PYTHONPATH must be for that engine: sglang 0.5.10.post1 without the overlay, and
sglang 0.5.11, whose own fused QK norm is then switched on. Each engine runs in processes of its own, one a GPU. All of
them start, compile and warm up together; then they measure one after the other, so that nothing else uses the GPUs.
Two GPUs with --heads 24 --kv-heads 4 give each the rows of TP4, with one peer instead of three.

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

HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM, EPS, THETA = 48, 8, 128, 64, 1e-6, 5_000_000
LAYERS, WARM_UP, REPLAYS, MAX_POSITION = 8, 20, 200, 32768
TOKENS = [1, 4, 16, 64, 128, 256, 512, 1024, 4096, 16384]
ENGINES = ("ours", "stock", "peer")


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

    def __init__(self, engine: str, world: int, layer_id: int, tokens: int, rope) -> None:
        import torch

        self.heads, self.kv_heads = HEADS // world, max(1, KV_HEADS // world)
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
        operator = QKNormRope(HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM, EPS, group, layer_id, device)
        weights = self.weights(torch.bfloat16)
        cos_sin, cache = self.rope.cos_sin_cache, (self.k_cache, self.v_cache, self.slots)
        return lambda: operator(self.qkv, *weights, self.positions, cos_sin, *cache)

    def build_stock(self, layer_id: int):
        from sglang.srt.models.minimax_m2 import MiniMaxM2RMSNormTP

        norms = self.norms(MiniMaxM2RMSNormTP)

        def run():
            q, k, v = self.qkv.split(self.sizes, dim=-1)
            q, k = MiniMaxM2RMSNormTP.forward_qk(*norms, q.contiguous(), k.contiguous())
            q, k = self.rope(self.positions, q, k)
            self.store(k, v)

        return run

    def build_peer(self, layer_id: int):
        from sglang.srt.models.minimax_m2 import MiniMaxM2QKRMSNorm, MiniMaxM2RMSNormTP

        norm = MiniMaxM2QKRMSNorm(*self.norms(MiniMaxM2RMSNormTP))

        def run():
            q, k, v = self.qkv.split(self.sizes, dim=-1)
            q, k = norm.forward(q, k)
            q, k = self.rope(self.positions, q, k)
            self.store(k, v)

        return run

    def norms(self, norm_class):
        import torch

        built = []
        for heads, weight in zip((HEADS, KV_HEADS), self.weights(torch.bfloat16), strict=True):
            norm = norm_class(heads * HEAD_DIM, eps=EPS)
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


def warm_up(engine: str, world: int, tokens: list[int], rope) -> None:
    import torch

    for count in tokens:
        layer = Layer(engine, world, 0, count, rope)
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
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(WARM_UP + REPLAYS)]
    for before, after in events:
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) * 1000 / len(layers) for before, after in events[WARM_UP:]]


def summary(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    at = {"p10": ordered[len(ordered) // 10], "p90": ordered[len(ordered) * 9 // 10]}
    return {"median": statistics.median(ordered), **at}


def slowest(of_this_rank: dict[str, float], world: int) -> dict[str, float]:
    import torch

    everyone = [None] * world
    torch.distributed.all_gather_object(everyone, of_this_rank)
    return max(everyone, key=lambda one: one["median"])


def measure_rank(engine: str, rank: int, world: int, port: int, tokens: list[int], gate: Path) -> None:
    """Writes the file ready, waits for the file go, measures, and lets rank 0 write the result."""
    if engine == "ours":
        from sglang_minimax import overlay

        overlay.install()
    import torch

    parallel_state = start_rank(rank, world, port, max(tokens))
    with torch.inference_mode():
        rope = build_rope()
        warm_up(engine, world, tokens, rope)
        (gate / f"ready.{engine}.{world}.{rank}").touch()
        while not (gate / f"go.{engine}.{world}").exists():
            time.sleep(0.01)
        result = {}
        for count in tokens:
            torch.manual_seed(count + rank)
            layers = [Layer(engine, world, layer_id, count, rope) for layer_id in range(LAYERS)]
            result[count] = slowest(summary(replay_times(parallel_state, layers)), world)
            del layers
    if rank == 0:
        import sglang
        import triton

        versions = {"sglang": sglang.__version__, "torch": torch.__version__, "triton": triton.__version__}
        host = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "versions": versions}
        (gate / f"result.{engine}.{world}.json").write_text(json.dumps({"host": host, "us_a_layer": result}))
    torch.distributed.barrier()
    os._exit(0)  # communicators of three engines end in three ways; nothing is left to save


# ---------------------------------------------------------------- all engines, one host


def start(engine: str, path: str | None, world: int, options, gate: Path) -> list[subprocess.Popen]:
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
    numbers += ["--heads", str(options.heads), "--kv-heads", str(options.kv_heads)]
    ranks = []
    for rank in range(world):
        log = (gate / f"log.{engine}.{world}.{rank}").open("w")
        command = [sys.executable, __file__, "--rank", engine, str(rank), str(world), str(port), *numbers]
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


def measure(paths: dict[str, str | None], worlds: list[int], options) -> dict:
    gate, seconds = Path(tempfile.mkdtemp(prefix="qk_norm_rope.")), options.seconds
    started = {(e, w): start(e, path, w, options, gate) for w in worlds for e, path in paths.items()}
    results, failed = {}, []
    for (engine, world), ranks in started.items():
        ready = [gate / f"ready.{engine}.{world}.{rank}" for rank in range(world)]
        result = gate / f"result.{engine}.{world}.json"
        if not wait_for(lambda ready=ready: all(file.exists() for file in ready), ranks, seconds):
            failed.append((engine, world))
            for rank in ranks:
                rank.kill()
    for engine, world in (key for key in started if key not in failed):
        ranks, result = started[engine, world], gate / f"result.{engine}.{world}.json"
        (gate / f"go.{engine}.{world}").touch()
        if wait_for(result.exists, ranks, seconds):
            time.sleep(0.2)
            results[f"{engine} tp{world}"] = json.loads(result.read_text())
        else:
            failed.append((engine, world))
        for rank in ranks:
            rank.kill()
            rank.wait()
    for engine, world in failed:
        print(f"{engine} at TP{world} failed:", (gate / f"log.{engine}.{world}.0").read_text()[-1500:], file=sys.stderr)
    return results


def print_table(results: dict, worlds: list[int], tokens: list[int]) -> None:
    for world in worlds:
        columns = [engine for engine in ENGINES if f"{engine} tp{world}" in results]
        print(f"\nTP{world}, microseconds a layer: median (10th to 90th percentile)")
        print(f"{'tokens':>7}", *(f"{engine:>22}" for engine in columns), *(f"{e + '/ours':>12}" for e in columns[1:]))
        for count in tokens:
            at = [results[f"{engine} tp{world}"]["us_a_layer"][str(count)] for engine in columns]
            cells = [f"{one['median']:7.2f} ({one['p10']:5.2f} to {one['p90']:5.2f})" for one in at]
            ratios = [f"{one['median'] / at[0]['median']:.2f}" for one in at[1:]]
            print(f"{count:>7}", *(f"{cell:>22}" for cell in cells), *(f"{ratio:>12}" for ratio in ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, nargs="+", help="attention-TP sizes; default: 1, 2, 4, 8, as GPUs allow")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--heads", type=int, default=HEADS, help="q heads of the whole model")
    parser.add_argument("--kv-heads", type=int, default=KV_HEADS, help="KV heads of the whole model")
    parser.add_argument("--stock", metavar="PATH", help="PYTHONPATH of sglang 0.5.10.post1")
    parser.add_argument("--peer", metavar="PATH", help="PYTHONPATH of sglang 0.5.11")
    parser.add_argument("--json", type=Path, help="write all numbers, with GPU and versions, here")
    parser.add_argument("--seconds", type=float, default=300, help="how long an engine may take to start or to measure")
    parser.add_argument("--rank", nargs=4, metavar=("ENGINE", "RANK", "WORLD", "PORT"), help=argparse.SUPPRESS)
    parser.add_argument("--gate", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    globals().update(HEADS=options.heads, KV_HEADS=options.kv_heads)
    if options.rank:
        engine, *numbers = options.rank
        return measure_rank(engine, *map(int, numbers), options.tokens, options.gate)

    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    worlds = options.tp or [n for n in (1, 2, 4, 8) if n <= gpus]
    if not worlds or max(worlds) > gpus:
        sys.exit(f"{options.tp or 'a'} attention-TP size was asked for, and this host has {gpus} GPUs: it needs one a rank")
    paths = {"ours": None, **{e: p for e, p in (("stock", options.stock), ("peer", options.peer)) if p}}
    results = measure(paths, worlds, options)
    print_table(results, worlds, options.tokens)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
