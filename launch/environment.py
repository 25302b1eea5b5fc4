"""Which rank is this process?  What torchrun, deepspeed, mpirun and srun say, read in one place."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
from collections.abc import Mapping, MutableMapping, Sequence

# srun numbers steps from 0; from here on the numbers mean something else: the batch script, the shell that salloc
# opens on a node, ... (slurm.h, SLURM_MAX_NORMAL_STEP_ID).
_FIRST_SPECIAL_STEP = 0xFFFFFFF0

NAMED = 16  # how many of many ranks are named before the others are counted

# Where a local rank notes when it failed.  The order in which ranks end says little: one that fails closes its
# connections before it ends, and the others, failing on those, may end first.
FAILURE_FILE = "FARSPAN_FAILURE_FILE"
HUNG_SUFFIX = ".hung"  # of that name: where the guard of the rank notes that it ends it, and the folder of its report


@dataclasses.dataclass(frozen=True)
class RankEnvironment:
    """This process among all that train together; ``local`` counts those on the same machine."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_address: str  # where rank 0 listens
    master_port: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not among {self.world_size} ranks: check RANK and WORLD_SIZE")
        if not 0 <= self.local_rank < self.local_world_size <= self.world_size:
            raise ValueError(
                f"local rank {self.local_rank} of {self.local_world_size} does not fit {self.world_size} ranks: "
                "check LOCAL_RANK and LOCAL_WORLD_SIZE"
            )
        if not 0 < self.master_port < 65536:
            raise ValueError(f"port {self.master_port} is not from 1 to 65535: check MASTER_PORT")


def read_environment(environ: Mapping[str, str] = os.environ) -> RankEnvironment | None:
    """The rank that a launcher gave this process, or None where no launcher laid out ranks.

    In this order: RANK and its companions (torchrun, deepspeed, a parent of ours), Open MPI's variables (mpirun),
    SLURM's (srun).  A process that torchrun starts inside an srun step has both; the nearer one counts.  MASTER_ADDR
    and MASTER_PORT, where set, hold in every case.  ValueError where only part of what is needed is set.
    """
    if "RANK" in environ:
        return _from_torchrun(environ)
    if "OMPI_COMM_WORLD_RANK" in environ:
        return _from_mpirun(environ)
    if _is_srun_step(environ):
        return _from_srun(environ)
    # A script may export the others for torchrun to overwrite, but these two only a launcher sets.
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        if name in environ:
            raise ValueError(f"{name} is set but RANK is not: set all of {', '.join(_TORCHRUN)}, or none")
    return None


def apply(environment: RankEnvironment, environ: MutableMapping[str, str] = os.environ) -> None:
    """Export the variables that ``torch.distributed`` (``init_method="env://"``) and DeepSpeed read."""
    environ["RANK"] = str(environment.rank)
    environ["LOCAL_RANK"] = str(environment.local_rank)
    environ["WORLD_SIZE"] = str(environment.world_size)
    environ["LOCAL_WORLD_SIZE"] = str(environment.local_world_size)
    environ["MASTER_ADDR"] = environment.master_address
    environ["MASTER_PORT"] = str(environment.master_port)


def check_address(environment: RankEnvironment) -> None:
    """ValueError where the first rank's machine has no known address: torch would go on asking for half an hour."""
    if (problem := unresolved(environment.master_address)) is not None:
        raise ValueError(problem)


def unresolved(master: str) -> str | None:
    """What is wrong with the name of the first rank's machine where it leads nowhere from here."""
    try:
        socket.getaddrinfo(master, None)
    except OSError:
        return (
            f"the name {master} of the first rank's machine has no address here: "
            "set MASTER_ADDR to one that every node can reach"
        )
    return None


def idle_slurm_nodes(environ: Mapping[str, str] = os.environ) -> int:
    """How many nodes of the SLURM job stay idle when this process alone starts ranks on its own machine."""
    if "SLURM_JOB_ID" not in environ or "RANK" in environ:
        return 0
    return max(_integer(environ, "SLURM_JOB_NUM_NODES", 1) - 1, 0)


_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _from_torchrun(environ: Mapping[str, str]) -> RankEnvironment:
    missing = [name for name in _TORCHRUN if name not in environ]
    if missing:
        raise ValueError(f"RANK is set but {', '.join(missing)} is not: set all of {', '.join(_TORCHRUN)}, or none")
    world_size = _integer(environ, "WORLD_SIZE")
    local_rank = _integer(environ, "LOCAL_RANK")
    # torchrun says LOCAL_WORLD_SIZE, deepspeed LOCAL_SIZE.  By hand neither may be set: one machine is the usual case.
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if name in environ:
            local_world_size = _integer(environ, name)
            break
    else:
        local_world_size = world_size
    return RankEnvironment(
        rank=_integer(environ, "RANK"),
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=local_world_size,
        master_address=environ["MASTER_ADDR"],
        master_port=_integer(environ, "MASTER_PORT"),
    )


