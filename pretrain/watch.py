"""What the training loop carries from step to step beside the engine: skipped steps, and recent gradient norms."""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from typing import Any


@dataclasses.dataclass
class Watch:
    """Notices steps that were skipped because they were not finite, and gradient norms far above the recent median.

    ``spike_factor``: how many times the median counts as a spike (0: none does); ``spike_window``: how many updates the
    median is taken over.  Every rank sees the same numbers and comes to the same conclusions.
    """

    spike_factor: float
    spike_window: int
    skipped: int = 0
    skipped_in_a_row: int = 0

    def __post_init__(self) -> None:
        self.norms: collections.deque[float] = collections.deque(maxlen=self.spike_window)

    def see(self, gradient_norm: float) -> str | None:
        """Take note of a step; what is wrong with it, in words, if something is."""
        if not math.isfinite(gradient_norm):
            self.skipped += 1
            self.skipped_in_a_row += 1
            return "its loss or gradient is not finite: skipped"
        self.skipped_in_a_row = 0
        median = statistics.median(self.norms) if len(self.norms) == self.spike_window else math.inf
        self.norms.append(gradient_norm)
        if self.spike_factor and gradient_norm > self.spike_factor * median:
            return f"its gradient norm is {gradient_norm / median:.1f} times the median of {self.spike_window} steps"
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row, "norms": list(self.norms)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.skipped, self.skipped_in_a_row = int(state["skipped"]), int(state["skipped_in_a_row"])
        self.norms.extend(state["norms"])

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


def largest(losses: dict[int, float], count: int = 8) -> dict[int, float]:
    """The rows with the largest losses, those that are not finite first."""
    order = sorted(losses, key=lambda row: losses[row] if math.isfinite(losses[row]) else math.inf, reverse=True)
    return {row: losses[row] for row in order[:count]}
