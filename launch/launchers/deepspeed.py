"""``farspan launch deepspeed``: DeepSpeed's launcher over a hostfile, kept going."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ...pretrain.lease import LEASE
from ..endings import ENDINGS
from ..local import COMMAND
from ..network import threads_of_a_rank
from ..options import add_config, count, positive
from .common import Job, add_supervision, stamp
from .processes import ranks_below
from .supervise import Launcher, keep_going

DESCRIPTION = """\
Start DeepSpeed's launcher over the nodes of a hostfile (lines `NAME slots=RANKS`), and keep it going until the run's
steps are done.  From the first node, which reaches the others by ssh (pdsh), or on each node with its --node-rank:

  farspan launch deepspeed --hostfile hosts configs/RUN.yaml
  farspan launch deepspeed --hostfile hosts --node-rank 1 configs/RUN.yaml

SIGTERM and SIGUSR1 reach the ranks, which save and end.  What fails goes on from the newest checkpoint.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hostfile", type=Path, required=True, metavar="FILE", help="lines NAME slots=RANKS")
    parser.add_argument("--node-rank", type=count, metavar="K", help="this node in the file, from 0 up: no ssh")
    parser.add_argument("--master-address", metavar="ADDRESS", help="of the first node (its name in the file)")
    parser.add_argument("--master-port", type=positive, default=29500, metavar="PORT", help="free there (29500)")
    parser.add_argument("--ssh-port", type=positive, metavar="PORT", help="of the nodes' ssh")
    parser.add_argument("--bind-cores", action="store_true", help="bind ranks to cores (with numactl)")
    parser.add_argument(
        "--deepspeed", action="append", default=[], metavar="OPTION=VALUE", help="any other option of its launcher"
    )
    add_supervision(parser)
    add_config(parser)


def run(args: argparse.Namespace) -> int:
    job = Job.of(args)
    command = DeepSpeed.of(args, job)
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", str(threads_of_a_rank(max(command.slots.values()))))
    launcher = Launcher(
        "deepspeed",
        command.words,
        env,
        ranks=(lambda _: []) if command.over_ssh else ranks_below,
        sees_ranks=not command.over_ssh,
        tell=lambda number: tell_the_first_rank(job.run_dir, number, args.ssh_port),
        endings=command.endings,
        watch=Follower(command.logs).show,
    )
    return keep_going(launcher, job, args, records=not args.node_rank)


def read_hostfile(path: Path) -> dict[str, int]:
    """{node: ranks}, as DeepSpeed reads it; ValueError in one line for what it would not take."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{path} is no hostfile: give a file of lines NAME slots=RANKS") from None
    slots: dict[str, int] = {}
    for line in lines:
        if not line.strip() or line.strip().startswith("#"):
            continue
        match = re.match(r"(\S+)\s+slots=(\d+)", line.strip())
        if match is None or int(match[2]) < 1:
            raise ValueError(f"{path}: {line.strip()!r} is not of the form NAME slots=RANKS")
        if match[1] in slots:
            raise ValueError(f"{path}: {match[1]} is named twice: once is enough, with all its ranks")
        slots[match[1]] = int(match[2])
    if not slots:
        raise ValueError(f"{path} names no node: write lines NAME slots=RANKS")
    return slots


@dataclasses.dataclass(frozen=True)
class DeepSpeed:
    """The line that starts its launcher."""

    hostfile: Path
    slots: dict[str, int]
    node_rank: int | None  # None: from here, by ssh
    options: tuple[str, ...]
    logs: Path
    train: tuple[str, ...]
    began: str = dataclasses.field(default_factory=stamp)

    @staticmethod
    def of(args: argparse.Namespace, job: Job) -> DeepSpeed:
        """ValueError where the options do not fit each other or the layout."""
        slots = read_hostfile(args.hostfile)
        if args.node_rank is not None and args.node_rank >= len(slots):
            raise ValueError(f"--node-rank {args.node_rank} is not among the {len(slots)} nodes of {args.hostfile}")
        job.check_ranks(sum(slots.values()))
        options = [f"--master_port={args.master_port}", f"--master_addr={args.master_address or next(iter(slots))}"]
        options += [f"--ssh_port={args.ssh_port}"] if args.ssh_port else []
        options += ["--bind_cores_to_rank"] if args.bind_cores else []
        options += [f"--{option.removeprefix('--')}" for option in args.deepspeed]
        return DeepSpeed(
            args.hostfile.absolute(), slots, args.node_rank, tuple(options), job.run_dir / "logs", ("train", *job.words)
        )

    @property
    def over_ssh(self) -> bool:
        return self.node_rank is None and len(self.slots) > 1

    def words(self, start: int) -> Sequence[str]:
        """The command of a start number 0, 1, …"""
        here = [] if self.node_rank is None else ["--no_ssh", f"--node_rank={self.node_rank}"]
        logs = [f"--enable_each_rank_log={self.folder(start)}"]
        # What DeepSpeed passes to other nodes begins with NCCL and PYTHON; `env` carries the rest.
        ranks = ["env", f"{ENDINGS}={self.endings(start)}", *COMMAND]
        launcher = [sys.executable, "-P", "-m", "deepspeed.launcher.runner", f"--hostfile={self.hostfile}"]
        return [*launcher, *self.options, *here, *logs, "--no_python", "--no_local_rank", *ranks, *self.train]

    def folder(self, start: int) -> Path:
        return self.logs / f"{self.began}-{start}"

    def endings(self, start: int) -> Path:
        return self.folder(start) / "endings"


class Follower:
    """Shows what the first rank writes to its log, as far as it can be seen from here."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._seen: dict[Path, int] = {path: path.stat().st_size for path in self._files()}

    def _files(self) -> list[Path]:
        return sorted(self._logs.glob("*/*_rank0.log"))

    def show(self) -> None:
        for path in self._files():
            with path.open("rb") as file:
                file.seek(self._seen.get(path, 0))
                text = file.read()
            if text:
                self._seen[path] = self._seen.get(path, 0) + len(text)
                sys.stdout.write(text.decode(errors="replace"))
                sys.stdout.flush()


def tell_the_first_rank(run_dir: Path, number: int, ssh_port: int | None) -> bool:
    """Send a signal to the rank that holds the run folder, wherever it is: it tells the others.  Whether it got it."""
    try:
        held = json.loads((run_dir / LEASE).read_text(encoding="utf-8"))
        host, pid = str(held["host"]), int(held["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return False  # nobody holds it
    if host == socket.gethostname():
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True
    name = signal.Signals(number).name.removeprefix("SIG")
    port = ["-p", str(ssh_port)] if ssh_port else []
    words = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", *port, host, "kill", "-s", name, str(pid)]
    try:
        return subprocess.run(words, stdin=subprocess.DEVNULL, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
