"""Under which address a node of several is told to be reached, and that what a person chose stays."""

from __future__ import annotations

import logging
import os
import socket
from types import SimpleNamespace

import psutil
import pytest

from sglang_minimax import node_address
from sglang_minimax.server_arguments import ARCHITECTURE

VARIABLES = ("GLOO_SOCKET_IFNAME", "SGLANG_HOST_IP", "HOST_IP", "SGLANG_LOCAL_IP_NIC")
ANYWHERE, ANYWHERE_IPV6 = "192.0.2.1", "2001:db8::1"
NETWORK = {"lo": ["127.0.0.1", "::1"], "docker0": ["172.17.0.1"], "ib0": ["10.0.0.1", "fe80::1%ib0"]}


@pytest.fixture
def network(monkeypatch):
    """This host is 10.0.0.1 on ib0 and 127.0.1.1 to itself; its default route leads through docker0."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        psutil,
        "net_if_addrs",
        lambda: {name: [SimpleNamespace(address=one) for one in addresses] for name, addresses in NETWORK.items()},
    )
    routes = {"10.0.0.2": ["10.0.0.1"], "other": ["10.0.0.1"], "me": ["127.0.1.1"], ANYWHERE: ["172.17.0.1"]}
    monkeypatch.setattr(node_address, "_source_addresses", lambda target: routes.get(target, []))
    monkeypatch.setattr(node_address, "_own_name_is_loopback", lambda: True)
    return routes


def settings_after(nnodes=2, first_node="10.0.0.2", architecture=ARCHITECTURE, mode="null") -> dict[str, str]:
    """The variables that are set when the engine's own function, which runs last, has run."""
    seen = {}
    engine = SimpleNamespace(
        _set_envs_and_config=lambda args: seen.update({name: os.environ.get(name) for name in VARIABLES})
    )
    node_address.name_this_node(engine)
    model_config = SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]))
    engine._set_envs_and_config(
        SimpleNamespace(
            nnodes=nnodes,
            dist_init_addr=f"{first_node}:50000" if nnodes > 1 and first_node else None,
            disaggregation_mode=mode,
            get_model_config=lambda: model_config,
        )
    )
    return {name: value for name, value in seen.items() if value is not None}


