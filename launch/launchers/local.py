"""``farspan launch local``: ranks on this machine, with logs, started again after a failure."""

from __future__ import annotations

import argparse

from ..local import COMMAND
from .common import Job, add_config, add_supervision, positive, quoted, say, stamp
from .supervise import Launcher, Limits, supervise

DESCRIPTION = """\
Start the ranks of a run on this machine, one for each GPU (on a CPU: as many as the layout needs), with a log of each
in run_dir/logs.  What fails goes on from the newest checkpoint; SIGTERM and SIGUSR1 reach the ranks, which save and
end.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=positive, metavar="N", help="how many (each GPU, or the layout's)")
    add_supervision(parser)
    add_config(parser)


def run(args: argparse.Namespace) -> int:
    job = Job.of(args)
    ranks = args.ranks or default_ranks(job)
    job.check_ranks(ranks)
    logs = job.run_dir / "logs"

    def command(start: int) -> list[str]:
        return [*COMMAND, "train", *job.words, "--ranks", str(ranks), "--logs", str(logs / f"{stamp()}-{start}")]

    if args.dry_run:
        print(quoted(command(0)))
        return 0
    say(f"logs of ranks are in {logs}")
    limits = Limits(fruitless=args.max_restarts, margin_seconds=job.config.checkpoint.margin_seconds)
    # The process that starts the ranks passes signals on to them.
    return supervise(Launcher("local", command, ranks=lambda pid: [pid]), job.progress, limits, run_dir=job.run_dir)


def default_ranks(job: Job) -> int:
    """One for each GPU where the layout leaves the replicas open, else the layout's."""
    import torch

    gpus = torch.cuda.device_count()
    return gpus if job.config.parallel.data is None and gpus else job.ranks_of_layout()
