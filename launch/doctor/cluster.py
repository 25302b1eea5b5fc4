"""All nodes together: who came, collectives between them, what differs, whether they see the same run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed import Store

from ...pretrain.provenance import COMPUTING
from ..environment import RankEnvironment, describe_ranks
from ..network import gloo_address, interface_of, is_loopback, own_end
from . import collectives, roll
from .disk import is_seen, nearest_folder
from .examination import Wanted, examine_node
from .report import Section, examine
from .roll import Unreachable, get, put

NODE_SECONDS = 900.0  # for what is looked at on a node: a compiler may take 600
_MARK, _SEEN_SECONDS = ".farspan-doctor-mark-", 5.0

# Facts of a node's sections that have to be the same on all: (section, fact, what it is, whether a run would fail).
_SAME: tuple[tuple[str, str, str, bool], ...] = (
    ("versions", "sources", "Farspan's sources", True),
    ("versions", "python", "Python", False),
    ("versions", "packages", "", True),
    ("devices", "cuda_of_torch", "torch's CUDA", True),
    ("devices", "nccl", "NCCL", True),
    ("devices", "driver", "the GPUs' driver", False),
    ("devices", "gpu_names", "GPUs", False),
    ("machine", "processor", "the processor", False),
    ("versions", "environment", "", False),
    ("data", "digest", "the dataset's manifest", True),
    ("disk", "kind", "the file system of checkpoints", False),
)
_OF_THE_NODE = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES", "NCCL_IB_HCA")  # may differ


@dataclasses.dataclass(frozen=True)
class Found:
    """The sections of each node, and those of all of them together; empty but on the first rank.

    ``hung``: a thread of this process is still in a collective: it cannot end as usual.  ``alone``: this rank did not
    reach the first one, and has said so.
    """

    nodes: dict[str, list[Section]]
    together: list[Section]
    hung: bool = False
    alone: bool = False


def examine_cluster(environment: RankEnvironment, wanted: Wanted, seconds: float) -> Found:
    """Collective over all ranks that were started.

    ``seconds``: how long ranks are waited for, and the limit of each collective.
    """
    network = Section("network")
    try:
        store = roll.connect(environment, seconds)
        came, missing = roll.call(store, environment, seconds)
    except Unreachable as error:
        if environment.rank == 0:
            _unreachable(network, str(error))
            return Found({socket.gethostname(): examine_node(wanted)}, [network])
        if environment.local_rank == 0:
            print(f"farspan: rank {environment.rank} on {socket.gethostname()} {error}", file=sys.stderr, flush=True)
        return Found({}, [], alone=True)
    names = node_names(came)
    if missing:
        _missing(network, missing, came, environment, seconds)
    else:
        _between_ranks(network, environment, store, wanted, names, seconds)
    leaders = [rank for rank in sorted(came) if came[rank]["local_rank"] == 0]
    path = wanted.path_of_checkpoints if len(leaders) > 1 else None
    if environment.rank in leaders:
        sections = examine_node(wanted)
        put(store, f"node/{environment.rank}", [section.to_json() for section in sections])
        if path is not None:
            _mark(store, environment, path)
    if environment.rank:
        roll.leave(store, environment, [])
        return Found({}, [], hung=bool(network.facts.get("hung")))
    nodes: dict[str, list[Section]] = {}
    for rank in leaders:
        said = get(store, f"node/{rank}", NODE_SECONDS)
        if said is None:
            network.fault(
                f"rank {rank} on {names[rank]} did not say within {NODE_SECONDS:.0f} s what it found",
                "its node hangs, or it ended",
                f"run farspan doctor on {names[rank]} alone",
            )
            continue
        nodes[names[rank]] = [Section.from_json(one) for one in said]
    together = [network]
    if len(leaders) > 1:
        together.append(examine("nodes", lambda it: compare(it, nodes)))
    if path is not None:
        _shared(together[-1], store, leaders, names, path)
    roll.leave(store, environment, sorted(came))
    return Found(nodes, together, hung=bool(network.facts.get("hung")))


def node_names(came: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
    """The node of each rank, by its host's name; where several of them have one name, with the first rank there."""
    leaders = [rank for rank in sorted(came) if came[rank]["local_rank"] == 0]
    hosts = [came[rank]["host"] for rank in leaders]
    names = {}
    for rank, said in came.items():
        same = [leader for leader in leaders if came[leader]["host"] == said["host"] and leader <= rank]
        alone = hosts.count(said["host"]) < 2 or not same
        names[rank] = said["host"] if alone else f"{said['host']} (rank {same[-1]})"
    return names


