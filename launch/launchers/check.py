"""``farspan launch check``: one look at a node before the ranks start.

It says in one line what every rank would fail on later, each in its own way: another version than on the first node, a
configuration that does not fit, a folder that is not there or not shared, GPUs that do not answer.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
from pathlib import Path

from ...pretrain.data.store import TokenStore
from ...pretrain.files import read_mapping, write_json
from ...pretrain.provenance import COMPUTING, sources_digest
from ...version import __version__
from ..doctor.disk import is_seen, scratch_folder
from ..doctor.requirements import version_of
from ..environment import slurm_nodes, unresolved
from ..exit_codes import IO_ERROR
from ..options import add_config, count
from .common import Job, say

DESCRIPTION = """\
Look at this node before ranks start on it: the same versions as on the first node, the configuration, the data, a run
folder that all nodes share and can write to, the GPUs asked for.  Says what is wrong in one line.
"""

_SHARED_SECONDS = 30.0  # network file systems show a new file late


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--expect", type=Path, metavar="FILE", help="what the first node has written for the others")
    parser.add_argument("--gpus-per-node", type=count, default=0, metavar="N", help="GPUs that must answer here")
    add_config(parser)


def run(args: argparse.Namespace) -> int:
    job, here = Job.of(args), socket.gethostname()
    hidden = None if args.expect is None else unseen(args.expect)
    if args.expect is not None and hidden is None and (difference := compare(args.expect)) is not None:
        raise ValueError(f"{here}: {difference}")
    data = no_data(job.config.data.folder)
    if data is not None and os.environ.get("SLURM_NODEID", "0") == "0":
        raise ValueError(f"{here}: {data}")  # not on the first node either
    if (ranks := os.environ.get("SLURM_NTASKS_PER_NODE")) is not None and "SLURM_JOB_NUM_NODES" in os.environ:
        job.check_ranks(int(ranks) * int(os.environ["SLURM_JOB_NUM_NODES"]))
    # From here on it is the node that is not as it should be: another one may be.
    for problem in (hidden, data, unwritable(job.run_dir), missing_gpus(args.gpus_per_node), unknown_address()):
        if problem is not None:
            say(f"{here}: {problem}")
            return IO_ERROR
    return 0


def versions() -> dict[str, str | None]:
    """What must be the same on every node; None: not installed."""
    found = {"farspan": __version__, "farspan's sources": sources_digest(), "python": platform.python_version()}
    return found | {package: version_of(package) for package in COMPUTING}


def write_expected(path: Path) -> None:
    """For the other nodes: what this one has."""
    write_json(path, {"host": socket.gethostname(), "versions": versions()})


def compare(path: Path) -> str | None:
    """What is different here from what the first node wrote."""
    expected, mine = read_mapping(path, "a run's log folder"), versions()
    for name, theirs in expected["versions"].items():
        if mine.get(name) != theirs:
            here, there = (version or "not installed" for version in (mine.get(name), theirs))
            return f"{name} is {here} here and {there} on {expected['host']}: install the same on all nodes"
    return None


def unseen(path: Path) -> str | None:
    """Whether what the first node wrote does not come to be seen here."""
    if is_seen(path, _SHARED_SECONDS):
        return None
    return f"{path} of the job's first node cannot be seen here: set run_dir to a folder that all nodes share"


def no_data(folder: str) -> str | None:
    try:
        TokenStore(folder)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def unwritable(folder: Path) -> str | None:
    try:
        scratch_folder(folder).cleanup()
    except OSError as error:
        return f"{folder} cannot be written to ({error.strerror})"
    return None


def missing_gpus(wanted: int) -> str | None:
    if not wanted:
        return None
    import torch

    if (found := torch.cuda.device_count()) < wanted:
        return f"{wanted} GPUs are asked for and {found} answer here"
    try:
        for i in range(wanted):
            torch.zeros(1, device=f"cuda:{i}")
    except RuntimeError as error:
        return f"a GPU fails: {' '.join(str(error).split())}"
    return None


def unknown_address() -> str | None:
    """Whether the name of the first rank's node leads anywhere from here."""
    name = os.environ.get("MASTER_ADDR") or next(iter(slurm_nodes()), None)
    return None if name is None else unresolved(name)
