"""Which way q, k and v take from the qkv projection to attention: rules of integers and flags.

No torch and no engine is needed here: the model calls these when a layer is built, and the planner for a server that
does not run. Each rule gives the first reason against, as a clause, or None.

Four ways:
    separate    norm (two launches and an all-reduce), RoPE and KV store one by one; on a CPU in plain torch
    one launch  one attention-TP rank: all of it in one kernel
    exchange    the same kernel, which swaps the sums of squares with its NVLink peers by itself
    collective  the same kernel behind a launch for the sums and the engine's all-reduce

Over two nodes the sums need not cross from one to the other: see :mod:`minimax_counterpart` and
:func:`reason_against_counterpart`. Exchange and all-reduce are then among the ranks of one node.
"""

from __future__ import annotations

from collections.abc import Iterable

EXCHANGE_RANKS = (2, 4, 8)  # of one NVLink domain; the numbers that the exchange was tried with

# They read keys and values from the KV cache even where they did not store them. dual_chunk_flash_attn, for one, takes
# a forward pass without its own store for a profile run and then attends to the new tokens only.
BACKENDS_THAT_READ_THE_CACHE = ("fa3", "fa4", "flashinfer", "flex_attention", "torch_native", "triton", "trtllm_mha")


def reason_against_dimensions(head_dim: int, rotary_dim: int) -> str | None:
    """The kernel holds a head as four quarters, of which the first two rotate into each other."""
    if head_dim < 4 or head_dim & (head_dim - 1) or head_dim != 2 * rotary_dim:
        return f"it takes a head_dim that is a power of two, half of it rotated, not {rotary_dim} of {head_dim}"
    return None


def reason_against_one_kernel(
    *,
    has_norms: bool,
    cuda: bool,
    head_dim: int,
    rotary_dim: int,
    dtype_bytes: int,
    plain_rope: bool = True,
    deterministic: bool = False,
    pdmux: bool = False,
    memory_saver: bool = False,
) -> str | None:
    """Why the separate launches are taken.

    Args:
        has_norms: the config has QK norms.
        cuda: the layer runs on an NVIDIA GPU.
        dtype_bytes: of an activation.
        plain_rope: neox pairs, rotated by one cache of cosines and sines, whatever that cache was scaled by.
        deterministic: ``--enable-deterministic-inference``.
        pdmux: ``--enable-pdmux``.
        memory_saver: ``--enable-memory-saver``.
    """
    if not has_norms:
        return "the config has no QK norm"
    if not cuda:
        return "it is a kernel for NVIDIA GPUs"
    if not plain_rope:
        return "the rotary embedding is not the plain one of neox pairs"
    if dtype_bytes != 2:
        return "it takes bfloat16 and float16 activations"
    if deterministic:
        return "it adds a row's squares in another order for few tokens than for many, which is not deterministic"
    if pdmux:
        return "--enable-pdmux runs prefill and decode at once, and their exchanges would meet in one buffer"
    if memory_saver:
        return "--enable-memory-saver may take the memory of the exchange's counters away and give it back changed"
    return reason_against_dimensions(head_dim, rotary_dim)


def reason_against_exchange(num_ranks: int, peers_reachable: bool, shares_gpu: bool = False) -> str | None:
    """Why several attention-TP ranks add their sums up by a collective.

    Args:
        num_ranks: of the attention-TP group, at least 2.
        peers_reachable: they are GPUs of one host with NVLink between every pair, and custom all-reduce is enabled.
        shares_gpu: kernels of another stream, which wait for their own peers, run at the same time.
    """
    if num_ranks not in EXCHANGE_RANKS:
        return f"the exchange is for {', '.join(map(str, EXCHANGE_RANKS))} ranks of one host, and these are {num_ranks}"
    if not peers_reachable:
        return "the ranks are not NVLink peers of one host, or custom all-reduce is disabled"
    if shares_gpu:
        return "in two-batch overlap the token dispatcher waits for peers beside it, and each could keep the other out"
    return None


def reason_against_counterpart(
    num_ranks: int,
    ranks_per_node: int,
    kv_replicas: int,
    *,
    loads_alike: bool = True,
    lora: bool = False,
    pdmux: bool = False,
    memory_saver: bool = False,
    switched_off: bool = False,
) -> str | None:
    """Why the sums of an attention-TP group that spans nodes go over the network between them.

    Args:
        num_ranks: of the attention-TP group; more than ``ranks_per_node``, or there is no network to avoid.
        ranks_per_node: ranks of one TP group that share a node.
        kv_replicas: ranks that hold the same KV head.
        loads_alike: the projection is unquantised, or in FP8 blocks: each row of its weight stands for itself.
        lora: ``--enable-lora`` or ``--lora-paths``, on any rank.
        pdmux: ``--enable-pdmux``, on any rank.
        memory_saver: ``--enable-memory-saver``, on any rank.
        switched_off: by ``SGLANG_MINIMAX_COUNTERPART=0``, on any rank.
    """
    if num_ranks != 2 * ranks_per_node:
        return f"{num_ranks} ranks with {ranks_per_node} a node do not lie on two nodes, one half each"
    if ranks_per_node % kv_replicas:
        return f"{kv_replicas} ranks share a KV head, on both nodes, and could norm it differently in the last bit"
    if not loads_alike:
        return "the weights of q and k are quantised otherwise than in FP8 blocks"
    if lora:
        return "--enable-lora adds to the q and k of a rank's own heads only"
    if pdmux:
        return "--enable-pdmux runs prefill and decode at once, and their sums would meet in one group"
    if memory_saver:
        return "--enable-memory-saver would take away, with the weights, the pointers of the node's own all-reduce"
    if switched_off:
        return "SGLANG_MINIMAX_COUNTERPART=0"
    return None


def reason_against_store(attention_backends: Iterable[str | None], attn_cp_size: int = 1) -> str | None:
    """Why attention stores k and v to the KV cache by itself, and the kernel does not.

    Args:
        attention_backends: of prefill and of decode.
        attn_cp_size: ranks of context parallelism, which store each other's tokens as well.
    """
    if attn_cp_size > 1:
        return f"each of {attn_cp_size} context-parallel ranks stores the tokens of all"
    for backend in attention_backends:
        if backend not in BACKENDS_THAT_READ_THE_CACHE:
            return f"attention backend {backend} is not known to attend to keys that it did not store"
    return None
