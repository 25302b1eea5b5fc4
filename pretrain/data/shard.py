"""Token ids of a shard, read from the disk by the range and verified by the block.

Nothing is mapped into memory: a map turns a file that is cut, or a disk that cannot be read, into a signal that ends
the process; a read turns them into an error that can be explained.
"""

from __future__ import annotations

import collections
import os
import resource
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checksums import BLOCK, checksum, of_block

Tokens = npt.NDArray[np.unsignedinteger[Any]]

_MANY_FILES = 8192
_REMEDY = "put a whole copy in its place, or prepare the data again"


class OpenFiles:
    """Files that are open for reading: those used last, at most ``limit`` of them (by default an eighth of as many as
    this process may open: a run has two splits, and connections to many ranks)."""

    def __init__(self, limit: int | None = None) -> None:
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._limit = limit or (max(allowed // 8, 16) if allowed != resource.RLIM_INFINITY else _MANY_FILES)
        self._open: collections.OrderedDict[Path, int] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, begin: int, end: int) -> bytes:
        """These bytes; fewer where the file ends before.  OSError where they cannot be read."""
        with self._lock:
            descriptor = self._descriptor(path)
            content = os.pread(descriptor, end - begin, begin)
            while len(content) < end - begin:  # a large read comes in parts
                more = os.pread(descriptor, end - begin - len(content), begin + len(content))
                if not more:
                    break
                content += more
            return content

    def size(self, path: Path) -> int:
        """Of a file, in bytes; OSError where it cannot be opened."""
        with self._lock:
            return os.fstat(self._descriptor(path)).st_size

    def _descriptor(self, path: Path) -> int:
        descriptor = self._open.pop(path, None)
        if descriptor is None:
            while len(self._open) >= self._limit:
                os.close(self._open.popitem(last=False)[1])
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open[path] = descriptor
        return descriptor

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


class Shard:
    """A file of ``tokens`` ids of ``dtype``.  ``checksums``: of its blocks, each of which is compared the first time
    that a read touches it, by this process; None: nothing is known.

    ValueError in one line, from ``check`` and ``read``: it is missing, of another size, or not what was written.
    OSError: it cannot be read.
    """

    def __init__(self, path: Path, tokens: int, dtype: np.dtype[Any], checksums: str | None, files: OpenFiles) -> None:
        self.path, self.size, self.dtype = path, tokens, dtype
        self._bytes = tokens * dtype.itemsize
        self._checksums, self._files = checksums, files
        self._verified = np.zeros(-(-self._bytes // BLOCK), bool)
        if checksums is None:
            self._verified[:] = True

    def check(self) -> None:
        """That there is such a file, of the right size."""
        size = self._files.size(self.path) if self.path.is_file() else None  # a pipe would be waited for
        if size != self._bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(
                f"shard {self.path} {found}, dataset.json says {self._bytes} bytes: prepare the data again"
            )

    def read(self, begin: int, end: int) -> Tokens:
        """Ids [begin, end), as they are stored; not to be written to."""
        end = min(end, self.size)
        if begin >= end:
            return np.zeros(0, self.dtype)
        width = self.dtype.itemsize
        first, last = begin * width // BLOCK, (end * width - 1) // BLOCK
        if self._verified[first : last + 1].all():
            return np.frombuffer(self._read(begin * width, end * width), self.dtype)
        content = self._read(first * BLOCK, min((last + 1) * BLOCK, self._bytes))
        for number in range(first, last + 1):
            if not self._verified[number]:
                self._verify(number, memoryview(content)[(number - first) * BLOCK : (number - first + 1) * BLOCK])
        offset = begin * width - first * BLOCK
        return np.frombuffer(content, self.dtype, end - begin, offset)

    def _verify(self, number: int, content: memoryview) -> None:
        assert self._checksums is not None
        if checksum(content) != of_block(self._checksums, number):
            raise ValueError(
                f"shard {self.path} is damaged (block {number}, bytes {number * BLOCK} to "
                f"{number * BLOCK + len(content)}, is not what was written): {_REMEDY}"
            )
        self._verified[number] = True

    def _read(self, begin: int, end: int) -> bytes:
        try:
            content = self._files.read(self.path, begin, end)
        except OSError as error:
            raise OSError(
                error.errno,
                f"shard {self.path} cannot be read (block {begin // BLOCK}, bytes {begin} to {end}: {error.strerror}): "
                f"{_REMEDY}",
            ) from None
        if len(content) < end - begin:
            raise ValueError(
                f"shard {self.path} has become shorter (block {(begin + len(content)) // BLOCK} of "
                f"{len(self._verified)} is not all there): {_REMEDY}"
            )
        return content
