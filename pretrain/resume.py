"""Where a run continues from, what it must have in common with what was saved, and what is saved."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import yaml

from ..parallel.engine import Engine
from ..parallel.mesh import Mesh
from . import checkpoint as ckpt
from .config import Config
from .data.store import MANIFEST as DATA_MANIFEST
from .metrics import read_metrics
from .watch import Watch


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins: after ``step`` updates, from ``reader``'s checkpoint (None: from initial values)."""

    step: int
    reader: ckpt.Reader | None
    resumes: bool  # False where only the weights are taken


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
    _check_folder(config)
    if config.checkpoint.initialize_from is not None:
        reader = ckpt.Reader(ckpt.find(Path(config.checkpoint.initialize_from)))
        theirs, ours = reader.manifest.model.get("model_type"), config.model.model_type
        if theirs != ours:
            raise ValueError(
                f"checkpoint.initialize_from {reader.folder} is of model_type {theirs!r}, model.model_type is "
                f"{ours!r}: set one to fit the other"
            )
        return Start(0, reader, resumes=False)
    return Start(0, None, resumes=False)


def _check_folder(config: Config) -> None:
    """ValueError where the run folder, which has no checkpoint, has the steps of another configuration."""
    metrics, path = Path(config.run_dir) / "metrics.jsonl", Path(config.run_dir) / "config.yaml"
    if not (metrics.is_file() and path.is_file() and read_metrics(metrics)):
        return
    try:
        then = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        then = None
    changed = _first_change(then, config) if isinstance(then, dict) else "a config.yaml that cannot be read"
    if changed is not None:
        raise ValueError(f"{config.run_dir} holds a run with {changed}: set another run_dir, or remove this one")


def _first_change(then: dict[str, Any], config: Config) -> str | None:
    """The first value that makes it another run than the resolved configuration ``then`` describes, in words.  A key
    that Farspan had not yet had the value that is the default now."""
    keys = [("model", None), ("objective", None), ("data", "sequence_length"), ("data", "rows")]
    keys += [("training", key) for key in ("seed", "global_batch_size", "batch_ramp", "dtype")]
    keys += [("optimizer", "name")]
    for section, key in keys:
        ours, fields = config.model_dump()[section], type(getattr(config, section)).model_fields
        theirs = then.get(section, {})
        for name in ours if key is None else [key]:
            old = theirs.get(name, fields[name].get_default())
            if old != ours[name]:
                return f"{section}.{name} {old!r}, now it is {ours[name]!r}"
    return None


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
    if {"virtual_stages": 1, **manifest.layout} != layout:  # older checkpoints have none
        raise ValueError(
            f"{folder} was saved with {_words(manifest.layout)} and cannot continue with {_words(layout)}: start the "
            "same layout, or set checkpoint.initialize_from (weights only) and another run_dir"
        )
    changed = _first_change(manifest.config, config)
    if changed is not None:
        raise ValueError(f"{folder} was saved with {changed}: set it back, or set another run_dir")
    if manifest.trainer.get("data") != data_fingerprint(config):
        raise ValueError(f"{folder} was trained on other data than {config.data.folder} now holds: set another run_dir")
    if manifest.step > config.training.steps:
        raise ValueError(f"{folder} is past training.steps {config.training.steps}: raise it, or set another run_dir")


def _words(layout: dict[str, int]) -> str:
    said = {name: value for name, value in layout.items() if (name, value) != ("virtual_stages", 1)}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in said.items())


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
        tokenizer=Path(config.data.folder) / "tokenizer",
        keep_last=config.checkpoint.keep_last,
    )