def _unreachable(network: Section, words: str) -> None:
    network.say(words)
    network.fault(
        f"the first rank {words}",
        "ranks find each other at this address",
        "set MASTER_ADDR to an address of the first node and MASTER_PORT to a free port",
    )


def _missing(
    network: Section, missing: Sequence[int], came: Mapping[int, Any], environment: RankEnvironment, seconds: float
) -> None:
    who = roll.name_missing(missing, came, environment)
    network.facts |= {"missing": list(missing), "came": sorted(came)}
    network.say(f"{len(came)} of {environment.world_size} ranks came")
    network.fault(
        f"{who}: not here after {seconds:.0f} s",
        "a run waits for all of its ranks, and fails after training.timeout_seconds",
        f"see that it is started there, and that its node reaches {environment.master_address}:"
        f"{environment.master_port} (name, route, firewall); --wait gives it longer",
    )


def _between_ranks(
    network: Section, environment: RankEnvironment, store: Store, wanted: Wanted, names: dict[int, str], seconds: float
) -> None:
    """Collectives, in a thread that is left behind where one of them does not end."""
    nodes = len({names[rank] for rank in names})
    address = own_end(environment.master_address)
    mine = {
        "to_first": address,
        "interface": interface_of(address) if address else None,
        "gloo": gloo_address(),
    }
    put(store, f"address/{environment.rank}", mine)
    outcome = limited(lambda: collectives.measure(environment, quick=wanted.quick, seconds=seconds), 2 * seconds + 30)
    network.facts["hung"] = outcome is None
    if environment.rank:
        return
    hosts = [names[rank] for rank in range(environment.world_size)]
    _addresses(network, store, hosts, nodes)
    if isinstance(outcome, dict):
        collectives.report(network, outcome, hosts, infiniband=_infiniband())
        return
    behind = {rank: get(store, f"at/{rank}", 0.0) for rank in range(environment.world_size)}
    network.facts["at"] = behind
    said = "did not end" if outcome is None else f"failed: {' '.join(str(outcome).split())[:300]}"
    where = "; ".join(
        f"{describe_ranks([r for r in behind if behind[r] == at])} at {at or 'the start'}"
        for at in dict.fromkeys(behind.values())
    )
    network.say(f"collectives {said} ({where})")
    network.fault(
        f"a collective {said} ({where})",
        "ranks reach the first one, and not each other: no run gets through its first step",
        "let nodes reach each other at all ports (gloo and NCCL choose them), and choose the network that they share: "
        "GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO says more",
    )


def limited(action: Callable[[], Any], seconds: float) -> Any:
    """What it returns, the exception that it raises, or None where it does not end in time (it is left behind)."""
    outcome: list[Any] = [None]

    def run() -> None:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[0] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0]


def _addresses(network: Section, store: Store, hosts: Sequence[str], nodes: int) -> None:
    """Which interface each node talks through."""
    found = {}
    for rank, host in enumerate(hosts):
        if host not in found:
            found[host] = get(store, f"address/{rank}", 5.0) or {}
    network.facts["addresses"] = found
    for host, mine in found.items():
        network.say(
            f"{host}: {mine.get('to_first')} ({mine.get('interface') or 'no interface'}) towards the first rank, gloo "
            f"on {mine.get('gloo')}"
        )
        if nodes > 1 and is_loopback(mine.get("gloo")) and not _on_one_machine(found):
            network.fault(
                f"gloo binds to {mine.get('gloo')} on {host}",
                "other nodes cannot reach that address: the first collective on the CPU fails",
                f"export GLOO_SOCKET_IFNAME={mine.get('interface') or 'INTERFACE'} there, or let {host}'s name resolve "
                "to its address (/etc/hosts)",
            )


