"""``farspan launch slurm``: fills in the settings of launch/slurm.sbatch, and submits it."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...pretrain.files import write_text
from .. import rank_count
from ..exit_codes import FAULT
from ..local import COMMAND
from ..options import add_config, positive
from .again import add_policy
from .common import Job, quoted, say

DESCRIPTION = """\
Submit a run to SLURM: one task a rank, checked nodes, a log of each rank, and a job that comes back.

  farspan launch slurm --nodes 8 --gpus-per-node 8 --cpus-per-task 8 --time 24:00:00 --until-done CONFIG

A job whose time ends, that is preempted or signalled (scancel --signal=USR1) saves and is started again; with
--until-done one that fails is too, as long as there are new checkpoints.  scancel without a signal ends it for good.
--dry-run prints the script; launch/slurm.sbatch is the same to fill in by hand.
"""

TEMPLATE = Path(__file__).parents[1] / "slurm.sbatch"
_BEGIN, _END = "# ---- settings ----\n", "# ---- end of settings ----\n"
# What the script or the checks before it rely on, and where it is said instead.
_OWN = {
    "nodes": "--nodes", "ntasks-per-node": "--ntasks-per-node", "ntasks": "--ntasks-per-node", "time": "--time",
    "gpus-per-node": "--gpus-per-node", "gpus": "--gpus-per-node", "cpus-per-task": "--cpus-per-task",
    "signal": "checkpoint.margin_seconds", "requeue": "--again requeue", "no-requeue": "--again chain",
    "array": "one command a run, each with a run_dir of its own",
}  # fmt: skip
_SIMPLE = ("partition", "account", "qos", "constraint", "mem", "reservation", "exclude", "nodelist", "mail-user")


@dataclasses.dataclass(frozen=True)
class Gpus:
    """GPUs of a node, as sbatch takes them: 8, or of a type, a100:8."""

    count: int
    type: str = ""

    @staticmethod
    def read(text: str) -> Gpus:
        """An option's value."""
        kind, _, number = text.rpartition(":")
        if not number.isdigit() or not re.fullmatch(r"[\w.-]*", kind) or text.startswith(":"):
            raise argparse.ArgumentTypeError(f"{text!r} is no number of GPUs: give one, such as 8, or a100:8")
        return Gpus(int(number), kind)

    def __str__(self) -> str:
        return f"{self.type}:{self.count}" if self.type else str(self.count)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="nodes (1)")
    parser.add_argument(
        "--gpus-per-node", type=Gpus.read, default=Gpus(0), metavar="[TYPE:]N", help="GPUs, and so ranks, of each (0)"
    )
    parser.add_argument(
        "--ntasks-per-node", type=positive, metavar="N", help="ranks of each (its GPUs; on CPUs the layout's share)"
    )
    parser.add_argument("--cpus-per-task", type=positive, metavar="N", help="cores of each rank")
    parser.add_argument("--time", type=time_limit, required=True, metavar="TIME", help="of a job, as sbatch takes it")
    for name in _SIMPLE:
        parser.add_argument(f"--{name}", metavar=name.upper(), help="as sbatch's")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION=VALUE", help="any other option of sbatch, without --"
    )
    parser.add_argument("--name", metavar="NAME", help="of the job (the run folder's)")
    parser.add_argument("--container", metavar="IMAGE", help="run in this image, which has Farspan")
    parser.add_argument("--container-runtime", choices=("pyxis", "apptainer"), default="pyxis", help="(pyxis)")
    parser.add_argument(
        "--container-mounts",
        metavar="FROM:TO,…",
        help="folders that are seen in it, beside those of the run, its data and its configuration, and this one",
    )
    parser.add_argument(
        "--farspan", metavar="COMMAND", help="how nodes call it (this interpreter; in a container: farspan)"
    )
    add_policy(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    add_config(parser)


def run(args: argparse.Namespace) -> int:
    job = Job.of(args)
    path = job.run_dir / "launch" / f"{_name(args, job)}.sbatch"
    script = fill_in(args, job, path)
    if args.cpus_per_task is None:
        say("without --cpus-per-task SLURM gives each rank, with all its threads, a single core")
    if args.dry_run:
        print(script, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch is not installed here: submit from a node of the cluster, or take --dry-run")
    progress = job.progress()
    if progress.done:
        say(f"all {progress.steps} steps are done")
        return 0
    (job.run_dir / "logs").mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(exist_ok=True)
    write_text(path, script)
    submitted = subprocess.run(["sbatch", "--parsable", str(path)], stdout=subprocess.PIPE, text=True)
    if submitted.returncode != 0:
        return FAULT
    number = submitted.stdout.strip().partition(";")[0]
    print(number)
    say(f"job {number}: {path}, output in {job.run_dir / 'logs' / f'{number}.out'}")
    return 0


def fill_in(args: argparse.Namespace, job: Job, path: Path) -> str:
    """The script; ``path``: where it will lie.  ValueError where the options do not fit each other or the layout."""
    text = TEMPLATE.read_text(encoding="utf-8")
    head, _, rest = text.partition(_BEGIN)
    _, _, body = rest.partition(_END)
    lines = [*_header(args, job), *_settings(args, job, path)]
    return head.splitlines()[0] + "\n" + _BEGIN + "".join(f"{line}\n" for line in lines) + _END + body


def _name(args: argparse.Namespace, job: Job) -> str:
    return re.sub(r"[^\w.-]", "-", args.name or job.run_dir.name)


def _header(args: argparse.Namespace, job: Job) -> Iterator[str]:
    """What sbatch reads."""
    ranks = _ranks_per_node(args, job)
    job.check_ranks(args.nodes * ranks)
    options = {
        "job-name": _name(args, job),
        "nodes": args.nodes,
        "ntasks-per-node": ranks,
        "cpus-per-task": args.cpus_per_task,
        "gpus-per-node": args.gpus_per_node if args.gpus_per_node.count else None,
        "time": args.time,
        "signal": _signal(args.time, job.config.checkpoint.margin_seconds),
        **{name: getattr(args, name.replace("-", "_")) for name in _SIMPLE},
        "requeue" if args.again == "requeue" else "no-requeue": "",
        "open-mode": "append",
        "chdir": Path.cwd(),
        "output": job.run_dir / "logs" / "%j.out",
    }
    for option in args.sbatch:
        name, _, value = option.removeprefix("--").partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*", name):
            raise ValueError(f"--sbatch {option!r} is not of the form OPTION=VALUE, such as mail-type=END")
        if name in _OWN:
            raise ValueError(f"--sbatch {option!r} is not for sbatch alone: give {_OWN[name]}")
        options[name] = value
    for name, value in options.items():
        if value is not None:
            yield f"#SBATCH --{name}" + (f"={shlex.quote(str(value))}" if value != "" else "")


def _settings(args: argparse.Namespace, job: Job, path: Path) -> Iterator[str]:
    """What the script reads."""
    again = ["--again", args.again, "--max-restarts", str(args.max_restarts)]
    again += ["--until-done"] if args.until_done else []
    # Ranks of a tensor group follow each other on one node.
    srun = ["srun", "--kill-on-bad-exit=1", "--distribution=block", "--cpu-bind=cores"]
    srun += ["--gpu-bind=none"] if args.gpus_per_node.count else []  # ranks of a node reach each other's GPUs
    default = ["farspan"] if args.container else list(COMMAND)
    yield _array("farspan", shlex.split(args.farspan) if args.farspan else default)
    yield _array("run", job.words)
    yield f"run_dir={shlex.quote(str(job.run_dir))}"
    yield _array("again", again)
    yield f"script={shlex.quote(str(path))}"
    yield f"gpus_per_node={args.gpus_per_node.count}"
    yield _array("srun", srun)
    inside, pyxis = _container(args, job)
    yield _array("inside", inside)
    yield _array("pyxis", pyxis)


def _container(args: argparse.Namespace, job: Job) -> tuple[list[str], list[str]]:
    """What stands before a command, and what srun is told."""
    if not args.container:
        if args.container_mounts:
            raise ValueError("--container-mounts are of a container: give --container IMAGE too")
        return [], []
    mounts = ",".join([*_own_mounts(args, job), *([args.container_mounts] if args.container_mounts else [])])
    if args.container_runtime == "pyxis":
        where = ["--container-workdir", str(Path.cwd()), f"--container-mounts={mounts}"]
        return [], [f"--container-image={args.container}", *where]
    nvidia = ["--nv"] if args.gpus_per_node.count else []
    return ["apptainer", "exec", *nvidia, "--pwd", str(Path.cwd()), "--bind", mounts, args.container], []


def _own_mounts(args: argparse.Namespace, job: Job) -> list[str]:
    """What a rank reads and writes, under the name that it has outside; not what lies in another of them, nor what the
    user mounts there."""
    taken = {mount.split(":")[1] for mount in (args.container_mounts or "").split(",") if ":" in mount}
    wanted = [Path.cwd(), job.run_dir, Path(job.config.data.folder).absolute(), Path(job.path).absolute().parent]
    if strange := [str(folder) for folder in wanted if set(str(folder)) & set(":,")]:
        raise ValueError(f"{strange[0]} has a ':' or ',' in its name, and can be mounted in no container: rename it")
    outer = [folder for folder in dict.fromkeys(wanted) if not any(other in folder.parents for other in wanted)]
    return [f"{folder}:{folder}" for folder in outer if str(folder) not in taken]


def _array(name: str, words: Sequence[str]) -> str:
    return f"{name}=({quoted(words)})"


def _ranks_per_node(args: argparse.Namespace, job: Job) -> int:
    gpus = args.gpus_per_node.count
    ranks: int | None = args.ntasks_per_node or gpus or None
    if gpus and ranks and ranks > gpus:
        raise ValueError(f"--ntasks-per-node {ranks} need a GPU each and --gpus-per-node is {gpus}: set the same")
    if ranks is not None:
        return ranks
    layout = rank_count.of_layout(job.config)
    if layout % args.nodes:
        raise ValueError(
            f"the layout's {layout} ranks do not divide among --nodes {args.nodes}: give --ntasks-per-node, "
            "or change the parallel section"
        )
    return layout // args.nodes


def _signal(limit: str, margin_seconds: float) -> str | None:
    """Ranks get SIGUSR1 so long before the end; SLURM may send it up to a minute before that."""
    seconds = time_seconds(limit)
    if seconds is not None and margin_seconds >= seconds:
        raise ValueError(
            f"--time {limit} leaves nothing beside checkpoint.margin_seconds {margin_seconds:g}: set a longer one, "
            "or a smaller margin"
        )
    return f"USR1@{math.ceil(margin_seconds)}" if margin_seconds else None


_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def time_seconds(text: str) -> int | None:
    """Of sbatch's forms M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; None where there is no limit (0, UNLIMITED, INFINITE).
    ValueError for another text."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no time: give minutes, hours:minutes:seconds or days-hours")
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    return total or None


def time_limit(text: str) -> str:
    """An option's value."""
    try:
        time_seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
