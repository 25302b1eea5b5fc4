"""``farspan launch torchrun``: on each node its agent, kept going."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import rank_count
from ..local import COMMAND, free_port
from ..network import address_towards, threads_of_a_rank
from ..options import add_config, count, positive
from .common import Job, add_supervision, stamp
from .supervise import Launcher, keep_going

DESCRIPTION = """\
Start torchrun on this node, and keep it going until the run's steps are done.  To be given on each node:

  farspan launch torchrun --nodes 2 --node-rank 0 --rendezvous node0:29500 configs/RUN.yaml
  farspan launch torchrun --nodes 2 --node-rank 1 --rendezvous node0:29500 configs/RUN.yaml

SIGTERM and SIGUSR1 reach the ranks, which save and end.  A rank, an agent or a rendezvous that is lost is started again
from the newest checkpoint.
"""

AGENT_RESTARTS = 3  # of ranks by one agent; then it ends, and another is started


@dataclasses.dataclass(frozen=True)
class Nodes:
    """How many nodes train together; another number than ``least`` where torchrun may go on with fewer."""

    least: int
    most: int

    @staticmethod
    def parse(text: str) -> Nodes:
        match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
        least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= least <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of nodes, N or MIN:MAX")
        return Nodes(least, most)

    def __str__(self) -> str:
        return f"{self.least}" if self.least == self.most else f"{self.least}:{self.most}"


def endpoint(text: str) -> tuple[str, int]:
    """An option's value HOST:PORT; an address of IPv6 in brackets."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form HOST:PORT")
    return host, int(port)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=Nodes.parse, default=Nodes(1, 1), metavar="N|MIN:MAX", help="nodes (1)")
    parser.add_argument("--node-rank", type=count, default=0, metavar="K", help="this node among them, from 0 up (0)")
    parser.add_argument(
        "--rendezvous", type=endpoint, metavar="HOST:PORT", help="where they meet: node 0, and a free port there"
    )
    parser.add_argument(
        "--ranks-per-node",
        type=positive,
        metavar="N",
        help="ranks on each node (its GPUs; on a CPU the layout's share)",
    )
    parser.add_argument("--local-address", metavar="ADDRESS", help="of this node, by which the others reach it")
    parser.add_argument(
        "--rendezvous-option", action="append", default=[], metavar="KEY=VALUE", help="of torchrun's --rdzv-conf"
    )
    add_supervision(parser)
    add_config(parser)


def run(args: argparse.Namespace) -> int:
    job = Job.of(args)
    command = Torchrun.of(args, job)
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", str(threads_of_a_rank(command.ranks_per_node)))
    # Else ranks use the store of their agent, the same one for all starts, and find the addresses of ranks that are
    # gone (pytorch issue 135712).  With it every rendezvous has a store of its own.
    env.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    launcher = Launcher("torchrun", command.words, env, tells_codes=False)
    return keep_going(launcher, job, args, records=command.node_rank == 0)


@dataclasses.dataclass(frozen=True)
class Torchrun:
    """The line that starts the agent of this node."""

    nodes: Nodes
    node_rank: int
    ranks_per_node: int
    rendezvous: tuple[str, int] | None  # None: one node, which meets nobody
    local_address: str | None
    options: tuple[str, ...]  # KEY=VALUE of the rendezvous
    agent_restarts: int
    logs: Path
    run_id: str
    train: tuple[str, ...]

    @staticmethod
    def of(args: argparse.Namespace, job: Job) -> Torchrun:
        """ValueError where the options do not fit each other or the layout."""
        nodes: Nodes = args.nodes
        if args.node_rank >= nodes.most:
            raise ValueError(f"--node-rank {args.node_rank} is not among --nodes {nodes}: count from 0")
        if nodes.most > 1 and args.rendezvous is None:
            raise ValueError(f"--nodes {nodes} need a place to meet: give --rendezvous HOST:PORT, HOST being node 0")
        ranks = args.ranks_per_node or _ranks_per_node(job, nodes)
        for number in range(nodes.least, nodes.most + 1):
            job.check_ranks(number * ranks)
        return Torchrun(
            nodes=nodes,
            node_rank=args.node_rank,
            ranks_per_node=ranks,
            rendezvous=args.rendezvous,
            local_address=args.local_address,
            options=tuple(args.rendezvous_option),
            agent_restarts=min(AGENT_RESTARTS, args.max_restarts),
            logs=job.run_dir / "logs",
            run_id=re.sub(r"[^\w.-]", "-", job.run_dir.name),
            train=("train", *job.words),
        )

    def words(self, start: int) -> Sequence[str]:
        """The command of a start number 0, 1, …"""
        host, port = self.rendezvous or ("127.0.0.1", free_port())
        # Said, not guessed: torchrun compares HOST with this host's names, and one of the nodes must listen.
        options = {"is_host": str(self.node_rank == 0).lower()}
        options |= dict(option.partition("=")[::2] for option in self.options)
        address = self.local_address or (host if self.rendezvous is None else address_towards(host))
        logs = self.logs / f"{stamp()}-{start}-node-{self.node_rank}"
        words = [sys.executable, "-P", "-m", "torch.distributed.run"]
        words += ["--nnodes", str(self.nodes), "--nproc-per-node", str(self.ranks_per_node)]
        words += ["--rdzv-backend", "c10d", "--rdzv-id", self.run_id]
        words += ["--rdzv-endpoint", f"[{host}]:{port}" if ":" in host else f"{host}:{port}"]
        words += ["--rdzv-conf", ",".join(f"{key}={value}" for key, value in options.items())]
        words += ["--local-addr", address] if address is not None else []
        words += ["--max-restarts", str(self.agent_restarts)]
        words += ["--log-dir", str(logs), "--redirects", "3", "--tee", "0:3"]
        return [*words, "--no-python", *COMMAND, *self.train]


def _ranks_per_node(job: Job, nodes: Nodes) -> int:
    import torch

    if (gpus := torch.cuda.device_count()) > 0:
        return gpus
    ranks = rank_count.of_layout(job.config)
    if ranks % nodes.most:
        raise ValueError(
            f"the layout's {ranks} ranks do not divide among {nodes.most} nodes: give --ranks-per-node, or change the "
            "parallel section"
        )
    return ranks // nodes.most
