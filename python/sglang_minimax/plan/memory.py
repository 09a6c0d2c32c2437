"""Bytes a GPU: weights by kind, what the engine reserves, and the KV cache that is left.

Weights are exact: they are the shapes of the parameters that the model makes. What follows from the engine's own
formulas (the fraction of memory that it takes, the bytes of a token) is exact too. What is an estimate is named so:
the memory that CUDA and NCCL take before the engine looks, and the engine's own reserve for activations and graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_minimax import sharding
from sglang_minimax.plan.hardware import Gpu
from sglang_minimax.plan.layout import KV_CACHE_DTYPES, Layout, attention_backend, has_counterpart
from sglang_minimax.plan.shape import NVFP4_GROUP, ModelShape

MIB = 1024**2

# The CUDA context, NCCL's and the custom all-reduce's buffers, which are there before the engine first asks how much
# memory is free. A server at TP2 on H200 logged 1.01 GiB for what it does between, and 138.3 of 140.4 GiB free after.
BEFORE_LOADING_MIB = 1024

_SCALE = 4  # bytes of a float32 scale


def weight_bytes(model: ModelShape, layout: Layout, stage: int = 0) -> dict[str, int]:
    """Bytes of one rank's parameters by kind; every TP rank of a pipeline stage holds as many."""
    num_layers = len(sharding.pipeline_layers(model.num_hidden_layers, stage, layout.pp))
    first, last = stage == 0, stage == layout.pp - 1
    row = model.hidden_size * model.dtype_bytes
    vocabulary = sharding.padded_vocabulary(model.vocab_size)
    return {
        "experts": num_layers * _experts(model, layout),
        "attention": num_layers * _attention(model, layout),
        "router": num_layers * model.num_local_experts * (model.hidden_size + model.use_routing_bias) * 4,
        "norms": num_layers * _norms(model, layout) + last * row,
        "embedding": first * vocabulary // layout.vocabulary_ranks * row,
        "head": last * vocabulary // layout.tp * row,
    }


