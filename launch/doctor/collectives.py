"""Real collectives between all ranks: whether their results are right, and how fast they are."""

from __future__ import annotations

import datetime
import os
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store

from ...parallel.mesh import local_device
from ..environment import RankEnvironment
from ..tables import size
from .report import Section
from .roll import connect, get, put

CPU_SIZES, GPU_SIZES = (4 << 10, 1 << 20, 16 << 20), (4 << 10, 16 << 20, 256 << 20)  # bytes
SECONDS_PER_SIZE, MOST_REPETITIONS = 1.0, 20
MOST_NODES_IN_PAIRS = 32
SLOW_CPU, SLOW_GPU = 100e6, 5e9  # bytes per second between nodes, below which something is amiss


def measure(environment: RankEnvironment, *, quick: bool, seconds: float) -> dict[str, Any]:
    """What the first rank reports; collective.  Each rank notes in the store what it is at (``at/RANK``).

    ``seconds``: the limit of each collective.
    """

    def at(phase: str) -> None:
        put(store, f"at/{environment.rank}", phase)

    # torch 2.13 renames functions whose new names older ones lack.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    store = connect(environment, seconds, again=True)
    device = local_device(environment.local_rank)
    gpu = device.type == "cuda"
    log = Path(tempfile.gettempdir()) / f"farspan-doctor-nccl-{os.getpid()}"
    if gpu:
        torch.cuda.set_device(device)
        os.environ.setdefault("NCCL_DEBUG", "INFO")
        os.environ.setdefault("NCCL_DEBUG_SUBSYS", "INIT,NET")
        os.environ.setdefault("NCCL_DEBUG_FILE", str(log))
    at("making the process group")
    began = time.perf_counter()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        store=PrefixStore("group", store),
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=datetime.timedelta(seconds=seconds),
    )
    try:
        found: dict[str, Any] = {"backend": "nccl" if gpu else "gloo", "device": device.type}
        at("the first all-reduce")
        found["wrong"] = _check(device)
        found["start_seconds"] = time.perf_counter() - began
        found["clocks"] = _clocks(device)
        if not quick:
            found["sizes"] = [_bandwidth(count, device, at) for count in (GPU_SIZES if gpu else CPU_SIZES)]
        leaders = _leaders(environment)
        if len(leaders) > 1:
            at("messages between nodes")
            found["pairs"] = _pairs(leaders[:MOST_NODES_IN_PAIRS], store)
        at("the end")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    found["nccl_network"] = _nccl_network(log) if gpu else None
    return found


def _check(device: torch.device) -> list[str]:
    """What is wrong in the results, in words; the same on all ranks."""
    rank, world, wrong = dist.get_rank(), dist.get_world_size(), []
    # Numbers that say whose they are, small enough for float32 to add exactly.
    x = torch.full((1024,), float(rank + 1), device=device)
    dist.all_reduce(x)
    if not torch.equal(x.cpu(), torch.full((1024,), world * (world + 1) / 2)):
        wrong.append(f"all-reduce of rank + 1 gives {x[0].item():g}, not {world * (world + 1) / 2:g}")
    gathered = torch.empty(world * 16, device=device)
    dist.all_gather_into_tensor(gathered, torch.full((16,), float(rank), device=device))
    if not torch.equal(gathered.cpu(), torch.arange(world).repeat_interleave(16).float()):
        wrong.append(f"all-gather of the ranks' numbers gives {gathered[::16].tolist()[:16]}")
    said: list[Any] = [None] * world
    dist.all_gather_object(said, [f"rank {rank}: {one}" for one in wrong])
    return [one for ours in said for one in ours]


def _clocks(device: torch.device) -> list[float]:
    """Seconds that each rank's clock is ahead of the first's, to about a collective's time."""
    x = torch.zeros(1, device=device)
    for _ in range(2):  # the second one finds all of them ready
        dist.all_reduce(x)
        x.cpu()
    now = torch.tensor([time.time()], dtype=torch.float64)
    clocks = [torch.empty_like(now) for _ in range(dist.get_world_size())]
    dist.all_gather(clocks, now)  # by gloo, also beside NCCL
    return [clock.item() - clocks[0].item() for clock in clocks]


