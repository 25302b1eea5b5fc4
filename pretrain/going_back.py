"""A rollback: the run goes back to the last good checkpoint, and leaves out the data of the spike.

Sources: Chowdhery et al., PaLM, arXiv 2204.02311, section 5.1 (restart about 100 steps before a spike, skip 200 to 500
batches around it); Zhang et al., OPT, arXiv 2205.01068, section 2.5.
"""

from __future__ import annotations

import datetime
import gc
from collections.abc import Sequence
from pathlib import Path

import torch

from ..parallel.mesh import Mesh
from . import checkpoint as ckpt
from . import heartbeat
from .config import Config
from .files import explain
from .metrics import MetricsWriter
from .resume import Start, checkpoints_folder, newest_whole
from .rollbacks import RECORDS, Rollback, add, is_undone, read, table
from .rounds import Rounds
from .saving import Saving
from .skips import Skip, skipping
from .watch import Watch


class WentBack(Exception):
    """A rollback is recorded: what resumes now, resumes before the spike.  ``asked_by``: what has asked the run to stop
    meanwhile, in words."""

    def __init__(self, asked_by: str | None) -> None:
        super().__init__("the run has gone back")
        self.asked_by = asked_by


class GoingBack:
    """Decides whether a run goes back, and records it.  ``past``: its rollbacks so far."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        start: Start,
        past: Sequence[Rollback],
        watch: Watch,
        saving: Saving,
        writer: MetricsWriter,
        rounds: Rounds,
    ) -> None:
        self.config, self.mesh, self.start, self.past, self.watch = config, mesh, start, past, watch
        self.saving, self.writer, self.rounds = saving, writer, rounds
        if past:
            writer.rollbacks(len(past), table(past))

    def check(self, done: int) -> None:
        """Go back where the steps up to ``done`` ask for it; collective.

        Raises ``WentBack`` once that is recorded.  ValueError where the run has gone back too often.  Where nothing is
        there to go back to, or it cannot be recorded, that is said, and the run goes on.
        """
        watch = self.watch
        if self.config.spikes.action != "rollback":
            return
        limit = self.config.training.max_skipped_steps
        if watch.gives_up(limit):
            first, reason = watch.first_skipped, f"{watch.skipped_in_a_row} steps in a row are not finite"
        elif watch.in_a_spike:
            first, reason = watch.first, f"{watch.out_of_line} steps in a row are out of line with those before them"
        else:
            return
        with heartbeat.current().phase("saving"):
            self._go_back(done, first, reason)

    def _go_back(self, done: int, first: int, reason: str) -> None:
        spikes = self.config.spikes
        self.saving.wait()
        if len(self.past) >= spikes.max_rollbacks:
            raise ValueError(
                f"step {done}: {reason}, and the run has gone back {len(self.past)} times (spikes.max_rollbacks); its "
                f"checkpoints are untouched: look at {RECORDS}, lower optimizer.lr, raise max_rollbacks, or set "
                "spikes.action to log"
            )
        target = self._target(first)
        if target is None:
            self._cannot(done, reason, f"no whole checkpoint is left from before step {first}")
            return
        rollback = self._rollback(done, first, reason, target)
        problem = None
        if self.mesh.is_writer:
            try:
                self.saving.confirm()
                self.writer.sync()
                add(self.config.run_dir, rollback)
            except OSError as error:  # perhaps after the line was there
                problem = None if len(read(self.config.run_dir)) > len(self.past) else explain(error)
        if (problem := self.mesh.first_problem(problem)) is not None:
            self._cannot(done, reason, f"it cannot be recorded ({problem})")
            return
        self.writer.message(self._words(rollback))
        raise WentBack(self.rounds.asked_by())

    def _target(self, first: int) -> int | None:
        """The step of the checkpoint to go back to, 0 for initial values, None where there is nothing: the newest from
        before all data that are to be left out, else the oldest from before the spike."""
        root = checkpoints_folder(self.config)
        folders = self.mesh.tell(lambda: [f for f in ckpt.candidates(root) if not is_undone(f, self.past)])
        begin = first - self.config.spikes.skip_before
        before = sorted((f for f in folders if ckpt.step_of(f) < begin), key=ckpt.step_of, reverse=True)
        within = sorted((f for f in folders if begin <= ckpt.step_of(f) < first), key=ckpt.step_of)
        reader, _ = newest_whole([*before, *within], self.mesh)
        if reader is not None:
            return reader.manifest.step
        # Initial values are no further back than a checkpoint would be, where there was none yet.
        began_before = 0 < self.start.step < first
        return 0 if first <= self.config.checkpoint.interval and not began_before else None

    def _rollback(self, done: int, first: int, reason: str, target: int) -> Rollback:
        spikes, sizes = self.config.spikes, self.config.batch_sizes
        begin = max(first - spikes.skip_before, target + 1)
        skips = skipping(sizes, begin, done + spikes.skip_after)
        first_sample = sizes.samples_of(begin - 1).start
        samples = sizes.samples_of(done + spikes.skip_after).start - first_sample
        return Rollback(
            rollback=len(self.past) + 1,
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            step=done,
            first_step=first,
            reason=reason,
            checkpoint_step=target,
            skip=Skip(begin, samples),
            first_sample=first_sample,
            skips_before=self.config.data.skips,
            skips=skips,
            losses=tuple(self.watch.losses),
            gradient_norms=tuple(self.watch.norms),
        )

    def _words(self, rollback: Rollback) -> str:
        origin = f"step {rollback.checkpoint_step}" if rollback.checkpoint_step else "the initial values"
        last = rollback.first_sample + rollback.skip.samples - 1
        return (
            f"step {rollback.step}: {rollback.reason}, from step {rollback.first_step} on; back to {origin}, samples "
            f"{rollback.first_sample} to {last} are left out from step {rollback.skip.step} on (rollback "
            f"{rollback.rollback} of at most {self.config.spikes.max_rollbacks}: "
            f"{Path(self.config.run_dir) / RECORDS})"
        )

    def _cannot(self, done: int, reason: str, why: str) -> None:
        self.writer.message(f"step {done}: {reason}; no rollback, {why}: the run goes on")
        self.watch.dismiss()


def free_memory() -> None:
    """Of an engine that nothing refers to any more but itself."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
