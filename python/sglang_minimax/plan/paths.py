"""Which paths the model takes under a layout, and why; and the command of every node."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from sglang_minimax import sharding
from sglang_minimax.plan.hardware import Gpu
from sglang_minimax.plan.layout import (
    KV_CACHE_DTYPES,
    Layout,
    attention_backend,
    has_counterpart,
    reason_against_counterpart,
)
from sglang_minimax.plan.shape import ModelShape
from sglang_minimax.server_arguments import reason_against_fused_all_reduce

_FUSED_UP_TO_TOKENS = 2048  # of one batch: the engine's limit for FlashInfer's fused all-reduce


@dataclass(frozen=True)
class Path:
    """One decision: what it is about, what is taken, and why."""

    name: str
    taken: str
    why: str


def paths(model: ModelShape, layout: Layout, gpu: Gpu) -> list[Path]:
    """The decisions of ``models/minimax_m2.py`` and of the engine under it, for a server with these flags."""
    return [
        _qk_norm(model, layout, gpu),
        _fused_all_reduce(model, layout, gpu),
        _expert_sum(model, layout, gpu),
        fp4_all_gather(fp4_all_gather_reason(layout)),
        a2a_backend(layout.flags.moe_a2a_backend),
        _attention_backend(layout, gpu),
    ]


def _qk_norm(model: ModelShape, layout: Layout, gpu: Gpu) -> Path:
    ranks, node_ranks = layout.attention_ranks, layout.tp_ranks_per_node
    counterpart = has_counterpart(layout, model)
    path = qk_norm(
        ranks if model.use_qk_norm else None,
        sharding.reason_against_one_kernel(
            has_norms=model.use_qk_norm,
            cuda=gpu.is_hopper_or_blackwell,
            head_dim=model.head_dim,
            rotary_dim=model.rotary_dim,
            dtype_bytes=model.dtype_bytes,
        ),
        sharding.reason_against_exchange(
            node_ranks if counterpart else ranks, peers_reachable=counterpart or node_ranks % ranks == 0
        ),
        stores=_stores(model, layout, gpu),
        node_ranks=node_ranks if counterpart else None,
    )
    if not model.use_qk_norm or counterpart or ranks <= node_ranks:
        return path
    return Path(path.name, f"{path.taken}; sums cross nodes", reason_against_counterpart(layout, model) or path.why)


def _stores(model: ModelShape, layout: Layout, gpu: Gpu) -> bool:
    """Whether the kernel of QK norm stores to the KV cache."""
    flags = layout.flags
    if (KV_CACHE_DTYPES[flags.kv_cache_dtype] or model.kv_cache_bytes) != model.dtype_bytes:
        return False
    return sharding.reason_against_store((attention_backend(flags, gpu),), flags.attn_cp_size) is None


def qk_norm(
    attention_ranks: int | None,
    against_one_kernel: str | None,
    against_exchange: str | None,
    stores: bool,
    node_ranks: int | None = None,
) -> Path:
    """How q and k are normed, and what of their way to attention is in the same kernel.

    Args:
        attention_ranks: over which the heads are divided; None: the model has no such norm.
        against_one_kernel: why norm, RoPE and KV store are separate launches, or None where they are one.
        against_exchange: why several ranks' sums are all-reduced before that kernel, or None where it swaps them.
        stores: that kernel stores to the KV cache too.
        node_ranks: how many of the ranks share a node, where each also projects q and k of a rank of the other node, so
            that sums are over one node's ranks.
    """
    name, ranks = "QK norm", attention_ranks if node_ranks is None else node_ranks
    of = "" if node_ranks is None else " of a node"
    also = "" if node_ranks is None else "; each also projects q and k of a rank of the other node"
    if ranks is None:
        return Path(name, "none", "the config says use_qk_norm: false")
    if against_one_kernel is not None:
        how = f"on each rank alone{also}" if ranks == 1 else f"one all-reduce over {ranks} ranks{of}{also}"
        return Path(name, f"{how}; RoPE and KV store in launches of their own", against_one_kernel)
    kernel = "one kernel with RoPE and KV store" if stores else "one kernel with RoPE"
    if ranks == 1:
        why = "a rank holds all heads of its requests" if node_ranks is None else "no sum has to leave a rank"
        return Path(name, f"on each rank alone, in {kernel}{also}", why)
    if against_exchange is not None:
        return Path(name, f"one all-reduce over {ranks} ranks{of}, and {kernel}{also}", against_exchange)
    why = "NVLink peers swap two float32 sums of squares a token in it"
    return Path(name, f"{kernel}, over {ranks} ranks{of}{also}", why)


def fused_all_reduce_reason(layout: Layout, gpu: Gpu) -> str | None:
    """Why FlashInfer's fused all-reduce + norm stays off, or None where the server turns it on."""
    flags = layout.flags
    return reason_against_fused_all_reduce(
        device_name=gpu.name,
        hopper_or_blackwell=gpu.is_hopper_or_blackwell,
        tp_size=layout.tp,
        enable_dp_attention=layout.dp_groups > 1,
        nnodes=flags.nnodes,
        pp_size=layout.pp,
        attn_cp_size=flags.attn_cp_size,
        moe_dp_size=flags.moe_dp_size,
        moe_a2a_backend=flags.moe_a2a_backend,
    )


