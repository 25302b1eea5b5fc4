"""The network interfaces of this machine, and which of them ranks talk through."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import socket
import struct
from pathlib import Path

from .host import addresses_of
from .report import Section

_SIOCGIFADDR = 0x8915  # linux/sockios.h


@dataclasses.dataclass(frozen=True)
class Interface:
    name: str
    address: str | None  # IPv4, else IPv6; None: it has none
    speed: int | None  # Mbit/s, where the driver says it
    up: bool

    def __str__(self) -> str:
        speed = f", {self.speed / 1000:g} Gbit/s" if self.speed else ""
        return f"{self.name} ({self.address or 'no address'}{speed}{'' if self.up else ', down'})"


def interfaces(root: Path = Path("/")) -> list[Interface]:
    found = []
    for _, name in socket.if_nameindex():
        folder = root / "sys/class/net" / name
        speed = None
        with contextlib.suppress(OSError, ValueError):  # a virtual one has none
            speed = int((folder / "speed").read_text())
        state = ""
        with contextlib.suppress(OSError):
            state = (folder / "operstate").read_text().strip()
        found.append(
            Interface(name, _address(name), speed if speed is not None and speed > 0 else None, state != "down")
        )
    return found


def _address(name: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking, contextlib.suppress(OSError):
        answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])  # netdevice(7): struct ifreq, sockaddr_in
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, named = line.split()
            if named == name:
                return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
    return None


def interface_of(address: str) -> str | None:
    """The name of the interface that has it; None: none of this machine's."""
    return next((one.name for one in interfaces() if one.address == address), None)


def local_address_to(host: str, port: int) -> str | None:
    """The address of this machine from which packets to that one would leave; None: there is no way."""
    with contextlib.suppress(OSError):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as asking:
            asking.connect(address)  # sends nothing
            return str(asking.getsockname()[0])
    return None


def gloo_address() -> str | None:
    """The address that gloo binds to on this machine: that of GLOO_SOCKET_IFNAME, else of the host's own name
    (torch/csrc/distributed/c10d, ProcessGroupGloo::createDefaultDevice)."""
    named = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if named:
        return next((one.address for one in interfaces() if one.name == named), None)
    return next(iter(addresses_of(socket.gethostname())), None)


def is_loopback(address: str | None) -> bool:
    return address is None or address.startswith("127.") or address == "::1"


def look(section: Section) -> None:
    found = interfaces()
    section.facts |= {"interfaces": [dataclasses.asdict(one) for one in found], "gloo_address": gloo_address()}
    section.say(", ".join(map(str, found)))
    names = [one.name for one in found]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = os.environ.get(variable, "")
        if value and not _matches(value, names, prefixes=variable.startswith("NCCL")):
            section.fault(
                f"{variable} is {value!r} and this machine has {', '.join(names)}",
                "process groups look for that interface and fail at the start",
                f"unset {variable}, or name one of these",
            )


def _matches(value: str, names: list[str], *, prefixes: bool) -> bool:
    """Whether the variable leaves an interface.  NCCL's names are prefixes, with = whole names, with ^ those to leave
    out (docs.nvidia.com, NCCL environment variables); gloo's are whole."""
    if not prefixes:
        return all(name in names for name in value.split(","))
    exclude, exact = value.startswith("^"), value.lstrip("^").startswith("=")
    wanted = re.split(",", value.lstrip("^="))
    chosen = {name for name in names for one in wanted if (name == one if exact else name.startswith(one))}
    return bool(set(names) - chosen if exclude else chosen)