@pytest.mark.usefixtures("network")
class TestWhatIsSet:
    @pytest.mark.parametrize("first_node", ["10.0.0.2", "other"])
    def test_the_address_towards_the_first_node_and_its_interface(self, first_node, caplog):
        with caplog.at_level(logging.INFO):
            assert settings_after(first_node=first_node) == {"SGLANG_HOST_IP": "10.0.0.1", "GLOO_SOCKET_IFNAME": "ib0"}
        said = "Other nodes are to reach this one at 10.0.0.1: SGLANG_HOST_IP=10.0.0.1 GLOO_SOCKET_IFNAME=ib0. Set"
        assert said in caplog.text

    def test_a_first_node_whose_name_is_loopback_to_itself_takes_the_default_route(self):
        assert settings_after(first_node="me") == {"SGLANG_HOST_IP": "172.17.0.1", "GLOO_SOCKET_IFNAME": "docker0"}

    def test_without_a_default_route_either_it_is_told_what_to_give(self, network, caplog):
        del network[ANYWHERE]
        assert settings_after(first_node="me") == {}
        assert "By --dist-init-addr me:50000 this node has no address that others could use" in caplog.text
        assert "Give the first node's address" in caplog.text

    @pytest.mark.parametrize("first_node", ["127.0.0.1", "localhost", "[::1]", "127.0.1.1"])
    def test_nodes_that_are_all_here_need_nothing(self, first_node, caplog):
        assert settings_after(first_node=first_node) == {} and not caplog.text

    def test_gloo_is_left_alone_where_this_hosts_name_has_an_address(self, monkeypatch):
        monkeypatch.setattr(node_address, "_own_name_is_loopback", lambda: False)
        assert settings_after() == {"SGLANG_HOST_IP": "10.0.0.1"}

    @pytest.mark.parametrize(
        ("chosen", "added"),
        [
            ({"GLOO_SOCKET_IFNAME": "eth7"}, {"SGLANG_HOST_IP": "10.0.0.1"}),
            ({"SGLANG_HOST_IP": "172.17.0.1"}, {"GLOO_SOCKET_IFNAME": "docker0"}),
            ({"HOST_IP": "172.17.0.1"}, {"GLOO_SOCKET_IFNAME": "docker0"}),
            ({"SGLANG_HOST_IP": "192.0.2.9"}, {}),  # an address that no interface has, behind a translation, say
            ({"SGLANG_LOCAL_IP_NIC": "docker0"}, {"GLOO_SOCKET_IFNAME": "ib0"}),
            ({"SGLANG_HOST_IP": "172.17.0.1", "GLOO_SOCKET_IFNAME": "eth7"}, {}),
        ],
    )
    def test_what_a_person_chose_stays(self, chosen, added, monkeypatch):
        for name, value in chosen.items():
            monkeypatch.setenv(name, value)
        assert settings_after() == chosen | added

    @pytest.mark.parametrize("mode", ["prefill", "decode"])
    def test_what_other_servers_reach_this_one_by_is_left_alone(self, mode):
        assert settings_after(mode=mode) == {"GLOO_SOCKET_IFNAME": "ib0"}

    @pytest.mark.parametrize(
        ("leads", "address"),
        [
            ({"me": ["127.0.1.1", "10.0.0.1"]}, "10.0.0.1"),  # two lines of /etc/hosts
            ({"me": ["fe80::1", "10.0.0.1"]}, "10.0.0.1"),
            ({"me": ["fe80::1"]}, "172.17.0.1"),
            ({"me": [], ANYWHERE: [], ANYWHERE_IPV6: ["fd00::1"]}, "fd00::1"),
        ],
    )
    def test_the_first_that_others_can_use_is_taken(self, leads, address, network):
        network.update(leads)
        assert settings_after(first_node="me")["SGLANG_HOST_IP"] == address

    def test_without_a_first_node_whoever_starts_the_ranks_tells_them(self):
        assert settings_after(first_node=None) == {}

    def test_one_node_and_other_models_are_left_alone(self):
        assert settings_after(nnodes=1) == {}
        assert settings_after(architecture="LlamaForCausalLM") == {}

    @pytest.fixture(autouse=True)
    def restored(self, network):
        """What the tested function writes into the environment goes when the test does."""
        before = dict(os.environ)
        yield
        os.environ.clear()
        os.environ.update(before)


class TestThisHost:
    def test_the_way_to_itself_is_an_address_of_its_own(self):
        assert node_address._source_addresses("127.0.0.1") == ["127.0.0.1"]
        assert node_address.interface_of("127.0.0.1") in psutil.net_if_addrs()

    def test_a_name_that_nobody_has_leads_nowhere(self):
        assert node_address._source_addresses("nobody.invalid") == []

    def test_addresses_of_a_family_that_the_kernel_lacks_are_passed_over(self, monkeypatch):
        """As where IPv6 is switched off, and /etc/hosts or a name server has an address of it."""
        kinds = {"::1": (999, "::1"), "127.0.0.1": (socket.AF_INET, "127.0.0.1")}  # no kernel knows the first family

        def getaddrinfo(host, port, type):
            return [(family, type, 0, "", (address, port or 0)) for family, address in kinds.values()]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        assert node_address._source_addresses("other") == ["127.0.0.1"]
        assert node_address._own_name_is_loopback()
        del kinds["127.0.0.1"]
        assert node_address._own_name_is_loopback()

    @pytest.mark.parametrize(
        ("addresses", "is_loopback"),
        [
            (["127.0.1.1"], True),
            (["0.0.0.0", "127.0.0.1"], False),  # stands for any address that this host may bind
            (["192.0.2.7", "127.0.0.1"], True),  # the first one is not its own
            (["192.0.2.7"], True),
            ([], True),
        ],
    )
    def test_gloo_takes_the_first_address_of_the_hosts_name_that_can_be_bound(
        self, addresses, is_loopback, monkeypatch
    ):
        def getaddrinfo(host, port, **options):
            if not addresses:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        assert node_address._own_name_is_loopback() is is_loopback
