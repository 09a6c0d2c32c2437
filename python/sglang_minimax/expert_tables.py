"""Lets the engine find this project's tuned configurations of its Triton expert GEMMs.

The engine reads tables by local experts, width, dtype and GPU, from ``configs/triton_X_Y_Z`` beside its own module, and
has none for most of MiniMax-M2's shapes. Ours lie at the same path of the overlay, in the same format, as
``benchmark/tune_experts.py`` writes them. A file's name does not say for which hidden size it was measured, so ours are
for ``HIDDEN_SIZE`` only; every other model finds what it found before.

A person's own SGLANG_MOE_CONFIG_DIR comes first, and so does --enable-deterministic-inference, which wants no table.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from typing import Any

from sglang_minimax.adjustments import EngineModule
from sglang_minimax.overlay import folder

HIDDEN_SIZE = 3072
FOLDER = ("srt", "layers", "moe", "fused_moe_triton", "configs")

logger = logging.getLogger(__name__)

Table = dict[int, dict[str, Any]]


def prefer_tuned_tables(config_module: EngineModule) -> None:
    """Puts our tables in front of the engine's; runs once, after its ``fused_moe_triton_config`` was imported."""
    choose, find = config_module.try_get_optimal_moe_config, config_module.get_moe_configs
    hidden_size = None

    @functools.wraps(choose)
    def try_get_optimal_moe_config(w1_shape: tuple[int, ...], w2_shape: tuple[int, ...], *args: Any, **kw: Any) -> Any:
        nonlocal hidden_size
        hidden_size = w2_shape[1]  # of [local experts, hidden_size, width]
        return choose(w1_shape, w2_shape, *args, **kw)

    @functools.wraps(find)
    def get_moe_configs(
        E: int,
        N: int,
        dtype: str | None,
        block_n: int = 0,
        block_k: int = 0,
        per_channel_quant: bool = False,
        down_moe: bool = False,
    ) -> Table | None:
        ours = None
        if (
            hidden_size == HIDDEN_SIZE
            and "SGLANG_MOE_CONFIG_DIR" not in os.environ
            and not config_module.get_global_server_args().enable_deterministic_inference
        ):
            name = config_module.get_config_file_name(
                E, N, dtype, [block_n, block_k], per_channel_quant, down_moe=down_moe
            )
            ours = read_table(name, config_module.triton.__version__)
        if ours is not None:
            return ours
        theirs: Table | None = find(E, N, dtype, block_n, block_k, per_channel_quant, down_moe=down_moe)
        return theirs

    get_moe_configs.cache_clear = find.cache_clear  # type: ignore[attr-defined]
    config_module.try_get_optimal_moe_config = try_get_optimal_moe_config
    config_module.get_moe_configs = get_moe_configs


@functools.lru_cache
def read_table(name: str, triton_version: str) -> Table | None:
    """Our table of this file name, by token count: of this Triton version, else of the newest that has one."""
    root = os.path.join(folder(), *FOLDER)
    versions = sorted(os.listdir(root), key=_numbers, reverse=True) if os.path.isdir(root) else []
    wanted = "triton_" + triton_version.replace(".", "_")
    for version in sorted(versions, key=lambda one: one != wanted):
        path = os.path.join(root, version, name)
        if os.path.isfile(path):
            logger.info("Expert GEMMs take their configuration from %s, with Triton %s.", path, triton_version)
            with open(path, encoding="utf-8") as stream:
                return {int(tokens): config for tokens, config in json.load(stream).items()}
    return None


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


ADJUSTMENTS = [("sglang.srt.layers.moe.fused_moe_triton.fused_moe_triton_config", prefer_tuned_tables)]
