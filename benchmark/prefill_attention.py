#!/usr/bin/env python3
"""Times the attention of short prefills at MiniMax-M2's heads: the engine's Triton kernel, and ours by plan.

    python benchmark/prefill_attention.py --json out.json [--layouts 12:2 48:8] [--batches 128 128+8000 16x64]
    python benchmark/prefill_attention.py --plans --json out.json --seconds 120     all plans worth it
    python benchmark/prefill_attention.py --plans 64/64/4/3                          these

A layout is q heads : KV heads of a rank, so 12:2 is TP4 of the published model. A batch ``RxN+C`` is R requests (one,
if left out) of N new tokens behind C (none) that are in the KV cache, in slots at random.

A CUDA graph has 8 layers with caches of their own and, before each, a copy of q, which stands for the launch that
attention waits for; the time of a graph of these copies is subtracted. 10 replays to warm up, then 60, each between two
events; with ``--plans`` 20, and 60 for the best and for the one that a server has. Reported: the median, in
microseconds a layer, and the root mean square of the differences from float64, by that of the result.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from itertools import product
from pathlib import Path

import graph_timing

LAYERS, WARM_UP, REPLAYS, QUICK, BEST = 8, 10, 60, 20, 4
BATCHES = ["16", "64", "128", "256", "512", "1024", "128+2000", "128+8000", "512+7000", "8x64", "32x16"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=["12:2"])
    parser.add_argument("--batches", nargs="+", type=batch_named, default=[batch_named(name) for name in BATCHES])
    parser.add_argument("--plans", nargs="*", help="rows/block/warps/stages, as in the class Plan")
    parser.add_argument("--seconds", type=float, default=300, help="no case is begun after these")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    from sglang_minimax import overlay

    overlay.install()
    import torch
    from sglang.srt.layers.minimax_prefill_attention import Plan

    plans = [Plan(*map(int, plan.split("/"))) for plan in options.plans or []]
    if options.plans == []:
        plans = candidates()
    started, rows = time.monotonic(), {}
    with torch.inference_mode():
        for layout, (batch, *sizes) in product(options.layouts, options.batches):
            name = f"{layout} {batch}"
            if time.monotonic() - started > options.seconds:
                print(f"{name}: left out, --seconds {options.seconds:g} are over")
                continue
            heads, kv_heads = map(int, layout.split(":"))
            rows[name] = case(*sizes, heads, kv_heads, plans)
            print(name, {way: f"{row['us']:.2f}" for way, row in rows[name].items()}, flush=True)
    if options.json:
        record = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        options.json.write_text(json.dumps(record, indent=1))
    return 0


def batch_named(text: str) -> tuple[str, int, int, int]:
    """``text``, if it is one of ``--batches``: its requests, new tokens and cached tokens of each."""
    found = re.fullmatch(r"(?:(\d+)x)?(\d+)(?:\+(\d+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no batch: RxN+C, as 128, 128+8000 or 16x64")
    requests, new, cached = (int(one or default) for one, default in zip(found.groups(), (1, 0, 0), strict=True))
    return text, requests, new, cached


def candidates() -> list:
    from sglang.srt.layers.minimax_prefill_attention import Plan

    shapes = [(16, 64, 4), (32, 64, 4), (64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 64, 8), (128, 128, 8)]
    return [Plan(*shape, stages) for shape in shapes for stages in (2, 3)]


def case(requests: int, new: int, cached: int, heads: int, kv_heads: int, plans: list) -> dict[str, dict[str, float]]:
    """For each way the microseconds of a layer and the error."""
    import torch
    from sglang.srt.layers.minimax_prefill_attention import HEAD_DIM, PrefillBatch, plan_for, prefill_attention

    tokens, used = requests * new, requests * (new + cached)
    order = torch.randperm(used, device="cuda").int().view(requests, new + cached)
    source = torch.randn(LAYERS, tokens, heads * HEAD_DIM, device="cuda").bfloat16()
    q = torch.empty_like(source)
    caches = torch.randn(LAYERS, 2, used, kv_heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    layers = [(q[i], caches[i, 0], caches[i, 1]) for i in range(LAYERS)]
    exact = attention_in_float64(source[0], caches[0], order, new)
    batch = PrefillBatch(order)
    lengths = torch.full((requests,), new, dtype=torch.int32, device="cuda")
    batch.fill(lengths, lengths.long() + cached, torch.arange(requests, device="cuda"), tokens)

    def timed(attend, replays: int = REPLAYS) -> dict[str, float]:
        def layer(i: int):
            q[i].copy_(source[i])
            return attend(*layers[i])

        q.copy_(source)
        torch.cuda.synchronize()
        error = (attend(*layers[0]).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        numbers = [(i,) for i in range(LAYERS)]
        copies = graph_timing.graph_time(lambda i: q[i].copy_(source[i]), numbers, WARM_UP, replays)
        return {"us": graph_timing.graph_time(layer, numbers, WARM_UP, replays) - copies, "error": error.item()}

    def ours(plan):
        return lambda *tensors: prefill_attention(*tensors, batch, plan)

    found = {"triton": timed(engines_triton(order, new, cached))}
    found["served"] = timed(ours(plan_for(tokens, heads)))
    quick = {plan: timed(ours(plan), QUICK)["us"] for plan in plans}
    for plan in sorted(quick, key=quick.get)[:BEST]:
        found["/".join(map(str, plan))] = timed(ours(plan))
    return found


def attention_in_float64(q, caches, slots, new: int):
    """[tokens, heads * head_dim]."""
    import torch
    from sglang.srt.layers.minimax_prefill_attention import HEAD_DIM

    results = []
    for one, own in zip(q.split(new), slots, strict=True):
        k, v = (cache[own.long()].double().permute(1, 0, 2)[:, None] for cache in caches)
        heads = one.double().view(new, len(k), -1, HEAD_DIM).permute(1, 2, 0, 3)
        hidden = torch.ones(new, len(own), dtype=torch.bool, device=q.device).triu(len(own) - new + 1)
        weights = (heads @ k.transpose(2, 3) * HEAD_DIM**-0.5).masked_fill(hidden, float("-inf")).softmax(-1)
        results.append((weights @ v).permute(2, 0, 1, 3).reshape(new, -1))
    return torch.cat(results)


def engines_triton(slots, new: int, cached: int):
    """The engine's function, with the new tokens' keys and values contiguous, as its backend gives them."""
    import torch
    from sglang.srt.layers.attention.triton_ops.extend_attention import extend_attention_fwd
    from sglang.srt.layers.minimax_prefill_attention import HEAD_DIM

    requests = len(slots)
    counts = torch.arange(requests + 1, dtype=torch.int32, device="cuda")
    starts, starts_of_cached = counts * new, counts * cached
    before, own = slots[:, :cached].flatten().long(), slots[:, cached:].flatten().long()
    new_ones: dict = {}

    def attend(q, k_cache, v_cache):
        key = k_cache.data_ptr()
        if key not in new_ones:
            new_ones[key] = k_cache[own].contiguous(), v_cache[own].contiguous()
        out = torch.empty_like(q)
        extend_attention_fwd(
            q.view(len(q), -1, HEAD_DIM), *new_ones[key], out.view(len(q), -1, HEAD_DIM), k_cache, v_cache,
            starts, starts_of_cached, before, None, True, None, new, 1.0, 1.0, HEAD_DIM**-0.5,
        )  # fmt: skip
        return out

    return attend


if __name__ == "__main__":
    sys.exit(main())
