"""Files that grow at their end, on a disk that may be full for a while."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .files import explain


class Appended:
    """A file that grows at its end.  What the disk does not take is kept, and written before what comes next.

    One thread may ``sync`` what another appends to, which does not wait for it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None  # opened when there is something to write
        self._waiting = bytearray()
        self._stuck = False
        self._lock = threading.Lock()

    def append(self, content: bytes) -> str | None:
        """Why it waits, in words, where that was not said before; None where all is written."""
        with self._lock:
            self._waiting += content
        try:
            self.flush()
        except OSError as error:
            said, self._stuck = self._stuck, True
            return None if said else explain(error)
        self._stuck = False
        return None

    def flush(self) -> None:
        """Give the system what waits; a process that is killed then loses nothing.  OSError where it is not taken."""
        with self._lock, self._naming():
            if self._file is None:
                self._file = self.path.open("ab", buffering=0)
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]

    def sync(self) -> None:
        """Bring all of it to the disk, if there is any; OSError where that fails."""
        if self._file is None and not self._waiting:
            return
        self.flush()
        assert self._file is not None
        with self._naming():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """An error of the system inside names the file: a write that fails does not."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise
