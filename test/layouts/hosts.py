"""Two hosts on this machine, for what only hosts of their own have: Linux namespaces, joined by a virtual cable.

Each has a network, a name and shared memory of its own. As in many clusters its name is 127.0.1.1 to itself, which is
Debian's way, and there is no default route. Making them takes root; they are gone with the processes that hold them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_minimax.server_process import ServerError, SessionProcess

_NAMESPACES = ("--net", "--uts", "--ipc", "--mount")
_INTERFACE = "eth0"
_SETUP_SECONDS = 20
_LONGEST_SECONDS = 3600  # a host's life, where whoever made it was killed
_CLONE_NEWNET = 0x40000000  # of <sched.h>


@dataclass(frozen=True)
class Host:
    """holder: the id of the process that the host's namespaces live with."""

    address: str
    holder: int

    def command(self, words: Sequence[str]) -> list[str]:
        """``words``, to be run on this host."""
        return ["nsenter", "--target", str(self.holder), *_NAMESPACES, "--", *words]

    def enter_network(self) -> None:
        """Lets the calling thread connect as a program on this host does."""
        libc = ctypes.CDLL(None, use_errno=True)
        network = os.open(f"/proc/{self.holder}/ns/net", os.O_RDONLY)
        try:
            if libc.setns(network, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(network)

    def plug(self, into: bool) -> None:
        """Puts the cable in, or pulls it out: nobody is told, no connection is closed."""
        self.run("ip", "link", "set", _INTERFACE, "up" if into else "down")

    def run(self, *words: str) -> str:
        return subprocess.run(self.command(words), check=True, capture_output=True, text=True).stdout


def reason_against() -> str | None:
    """Why this machine cannot have them."""
    if os.geteuid() != 0:
        return "hosts of their own are Linux namespaces, which root alone may make and connect"
    if missing := [program for program in ("ip", "unshare", "nsenter") if shutil.which(program) is None]:
        return f"hosts of their own need {', '.join(missing)} (Debian: iproute2, util-linux)"
    may_not = subprocess.run(["unshare", *_NAMESPACES, "true"], capture_output=True, text=True)
    return f"hosts of their own: {may_not.stderr.strip()}" if may_not.returncode else None


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Named host0 and host1, with a cable between them. Their files are in ``folder``."""
    addresses = ("10.77.0.1", "10.77.0.2")
    with contextlib.ExitStack() as running:
        hosts = []
        for place, address in enumerate(addresses):
            name, known = f"host{place}", folder / f"etc_hosts{place}"
            other = f"{addresses[1 - place]} host{1 - place}"
            known.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{other}\n")
            setup = (
                f"mount -t tmpfs tmpfs /dev/shm && mount --bind {known} /etc/hosts && hostname {name} && "
                f"ip link set lo up && echo ready && exec sleep {_LONGEST_SECONDS}"
            )
            holder = SessionProcess(["unshare", *_NAMESPACES, "sh", "-ec", setup], folder / f"{name}.log")
            running.enter_context(holder)
            hosts.append(Host(address, _ready(holder)))
        first, second = hosts
        first.run("ip", "link", "add", _INTERFACE, "type", "veth", "peer", _INTERFACE, "netns", str(second.holder))
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", _INTERFACE)
            host.plug(into=True)
        yield first, second


def _ready(holder: SessionProcess) -> int:
    """The id of the process that holds a host, once that is set up."""
    deadline = time.monotonic() + _SETUP_SECONDS
    while "ready" not in holder.new_lines():
        if holder.has_ended() or time.monotonic() > deadline:
            raise ServerError(f"no host: {holder.log.read_text(errors='replace')}")
        time.sleep(0.05)
    return holder.pid
