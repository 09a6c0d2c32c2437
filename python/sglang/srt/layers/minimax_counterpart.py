"""QK norm over two nodes without a collective between them: each rank also projects its counterpart's q and k.

    sums = squares of my q, k + squares of my counterpart's q, k        # the counterpart: my place on the other node
    sums = all-reduce over the ranks of my node                         # NVLink; stock: over all ranks of both nodes

What is summed over attention TP, two floats a token, is nothing but latency, and between nodes that is many times what
it is within one. With the ranks of a group on two nodes, half each in the order of ranks, the ranks of one node and
their counterparts are all ranks. So where each rank holds the q and k rows of its counterpart as well, and has the same
hidden states, the sum over one node is the sum over all. The rows are appended to the rank's own projection: one
product, no launch more.

Both nodes add the same pairs of floats, and add these up in the same order, so they come to the same sums but for the
products' own rounding.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch
from sglang.srt.distributed import get_world_group
from sglang.srt.distributed.parallel_state import init_model_parallel_group
from sglang.srt.layers.linear import ColumnParallelLinear, LinearBase, QKVParallelLinear
from sglang.srt.layers.minimax_log import log_once
from sglang.srt.layers.minimax_qk_norm_paths import reason_against_counterpart
from sglang.srt.layers.minimax_sharding import AttentionShards, counterpart_of, tp_ranks_per_node
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.server_args import get_global_server_args

SWITCH = "SGLANG_MINIMAX_COUNTERPART"


@dataclass(frozen=True)
class Counterpart:
    """``rank``, of the attention-TP group, is at this rank's place on the other node; ``node`` is the engine's group of
    this node's ranks."""

    rank: int
    node: object


def choose_counterpart(
    attn_tp_rank: int, shards: AttentionShards, quant_config: QuantizationConfig | None, prefix: str
) -> Counterpart | None:
    """This rank's counterpart, or None where sums are reduced over all ranks of attention TP. Said once in the log
    where these are on several nodes.

    Collective over all ranks of the server where attention TP spans two nodes, the first time: all build their layers.

    Args:
        prefix: the projection's name, by which a quantisation may leave it out.
    """
    arguments = get_global_server_args()
    num_ranks = shards.q.num_ranks
    ranks_per_node = tp_ranks_per_node(arguments.tp_size, arguments.pp_size, arguments.nnodes)
    if num_ranks <= ranks_per_node:
        return None
    reason = reason_against_counterpart(
        num_ranks, ranks_per_node, shards.kv.replicas, loads_alike=_loads_row_by_row(quant_config, prefix),
        **_choices_of_any_rank(),
    )  # fmt: skip
    if reason is not None:
        log_once(f"The sums of QK norm go over the network between the nodes: {reason}.")
        return None
    log_once(
        f"The sums of QK norm stay within a node: each of {ranks_per_node} ranks also projects q and k of a rank of "
        f"the other node. {SWITCH}=0 turns it off."
    )
    return Counterpart(counterpart_of(attn_tp_rank, num_ranks), _node_group(ranks_per_node))


def _loads_row_by_row(quant_config: QuantizationConfig | None, prefix: str) -> bool:
    """Whether rows of the projection, or blocks of them, have nothing in common: no scale of the whole."""
    method = LinearBase(1, 1, quant_config=quant_config, prefix=prefix).quant_method
    if type(method) is UnquantizedLinearMethod:
        return True
    is_fp8 = type(method) is Fp8LinearMethod and not method.use_mxfp8
    return is_fp8 and method.block_quant and method.is_checkpoint_fp8_serialized


@functools.cache
def _choices_of_any_rank() -> dict[str, bool]:
    """What the command line and the environment of any rank say against a counterpart.

    Each node has its own, and a rank that sums over both nodes would wait for ever for one that does not: so what one
    rank was told, all of them do.
    """
    arguments = get_global_server_args()
    choices = {
        "lora": bool(arguments.enable_lora or arguments.lora_paths),
        "pdmux": bool(arguments.enable_pdmux),
        "memory_saver": bool(arguments.enable_memory_saver),
        "switched_off": os.environ.get(SWITCH, "1") == "0",
    }
    of_all_ranks = get_world_group().all_gather_object(choices)
    return {name: any(of_rank[name] for of_rank in of_all_ranks) for name in choices}


