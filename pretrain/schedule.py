"""The learning rate and the batch size as functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import bisect
import dataclasses
import math
from typing import Literal, get_args

from .skips import Skip, skipped_before

ScheduleName = Literal["linear", "cosine", "wsd", "constant"]


def check_schedule(
    name: str,
    *,
    total_steps: int,
    warmup_steps: int,
    decay_steps: int | None = None,
    peak: float = 1.0,
    minimum_ratio: float = 0.0,
) -> None:
    """Raise a one-line ValueError where ``learning_rate`` could not follow these settings."""
    if name not in get_args(ScheduleName):
        raise ValueError(f"unknown learning-rate schedule {name!r}: choose one of {', '.join(get_args(ScheduleName))}")
    if not (math.isfinite(peak) and peak > 0):
        raise ValueError(f"the peak learning rate must be a positive number, not {peak}")
    if total_steps < 1:
        raise ValueError(f"the number of training steps must be at least 1, not {total_steps}")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"{warmup_steps} warm-up steps do not fit: set 0 to {total_steps}, the number of training steps"
        )
    if not 0 <= minimum_ratio <= 1:
        raise ValueError(f"the minimum learning rate is a ratio of the peak, from 0 to 1, not {minimum_ratio}")
    if decay_steps is None:
        if name == "wsd":
            raise ValueError("schedule wsd needs decay_steps, the length of its last phase (a tenth of all is usual)")
    elif name != "wsd":
        raise ValueError(f"decay_steps belongs to schedule wsd; schedule {name} takes none")
    elif decay_steps < 1:
        raise ValueError(f"decay_steps must be at least 1, not {decay_steps}")
    elif warmup_steps + decay_steps > total_steps:
        raise ValueError(
            f"{warmup_steps} warm-up steps and {decay_steps} decay steps exceed the {total_steps} training steps: "
            "shorten one of them"
        )


def learning_rate(
    step: int,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int,
    name: ScheduleName,
    minimum_ratio: float = 0.0,
    decay_steps: int | None = None,
) -> float:
    """The learning rate that update ``step`` uses; steps count from 0, the last is ``total_steps`` - 1.

    Warm-up rises linearly over the first ``warmup_steps`` updates, from ``peak / warmup_steps`` to ``peak``.  Then

    - ``constant`` stays at ``peak``;
    - ``linear`` falls on a line to ``minimum_ratio * peak``, which the last update uses;
    - ``cosine`` falls to the same value on half a cosine (Loshchilov and Hutter, arXiv 1608.03983, equation 5,
      without restarts);
    - ``wsd`` (warm-up, stable, decay; arXiv 2404.06395, section 4) stays at ``peak``, and falls on a line over the
      last ``decay_steps`` updates, the last of which uses ``minimum_ratio * peak``.

    Steps past the end keep the value of the last.  Raises ValueError as ``check_schedule`` does, and for a step
    below 0.
    """
    check_schedule(
        name,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        peak=peak,
        minimum_ratio=minimum_ratio,
    )
    if step < 0:
        raise ValueError(f"steps count from 0: there is no step {step}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if name == "constant":
        return peak
    last = total_steps - 1
    # The last step at the peak: the end of the warm-up, or the first step where there is none.
    start = last - decay_steps if decay_steps is not None else max(warmup_steps - 1, 0)
    progress = min(max((step - start) / max(last - start, 1), 0.0), 1.0)
    if name == "cosine":
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        remaining = 1.0 - progress
    return peak * (minimum_ratio + (1.0 - minimum_ratio) * remaining)


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """The rows of each global step: ``size``, or before it a ramp (as Megatron-LM's ``--rampup-batch-size``).

    The ramp begins with ``start`` rows and rises by ``increment`` until ``size``; all its sizes together see at least
    ``samples`` rows, in equal shares.  Steps count from 0, samples over the whole run.  ``skips``: what is left out of
    the stream of samples (``skips.py``).  ValueError where the increments do not lead from ``start`` to ``size``.
    """

    size: int
    start: int | None = None
    increment: int = 0
    samples: int = 0
    skips: tuple[Skip, ...] = ()
    sizes: tuple[int, ...] = dataclasses.field(init=False)  # every size that occurs, in order
    _first_steps: list[int] = dataclasses.field(init=False, repr=False)
    _first_samples: list[int] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        sizes, first_steps, first_samples = [], [0], [0]
        if self.start is not None:
            rise = self.size - self.start
            if self.increment < 1 or rise < 1 or rise % self.increment:
                raise ValueError(
                    f"a batch ramp from {self.start} by {self.increment} does not arrive at {self.size}: set start "
                    "below training.global_batch_size, and an increment that divides the difference"
                )
            sizes = list(range(self.start, self.size, self.increment))
            for number, rows in enumerate(sizes, 1):
                until = self.samples * number / len(sizes)
                steps = max(math.ceil((until - first_samples[-1]) / rows), 1)
                first_steps.append(first_steps[-1] + steps)
                first_samples.append(first_samples[-1] + steps * rows)
        object.__setattr__(self, "sizes", (*sizes, self.size))
        object.__setattr__(self, "_first_steps", first_steps)
        object.__setattr__(self, "_first_samples", first_samples)

    def samples_of(self, step: int) -> range:
        """The indices of the rows of a step."""
        place = bisect.bisect_right(self._first_steps, step) - 1
        first = self._first_samples[place] + (step - self._first_steps[place]) * self.sizes[place]
        first += skipped_before(self.skips, step + 1)
        return range(first, first + self.sizes[place])