def _bandwidth(count: int, device: torch.device, at: Callable[[str], None]) -> dict[str, float]:
    """Times and bus bandwidths at ``count`` bytes a rank.

    Bus bandwidth: what each link carries, whatever the number of ranks (nccl-tests, doc/PERFORMANCE.md).
    """
    world = dist.get_world_size()
    x = torch.zeros(count // 4, device=device)
    out = torch.empty(count // 4 // world * world, device=device)
    part = torch.zeros(count // 4 // world, device=device)
    at(f"all-reduce of {size(count)}")
    reduce = _seconds(lambda: dist.all_reduce(x), x)
    at(f"all-gather of {size(count)}")
    gather = _seconds(lambda: dist.all_gather_into_tensor(out, part), out)
    return {
        "bytes": count,
        "all_reduce_seconds": reduce,
        "all_reduce_bytes_per_second": 2 * (world - 1) / world * count / reduce,
        "all_gather_seconds": gather,
        "all_gather_bytes_per_second": (world - 1) / world * out.nbytes / gather,
    }


def _seconds(action: Callable[[], Any], result: Tensor) -> float:
    """The median over repetitions of the slowest rank's time, as often as the first finds time for."""

    def once() -> float:
        began = time.perf_counter()
        action()
        if result.is_cuda:
            torch.cuda.synchronize(result.device)
        return time.perf_counter() - began

    once()  # connections are made
    first = torch.tensor([once()], dtype=torch.float64)
    dist.all_reduce(first, op=dist.ReduceOp.MAX)  # by gloo: all ranks repeat it as often
    times = [once() for _ in range(max(1, min(MOST_REPETITIONS, int(SECONDS_PER_SIZE / max(first.item(), 1e-6)))))]
    slowest = torch.tensor([*times], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def _leaders(environment: RankEnvironment) -> list[int]:
    """The first rank of each node."""
    mine = torch.tensor([environment.local_rank])
    every = [torch.empty_like(mine) for _ in range(environment.world_size)]
    dist.all_gather(every, mine)
    return [rank for rank, local in enumerate(every) if local.item() == 0]


def _pairs(leaders: Sequence[int], store: Store, times: int = 20) -> list[dict[str, float]]:
    """Seconds that a small message takes between two nodes, one way, over the host's network (gloo); pair by pair, so
    that none disturbs another."""
    rank, message = dist.get_rank(), torch.zeros(1)
    for i, a in enumerate(leaders):
        for b in leaders[i + 1 :]:
            if rank not in (a, b):
                continue
            trips = []
            for _ in range(times):
                began = time.perf_counter()
                if rank == a:
                    dist.send(message, b)
                    dist.recv(message, b)
                else:
                    dist.recv(message, a)
                    dist.send(message, a)
                trips.append((time.perf_counter() - began) / 2)
            if rank == a:
                put(store, f"pair/{a}/{b}", statistics.median(trips))
    dist.all_reduce(message)
    if rank:
        return []
    pairs = [(a, b) for i, a in enumerate(leaders) for b in leaders[i + 1 :]]
    return [{"from": a, "to": b, "seconds": get(store, f"pair/{a}/{b}", 5.0)} for a, b in pairs]


def _nccl_network(log: Path) -> str | None:
    """What NCCL says that it talks between nodes with ("IB", "Socket", a plugin's name)."""
    try:
        text = log.read_text(errors="replace")
        log.unlink()
    except OSError:
        return None
    found = re.findall(r"Using network (\w+)", text)
    return found[-1] if found else None


def report(section: Section, found: dict[str, Any], hosts: Sequence[str], infiniband: Sequence[str]) -> None:
    """``hosts``: the name of each rank's node.  ``infiniband``: the first node's devices."""
    nodes = len(set(hosts))
    section.facts |= found
    section.say(
        f"{len(hosts)} ranks on {nodes} node{'s' * (nodes > 1)} by {found['backend']}, ready after "
        f"{found['start_seconds']:.2f} s"
    )
    for words in found["wrong"]:
        section.fault(
            f"a collective gives a wrong result: {words}",
            "every gradient goes through it",
            "update NCCL and the network's driver; try NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 to see which part it is",
        )
    for one in found.get("sizes", ()):
        section.say(
            f"{size(one['bytes'])}: all-reduce {1e3 * one['all_reduce_seconds']:.3g} ms, "
            f"{size(int(one['all_reduce_bytes_per_second']))}/s; all-gather {1e3 * one['all_gather_seconds']:.3g} ms, "
            f"{size(int(one['all_gather_bytes_per_second']))}/s"
        )
    _report_clocks(section, found["clocks"], hosts)
    _report_pairs(section, found.get("pairs", []), hosts)
    if found["nccl_network"]:
        section.say(f"NCCL talks between nodes by {found['nccl_network']}")
        if nodes > 1 and infiniband and found["nccl_network"] == "Socket":
            section.warn(
                f"NCCL talks over TCP though there is {', '.join(infiniband)}",
                "InfiniBand or RoCE is ten times as fast",
                "unset NCCL_IB_DISABLE and NCCL_NET, set NCCL_IB_HCA, install libibverbs, and see NCCL_DEBUG=INFO",
            )
    slow = SLOW_GPU if found["backend"] == "nccl" else SLOW_CPU
    best = max((one["all_reduce_bytes_per_second"] for one in found.get("sizes", ())), default=None)
    if nodes > 1 and best is not None and best < slow:
        section.warn(
            f"all-reduce between nodes reaches {size(int(best))}/s",
            "replicas exchange every gradient at this speed once a step",
            "choose a faster interface with NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, or keep tensor ranks on a node",
        )


def _report_clocks(section: Section, clocks: Sequence[float], hosts: Sequence[str]) -> None:
    by_host = dict(reversed(list(zip(hosts, clocks, strict=True))))  # of each host's first rank
    if len(by_host) > 1:
        worst = max(by_host.values(), key=abs)
        section.say(f"clocks differ by at most {abs(worst):.3f} s from that of {hosts[0]}")
    for host, clock in sorted(by_host.items()):
        if abs(clock) > 1.0:
            section.warn(
                f"the clock of {host} is {abs(clock):.1f} s {'ahead of' if clock > 0 else 'behind'} that of {hosts[0]}",
                "logs do not fit each other, and make, leases and certificates go by the time",
                f"start chrony or systemd-timesyncd on {host}",
            )


def _report_pairs(section: Section, pairs: Sequence[dict[str, Any]], hosts: Sequence[str]) -> None:
    known = [pair for pair in pairs if pair["seconds"] is not None]
    if not known:
        return
    middle = statistics.median(pair["seconds"] for pair in known)
    slowest = max(known, key=lambda pair: pair["seconds"])
    section.say(
        f"a message between two nodes takes {1e6 * middle:.0f} µs (median of {len(known)} pairs), at most "
        f"{1e6 * slowest['seconds']:.0f} µs ({hosts[slowest['from']]} – {hosts[slowest['to']]})"
    )
    if len(known) > 2:
        for pair in known:
            if pair["seconds"] > 5 * middle and pair["seconds"] > 1e-3:
                section.warn(
                    f"a message between {hosts[pair['from']]} and {hosts[pair['to']]} takes "
                    f"{1e3 * pair['seconds']:.1f} ms, {pair['seconds'] / middle:.0f} times the others'",
                    "every collective waits for its slowest pair",
                    "see to the cable, the switch and the driver of these two, or leave one of them out",
                )
