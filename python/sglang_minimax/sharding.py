"""The overlay's sharding arithmetic for processes that do not import the engine.

``sglang.srt.layers.minimax_sharding`` is pure integers, but importing it by that name imports ``sglang``, which may
be missing, stock (``SGLANG_MINIMAX_OVERLAY=0``) or simply slow. So the one file is executed from where it stands.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import TYPE_CHECKING

from sglang_minimax import overlay

if TYPE_CHECKING:
    from types import ModuleType


def _load() -> ModuleType:
    path = os.path.join(overlay.folder(), "srt", "layers", "minimax_sharding.py")
    spec = importlib.util.spec_from_file_location("sglang_minimax._sharding_file", path)
    assert spec is not None and spec.loader is not None, f"{path} cannot be loaded as a module"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


if TYPE_CHECKING:
    from sglang.srt.layers import minimax_sharding as _file
else:
    _file = _load()

AttentionShards = _file.AttentionShards
ExpertShape = _file.ExpertShape
HeadShards = _file.HeadShards
attention_tp_size = _file.attention_tp_size
pipeline_layers = _file.pipeline_layers
quantisation_block = _file.quantisation_block
shard_attention = _file.shard_attention
working_ep_sizes = _file.working_ep_sizes
working_tp_sizes = _file.working_tp_sizes
