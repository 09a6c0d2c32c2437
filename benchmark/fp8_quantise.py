#!/usr/bin/env python3
"""Times what quantises a prefill's activations to FP8, and the layers around it: the engine's way and ours.

    python benchmark/fp8_quantise.py --json out.json [--tokens 2048 8192] [--time-limit 50]

At the sizes of a rank of TP4 (hidden size 3072, 12 query and 2 KV heads, 256 experts of width 384), microseconds each:

    experts         from hidden states to their sum, by the tables that a server has; uniform: each token's experts at
                    random; same: all tokens take the same eight, as with dummy weights
    qkv, o          attention's projections, cutlass
    x for ...       the quantisation alone, with the layout of scales that its consumer wants, by plan: groups of a
                    CTA/its warps
    SiLU for down   silu(gate) * up with its quantisation

Protocol: a CUDA graph of launches that go through 160 MB of inputs at least, since the L2 cache holds 50 (the experts:
of 4, each with a routing); 5 replays to warm up, then 50, each between two events; the median. In a model the launch
before has left a part of the input in the L2 cache. Checked before anything is timed: values and scales have the bits
of plain torch's, SiLU lies within bfloat16 of float64, and what projections and experts make of them is as near to the
engine's output as its own rounding to FP8 allows.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import expert_gemms as gemms
import graph_timing
import torch

TOKENS, WARM_UP, REPLAYS, L2_BYTES = [2048, 8192, 512], 5, 50, 160_000_000
HIDDEN_SIZE, WIDTH, PROJECTIONS = 3072, 384, {"qkv": (2048, 3072), "o": (3072, 1536)}  # outputs, inputs
PLANS = [(16, 4), (8, 4), (32, 4), (32, 8)]
NEAR = 0.02  # relative difference of the norm from the engine's output: FP8 values beside a limit may be the next ones
ALLOWED_ERROR = 2.5e-3  # relative, of the norm, from float64 of the same FP8 values: bfloat16's rounding makes 1.7e-3


def graph_time(function, arguments: list[tuple]) -> float:
    return graph_timing.graph_time(function, arguments, WARM_UP, REPLAYS)


def inputs_of(rows: int, columns: int) -> list[tuple]:
    """As many as the L2 cache does not hold, at least 3."""
    count = max(3, -(-L2_BYTES // (rows * columns * 2)))
    return [(torch.randn(rows, columns, device="cuda").bfloat16(),) for _ in range(min(count, 64))]


def relative(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def require(held: bool, what: str) -> None:
    if not held:
        raise RuntimeError(f"{what}: nothing of this is timed")


def unequal(found, expected) -> float:
    """The share of values that differ from the engine's, by their bits or their scales."""
    scales = [scale.repeat_interleave(128, 1) for _, scale in (found, expected)]
    return float(((found[0].float() != expected[0].float()) | (scales[0] != scales[1])).double().mean())


def quantisation(tokens: int) -> dict[str, tuple]:
    """By name: inputs, the engine's function of one, and ours of one and a plan."""
    from sglang.srt.layers import minimax_fp8_quantise as ours
    from sglang.srt.layers.moe.fused_moe_triton import fused_moe
    from sglang.srt.layers.quantization import fp8_kernel, fp8_utils

    def silu(gate_up):
        out = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2, device=gate_up.device, dtype=gate_up.dtype)
        fused_moe.silu_and_mul(gate_up, out)
        return fp8_kernel.sglang_per_token_group_quant_fp8(out, 128)

    hidden = inputs_of(tokens, HIDDEN_SIZE)
    aligned = {"column_major_scales": True, "scale_tma_aligned": True}
    return {
        "SiLU for down": (inputs_of(tokens * 8, 2 * WIDTH), silu, ours.quantise_activated),
        "x for experts": (hidden, lambda x: fp8_kernel.sglang_per_token_group_quant_fp8(x, 128), ours.quantise),
        "x for qkv, cutlass": (
            hidden,
            lambda x: fp8_utils.per_token_group_quant_fp8(x, 128, column_major_scales=True),
            lambda x, plan: ours.quantise(x, column_major=True, plan=plan),
        ),
        "x for o, cutlass": (
            inputs_of(tokens, PROJECTIONS["o"][1]),
            lambda x: fp8_utils.per_token_group_quant_fp8(x, 128, column_major_scales=True),
            lambda x, plan: ours.quantise(x, column_major=True, plan=plan),
        ),
        "x for qkv, DeepGEMM": (
            hidden,
            lambda x: fp8_kernel.sglang_per_token_group_quant_fp8(x, 128, **aligned),
            lambda x, plan: ours.quantise(x, column_major=True, tma_aligned=True, plan=plan),
        ),
    }


def measure_quantisation(inputs: list[tuple], engine, ours, activates: bool) -> dict[str, Any]:
    from sglang.srt.layers import minimax_fp8_quantise as module

    x = inputs[0][0]
    row: dict[str, Any] = {"engine": graph_time(engine, inputs), "ours": {}}
    for plan in PLANS:
        found = ours(x, plan=plan)
        if activates:
            values = found[0].double() * found[1].double().repeat_interleave(128, 1)
            q, scale = module.quantise_reference(module.activated_reference(x))
            expected = q.double() * scale.double().repeat_interleave(128, 1)
            require(relative(values, expected) < NEAR, f"SiLU by plan {plan} is {relative(values, expected)} off")
        else:
            require(unequal(found, module.quantise_reference(x)) == 0, f"plan {plan} has other bits than plain torch")
        row["unequal to the engine"] = unequal(found, engine(x))
        row["ours"]["/".join(map(str, plan))] = graph_time(lambda x, plan=plan: ours(x, plan=plan), inputs)
    return row


