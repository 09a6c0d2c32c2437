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

    def test_ranks_that_live_are_heard_of_in_every_round(self, ranks):
        for rounds in (1, 2, 3):
            beat(*ranks)
            assert [(rank.rounds, rank.silent) for rank in ranks] == [(rounds, [])] * 3

    def test_a_rank_that_has_not_begun_is_waited_for(self, ranks):
        for _ in range(3):
            beat(*ranks[:2])
        assert [(rank.rounds, rank.silent) for rank in ranks[:2]] == [(3, [])] * 2

    def test_one_that_falls_silent_is_named_and_ends_the_rounds_of_all_others(self, ranks):
        beat(*ranks)
        beat(*ranks[:2])  # it was heard of after the first of them had looked
        for _ in range(3):
            beat(*ranks[:2])
        assert [rank.silent for rank in ranks[:2]] == [[2], [2]]
        rounds = [rank.rounds for rank in ranks[:2]]
        beat(*ranks[:2])
        assert [rank.rounds for rank in ranks[:2]] == rounds
        beat(ranks[2], *ranks[:2])
        assert [(rank.rounds, rank.silent) for rank in ranks[:2]] == [(before + 1, []) for before in rounds]

    def test_without_a_store_there_are_no_rounds_and_no_thread(self, ranks, store):
        beat(ranks[1])
        store.gone = dist.DistNetworkError("Connection was likely closed")
        ranks[1].keep()
        assert (ranks[1].rounds, ranks[1].silent) == (1, None)


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


def test_a_rank_may_wait_for_others_that_live_and_not_for_one_that_is_gone(watchdogs, other_ranks):
    """The thread here is a rank's event loop: it waits for ranks that load what they were told to, say."""
    scheduler = started_scheduler()
    [watchdog] = watchdogs
    assert scheduler.did == ["the engine's own"] and watchdog.watchdog_timeout == 300
    until(lambda: watchdog.get_counter() >= 2)  # the others load yet

    def lives() -> bool:
        before = watchdog.get_counter()
        beat(*other_ranks)
        until(lambda: watchdog.get_counter() > before)
        return True

    assert all(lives() for _ in range(5))
    until(lambda: watchdog.is_active() and "heard of ranks 1-3 for" in watchdog.dump_info())
    rounds = watchdog.get_counter()
    for _ in range(5):
        beat(*other_ranks[:2])
        until(lambda: watchdog.is_active() and "heard of rank 3 for" in watchdog.dump_info())
    assert watchdog.get_counter() == rounds
    assert lives(), "it was not gone: its network is back"


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