def one_launch_reason(model: ModelShape, layout: Layout, gpu: Gpu) -> str | None:
    """Why all-reduce, residual add and norm are not one launch of the model's own, or None where they are."""
    flags = layout.flags
    reason = sharding.reason_against_one_launch(
        num_ranks=layout.tp,
        cuda=gpu.is_hopper_or_blackwell,
        bfloat16=model.dtype_bytes == 2,
        hidden_size=model.hidden_size,
        dp_attention=layout.dp_groups > 1,
        attn_cp_size=flags.attn_cp_size,
        moe_dp_size=flags.moe_dp_size,
        moe_a2a_backend=flags.moe_a2a_backend,
    )
    return reason or sharding.reason_against_peers(layout.tp_ranks_per_node == layout.tp)


def fused_all_reduce(
    one_launch_up_to: int | None, flashinfer_up_to: int | None, reason_against: str | None = None
) -> Path:
    """Who all-reduces, adds and norms in one kernel.

    Args:
        one_launch_up_to: tokens of one launch of the model's own, or None where there is none.
        flashinfer_up_to: tokens of FlashInfer's kernel, or None where it is off as well.
        reason_against: why neither does.
    """
    name = "fused all-reduce + norm"
    if one_launch_up_to is not None:
        why = "NVLink peers swap their rows in it; above that, the engine's all-reduce and norm"
        return Path(name, f"on, one launch up to {one_launch_up_to} tokens", why)
    if flashinfer_up_to is not None:
        why = "FlashInfer's: one node, no DP attention; off if it cannot make its workspace on every rank"
        return Path(name, f"on, up to {flashinfer_up_to} tokens", why)
    return Path(name, "off", reason_against or "")


def _fused_up_to(model: ModelShape, layout: Layout, gpu: Gpu) -> tuple[int | None, int | None]:
    """Tokens of one launch of the model's own, and of FlashInfer's kernel, where that is on."""
    if one_launch_reason(model, layout, gpu) is None:
        return sharding.MAX_TOKENS_OF_ONE_LAUNCH[layout.tp], None
    return None, _FUSED_UP_TO_TOKENS if fused_all_reduce_reason(layout, gpu) is None else None


def _fused_all_reduce(model: ModelShape, layout: Layout, gpu: Gpu) -> Path:
    return fused_all_reduce(*_fused_up_to(model, layout, gpu), fused_all_reduce_reason(layout, gpu))


