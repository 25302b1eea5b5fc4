"""The training loop."""

from __future__ import annotations

import functools
import math
import os
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.dropout import DropoutKey
from ..parallel.mesh import Mesh, local_device
from . import run
from .batch import Batch
from .config import Config, check_world
from .losses import Counts, Losses, LossFunction
from .metrics import (
    MetricsWriter,
    SpikeMetrics,
    StepMetrics,
    ValidationMetrics,
    model_flops_utilization,
    peak_flops_per_second,
)
from .models.base import Recompute
from .objectives import Objective
from .resume import Start, find_start, layout_of, save_checkpoint
from .schedule import BatchSizes, learning_rate
from .watch import Watch


def train(config: Config, *, resume: str = "auto", stop_after: int | None = None) -> None:
    """Train as the configuration says; called on every rank, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.

    ``resume``: "auto" continues from the run folder's latest checkpoint if it has one, "never" refuses to, a path
    continues from that checkpoint.  ``stop_after``: save and stop once so many steps of the run are done, as if
    interrupted (the schedule still ends at ``training.steps``).  ValueError in one line for what does not fit together.
    """
    device = local_device(int(os.environ.get("LOCAL_RANK", "0")))
    check_world(config, int(os.environ["WORLD_SIZE"]), device)
    config, vocabulary = run.with_tokenizer(config)
    objective = run.objective_of(config, vocabulary, "train")
    parallel = config.parallel
    mesh = Mesh.create(
        parallel.tensor,
        parallel.pipeline,
        device=device,
        sequence_parallel=parallel.sequence,
        virtual_stages=parallel.virtual_stages,
        timeout_seconds=config.training.timeout_seconds,
    )
    try:
        start = find_start(config, mesh, resume)
        last = config.training.steps if stop_after is None else min(stop_after, config.training.steps)
        _train(config, mesh, Evaluation(config, mesh, vocabulary), objective, start, last)
    finally:
        mesh.destroy()


def _train(config: Config, mesh: Mesh, evaluation: Evaluation, objective: Objective, start: Start, last: int) -> None:
    loss_function = LossFunction(config.heads)
    engine, watch = run.build_engine(config, mesh, start, loss_function), run.watch_of(config, start)
    training, schedule, save = config.training, config.schedule, config.checkpoint
    flops = functools.partial(run.flops_of, config)
    if mesh.is_writer:
        run.write_config(config)
    sizes = training.batch_sizes
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
    with writer, loader:
        writer.message(_greeting(config, mesh, start))
        for step in range(start.step, last):
            began = time.perf_counter()
            batch = loader.batch(step)
            waited = time.perf_counter() - began
            counts = Counts.of(batch, mesh)
            rate = learning_rate(
                step,
                peak=config.optimizer.lr,
                total_steps=training.steps,
                warmup_steps=schedule.warmup_steps,
                name=schedule.name,
                minimum_ratio=schedule.minimum_ratio,
                decay_steps=schedule.decay_steps,
            )
            result = engine.train_batch(
                *run.microbatches_of(config, mesh, batch),
                stage_runner(mesh, dropout=(training.seed, step), recompute=training.recompute),
                functools.partial(loss_function, counts=counts),
                learning_rate=rate,
            )
            losses = loss_function.means(result.statistics, counts)
            trouble = watch.see(result.gradient_norm)
            seconds = time.perf_counter() - began
            done = step + 1
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
                    model_flops_utilization=_utilization(flops(counts) / seconds, mesh),
                    peak_memory_bytes=_peak_memory(mesh),
                    loss_scale=result.loss_scale if training.dtype == "float16" else None,
                    skipped_steps=watch.skipped,
                    parts=losses.parts,
                )
            )
            if trouble is not None:
                samples = sizes.samples_of(step)
                worst = largest(dict(zip(samples, engine.gather_rows(result, len(samples)), strict=True)))
                writer.spike(SpikeMetrics(done, trouble, losses.loss, result.gradient_norm, samples, worst))
                _require_progress(watch, training.max_skipped_steps, done)
            if evaluation.due(done):
                evaluation(engine, writer, done)
            if done == last or (save.interval and done % save.interval == 0):
                writer.sync()
                writer.message(f"saved {save_checkpoint(config, mesh, engine, watch, done)}")


