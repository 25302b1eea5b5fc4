"""Where a run continues from, and what it must have in common with what was saved."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..parallel.mesh import Mesh
from . import checkpoint as ckpt
from .config import Config
from .conversion.model import model_of
from .conversion.resize import misfit
from .data.store import MANIFEST as DATA_MANIFEST
from .files import explain
from .metrics import complete_lines
from .provenance import written_by
from .rollbacks import Rollback, remove_undone
from .skips import Skip, described, ordered


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins: after ``step`` updates, from ``reader``'s checkpoint (None: from initial values).

    ``passed_over``: what is wrong with newer checkpoints that were not taken, in words.
    """

    step: int
    reader: ckpt.Reader | None
    resumes: bool  # False where only the weights are taken
    passed_over: tuple[str, ...] = ()


def find_start(config: Config, mesh: Mesh, resume: str, rollbacks: Sequence[Rollback] = ()) -> Start:
    """``resume``: "auto" (the run folder's newest whole checkpoint if there is one), "never" or a checkpoint's path;
    collective.  All of a checkpoint is verified, each rank a part of it.  ``rollbacks``: the run's so far; the
    checkpoints that they have undone are removed.

    ValueError where none is whole, or one was saved with data, model or seed that differ: the run would not continue
    but become another one.
    """
    root = checkpoints_folder(config)

    def candidates() -> list[Path]:
        remove_undone(root, rollbacks)
        return ckpt.candidates(root)

    found = mesh.tell(candidates)
    if resume == "never" and found:
        raise ValueError(f"{root} already has checkpoints: set another run_dir, or leave out --resume never")
    if resume not in ("auto", "never"):
        found = [ckpt.find(Path(resume))]
    if found:
        reader, damage = newest_whole(found, mesh)
        if reader is None and resume == "auto":
            raise ValueError(
                f"{root} has no whole checkpoint, {len(found)} damaged: {damage[0]}; set another run_dir to start anew"
            )
        if reader is None:
            raise ValueError(damage[0])
        _check_continues(config, reader)
        return Start(reader.manifest.step, reader, resumes=True, passed_over=damage)
    _check_folder(config)
    if config.checkpoint.initialize_from is not None:
        return Start(0, _initial_weights(config, Path(config.checkpoint.initialize_from), mesh), resumes=False)
    return Start(0, None, resumes=False)


def _initial_weights(config: Config, path: Path, mesh: Mesh) -> ckpt.Reader:
    """The checkpoint that a new run takes its weights from; collective.  ValueError where it is none of this model."""
    reader, damage = newest_whole([ckpt.find(path)], mesh)
    if reader is None:
        raise ValueError(f"checkpoint.initialize_from: {damage[0]}")
    theirs, ours = reader.manifest.model.get("model_type"), config.model.model_type
    if theirs != ours:
        raise ValueError(
            f"checkpoint.initialize_from {reader.folder} is of model_type {theirs!r}, model.model_type is "
            f"{ours!r}: set one to fit the other"
        )
    _, saved, _ = model_of(reader.manifest, reader.folder)
    problem = misfit(reader.folder, saved, config.model, Path(config.data.folder) / "tokenizer")
    if problem is not None:
        raise ValueError(f"checkpoint.initialize_from: {problem}")
    return reader


def newest_whole(folders: Sequence[Path], mesh: Mesh) -> tuple[ckpt.Reader | None, tuple[str, ...]]:
    """The first of these checkpoints that is whole, and what is wrong with those before it; collective.  OSError where
    one cannot be read for want of rights or of a file system: it may be whole."""
    damage: list[str] = []
    for folder in folders:
        reader, problem, refusal, kind = None, None, None, OSError
        try:
            reader = ckpt.Reader(folder)
            reader.verify(mesh.rank, mesh.size)
        except ValueError as error:
            problem = str(error)
        except OSError as error:
            if error.errno == errno.EIO:
                problem = explain(error)
            else:
                refusal, kind = explain(error), type(error)
        if (refusal := mesh.first_problem(refusal)) is not None:
            raise kind(refusal)
        problem = mesh.first_problem(problem)
        if problem is None:
            assert reader is not None
            reader.trust()
            return reader, tuple(damage)
        damage.append(problem)
    return None, tuple(damage)


def _check_folder(config: Config) -> None:
    """ValueError where the run folder, which has no checkpoint, has the steps of another configuration."""
    metrics, path = Path(config.run_dir) / "metrics.jsonl", Path(config.run_dir) / "config.yaml"
    if not (metrics.is_file() and path.is_file()):
        return
    with metrics.open("rb") as file:
        if next(complete_lines(file), None) is None:
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


def _changed_skips(manifest: ckpt.Manifest, config: Config) -> str | None:
    """What is different in what the steps so far left out of the data, in words; later ones may leave out others."""
    saved = manifest.config.get("data", {}).get("skip", ())  # older checkpoints have none
    then = ordered([Skip(skip["step"], skip["samples"]) for skip in saved], manifest.step)
    now = ordered(config.data.skips, manifest.step)
    return None if now == then else f"data.skip {described(then)}, now it is {described(now)}"


def changes_since(start: Start, config: Config) -> list[str]:
    """What a run goes on with that is not as it was when its checkpoint was saved, in words.  What is left out of the
    data is no change: rollbacks have done that."""
    if start.reader is None or not start.resumes:
        return []
    manifest, found = start.reader.manifest, []
    if manifest.written_by and manifest.written_by != written_by():
        then, now = (" ".join(map(str, one.values())) for one in (manifest.written_by, written_by()))
        found.append(f"Farspan {then} → {now}")
    values = json.loads(json.dumps(config.model_dump()))
    for section, ours in values.items():
        theirs = manifest.config.get(section)
        if not isinstance(ours, dict) or not isinstance(theirs, dict):
            continue  # run_dir: the folder was moved
        common = (name for name in ours if name in theirs and (section, name) != ("data", "skip"))
        found += [
            f"{section}.{name} {theirs[name]!r} → {ours[name]!r}" for name in common if ours[name] != theirs[name]
        ]
    return found


def checkpoints_folder(config: Config) -> Path:
    return Path(config.run_dir) / "checkpoints"


def layout_of(config: Config, mesh: Mesh) -> dict[str, int]:
    """The sizes that a run is spread over."""
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


def _check_continues(config: Config, reader: ckpt.Reader) -> None:
    manifest, folder = reader.manifest, reader.folder
    if not manifest.layout:
        raise ValueError(
            f"{folder} has weights but no optimizer state: set checkpoint.initialize_from to start from it"
        )
    changed = _first_change(manifest.config, config) or _changed_skips(manifest, config)
    if changed is not None:
        raise ValueError(f"{folder} was saved with {changed}: set it back, or set another run_dir")
    if manifest.trainer.get("data") != data_fingerprint(config):
        raise ValueError(f"{folder} was trained on other data than {config.data.folder} now holds: set another run_dir")
    if manifest.step > config.training.steps:
        raise ValueError(f"{folder} is past training.steps {config.training.steps}: raise it, or set another run_dir")


def describe_layout(layout: dict[str, int]) -> str:
    said = {name: value for name, value in layout.items() if (name, value) != ("virtual_stages", 1)}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in said.items())
