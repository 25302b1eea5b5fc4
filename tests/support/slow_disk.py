"""A disk that takes so many bytes a second: the files of a checkpoint wait in their writes, and others may run."""

from __future__ import annotations

import time
from typing import IO

import pytest

from farspan.pretrain.checkpoint import tensor_file

_SECONDS = 0.05  # that a write lasts at most, before another


class _SlowFile:
    """As a raw file, but each ``write`` takes its time, and no more than the disk takes in that."""

    def __init__(self, file: IO[bytes], bytes_per_second: float) -> None:
        self._file, self._rate = file, bytes_per_second

    def write(self, content: memoryview) -> int:
        part = content[: max(1, int(self._rate * _SECONDS))]
        time.sleep(len(part) / self._rate)
        return self._file.write(part)


def slow_down(patch: pytest.MonkeyPatch, bytes_per_second: float) -> None:
    """Each rank has a disk of that speed for its files."""
    begin = tensor_file._Checked.__init__

    def slow(self: tensor_file._Checked, file: IO[bytes]) -> None:
        begin(self, _SlowFile(file, bytes_per_second))  # type: ignore[arg-type]

    patch.setattr(tensor_file._Checked, "__init__", slow)
