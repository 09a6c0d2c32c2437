"""Prefill and decode on servers of their own, where more ranks decode than there are KV heads.

Each KV head is then on several decode ranks. The engine tells a rank's heads by its number, as if there were as many
heads as ranks, and so sends most decode ranks another rank's heads, without an error. With Mooncake the number of the
head is put in place of the rank's; the other transfers, which also cut heads in two, are refused.
"""

from __future__ import annotations

import functools
from typing import Any

from sglang_minimax.adjustments import EngineModule, EngineObject
from sglang_minimax.server_arguments import is_minimax

MENDED = ("mooncake", "ascend", "fake")  # the second is the first's on other hardware, the last sends nothing
STAGING = "SGLANG_DISAGG_STAGING_BUFFER"  # Mooncake's other way, which cuts heads by the ranks' numbers too


def send_heads_to_every_replica(mooncake: EngineModule) -> None:
    """For every model: a decode rank gets the heads that it holds."""
    manager = mooncake.MooncakeKVManager
    engine = manager.send_kvcache_slice

    @functools.wraps(engine)
    def send_kvcache_slice(
        self: EngineObject,
        session: str,
        from_indices: Any,
        to_pointers: list[int],
        to_indices: Any,
        dst_tp_rank: int,
        dst_attn_tp_size: int,
        *rest: Any,
    ) -> Any:
        if dst_attn_tp_size > self.attn_tp_size:
            rank, heads = dst_tp_rank % dst_attn_tp_size, self.kv_args.total_kv_head_num
            dst_tp_rank = rank // max(1, dst_attn_tp_size // heads)
        return engine(self, session, from_indices, to_pointers, to_indices, dst_tp_rank, dst_attn_tp_size, *rest)

    manager.send_kvcache_slice = send_kvcache_slice


def refuse_replicas_elsewhere(common: EngineModule) -> None:
    """Raises RuntimeError on the decode server, when it first hears of a prefill server whose heads it would misread.

    As the engine does where pages or dtypes of the two differ.
    """
    manager = common.CommonKVManager
    engine = manager._resolve_rank_mapping

    @functools.wraps(engine)
    def resolve_rank_mapping(self: EngineObject, info: EngineObject) -> None:
        config, backend = self.server_args.get_model_config(), self.server_args.disaggregation_transfer_backend
        staged = backend != "fake" and getattr(self, "enable_staging", False)
        if (backend not in MENDED or staged) and is_minimax(config):
            reason = reason_against_ranks(config.get_total_num_kv_heads(), info.attn_tp_size, self.attn_tp_size)
            if reason is not None:
                raise RuntimeError(
                    f"{reason}, and --disaggregation-transfer-backend {backend}{f' with {STAGING}=1' * staged} would "
                    f"send heads to ranks that hold others. Take mooncake without {STAGING}, or as many attention "
                    f"ranks on both servers."
                )
        engine(self, info)

    manager._resolve_rank_mapping = resolve_rank_mapping


def reason_against_ranks(num_kv_heads: int, prefill_ranks: int, decode_ranks: int) -> str | None:
    """Why heads cannot be told by the ranks' numbers, as a clause, or None."""
    if prefill_ranks == decode_ranks or max(prefill_ranks, decode_ranks) <= num_kv_heads:
        return None
    return f"{prefill_ranks} attention ranks prefill, {decode_ranks} decode, and there are {num_kv_heads} KV heads"


ADJUSTMENTS = [
    ("sglang.srt.disaggregation.mooncake.conn", send_heads_to_every_replica),
    ("sglang.srt.disaggregation.common.conn", refuse_replicas_elsewhere),
]
