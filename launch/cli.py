"""The command line: ``farspan prepare | train | checkpoint | convert | bench | kernels | doctor | version``.

Whatever is slow to import is imported inside the command that needs it, so that ``farspan --help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from ..version import __version__
from . import endings, exit_codes
from .environment import FAILURE_FILE

_OVERVIEW = """\
Pretrain language models from text to a Hugging Face folder.

  farspan prepare ...                        text -> tokenizer and token shards
  farspan train configs/RUN.yaml             token shards -> checkpoints
  farspan convert to-hf runs/RUN/ OUT        checkpoint -> folder for transformers' from_pretrained
"""

_EPILOG = """\
Each command has its own --help.  Errors are one line; FARSPAN_TRACEBACK=1 shows where they come from.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code (``exit_codes``)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    _prepare_imports()
    try:
        parser = _parser(next((a for a in arguments if not a.startswith("-")), None))
        args, rest = parser.parse_known_args(arguments)
        # argparse ends a list of positionals at the first option between them.
        while rest and hasattr(args, "overrides") and "=" in rest[0] and not rest[0].startswith("-"):
            args.overrides.append(rest.pop(0))
        if rest:
            args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return args.run(args) or 0
    except KeyboardInterrupt:
        _say("interrupted")
        endings.note(exit_codes.INTERRUPTED)
        return exit_codes.INTERRUPTED
    except Exception as error:
        if FAILURE_FILE in os.environ:
            Path(os.environ[FAILURE_FILE]).write_text(repr(time.time()))
        code = exit_codes.FAULT
        if _is_for_the_user(error):
            code = exit_codes.of_system(error) if isinstance(error, OSError) else exit_codes.USER_ERROR
        endings.note(code, error, _one_line(error))
        if os.environ.get("FARSPAN_TRACEBACK", "0") not in ("", "0") or code == exit_codes.FAULT:
            raise
        _say(_one_line(error))
        return code


