"""Which way a rank's part of a layer's output takes to the next projection: rules of integers and flags.

No torch and no engine is needed here: the model calls these when a layer is built, and the planner for a server that
does not run. Each rule gives the first reason against, as a clause, or None.

Three ways from the ranks' parts to their sum, added to the residual and normed:
    one launch   all of it in a kernel of ours, for few tokens, between NVLink peers
    FlashInfer   all of it in FlashInfer's kernel, where a person asked for it or ours cannot run
    separate     the engine's all-reduce, and its residual add + norm
"""

from __future__ import annotations

MAX_TOKENS = {2: 256, 4: 128, 8: 64}
"""By ranks: up to so many tokens one launch runs. Every rank sends its rows to all others, so what a launch sends grows
with ranks * tokens, where the engine's all-reduce of many tokens sends each value twice. Not measured yet."""

FLASHINFER_BY_DEFAULT = "sglang_minimax_flashinfer_by_default"
"""The attribute of ``ServerArgs`` that says that nobody asked for FlashInfer's fused all-reduce + norm: it was turned
on here, for layouts in which one launch of ours cannot run."""


def reason_against_one_launch(
    *,
    num_ranks: int,
    cuda: bool = True,
    bfloat16: bool = True,
    hidden_size: int,
    dp_attention: bool,
    attn_cp_size: int = 1,
    moe_dp_size: int = 1,
    moe_a2a_backend: str = "none",
    two_batch_overlap: bool = False,
    deterministic: bool = False,
    pdmux: bool = False,
    memory_saver: bool = False,
    flashinfer: bool = False,
) -> str | None:
    """Why a rank's part is not all-reduced, added and normed in one launch, as far as flags tell.

    Args:
        num_ranks: of the tensor-parallel group.
        cuda: the model runs on NVIDIA GPUs.
        bfloat16: that is what activations and the norms' weights are.
        dp_attention: attention has groups of its own, so that two sums run over two groups.
        flashinfer: a person gave ``--enable-flashinfer-allreduce-fusion``.
    """
    if num_ranks == 1:
        return "one rank has nothing to reduce"
    if not cuda:
        return "it is a kernel for NVIDIA GPUs"
    if num_ranks not in MAX_TOKENS:
        return f"it is for {', '.join(map(str, MAX_TOKENS))} ranks of one host, and these are {num_ranks}"
    if flashinfer:
        return "--enable-flashinfer-allreduce-fusion was given"
    if not bfloat16:
        return "it takes bfloat16 activations"
    if hidden_size % 8:
        return f"hidden size {hidden_size} is not a multiple of 8"
    if dp_attention:
        return "under DP attention the ranks that attend and those that hold the experts differ"
    if attn_cp_size > 1 or moe_dp_size > 1:
        return "context parallelism and experts in data-parallel groups sum over other groups than TP"
    if moe_a2a_backend != "none":
        return f"--moe-a2a-backend {moe_a2a_backend} reduces by itself"
    if two_batch_overlap:
        return "in two-batch overlap other kernels wait for peers beside it, and each could keep the other out"
    if deterministic:
        return "few tokens are summed with fewer roundings than many, which is not deterministic"
    if pdmux:
        return "--enable-pdmux runs prefill and decode at once, and their rows would meet in one buffer"
    if memory_saver:
        return "--enable-memory-saver may take the memory of its counters away and give it back changed"
    return None


def reason_against_peers(peers_reachable: bool) -> str | None:
    """Why the ranks cannot exchange rows.

    Args:
        peers_reachable: they are GPUs of one host with NVLink between every pair, and custom all-reduce is enabled.
    """
    if not peers_reachable:
        return "the ranks are not NVLink peers of one host, or custom all-reduce is disabled"
    return None
