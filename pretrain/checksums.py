"""Checksums of every block of a file: XXH3 of 64 bits (https://github.com/Cyan4973/xxHash), in hexadecimal, end to end.

A manifest says of a file the digits of all its blocks in one string.
"""

from __future__ import annotations

from pathlib import Path

import xxhash

BLOCK = 2**20  # bytes under one checksum
DIGITS = 16  # of one


def checksum(content: bytes | memoryview) -> str:
    return xxhash.xxh3_64_hexdigest(content)


def digits_of(size: int) -> int:
    """How many digits the checksums of so many bytes have."""
    return -(-size // BLOCK) * DIGITS


def of_block(checksums: str, number: int) -> str:
    return checksums[number * DIGITS : (number + 1) * DIGITS]


class Checksums:
    """Of what is written one piece after the other."""

    def __init__(self) -> None:
        self._ended: list[str] = []
        self._block, self._room = xxhash.xxh3_64(), BLOCK

    def update(self, content: bytes | memoryview) -> None:
        view = memoryview(content).cast("B")
        while len(view):
            part, view = view[: self._room], view[self._room :]
            self._room -= len(part)
            self._block.update(part)
            if not self._room:
                self._end_block()

    def finish(self) -> str:
        """All digits, when there is nothing more to come."""
        if self._room < BLOCK:
            self._end_block()
        return "".join(self._ended)

    def _end_block(self) -> None:
        self._ended.append(self._block.hexdigest())
        self._block, self._room = xxhash.xxh3_64(), BLOCK


def of_file(path: Path) -> str:
    """All digits of a file; OSError where it cannot be read."""
    checksums = Checksums()
    with path.open("rb", buffering=0) as file:
        while content := file.read(16 * BLOCK):
            checksums.update(content)
    return checksums.finish()
