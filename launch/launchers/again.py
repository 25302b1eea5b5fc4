"""``farspan launch again``: whether a SLURM job starts, and whether it comes back.  Asked by launch/slurm.sbatch.

Answers in one word on stdout; to people it speaks on stderr, which is the job's output.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import signal
from collections.abc import Sequence
from pathlib import Path

from .. import endings
from ..endings import Ending
from ..exit_codes import DONE, FAULT, INTERRUPTED, STOPPED, USER_ERROR
from ..options import add_config, count
from ..progress import Progress
from .check import write_expected
from .common import Job, say
from .restarts import FRUITLESS, Record, fruitless, record, records

DESCRIPTION = """\
Asked by the script of `farspan launch slurm`: `again start` answers go, `again end` requeue or chain, or either of them
the exit code with which the job is to end.
"""
WAYS = ("requeue", "chain", "no")
_SIGNALLED = 128 + signal.SIGUSR1  # before a rank listened to it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("moment", choices=("start", "end"))
    parser.add_argument("--job", required=True, help="SLURM's number of this job")
    parser.add_argument("--restart", type=int, default=0, help="how often SLURM has started it again")
    parser.add_argument("--series", required=True, help="number of the first of the jobs that follow each other")
    parser.add_argument("--logs", type=Path, required=True, help="folder of this start")
    parser.add_argument("--nodes", help="list of nodes")
    parser.add_argument("--before", default="", help="what scontrol says of the job before this one")
    parser.add_argument("--code", type=int, default=FAULT, help="srun's exit code")
    parser.add_argument("--told", default="", help="what scontrol says of this job")
    add_policy(parser)
    add_config(parser)


def add_policy(parser: argparse.ArgumentParser) -> None:
    """Options that `farspan launch slurm` writes into the script."""
    parser.add_argument(
        "--again",
        choices=WAYS,
        default="requeue",
        help="how a stopped job goes on: requeue (the same job, default), chain (a job that depends on it), no",
    )
    parser.add_argument(
        "--until-done", action="store_true", help="start again after failures too, until all steps are done"
    )
    parser.add_argument(
        "--max-restarts",
        type=count,
        default=FRUITLESS,
        metavar="N",
        help=f"starts in a row without a new checkpoint, unless SLURM ended them, before giving up ({FRUITLESS})",
    )


@dataclasses.dataclass(frozen=True)
class JobState:
    """What SLURM says of a job at this moment (``scontrol --oneliner show job``)."""

    state: str
    reason: str
    restarts: int
    preempted: bool
    may_return: bool  # by scontrol requeue

    @staticmethod
    def read(text: str) -> JobState | None:
        """None where SLURM said nothing: it does not answer, or has forgotten the job."""
        found = {key: match[1] for key in _FIELDS if (match := re.search(rf" {key}=(\S+)", text)) is not None}
        if "JobState" not in found:
            return None
        restarts, preempted = found.get("Restarts", "0"), found.get("PreemptTime", "None")
        return JobState(
            state=found["JobState"],
            reason=found.get("Reason", "None"),
            restarts=int(restarts) if restarts.isdigit() else 0,
            preempted=preempted != "None",
            may_return=found.get("Requeue", "1") != "0",
        )

    @property
    def ran_out_of_time(self) -> bool:
        return self.state == "TIMEOUT" or self.reason == "TimeLimit"

    @property
    def lost_a_node(self) -> bool:
        return self.state == "NODE_FAIL" or self.reason == "NodeDown"

    @property
    def is_ending(self) -> bool:
        """By an order, or for the loss of a node: the script still runs, for a little while."""
        return self.state not in ("RUNNING", "SUSPENDED")


_FIELDS = ("JobState", "Reason", "Restarts", "PreemptTime", "Requeue")


@dataclasses.dataclass(frozen=True)
class Decision:
    """``word``: requeue, chain or none; ``code``: the job's exit code where none; ``asked``: it was asked to stop, and
    saved or was not given the time to."""

    word: str
    why: str
    code: int = DONE
    asked: bool = False

    @property
    def answer(self) -> str:
        return str(self.code) if self.word == "none" else self.word


@dataclasses.dataclass(frozen=True)
class Policy:
    again: str  # one of WAYS
    until_done: bool
    max_restarts: int


def decide(
    policy: Policy,
    progress: Progress,
    code: int,
    said: Sequence[Ending],
    job: JobState | None,
    restart: int,
    in_vain: int,
) -> Decision:
    """Whether a job that ended comes back.

    ``code``: srun's, the highest of the ranks'.  ``said``: by ranks, of their ends.  ``restart``: how often SLURM had
    started the job again when this start began.  ``in_vain``: starts in a row, this one among them, without a new
    checkpoint.
    """
    at = f"at step {progress.step} of {progress.steps}"
    if progress.done:
        return Decision("none", f"all {progress.steps} steps are done")
    preempted = job is not None and job.preempted
    if job is not None and job.is_ending:
        if job.restarts > restart or job.state in ("PENDING", "REQUEUED"):
            return Decision("none", f"SLURM has put the job back into the queue, {at}", asked=True)
        if not (job.ran_out_of_time or preempted or job.lost_a_node):
            return Decision("none", f"cancelled {at}: not started again", code=code, asked=True)
    last = endings.final(list(said))
    if last is not None:
        return Decision("none", f"not started again: rank {last.rank} said: {last.message}", code=USER_ERROR)
    # srun ends ranks that take longer to leave than the first one, and says that it did.
    saved = code == STOPPED or any(one.code == STOPPED for one in said)
    out_of_time = job is not None and job.ran_out_of_time
    asked = saved or preempted or out_of_time or code == _SIGNALLED
    how = "asked to stop" if asked else f"failed with exit code {code}"
    how = f"lost a node ({how})" if job is not None and job.lost_a_node else how
    if code == INTERRUPTED:
        return Decision("none", f"interrupted {at}: not started again", code=code)
    if policy.again == "no":
        return Decision("none", f"{how} {at}: the same command goes on", code=code, asked=asked)
    if policy.again == "requeue" and job is not None and not job.may_return:
        return Decision("none", f"{how} {at}: the job has Requeue=0, the same command goes on", code=code, asked=asked)
    if not asked and not policy.until_done:
        return Decision("none", f"{how} {at}: not started again without --until-done", code=code)
    if not (saved or preempted) and in_vain > policy.max_restarts:
        why = f"{how} {at}: {in_vain} starts in a row brought no checkpoint, given up"
        why += "; set a longer --time or checkpoint.margin_seconds" if out_of_time else ""
        return Decision("none", why, code=code or FAULT)
    return Decision(policy.again, f"{how} {at}: comes back ({policy.again})", asked=saved or preempted)


def may_start(
    policy: Policy, progress: Progress, before: JobState | None, is_successor: bool, ended: Record | None, in_vain: int
) -> str | None:
    """Why a job does not start, or None.  ``ended``: what the job before it has recorded at its end, if it came so far;
    ``is_successor``: it was submitted by that job when that began, for whatever might happen."""
    if progress.done:
        return f"all {progress.steps} steps are done"
    if is_successor and ended is not None and ended.get("then") != "chain":
        # SLURM ended the script before it could cancel its successor.
        return f"the job before this one ended for good: {ended.get('why')}"
    if is_successor and ended is None:
        if before is not None and before.state == "CANCELLED":
            return "the job before this one was cancelled"
        if not policy.until_done and not (before is not None and (before.ran_out_of_time or before.preempted)):
            return "the job before this one failed: not started again without --until-done"
    if in_vain > policy.max_restarts:
        return f"{in_vain} starts in a row brought no checkpoint: given up"
    return None


def run(args: argparse.Namespace) -> int:
    job = Job.of(args)
    policy = Policy(args.again, args.until_done, args.max_restarts)
    progress = job.progress()
    told = [one for one in records(job.run_dir) if one.get("series") == args.series]
    in_vain = fruitless(told, progress.step, before=args.job if args.moment == "start" else None)
    about = {"by": "slurm", "job": args.job, "restart": args.restart, "series": args.series}
    if args.moment == "start":
        ended = next((one for one in reversed(told) if one.get("event") == "end"), None)
        if told and ended is not None and ended is not told[-1]:
            ended = None  # of an earlier job
        why = may_start(policy, progress, JobState.read(args.before), args.series != args.job, ended, in_vain)
        if why is not None:
            say(why)
            print(DONE if progress.done else FAULT)
            return 0
        record(job.run_dir, "start", **about, step=progress.step, steps=progress.steps, nodes=args.nodes)
        write_expected(args.logs / "expected.json")
        print("go")
        return 0
    said = endings.read(args.logs / "endings")
    decision = decide(policy, progress, args.code, said, JobState.read(args.told), args.restart, in_vain)
    first = next((one for one in said if one.code != STOPPED), None)
    record(
        job.run_dir,
        "end",
        **about,
        step=progress.step,
        code=args.code,
        asked=decision.asked,
        then=decision.word,
        why=decision.why,
        first_rank=None if first is None else first.rank,
        first_error=None if first is None else first.message,
    )
    say(decision.why)
    print(decision.answer)
    return 0
