"""A rank's signs of life: a record in shared memory that the guard beside it reads, whatever the rank is doing.

Nothing here imports more than the standard library: the guard, a small process, imports it too.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

PHASES = ("starting", "training", "evaluating", "saving")

_WORDS, _SLOTS, _FIRST_SLOT = 1024, 500, 16
_TEXT = _WORDS * 8  # where the text begins, in bytes
_SIZE = _TEXT + 256 * 1024  # memory that is never touched costs nothing
# Words of 64 bits.
_BEATS, _STEP, _PHASE, _WAITING, _SLOT, _NUMBER, _ELEMENTS, _NAME, _SINCE, _LENGTH = range(10)


class Record:
    """Numbers that change all the time, and lines of JSON that are added now and then.

    ``file``: a descriptor of a file without a name (``Record.file``).  One process writes, another reads: each number
    is whole, and between two of them there may be a moment; of a rank that hangs they are at rest.
    """

    def __init__(self, file: int) -> None:
        self._map = mmap.mmap(file, _SIZE)
        self.words = memoryview(self._map)[:_TEXT].cast("Q")

    @staticmethod
    def file() -> int:
        """A descriptor of a new, empty one."""
        file = os.memfd_create("farspan-heartbeat")
        os.ftruncate(file, _SIZE)
        return file

    # The rank writes.

    def add(self, **values: Any) -> bool:
        """A line of JSON; False where there is no room for it."""
        line = json.dumps(values).encode() + b"\n"
        begin = self.words[_LENGTH]
        if _TEXT + begin + len(line) > _SIZE:
            return False
        self._map[_TEXT + begin : _TEXT + begin + len(line)] = line
        self.words[_LENGTH] = begin + len(line)
        return True

    # The guard reads.

    @property
    def beats(self) -> int:
        return self.words[_BEATS]

    @property
    def phase(self) -> str:
        return PHASES[self.words[_PHASE]]

    def lines(self) -> list[dict[str, Any]]:
        text = self._map[_TEXT : _TEXT + self.words[_LENGTH]]
        return [json.loads(line) for line in text.splitlines()]

    def settings(self) -> dict[str, Any]:
        """The last that were given."""
        return next((line["settings"] for line in reversed(self.lines()) if "settings" in line), {})

    def state(self) -> dict[str, Any]:
        """What is known of the rank, as JSON takes it.

        ``groups``: {key: its name, ranks, how many collectives this rank has begun in it, how many it has ended}.
        ``last``: the collective begun last, or waited for: its group's key, its number in the group, what it is, its
        elements, whether the rank is waiting in it, and since when (seconds ago); None before the first.
        """
        words, lines = self.words, self.lines()
        names = [line["name"] for line in lines if "name" in line]
        groups = [line["group"] for line in lines if "group" in line]
        state: dict[str, Any] = {"phase": self.phase, "step": words[_STEP], "last": None, "groups": {}}
        for index, group in enumerate(groups):
            begun, ended = words[_FIRST_SLOT + 2 * index], words[_FIRST_SLOT + 2 * index + 1]
            state["groups"][group["key"]] = {**group, "begun": begun, "ended": ended}
        if words[_NUMBER]:
            state["last"] = {
                "group": groups[words[_SLOT]]["key"],
                "number": words[_NUMBER],
                "name": names[words[_NAME]],
                "elements": words[_ELEMENTS],
                "waiting": bool(words[_WAITING]),
                "seconds": max(0.0, time.monotonic() - words[_SINCE] / 1e9),
            }
        return state


class Heartbeat:
    """What a rank does to show that it lives; without a record nothing."""

    def __init__(self, record: Record | None = None) -> None:
        self.record = record
        self._slots: dict[str, int] = {}
        self._names: dict[str, int] = {}

    def beat(self, step: int | None = None) -> None:
        """A sign of life; ``step``: as many updates are done."""
        if self.record is None:
            return
        words = self.record.words
        words[_BEATS] += 1
        if step is not None:
            words[_STEP] = step

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What the rank is doing until the end of the block; each phase has its limit."""
        number = PHASES.index(name)
        if self.record is None:
            yield
            return
        words = self.record.words
        before, words[_PHASE] = words[_PHASE], number
        words[_BEATS] += 1
        try:
            yield
        finally:
            words[_PHASE] = before
            words[_BEATS] += 1

    def settings(self, values: Mapping[str, Any]) -> None:
        """What the guard has to know of the configuration, once it has been read."""
        if self.record is not None:
            self.record.add(settings=dict(values))

    # What the ledger of collectives tells.

    def group(self, key: str, name: str, ranks: list[int]) -> int | None:
        """The slot of a group of ranks; None where none is left.  ``key``: the same on all of them."""
        if self.record is None:
            return None
        if key not in self._slots:
            slot = len(self._slots)
            said = _range(ranks)
            if slot == _SLOTS or not self.record.add(group={"key": key, "name": name, "ranks": said}):
                return None
            self._slots[key] = slot
        return self._slots[key]

    def name(self, name: str) -> int | None:
        """The number of a name; None where there is no room for it."""
        if self.record is None:
            return None
        if name not in self._names:
            number = len(self._names)
            if not self.record.add(name=name):
                return None
            self._names[name] = number
        return self._names[name]

    def begun(self, slot: int, number: int, name: int, elements: int) -> None:
        """The rank has begun the collective of this number (from 1) in a group, and has not waited for it yet."""
        assert self.record is not None
        words = self.record.words
        words[_WAITING] = 0
        words[_SLOT], words[_NUMBER], words[_NAME], words[_ELEMENTS] = slot, number, name, elements
        words[_SINCE] = time.monotonic_ns()
        words[_FIRST_SLOT + 2 * slot] = number
        words[_BEATS] += 1

    def waits(self, slot: int, number: int, name: int, elements: int) -> None:
        """The rank waits for it."""
        assert self.record is not None
        words = self.record.words
        words[_SLOT], words[_NUMBER], words[_NAME], words[_ELEMENTS] = slot, number, name, elements
        words[_SINCE] = time.monotonic_ns()
        words[_WAITING] = 1

    def ended(self, slot: int, number: int) -> None:
        """And has not to wait any more."""
        assert self.record is not None
        words = self.record.words
        words[_WAITING] = 0
        words[_FIRST_SLOT + 2 * slot + 1] = number
        words[_BEATS] += 1


def _range(ranks: list[int]) -> list[int] | dict[str, int]:
    """Short where the ranks lie at equal distances."""
    step = ranks[1] - ranks[0] if len(ranks) > 2 else 0
    if step > 0 and ranks == list(range(ranks[0], ranks[-1] + 1, step)):
        return {"first": ranks[0], "last": ranks[-1], "step": step}
    return ranks


def ranks_of(said: list[int] | dict[str, int]) -> list[int]:
    """The ranks of a group, as a record's state says them."""
    return list(range(said["first"], said["last"] + 1, said["step"])) if isinstance(said, dict) else said


_current = Heartbeat()


def use(heartbeat: Heartbeat) -> None:
    """From now on this is the process's one."""
    global _current
    _current = heartbeat


def current() -> Heartbeat:
    """This process's: one without a record where it has no guard."""
    return _current
