"""Which KV heads a decode rank gets from which prefill rank, through the engine's own Mooncake transfer."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from sglang.srt.disaggregation.common.conn import CommonKVManager
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager

BYTES = 256  # of a head's keys of one token


def held(num_kv_heads: int, ranks: int, rank: int) -> list[int]:
    """Heads of a rank, by the shards of the engine's ``QKVParallelLinear``."""
    if ranks <= num_kv_heads:
        return list(range(rank * num_kv_heads // ranks, (rank + 1) * num_kv_heads // ranks))
    return [rank // (ranks // num_kv_heads)]


def ranks_asked(prefill: int, decode: int, rank: int, backend: str = "mooncake", config=None) -> list[int]:
    """The prefill ranks that a decode rank asks for its heads."""
    manager = CommonKVManager.__new__(CommonKVManager)
    config = config or SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["MiniMaxM2ForCausalLM"]), get_total_num_kv_heads=lambda: 8
    )
    manager.server_args = SimpleNamespace(
        get_model_config=lambda: config, disaggregation_transfer_backend=backend.split()[0]
    )
    manager.enable_staging = "STAGING" in backend
    manager.kv_args, manager.is_mla_backend = SimpleNamespace(engine_rank=rank), False
    manager.attn_tp_size, manager.attn_cp_size, manager.attn_cp_rank = decode, 1, 0
    manager.pp_size, manager.pp_rank, manager.enable_all_cp_ranks_for_transfer = 1, 0, False
    info = SimpleNamespace(attn_tp_size=prefill, attn_cp_size=1, pp_size=1)
    manager._resolve_rank_mapping(info)
    return info.target_tp_ranks


def received(num_kv_heads: int, prefill: int, decode: int, prefill_rank: int, decode_rank: int) -> dict[int, int]:
    """Place in a decode rank's row of one token: the head that a prefill rank sends there."""
    source, target = held(num_kv_heads, prefill, prefill_rank), held(num_kv_heads, decode, decode_rank)
    sent: list[tuple[int, int, int]] = []

    def transfer(session, sources, targets, lengths):
        sent.extend(zip(sources, targets, lengths, strict=True))
        return 0

    manager = MooncakeKVManager.__new__(MooncakeKVManager)
    manager.attn_tp_size, manager.engine = prefill, SimpleNamespace(batch_transfer_sync=transfer)
    manager.kv_args = SimpleNamespace(
        engine_rank=prefill_rank, kv_item_lens=[len(source) * BYTES], page_size=1, total_kv_head_num=num_kv_heads,
        kv_head_num=len(source), kv_data_ptrs=[0, 0],
    )  # fmt: skip
    manager.get_mha_kv_ptrs_with_pp = lambda mine, theirs: ([0], [0], [0], [0], 1)
    slots = np.zeros(1, np.int32)
    with ThreadPoolExecutor(1) as executor:
        status = manager.send_kvcache_slice(
            "session", slots, [0, 0], slots, decode_rank, decode, len(target) * BYTES, executor
        )
    assert status == 0 and len(sent) == 2 and sent[0] == sent[1], "keys, and values"
    start, place, length = (number // BYTES for number in sent[0])
    return {place + i: source[start + i] for i in range(length)}


SIZES = [1, 2, 4, 8, 16, 32]  # of the same, rows go over as they are, by another function


@pytest.mark.parametrize(("prefill", "decode"), itertools.permutations(SIZES, 2))
def test_every_decode_rank_gets_the_heads_that_it_holds(prefill, decode):
    for rank in range(decode):
        row: dict[int, int] = {}
        for prefill_rank in ranks_asked(prefill, decode, rank):
            row |= received(8, prefill, decode, prefill_rank, rank)
        assert row == dict(enumerate(held(8, decode, rank))), f"decode rank {rank} of {decode}"


@pytest.mark.parametrize("backend", ["nixl", "mori", "mooncake with SGLANG_DISAGG_STAGING_BUFFER=1"])
@pytest.mark.parametrize(("prefill", "decode"), [(1, 16), (8, 16), (16, 8), (16, 1)])
def test_other_transfers_refuse_shared_heads(backend, prefill, decode):
    said = rf"{prefill} attention ranks prefill, {decode} decode, .* 8 KV heads.*{backend} .* Take mooncake"
    with pytest.raises(RuntimeError, match=said):
        ranks_asked(prefill, decode, 0, backend)


@pytest.mark.parametrize(("prefill", "decode"), [(16, 16), (8, 4), (1, 8)])
def test_other_transfers_are_left_where_ranks_tell_heads(prefill, decode):
    assert ranks_asked(prefill, decode, 0, "nixl")


def test_other_models_are_left_to_the_engine():
    other = SimpleNamespace(hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]))
    assert ranks_asked(1, 16, 3, "nixl", other) == [0]