def _experts(model: ModelShape, layout: Layout) -> int:
    """Gate and up as one matrix, and down, of this rank's part of its experts."""
    held = model.num_local_experts // layout.ep
    width, hidden, quantisation = model.intermediate_size // layout.expert_ranks, model.hidden_size, model.quantisation
    values = 3 * width * hidden
    if quantisation.kind == "none":
        return held * values * model.dtype_bytes
    if quantisation.kind == "fp8":
        rows, columns = quantisation.block
        gate_up = 2 * _blocks(width, rows) * _blocks(hidden, columns)
        down = _blocks(hidden, rows) * _blocks(width, columns)
        return held * (values + (gate_up + down) * _SCALE)
    # NVFP4: two values a byte. The FP8 scales are kept twice, as loaded and as the kernels want them: padded to 128
    # rows and 4 columns. Then float32 scales: of weights for each held expert, of activations for every expert.
    groups = values // NVFP4_GROUP
    padded = _padded_scales(2 * width, hidden) + _padded_scales(hidden, width)
    return held * (values // 2 + groups + padded + 3 * _SCALE) + model.num_local_experts * 3 * _SCALE


def _attention(model: ModelShape, layout: Layout) -> int:
    """The fused projection of q, k and v, with a counterpart's q and k if there is one, and the output projection."""
    shards = sharding.shard_attention(model.num_attention_heads, model.num_key_value_heads, layout.attention_ranks)
    q, kv = shards.q.heads_per_rank * model.head_dim, shards.kv.heads_per_rank * model.head_dim
    rows, parts = (2 * q + 3 * kv, 5) if has_counterpart(layout, model) else (q + 2 * kv, 3)
    projections = _projection(model, rows, model.hidden_size, parts) + _projection(model, model.hidden_size, q, 1)
    kv_scales = 2 * _SCALE if model.quantisation.kind != "none" else 0  # one of K and one of V, used or not
    return projections + kv_scales


def _projection(model: ModelShape, rows: int, columns: int, parts: int) -> int:
    """Bytes of a [rows, columns] projection that was fused from ``parts``."""
    quantisation = model.quantisation
    if quantisation.kind == "none" or not quantisation.attention:
        return rows * columns * model.dtype_bytes
    if quantisation.kind == "fp8":
        block_rows, block_columns = quantisation.block
        return rows * columns + _blocks(rows, block_rows) * _blocks(columns, block_columns) * _SCALE
    return rows * columns // 2 + rows * (columns // NVFP4_GROUP) + 2 * parts * _SCALE


def _norms(model: ModelShape, layout: Layout) -> int:
    values = 2 * model.hidden_size
    if model.use_qk_norm:
        shards = sharding.shard_attention(model.num_attention_heads, model.num_key_value_heads, layout.attention_ranks)
        values += (shards.q.heads_per_rank + shards.kv.heads_per_rank) * model.head_dim
    return values * model.dtype_bytes


def _blocks(values: int, block: int) -> int:
    return -(-values // block)


def _padded_scales(rows: int, columns: int) -> int:
    return _blocks(rows, 128) * 128 * _blocks(columns // NVFP4_GROUP, 4) * 4


def kv_bytes_per_token(model: ModelShape, layout: Layout, stage: int = 0) -> int:
    """Bytes of one token's K and V on one rank of a pipeline stage."""
    kv = sharding.shard_attention(model.num_attention_heads, model.num_key_value_heads, layout.attention_ranks).kv
    value_bytes = KV_CACHE_DTYPES[layout.flags.kv_cache_dtype] or model.kv_cache_bytes
    num_layers = len(sharding.pipeline_layers(model.num_hidden_layers, stage, layout.pp))
    return kv.heads_per_rank * 2 * model.head_dim * num_layers * value_bytes


@dataclass(frozen=True)
class Reserve:
    """What the engine leaves for all that is neither weights nor KV cache, in MiB, by its own rule of thumb.

    chunked_prefill_size and cuda_graph_max_bs are the engine's defaults for a GPU of this memory, before DP attention
    divides the first by ``dp``.
    """

    chunked_prefill_size: int
    cuda_graph_max_bs: int
    parts_mib: dict[str, float]

    @property
    def mib(self) -> float:
        return sum(self.parts_mib.values())


def engine_reserve(gpu: Gpu, layout: Layout) -> Reserve:
    """The engine's reserve where ``--mem-fraction-static`` is left out (sglang 0.5.10.post1)."""
    flags, chunk = layout.flags, gpu.chunked_prefill_size
    graphs = 512 if gpu.memory_mib >= 160 * 1024 or layout.tp >= 4 else 256
    parts = {
        "metadata": 512.0,
        "activations of a prefill chunk": chunk * 1.5,
        "CUDA graphs": graphs * 2.0,
        "parallel groups": layout.tp * layout.pp / 8 * 1024,
    }
    if flags.enable_dp_attention:  # with one DP rank too: the engine drops the flag only after this
        parts["padding of DP attention"] = graphs * flags.dp * (4.5 if graphs > 300 else 3.0)
    elif layout.pp == flags.attn_cp_size == 1 and flags.moe_a2a_backend == "none" and gpu.is_hopper_or_blackwell:
        parts["piecewise CUDA graphs"] = len(_piecewise_sizes(chunk)) * 8.0
    missing = 10 * 1024 - sum(parts.values())
    if missing > 0:
        parts["to the least of 10 GiB"] = missing
    return Reserve(chunk, graphs, parts)


def _piecewise_sizes(largest: int) -> list[int]:
    """Numbers of tokens for which the engine captures a piecewise graph of the prefill."""
    spans = ((4, 33, 4), (48, 257, 16), (288, 513, 32), (576, 1025, 64), (1280, 4097, 256), (4608, largest + 1, 512))
    return [size for span in spans for size in range(*span)]


@dataclass(frozen=True)
class Memory:
    """One GPU of the pipeline stage that leaves least for the KV cache. Sizes in bytes unless they say otherwise.

    fraction: ``--mem-fraction-static`` in force; ``reserve`` is None where a person gave it.
    tokens: KV-cache tokens of one DP group; ``requests``: requests of the full context length in it.
    """

    stage: int
    weights: dict[str, int]
    fraction: float
    reserve: Reserve | None
    kv_bytes_per_token: int
    kv_pool: int
    tokens: int
    requests: int
    context_length: int


def plan_memory(model: ModelShape, layout: Layout, gpu: Gpu) -> Memory:
    """Memory of the tightest stage.

    Raises:
        ValueError: the weights do not fit beside what the engine reserves.
    """
    return min(
        (_stage_memory(model, layout, gpu, stage) for stage in range(layout.pp)), key=lambda memory: memory.tokens
    )


def static_fraction(gpu: Gpu, layout: Layout) -> tuple[float, Reserve | None]:
    """The fraction of memory for weights and KV cache, and the reserve that it was taken from."""
    if layout.flags.mem_fraction_static is not None:
        fraction, reserve = layout.flags.mem_fraction_static, None
    else:
        reserve = engine_reserve(gpu, layout)
        fraction = round((gpu.memory_mib - reserve.mib) / gpu.memory_mib, 3)
    if attention_backend(layout.flags, gpu) == "aiter" and (layout.flags.context_length or 1 << 20) > 8192:
        fraction *= 0.85  # the engine's rule for these kernels
    return fraction, reserve


def _stage_memory(model: ModelShape, layout: Layout, gpu: Gpu, stage: int) -> Memory:
    fraction, reserve = static_fraction(gpu, layout)
    weights = weight_bytes(model, layout, stage)
    pool = int((gpu.memory_mib - BEFORE_LOADING_MIB) * MIB * fraction) - sum(weights.values())
    a_token = kv_bytes_per_token(model, layout, stage)
    if pool < a_token:
        needed = sum(weights.values()) / MIB / 1024
        raise ValueError(
            f"weights of {needed:.1f} GiB a GPU do not fit: --mem-fraction-static {fraction:.3f} of {gpu.name} leaves "
            f"{needed + pool / MIB / 1024:.1f} GiB for weights and KV cache"
        )
    context = layout.flags.context_length or model.max_position_embeddings
    tokens = pool // a_token
    return Memory(stage, weights, fraction, reserve, a_token, pool, tokens, tokens // context, context)
