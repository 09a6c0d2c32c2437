"""One rank of the self-check of QK norm: ``python -m sglang_minimax.doctor.rank RANK RANKS PORT DEVICE SEED SECONDS``.

It joins the engine's groups, builds what the model's attention runs, and compares with plain torch in float64, which
it computes from the unsharded rows that every rank draws alike. What it prints for the parent begins with ``PREFIX``:
a line for each stage it reaches, so that a rank that hangs can be told from those that wait for it, then its answer.

The tolerance follows from the dtype. A result is computed in float32 and rounded once, so it may be off by half a
unit in the last place of the dtype, ``eps / 2`` of its value, and by what float32 adds up to: ``FLOAT32_ROUNDINGS``
roundings of ``2^-24``, of the value for a norm, and of the two products for a rotation, whose difference may be small.
"""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PREFIX = "sglang-minimax doctor: "
STAGES = ("started", "imported", "joined", "built", "compared")

HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM, EPS = 48, 8, 128, 64, 1e-6  # of M2, M2.1, M2.5 and M2.7
ROTARY_BASE, MAX_POSITION = 5e6, 4096
# One token, as in decode; some; and on a GPU as many as take the launches for larger batches.
TOKENS = {"cpu": (1, 7, 64), "cuda": (1, 33, 600, 2048)}
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}

FLOAT32_ROUNDINGS = 64  # a sum of up to 6144 squares in a kernel's order, its sum over ranks, and six products
NOT_A_NUMBER = 1e9  # stands for NaN and for infinity, which JSON does not have

_CACHE_SLOTS_BESIDE = 9


@dataclass(frozen=True)
class Rows:
    """The same on every rank, unsharded. q, k, v: [tokens, heads * HEAD_DIM]; weights as q and k, one row."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_weight: torch.Tensor
    k_weight: torch.Tensor
    positions: torch.Tensor
    cos_sin: torch.Tensor


def tell(**said: Any) -> None:
    """One line for the parent."""
    print(PREFIX + json.dumps(said), flush=True)


def check_rank(rank: int, num_ranks: int, port: int, device_type: str, seed: int) -> None:
    """All layouts, dtypes and token counts of this rank; tells the worst of each."""
    tell(stage="started")
    group = join(rank, num_ranks, port, device_type)
    import torch
    from sglang.srt.layers.minimax_qk_norm_rope import QKNormRope

    device = torch.device(device_type, torch.cuda.current_device() if device_type == "cuda" else None)
    # Published, and with each KV head on two ranks, as at TP16: what the overlay is there for.
    layouts = [(HEADS, KV_HEADS), *([(HEADS, num_ranks // 2)] if num_ranks > 1 else [])]
    built = [
        (heads, kv_heads, QKNormRope(heads, kv_heads, HEAD_DIM, ROTARY_DIM, EPS, group, layer, device))
        for layer, (heads, kv_heads) in enumerate(layouts)
    ]
    tell(stage="built", path=path_of_model(built[0][2], num_ranks, device_type))
    results = []
    for heads, kv_heads, fused in built:
        for dtype in DTYPES[device_type]:
            for tokens in TOKENS[device_type]:
                rows = draw(heads, kv_heads, tokens, getattr(torch, dtype), seed, device)
                for operation, worst in compare(fused, rows, group, rank, num_ranks):
                    shape = {"heads": heads, "kv_heads": kv_heads, "tokens": tokens, "dtype": dtype}
                    results.append({"operation": operation, **shape, "worst": worst})
    device_name = torch.cuda.get_device_name(device) if device_type == "cuda" else "CPU"
    tell(stage="compared", device=device_name, results=results)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def join(rank: int, num_ranks: int, port: int, device_type: str) -> Any:
    """The engine's attention-TP group over all ranks; None for one rank, as the model has it."""
    import torch
    from sglang.srt import server_args
    from sglang.srt.distributed import parallel_state

    tell(stage="imported")
    server_args.set_global_server_args_for_scheduler(_NoServer())
    backend = "gloo"
    if device_type == "cuda":
        torch.cuda.set_device(rank)
        backend = "nccl"
    else:
        parallel_state.set_custom_all_reduce(False)  # a CUDA kernel; a server on a CPU leaves it out too
    parallel_state.init_distributed_environment(num_ranks, rank, f"tcp://127.0.0.1:{port}", rank, backend)
    parallel_state.initialize_model_parallel(num_ranks, backend=backend)
    tell(stage="joined")
    return parallel_state.get_attn_tp_group() if num_ranks > 1 else None


class _NoServer:
    """Arguments of a server that were all left alone: parts of the engine ask for some while groups are made."""

    def __getattr__(self, name: str) -> None:
        return None


def path_of_model(fused: Any, num_ranks: int, device_type: str) -> str:
    """Which way a server with no flags but the layout would take here: the same rules, the same words."""
    from sglang_minimax import sharding
    from sglang_minimax.plan import paths

    reason = sharding.reason_against_one_kernel(
        has_norms=True, cuda=device_type == "cuda", head_dim=HEAD_DIM, rotary_dim=ROTARY_DIM, dtype_bytes=2
    )
    return paths.qk_norm(num_ranks, reason, fused.reason_against_exchange, stores=True).taken


