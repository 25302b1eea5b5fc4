"""Tables, sizes and progress as the commands print them."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Sequence
from typing import Self


def table(lines: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Lines of text with aligned columns; ``right``: the numbers of those that are aligned at their right end.  A line
    with fewer cells than the first ends in text of any length."""
    columns = len(lines[0]) if lines else 0
    whole = [line for line in lines if len(line) == columns]
    widths = [max(len(line[i]) for line in whole) for i in range(columns)]

    def cell(text: str, column: int) -> str:
        return text.rjust(widths[column]) if column in right else text.ljust(widths[column])

    return [
        "  ".join(
            text if len(line) < columns and i == len(line) - 1 else cell(text, i) for i, text in enumerate(line)
        ).rstrip()
        for line in lines
    ]


def size(count: int) -> str:
    """A number of bytes, in powers of 1000."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count} B"


def shorten(text: str, width: int) -> str:
    """At most ``width`` characters: the beginning and the end of a longer text."""
    if len(text) <= width:
        return text
    head = (width - 1) // 3
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def some(items: Sequence[str], most: int, between: str = ", ") -> str:
    """A list in words, of which at most so many are named."""
    more = len(items) - most
    return between.join(items[:most]) + (f" and {more} more" if more > 0 else "")


class Progress:
    """How far something long has come, in one line on a terminal; nothing elsewhere."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self._shown, self._next = sys.stderr.isatty(), time.monotonic() + 0.5  # what is short needs none

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._show("")

    def reach(self, done: int) -> None:
        self.done = min(done, self.total)
        if time.monotonic() > self._next:
            self._next = time.monotonic() + 0.5
            self._show(f"{self.what}: {self.done / max(self.total, 1):.0%}")

    def _show(self, text: str) -> None:
        if self._shown:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
