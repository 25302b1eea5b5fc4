"""The command line of ``farspan launch``."""

from __future__ import annotations

import argparse
from types import ModuleType

from . import again, check, deepspeed, local, slurm, torchrun

_RAW = argparse.RawDescriptionHelpFormatter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ways = parser.add_subparsers(title="ways", metavar="WAY", required=True)

    def add(name: str, module: ModuleType, help: str | None) -> None:
        if help is None:  # only scripts use it: not listed
            one = ways.add_parser(name, description=module.DESCRIPTION, formatter_class=_RAW)
        else:
            one = ways.add_parser(name, description=module.DESCRIPTION, formatter_class=_RAW, help=help)
        module.add_arguments(one)
        one.set_defaults(run=module.run, parser=one)

    add("local", local, "ranks on this machine, started again after a failure")
    add("torchrun", torchrun, "on each of some nodes, torchrun")
    add("slurm", slurm, "a job that comes back until the steps are done")
    add("deepspeed", deepspeed, "DeepSpeed's launcher over a hostfile")
    add("check", check, None)
    add("again", again, None)