def draw(heads: int, kv_heads: int, tokens: int, dtype: torch.dtype, seed: int, device: torch.device) -> Rows:
    """Drawn on the CPU, where one seed gives all ranks the same, whatever GPU each has."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v = (normal(tokens, count * HEAD_DIM).mul(2).to(device, dtype) for count in (heads, kv_heads, kv_heads))
    q_weight, k_weight = (1 + 0.2 * normal(count * HEAD_DIM) for count in (heads, kv_heads))
    positions = torch.randint(0, MAX_POSITION, (tokens,), generator=generator)
    inverse = ROTARY_BASE ** -(torch.arange(0, ROTARY_DIM, 2, dtype=torch.float64) / ROTARY_DIM)
    angles = torch.arange(MAX_POSITION, dtype=torch.float64)[:, None] * inverse
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
    return Rows(
        q, k, v, q_weight.to(device, dtype), k_weight.to(device, dtype), positions.to(device), cos_sin.to(device)
    )


def compare(fused: Any, rows: Rows, group: Any, rank: int, num_ranks: int) -> Iterator[tuple[str, float]]:
    """Yields each operation and its worst error as a share of the tolerance: at most 1 is right."""
    import torch
    from sglang.srt.layers.minimax_qk_norm import norm_qk
    from sglang.srt.layers.minimax_sharding import shard_attention

    heads, kv_heads = rows.q.shape[1] // HEAD_DIM, rows.k.shape[1] // HEAD_DIM
    shards = shard_attention(heads, kv_heads, num_ranks)
    mine = [
        slice(held[0] * HEAD_DIM, (held[-1] + 1) * HEAD_DIM)
        for held in (shards.q.heads_of(rank), shards.kv.heads_of(rank))
    ]
    row = torch.cat([rows.q[:, mine[0]], rows.k[:, mine[1]], rows.v[:, mine[1]]], dim=-1)
    weights = rows.q_weight[mine[0]].contiguous(), rows.k_weight[mine[1]].contiguous()

    q, k, v = row.split([part.stop - part.start for part in (mine[0], mine[1], mine[1])], dim=-1)
    counts = [shard.replicas * whole.shape[1] for shard, whole in ((shards.q, rows.q), (shards.kv, rows.k))]
    normed = norm_qk(q, k, *weights, counts[0], counts[1], EPS, group.all_reduce if group is not None else None)
    wanted = [
        in_float64(whole, weight)[:, part]
        for whole, weight, part in zip((rows.q, rows.k), (rows.q_weight, rows.k_weight), mine, strict=True)
    ]
    yield "norm_qk", max(worst_error(got, want, want.abs()) for got, want in zip(normed, wanted, strict=True))

    tokens, kv_width = v.shape
    slots = torch.randperm(tokens + _CACHE_SLOTS_BESIDE)[:tokens].to(row.device)
    caches = torch.zeros(2, tokens + _CACHE_SLOTS_BESIDE, kv_width // HEAD_DIM, HEAD_DIM).to(row)
    out = fused(row.clone(), *weights, rows.positions, rows.cos_sin, caches[0], caches[1], slots)
    rotated = [rotate(want, rows) for want in wanted]
    yield "QKNormRope", max(worst_error(got, *want) for got, want in zip(out[:2], rotated, strict=True))
    stored = all(torch.equal(cache[slots].flatten(1), x) for cache, x in zip(caches, (out[1], v), strict=True))
    yield "its KV store", 0.0 if stored else NOT_A_NUMBER


def in_float64(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The definition: x / sqrt(mean of squares over all heads + eps) * weight."""
    import torch

    x = x.double()
    return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + EPS) * weight.double()


def rotate(x: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE of the first ``ROTARY_DIM`` values of each head, and for each value how large what was added up was."""
    import torch

    cos, sin = rows.cos_sin[rows.positions].double()[:, None].chunk(2, dim=-1)
    half = ROTARY_DIM // 2
    first, second, rest = x.unflatten(-1, (-1, HEAD_DIM)).split([half, half, HEAD_DIM - ROTARY_DIM], dim=-1)
    value = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
    first, second, rest, cos, sin = (one.abs() for one in (first, second, rest, cos, sin))
    magnitude = torch.cat([first * cos + second * sin, second * cos + first * sin, rest], dim=-1)
    return value.flatten(1), magnitude.flatten(1)


def worst_error(got: torch.Tensor, want: torch.Tensor, magnitude: torch.Tensor) -> float:
    """The largest error as a share of the tolerance; ``magnitude``: of what float32 added up to get a value."""
    import torch

    half_a_unit = torch.finfo(got.dtype).eps / 2
    tolerance = half_a_unit * want.abs() + FLOAT32_ROUNDINGS * 2.0**-24 * magnitude
    share = float(((got.double() - want).abs() / tolerance.clamp_min(1e-30)).max())
    return min(share, NOT_A_NUMBER) if math.isfinite(share) else NOT_A_NUMBER


def main(arguments: list[str]) -> None:
    rank, num_ranks, port, device_type, seed, seconds = arguments
    signal.alarm(math.ceil(float(seconds)))  # the parent ends this process first, unless it is no more
    check_rank(int(rank), int(num_ranks), int(port), device_type, int(seed))


if __name__ == "__main__":
    main(sys.argv[1:])
