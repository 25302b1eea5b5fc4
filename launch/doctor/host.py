"""The machine beneath: processors, memory, limits, name, as the kernel tells them in /proc and /sys.

``root`` stands before every path of the kernel's, so that other machines can be looked at.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import socket
from pathlib import Path

from ..network import addresses_of, available_cores
from ..tables import size
from .report import Section

_UNLIMITED_V1 = 1 << 60  # what cgroup v1 says of no limit: a little below 2^63
_LIMITS = {
    "open files": resource.RLIMIT_NOFILE,
    "locked memory": resource.RLIMIT_MEMLOCK,
    "file size": resource.RLIMIT_FSIZE,
    "core file": resource.RLIMIT_CORE,
    "processes": resource.RLIMIT_NPROC,
}

_IN_BYTES = ("locked memory", "file size", "core file")


def look(section: Section, root: Path = Path("/"), gpus: int = 0) -> None:
    """``gpus``: how many this machine shows; some limits matter only there."""
    _processors(section, root)
    _memory(section, root)
    _shared_memory(section, root, gpus)
    _limits(section, root)
    _name(section)


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes that processes here may use together: the machine's, or less where a control group says so; 0: unknown."""
    found = (_meminfo(root).get("MemTotal"), cgroup_memory(root))
    return min((limit for limit in found if limit), default=0)


def cgroup_memory(root: Path) -> int | None:
    """The tightest limit of this process's control groups in bytes; None: none."""
    limits = [
        int(text)
        for folder in _cgroups(root, "memory")
        for name in ("memory.max", "memory.limit_in_bytes")
        if (text := _read(folder / name)).isdigit()
    ]
    return min((limit for limit in limits if limit < _UNLIMITED_V1), default=None)