class Evaluation:
    """Loss and accuracy on the validation split: the same rows and masks every time."""

    def __init__(self, config: Config, mesh: Mesh, vocabulary: Any) -> None:
        self.config, self.mesh = config, mesh
        self.loss_function = LossFunction(config.heads)
        self.objective = run.objective_of(config, vocabulary, "validation") if config.evaluation.interval else None

    def due(self, done: int) -> bool:
        interval = self.config.evaluation.interval
        return interval > 0 and (done % interval == 0 or done == self.config.training.steps)

    def __call__(self, engine: Any, writer: MetricsWriter, done: int) -> None:
        losses = self.measure(engine)
        parts = dict(losses.parts)
        if losses.sentence_accuracy is not None:
            parts["sentence_accuracy"] = losses.sentence_accuracy
        writer.validation(ValidationMetrics(done, losses.loss, losses.lm_accuracy, parts))

    def measure(self, engine: Any) -> Losses:
        """Global means over ``evaluation.rows`` rows; collective."""
        assert self.objective is not None, "evaluation.interval is 0"
        loader = run.loader_of(self.objective, self.mesh, BatchSizes(self.config.evaluation.rows), prefetch=0)
        batch = loader.make(0)
        counts = Counts.of(batch, self.mesh)
        sums = engine.eval_batch(
            *run.microbatches_of(self.config, self.mesh, batch),
            stage_runner(self.mesh, dropout=None),
            functools.partial(self.loss_function, counts=counts),
        )
        return self.loss_function.means(sums, counts)


def stage_runner(mesh: Mesh, *, dropout: tuple[int, int] | None, recompute: Recompute = "none") -> Callable[..., Any]:
    """How the engine runs a chunk of its stage on a microbatch.

    ``dropout``: the (seed, step) that its masks are keyed by; None in evaluation, where correct guesses are counted.
    """

    def run_stage(module: Callable[..., Any], batch: Batch, received: Tensor | None, chunk: int) -> Any:
        batch = batch.to(mesh.device)
        key = None if dropout is None else DropoutKey(*dropout, batch.token_samples.t())
        return module(batch, received, chunk=chunk, dropout=key, recompute=recompute, count_correct=dropout is None)

    return run_stage


def _greeting(config: Config, mesh: Mesh, start: Start) -> str:
    if start.step >= config.training.steps and start.reader is not None:
        return f"{start.reader.folder} has all {config.training.steps} steps: raise training.steps to go on"
    begins = "from initial values" if start.reader is None else f"from {start.reader.folder}"
    return (
        f"{config.model.model_type}, {config.objective.name}, {config.training.dtype}, {mesh.describe()}, "
        f"ZeRO {layout_of(config, mesh)['zero_stage']} on {mesh.device.type}: steps {start.step + 1} to "
        f"{config.training.steps} {begins}"
    )


def largest(losses: dict[int, float], count: int = 8) -> dict[int, float]:
    """The rows with the largest losses, those that are not finite first."""
    order = sorted(losses, key=lambda row: losses[row] if math.isfinite(losses[row]) else math.inf, reverse=True)
    return {row: losses[row] for row in order[:count]}


def _require_progress(watch: Watch, limit: int, step: int) -> None:
    if watch.skipped_in_a_row >= limit:
        raise ValueError(
            f"step {step} is the {watch.skipped_in_a_row}th in a row whose loss or gradient is not finite "
            "(training.max_skipped_steps): nothing was saved since the last checkpoint; look at spikes.jsonl, lower "
            "optimizer.lr, lengthen schedule.warmup_steps, or use bfloat16 or float32"
        )


def _utilization(flops_per_second: float, mesh: Mesh) -> float | None:
    name = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else None
    return model_flops_utilization(flops_per_second / mesh.size, peak_flops_per_second(name))


def _peak_memory(mesh: Mesh) -> int:
    """The largest over the ranks: of the device, or of the process where there is no GPU."""
    if mesh.device.type == "cuda":
        local = torch.cuda.max_memory_allocated(mesh.device)
    else:
        local = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.tensor([local], dtype=torch.int64, device=mesh.device)
    if mesh.size > 1:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return int(peak.item())
