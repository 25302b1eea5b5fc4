"""What the training loop carries from step to step beside the engine: skipped steps, recent losses and norms."""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from typing import Any

# Of a normal distribution, the standard deviation is so many times the median absolute deviation.
DEVIATION = 1.4826
# Losses that are all the same deviate by nothing: what they are rounded by is no spike.
_ROUNDING = 2.0**-20


@dataclasses.dataclass
class Watch:
    """Notices steps that were skipped because they were not finite, and those out of line with the ``window`` before
    them: a gradient norm above ``gradient_norm_factor`` times its median, a loss more than ``loss_deviations`` robust
    standard deviations above its median (0: none is).  ``patience`` of these in a row, skipped ones apart, are a spike.

    Steps are counted from 1.  Every rank sees the same numbers and comes to the same conclusions.
    """

    gradient_norm_factor: float
    loss_deviations: float
    window: int
    patience: int
    skipped: int = 0
    skipped_in_a_row: int = 0
    out_of_line: int = 0  # steps in a row
    first: int = 0  # of these
    first_skipped: int = 0

    def __post_init__(self) -> None:
        self.norms: collections.deque[float] = collections.deque(maxlen=self.window)
        self.losses: collections.deque[float] = collections.deque(maxlen=self.window)

    def see(self, step: int, loss: float, gradient_norm: float) -> str | None:
        """Take note of a step; what is wrong with it, in words, if something is."""
        if not math.isfinite(gradient_norm):
            if not self.skipped_in_a_row:
                self.first_skipped = step
            self.skipped += 1
            self.skipped_in_a_row += 1
            return "its loss or gradient is not finite: skipped"
        self.skipped_in_a_row = 0
        said = [words for words in (self._of_norm(gradient_norm), self._of_loss(loss)) if words is not None]
        self.norms.append(gradient_norm)
        self.losses.append(loss)
        if not said:
            self.out_of_line = 0
            return None
        if not self.out_of_line:
            self.first = step
        self.out_of_line += 1
        return " and ".join(said)

    def _of_norm(self, norm: float) -> str | None:
        if not self.gradient_norm_factor or len(self.norms) < self.window:
            return None
        median = statistics.median(self.norms)
        if norm <= self.gradient_norm_factor * median:
            return None
        times = norm / median if median else math.inf
        return f"its gradient norm is {times:.1f} times the median of {self.window} steps"

    def _of_loss(self, loss: float) -> str | None:
        if not self.loss_deviations or len(self.losses) < self.window:
            return None
        median = statistics.median(self.losses)
        deviation = DEVIATION * statistics.median(abs(one - median) for one in self.losses)
        deviation = max(deviation, _ROUNDING * abs(median))
        if loss <= median + self.loss_deviations * deviation:
            return None
        many = (loss - median) / deviation if deviation else math.inf
        return f"its loss is {many:.1f} deviations above the median {median:.4f} of {self.window} steps"

    @property
    def in_a_spike(self) -> bool:
        return self.out_of_line >= self.patience

    def dismiss(self) -> None:
        """Nothing can be done about the spike: count anew."""
        self.out_of_line = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        counted = {name: getattr(self, name) for name in _COUNTED}
        return counted | {"norms": list(self.norms), "losses": list(self.losses)}

    def load_state(self, state: dict[str, Any]) -> None:
        for name in _COUNTED:  # older checkpoints have the first two, and no losses
            setattr(self, name, int(state.get(name, 0)))
        self.norms.extend(state["norms"])
        self.losses.extend(state.get("losses", []))

    def gives_up(self, limit: int) -> bool:
        """Whether ``limit`` steps in a row were skipped."""
        return self.skipped_in_a_row >= limit

    def last_words(self, step: int) -> str:
        """Why a run ends after ``step``, the last of so many that were skipped."""
        return (
            f"step {step} is number {self.skipped_in_a_row} in a row whose loss or gradient is not finite "
            "(training.max_skipped_steps): nothing was saved since the last checkpoint; look at spikes.jsonl, "
            "lower optimizer.lr, lengthen schedule.warmup_steps, or use bfloat16 or float32"
        )


_COUNTED = ("skipped", "skipped_in_a_row", "out_of_line", "first", "first_skipped")


def largest(losses: dict[int, float], count: int = 8) -> dict[int, float]:
    """The rows with the largest losses, those that are not finite first."""
    order = sorted(losses, key=lambda row: losses[row] if math.isfinite(losses[row]) else math.inf, reverse=True)
    return {row: losses[row] for row in order[:count]}
