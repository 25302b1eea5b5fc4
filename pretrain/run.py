"""What a run is made of, from its configuration: mesh, data, model, engine."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..kernels import forms
from ..kernels.dropout import DropoutKey
from ..parallel.engine import Engine
from ..parallel.loss_scale import LossScale
from ..parallel.mesh import Mesh, local_device
from ..parallel.sharding import initialize
from . import checkpoint as ckpt
from . import heartbeat
from .batch import Batch, microbatch_count, microbatches
from .config import Config, check_world
from .data.loader import Loader
from .data.store import TokenStore, read_manifest
from .data.tokenizer import Vocabulary
from .files import parents_of, write_text
from .losses import Counts, LossFunction
from .models import architecture
from .models.base import Recompute, Stage
from .objectives import Objective, make_objective
from .optimizers import optimizer_factory
from .resume import Start, checkpoints_folder
from .schedule import BatchSizes, learning_rate
from .watch import Watch

VALIDATION_SEED = 0  # the same rows and masks at every evaluation of every run


def mesh_of(config: Config) -> Mesh:
    """The ranks as the configuration arranges them, on this rank's device; collective.  ValueError where they do not
    fit it."""
    device = local_device(int(os.environ.get("LOCAL_RANK", "0")))
    check_world(config, int(os.environ["WORLD_SIZE"]), device)
    parallel = config.parallel
    return Mesh.create(
        parallel.tensor,
        parallel.pipeline,
        device=device,
        sequence_parallel=parallel.sequence,
        virtual_stages=parallel.virtual_stages,
        timeout_seconds=config.training.timeout_seconds,
    )


def with_tokenizer(config: Config) -> tuple[Config, Vocabulary]:
    """The configuration with the vocabulary of its data filled in."""
    read_manifest(config.data.folder)  # what is wrong with the folder comes before what is wrong in it
    vocabulary = Vocabulary.from_folder(tokenizer_folder(config))
    resolved = config.with_vocabulary(vocabulary.size, vocabulary.pad_id, vocabulary.cls_id, vocabulary.sep_id)
    return resolved, vocabulary


def tokenizer_folder(config: Config) -> Path:
    return Path(config.data.folder) / "tokenizer"


def objective_of(config: Config, vocabulary: Vocabulary, split: str, mesh: Mesh | None = None) -> Objective:
    """What is predicted, on one split, of whose shards each rank of the mesh looks at a share (None: at all)."""
    return make_objective(
        config.objective.name,
        store=TokenStore(config.data.folder, split, share=(0, 1) if mesh is None else (mesh.rank, mesh.size)),
        vocabulary=vocabulary,
        sequence_length=config.data.sequence_length,
        row_mode=config.data.rows,
        seed=config.training.seed if split == "train" else VALIDATION_SEED,
        probability=config.objective.probability,
        mask_fraction=config.objective.mask_fraction,
        random_fraction=config.objective.random_fraction,
    )


def loader_of(objective: Objective, mesh: Mesh, sizes: BatchSizes, *, prefetch: int) -> Loader:
    return Loader(
        objective,
        sizes,
        data_rank=mesh.data.rank,
        data_size=mesh.data.size,
        prefetch=prefetch,
        pin_memory=mesh.device.type == "cuda",
    )


def prepare_kernels(config: Config, mesh: Mesh) -> str:
    """Build or load what the model's operations run in, on every rank; a line that says it; collective.

    An operation has the same form on all ranks: what tensor ranks compute alike, such as gradients of norms, must be
    the same to the bit.  ValueError: one cannot be had, and the configuration requires it.
    """
    kernels, operations = config.kernels, architecture(config.model.model_type).operations
    forms.configure(kernels.mode, kernels.cache, kernels.build_timeout_seconds)
    for operation, chosen in forms.prepare(operations, mesh.device).items():
        lacking = mesh.first_problem(chosen.reason if chosen.library is None else None)
        if lacking is not None and chosen.library is not None:
            forms.forgo(operation, mesh.device, lacking)
    return forms.describe(operations, mesh.device)


def build_engine(config: Config, mesh: Mesh, start: Start, loss: LossFunction) -> Engine:
    """This rank's stage, filled from the seed or the checkpoint, in an engine."""
    stage = Stage.of(config.model, mesh.pipeline.rank, mesh.pipeline.size, mesh.virtual_stages)
    model = architecture(config.model.model_type)(config.model, mesh, stage=stage, heads=config.heads)
    if start.reader is None:
        initialize(model, config.training.seed, mesh.tensor)
    else:
        ckpt.load_weights(model, start.reader, mesh.tensor)
    training = config.training
    half = training.dtype == "float16"
    engine = Engine(
        model,
        mesh,
        optimizer_factory(config),
        tied=model.tied_word_parameter(),
        zero_stage=config.parallel.zero_stage,
        offload_optimizer=config.parallel.offload_optimizer,
        dtype=training.torch_dtype,
        clip=training.gradient_clipping,
        hidden_size=config.model.hidden_size,
        statistics=loss.statistics,
        loss_scale=LossScale(training.initial_loss_scale, training.loss_scale_window) if half else LossScale(),
    )
    if start.resumes:
        assert start.reader is not None
        engine.load_optimizer(start.reader)
        if scale := start.reader.manifest.trainer.get("loss_scale"):  # older checkpoints have none
            engine.loss_scale.load_state(scale)
    return engine


