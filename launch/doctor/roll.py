"""Who has come: each rank says so in a store that the first one serves, before any process group is made.

A process group waits for its ranks and fails after its time without a name.  A store is asked instead who is there.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore

from ...parallel.mesh import start_name
from ..environment import RankEnvironment, describe_ranks, slurm_nodes

_POLL = 0.05


class Unreachable(Exception):
    """Why the first rank cannot be reached, in a line."""


def connect(environment: RankEnvironment, seconds: float, *, again: bool = False) -> Store:
    """The store of all ranks, served by the first (under torchrun by its agent).  Unreachable: no way to it.

    ``again``: another connection to it; one that waits for something lets nothing else through.
    """
    address, port = environment.master_address, environment.master_port
    serves = environment.rank == 0 and not again and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if not serves:
            _knock(address, port, seconds)
        store = TCPStore(
            address, port, None, serves, datetime.timedelta(seconds=seconds), wait_for_workers=False, multi_tenant=True
        )
    except (RuntimeError, OSError) as error:  # torch's DistNetworkError is a RuntimeError
        does = "serve" if serves else "reach"
        raise Unreachable(f"cannot {does} {address}:{port}: {' '.join(str(error).split())[:300]}") from None
    return PrefixStore(f"{start_name()}-doctor", store)


def _knock(address: str, port: int, seconds: float) -> None:
    """Until somebody listens there.  OSError of the last try, which says more than the store would."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                said = error.strerror or str(error) or type(error).__name__
                raise OSError(
                    f"{said}, for {seconds:.0f} s (is its rank started, is the port free of a firewall?)"
                ) from None
            time.sleep(0.2)


def put(store: Store, key: str, value: Any) -> None:
    store.set(key, json.dumps(value))


def get(store: Store, key: str, seconds: float) -> Any:
    """What was put there, waited for; None where it does not come."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(RuntimeError):  # the server is gone: its words come where the key does not
            if store.check([key]):
                return json.loads(store.get(key))
        if time.monotonic() > deadline:
            return None
        time.sleep(_POLL)


def call(store: Store, environment: RankEnvironment, seconds: float) -> tuple[dict[int, dict[str, Any]], list[int]]:
    """Who came, with what each said of itself, and who did not within ``seconds``; the same on all ranks that came.

    The first rank waits and tells the others.
    """
    here = {"host": socket.gethostname(), "local_rank": environment.local_rank}
    put(store, f"here/{environment.rank}", here)
    if environment.rank:
        # The first may have begun to wait later by as much as it waits.
        answer = get(store, "roll", 2 * seconds + 10)
        if answer is None:
            raise Unreachable("the first rank did not say who has come: it ended, or the way to it broke")
        return {int(rank): said for rank, said in answer["came"].items()}, answer["missing"]
    came: dict[int, dict[str, Any]] = {}
    deadline = time.monotonic() + seconds
    while len(came) < environment.world_size:
        for rank in range(environment.world_size):
            if rank not in came and store.check([f"here/{rank}"]):
                came[rank] = json.loads(store.get(f"here/{rank}"))
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL)
    missing = [rank for rank in range(environment.world_size) if rank not in came]
    put(store, "roll", {"came": came, "missing": missing})
    return came, missing


def leave(store: Store, environment: RankEnvironment, ranks: Sequence[int], seconds: float = 10.0) -> None:
    """The first rank waits until the others have read what they need: its store ends with it."""
    if environment.rank:
        put(store, f"left/{environment.rank}", True)
        return
    deadline = time.monotonic() + seconds
    for rank in ranks:
        if rank:
            get(store, f"left/{rank}", max(0.0, deadline - time.monotonic()))


def name_missing(
    missing: Sequence[int],
    came: Mapping[int, Mapping[str, Any]],
    environment: RankEnvironment,
    environ: Mapping[str, str] = os.environ,
) -> str:
    """Those ranks in words, with the names of their nodes as far as those that came, or SLURM, tell them."""
    local = environment.local_world_size
    nodes = -(-environment.world_size // local)
    listed: list[str] = []
    with contextlib.suppress(ValueError):
        listed = slurm_nodes(environ)
    hosts = {rank // local: str(said["host"]) for rank, said in came.items()}
    parts = []
    for node in sorted({rank // local for rank in missing}):
        mine = [rank for rank in missing if rank // local == node]
        if node in hosts:
            where = f"on {hosts[node]}, from where others came"
        elif len(listed) == nodes:
            where = f"on {listed[node]}"
        else:
            where = f"on node {node + 1} of {nodes}, of which nobody came"
        parts.append(f"{describe_ranks(mine)} {where}")
    return "; ".join(parts)
