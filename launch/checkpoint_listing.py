"""``farspan checkpoint ls``: the checkpoints of a run, or the tensors of one."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..pretrain.checkpoint import MANIFEST, Entry, Manifest, candidates, latest
from ..pretrain.checkpoint.folders import step_of, within_reach
from ..pretrain.config import CheckpointConfig, SpikesConfig, TrainingConfig
from ..pretrain.config_file import load_config
from ..pretrain.files import explain
from .tables import size, table


def find(path: Path) -> tuple[Path | None, list[Path]]:
    """The folder of a run's checkpoints and those in it, in the order in which a resume tries them; of one checkpoint
    None and itself.  ValueError where a path is neither."""
    if (path / MANIFEST).is_file() or (path.is_dir() and re.fullmatch(r"step-\d+", path.name)):
        return None, [path]
    for root in (path / "checkpoints", path):
        if root.is_dir() and (candidates(root) or _leftovers(root)):
            return root, candidates(root)
    raise ValueError(f"{path} has no checkpoint: give a run folder, its checkpoints folder or one step-… folder")


def reason(error: Exception, folder: Path) -> str:
    """An error in one line, without the checkpoint's folder, and without telling what to do about it."""
    said = explain(error) if isinstance(error, OSError) else str(error)
    remedy = "take another checkpoint"
    return said.replace(f"{folder}/", "").removesuffix(f": {remedy}").removesuffix(f"; {remedy}")


def layout(sizes: Mapping[str, int]) -> str:
    """What a checkpoint was saved under, as TP2×PP2×DP4, ZeRO 1."""
    if not sizes:
        return "weights alone"
    short = {"tensor": "TP", "pipeline": "PP", "virtual_stages": "VP", "data": "DP"}
    axes = [f"{letters}{sizes[name]}" for name, letters in short.items() if sizes.get(name, 1) != 1]
    zero = f", ZeRO {sizes['zero_stage']}" if sizes.get("zero_stage") else ""
    return ("×".join(axes) or "1 rank") + zero


@dataclasses.dataclass(frozen=True)
class Listed:
    """A checkpoint, as far as its manifest says it."""

    folder: Path
    manifest: Manifest | None
    problem: str | None

    @staticmethod
    def read(folder: Path) -> Listed:
        if not (folder / MANIFEST).exists():
            return Listed(folder, None, "no manifest")
        try:
            return Listed(folder, Manifest.read(folder), None)
        except (ValueError, OSError) as error:
            return Listed(folder, None, reason(error, folder))

    @property
    def rows(self) -> int | None:
        """That training has seen; None where the manifest does not say it."""
        try:
            assert self.manifest is not None
            training = TrainingConfig.model_validate(self.manifest.config["training"])
        except (ValueError, KeyError):
            return None
        return training.batch_sizes.samples_of(self.manifest.step).start

    def metric(self, name: str) -> float | None:
        value = self.manifest.metrics.get(name) if self.manifest is not None else None
        return float(value) if isinstance(value, int | float) else None

    def as_json(self) -> dict[str, Any]:
        said: dict[str, Any] = {"folder": self.folder.name, "problem": self.problem}
        if (manifest := self.manifest) is not None:
            said |= {"step": manifest.step, "bytes": manifest.bytes, "files": len(manifest.files)}
            said |= {"model_type": manifest.model.get("model_type"), "heads": list(manifest.heads), "rows": self.rows}
            said |= {name: getattr(manifest, name) for name in ("layout", "metrics", "written_by")}
        return said


def run(args: argparse.Namespace) -> None:
    """Print what a run or a checkpoint has."""
    root, found = find(args.path)
    if root is None:
        one = Listed(found[0], Manifest.read(found[0]), None)
        for line in [_json_of_one(one)] if args.json else _lines_of_one(one, all_tensors=args.tensors):
            print(line)
        return
    if args.tensors:
        raise ValueError(f"--tensors is of one checkpoint and {args.path} is a run: name one of its step-… folders")
    listed = [Listed.read(folder) for folder in sorted(found, key=step_of)]
    (settings, reach), newest = _settings(root, listed), latest(root)
    why = reasons_to_keep(listed, settings, newest, reach)
    leftovers = {path.name: sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) for path in _leftovers(root)}
    if args.json:
        checkpoints = [one.as_json() | {"latest": one.folder == newest, "kept": why[one.folder]} for one in listed]
        lying = [{"folder": name, "bytes": count} for name, count in leftovers.items()]
        print(json.dumps({"folder": str(root), "checkpoints": checkpoints, "leftovers": lying}, indent=2))
        return
    print(root)
    for line in _lines_of_run(listed, newest, why):
        print(line)
    if settings is not None:
        print(_describe(settings, reach))
    for name, count in leftovers.items():
        print(f"{name}: {size(count)}, being written now or left by a save that was interrupted")


