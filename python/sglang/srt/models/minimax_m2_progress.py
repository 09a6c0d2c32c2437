"""Says while a checkpoint loads how far this rank is, in bytes and bytes a second."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator

import torch

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 10.0
_GB = 1e9


class LoadProgress:
    """Counts the tensors of one load on this rank, and logs a line each ``INTERVAL_SECONDS``.

    A rank goes through the whole checkpoint and keeps its part, so two numbers are given: the bytes of the tensors
    that it went through, which decide how long a load takes, and at the end those of the parameters that it filled.
    Lines come while tensors do: a file system that hangs shows as a last line that stays the last.

    Args:
        always: whether a load that is over within an interval gets its last line too.
        clock: seconds, from any beginning.
        say: takes each line.
    """

    def __init__(
        self,
        *,
        always: bool = True,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], object] = logger.info,
    ) -> None:
        self._always, self._clock, self._say = always, clock, say
        self._bytes = self._bytes_said = 0
        self._started = self._said = clock()

    def over(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """``weights`` one by one; each counts once it was handled, that is when the next one is asked for."""
        for name, tensor in weights:
            yield name, tensor
            self._bytes += tensor.nbytes
            now = self._clock()
            if now - self._said >= INTERVAL_SECONDS:
                rate = (self._bytes - self._bytes_said) / (now - self._said)
                self._say(
                    f"Loading weights: {self._bytes / _GB:.2f} GB of the checkpoint after {now - self._started:.0f} s, "
                    f"now at {rate / _GB:.2f} GB/s"
                )
                self._said, self._bytes_said = now, self._bytes

    def finish(self, filled: Iterable[torch.Tensor]) -> None:
        """The last line. ``filled``: the parameters of this rank that the load filled, wholly or in part."""
        seconds = self._clock() - self._started
        if not self._always and self._said == self._started:
            return
        kept = sum(parameter.nbytes for parameter in filled)
        rate = f"{self._bytes / _GB / seconds:.2f} GB/s" if seconds > 0 else "in no time"
        self._say(
            f"Loaded weights: {self._bytes / _GB:.2f} GB of the checkpoint in {seconds:.1f} s, {rate}; this rank "
            f"keeps {kept / _GB:.2f} GB"
        )
