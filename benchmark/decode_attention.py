#!/usr/bin/env python3
"""Times decode attention at MiniMax-M2's heads: the engine's Triton kernels, FlashAttention-3, and ours by plan.

    python benchmark/decode_attention.py --json out.json [--layouts 12:2 24:4] [--requests 1 16 64] [--contexts 516]
    python benchmark/decode_attention.py --plans --json out.json --seconds 120     all plans worth it
    python benchmark/decode_attention.py --plans 64/8/5/2/64/64                     these

A layout is q heads : KV heads of a rank, so 12:2 is TP4 of the published model. Each request has as many cached tokens
as ``--contexts`` says, in slots at random. ``mixed`` is one request of 32768 tokens among others of 512, ``spread:N``
requests of N / 4 to 7/4 N tokens, N on average; a single one has N / 4. A length that is a multiple of a plan's tile
may show a division at its best, so better 516 than 512. A case of more than 274560 tokens is left out.

A CUDA graph has 8 layers with caches of their own and, before each, a copy of q, which stands for the launch that
attention waits for; the time of a graph of these copies is subtracted. 10 replays to warm up, then 60, each between two
events; with ``--plans`` 20, and 60 for the best and for the one that a server has. Reported: the median, in
microseconds a layer, and the root mean square of the differences from float64, by that of the result.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import product
from pathlib import Path

import graph_timing

LAYERS, WARM_UP, REPLAYS, QUICK, BEST = 8, 10, 60, 20, 4
LONG, SHORT = 32768, 512  # tokens of a mixed batch's requests
CONTEXTS = ["516", "4100", "32768", "mixed", "spread:512", "spread:4096"]
SPREAD = "spread:"
MOST_TOKENS = 65 * 4224  # in a cache of one layer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=["12:2"])
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--contexts", nargs="+", type=context_named, default=CONTEXTS)
    parser.add_argument("--plans", nargs="*", help="block/warps/stages/ctas_per_sm/shortest/most, as in the class Plan")
    parser.add_argument("--seconds", type=float, default=300, help="no case is begun after these")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    from sglang_minimax import overlay

    overlay.install()
    import torch
    from sglang.srt.layers.minimax_decode_attention import Plan

    plans = [Plan(*map(int, plan.split("/"))) for plan in options.plans or []]
    if options.plans == []:
        plans = candidates()
    started, rows = time.monotonic(), {}
    with torch.inference_mode():
        for context, layout, requests in product(options.contexts, options.layouts, options.requests):
            name = f"{layout} {requests} x {context}"
            lengths = lengths_of(context, requests)
            if lengths is None:
                print(f"{name}: left out, of {MOST_TOKENS} tokens at most, and mixed of two requests at least")
                continue
            if time.monotonic() - started > options.seconds:
                print(f"{name}: left out, --seconds {options.seconds:g} are over")
                continue
            heads, kv_heads = map(int, layout.split(":"))
            rows[name] = case(lengths, heads, kv_heads, plans)
            print(name, {way: f"{row['us']:.2f}" for way, row in rows[name].items()}, flush=True)
    if options.json:
        record = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        options.json.write_text(json.dumps(record, indent=1))
    return 0


def context_named(text: str) -> str:
    """``text``, if it is one of ``--contexts``."""
    tokens = text.removeprefix(SPREAD)
    if text != "mixed" and not (tokens.isdecimal() and int(tokens) >= (1 if tokens == text else 4)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens, mixed, or {SPREAD}N with N of 4 or more")
    return text


def lengths_of(context: str, requests: int) -> list[int] | None:
    """Cached tokens of each request, or None for more than a case may have, or a mixed batch of one."""
    if context.startswith(SPREAD):
        middle = int(context.removeprefix(SPREAD))
        shortest, longest = middle // 4, middle // 4 + middle * 3 // 2
        places = [i * 37 % requests for i in range(requests)]  # neither the longest nor the shortest first
        lengths = [shortest + (longest - shortest) * place // max(requests - 1, 1) for place in places]
    elif context == "mixed":
        lengths = [LONG] + [SHORT] * (requests - 1)
    else:
        lengths = [int(context)] * requests
    return lengths if sum(lengths) <= MOST_TOKENS and (context != "mixed" or requests > 1) else None


def candidates() -> list:
    from sglang.srt.layers.minimax_decode_attention import Plan

    found: list = []
    for block, warps, stages in ((32, 4, 3), (64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 8, 3), (128, 8, 2), (128, 8, 3)):
        for ctas, shortest, most in product((1, 2, 3, 4), (64, 128), (64, 1024)):
            plan = Plan(block, warps, stages, ctas, max(shortest, block), most)
            found += [plan] if plan not in found else []
    return found


def case(lengths: list[int], heads: int, kv_heads: int, plans: list) -> dict[str, dict[str, float]]:
    """For each way the microseconds of a layer and the error."""
    import torch
    from sglang.srt.layers.minimax_decode_attention import HEAD_DIM, CachedTokens, decode_attention, plan_for

    requests, used = len(lengths), sum(lengths)
    order = torch.randperm(used, device="cuda").int()
    counts = torch.tensor(lengths, device="cuda")
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    ragged = CachedTokens(indptr, order.long(), True)
    table = torch.zeros(requests, max(lengths), dtype=torch.int32, device="cuda")
    for row, slots in zip(table, order.split(lengths), strict=True):
        row[: len(slots)] = slots
    source = torch.randn(LAYERS, requests, heads * HEAD_DIM, device="cuda").bfloat16()
    q = torch.empty_like(source)
    caches = torch.randn(LAYERS, 2, used, kv_heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    counters = torch.zeros(requests * kv_heads, dtype=torch.int32, device="cuda")
    layers = [(q[i], caches[i, 0], caches[i, 1]) for i in range(LAYERS)]
    exact = attention_in_float64(source[0], caches[0], order.split(lengths), kv_heads)

    def timed(attend, replays: int = REPLAYS) -> dict[str, float]:
        def layer(i: int):
            q[i].copy_(source[i])
            return attend(*layers[i])

        q.copy_(source)
        error = (attend(*layers[0]).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        numbers = [(i,) for i in range(LAYERS)]
        copies = graph_timing.graph_time(lambda i: q[i].copy_(source[i]), numbers, WARM_UP, replays)
        return {"us": graph_timing.graph_time(layer, numbers, WARM_UP, replays) - copies, "error": error.item()}

    def ours(plan):
        return lambda *tensors: decode_attention(*tensors, ragged, counters, plan)

    found = {f"triton, {splits}": timed(engines_triton(ragged, lengths, splits)) for splits in (8, 32)}
    flash = flash_attention(table, counts.int(), heads)
    if flash is not None:
        found["fa3"] = timed(flash)
    served, rows = plan_for(requests, kv_heads), CachedTokens(counts.int(), table, False)
    found["served"] = timed(ours(served))
    found["served, of a table"] = timed(lambda *tensors: decode_attention(*tensors, rows, counters, served))
    quick = {plan: timed(ours(plan), QUICK)["us"] for plan in plans}
    for plan in sorted(quick, key=quick.get)[:BEST]:
        found["/".join(map(str, plan))] = timed(ours(plan))
    return found


def attention_in_float64(q, caches, slots, kv_heads: int):
    """[requests, heads * head_dim]."""
    import torch
    from sglang.srt.layers.minimax_decode_attention import HEAD_DIM

    results = []
    for one, own in zip(q.double(), slots, strict=True):
        k, v = (cache[own.long()].double().transpose(0, 1) for cache in caches)
        weights = (one.view(kv_heads, -1, HEAD_DIM) @ k.transpose(1, 2) * HEAD_DIM**-0.5).softmax(-1)
        results.append((weights @ v).flatten())
    return torch.stack(results)


def engines_triton(cached, lengths: list[int], splits: int):
    """The engine's function, with the division that its backend would choose for these lengths."""
    import torch
    from sglang.srt.layers.attention.triton_backend import get_num_kv_splits_triton
    from sglang.srt.layers.attention.triton_ops.decode_attention import decode_attention_fwd
    from sglang.srt.layers.minimax_decode_attention import HEAD_DIM

    requests = len(lengths)
    chosen = torch.empty(requests, dtype=torch.int32, device="cuda")
    counts = torch.tensor(lengths, device="cuda")
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count

    def attend(q, k_cache, v_cache):
        heads, kv_heads = q.shape[1] // HEAD_DIM, k_cache.shape[1]
        if attend.buffers is None:
            get_num_kv_splits_triton[(1,)](
                chosen, counts, requests, 1, heads, kv_heads, splits, multiprocessors,
                MAX_NUM_SEQ=max(256, 1 << (requests - 1).bit_length()),
            )  # fmt: skip
            sizes = (requests, heads, splits)
            attend.buffers = (
                torch.empty(*sizes, HEAD_DIM, device="cuda"), torch.empty(sizes, device="cuda"),
            )  # fmt: skip
        out = torch.empty_like(q)
        decode_attention_fwd(
            q.view(requests, heads, HEAD_DIM), k_cache, v_cache, out.view(requests, heads, HEAD_DIM), cached.bounds,
            cached.slots, *attend.buffers, chosen, splits, HEAD_DIM**-0.5, 1.0, 1.0,
        )  # fmt: skip
        return out

    attend.buffers = None
    return attend


def flash_attention(table, counts, heads: int):
    """FlashAttention-3 as the engine's backend calls it, or None where its library is not there."""
    import torch
    from sglang.srt.layers.minimax_decode_attention import HEAD_DIM

    try:
        from sgl_kernel.flash_attn import flash_attn_with_kvcache
    except ImportError:
        return None
    starts = torch.arange(len(counts) + 1, dtype=torch.int32, device="cuda")

    def attend(q, k_cache, v_cache):
        return flash_attn_with_kvcache(
            q=q.view(-1, heads, HEAD_DIM), k_cache=k_cache.unsqueeze(1), v_cache=v_cache.unsqueeze(1), page_table=table,
            cache_seqlens=counts, cu_seqlens_q=starts, max_seqlen_q=1, softmax_scale=HEAD_DIM**-0.5, causal=True,
        ).view_as(q)  # fmt: skip

    return attend


if __name__ == "__main__":
    sys.exit(main())
