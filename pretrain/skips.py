"""What is left out of the stream of samples: a function of the step, like all that decides what a step is trained on.

A skip (S, n) says: from step S on (counted from 1, as metrics count) the stream is n samples further.  Several add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .schedule import BatchSizes


class Skip(NamedTuple):
    """From ``step`` on the stream is ``samples`` further."""

    step: int
    samples: int


def skipped_before(skips: Iterable[Skip], step: int) -> int:
    """How many samples were left out before the first one of a step, counted from 1."""
    return sum(skip.samples for skip in skips if skip.step <= step)


def ordered(skips: Iterable[Skip], until: int | None = None) -> tuple[Skip, ...]:
    """What skips come to, those up to step ``until`` (None: all): one for each step, in order."""
    steps = sorted({skip.step for skip in skips if until is None or skip.step <= until})
    return tuple(Skip(step, sum(skip.samples for skip in skips if skip.step == step)) for step in steps)


def skipping(sizes: BatchSizes, first: int, last: int) -> tuple[Skip, ...]:
    """The skips with which step ``first`` gets what step ``last`` + 1 would get with those that ``sizes`` has; steps
    counted from 1.  What those leave out between the two stays left out, and so it does after them."""
    samples = sizes.samples_of(last).start - sizes.samples_of(first - 1).start
    samples += sum(skip.samples for skip in sizes.skips if skip.step == first)
    others = [skip for skip in sizes.skips if not first <= skip.step <= last + 1]
    return ordered([*others, Skip(first, samples)])


def described(skips: Sequence[Skip]) -> str:
    """As a configuration writes them."""
    return "[" + ", ".join(f"{{step: {step}, samples: {samples}}}" for step, samples in skips) + "]"
