"""The network interfaces of this machine, and whether what chooses among them fits them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from pathlib import Path

from ..network import gloo_address, interface_addresses
from .report import Section


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
    for name, addresses in interface_addresses().items():
        folder = root / "sys/class/net" / name
        speed = None
        with contextlib.suppress(OSError, ValueError):  # a virtual one has none
            speed = int((folder / "speed").read_text())
        state = ""
        with contextlib.suppress(OSError):
            state = (folder / "operstate").read_text().strip()
        found.append(
            Interface(
                name,
                addresses[0] if addresses else None,
                speed if speed is not None and speed > 0 else None,
                state != "down",
            )
        )
    return found


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
