"""A disk that takes so many bytes a second: the files of a checkpoint wait in their writes, and others may run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import IO

import pytest

from farspan.pretrain.checkpoint import tensor_file

_SECONDS = 0.05  # that a write lasts at most, before another


class _SlowFile:
    """As a raw file, but each ``write`` takes its time, and no more than the disk takes in that."""

    def __init__(self, file: IO[bytes], speed: Callable[[], float]) -> None:
        self._file, self._speed = file, speed

    def write(self, content: memoryview) -> int:
        bytes_per_second = self._speed()
        part = content[: max(1, int(bytes_per_second * _SECONDS))]
        time.sleep(len(part) / bytes_per_second)
        return self._file.write(part)


def slow_down(patch: pytest.MonkeyPatch, speed: Callable[[], float]) -> None:
    """Each rank has a disk for its files; ``speed``: how many bytes it takes a second, now."""
    begin = tensor_file._Checked.__init__

    def slow(self: tensor_file._Checked, file: IO[bytes]) -> None:
        begin(self, _SlowFile(file, speed))  # type: ignore[arg-type]

    patch.setattr(tensor_file._Checked, "__init__", slow)
