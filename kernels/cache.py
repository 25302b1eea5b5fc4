"""Libraries that were built, one folder each: found, checked, built by one process while others wait.

A folder's name has a hash of all that its library depends on.  It is made beside and renamed, so it is whole or not
there; what is in it is checked against the sum that was written with it.  The lock is the system's (``flock``): it ends
with the process that holds it, however that ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from . import toolchain
from .toolchain import BuildError, Target

VARIABLE = "FARSPAN_KERNEL_CACHE"
POLL = 0.1  # seconds between two looks at a lock


@dataclasses.dataclass(frozen=True)
class Built:
    """A library in the cache."""

    folder: Path
    operation: str
    target: Target
    seconds: float  # that the build took; 0: it was there
    compiler: str

    @property
    def path(self) -> Path:
        return self.folder / "library.so"


def default_folder() -> Path:
    """Where libraries are kept: FARSPAN_KERNEL_CACHE, or beside other caches of the user."""
    if folder := os.environ.get(VARIABLE):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "farspan" / "kernels"


def name_of(operation: str, sources: Sequence[Path], target: Target) -> str:
    """The name of its folder.  BuildError: no compiler, whose version and flags are the last part of it."""
    made_with = [toolchain.version_of(toolchain.compiler(target)), *toolchain.flags(target)]
    return f"{prefix_of(operation, sources, target)}-{_hash(made_with)[:8]}"


def prefix_of(operation: str, sources: Sequence[Path], target: Target) -> str:
    """What its name begins with, whatever compiler is at hand: a node without one takes what another has built."""
    parts = [torch.__version__, str(torch.version.cuda), *toolchain.common_flags(target.kind)]
    if target.kind == "cpu":
        parts.append(toolchain.processor())
    folders = {toolchain.HEADERS, *(source.parent for source in sources)}
    headers = [h for folder in folders for pattern in ("*.h", "*.cuh") for h in folder.glob(pattern)]
    for file in [*sources, *sorted(headers)]:
        parts += [file.name, hashlib.sha256(file.read_bytes()).hexdigest()]
    return f"{operation}-{target.kind}-{target.architecture}-{_hash(parts)[:16]}"


def _hash(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def library(operation: str, sources: Sequence[Path], target: Target, root: Path, limit: float) -> Built:
    """The library, from the cache or built now.

    ``limit``: seconds to wait for another process that builds it, and for the compiler.
    BuildError: it cannot be built, or not kept.
    """
    try:
        name = name_of(operation, sources, target)
    except BuildError:
        for folder in sorted(root.glob(f"{prefix_of(operation, sources, target)}-*")):
            with contextlib.suppress(_Damaged):
                if found := read(folder):
                    return found
        raise
    with contextlib.suppress(_Damaged):
        if found := read(root / name):
            return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f".{name}.lock", limit, lambda: _is_whole(root / name)):
            try:
                found = read(root / name)
            except _Damaged as damage:
                _discard(root / name)
                found = None
                print(f"farspan: kernels: {damage}; it is built anew", file=sys.stderr, flush=True)
            return found or _build(operation, sources, target, root / name, limit)
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise BuildError(
                f"the cache {root} cannot be written and has no {operation} for {target}: run `farspan kernels build` "
                f"where it can be, or set {VARIABLE} or kernels.cache to another folder"
            ) from error
        raise BuildError(f"the cache {root}: {error.strerror or error}: set {VARIABLE} to another folder") from error


class _Damaged(Exception):
    """A folder that is not as it was written."""


def read(folder: Path) -> Built | None:
    """What is in a folder of the cache; None: nothing.  _Damaged: not what was put there."""
    try:
        record = json.loads((folder / "build.json").read_text())
        found = hashlib.sha256((folder / "library.so").read_bytes()).hexdigest()
        if found != record["sha256"]:
            raise _Damaged(f"{folder} is damaged: the library is not the one that was built")
        target = Target(record["kind"], record["architecture"])
        return Built(folder, record["operation"], target, 0.0, record["compiler"])
    except (FileNotFoundError, NotADirectoryError):
        if folder.exists():
            raise _Damaged(f"{folder} is damaged: files are missing") from None
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise _Damaged(f"{folder} is damaged: build.json cannot be read ({error})") from error


def _is_whole(folder: Path) -> bool:
    try:
        return read(folder) is not None
    except (_Damaged, OSError):
        return False


def contents(root: Path) -> list[Built | Path]:
    """All libraries in a cache; the path alone of what is damaged."""
    found: list[Built | Path] = []
    for folder in sorted(root.iterdir() if root.is_dir() else ()):
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        try:
            if built := read(folder):
                found.append(built)
        except (_Damaged, OSError):
            found.append(folder)
    return found


def _build(operation: str, sources: Sequence[Path], target: Target, folder: Path, limit: float) -> Built:
    began = time.monotonic()
    # Of processes that were killed.  Where locks do not reach over the nodes of a cluster another one may still build.
    for leftover in folder.parent.glob(f".{folder.name}.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > limit:
                shutil.rmtree(leftover, ignore_errors=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        made = toolchain.compile_library(sources, target, beside, limit)
        program = toolchain.release_of(toolchain.compiler(target))
        record = {
            "operation": operation,
            "kind": target.kind,
            "architecture": target.architecture,
            "compiler": program,
            "flags": list(toolchain.flags(target)),
            "torch": torch.__version__,
            "seconds": round(time.monotonic() - began, 1),
            "sha256": hashlib.sha256(made.read_bytes()).hexdigest(),
        }
        (beside / "build.json").write_text(json.dumps(record, indent=1) + "\n")
        for kept in ("library.so", "build.json"):
            _sync(beside / kept)
        beside.chmod(0o755)  # mkdtemp lets nobody else in, and a cluster's users share a cache
        try:
            beside.rename(folder)
        except OSError as error:
            # Where locks do not reach over the nodes of a cluster another one may have been faster.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or read(folder) is None:
                raise
        return Built(folder, operation, target, time.monotonic() - began, program)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(folder: Path) -> None:
    """Out of the way at once, then gone: another process may have it open."""
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent)) / "old"
    folder.rename(aside)
    shutil.rmtree(aside.parent, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path, limit: float, done: Callable[[], bool]) -> Iterator[None]:
    """One process at a time, until what they wait for is ``done``: then nobody needs to.  BuildError: none got through
    for ``limit`` seconds."""
    with path.open("a") as file:
        end = time.monotonic() + limit
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if done():
                    break
                if time.monotonic() > end:
                    raise BuildError(
                        f"another process has been building for more than {limit:.0f} s ({path}): "
                        "see what it does, or raise kernels.build_timeout_seconds"
                    ) from None
                time.sleep(POLL)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL):
                    raise
                break  # a file system without locks: folders are renamed into place all the same
        yield
