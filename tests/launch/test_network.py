"""What a rank's node is told of its network, against what the kernel says, and for names that are made up."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

import farspan
from farspan.launch import network


def names(monkeypatch: pytest.MonkeyPatch, **hosts: list[str]) -> None:
    """This host is called ``here``; other names are not known."""

    def resolve(name: str, *_: object, **__: object) -> list[object]:
        if name not in hosts:
            raise OSError("not known")
        return [(socket.AF_INET6 if ":" in one else socket.AF_INET, 1, 0, "", (one, 0)) for one in hosts[name]]

    monkeypatch.setattr(network.socket, "gethostname", lambda: "here")
    monkeypatch.setattr(network.socket, "getaddrinfo", resolve)


def test_interfaces_have_the_addresses_that_the_kernel_says() -> None:
    found = network.interface_addresses()
    assert set(found) == {folder.name for folder in Path("/sys/class/net").iterdir() if folder.is_dir()}
    name = network.interface_of("127.0.0.1")
    assert name is not None and int(Path(f"/sys/class/net/{name}/flags").read_text(), 16) & 8  # if.h, IFF_LOOPBACK
    assert network.interface_of("203.0.113.77") is None and network.interface_of("2001:db8::77") is None
    for line in Path("/proc/net/if_inet6").read_text().splitlines() if socket.has_ipv6 else ():
        digits, *_, name = line.split()
        address = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
        assert network.interface_of(f"{address}%{name}") == name and address in found[name]


def test_the_way_to_a_host() -> None:
    assert network.own_end("127.0.0.1") == "127.0.0.1"
    assert network.own_end("no-such-host.invalid") is None and network.addresses_of("no-such-host.invalid") == []


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.1.1", True), ("::1", True), (None, True), ("10.0.0.1", False), ("fe80::1%eth0", False)],
)
def test_loopback(address: str | None, loopback: bool) -> None:
    assert network.is_loopback(address) is loopback


def test_where_gloo_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, here=["2001:db8::5", "10.0.0.5"])
    monkeypatch.setattr(network, "interface_addresses", lambda: {"eth0": ["10.0.0.7", "2001:db8::7"], "eth1": []})
    assert network.gloo_address({}) == "2001:db8::5"  # as getaddrinfo prefers them
    assert network.gloo_address({"GLOO_SOCKET_IFNAME": "eth0,eth1"}) == "10.0.0.7"
    assert network.gloo_address({"GLOO_SOCKET_IFNAME": "eth1"}) is None
    names(monkeypatch)
    assert network.gloo_address({}) is None


@pytest.mark.parametrize(
    ("mine", "told"), [(["127.0.1.1"], "eth0"), ([], "eth0"), (["::1", "10.0.0.7"], "eth0"), (["10.0.0.7"], None)]
)
def test_gloo_is_told_where_it_would_listen_for_this_node_alone(
    monkeypatch: pytest.MonkeyPatch, mine: list[str], told: str | None
) -> None:
    names(monkeypatch, here=mine, first=["10.0.0.1"])
    monkeypatch.setattr(network, "own_end", lambda host: "10.0.0.7" if host == "first" else None)
    monkeypatch.setattr(network, "interface_addresses", lambda: {"lo": ["127.0.0.1"], "eth0": ["10.0.0.7"]})
    assert network.gloo_interface("first") == told


def test_it_needs_the_standard_library_alone() -> None:
    # Without site, which loads other packages; so that the clone, whatever its folder is called, is found by its name.
    code = (
        "import sys; from importlib import util;"
        f"spec = util.spec_from_file_location('farspan', {farspan.__file__!r});"
        "sys.modules['farspan'] = package = util.module_from_spec(spec); spec.loader.exec_module(package);"
        "import farspan.launch.network; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in said if not name.startswith("_")} - sys.stdlib_module_names == {"farspan"}