def reason_against_fp4_all_gather(
    *, nvfp4: bool, dp_groups: int, ep: int, moe_runner_backend: str, moe_a2a_backend: str = "none"
) -> str | None:
    """The first condition of the FP4 all-gather that does not hold, as a clause, or None."""
    if not nvfp4:
        return "it needs experts in NVFP4, named by --quantization modelopt_fp4"
    if dp_groups == 1:
        return "without DP attention every rank has all tokens"
    if ep != dp_groups:
        return f"EP {ep} must equal DP {dp_groups}"
    if moe_runner_backend != "flashinfer_cutlass":
        return "it needs --moe-runner-backend flashinfer_cutlass"
    if moe_a2a_backend != "none":
        return f"--moe-a2a-backend {moe_a2a_backend} carries the tokens"
    return None


def fp4_all_gather(reason_against: str | None) -> Path:
    if reason_against is not None:
        return Path("FP4 all-gather", "off", reason_against)
    return Path("FP4 all-gather", "on", "tokens travel to the experts in NVFP4: EP equals DP, flashinfer_cutlass")


def a2a_backend(name: str) -> Path:
    """What brings each token to its experts. ``name``: of ``--moe-a2a-backend``."""
    if name == "none":
        return Path("a2a backend", name, "no exchange of single tokens between ranks")
    return Path("a2a backend", name, "each token travels to the ranks of its experts")


def fp4_all_gather_reason(layout: Layout) -> str | None:
    """Why tokens are not gathered in FP4, or None where they are."""
    return reason_against_fp4_all_gather(
        nvfp4=layout.flags.quantization == "modelopt_fp4",
        dp_groups=layout.dp_groups,
        ep=layout.ep,
        moe_runner_backend=layout.flags.moe_runner_backend,
        moe_a2a_backend=layout.flags.moe_a2a_backend,
    )


def _expert_sum(model: ModelShape, layout: Layout, gpu: Gpu) -> Path:
    name = "sum over experts"
    copies = layout.flags.moe_dp_size
    if layout.tp == copies:
        return Path(name, "none", "one rank holds all experts")
    if layout.flags.moe_a2a_backend != "none":
        return Path(name, "the dispatcher's combine", "each token comes back to its rank")
    if fp4_all_gather_reason(layout) is None:
        return Path(name, "the dispatcher's reduce-scatter", "FP4 all-gather gives each DP rank its tokens back")
    if layout.dp_groups > 1 and copies == 1:
        return Path(
            name,
            "reduce-scatter",
            "where DP ranks are padded to one length, as in decode; else the model's all-reduce",
        )
    limit = next((tokens for tokens in _fused_up_to(model, layout, gpu) if tokens is not None), None)
    if limit is not None:
        return Path(name, "in the next layer's norm", f"above {limit} tokens and in the last layer: the model")
    why = "no one after the experts does it" if copies == 1 else f"each of {copies} groups has all experts"
    return Path(name, f"the model's all-reduce over {layout.tp // copies} ranks", why)


def _attention_backend(layout: Layout, gpu: Gpu) -> Path:
    flags, name = layout.flags, "attention backend"
    backend = attention_backend(flags, gpu)
    if backend == flags.attention_backend:
        return Path(name, backend, "as given")
    if backend == "triton":
        return Path(name, backend, f"the engine takes it for fa3, which reads no KV cache in {flags.kv_cache_dtype}")
    return Path(name, backend, f"the engine's default on {gpu.name}; --attention-backend: another")


def commands(model: ModelShape, layout: Layout) -> list[str]:
    """One command a node, in the order of their ranks."""
    flags = layout.flags
    words = ["python", "-m", "sglang.launch_server", "--model-path", model.name, *flags.words()]
    words += ["--tool-call-parser", "minimax-m2", "--reasoning-parser", "minimax-append-think"]
    if flags.nnodes == 1:
        return [shlex.join(words)]
    return [
        shlex.join([*words, "--node-rank", str(node), "--dist-init-addr", "FIRST_NODE:50000"])
        for node in range(flags.nnodes)
    ]
