"""The training loop."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

from ..parallel.mesh import Mesh
from . import heartbeat, run
from .company import Company
from .config import Config
from .evaluation import Evaluation
from .going_back import GoingBack, WentBack, free_memory
from .hardware import peak_memory, utilization
from .losses import Counts, LossFunction
from .metrics import MetricsWriter, SpikeMetrics, StepMetrics
from .objectives import Objective
from .resume import Start, changes_since, describe_layout, find_start, layout_of
from .rollbacks import Rollback, read, with_skips
from .rounds import Rounds
from .saving import Saving
from .watch import largest


def train(config: Config, *, resume: str = "auto", stop_after: int | None = None) -> str | None:
    """Train as the configuration says; called on every rank, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.

    ``resume``: "auto" continues from the run folder's latest checkpoint if it has one, "never" refuses to, a path
    continues from that checkpoint.  ``stop_after``: save and stop once so many steps of the run are done, as if
    interrupted (the schedule still ends at ``training.steps``).  Returns what has asked the run to stop before that, in
    words (it was saved then); None where nothing did.  ValueError in one line for what does not fit together.
    """
    config, vocabulary = run.with_tokenizer(config)
    last = config.training.steps if stop_after is None else min(stop_after, config.training.steps)
    with Company.of(config) as company:
        mesh = company.mesh
        objective = mesh.alike(lambda: run.objective_of(config, vocabulary, "train", mesh))
        evaluation = mesh.alike(lambda: Evaluation(config, mesh, vocabulary))
        while True:
            rollbacks = mesh.tell(functools.partial(read, config.run_dir))
            config = with_skips(config, rollbacks)
            start = find_start(config, mesh, resume, rollbacks)
            try:
                return _train(config, company, evaluation, objective, start, last, rollbacks)
            except WentBack as back:
                if back.asked_by is not None:
                    return back.asked_by
            resume = "auto"
            free_memory()


def _train(
    config: Config,
    company: Company,
    evaluation: Evaluation,
    objective: Objective,
    start: Start,
    last: int,
    rollbacks: Sequence[Rollback],
) -> str | None:
    mesh, ledger, lease = company.mesh, company.ledger, company.lease
    loss_function, kernels = LossFunction(config.heads), run.prepare_kernels(config, mesh)
    engine, watch = run.build_engine(config, mesh, start, loss_function), run.watch_of(config, start)
    training = config.training
    if mesh.is_writer:
        run.write_config(config)
    sizes = config.batch_sizes
    loader = run.loader_of(objective, mesh, sizes, prefetch=config.data.prefetch_steps)
    writer = MetricsWriter(
        config.run_dir,
        is_writer=mesh.is_writer,
        total_steps=training.steps,
        resumed_step=start.step,
        tensorboard=config.logging.tensorboard,
        config_text=config.to_yaml(),
        console_interval=config.logging.interval,
    )
    confirm = None if lease is None else lease.confirm
    saving = Saving(config, mesh, engine, watch, writer, confirm, rollbacks=len(rollbacks))
    alive, asked_by = heartbeat.current(), None
    with writer, loader, Rounds(config, mesh, lease, writer) as rounds, alive.phase("training"):
        going_back = GoingBack(config, mesh, start, rollbacks, watch, saving, writer, rounds)
        for damage in start.passed_over:
            writer.message(f"not taken: {damage}")
        writer.message(_greeting(config, mesh, start))
        if mesh.is_writer and (changed := changes_since(start, config)):
            writer.message(f"changed since that was saved: {', '.join(changed)}")
        writer.message(kernels)
        if not objective.rows.store.checked:
            writer.message(f"{config.data.folder} was prepared without checksums: damage to its tokens goes unseen")
        going_back.check(start.step)
        for step in range(start.step, last):
            alive.beat(step)
            ledger.waited()  # between steps
            began = time.perf_counter()
            batch, samples = loader.batch(step), sizes.samples_of(step)
            waited = time.perf_counter() - began
            counts = Counts.of(batch, mesh)
            rate = run.learning_rate_of(config, step)
            result = engine.train_batch(
                *run.microbatches_of(config, mesh, batch, len(samples)),
                run.stage_runner(mesh, dropout=(training.seed, step), recompute=training.recompute),
                functools.partial(loss_function, counts=counts),
                learning_rate=rate,
            )
            losses = loss_function.means(result.statistics, counts)
            done = step + 1
            trouble = watch.see(done, losses.loss, result.gradient_norm)
            seconds = time.perf_counter() - began
            busy = seconds - ledger.waited()
            writer.train(
                StepMetrics(
                    step=done,
                    loss=losses.loss,
                    grad_norm=result.gradient_norm,
                    lr=rate,
                    tokens=int(counts.tokens),
                    tokens_per_second=counts.tokens / seconds,
                    step_seconds=seconds,
                    data_wait_seconds=waited,
                    model_flops_utilization=utilization(run.flops_of(config, counts) / seconds, mesh),
                    peak_memory_bytes=peak_memory(mesh),
                    loss_scale=result.loss_scale if training.dtype == "float16" else None,
                    skipped_steps=watch.skipped,
                    parts=losses.parts,
                )
            )
            if trouble is not None:
                worst = largest(dict(zip(samples, engine.gather_rows(result, len(samples)), strict=True)))
                writer.spike(SpikeMetrics(done, trouble, losses.loss, result.gradient_norm, samples, worst))
                going_back.check(done)
                if watch.gives_up(training.max_skipped_steps):
                    saving.finish()
                    raise ValueError(watch.last_words(done))
            metrics = {"loss": losses.loss}
            if evaluation.due(done):
                with alive.phase("evaluating"):
                    metrics["validation_loss"] = evaluation(engine, writer, done)
            saving.poll()
            if done < last:
                asked_by = rounds.after(done, busy)
            if asked_by is not None or saving.due(done, last):
                with alive.phase("saving"):
                    saving.save(done, metrics)
            if asked_by is not None:
                writer.message(f"asked to stop ({asked_by}): saving after step {done}; the same command goes on")
                break
        with alive.phase("saving"):
            saving.finish()
    return asked_by


def _greeting(config: Config, mesh: Mesh, start: Start) -> str:
    if start.step >= config.training.steps and start.reader is not None:
        return f"{start.reader.folder} has all {config.training.steps} steps: raise training.steps to go on"
    begins = "from initial values"
    if start.reader is not None:
        begins, then = f"from {start.reader.folder}", start.reader.manifest.layout
        if start.resumes and then != layout_of(config, mesh):
            begins += f" (saved with {describe_layout(then)})"
    return (
        f"{config.model.model_type}, {config.objective.name}, {config.training.dtype}, {mesh.describe()}, "
        f"ZeRO {layout_of(config, mesh)['zero_stage']} on {mesh.device.type}: steps {start.step + 1} to "
        f"{config.training.steps} {begins}"
    )
