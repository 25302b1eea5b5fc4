"""``farspan train``: one rank where a launcher started it, else as many ranks as the run needs, here."""

from __future__ import annotations

import argparse
import contextlib
import errno
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from . import endings, exit_codes, network, rank_count
from .environment import RankEnvironment, apply, check_address, idle_slurm_nodes, read_environment
from .options import add_config, positive
from .parent import die_with_launcher

if TYPE_CHECKING:
    from ..pretrain.config import Config
    from .guard import Guard

_OPEN_FILES = 65536

DESCRIPTION = """\
Train as the YAML file says.  section.key=value after it overrides one value, as often as needed:

  farspan train configs/RUN.yaml optimizer.lr=1e-4 parallel.tensor=2

Started by itself, the command runs one rank for each GPU (on a CPU: as many as the layout needs).  Under a launcher
each process is one rank (`farspan launch` builds such lines):

  torchrun --nnodes 2 --nproc-per-node 8 ... --no-python farspan train configs/RUN.yaml
  srun --ntasks-per-node 8 farspan train configs/RUN.yaml
  deepspeed --hostfile hosts --no_python farspan train configs/RUN.yaml

A run that was stopped continues from its latest checkpoint when the same command is given again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    add_config(parser)
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--ranks", type=positive, metavar="N", help="start N ranks on this machine")
    parser.add_argument("--logs", metavar="FOLDER", help="write what each of them says to a file of its own there")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: continue from the run's latest checkpoint if there is one (default); never: refuse to; "
        "PATH: continue from that checkpoint",
    )
    parser.add_argument(
        "--stop-after", type=positive, metavar="STEP", help="save and stop after this step; run again to go on"
    )


def run(args: argparse.Namespace) -> int:
    """The exit code (``exit_codes``)."""
    environment = read_environment()
    if args.print_config:
        if environment is None or environment.rank == 0:
            print(_config_of(args).to_yaml(), end="")
        return exit_codes.DONE
    if environment is None:
        return _start(args)
    if args.ranks is not None:
        raise ValueError("--ranks starts ranks on this machine, but a launcher already started them: leave it out")
    die_with_launcher()
    return _be_rank(args, environment)


def _be_rank(args: argparse.Namespace, environment: RankEnvironment, config: Config | None = None) -> int:
    """``config``: where it has been read."""
    with _guarded(environment) as guard:
        _allow_open_files()
        apply(environment)
        network.prepare(environment)
        config = config or _config_of(args)
        check_address(environment)
        if guard is not None:
            health, seconds = config.health, config.training.timeout_seconds
            guard.configure(run_dir=config.run_dir, hang_seconds=health.hang_seconds, timeout_seconds=seconds)
        from ..pretrain.train import train

        stopped = train(config, resume=args.resume, stop_after=args.stop_after) is not None
    if stopped and environment.rank == 0:
        endings.note(exit_codes.STOPPED)  # a launcher may say no more than how the last rank was ended
    return exit_codes.of_stop(environment.rank) if stopped else exit_codes.DONE


def _allow_open_files() -> None:
    """As many as an ordinary process may ask for: shards and connections to other ranks, where shells allow 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextlib.contextmanager
def _guarded(environment: RankEnvironment) -> Iterator[Guard | None]:
    """What notices that this rank hangs, before anything slow is imported; None where the system is not Linux, or the
    size of files is limited to less than the memory that they share, which counts as one."""
    if sys.platform != "linux":
        yield None
        return
    from .guard import Guard

    try:
        guard = Guard(environment.rank, environment.world_size)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        yield None
        return
    try:
        yield guard
    finally:
        guard.stop()


def _start(args: argparse.Namespace) -> int:
    """On this machine, which no launcher has laid out: this process, or ranks that it starts."""
    from .local import free_port

    config = _config_of(args)
    ranks = args.ranks or rank_count.by_default(config)
    if idle := idle_slurm_nodes():
        note = f"note: {idle} more nodes of this SLURM job stay idle; srun starts ranks on all of them"
        print(f"farspan: {note}", file=sys.stderr, flush=True)
    if ranks > 1 or args.logs is not None:
        return _start_ranks(config, ranks, args)
    return _be_rank(args, RankEnvironment(0, 0, 1, 1, "127.0.0.1", free_port()), config)


def _config_of(args: argparse.Namespace) -> Config:
    from ..pretrain.config_file import load_config

    return load_config(args.config, args.overrides)


def _start_ranks(config: Config, ranks: int, args: argparse.Namespace) -> int:
    import torch

    from .local import run_ranks

    gpus = torch.cuda.device_count()
    if 0 < gpus < ranks:
        raise ValueError(f"{ranks} ranks need a GPU each and this machine shows {gpus}: start fewer with --ranks")
    rank_count.check(config, ranks)
    options = ["--resume", args.resume]
    if args.stop_after is not None:
        options += ["--stop-after", str(args.stop_after)]
    logs = None if args.logs is None else Path(args.logs)
    return run_ranks(["train", args.config, *args.overrides, *options], ranks, logs=logs)
