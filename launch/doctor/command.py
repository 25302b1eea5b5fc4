"""``farspan doctor [CONFIG] [section.key=value ...]``: the command line."""

from __future__ import annotations

import argparse
import datetime
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..environment import RankEnvironment
    from .examination import Wanted
    from .report import Section

ANSWER = "FARSPAN_DOCTOR_ANSWER"  # where the first of our own ranks leaves its exit code

DESCRIPTION = """\
One page on this machine, and on the cluster where it is started on all nodes: versions, devices, compilers, the disk
that checkpoints go to, the network between ranks; what a configuration would find here; and what is to be mended.

  farspan doctor                                          this machine
  farspan doctor configs/RUN.yaml                         and whether this run fits it
  farspan doctor configs/RUN.yaml --ranks 4               and collectives between 4 ranks on this machine
  srun --ntasks-per-node 8 farspan doctor configs/RUN.yaml    between all ranks of a job, as with farspan train
  farspan doctor --quick configs/RUN.yaml --world 16      before a job's ranks start: seconds, nothing is measured

Exit code 0: a run can start (there may be warnings).  1: a run would fail.  2: the command or the configuration is
wrong, in one line.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file of a run")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="values that replace the file's")
    parser.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine for the network's check")
    parser.add_argument("--world", type=int, metavar="N", help="ranks of the run in all, if not those started now")
    parser.add_argument(
        "--local", type=int, metavar="N", help="ranks of the run on each node, if not those started now"
    )
    parser.add_argument(
        "--wait", type=float, default=120.0, metavar="SECONDS", help="how long ranks are waited for (default: 120)"
    )
    parser.add_argument("--path", metavar="DIR", help="where checkpoints go, if not run_dir")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the page")
    parser.add_argument("--quick", action="store_true", help="measure and build nothing: for the start of a job")


def run(args: argparse.Namespace) -> int:
    """Look, print the page, and return the exit code."""
    from ..environment import apply, read_environment

    environment = read_environment()
    if environment is not None and args.ranks is not None:
        raise ValueError("--ranks starts ranks on this machine, but a launcher already started them: leave it out")
    wanted = _wanted(args, environment)
    if environment is None or environment.world_size == 1:
        if (args.ranks or 1) > 1:
            return _with_ranks(args)
        from .examination import examine_node

        return _print(args, {socket.gethostname(): examine_node(wanted)}, [])
    from .cluster import examine_cluster

    apply(environment)
    found = examine_cluster(environment, wanted, args.wait)
    code = int(found.alone)
    if environment.rank == 0:
        code = _print(args, found.nodes, found.together)
        if ANSWER in os.environ:  # the parent says it: to whoever watches over ranks 1 means that one failed
            Path(os.environ[ANSWER]).write_text(str(code))
            code = 0
    if found.hung:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _with_ranks(args: argparse.Namespace) -> int:
    """Start ranks here, of which the first prints the page."""
    from ..local import run_ranks

    arguments = ["doctor", *([args.config, *args.overrides] if args.config else []), "--wait", str(args.wait)]
    arguments += [flag for flag in ("--json", "--quick") if getattr(args, flag.removeprefix("--"))]
    for name in ("path", "world", "local"):
        if getattr(args, name) is not None:
            arguments += [f"--{name}", str(getattr(args, name))]
    with tempfile.TemporaryDirectory(prefix="farspan-doctor-") as folder:
        answer = Path(folder) / "exit-code"
        code = run_ranks(arguments, args.ranks, env=os.environ | {ANSWER: str(answer)})
        return code or int(answer.read_text())


def _print(args: argparse.Namespace, nodes: dict[str, list[Section]], together: list[Section]) -> int:
    """The page of the first node, with what all nodes found; the exit code."""
    from . import page
    from .report import exit_code, merge

    named = [(host, finding) for host, sections in nodes.items() for one in sections for finding in one.findings]
    named += [("", finding) for section in together for finding in section.findings]
    findings = merge(named, len(nodes))
    host = next(iter(nodes), socket.gethostname())
    if args.json:
        print(page.to_json(host, nodes, together, findings), end="", flush=True)
    else:
        now = datetime.datetime.now(datetime.UTC)
        heading = f"doctor on {host}, {now:%Y-%m-%d %H:%M} UTC" + (", quick" if args.quick else "")
        print(page.render(heading, [*nodes.get(host, []), *together], findings), end="", flush=True)
    return exit_code(findings)


def _wanted(args: argparse.Namespace, environment: RankEnvironment | None) -> Wanted:
    import torch

    from .examination import Wanted

    for name in ("ranks", "world", "local"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}: give a number from 1 up")
    path = Path(args.path) if args.path else None
    if args.config is None:
        return Wanted(None, None, path, args.quick)
    from ...pretrain.config_file import load_config
    from .. import rank_count
    from .run_checks import Ranks

    config = load_config(args.config, args.overrides)
    gpus = torch.cuda.device_count()
    if environment is not None and environment.world_size > 1:
        world, local = environment.world_size, environment.local_world_size
    else:  # as farspan train would start them here
        world = args.ranks or rank_count.by_default(config)
        local = world
    world = args.world or world
    local = args.local or min(local, world, gpus or world)
    return Wanted(config, Ranks(world, local), path, args.quick)
