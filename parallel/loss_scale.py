"""Dynamic loss scaling for float16 (arXiv 1710.03740, section 3.2).

The loss is multiplied by a scale before the backward pass, so that small gradients do not vanish, and the gradients are
divided by it before the update.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class LossScale:
    """The scale of the next step.  Without ``window`` it never changes (1 for float32 and bfloat16).

    A step whose gradients are not finite halves it; ``window`` finite steps in a row double it.  It stays within
    [1, 2^24]: beyond, float16 gradients of ordinary models overflow at every second trial.
    """

    value: float = 1.0
    window: int | None = None
    finite_steps: int = 0  # in a row, since the scale last changed

    LARGEST = 2.0**24

    def update(self, finite: bool) -> None:
        if self.window is None:
            return
        self.finite_steps = self.finite_steps + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.finite_steps == self.window:
            self.value, self.finite_steps = min(self.value * 2, self.LARGEST), 0

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"value": self.value, "finite_steps": self.finite_steps}

    def load_state(self, state: dict[str, float]) -> None:
        self.value, self.finite_steps = float(state["value"]), int(state["finite_steps"])