def _on_one_machine(found: Mapping[str, Mapping[str, Any]]) -> bool:
    return all(is_loopback(mine.get("to_first")) for mine in found.values())


def _infiniband() -> list[str]:
    return sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))


def compare(section: Section, nodes: Mapping[str, Sequence[Section]]) -> None:
    """What differs between nodes, by name."""
    facts = {host: {one.title: one.facts for one in sections} for host, sections in nodes.items()}
    first = next(iter(facts))
    for host, looked in facts.items():
        section.say(f"{host}: {_summary(looked)}")
    differences = 0
    for title, fact, what, fails in _SAME:
        values = {host: found.get(title, {}).get(fact) for host, found in facts.items()}
        if isinstance(values[first], dict):
            keys = dict.fromkeys(key for value in values.values() for key in value or {})
            for key in keys:
                if key not in _OF_THE_NODE:
                    named = {host: (value or {}).get(key) for host, value in values.items()}
                    differences += _differs(section, key, named, fails and key in COMPUTING)
        else:
            differences += _differs(section, what, values, fails)
    section.facts["differences"] = differences
    if not differences:
        section.say("no difference in versions, GPUs, environment and data")


def _differs(section: Section, what: str, values: Mapping[str, Any], fails: bool) -> bool:
    groups: dict[str, list[str]] = {}
    for host, value in values.items():
        groups.setdefault("none" if value is None else str(value), []).append(host)
    if len(groups) == 1:
        return False
    said = "; ".join(f"{value} on {', '.join(hosts)}" for value, hosts in groups.items())
    say = section.fault if fails else section.warn
    say(
        f"{what} differs between nodes: {said}",
        "ranks that compute differently give other losses than a layout on equal nodes, or do not meet in a collective",
        "give all nodes the same environment (one shared folder or image), or leave the odd one out",
    )
    return True


def _summary(found: Mapping[str, Mapping[str, Any]]) -> str:
    machine, devices, disk = (found.get(name, {}) for name in ("machine", "devices", "disk"))
    gpus = devices.get("gpus") or []
    said = [f"{len(gpus)} × {gpus[0]['name']}" if gpus else "no GPU"]
    said += [f"{machine.get('cores_allowed')} cores", f"{machine.get('memory_bytes', 0) / 1e9:.0f} GB"]
    said += [f"torch {found.get('versions', {}).get('packages', {}).get('torch')}"]
    if rate := disk.get("write_bytes_per_second"):
        said.append(f"writes {rate / 1e6:,.0f} MB/s")
    return ", ".join(said)


def _mark(store: Store, environment: RankEnvironment, path: Path) -> None:
    """The first node makes a file where checkpoints go; the others say whether they see it."""
    if environment.rank == 0:
        name = None
        with contextlib.suppress(OSError):
            folder = nearest_folder(path)
            (folder / (_MARK + (word := secrets.token_hex(8)))).write_text(word)
            name = str(folder / (_MARK + word))
        put(store, "mark", name)
        return
    name = get(store, "mark", NODE_SECONDS)
    put(store, f"seen/{environment.rank}", name is not None and is_seen(Path(name), _SEEN_SECONDS))


def _shared(
    section: Section, store: Store, leaders: Sequence[int], names: Mapping[int, str], path: Path
) -> None:  # fmt: skip
    name = get(store, "mark", 5.0)
    if name is None:
        return
    seen = {rank: get(store, f"seen/{rank}", 30.0) for rank in leaders if rank}
    with contextlib.suppress(OSError):
        Path(name).unlink()
    blind = [names[rank] for rank, saw in seen.items() if not saw]
    section.facts["run_folder_is_shared"] = not blind
    section.say(f"{Path(name).parent} is {'the same on all nodes' if not blind else 'not shared'}")
    if blind:
        section.fault(
            f"what {names[leaders[0]]} writes in {Path(name).parent} is not seen on {', '.join(blind)}",
            f"every rank writes its share of a checkpoint into {path}: none would be whole",
            "set run_dir to a folder that all nodes share",
        )
