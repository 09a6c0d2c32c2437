"""The engine's Triton expert GEMMs in FP8 (blocks of 128 x 128) outside a server, in shapes of MiniMax-M2.

:func:`engine` makes its kernel module ready, :class:`Problem` runs it on random experts and routings, and
:func:`launch_arguments` are what it would launch, for compiling without a GPU. What is invoked is the engine's own
kernel through its own invocation.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple

HIDDEN_SIZE, EXPERTS, TOP_K, BLOCK = 3072, 256, 8, 128
Config = dict[str, Any]


class Shape(NamedTuple):
    """Experts of a rank and its part of their width."""

    experts: int
    width: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        shape = cls(*map(int, text.split(":")))
        if shape.width % BLOCK:
            raise argparse.ArgumentTypeError(
                f"{text}: a width of {shape.width} is no multiple of {BLOCK}, the block of the FP8 scales; the engine "
                f"refuses it too. Divide the experts over EP ranks instead."
            )
        return shape

    def __str__(self) -> str:
        return f"{self.experts}:{self.width}"


class Stage(NamedTuple):
    """gate_up reads tokens and writes routes; down reads routes and multiplies by the routing weight."""

    name: str
    top_k: int
    weighted: bool


GATE_UP, DOWN = Stage("gate_up", TOP_K, False), Stage("down", 1, True)
STAGES = (GATE_UP, DOWN)


class NoServer:
    """Stands in for the server's arguments: every option off."""

    def __getattr__(self, name):
        return None


def engine():
    """The engine's kernel module, ready to be invoked outside a server."""
    from sglang.srt import server_args

    server_args.set_global_server_args_for_scheduler(NoServer())
    from sglang.srt.layers.moe.fused_moe_triton import fused_moe_triton_kernels

    return fused_moe_triton_kernels


def invoke(kernels, stage: Stage, a, b, c, b_scale, weights, ids, aligned, block: Config, filtered: bool) -> None:
    """One expert GEMM as the engine launches it; ``a`` is quantised already, see :class:`Problem`."""
    import triton.language as tl

    tma = block.get("USE_TMA", False)
    kernels.invoke_fused_moe_kernel(
        a, b, None, c, None, b_scale, None, weights, ids, *aligned, stage.weighted, stage.top_k,
        {key: value for key, value in block.items() if key != "USE_TMA"},
        compute_type=tl.bfloat16, use_fp8_w8a8=True, use_int8_w8a8=False, use_int8_w8a16=False, use_int4_w4a16=False,
        per_channel_quant=False, block_shape=[BLOCK, BLOCK], filter_expert=filtered,
        a_use_tma=tma, b_use_tma=tma, router_topk=TOP_K,
    )  # fmt: skip


def sizes_of(shape: Shape, stage: Stage) -> tuple[int, int]:
    """Outputs and inputs of one expert."""
    return (2 * shape.width, HIDDEN_SIZE) if stage is GATE_UP else (HIDDEN_SIZE, shape.width)


def padded_routes(shape: Shape, tokens: int, block_m: int) -> int:
    """The length of the engine's sorted route ids."""
    routes = tokens * TOP_K
    return routes * block_m if routes < shape.experts + 1 else routes + (shape.experts + 1) * (block_m - 1)