def measure_projection(tokens: int, outputs: int, inputs: int) -> dict[str, Any]:
    from types import SimpleNamespace

    from sglang.srt.layers import minimax_fp8_linear, minimax_fp8_quantise
    from sglang.srt.layers.quantization import fp8_utils

    engine = fp8_utils.cutlass_w8a8_block_fp8_linear_with_fallback
    method = SimpleNamespace(w8a8_block_fp8_linear=engine)
    layers = []
    for (x,) in inputs_of(tokens, inputs):
        weight = torch.randn(outputs, inputs, device=x.device).to(torch.float8_e4m3fn)
        scale = (0.5 + torch.rand(outputs // 128, inputs // 128, device=x.device)) * inputs**-0.5
        layers.append((x, SimpleNamespace(weight=weight, weight_scale_inv=scale, quant_method=method)))
    products = {id(layer): minimax_fp8_linear.choose_product(layer) for _, layer in layers}

    def ours(x, layer):
        return products[id(layer)](x)

    def stock(x, layer):
        return engine(x, layer.weight, [128, 128], layer.weight_scale_inv)

    x, layer = layers[0]
    out = ours(x, layer)
    difference = relative(out, stock(x, layer))
    require(difference < NEAR, f"a projection of {inputs} to {outputs} is {difference} off the engine's")
    q, q_scale = minimax_fp8_quantise.quantise_reference(x)
    wide = layer.weight_scale_inv.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    exact = (q.double() * q_scale.double().repeat_interleave(128, 1)) @ (layer.weight.double() * wide).T
    error = relative(out, exact)
    require(error < ALLOWED_ERROR, f"a projection of {inputs} to {outputs} is {error} off float64")
    row = {"engine": graph_time(stock, layers), "ours": graph_time(ours, layers)}
    return {**row, "difference": difference, "error": error}


def measure_experts(problem, routing: str) -> dict[str, Any]:
    from sglang.srt.layers.minimax_experts_prefill import minimax_experts_of_many
    from sglang.srt.layers.moe.fused_moe_triton.fused_moe import outplace_fused_experts

    if routing == "same":
        eight = torch.arange(8, device=problem.hidden.device, dtype=torch.int32) * (gemms.EXPERTS // 8)
        problem.routings = [eight.expand(problem.tokens, 8).contiguous() for _ in problem.routings]
    weights = problem.weights
    of_experts = [part[stage] for stage in gemms.STAGES for part in (weights.b, weights.scale)]

    def engine(ids):
        return problem.whole_of(outplace_fused_experts, ids)

    def ours(ids):
        return minimax_experts_of_many(problem.hidden, problem.topk_weights, ids, *of_experts)

    ids = problem.routings[-1]
    out, stock = ours(ids), engine(ids)
    require(relative(out, stock) < NEAR, f"the experts' sum is {relative(out, stock)} off the engine's")
    require(torch.equal(out, ours(ids)), "the experts' sum has other bits the second time")
    calls = [(ids,) for ids in problem.routings]
    row = {"engine": graph_time(engine, calls), "ours": graph_time(ours, calls), "difference": relative(out, stock)}
    if routing == "uniform" and problem.tokens <= 2048:
        exact = problem.reference()
        row["error"] = {"engine": relative(stock, exact), "ours": relative(out, exact)}
    return row


def print_row(name: str, row: dict[str, Any]) -> None:
    ours = row["ours"] if isinstance(row["ours"], dict) else {"": row["ours"]}
    times = "  ".join(f"{plan} {us:.2f}".strip() for plan, us in ours.items())
    rest = {key: value for key, value in row.items() if key not in ("engine", "ours")}
    print(f"{name:<28} engine {row['engine']:8.2f}  ours {times}  ({row['engine'] / min(ours.values()):.2f})  {rest}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="where to write all numbers")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--time-limit", type=float, default=50, help="seconds, after which nothing else is begun")
    options = parser.parse_args()
    deadline = time.monotonic() + options.time_limit
    from sglang_minimax import overlay

    overlay.install()
    kernels = gemms.engine()
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "us": {}}

    def record(name: str, measure) -> None:
        if time.monotonic() > deadline:
            print(f"the time limit came before {name}")
            return
        try:
            results["us"][name] = row = measure()
        except Exception as error:  # one that is wrong or cannot run must not hide the others
            print(f"{name}: {type(error).__name__}: {error}")
            results["us"][name] = {"failed": str(error)}
            return
        print_row(name, row)
        if options.json:
            with open(options.json, "w", encoding="utf-8") as stream:
                json.dump(results, stream, indent=1)

    torch.manual_seed(0)
    with torch.inference_mode():
        weights = gemms.Weights(gemms.Shape(gemms.EXPERTS, WIDTH))
        for tokens in options.tokens:
            for routing in ("same", "uniform"):
                problem = gemms.Problem(kernels, weights, tokens)
                record(f"experts {tokens} {routing}", lambda p=problem, r=routing: measure_experts(p, r))
            for name, shape in PROJECTIONS.items():
                record(f"{name} {tokens}", lambda t=tokens, s=shape: measure_projection(t, *s))
            for name, case in quantisation(tokens).items():
                activates = name.startswith("SiLU")
                record(f"{name} {tokens}", lambda c=case, a=activates: measure_quantisation(*c, a))


if __name__ == "__main__":
    main()
