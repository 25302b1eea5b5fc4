"""What a run needs before its first step: data, model, engine, and where it continues from."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from ..parallel.engine import Engine
from ..parallel.loss_scale import LossScale
from ..parallel.mesh import Mesh
from ..parallel.sharding import initialize
from . import checkpoint as ckpt
from .batch import Batch, microbatches
from .config import Config
from .data.loader import Loader
from .data.store import MANIFEST as DATA_MANIFEST
from .data.store import TokenStore
from .data.tokenizer import Vocabulary
from .files import write_text
from .losses import Counts, LossFunction
from .models import architecture
from .models.base import Stage
from .objectives import Objective, make_objective
from .optimizers import optimizer_factory
from .schedule import BatchSizes
from .watch import Watch

VALIDATION_SEED = 0  # the same rows and masks at every evaluation of every run


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins: after ``step`` updates, from ``reader``'s checkpoint (None: from initial values)."""

    step: int
    reader: ckpt.Reader | None
    resumes: bool  # False where only the weights are taken


def with_tokenizer(config: Config) -> tuple[Config, Vocabulary]:
    """The configuration with the vocabulary of its data filled in."""
    vocabulary = Vocabulary.from_folder(tokenizer_folder(config))
    resolved = config.with_vocabulary(vocabulary.size, vocabulary.pad_id, vocabulary.cls_id, vocabulary.sep_id)
    return resolved, vocabulary


def tokenizer_folder(config: Config) -> Path:
    return Path(config.data.folder) / "tokenizer"


