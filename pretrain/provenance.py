"""Which Farspan this is."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

from ..version import __version__

CLONE = Path(__file__).parents[1]


@functools.cache
def commit() -> str:
    """Of the clone, "-dirty" where its files differ from it; "unknown" where there is none."""
    if not (CLONE / ".git").exists():
        return "unknown"
    # Without the lock that --dirty would take to note what it has seen: others may work in the clone.
    git = "git", "--no-optional-locks", "-C", str(CLONE), "describe", "--always", "--dirty"
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def written_by() -> dict[str, str]:
    """What a checkpoint says of it."""
    return {"version": __version__, "commit": commit()}
