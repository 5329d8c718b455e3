"""The interface that the other machines are reached through."""

from __future__ import annotations

import os
import socket

import pytest

from flame.errors import UserError
from flame.runtime import network
from flame.runtime.network import GLOO_INTERFACE, NCCL_INTERFACE, choose_interfaces, find_interface, find_local_address


def test_the_interface_of_an_address() -> None:
    assert find_local_address("127.0.0.1", 1) == ("127.0.0.1", "127.0.0.1")
    assert find_local_address("localhost", 1)[0] in ("127.0.0.1", "::1")
    assert find_interface("127.0.0.1") == find_interface("::1") == "lo"
    assert find_interface("203.0.113.7") is None  # of a block that is for documentation: RFC 5737


def test_every_ipv4_interface_is_found_by_its_address() -> None:
    known = {name for _, name in socket.if_nameindex()}
    for address, interface in network._list_ipv4().items():
        assert interface in known
        if not address.is_loopback:
            assert find_interface(str(address)) == interface


def test_an_unknown_name_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^MASTER_ADDR = nowhere\.invalid \(environment\) is no address known to .*: give that"):
        find_local_address("nowhere.invalid", 1)


def test_interfaces_are_chosen_where_the_environment_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "find_interface", {"10.0.0.1": "eth7"}.get)
    for name in (GLOO_INTERFACE, NCCL_INTERFACE):
        monkeypatch.delenv(name, raising=False)
    choose_interfaces("10.0.0.1")
    assert (os.environ[GLOO_INTERFACE], os.environ[NCCL_INTERFACE]) == ("eth7", "=eth7")
    monkeypatch.setenv(GLOO_INTERFACE, "ib0")
    choose_interfaces("10.0.0.1")
    assert os.environ[GLOO_INTERFACE] == "ib0"
    choose_interfaces("10.0.0.9")  # both are named: no need to know the address


def test_an_address_without_interface_names_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "find_interface", lambda _: None)
    monkeypatch.delenv(GLOO_INTERFACE, raising=False)
    monkeypatch.setenv(NCCL_INTERFACE, "ib0")
    with pytest.raises(UserError, match=r"^GLOO_SOCKET_IFNAME \(environment\) are not set, and no interface of .* 10\.0\.0\.1"):
        choose_interfaces("10.0.0.1")
