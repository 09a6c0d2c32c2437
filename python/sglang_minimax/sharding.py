"""The overlay's sharding arithmetic and rules for processes that do not import the engine.

``minimax_sharding``, ``minimax_qk_norm_paths`` and ``minimax_all_reduce_norm_paths`` of ``sglang.srt.layers`` are pure
integers, but importing them by that name imports ``sglang``, which may be missing, stock
(``SGLANG_MINIMAX_OVERLAY=0``) or simply slow. So each file is executed from where it stands.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import TYPE_CHECKING

from sglang_minimax import overlay

if TYPE_CHECKING:
    from types import ModuleType


def _load(name: str) -> ModuleType:
    path = os.path.join(overlay.folder(), "srt", "layers", f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"sglang_minimax._file_of_{name}", path)
    assert spec is not None and spec.loader is not None, f"{path} cannot be loaded as a module"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


if TYPE_CHECKING:
    from sglang.srt.layers import minimax_all_reduce_norm_paths as _norm_paths
    from sglang.srt.layers import minimax_qk_norm_paths as _paths
    from sglang.srt.layers import minimax_sharding as _file
else:
    _file = _load("minimax_sharding")
    _norm_paths = _load("minimax_all_reduce_norm_paths")
    _paths = _load("minimax_qk_norm_paths")

AttentionShards = _file.AttentionShards
ExpertShape = _file.ExpertShape
HeadShards = _file.HeadShards
attention_tp_size = _file.attention_tp_size
check_vocabulary = _file.check_vocabulary
padded_vocabulary = _file.padded_vocabulary
pipeline_layers = _file.pipeline_layers
quantisation_block = _file.quantisation_block
reason_against_context_parallelism = _file.reason_against_context_parallelism
reason_against_runner = _file.reason_against_runner
reason_against_a2a_backend = _file.reason_against_a2a_backend
reason_against_stages_of_triton = _file.reason_against_stages_of_triton
shard_attention = _file.shard_attention
working_ep_sizes = _file.working_ep_sizes
tp_ranks_per_node = _file.tp_ranks_per_node
working_tp_sizes = _file.working_tp_sizes

reason_against_counterpart = _paths.reason_against_counterpart
reason_against_exchange = _paths.reason_against_exchange
reason_against_one_kernel = _paths.reason_against_one_kernel
reason_against_store = _paths.reason_against_store

FLASHINFER_BY_DEFAULT = _norm_paths.FLASHINFER_BY_DEFAULT
MAX_TOKENS_OF_ONE_LAUNCH = _norm_paths.MAX_TOKENS
reason_against_one_launch = _norm_paths.reason_against_one_launch
reason_against_peers = _norm_paths.reason_against_peers