# A run.


def _leftovers(root: Path) -> list[Path]:
    """What is being written, or an interrupted save has left."""
    return sorted(root.glob(".step-*"))


def _settings(root: Path, listed: Sequence[Listed]) -> tuple[CheckpointConfig | None, int]:
    """What the run keeps, and how far a rollback may go: as its config.yaml says, else its newest checkpoint."""
    try:
        config = load_config(root.parent / "config.yaml")
        return config.checkpoint, config.rollback_reach
    except (ValueError, OSError):
        pass
    for one in reversed(listed):
        try:
            if one.manifest is not None:
                spikes = SpikesConfig.model_validate(one.manifest.config.get("spikes", {}))
                training = TrainingConfig.model_validate(one.manifest.config.get("training", {}))
                settings = CheckpointConfig.model_validate(one.manifest.config["checkpoint"])
                return settings, spikes.reach(training.max_skipped_steps)
        except (ValueError, KeyError):
            continue
    return None, 0


def reasons_to_keep(
    listed: Sequence[Listed], settings: CheckpointConfig | None, newest: Path | None, reach: int = 0
) -> dict[Path, list[str]]:
    """Why each of them, oldest first, is kept, by the rules of ``checkpoint.Retention``, ``reach`` being as there."""
    why: dict[Path, list[str]] = {one.folder: [] for one in listed}
    if newest is None:
        return why
    # As a save sees them: later ones, of a run that went back, do not count.
    counted = [one for one in listed if (one.folder / MANIFEST).is_file() and step_of(one.folder) <= step_of(newest)]
    if settings is not None and settings.keep_last:
        for one in counted[-settings.keep_last :]:
            why[one.folder].append("last")
        for one in counted:
            if settings.keep_every and step_of(one.folder) % settings.keep_every == 0:
                why[one.folder].append("every")
        losses = {one.folder: loss for one in counted if (loss := one.metric("validation_loss")) is not None}
        for folder in sorted(losses, key=lambda folder: (losses[folder], -step_of(folder)))[: settings.keep_best]:
            why[folder].append("best")
        for folder in within_reach([one.folder for one in counted], reach):
            why[folder].append("rollback")
    return why


def _lines_of_run(listed: Sequence[Listed], newest: Path | None, why: Mapping[Path, list[str]]) -> list[str]:
    lines: list[tuple[str, ...]] = [("step", "size", "saved with", "loss", "validation", "rows", "")]
    for one in listed:
        step = str(step_of(one.folder))
        if one.manifest is None:
            lines.append((step, str(one.problem)))
            continue
        losses = (_loss(one.metric(name)) for name in ("loss", "validation_loss"))
        rows = "" if one.rows is None else f"{one.rows:,}"
        late = newest is not None and step_of(one.folder) > step_of(newest)
        marks = ["latest"] * (one.folder == newest) + ["after the latest"] * late + why[one.folder]
        lines.append((step, size(one.manifest.bytes), layout(one.manifest.layout), *losses, rows, ", ".join(marks)))
    return table(lines, right={0, 1, 3, 4, 5}) if listed else []


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _describe(settings: CheckpointConfig, reach: int) -> str:
    if not settings.keep_last:
        return "all are kept"
    rules = [f"last: the newest {settings.keep_last}"]
    rules += [f"every: a step that divides by {settings.keep_every}"] * bool(settings.keep_every)
    if best := settings.keep_best:
        rules.append("best: the lowest validation loss" if best == 1 else f"best: the {best} lowest validation losses")
    if reach:
        rules.append(f"rollback: what going back {reach} steps may need")
    return "kept as " + "; ".join(rules)


# One checkpoint.


def _json_of_one(one: Listed) -> str:
    assert one.manifest is not None
    tensors = {
        name: {
            "shape": list(entry.shape),
            "updates": entry.step,
            "kinds": {
                kind: {"dtype": _dtype(entry, kind), "shards": len(shards)} for kind, shards in entry.shards.items()
            },
        }
        for name, entry in one.manifest.tensors.items()
    }
    return json.dumps(one.as_json() | {"tensors": tensors}, indent=2)


