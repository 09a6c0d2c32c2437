"""A node that is gone while no request runs ends the server, instead of leaving the next request to wait for it.

Ranks of several nodes meet in every turn of their event loops, to hear of requests, also where there are none. A node
without power or network closes no connection, so the others wait there: the engine's watchdog looks at batches that
run, and the group's own timeout is half an hour.
"""

from __future__ import annotations

import functools
from typing import Any

from sglang_minimax.adjustments import EngineModule, EngineObject
from sglang_minimax.server_arguments import is_minimax


class Turns:
    """How often an event loop has come around, and whether it must come around soon."""

    def __init__(self) -> None:
        self.count = 0
        self.must_go_on = False

    def receive(self, engine_receives: Any) -> Any:
        """``Scheduler.recv_requests``, with which a turn begins."""

        @functools.wraps(engine_receives)
        def recv_requests() -> Any:
            self.count += 1
            self.must_go_on = True
            return engine_receives()

        return recv_requests

    def process(self, engine_processes: Any) -> Any:
        """``Scheduler.process_input_requests``, which may take as long as it likes: it loads weights, for one."""

        @functools.wraps(engine_processes)
        def process_input_requests(requests: Any) -> Any:
            self.must_go_on = False
            engine_processes(requests)
            self.count += 1
            self.must_go_on = True

        return process_input_requests


def watch_event_loops(scheduler_module: EngineModule) -> None:
    """Gives the ranks of several nodes a watchdog more; runs once, after the engine's scheduler was imported."""
    scheduler_class = scheduler_module.Scheduler
    engine = scheduler_class.init_watch_dog_memory_saver_input_blocker

    @functools.wraps(engine)
    def init_watch_dog_memory_saver_input_blocker(self: EngineObject) -> None:
        engine(self)
        if self.server_args.nnodes > 1 and is_minimax(self.model_config):
            _watch(self)

    scheduler_class.init_watch_dog_memory_saver_input_blocker = init_watch_dog_memory_saver_input_blocker


def _watch(scheduler: EngineObject) -> None:
    from sglang.srt.utils.watchdog import WatchdogRaw

    turns, seconds = Turns(), scheduler.server_args.watchdog_timeout
    scheduler.recv_requests = turns.receive(scheduler.recv_requests)
    scheduler.process_input_requests = turns.process(scheduler.process_input_requests)
    scheduler.watchdog_of_nodes = WatchdogRaw(
        debug_name="Nodes",
        get_counter=lambda: turns.count,
        is_active=lambda: turns.must_go_on,
        watchdog_timeout=seconds,
        dump_info=lambda: (
            f"This rank has waited for the other ranks for over {seconds:.0f} s (--watchdog-timeout): a node, or the "
            "network to it, is gone, or a rank hangs. The server ends; start it on all nodes."
        ),
    )


ADJUSTMENTS = [("sglang.srt.managers.scheduler", watch_event_loops)]