def cgroup_cores(root: Path) -> float | None:
    """The tightest quota of processor time of this process's control groups, in processors; None: none."""
    quotas = []
    for folder in _cgroups(root, "cpu"):
        words = _read(folder / "cpu.max").split()
        if not words:
            words = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _cgroups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's groups for a controller and of those around them, of both versions.  Inside of a
    container the path may be the host's; the top of what is mounted counts then."""
    folders: list[Path] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            bases = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            bases = [root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup" / controller]
        else:
            continue
        for base in bases:
            inner = base / path.strip("/")
            while inner != base and base in inner.parents:
                folders.append(inner)
                inner = inner.parent
            folders.append(base)
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _processors(section: Section, root: Path) -> None:
    allowed = available_cores()
    machine, quota = os.cpu_count() or 1, cgroup_cores(root)
    nodes = sorted((root / "sys/devices/system/node").glob("node[0-9]*"))
    model = re.search(r"^model name\s*:\s*(.*)$", _read(root / "proc/cpuinfo"), flags=re.M)
    section.facts |= {
        "processor": model[1] if model else "",
        "cores": machine,
        "cores_allowed": allowed,
        "cores_quota": quota,
        "numa_nodes": {node.name: _read(node / "cpulist") for node in nodes},
        "load": os.getloadavg()[0],
    }
    said = f"{allowed} of {machine} processor cores may be used" if allowed < machine else f"{machine} processor cores"
    if quota is not None:
        said += f", a control group grants the time of {quota:g}"
    if model:
        said += f" ({model[1]})"
    section.say(f"{said}; load {os.getloadavg()[0]:.1f}")
    if len(nodes) > 1:
        section.say("NUMA: " + ", ".join(f"{node.name} has {_read(node / 'cpulist')}" for node in nodes))
    if quota is not None and quota < allowed:
        section.warn(
            f"a control group grants the time of {quota:g} processors of the {allowed} that are seen",
            "one thread a core is started, and all of them are stopped when the group's time is used up",
            f"set OMP_NUM_THREADS so that ranks × threads is at most {max(1, int(quota))}, or raise the job's share",
        )
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > allowed:
        section.warn(
            f"OMP_NUM_THREADS is {threads} and {allowed} cores may be used",
            "more threads than cores wait for each other in every operation",
            f"unset it, or set at most {allowed} divided by the ranks of this node",
        )


def _memory(section: Section, root: Path) -> None:
    info, limit = _meminfo(root), cgroup_memory(root)
    total, free = info.get("MemTotal", 0), info.get("MemAvailable", 0)
    swap, swapped = info.get("SwapTotal", 0), info.get("SwapTotal", 0) - info.get("SwapFree", 0)
    section.facts |= {
        "memory_bytes": total, "memory_available_bytes": free, "memory_limit_bytes": limit,
        "swap_bytes": swap, "swap_used_bytes": swapped,
    }  # fmt: skip
    said = f"memory {size(total)}, {size(free)} available"
    if limit is not None and limit < total:
        said += f"; a control group allows {size(limit)}"
    section.say(f"{said}; swap {size(swap)}" + (f", {size(swapped)} of it used" if swapped else ""))
    if total and free < 0.1 * total:
        section.warn(
            f"{size(free)} of {size(total)} memory are available",
            "a process that takes more is ended by the system without a word",
            "see with `ps aux --sort=-rss | head` what else runs here",
        )
    if swapped > max(1e9, 0.1 * swap):
        section.warn(
            f"{size(swapped)} have been moved to swap",
            "a rank whose memory is on a disk is the one that all others wait for",
            "end what takes the memory, then `swapoff -a`",
        )
    if _read(root / "proc/sys/vm/overcommit_memory") == "2":
        section.warn(
            "vm.overcommit_memory is 2: memory that is only reserved counts as used",
            "CUDA and process groups reserve far more than they use, and starting a compiler may fail",
            "sysctl vm.overcommit_memory=0",
        )


def _shared_memory(section: Section, root: Path, gpus: int) -> None:
    try:
        disk = shutil.disk_usage(root / "dev/shm")
    except OSError:
        section.facts["shared_memory_bytes"] = None
        section.say("/dev/shm is not there")
        return
    section.facts |= {"shared_memory_bytes": disk.total, "shared_memory_free_bytes": disk.free}
    section.say(f"/dev/shm {size(disk.total)}, {size(disk.free)} free")
    if gpus > 1 and disk.free < 1 << 30:
        section.warn(
            f"/dev/shm has {size(disk.free)} free",
            "NCCL talks through it between GPUs of a node that have no direct path, and fails where it is full",
            "start the container with --shm-size=8g or --ipc=host, or remove what lies in /dev/shm",
        )


def _limits(section: Section, root: Path) -> None:
    limits = {name: resource.getrlimit(number)[0] for name, number in _LIMITS.items()}
    words = {
        name: "unlimited" if value == resource.RLIM_INFINITY else size(value) if name in _IN_BYTES else str(value)
        for name, value in limits.items()
    }
    section.facts["limits"] = words
    section.say("limits: " + ", ".join(f"{name} {value}" for name, value in words.items()))

    def below(name: str, least: int) -> bool:
        return limits[name] != resource.RLIM_INFINITY and limits[name] < least

    if below("open files", 4096):
        section.warn(
            f"a process may open {words['open files']} files",
            "each rank holds a connection to every other one, and its shards of data",
            "ulimit -n 65536 before the start (LimitNOFILE= in slurmd's unit)",
        )
    infiniband = sorted(path.name for path in (root / "sys/class/infiniband").glob("*"))
    section.facts["infiniband"] = infiniband
    if infiniband and below("locked memory", 1 << 40):
        section.fault(
            f"a process may lock {size(limits['locked memory'])} of memory, and there is {', '.join(infiniband)}",
            "InfiniBand registers its buffers as locked memory: NCCL fails with ibv_reg_mr or ibv_create_cq",
            "ulimit -l unlimited (LimitMEMLOCK=infinity in slurmd's unit, PropagateResourceLimitsExcept=MEMLOCK in "
            "slurm.conf)",
        )
    if limits["file size"] != resource.RLIM_INFINITY:
        section.warn(
            f"no file may grow beyond {size(limits['file size'])}",
            "a rank's share of a checkpoint is one file; saving fails beyond that",
            "ulimit -f unlimited",
        )
    if below("processes", 1024):
        section.warn(
            f"a user may have {words['processes']} processes and threads here",
            "each rank starts threads for its computing, its data and its connections",
            "ulimit -u 16384",
        )


def _name(section: Section) -> None:
    name = socket.gethostname()
    section.facts |= {"host": name, "addresses": addresses_of(name)}
    found = section.facts["addresses"]
    section.say(f"this host is {name}" + (f", which is {', '.join(found)}" if found else ""))
    if not found:
        section.warn(
            f"the name of this host, {name}, has no address here",
            "gloo binds to the address of the host's own name, else to 127.0.0.1, which no other node reaches",
            f"add {name} to /etc/hosts or the name server, or set GLOO_SOCKET_IFNAME to the network's interface",
        )


def _meminfo(root: Path) -> dict[str, int]:
    """Bytes by name."""
    lines = re.findall(r"^(\w+):\s+(\d+) kB$", _read(root / "proc/meminfo"), flags=re.M)
    return {name: int(kilobytes) * 1024 for name, kilobytes in lines}


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip()
    return ""