def _lines_of_one(one: Listed, *, all_tensors: bool) -> Iterable[str]:
    manifest = one.manifest
    assert manifest is not None
    writer = manifest.written_by
    values = {name: one.metric(name) for name in manifest.metrics}
    losses = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items() if value is not None]
    saved = layout(manifest.layout) if not manifest.layout else f"saved with {layout(manifest.layout)}"
    yield str(one.folder)
    yield ", ".join([f"step {manifest.step}", *losses, *([f"{one.rows:,} rows"] if one.rows is not None else [])])
    yield f"{manifest.model.get('model_type')}, heads {', '.join(map(str, manifest.heads)) or 'none'}, {saved}"
    yield (
        f"{size(manifest.bytes)} in {len(manifest.files)} files, by Farspan {writer.get('version', 'unknown')} "
        f"(commit {writer.get('commit', 'unknown')})"
    )
    for lines in (_kinds(manifest.tensors), (_tensors if all_tensors else _layers)(manifest.tensors)):
        yield ""
        yield from lines


def _kinds(tensors: Mapping[str, Entry]) -> list[str]:
    lines = [("kind", "dtype", "tensors", "values", "size", "shards")]
    for kind in _kinds_of(tensors):
        some = [entry for entry in tensors.values() if kind in entry.shards]
        dtypes = ", ".join(sorted({_dtype(entry, kind) for entry in some}))
        values = sum(_values(entry, kind) for entry in some)
        count = sum(len(entry.shards[kind]) for entry in some)
        total = sum(_bytes(entry, kind) for entry in some)
        lines.append((kind, dtypes, f"{len(some)}", f"{values:,}", size(total), f"{count}"))
    return table(lines, right={2, 3, 4, 5})


def _layers(tensors: Mapping[str, Entry]) -> list[str]:
    """A line for each part of the model; layers that are alike share one."""
    groups: dict[str, list[Entry]] = {}
    for name in sorted(tensors, key=_natural):
        match = re.match(r"layers\.\d+|[^.]+", name)
        groups.setdefault(match[0] if match else name, []).append(tensors[name])

    def alike(group: str) -> tuple[object, ...]:
        entries = groups[group]
        return group.startswith("layers."), len(entries), sum(math.prod(e.shape) for e in entries)

    lines = [("part", "tensors", "parameters", "size", "shards")]
    for (layers, *_), same in itertools.groupby(groups, alike):
        names = list(same)
        for one in [names] if layers else [[name] for name in names]:
            entries = [entry for name in one for entry in groups[name]]
            title = one[0] if len(one) == 1 else f"{one[0]} to {one[-1].rpartition('.')[2]}"
            parameters = sum(math.prod(entry.shape) for entry in entries)
            total = sum(_bytes(entry, kind) for entry in entries for kind in entry.shards)
            shards = sum(len(found) for entry in entries for found in entry.shards.values())
            lines.append((title, f"{len(entries)}", f"{parameters:,}", size(total), f"{shards}"))
    return table(lines, right={1, 2, 3, 4})


def _tensors(tensors: Mapping[str, Entry]) -> list[str]:
    """A line for each tensor, with the number of shards of every kind."""
    kinds = _kinds_of(tensors)
    lines = [("tensor", "shape", "dtype", "updates", *kinds)]
    for name in sorted(tensors, key=_natural):
        entry = tensors[name]
        shards = (str(len(entry.shards.get(kind, ()))) for kind in kinds)
        updates = "" if entry.step is None else f"{entry.step:g}"
        lines.append((name, "×".join(map(str, entry.shape)), _dtype(entry, "weight"), updates, *shards))
    return ["shards of each tensor", *table(lines, right=range(3, len(lines[0])))]


def _kinds_of(tensors: Mapping[str, Entry]) -> list[str]:
    """Weights, masters, what the optimizer keeps."""
    kinds = {kind for entry in tensors.values() for kind in entry.shards}
    return sorted(kinds, key=lambda kind: (kind != "weight", kind != "master", kind))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _dtype(entry: Entry, kind: str) -> str:
    dtype = entry.dtypes.get(kind)
    return "unknown" if dtype is None else str(dtype).removeprefix("torch.")


def _values(entry: Entry, kind: str) -> int:
    return sum(shard.part.values for shard in entry.shards[kind])


def _bytes(entry: Entry, kind: str) -> int:
    dtype = entry.dtypes.get(kind)
    return 0 if dtype is None else _values(entry, kind) * dtype.itemsize
