"""The address at which the other nodes of a server reach this one, where nobody named it.

The engine's CPU groups (Gloo) take this host's own name for it, which in many installations is 127.0.1.1 to the host
itself, or unknown; its broadcasts of requests take the default route's address, or 0.0.0.0 where there is none. The
other nodes then wait for ever. The address from which this node reaches the first one is one that answers come back to.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import logging
import os
import socket
from typing import Any

from sglang_minimax.adjustments import EngineModule, EngineObject
from sglang_minimax.server_arguments import is_minimax

logger = logging.getLogger(__name__)

ADDRESS = "SGLANG_HOST_IP"
"""The engine's variable for this node's address. It reads HOST_IP as well."""
INTERFACE = "GLOO_SOCKET_IFNAME"
"""Gloo's, for the interface on which its groups meet."""

# Of the networks for documentation, RFC 5737 and RFC 3849: they are nobody's, so the route to them is the default one.
_ANYWHERE = ("192.0.2.1", "2001:db8::1")


def name_this_node(engine: EngineModule) -> None:
    """Where the engine's launcher sets the environment of its ranks; runs once, after its module was imported."""
    set_envs_and_config = engine._set_envs_and_config

    @functools.wraps(set_envs_and_config)
    def with_address(server_args: EngineObject) -> Any:
        # Without an address of the first node, Ray tells the ranks of one, or an orchestrator by the environment.
        if server_args.nnodes > 1 and server_args.dist_init_addr and is_minimax(server_args.get_model_config()):
            _name_this_node(server_args)
        return set_envs_and_config(server_args)

    engine._set_envs_and_config = with_address


def _name_this_node(server_args: EngineObject) -> None:
    from sglang.srt.utils.network import NetworkAddress

    first_node = NetworkAddress.parse(server_args.dist_init_addr).host
    address = os.environ.get(ADDRESS) or os.environ.get("HOST_IP") or address_towards(first_node)
    if address is None:
        if not _is_loopback(first_node):
            logger.warning(
                "By --dist-init-addr %s this node has no address that others could use, and no default route leads "
                "from it: they will not reach this one. Give the first node's address on the network between the "
                "nodes, not its name and no link-local one.",
                server_args.dist_init_addr,
            )
        return
    found = {}
    # What prefill and decode servers send each other may go by another network than what nodes do.
    if not any(map(os.environ.get, (ADDRESS, "HOST_IP", "SGLANG_LOCAL_IP_NIC"))) and (
        server_args.disaggregation_mode == "null"
    ):
        found[ADDRESS] = address
    if not os.environ.get(INTERFACE) and _own_name_is_loopback() and (interface := interface_of(address)):
        found[INTERFACE] = interface
    if found:
        os.environ.update(found)
        settings = " ".join(f"{name}={value}" for name, value in found.items())
        logger.info("Other nodes are to reach this one at %s: %s. Set these to choose another.", address, settings)


def address_towards(host: str) -> str | None:
    """This host's address on its route to ``host``, a name or an address; nothing is sent.

    A name that is this host itself to itself, as the first node's is in many installations, says nothing of the others:
    then that of the default route. None where that fails too, and for a loopback address, where all nodes are here.
    A link-local address of IPv6 is none either: it is nothing without its interface.
    """
    if _is_loopback(host):
        return None
    for target in (host, *_ANYWHERE):
        for address in _source_addresses(target):
            if not _is_loopback(address) and not _is_link_local(address):
                return address
    return None


def interface_of(address: str) -> str | None:
    """The network interface that has ``address``."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address.partition("%")[0] for one in addresses):
            return str(name)
    return None


def _source_addresses(target: str) -> list[str]:
    """Of packets to ``target``, by the kernel's routes; a name may stand for several addresses."""
    try:
        found = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return []
    sources = []
    for family, kind, protocol, _, to in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.connect(to)
            sources.append(str(probe.getsockname()[0]))
    return sources


def _own_name_is_loopback() -> bool:
    """Whether Gloo would meet the others on loopback: the first address of this host's name that can be bound."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return True  # Gloo's fallback
    for family, kind, protocol, _, address in found:
        # A host may know addresses of a family that its kernel does not have.
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return _is_loopback(str(address[0]))
    return True


def _is_loopback(host: str) -> bool:
    """Whether ``host`` is written as this host's loopback."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def _is_link_local(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return parsed.version == 6 and parsed.is_link_local


ADJUSTMENTS = [("sglang.srt.entrypoints.engine", name_this_node)]
