"""What every way to start a run has in common: the configuration, the command of a rank, places for logs."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ...pretrain.config import Config
from ...pretrain.config_file import load_config
from ...pretrain.data.store import TokenStore
from .. import rank_count
from ..options import count
from ..progress import Progress, progress


@dataclasses.dataclass(frozen=True)
class Job:
    """A configuration as it was given on the command line, and what it says."""

    path: str
    overrides: tuple[str, ...]

    @staticmethod
    def of(args: argparse.Namespace) -> Job:
        return Job(args.config, tuple(args.overrides))

    @functools.cached_property
    def config(self) -> Config:
        return load_config(self.path, list(self.overrides))

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir).absolute()

    @property
    def words(self) -> list[str]:
        """CONFIG section.key=value …, as ``farspan train`` takes them."""
        return [self.path, *self.overrides]

    def progress(self) -> Progress:
        return progress(self.config)

    def check_ranks(self, ranks: int) -> None:
        """ValueError where so many do not fit the layout."""
        rank_count.check(self.config, ranks)

    def check_folders(self) -> None:
        """ValueError or OSError where there are no data, or the run folder cannot be made: each rank would say so."""
        TokenStore(self.config.data.folder)
        self.run_dir.mkdir(parents=True, exist_ok=True)


def add_supervision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="print the command, start nothing")
    parser.add_argument(
        "--max-restarts",
        type=count,
        default=3,
        metavar="N",
        help="failures in a row without a new checkpoint before giving up (3)",
    )


def quoted(words: Sequence[str]) -> str:
    """A command for a shell."""
    return shlex.join(words)


def stamp() -> str:
    """The time as part of a file's name."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")


def say(text: str) -> None:
    print(f"farspan: {text}", file=sys.stderr, flush=True)
