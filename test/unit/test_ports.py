"""What a server's ports are: free, its own, and not among those that Linux gives to whoever asks for any."""

from __future__ import annotations

import argparse
import random
import socket
import subprocess
import sys

import pytest
from sglang.srt.server_args import ServerArgs

from sglang_minimax import ports

# Of a server: its HTTP port, up to 13 behind where nodes meet, and under DP attention those from 233 behind it on.
DERIVED = (*range(14), *range(233, 270))


@pytest.fixture
def in_this_order(monkeypatch):
    """Makes the blocks of ports be tried in an order, here and in other processes that begin with what it returns."""

    def order(first_ports: list[int]) -> str:
        monkeypatch.setattr(random, "sample", lambda *_: first_ports)
        return f"import random; random.sample = lambda *_: {first_ports}\n"

    return order


def two_free_blocks() -> tuple[int, int]:
    first, other = ports.free_port() - 1, ports.free_port() - 1
    for _ in range(2):
        ports._GUARDS.pop().close()
    return first, other


def test_servers_that_start_at_once_are_given_ports_of_their_own():
    given = sorted(ports.free_port() for _ in range(15))
    derived = [port + offset for port in given for offset in DERIVED]
    assert len(set(derived)) == len(derived) and max(derived) < 32768


def test_other_processes_are_given_others_as_long_as_one_lives(in_this_order):
    first, other = two_free_blocks()
    ask = in_this_order([first, other]) + "from sglang_minimax.ports import free_port; print(free_port(), flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{ask}; input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert int(process.stdout.readline()) == first + 1
        assert ports.free_port() == other + 1
        process.communicate("\n", timeout=60)
    assert ports.free_port() == first + 1


@pytest.mark.parametrize("offset", [0, 1, 13, 233, 269])
def test_a_port_is_given_if_all_that_the_engine_derives_from_it_are_free(in_this_order, offset):
    first, other = two_free_blocks()
    in_this_order([first, other])
    with socket.socket() as taken:
        taken.bind(("", first + 1 + offset))
        assert ports.free_port() == other + 1
    assert ports.free_port() == first + 1


def test_ports_are_kept_for_the_last_twenty():
    for _ in range(25):
        ports.free_port()
    assert len(ports._GUARDS) == 20


def test_without_a_free_range_it_says_so(in_this_order):
    in_this_order([])
    with pytest.raises(OSError, match="no free range of ports between 10000 and 32000"):
        ports.free_port()


def test_the_ranks_meet_at_a_port_that_nobody_is_given_before_they_listen():
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    port = ports.free_port()
    options = parser.parse_args(["--model-path", "MiniMax-M2.5", *ports.port_flags(port)])
    assert options.port == port and options.nccl_port in range(port + 1, port + 14)
    assert options.nccl_port < 32768
