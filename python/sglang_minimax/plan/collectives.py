"""How long a collective takes: within a node from measurement, between nodes from NCCL's own model of itself.

NCCL chooses its algorithm by predicted times, from latencies that its authors measured. Its source has them:
https://github.com/NVIDIA/nccl/blob/01afd20a77b5804e0ecf1042509dd9d20ebf9e93/src/graph/tuning.cc, ``baseLat``, ``hwLat``
and the formulas of ``ncclTopoTuneModel``. Here are those of trees, which it takes for small messages over two nodes.
"""

from __future__ import annotations

import math

NODE_US = 5.0
"""An all-reduce of 98 kB on four H200, inside a decode step, as measured; on any number of GPUs of one node."""

_BASE_US = 4.4  # a tree's start and end
_RATE_SHARE = 0.6  # NCCL's correction of a tree's rate for messages of about 64 kB to 4 MB
_TREE_GB_PER_S = 110.0  # the most that NCCL expects of trees over two nodes
# By protocol: microseconds of a step over NVLink (LL has 1.8 times that where there are several nodes), of a step over
# the network, and the share of the tree's rate.
_PROTOCOLS = {"LL": (0.52 * 1.8, 5.0, 1 / 3.8), "LL128": (1.2, 8.5, 0.915)}


def over_nodes_us(ranks_per_node: int, nodes: int, size: float) -> float:
    """An all-reduce of ``size`` bytes by NCCL over several nodes with NVLink inside and InfiniBand between them."""

    def one(nvlink_us: float, network_us: float, share: float) -> float:
        latency = _BASE_US + 2 * ((ranks_per_node - 1) * nvlink_us + math.ceil(math.log2(nodes)) * network_us)
        return latency + size / (_TREE_GB_PER_S * share / 2 * _RATE_SHARE * 1e3)

    return min(one(*protocol) for protocol in _PROTOCOLS.values())


def within_node_us(ranks: int, size: float, link_gb_per_s: float) -> float:
    """A collective in which a rank sends ``size`` bytes to the others of its node."""
    return NODE_US + size * (ranks - 1) / ranks / (link_gb_per_s * 1e3)
