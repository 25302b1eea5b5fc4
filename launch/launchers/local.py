"""``farspan launch local``: ranks on this machine, with logs, started again after a failure."""

from __future__ import annotations

import argparse

from .. import rank_count
from ..local import COMMAND
from ..options import add_config, positive
from .common import Job, add_supervision, stamp
from .supervise import Launcher, keep_going

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
    ranks = args.ranks or rank_count.by_default(job.config)
    job.check_ranks(ranks)
    logs = job.run_dir / "logs"

    def command(start: int) -> list[str]:
        return [*COMMAND, "train", *job.words, "--ranks", str(ranks), "--logs", str(logs / f"{stamp()}-{start}")]

    # The process that starts the ranks passes signals on to them.
    return keep_going(Launcher("local", command, ranks=lambda pid: [pid]), job, args)
