"""Which Farspan this is."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from pathlib import Path

from ..version import __version__

ROOT = Path(__file__).resolve().parents[1]  # of the package; in a clone of the repository, the clone's
COMPUTING = ("torch", "deepspeed", "megatron-core", "numpy")  # packages that must be the same on all nodes of a run
_LAYERS = ("launch", "pretrain", "parallel", "kernels")
_SOURCES = (".py", ".cu", ".cuh", ".cpp", ".h")


@functools.cache
def commit() -> str:
    """Of the clone, "-dirty" where its files differ from it; "unknown" where there is none."""
    if not (ROOT / ".git").exists():
        return "unknown"
    # Without the lock that --dirty would take to note what it has seen: others may work in the clone.
    git = "git", "--no-optional-locks", "-C", str(ROOT), "describe", "--always", "--dirty"
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@functools.cache
def sources_digest(root: Path = ROOT) -> str:
    """Eight letters of the SHA-256 of Farspan's sources, by which two nodes' may be told apart."""
    digest = hashlib.sha256()
    for layer in _LAYERS:
        for path in sorted((root / layer).rglob("*")):
            if path.suffix in _SOURCES and path.is_file():
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


def written_by() -> dict[str, str]:
    """What a checkpoint says of it."""
    return {"version": __version__, "commit": commit()}
