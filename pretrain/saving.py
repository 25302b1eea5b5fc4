"""What a run saves, when, and what it says of it."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..parallel.engine import Engine
from ..parallel.mesh import Mesh
from . import checkpoint as ckpt
from .config import Config
from .metrics import MetricsWriter, SaveMetrics
from .provenance import written_by
from .resume import checkpoints_folder, data_fingerprint, layout_of
from .run import tokenizer_folder
from .watch import Watch


class Saving:
    """Saves the state of a run at intervals and at its end; every method but ``confirm`` is collective.

    A save that fails is said and counted, and the run goes on: older checkpoints are untouched, and the next one is
    tried again.  Only the last one must not fail.  ``confirm``: as ``Saver`` has it.  ``rollbacks``: that the run has
    made so far.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        engine: Engine,
        watch: Watch,
        writer: MetricsWriter,
        confirm: Callable[[], None] | None = None,
        *,
        rollbacks: int = 0,
    ) -> None:
        self.config, self.mesh, self.engine, self.watch, self.writer = config, mesh, engine, watch, writer
        self.rollbacks = rollbacks
        settings = config.checkpoint
        retention = ckpt.Retention(
            settings.keep_last, settings.keep_every, settings.keep_best, reach=config.rollback_reach
        )
        root = checkpoints_folder(config)
        self.saver = ckpt.Saver(root, mesh, retention, asynchronous=settings.asynchronous, confirm=confirm)
        self.data, self.written_by = data_fingerprint(config), written_by() if mesh.is_writer else {}
        self.last_problem: str | None = None

    def due(self, done: int, last: int) -> bool:
        """Whether the state after update ``done`` is saved, in a process that ends with update ``last``."""
        interval = self.config.checkpoint.interval
        return done == last or (interval > 0 and done % interval == 0)

    def save(self, done: int, metrics: dict[str, float]) -> None:
        """Begin to save the state after ``done`` updates; ``metrics``: the losses at that step."""
        config, engine = self.config, self.engine
        manifest = ckpt.Manifest(
            step=done,
            model=config.model.model_dump(),
            heads=config.heads,
            layout=layout_of(config, self.mesh),
            trainer={
                "data": self.data,
                "loss_scale": engine.loss_scale.state(),
                "watch": self.watch.state(),
                "rollbacks": self.rollbacks,
            },
            metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
            config=config.model_dump(),
            written_by=self.written_by,
        )
        tokenizer = tokenizer_folder(config)
        # A resume counts on the metrics up to the checkpoint.
        for saved in self.saver.save(
            manifest, engine.pieces(), engine.optimizer_steps(), tokenizer, before=self.writer.sync
        ):
            self._report(saved)

    def poll(self) -> None:
        """Say how a save has ended, if it has; after every step."""
        if (saved := self.saver.poll()) is not None:
            self._report(saved)

    def confirm(self) -> None:
        """On the writer, before something is done that cannot be undone."""
        self.saver.confirm()

    def wait(self) -> None:
        """For a save that is under way, however it ends."""
        if (saved := self.saver.finish()) is not None:
            self._report(saved)

    def finish(self) -> None:
        """Wait for a save that is under way.  OSError where the last one has failed."""
        self.wait()
        if self.last_problem is not None:
            raise OSError(f"{self.last_problem}: the same command goes on from the latest")

    def _report(self, saved: ckpt.Saved) -> None:
        self.last_problem = None
        if saved.problem is not None:
            self.last_problem = (
                f"the checkpoint of step {saved.step} was not saved ({saved.problem}); older ones are untouched"
            )
            self.writer.message(f"{self.last_problem}; {self.saver.failed} failed so far, training goes on")
        else:
            self.writer.message(
                f"saved {saved.folder} ({saved.bytes / 1e6:,.1f} MB in {saved.seconds:.1f} s, "
                f"{saved.stall_seconds:.2f} s of them without training)"
            )
        if saved.warning is not None:
            self.writer.message(f"an older checkpoint cannot be removed ({saved.warning})")
        self.writer.saved(
            SaveMetrics(saved.step, saved.bytes, saved.seconds, saved.stall_seconds, self.saver.failed, saved.problem)
        )
