"""TCP ports of this host, for servers that start later than they are asked for. Needs the standard library alone."""

from __future__ import annotations

import random
import socket
import threading
from collections import deque

# With DP attention the engine also listens on the ports behind the one where nodes meet, up to 13, and without nodes
# on those from its HTTP port + 233 on, a few a DP rank.
_OFFSETS = (*range(14), *range(233, 270))
_RANKS_OFFSET = 1  # among those
_BLOCK = max(_OFFSETS) + 2  # a guard and all that are derived
_FIRST_PORTS = range(10000, 32000 - _BLOCK, _BLOCK)
_GUARDS: deque[socket.socket] = deque()
_MOST_GUARDS = 20  # a quarter of all
_GIVING = threading.Lock()


def free_port() -> int:
    """An HTTP port that is free now, and with it the further ports that the engine derives from it.

    No other caller is given any of these, in this process or another, until this one has asked for 20 more or has
    ended: a server takes its ports only after it has been imported. To that end the port before them stays bound. All
    lie below those that Linux gives to whoever asks for any (32768 to 60999), which are others' before long.

    Raises:
        OSError: no such range of ports is free.
    """
    with _GIVING:
        for first in random.sample(_FIRST_PORTS, len(_FIRST_PORTS)):
            if (guard := _bound(first)) is None:
                continue
            port = first + 1
            if all(_is_free(port + offset) for offset in _OFFSETS):
                _GUARDS.append(guard)
                if len(_GUARDS) > _MOST_GUARDS:
                    _GUARDS.popleft().close()
                return port
            guard.close()
    raise OSError("no free range of ports between 10000 and 32000 on this host: end servers that are not needed")


def port_flags(port: int) -> list[str]:
    """The engine's flags for a server at ``port``, one of :func:`free_port`, all of whose ranks meet at the next one.

    Without the second flag the engine looks for any free port as its launcher starts, and its first rank listens there
    once it has been imported, many seconds later. Not for ``--dp`` without ``--enable-dp-attention``: each of its
    replicas needs a port where its own ranks meet.
    """
    return ["--port", str(port), "--nccl-port", str(port + _RANKS_OFFSET)]


def _bound(port: int) -> socket.socket | None:
    """A socket that keeps ``port``, or None: another has it."""
    taken = socket.socket()
    try:
        taken.bind(("", port))
    except OSError:
        taken.close()
        return None
    return taken


def _is_free(port: int) -> bool:
    if (taken := _bound(port)) is None:
        return False
    taken.close()
    return True
