"""Whether GPUs reach each other: what one rank cannot find out, none takes for granted, and no server ends over it."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.distributed import parallel_state
from sglang.srt.distributed.device_communicators import custom_all_reduce_utils as engine
from sglang.srt.layers import minimax_log, minimax_nvlink

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def host(monkeypatch):
    """A rank of two on GPUs that the engine finds linked; ``others``: what the other rank answers, in turn."""
    found = SimpleNamespace(others=[True, True], linked=True, said=[])

    def check(*_):
        if isinstance(found.linked, Exception):
            raise found.linked
        return found.linked

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(parallel_state, "_ENABLE_CUSTOM_ALL_REDUCE", True)
    monkeypatch.setattr(engine, "can_use_custom_all_reduce_with_nvlink", check)
    monkeypatch.setattr(minimax_log, "log_info_on_rank0", lambda logger, text: found.said.append(text))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    minimax_log.log_once.cache_clear()
    return found


def reachable(host) -> bool:
    class Group:  # one that can be a key of a cache
        cpu_group, world_size = None, 2
        all_gather_object = staticmethod(lambda mine: [mine, host.others.pop(0)])

    return minimax_nvlink.peers_are_reachable(Group(), DEVICE)


@pytest.mark.parametrize("visible", [None, "", "0,1", " 4, 5"])
def test_gpus_that_the_engine_finds_linked_are_reachable(host, monkeypatch, visible):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert reachable(host) is True and not host.said


@pytest.mark.parametrize("linked", [False, None])
def test_others_are_not(host, linked):
    host.linked = linked
    assert reachable(host) is False


def test_names_in_place_of_numbers_do_not_reach_the_engines_check(host, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1b2c3d4e,GPU-5b2c3d4e")
    host.linked = ValueError("invalid literal for int()")
    assert reachable(host) is False
    assert host.others == [True], "the first question settles it"
    assert "CUDA_VISIBLE_DEVICES=GPU-1b2c3d4e,GPU-5b2c3d4e names GPUs" in host.said[0]


def test_nor_does_a_process_that_sees_its_own_gpu_only(host, monkeypatch):
    """In the engine's check its rank 0 would fail, and the others wait for it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert reachable(host) is False and host.others == [True]
    assert "sees 1 GPUs, and the group has 2" in host.said[0]


def test_a_check_that_fails_is_said_and_leaves_the_server_to_other_ways(host, caplog):
    host.linked = RuntimeError("NVML is not there")
    with caplog.at_level(logging.WARNING):
        assert reachable(host) is False
    assert "RuntimeError: NVML is not there" in caplog.text


@pytest.mark.parametrize("others", [[False], [True, False]], ids=["cannot check", "finds no link"])
def test_what_another_rank_says_holds_for_all(host, others):
    host.others = others
    assert reachable(host) is False and not host.others
