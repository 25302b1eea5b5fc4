"""Evaluation on the validation split, between steps of training."""

from __future__ import annotations

import functools

from ..parallel.engine import Engine
from ..parallel.mesh import Mesh
from . import run
from .config import Config
from .data.tokenizer import Vocabulary
from .losses import Counts, Losses, LossFunction
from .metrics import MetricsWriter, ValidationMetrics
from .schedule import BatchSizes


class Evaluation:
    """Loss and accuracy on the validation split: the same rows and masks every time."""

    def __init__(self, config: Config, mesh: Mesh, vocabulary: Vocabulary) -> None:
        self.config, self.mesh = config, mesh
        self.loss_function = LossFunction(config.heads)
        self.objective = None
        if config.evaluation.interval:
            self.objective = run.objective_of(config, vocabulary, "validation", mesh)

    def due(self, done: int) -> bool:
        interval = self.config.evaluation.interval
        return interval > 0 and (done % interval == 0 or done == self.config.training.steps)

    def __call__(self, engine: Engine, writer: MetricsWriter, done: int) -> float:
        """Measure and report; the loss."""
        losses = self.measure(engine)
        parts = dict(losses.parts)
        if losses.sentence_accuracy is not None:
            parts["sentence_accuracy"] = losses.sentence_accuracy
        writer.validation(ValidationMetrics(done, losses.loss, losses.lm_accuracy, parts))
        return losses.loss

    def measure(self, engine: Engine) -> Losses:
        """Global means over ``evaluation.rows`` rows; collective."""
        assert self.objective is not None, "evaluation.interval is 0"
        rows = self.config.evaluation.rows
        loader = run.loader_of(self.objective, self.mesh, BatchSizes(rows), prefetch=0)
        batch = loader.make(0)
        counts = Counts.of(batch, self.mesh)
        sums = engine.eval_batch(
            *run.microbatches_of(self.config, self.mesh, batch, rows),
            run.stage_runner(self.mesh, dropout=None),
            functools.partial(self.loss_function, counts=counts),
        )
        return self.loss_function.means(sums, counts)
