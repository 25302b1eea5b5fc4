"""Files that are whole or not there: written beside, flushed to the disk, renamed.  What a failure of theirs means."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

# What to do about an error of the system, where that is known.
_REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of your quota there",
    errno.EFBIG: "raise the limit on the size of files, ulimit -f",
    errno.EACCES: "you need rights there, or another path",
    errno.EPERM: "you need rights there, or another path",
    errno.EROFS: "nothing can be written there, give another path",
    errno.ENOTDIR: "a file stands where a folder is needed, give another path",
    errno.EEXIST: "something else stands in its place, give another path",
    errno.EISDIR: "a folder stands where a file is needed, move it away or give another path",
}

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explain(error: OSError) -> str:
    """An error of the system in one line: which file, what is wrong, and what to do where that is known."""
    if not error.strerror:
        return " ".join(str(error).split()) or type(error).__name__
    where = "" if error.filename is None else f"{error.filename}: "
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{where}{error.strerror}" + (f" ({remedy})" if remedy else "")


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes ``path``'s place only when the block ends without an error: readers see the
    old content or the new, never a part."""
    beside = path.with_name(f".{path.name}.tmp")  # what a killed process left there is overwritten
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        # A write that fails names no file, one by numpy no reason either, and nobody knows the name beside.
        if isinstance(error, OSError) and error.errno is None:
            raise OSError(f"{path} cannot be written whole ({error}): the disk may be full") from None
        if isinstance(error, OSError) and error.filename in (None, str(beside)):
            error.filename, error.filename2 = str(path), None
        raise
    sync(path.parent)


@contextlib.contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """Make the folders that ``path`` is to lie in; where the block fails, those that are new and empty go again."""
    new = [parent for parent in path.absolute().parents if not parent.exists()]  # the nearest first
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in new:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that appears whole under its name when the block ends, or not at all."""
    target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not empty: give a new folder, nothing is overwritten")
    beside = target.with_name(f".{target.name}.tmp")
    with parents_of(target):
        if beside.exists():
            shutil.rmtree(beside)
        try:
            beside.mkdir()
            yield beside
            sync(beside)
            if target.exists():
                target.rmdir()
            beside.replace(target)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
    sync(target.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content by this text, in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace a file's content by this value as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str, remedy: str = "put a whole one there") -> Any:
    """Parse a JSON file; ValueError in one line where it is missing or broken.  ``what``: what its folder should be;
    ``remedy``: what to do about a broken one."""
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is missing: {path.parent} is not {what}, or not a whole one")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or a number of too many digits
        raise ValueError(f"{path} is damaged (not JSON: {error}): {remedy}") from None


def read_mapping(path: Path, what: str, remedy: str = "put a whole one there") -> dict[str, Any]:
    """As ``read_json``, of a file that must hold a JSON object."""
    value = read_json(path, what, remedy)
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged (it holds no JSON object): {remedy}")
    return value