def _from_mpirun(environ: Mapping[str, str]) -> RankEnvironment:
    world_size = _integer(environ, "OMPI_COMM_WORLD_SIZE")
    local_world_size = _integer(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")
    address = environ.get("MASTER_ADDR")
    if address is None:
        if local_world_size != world_size:
            raise ValueError("mpirun on several machines does not say where rank 0 is: pass -x MASTER_ADDR=<its host>")
        address = "127.0.0.1"
    return RankEnvironment(
        rank=_integer(environ, "OMPI_COMM_WORLD_RANK"),
        local_rank=_integer(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
        world_size=world_size,
        local_world_size=local_world_size,
        master_address=address,
        master_port=_integer(environ, "MASTER_PORT", 29500),
    )


def _is_srun_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of several tasks.

    SLURM_PROCID and SLURM_NTASKS do not tell: in a batch script both are set (0, and the number that the job asked
    for) while a single process runs.  SLURM_STEP_ID is what srun adds; the shell that salloc opens may have one too,
    of the special numbers.  A step of one task (``srun --pty bash``, ``srun --ntasks=1 farspan train ...``) lays out
    no ranks either: there, as on a machine without SLURM, ``farspan train`` starts one rank for each GPU it sees.
    """
    step = environ.get("SLURM_STEP_ID", "")
    if not (step.isdigit() and int(step) < _FIRST_SPECIAL_STEP):
        return False
    return _slurm_tasks(environ) > 1


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    # The step's own number, where given: SLURM_NTASKS may still be the job's.
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    return _integer(environ, name)


def _from_srun(environ: Mapping[str, str]) -> RankEnvironment:
    world_size = _slurm_tasks(environ)
    if "WORLD_SIZE" in environ and _integer(environ, "WORLD_SIZE") != world_size:
        raise ValueError(f"WORLD_SIZE is {environ['WORLD_SIZE']} but srun started {world_size} tasks: unset WORLD_SIZE")
    address = environ.get("MASTER_ADDR")
    if address is None:
        nodes = slurm_nodes(environ)
        if not nodes:
            raise ValueError("srun started this process but SLURM_JOB_NODELIST is not set: set MASTER_ADDR")
        address = nodes[0]  # srun puts task 0 on the step's first node
    # The same port on every node without asking: jobs that share a node, and steps of one job, rarely meet; a job that
    # comes back has another one.
    job, step = _integer(environ, "SLURM_JOB_ID"), _integer(environ, "SLURM_STEP_ID")
    number = job + 101 * step + 1009 * _integer(environ, "SLURM_RESTART_COUNT", 0)
    return RankEnvironment(
        rank=_integer(environ, "SLURM_PROCID"),
        local_rank=_integer(environ, "SLURM_LOCALID"),
        world_size=world_size,
        local_world_size=_slurm_local_tasks(environ, world_size),
        master_address=address,
        master_port=_integer(environ, "MASTER_PORT", 10000 + number % 20000),  # below the ephemeral ports
    )


def _slurm_local_tasks(environ: Mapping[str, str], world_size: int) -> int:
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if name in environ:
            counts = expand_tasks_per_node(environ[name])
            node = _integer(environ, "SLURM_NODEID", 0)
            if sum(counts) == world_size and node < len(counts):
                return counts[node]
    # Only what was asked for, which srun may round; but nothing better is there.
    return min(_integer(environ, "SLURM_NTASKS_PER_NODE", world_size), world_size)


def expand_tasks_per_node(text: str) -> list[int]:
    """SLURM's short form of a number per node: ``"2(x3),1"`` is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(f"cannot read {text!r} as tasks per node: expected the form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def slurm_nodes(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Names of the step's nodes, else of the job's, in order; none outside of SLURM."""
    text = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    return expand_node_list(text) if text else []


def expand_node_list(text: str) -> list[str]:
    """SLURM's short form of host names: ``"n[01-03,7],m2"`` is n01, n02, n03, n7, m2.  scontrol is not needed.

    Leading zeros stay.  Several brackets in a name vary like digits, the last one fastest.
    """
    name = r"(?:[^,\[\]\s]|\[[^\[\]]*\])+"
    if not re.fullmatch(f"{name}(?:,{name})*", text):
        raise ValueError(f"cannot read {text!r} as a list of nodes: expected the form n[1-3,7],m2")
    names: list[str] = []
    for part in re.findall(name, text):
        found = [""]
        for piece in re.findall(r"[^\[\]]+|\[[^\[\]]*\]", part):
            endings = _expand_brackets(piece[1:-1], text) if piece.startswith("[") else [piece]
            found = [start + ending for start in found for ending in endings]
        names += found
    return names


def describe_ranks(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 0-3, 8, 10"; of more than ``NAMED`` pieces the rest is counted."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    said = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    more = f" and {len(said) - NAMED} more" if len(said) > NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(said[:NAMED])}{more}"


def _expand_brackets(ranges: str, text: str) -> list[str]:
    endings: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"cannot read [{ranges}] in the node list {text!r}: expected the form [1-3,7]")
        width = len(match[1])
        endings += [f"{number:0{width}d}" for number in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return endings


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None:
        if default is not None:
            return default
        raise ValueError(f"{name} is not set, though other variables of the same launcher are")
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is not an integer") from None