@functools.cache
def _node_group(ranks_per_node: int):
    """The engine's group of this node's ranks. Every rank of the server makes the groups of all nodes."""
    world = get_world_group()
    nodes = [list(range(first, first + ranks_per_node)) for first in range(0, world.world_size, ranks_per_node)]
    backend = torch.distributed.get_backend(world.device_group)
    with torch.device("cpu"):  # as the engine makes its groups, and not on the device where a model is being built
        return init_model_parallel_group(nodes, world.local_rank, backend, group_name="attention_tp_node")


def build_qkv_proj(counterpart: Counterpart | None, *sizes: int, **options) -> QKVParallelLinear:
    """The engine's projection to q, k and v, or the one that gives the counterpart's q and k as well."""
    if counterpart is None:
        return QKVParallelLinear(*sizes, **options)
    return QKVWithCounterpart(*sizes, counterpart_rank=counterpart.rank, **options)


class QKVWithCounterpart(QKVParallelLinear):
    """The engine's projection to this rank's q, k and v, and behind them to its counterpart's q and k.

    Its output is [tokens, (2 heads + 3 KV heads) a rank * head_size]: q, k, v, counterpart's q, counterpart's k.

    Args:
        as the engine's, without a bias, and ``counterpart_rank``, of attention TP. The weights are unquantised or in
        FP8 blocks.
    """

    def __init__(
        self, hidden_size: int, head_size: int, total_num_heads: int, total_num_kv_heads: int, *,
        bias: bool, quant_config: QuantizationConfig | None, prefix: str, tp_rank: int, tp_size: int,
        counterpart_rank: int,
    ) -> None:  # fmt: skip
        assert not bias, "a bias of q, k and v is not loaded for a counterpart: MiniMax-M2 has none"
        self.hidden_size, self.head_size, self.v_head_size = hidden_size, head_size, head_size
        self.total_num_heads, self.total_num_kv_heads = total_num_heads, total_num_kv_heads
        self.num_heads = total_num_heads // tp_size
        self.num_kv_heads = max(1, total_num_kv_heads // tp_size)
        self.num_kv_head_replicas = max(1, tp_size // total_num_kv_heads)
        self.q_proj_shard_size = self.num_heads * head_size
        self.kv_proj_shard_size = self.v_proj_shard_size = self.num_kv_heads * head_size
        self.counterpart_rank = counterpart_rank
        q, kv = self.q_proj_shard_size, self.kv_proj_shard_size
        self.output_sizes = [rows * tp_size for rows in (q, kv, kv, q, kv)]
        # Not the engine's own __init__, which knows three parts and allocates them.
        ColumnParallelLinear.__init__(
            self, hidden_size, sum(self.output_sizes), bias=bias, quant_config=quant_config, prefix=prefix,
            tp_rank=tp_rank, tp_size=tp_size,
        )  # fmt: skip

    def weight_loader(self, param, loaded_weight, loaded_shard_id=None) -> None:
        self._load(super().weight_loader, param, loaded_weight, loaded_shard_id)

    def weight_loader_v2(self, param, loaded_weight, loaded_shard_id=None) -> None:
        self._load(super().weight_loader_v2, param, loaded_weight, loaded_shard_id)

    def _load(self, load_own, param: torch.nn.Parameter, loaded: torch.Tensor, shard: str | None) -> None:
        """Loads the own part of ``shard``, "q", "k" or "v", as the engine does, and then the counterpart's.

        Args:
            load_own: the engine's loader.
            loaded: rows of the whole model's weight, or scales of blocks of them; without ``shard`` of q, k and v.
        """
        if shard is None:
            heads = (self.total_num_heads, self.total_num_kv_heads, self.total_num_kv_heads)
            parts = loaded.split([loaded.shape[0] * of_part // sum(heads) for of_part in heads])
            for name, part in zip("qkv", parts, strict=True):
                self._load(load_own, param, part, name)
            return
        load_own(param, loaded, shard)
        if shard == "v":
            return
        rows_per_entry = self.output_size_per_partition // param.shape[0]  # 1, or those of a block
        q, kv = self.q_proj_shard_size // rows_per_entry, self.kv_proj_shard_size // rows_per_entry
        if shard == "q":
            start, size, part = q + 2 * kv, q, self.counterpart_rank
        else:
            start, size, part = 2 * q + 2 * kv, kv, self.counterpart_rank // self.num_kv_head_replicas
        param.data.narrow(0, start, size).copy_(loaded.narrow(0, part * size, size))