def _prepare_imports() -> None:
    # `python -m` in a clone puts the repository root, which is the package itself, on the import path.  Its folder
    # `kernels` would then pass for the package of that name that transformers looks for.
    root = Path(__file__).resolve().parents[1]
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != root]
    # megatron-core says four times what Farspan does not need.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The whole command line; options that only a slow module knows are added for ``command`` alone."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="farspan", description=_OVERVIEW, epilog=_EPILOG, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"farspan {__version__}")
    # deepspeed's launcher adds it in front; LOCAL_RANK says the same.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    prepare = commands.add_parser("prepare", help="turn text into a tokenizer and token shards", formatter_class=raw)
    prepare.set_defaults(run=_prepare, parser=prepare)
    if command == "prepare":
        from ..pretrain.data.prepare import add_arguments

        add_arguments(prepare)

    launch = commands.add_parser("launch", help="start a run: here, with torchrun, SLURM or DeepSpeed's launcher")
    launch.set_defaults(parser=launch)
    if command == "launch":
        from .launchers.command import add_arguments as add_launch_arguments

        add_launch_arguments(launch)

    train = commands.add_parser("train", help="train a model, or continue a run", formatter_class=raw)
    train.set_defaults(run=_train, parser=train)
    if command == "train":
        from .training import add_arguments as add_train_arguments

        add_train_arguments(train)

    checkpoint = commands.add_parser("checkpoint", help="list checkpoints, verify them, compare two")
    checkpoint.set_defaults(parser=checkpoint)
    if command == "checkpoint":
        from .checkpoints import add_arguments as add_checkpoint_arguments

        add_checkpoint_arguments(checkpoint)

    convert = commands.add_parser("convert", help="convert checkpoints and models from elsewhere")
    convert.set_defaults(parser=convert)
    if command == "convert":
        from .convert import add_arguments as add_convert_arguments

        add_convert_arguments(convert)

    bench = commands.add_parser("bench", help="measure")
    bench.set_defaults(parser=bench)
    questions = bench.add_subparsers(title="questions", metavar="QUESTION", required=True)
    approximation = questions.add_parser("approximation", help="MRA and Nyström attention against exact attention")
    approximation.set_defaults(run=_approximation, parser=approximation)
    bench_kernels = questions.add_parser("kernels", help="fused operations against float64, targets and peers")
    bench_kernels.set_defaults(run=_bench_kernels, parser=bench_kernels)
    bench_train = questions.add_parser("train", help="training steps of the five architectures beside transformers")
    bench_train.set_defaults(run=_bench_train, parser=bench_train)
    if command == "bench":
        from ..pretrain.approximation.command import add_arguments as add_approximation_arguments
        from ..pretrain.bench import kernels as kernels_command
        from ..pretrain.bench import train as train_command

        add_approximation_arguments(approximation)
        kernels_command.add_arguments(bench_kernels)
        train_command.add_arguments(bench_train)

    kernels = commands.add_parser("kernels", help="compile the fused kernels ahead, see which there are")
    kernels.set_defaults(parser=kernels)
    actions = kernels.add_subparsers(title="actions", metavar="ACTION", required=True)
    build = actions.add_parser("build", help="compile ahead, also where there is no GPU", formatter_class=raw)
    build.set_defaults(run=_build_kernels, parser=build)
    show = actions.add_parser("list", help="what is in the cache")
    show.set_defaults(run=_list_kernels, parser=show)
    if command == "kernels":
        from . import kernels as command_of_kernels

        build.description = command_of_kernels.BUILD
        command_of_kernels.add_build_arguments(build)
        command_of_kernels.add_list_arguments(show)

    doctor = commands.add_parser("doctor", help="one page on this machine and cluster, and what to mend")
    doctor.set_defaults(run=_doctor, parser=doctor)
    if command == "doctor":
        from .doctor import command as command_of_doctor

        doctor.description, doctor.formatter_class = command_of_doctor.DESCRIPTION, raw
        command_of_doctor.add_arguments(doctor)

    version = commands.add_parser("version", help="print the versions of Farspan and of what it stands on")
    version.set_defaults(run=_version, parser=version)
    return parser


def _prepare(args: argparse.Namespace) -> int | None:
    from ..pretrain.data.prepare import run

    return run(args)


def _train(args: argparse.Namespace) -> int:
    from .training import run

    return run(args)


def _approximation(args: argparse.Namespace) -> None:
    from ..pretrain.approximation.command import run

    run(args)


def _build_kernels(args: argparse.Namespace) -> int:
    from .kernels import build

    return build(args)


def _list_kernels(args: argparse.Namespace) -> None:
    from .kernels import show

    show(args)


def _doctor(args: argparse.Namespace) -> int:
    from .doctor.command import run

    return run(args)


def _bench_kernels(args: argparse.Namespace) -> None:
    from ..pretrain.bench.kernels import run

    run(args)


def _bench_train(args: argparse.Namespace) -> None:
    from ..pretrain.bench.train import run

    run(args)


def _version(args: argparse.Namespace) -> None:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    print(f"farspan {__version__}")
    print(f"python {platform.python_version()}")
    for package in ("torch", "deepspeed", "megatron-core", "transformers"):
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} is not installed")


def _is_for_the_user(error: Exception) -> bool:
    """Whether one line is enough; anything but ValueError and OSError needs its traceback.

    An OSError names what is missing or full.  A ValueError that Farspan raises is written for the user; one from deep
    inside a library is a fault whose traceback is needed.  A broken connection is a fault too.
    """
    if isinstance(error, OSError):
        return not isinstance(error, ConnectionError)
    if not isinstance(error, ValueError):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__")).split(".")[0] in ("farspan", "__main__")


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError):
        from ..pretrain.files import explain

        return explain(error)
    return " ".join(str(error).split()) or type(error).__name__


def _say(text: str) -> None:
    rank = os.environ.get("RANK", "0")
    print(f"farspan: {text}" if rank == "0" else f"farspan: [rank {rank}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
