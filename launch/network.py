"""What a rank's libraries need to know of its node before they are loaded: threads, connections, network interfaces.

Nothing that is set already is changed.  Where a library finds out well by itself, it is left to it: NCCL chooses among
InfiniBand and other interfaces better than an address can say; set NCCL_SOCKET_IFNAME where it chooses wrongly.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Mapping, MutableMapping

from .environment import RankEnvironment

_SIOCGIFADDR = 0x8915  # linux/sockios.h


def prepare(environment: RankEnvironment, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what every rank needs, where it is not set; to be called before torch is imported."""
    for name, value in settings(environment, environ).items():
        environ.setdefault(name, value)


def settings(environment: RankEnvironment, environ: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """What ``prepare`` would set in an environment that has none of it."""
    found = {"OMP_NUM_THREADS": str(threads_of_a_rank(environment.local_world_size, environ))}
    if environment.world_size > 1:
        # Kernels of communication must not be overtaken by those that need what they bring: megatron-core asks for it
        # with tensor parallelism on GPUs up to Hopper (its arguments.py, "CUDA_DEVICE_MAX_CONNECTIONS").
        found["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    several_nodes = environment.local_world_size < environment.world_size
    if several_nodes and (name := gloo_interface(environment.master_address)) is not None:
        found["GLOO_SOCKET_IFNAME"] = name
    return found


def threads_of_a_rank(local_ranks: int, environ: MutableMapping[str, str] = os.environ) -> int:
    """Cores for each of so many ranks on this node: what SLURM gave a task, else an equal share."""
    cores = available_cores()
    if (text := environ.get("SLURM_CPUS_PER_TASK", "")).isdigit():
        return max(1, min(int(text), cores))
    if (text := environ.get("SLURM_CPUS_ON_NODE", "")).isdigit():
        return max(1, min(int(text) // local_ranks, cores))  # the cores may be the node's or one task's
    return max(1, cores // local_ranks)


def available_cores() -> int:
    """Cores that this process may use: fewer than the machine's where a scheduler or taskset says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gloo_interface(master: str) -> str | None:
    """The interface that gloo has to be told, or None where it finds one itself.

    Where gloo would listen at the loopback's address (Debian writes 127.0.1.1 into /etc/hosts) other nodes cannot reach
    it: there the interface that leads to ``master`` is the right one.
    """
    if not is_loopback(gloo_address({})):
        return None
    here = address_towards(master)
    return None if here is None or is_loopback(here) else interface_of(here)


def gloo_address(environ: Mapping[str, str] = os.environ) -> str | None:
    """The address that gloo listens at on this node: that of the interface GLOO_SOCKET_IFNAME, else of the host's own
    name (torch/csrc/distributed/c10d, ProcessGroupGloo::createDefaultDevice)."""
    if named := environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]:
        return next(iter(interface_addresses().get(named, [])), None)
    return next(iter(addresses_of(socket.gethostname())), None)


def address_towards(host: str) -> str | None:
    """This node's own address on the way to ``host``; where that is this node itself, the address that it goes by on
    the way out.  None where there is no way.  Nothing is sent."""
    here = own_end(host)
    if here is not None and is_loopback(here) and here != (there := _address_of(host)):
        return there  # an address of this node
    if is_loopback(here):
        # Documentation prefixes (RFC 5737, RFC 3849): routed by default, never to anybody.
        return own_end("198.51.100.1") or own_end("2001:db8::1") or here
    return here


def own_end(host: str) -> str | None:
    """The address of this node from which packets to ``host`` leave; None where there is no way.  Nothing is sent."""
    there = _address_of(host)
    if there is None:
        return None
    try:
        with socket.socket(socket.AF_INET6 if ":" in there else socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.connect((there, 9))  # discard; a datagram socket only looks up the route
            return str(asking.getsockname()[0])
    except OSError:
        return None


def addresses_of(name: str) -> list[str]:
    """A host's addresses, each once, as the system prefers them; none where its name does not resolve."""
    try:
        return list(dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(name, None)))
    except OSError:
        return []


def _address_of(host: str) -> str | None:
    """One of IPv4 where there is one."""
    return min(addresses_of(host), key=lambda address: ":" in address, default=None)


def is_loopback(address: str | None) -> bool:
    """Whether only this node can reach it, or there is none."""
    return address is None or _parse(address).is_loopback


def interface_of(address: str) -> str | None:
    """The name of the interface that has this address; None where no interface of this node has it."""
    wanted = str(_parse(address))
    return next((name for name, found in interface_addresses().items() if wanted in found), None)


def interface_addresses() -> dict[str, list[str]]:
    """{interface: its first address of IPv4, its addresses of IPv6}, of those that have none too."""
    import fcntl  # not on every system
    import struct

    found: dict[str, list[str]] = {name: [] for _, name in socket.if_nameindex()}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for name in found:
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name].append(socket.inet_ntoa(answer[20:24]))  # netdevice(7): struct ifreq, sockaddr_in
    with contextlib.suppress(OSError), open("/proc/net/if_inet6", encoding="ascii") as file:  # noqa: PTH123
        for line in file:
            digits, *_, name = line.split()
            found.setdefault(name, []).append(str(ipaddress.IPv6Address(bytes.fromhex(digits))))
    return found


def _parse(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(address.partition("%")[0])  # without the zone of a link's own address