class Recorder:
    """Takes the kernel's place in the engine's invocation and keeps what it would be launched with."""

    def __getitem__(self, grid):
        return self.keep

    def keep(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


def launch_arguments(kernels, shape: Shape, stage: Stage, tokens: int, block: Config):
    """What the engine would launch, on tensors without memory."""
    import torch

    def meta(*size, dtype):
        return torch.empty(size, device="meta", dtype=dtype)

    outputs, inputs = sizes_of(shape, stage)
    routes, padded = tokens * TOP_K, padded_routes(shape, tokens, block["BLOCK_SIZE_M"])
    tma, fp8 = block.get("USE_TMA", False), torch.float8_e4m3fn
    rows = tokens if stage is GATE_UP else routes + min(routes, shape.experts + 1) * (block["BLOCK_SIZE_M"] - 1) * tma
    c = (routes, outputs) if stage is GATE_UP else (tokens, TOP_K, outputs)
    blocks = -(-padded // block["BLOCK_SIZE_M"])
    aligned = [meta(padded, dtype=torch.int32), meta(blocks, dtype=torch.int32), meta(1, dtype=torch.int32)]
    quantise, jitted, recorder = kernels.sglang_per_token_group_quant_fp8, kernels.fused_moe_kernel, Recorder()
    kernels.sglang_per_token_group_quant_fp8 = lambda a, k: (
        meta(*a.shape, dtype=fp8), meta(a.shape[0], a.shape[1] // k, dtype=torch.float32),
    )  # fmt: skip
    kernels.fused_moe_kernel = recorder
    try:
        invoke(
            kernels, stage, meta(rows, inputs, dtype=torch.bfloat16),
            meta(shape.experts, outputs, inputs, dtype=fp8), meta(*c, dtype=torch.bfloat16),
            meta(shape.experts, outputs // BLOCK, inputs // BLOCK, dtype=torch.float32),
            meta(tokens, TOP_K, dtype=torch.float32), meta(tokens, TOP_K, dtype=torch.int32), aligned, block,
            filtered=shape.experts < EXPERTS,
        )  # fmt: skip
    finally:
        kernels.sglang_per_token_group_quant_fp8, kernels.fused_moe_kernel = quantise, jitted
    return recorder.args, recorder.kwargs


def specialisation(args, kwargs) -> tuple:
    """Equal for launches that share one compiled kernel: integers count by being 1 and by divisibility by 16."""

    def kind(value):
        if isinstance(value, int) and not isinstance(value, bool):
            return value == 1, value % 16 == 0
        return str(getattr(value, "dtype", None)), getattr(value, "block_shape", None) and tuple(value.block_shape)

    *runtime, group_n, group_k = args
    return (*map(kind, runtime), group_n, group_k, *sorted((key, str(value)) for key, value in kwargs.items()))


def engine_pretending_sm90():
    """:func:`engine` on a host without a GPU, where Triton then compiles for Hopper and cannot launch."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    kernels = engine()
    JITFunction.run = run  # the overlay had put an explanation there

    class Driver:
        def __getattr__(self, name):
            raise RuntimeError(f"a dry run launches nothing, and {name} was asked for")

        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_active_torch_device = staticmethod(lambda: torch.device("meta"))

    driver.set_active(Driver())
    kernels._is_cuda, kernels.is_sm90_supported = True, lambda: True
    return kernels


class Weights:
    """Random FP8 experts of one shape with their block scales."""

    def __init__(self, shape: Shape) -> None:
        import torch

        self.shape = shape
        self.b, self.scale = {}, {}
        for stage in STAGES:
            outputs, inputs = sizes_of(shape, stage)
            weight = torch.empty(shape.experts, outputs, inputs, device="cuda", dtype=torch.float8_e4m3fn)
            for expert in weight:
                expert.copy_(torch.randn(outputs, inputs, device="cuda").to(torch.float8_e4m3fn))
            blocks = (shape.experts, outputs // BLOCK, inputs // BLOCK)
            self.b[stage], self.scale[stage] = weight, (0.5 + torch.rand(*blocks, device="cuda")) * inputs**-0.5

    def expert(self, stage: Stage, index: int):
        """Float32 [outputs, inputs]."""
        scale = self.scale[stage][index].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return self.b[stage][index].float() * scale


class Problem:
    """A batch of some tokens over some experts: inputs, outputs, and several routings to rotate through."""

    def __init__(self, kernels, weights: Weights, tokens: int) -> None:
        import torch

        self.kernels, self.weights, self.shape, self.tokens = kernels, weights, weights.shape, tokens
        self.filtered = self.shape.experts < EXPERTS
        self.routings = [self.routing(seed) for seed in range(16 if tokens <= 64 else 8 if tokens <= 512 else 4)]
        self.topk_weights = torch.rand(tokens, TOP_K, device="cuda")
        self.hidden = torch.randn(tokens, HIDDEN_SIZE, device="cuda").bfloat16()
        routes = tokens * TOP_K
        most = routes + min(routes, self.shape.experts + 1) * 127  # TMA reads routes with their padding
        self.a = {
            GATE_UP: self.hidden,
            DOWN: torch.randn(most if tokens >= 1024 else routes, self.shape.width, device="cuda").bfloat16(),
        }
        self.c = {
            GATE_UP: torch.empty(routes, 2 * self.shape.width, device="cuda", dtype=torch.bfloat16),
            DOWN: torch.empty(tokens, TOP_K, HIDDEN_SIZE, device="cuda", dtype=torch.bfloat16),
        }
        self.quantised = {stage: kernels.sglang_per_token_group_quant_fp8(self.a[stage], BLOCK) for stage in STAGES}
        self.aligned: dict[int, list] = {}

    def routing(self, seed: int):
        """[tokens, 8] int32: distinct experts of all, and -1 for those of other ranks."""
        import torch

        generator = torch.Generator("cuda").manual_seed(seed * 10007 + self.tokens)
        ids = torch.rand(self.tokens, EXPERTS, device="cuda", generator=generator).topk(TOP_K).indices
        return torch.where(ids < self.shape.experts, ids, -1).to(torch.int32)

    def sorted_routes(self, block_m: int) -> list:
        from sglang.srt.layers.moe.fused_moe_triton.moe_align_block_size import moe_align_block_size

        if block_m not in self.aligned:
            self.aligned[block_m] = [moe_align_block_size(r, block_m, self.shape.experts) for r in self.routings]
        return self.aligned[block_m]

    def gemms(self, stage: Stage, block: Config):
        """Launches one GEMM a routing, without the quantisation before it, which is the same for all candidates."""
        kernels, quantise = self.kernels, self.kernels.sglang_per_token_group_quant_fp8
        kernels.sglang_per_token_group_quant_fp8 = lambda a, k: self.quantised[stage]
        try:
            for ids, aligned in zip(self.routings, self.sorted_routes(block["BLOCK_SIZE_M"]), strict=True):
                invoke(
                    kernels, stage, self.a[stage], self.weights.b[stage], self.c[stage], self.weights.scale[stage],
                    self.topk_weights, ids, aligned, block, self.filtered,
                )  # fmt: skip
        finally:
            kernels.sglang_per_token_group_quant_fp8 = quantise

    def graph(self, function):
        """A CUDA graph of ``function``. Not through torch.cuda.graph, which collects garbage each time."""
        import torch

        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            function()
            torch.cuda.synchronize()
            graph.capture_begin()
            try:
                function()
            finally:
                graph.capture_end()
        return graph

    def time(self, graph, replays: int) -> float:
        """Median microseconds of one of the graph's invocations."""
        import torch

        for _ in range(2):
            graph.replay()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
        for before, after in events:
            before.record()
            graph.replay()
            after.record()
        torch.cuda.synchronize()
        return statistics.median(b.elapsed_time(a) for b, a in events) * 1000 / len(self.routings)

    def whole(self):
        """The engine's experts from hidden states to their sum, one call a routing; returns the last output."""
        from sglang.srt.layers.moe.fused_moe_triton.fused_moe import outplace_fused_experts

        for ids in self.routings:
            output = self.whole_of(outplace_fused_experts, ids)
        return output

    def whole_of(self, function, ids):
        weights = self.weights
        return function(
            self.hidden, weights.b[GATE_UP], weights.b[DOWN], self.topk_weights, ids,
            use_fp8_w8a8=True, w1_scale=weights.scale[GATE_UP], w2_scale=weights.scale[DOWN],
            block_shape=[BLOCK, BLOCK], filter_expert=self.filtered,
        )  # fmt: skip

    def reference(self):
        """:meth:`whole`'s output in float32 arithmetic, with the engine's FP8 activations and bfloat16 in between."""
        import torch

        quantise, ids = self.kernels.sglang_per_token_group_quant_fp8, self.routings[-1]

        def rounded(x):
            q, scale = quantise(x.contiguous(), BLOCK)
            return q.float() * scale.repeat_interleave(BLOCK, -1)

        hidden, total = rounded(self.hidden), torch.zeros(self.tokens, HIDDEN_SIZE, device="cuda")
        for index in ids[ids >= 0].unique().tolist():
            token, slot = (ids == index).nonzero(as_tuple=True)
            gate, up = (hidden[token] @ self.weights.expert(GATE_UP, index).T).bfloat16().float().chunk(2, -1)
            inner = (torch.nn.functional.silu(gate).bfloat16() * up.bfloat16()).bfloat16()
            part = rounded(inner) @ self.weights.expert(DOWN, index).T
            total.index_add_(0, token, (part * self.topk_weights[token, slot, None]).bfloat16().float())
        return total


def use_tables(root: Path | None) -> None:
    """Lets the engine read the tables under ``root``, or none at all."""
    from sglang.srt.layers.moe.fused_moe_triton import fused_moe_triton_config

    os.environ["SGLANG_MOE_CONFIG_DIR"] = str(root or "/nonexistent")
    fused_moe_triton_config.get_moe_configs.cache_clear()
