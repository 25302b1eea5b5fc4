"""What a rank's libraries need to know of its node before they are loaded: threads, connections, network interfaces.

Nothing that is set already is changed.  Where a library finds out well by itself, it is left to it: NCCL chooses among
InfiniBand and other interfaces better than an address can say; set NCCL_SOCKET_IFNAME where it chooses wrongly.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import MutableMapping

from .environment import RankEnvironment


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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (text := environ.get("SLURM_CPUS_PER_TASK", "")).isdigit():
        return max(1, min(int(text), cores))
    if (text := environ.get("SLURM_CPUS_ON_NODE", "")).isdigit():
        return max(1, min(int(text) // local_ranks, cores))  # the cores may be the node's or one task's
    return max(1, cores // local_ranks)


def gloo_interface(master: str) -> str | None:
    """The interface that gloo has to be told, or None where it finds one itself.

    Gloo listens at the address of this host's name.  Where that is the loopback's (Debian writes 127.0.1.1 into
    /etc/hosts) other nodes cannot reach it: there the interface that leads to ``master`` is the right one.
    """
    if not _is_loopback(_address_of(socket.gethostname())):
        return None
    here = address_towards(master)
    return None if here is None or _is_loopback(here) else interface_of(here)


def address_towards(host: str) -> str | None:
    """This node's own address on the way to ``host``; where that is this node itself, the address that it goes by on
    the way out.  None where there is no way.  Nothing is sent."""
    there = _address_of(host)
    here = _own_end(there) if there is not None else None
    if here is not None and _is_loopback(here) and here != there:
        return there  # an address of this node
    if here is None or _is_loopback(here):
        # Documentation prefixes (RFC 5737, RFC 3849): routed by default, never to anybody.
        return _own_end("198.51.100.1") or _own_end("2001:db8::1") or here
    return here


def interface_of(address: str) -> str | None:
    """The name of the interface that has this address; None where that cannot be told."""
    import fcntl  # not on every system
    import struct

    if ":" in address:
        return _interface_of_ipv6(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(asking.fileno(), 0x8915, request)  # SIOCGIFADDR, netdevice(7)
            except OSError:
                continue  # it has none
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _interface_of_ipv6(address: str) -> str | None:
    wanted = ipaddress.ip_address(address.partition("%")[0]).exploded.replace(":", "")
    try:
        with open("/proc/net/if_inet6", encoding="ascii") as file:  # noqa: PTH123
            lines = [line.split() for line in file]
    except OSError:
        return None
    return next((line[5] for line in lines if line[0] == wanted), None)


def _own_end(there: str) -> str | None:
    family = socket.AF_INET6 if ":" in there else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as asking:
            asking.connect((there, 9))  # discard; a datagram socket only looks up the route
            return str(asking.getsockname()[0])
    except OSError:
        return None


def _address_of(host: str) -> str | None:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    found.sort(key=lambda one: one[0] != socket.AF_INET)
    return str(found[0][4][0])


def _is_loopback(address: str | None) -> bool:
    return address is None or ipaddress.ip_address(address.partition("%")[0]).is_loopback
