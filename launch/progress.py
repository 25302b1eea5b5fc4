"""How far a run has come, asked of its folder: what supervisors go by."""

from __future__ import annotations

import dataclasses

from ..pretrain.checkpoint.folders import latest, step_of
from ..pretrain.config import Config
from ..pretrain.resume import checkpoints_folder


@dataclasses.dataclass(frozen=True)
class Progress:
    """``step`` updates of ``steps`` are in a checkpoint."""

    step: int
    steps: int

    @property
    def done(self) -> bool:
        return self.step >= self.steps


def progress(config: Config) -> Progress:
    """Of the newest checkpoint that has a manifest; a resume may find it damaged and take the one before."""
    newest = latest(checkpoints_folder(config))
    return Progress(0 if newest is None else step_of(newest), config.training.steps)
