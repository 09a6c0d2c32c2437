"""A node that is gone while no request runs ends the server, instead of leaving the next request to wait for it.

A node without power or network closes no connection. Ranks of several nodes meet in every turn of their event loops, to
hear of requests, and there the others would wait for it: the engine's watchdog looks at batches that run, and the
group's own timeout is half an hour.

That a rank waits there says little, however: the others may take longer to load the weights that all were told to
load, and a later stage of a pipeline hears of those only once the one before it has them. So each rank says every
second that it lives, from a thread of its own, in the store by which torch.distributed connected them.
"""

from __future__ import annotations

import functools
import threading
import time
from typing import Any

from sglang_minimax.adjustments import EngineModule, EngineObject
from sglang_minimax.agreement import ranks_in_words
from sglang_minimax.server_arguments import is_minimax

BEAT_SECONDS = 1.0
"""From one time that a rank says so to the next: the same on all nodes, whatever watchdog's time each was given."""
SILENT_LOOKS = 3
"""Looks in a row at which there was nothing new of a rank. At one or two, its clock and this one's may have drifted."""


class Heartbeats:
    """What this rank has heard of the others.

    Args:
        store: a client of torch.distributed's store that is used here alone. On a host that is lost it waits for ever.
        rank: this one, of the ``num_ranks`` of the server.
    """

    def __init__(self, store: Any, rank: int, num_ranks: int) -> None:
        self._store, self._rank = store, rank
        self._heard = [0] * num_ranks
        self._looks_without = [0] * num_ranks
        self.good_looks = 0
        """Those, so far, at which no rank was silent."""
        self.silent: list[int] | None = None
        """The ranks that were at the last look. None while it lasts, and where the store is gone."""

    def keep(self) -> None:
        """Beats until the store is gone."""
        while True:
            try:
                self.beat()
            except RuntimeError:  # its host closed the connection; the watchdog ends what that does not end at once
                return
            time.sleep(BEAT_SECONDS)

    def beat(self) -> None:
        """Says that this rank lives, and looks which others do. One that has yet to say so for the first time loads."""
        self.silent = None
        self._add(self._rank, 1)
        for rank, before in enumerate(self._heard):
            beats = self._heard[rank] = self._add(rank, 0)
            self._looks_without[rank] = self._looks_without[rank] + 1 if beats and beats == before else 0
        silent = [rank for rank, looks in enumerate(self._looks_without) if looks >= SILENT_LOOKS]
        self.good_looks += not silent
        self.silent = silent

    def _add(self, rank: int, beats: int) -> int:
        return int(self._store.add(f"sglang-minimax/beats/{rank}", beats))


def watch_other_nodes(scheduler_module: EngineModule) -> None:
    """Gives the ranks of several nodes a watchdog more; runs once, after the engine's scheduler was imported."""
    scheduler_class = scheduler_module.Scheduler
    engine = scheduler_class.init_watch_dog_memory_saver_input_blocker

    @functools.wraps(engine)
    def init_watch_dog_memory_saver_input_blocker(self: EngineObject) -> None:
        engine(self)
        goes_on_without_ranks = self.server_args.elastic_ep_backend not in (None, "none")
        if self.server_args.nnodes > 1 and not goes_on_without_ranks and is_minimax(self.model_config):
            _watch(self)

    scheduler_class.init_watch_dog_memory_saver_input_blocker = init_watch_dog_memory_saver_input_blocker


def _watch(scheduler: EngineObject) -> None:
    import torch.distributed as dist
    from sglang.srt.utils.watchdog import WatchdogRaw

    seconds = scheduler.server_args.watchdog_timeout
    store = dist.distributed_c10d._get_default_store().clone()
    heartbeats = Heartbeats(store, dist.get_rank(), dist.get_world_size())

    def explanation() -> str:
        silent = heartbeats.silent  # once: the thread writes it
        who = ranks_in_words(silent) if silent else "the first node"
        return (
            f"Nothing was heard of {who} for over {seconds:.0f} s (--watchdog-timeout): a node, or the network to it, "
            "is gone, or a process is stopped. The server ends; start it on all nodes."
        )

    threading.Thread(target=heartbeats.keep, daemon=True).start()
    scheduler.watchdog_of_nodes = WatchdogRaw(
        debug_name="Nodes",
        get_counter=lambda: heartbeats.good_looks,
        # Not by the clock alone: where all hosts stood still, as virtual machines do at times, nobody is lost.
        is_active=lambda: heartbeats.silent != [],
        watchdog_timeout=seconds,
        dump_info=explanation,
    )


ADJUSTMENTS = [("sglang.srt.managers.scheduler", watch_other_nodes)]
