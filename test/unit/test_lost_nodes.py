"""When a rank of several nodes is held to have waited too long: what the watchdog is given, turn by turn."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import sglang.srt.utils.watchdog

from sglang_minimax import lost_nodes
from sglang_minimax.server_arguments import ARCHITECTURE


@pytest.fixture
def watchdogs(monkeypatch):
    """The watchdogs that were started, in place of threads that would end this test's parent."""
    started = []
    monkeypatch.setattr(
        sglang.srt.utils.watchdog, "WatchdogRaw", lambda **options: started.append(SimpleNamespace(**options))
    )
    return started


def started_scheduler(nnodes: int = 2, architecture: str = ARCHITECTURE):
    """A scheduler that says, whenever it is asked for its next step, what its watchdog would then see."""

    class Scheduler:
        def __init__(self):
            self.server_args = SimpleNamespace(nnodes=nnodes, watchdog_timeout=300)
            self.model_config = SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]))
            self.seen = []
            self.look = lambda: None

        def init_watch_dog_memory_saver_input_blocker(self):
            self.seen.append("the engine's own")

        def recv_requests(self):
            self.seen.append(("receives", self.look()))
            return ["a request"]

        def process_input_requests(self, requests):
            self.seen.append((f"processes {requests}", self.look()))

    lost_nodes.watch_event_loops(SimpleNamespace(Scheduler=Scheduler))
    scheduler = Scheduler()
    scheduler.init_watch_dog_memory_saver_input_blocker()
    return scheduler


def test_a_turn_must_go_on_but_while_it_does_what_was_asked_for(watchdogs):
    scheduler = started_scheduler()
    [watchdog] = watchdogs
    assert scheduler.seen == ["the engine's own"]
    assert watchdog.watchdog_timeout == 300 and "over 300 s (--watchdog-timeout)" in watchdog.dump_info()
    scheduler.look = lambda: (watchdog.get_counter(), watchdog.is_active())
    assert not watchdog.is_active(), "the first turn begins when all ranks have loaded"
    for _ in range(2):
        scheduler.process_input_requests(scheduler.recv_requests())
        scheduler.seen.append(("runs a batch", scheduler.look()))
    assert scheduler.seen[1:] == [
        ("receives", (1, True)),
        ("processes ['a request']", (1, False)),
        # Counted anew: what was asked for took its time, and the batch behind it has the whole of its own.
        ("runs a batch", (2, True)),
        ("receives", (3, True)),
        ("processes ['a request']", (3, False)),
        ("runs a batch", (4, True)),
    ]


@pytest.mark.parametrize(("nnodes", "architecture"), [(1, ARCHITECTURE), (2, "LlamaForCausalLM")])
def test_one_node_and_other_models_are_left_alone(nnodes, architecture, watchdogs):
    scheduler = started_scheduler(nnodes, architecture)
    assert scheduler.recv_requests() == ["a request"] and scheduler.seen[0] == "the engine's own"
    assert not watchdogs and not hasattr(scheduler, "watchdog_of_nodes")