def objective_of(config: Config, vocabulary: Vocabulary, split: str) -> Objective:
    """What is predicted, on one split."""
    return make_objective(
        config.objective.name,
        store=TokenStore(config.data.folder, split),
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
        engine.load_optimizer_state(start.reader.optimizer(mesh.rank))
        engine.loss_scale.load_state(start.reader.manifest.trainer["loss_scale"])
    return engine


def microbatches_of(config: Config, mesh: Mesh, batch: Batch) -> tuple[list[Batch], tuple[int, int]]:
    """A data rank's part of a global batch as its stages compute it, without padding, and the shape of the largest."""
    # Matrix products like multiples of 8, and sequence parallelism splits the tokens.
    multiple = 8 * (mesh.tensor.size if mesh.sequence_parallel else 1)
    rows = config.training.micro_batch_size
    return microbatches(batch, rows, multiple=multiple, equal=mesh.pipeline.size > 1)


def flops_of(config: Config, counts: Counts) -> float:
    """Floating-point operations of a training step on these rows: those of real tokens."""
    model, tokens, predictions = config.model, counts.tokens / counts.rows, counts.predictions / counts.rows
    return counts.rows * architecture(model.model_type).flops_per_row(model, tokens, predictions)


def watch_of(config: Config, start: Start) -> Watch:
    """What looks out for skipped steps and spikes, as far as an earlier process had come."""
    watch = Watch(config.logging.spike_factor, config.logging.spike_window)
    if start.resumes:
        assert start.reader is not None
        watch.load_state(start.reader.manifest.trainer["watch"])
    return watch


# Where a run continues.


def find_start(config: Config, mesh: Mesh, resume: str) -> Start:
    """``resume``: "auto" (the run folder's latest checkpoint if there is one), "never" or a checkpoint's path.

    ValueError where a checkpoint was saved under another layout, or with data, model or seed that differ: the run would
    not continue but become another one.
    """
    root = checkpoints_folder(config)
    newest = ckpt.latest(root)
    if resume == "never" and newest is not None:
        raise ValueError(f"{root} already has checkpoints: set another run_dir, or leave out --resume never")
    folder = newest if resume in ("auto", "never") else ckpt.find(Path(resume))
    if folder is not None:
        reader = ckpt.Reader(folder)
        _check_continues(config, mesh, reader)
        return Start(reader.manifest.step, reader, resumes=True)
    if config.checkpoint.initialize_from is not None:
        reader = ckpt.Reader(ckpt.find(Path(config.checkpoint.initialize_from)))
        return Start(0, reader, resumes=False)
    return Start(0, None, resumes=False)


def checkpoints_folder(config: Config) -> Path:
    return Path(config.run_dir) / "checkpoints"


def layout_of(config: Config, mesh: Mesh) -> dict[str, int]:
    """What an optimizer's partitions depend on."""
    partitioned = mesh.data.size > 1 or config.parallel.offload_optimizer
    return {
        "tensor": mesh.tensor.size,
        "pipeline": mesh.pipeline.size,
        "virtual_stages": mesh.virtual_stages,
        "data": mesh.data.size,
        "zero_stage": config.parallel.zero_stage if partitioned else 0,
    }


def data_fingerprint(config: Config) -> str:
    """Of the prepared dataset's manifest: the same tokens in the same order."""
    content = (Path(config.data.folder) / DATA_MANIFEST).read_bytes()
    return hashlib.sha256(content).hexdigest()


def _check_continues(config: Config, mesh: Mesh, reader: ckpt.Reader) -> None:
    manifest, folder = reader.manifest, reader.folder
    if not manifest.layout:
        raise ValueError(
            f"{folder} has weights but no optimizer state: set checkpoint.initialize_from to start from it"
        )
    layout = layout_of(config, mesh)
    if manifest.layout != layout:
        raise ValueError(
            f"{folder} was saved with {_words(manifest.layout)} and cannot continue with {_words(layout)}: start the "
            "same layout, or set checkpoint.initialize_from (weights only) and another run_dir"
        )
    then, now = manifest.config, config.model_dump()
    keys = [("model", None), ("objective", None), ("data", "sequence_length"), ("data", "rows")]
    keys += [("training", key) for key in ("seed", "global_batch_size", "batch_ramp", "dtype")]
    keys += [("optimizer", "name")]
    for section, key in keys:
        old, new = (c[section] if key is None else c[section][key] for c in (then, now))
        if old != new:
            name = section if key is None else f"{section}.{key}"
            if isinstance(new, dict):
                changed = next(k for k in new if old.get(k) != new[k])
                name, old, new = f"{section}.{changed}", old.get(changed), new[changed]
            raise ValueError(
                f"{folder} was saved with {name} {old!r}, now it is {new!r}: set it back, or set another run_dir"
            )
    if manifest.trainer["data"] != data_fingerprint(config):
        raise ValueError(f"{folder} was trained on other data than {config.data.folder} now holds: set another run_dir")
    if manifest.step > config.training.steps:
        raise ValueError(f"{folder} is past training.steps {config.training.steps}: raise it, or set another run_dir")


def _words(layout: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in layout.items())


def save_checkpoint(config: Config, mesh: Mesh, engine: Engine, watch: Watch, step: int) -> Path:
    """Save the state after ``step`` updates; collective.  OSError on every rank where it fails on one."""
    weights, entries = ckpt.local_slices(engine.whole_parameters(), mesh.tensor, ckpt.weights_file(mesh))
    manifest = ckpt.Manifest(
        step=step,
        model=config.model.model_dump(),
        heads=config.heads,
        tensors={},
        layout=layout_of(config, mesh),
        trainer={
            "data": data_fingerprint(config),
            "loss_scale": engine.loss_scale.state(),
            "watch": watch.state(),
        },
        config=config.model_dump(),
    )
    return ckpt.save(
        checkpoints_folder(config),
        manifest,
        mesh,
        weights=weights if mesh.data.first else {},
        entries=entries if mesh.data.first else {},
        optimizer=engine.optimizer_state(),
        tokenizer=tokenizer_folder(config),
        keep_last=config.checkpoint.keep_last,
    )


def write_config(config: Config) -> None:
    """Save the resolved configuration with the run."""
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", config.to_yaml())