def learning_rate_of(config: Config, step: int) -> float:
    """What the schedule says for this step, counted from 0."""
    schedule = config.schedule
    return learning_rate(
        step,
        peak=config.optimizer.lr,
        total_steps=config.training.steps,
        warmup_steps=schedule.warmup_steps,
        name=schedule.name,
        minimum_ratio=schedule.minimum_ratio,
        decay_steps=schedule.decay_steps,
    )


def microbatches_of(config: Config, mesh: Mesh, batch: Batch, rows: int) -> tuple[list[Batch], tuple[int, int]]:
    """A data rank's part of a global batch of ``rows`` rows as its stages compute it, on the mesh's device and without
    padding, and the shape of the largest microbatch.  Every replica has as many of them."""
    # Matrix products like multiples of 8, and sequence parallelism splits the tokens.
    multiple = 8 * (mesh.tensor.size if mesh.sequence_parallel else 1)
    count = microbatch_count(
        rows,
        config.training.micro_batch_size,
        replicas=mesh.data.size,
        multiple=mesh.pipeline.size if mesh.virtual_stages > 1 else 1,
    )
    parts, shape = microbatches(batch, count, multiple=multiple, equal=mesh.pipeline.size > 1)
    return [part.to(mesh.device) for part in parts], shape


def stage_runner(mesh: Mesh, *, dropout: tuple[int, int] | None, recompute: Recompute = "none") -> Callable[..., Any]:
    """How the engine runs a chunk of its stage on a microbatch.

    ``dropout``: the (seed, step) that its masks are keyed by; None in evaluation, where correct guesses are counted.
    """

    alive = heartbeat.current()

    def run_stage(module: Callable[..., Any], batch: Batch, received: Tensor | None, chunk: int) -> Any:
        alive.beat()
        key = None if dropout is None else DropoutKey(*dropout, batch.token_samples.t())
        return module(batch, received, chunk=chunk, dropout=key, recompute=recompute, count_correct=dropout is None)

    return run_stage


def flops_of(config: Config, counts: Counts) -> float:
    """Floating-point operations of a training step on these rows: those of real tokens."""
    model, tokens, predictions = config.model, counts.tokens / counts.rows, counts.predictions / counts.rows
    return counts.rows * architecture(model.model_type).flops_per_row(model, tokens, predictions)


def watch_of(config: Config, start: Start) -> Watch:
    """What looks out for skipped steps and spikes, as far as an earlier process had come."""
    spikes = config.spikes
    watch = Watch(spikes.gradient_norm_factor, spikes.loss_deviations, spikes.window, spikes.patience)
    if start.resumes:
        assert start.reader is not None
        if seen := start.reader.manifest.trainer.get("watch"):  # older checkpoints have none
            watch.load_state(seen)
    return watch


def write_config(config: Config) -> None:
    """Save the resolved configuration with the run.  OSError where the run cannot be written, its checkpoints included:
    now, and not after an hour."""
    path, root = Path(config.run_dir) / "config.yaml", checkpoints_folder(config)
    if root.is_dir() and not os.access(root, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(root))
    with parents_of(path):
        write_text(path, config.to_yaml())
