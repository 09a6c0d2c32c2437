"""Which ranks are held to be lost, and what the watchdog is told of that, while their event loops do what they like."""

from __future__ import annotations

import collections
import threading
import time
from types import SimpleNamespace

import pytest
import sglang.srt.utils.watchdog
import torch.distributed as dist

from sglang_minimax import lost_nodes
from sglang_minimax.lost_nodes import Heartbeats
from sglang_minimax.server_arguments import ARCHITECTURE


class Store:
    """In place of torch.distributed's, which all ranks share; ``gone`` says how its host went."""

    def __init__(self):
        self.values, self.gone, self.lock = collections.Counter(), None, threading.Lock()

    def clone(self):
        return self

    def add(self, key: str, amount: int) -> int:
        if self.gone:
            raise self.gone
        with self.lock:
            self.values[key] += amount
            return self.values[key]


def beat(*ranks: Heartbeats) -> None:
    for rank in ranks:
        rank.beat()


@pytest.fixture
def store():
    store = Store()
    yield store
    store.gone = dist.DistNetworkError("the test is over: threads end")


class TestHeartbeats:
    @pytest.fixture
    def ranks(self, store):
        return [Heartbeats(store, rank, 3) for rank in range(3)]

    def test_at_every_look_at_ranks_that_live_none_is_silent(self, ranks):
        for looks in range(1, 9):
            beat(*ranks)
            assert [(rank.good_looks, rank.silent) for rank in ranks] == [(looks, [])] * 3

    def test_a_rank_that_has_not_begun_is_waited_for(self, ranks):
        for _ in range(8):
            beat(*ranks[:2])
        assert [(rank.good_looks, rank.silent) for rank in ranks[:2]] == [(8, [])] * 2

    def test_ranks_that_beat_more_slowly_than_one_looks_are_not_silent(self, ranks):
        for _ in range(5):
            beat(*ranks, ranks[0], ranks[0])
        assert (ranks[0].good_looks, ranks[0].silent) == (15, [])

    @pytest.mark.parametrize("last", [[], [1], [2], [1, 2]])  # who beats once more after the first one's last look
    def test_those_that_fall_silent_are_named_until_they_are_heard_of_again(self, ranks, last):
        first = ranks[0]
        for _ in range(2):
            beat(*ranks)
        first.beat()
        beat(*(ranks[rank] for rank in last))
        for _ in range(4):
            first.beat()
        assert first.silent == [1, 2]
        looks = first.good_looks
        beat(ranks[1], first)
        assert (first.silent, first.good_looks) == ([2], looks)
        beat(*ranks[1:], first)
        assert (first.silent, first.good_looks) == ([], looks + 1)

    def test_without_a_store_there_are_no_looks_and_no_thread(self, ranks, store):
        beat(ranks[1])
        store.gone = dist.DistNetworkError("Connection was likely closed")
        ranks[1].keep()
        assert (ranks[1].good_looks, ranks[1].silent) == (1, None)


@pytest.fixture
def watchdogs(monkeypatch):
    """The watchdogs that were started, in place of threads that would end this test's parent."""
    started = []
    monkeypatch.setattr(
        sglang.srt.utils.watchdog, "WatchdogRaw", lambda **options: started.append(SimpleNamespace(**options))
    )
    return started


@pytest.fixture
def other_ranks(monkeypatch, store):
    """The others of a server of four ranks, in which this process is rank 0."""
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(lost_nodes, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    return [Heartbeats(store, rank, 4) for rank in (1, 2, 3)]


def started_scheduler(nnodes: int = 2, architecture: str = ARCHITECTURE, elastic: str | None = None):
    class Scheduler:
        def __init__(self):
            self.server_args = SimpleNamespace(nnodes=nnodes, watchdog_timeout=300, elastic_ep_backend=elastic)
            self.model_config = SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]))
            self.did = []

        def init_watch_dog_memory_saver_input_blocker(self):
            self.did.append("the engine's own")

    lost_nodes.watch_other_nodes(SimpleNamespace(Scheduler=Scheduler))
    scheduler = Scheduler()
    scheduler.init_watch_dog_memory_saver_input_blocker()
    return scheduler


def until(holds) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_rank_may_wait_for_others_that_live_and_not_for_those_that_are_gone(watchdogs, other_ranks):
    """The thread here is a rank's event loop: it waits for ranks that load what they were told to, say."""
    scheduler = started_scheduler()
    [watchdog] = watchdogs
    assert scheduler.did == ["the engine's own"] and watchdog.watchdog_timeout == 300
    until(lambda: watchdog.get_counter() >= 5)  # the others have yet to begin

    def goes_on() -> bool:
        before = watchdog.get_counter()

        def others_beat_and_it_is_heard() -> bool:
            beat(*other_ranks)
            return watchdog.get_counter() > before

        until(others_beat_and_it_is_heard)
        return True

    assert all(goes_on() for _ in range(5))
    until(lambda: watchdog.is_active() and "heard of ranks 1-3 for" in watchdog.dump_info())
    looks = watchdog.get_counter()
    time.sleep(0.1)
    assert watchdog.get_counter() == looks
    assert goes_on(), "they were not gone: their network is back"


@pytest.mark.usefixtures("other_ranks")
def test_while_every_rank_was_heard_of_no_clock_ends_the_server(watchdogs, monkeypatch):
    """As after all hosts stood still for longer than the watchdog's time: here none beats again."""
    monkeypatch.setattr(lost_nodes, "BEAT_SECONDS", 1e6)
    started_scheduler()
    [watchdog] = watchdogs
    until(lambda: watchdog.get_counter() == 1 and not watchdog.is_active())


@pytest.mark.usefixtures("other_ranks")
def test_a_store_that_does_not_answer_is_the_first_nodes(watchdogs, store):
    with store.lock:
        started_scheduler()
        [watchdog] = watchdogs
        assert watchdog.is_active() and watchdog.get_counter() == 0
        assert "Nothing was heard of the first node for over 300 s (--watchdog-timeout)" in watchdog.dump_info()


@pytest.mark.parametrize(
    ("nnodes", "architecture", "elastic"),
    [(1, ARCHITECTURE, None), (2, "LlamaForCausalLM", None), (2, ARCHITECTURE, "mooncake")],
)
@pytest.mark.usefixtures("other_ranks")
def test_one_node_other_models_and_servers_that_go_on_without_ranks_are_left_alone(
    nnodes, architecture, elastic, watchdogs
):
    scheduler = started_scheduler(nnodes, architecture, elastic)
    assert scheduler.did == ["the engine's own"] and not watchdogs and not hasattr(scheduler, "watchdog_of_nodes")
