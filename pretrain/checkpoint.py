"""Checkpoints: logical tensors in sharded safetensors files under one manifest.

    step-00000100/
        manifest.json               written last: a folder without it is no checkpoint
        weights-t00-p00.safetensors the slices of tensor rank 0, stage 0, without padding
        optimizer-00000.safetensors the optimizer's own partition of rank 0 (readable in the same layout only)
        tokenizer/                  so that a conversion needs nothing but this folder

The manifest says of every logical tensor its shape, and in which files which slices of it lie, so that weights are read
under any layout, a slice at a time.  A checkpoint is written beside (``.step-00000100.tmp``) by all ranks and renamed.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..parallel.mesh import Axis, Mesh
from ..parallel.sharding import Logical, logical_name, logical_of
from .files import explain, read_mapping, sync, write_json, write_text

FORMAT, VERSION = "farspan-checkpoint", 1
MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{8,})")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    ``model``: the model section of the configuration; ``heads``: which heads it has; ``layout``: sizes it was saved
    under (empty: weights alone); ``tensors``: logical name → {shape, dim, shards: [{file, start, stop}]};
    ``trainer``: what a resume needs beside tensors; ``huggingface``: config.json and second tensor names of the folder
    it was imported from; ``config``: the whole resolved configuration.
    """

    step: int
    model: dict[str, Any]
    heads: tuple[str, ...]
    tensors: dict[str, dict[str, Any]]
    layout: dict[str, int] = dataclasses.field(default_factory=dict)
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)
    huggingface: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)})

    @staticmethod
    def read(folder: Path) -> Manifest:
        value = read_mapping(folder / MANIFEST, "a Farspan checkpoint", "take another checkpoint")
        if value.get("format") != FORMAT or value.get("version") != VERSION:
            raise ValueError(
                f"{folder / MANIFEST} is {value.get('format')!r} version {value.get('version')!r}; "
                f"this Farspan reads {FORMAT!r} version {VERSION}: take the Farspan that wrote it"
            )
        for name in ("step", "model", "heads", "tensors"):
            if name not in value:
                raise ValueError(f"{folder / MANIFEST} is damaged: it says nothing of {name}; take another checkpoint")
        for name, kind in (("step", int), ("heads", list)):
            if not isinstance(value[name], kind):
                raise ValueError(
                    f"{folder / MANIFEST} is damaged: its {name} is {value[name]!r}; take another checkpoint"
                )
        for name in ("model", "tensors", "layout", "trainer", "huggingface", "config"):
            if not isinstance(value.get(name, {}), dict):
                raise ValueError(f"{folder / MANIFEST} is damaged: its {name} is no mapping; take another checkpoint")
        fields = {f.name: value[f.name] for f in dataclasses.fields(Manifest) if f.name in value}
        return Manifest(**{**fields, "heads": tuple(fields["heads"])})


# Writing.


def local_slices(
    parameters: Iterable[tuple[str, nn.Parameter, Tensor]], axis: Axis, file: str
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """This rank's part of the weights: ({name: slice without padding}, {name: manifest entry}).

    ``parameters``: (name, parameter, its whole local value).  Second copies of tied tensors are left out, and so is
    what every tensor rank holds, but on the first.
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, parameter, value in parameters:
        logical = logical_of(parameter)
        if logical.tied_to is not None and logical.tied_to != name:
            continue
        if logical.dim is None and axis.rank > 0:
            continue
        value = value.detach().reshape(logical.local_shape(axis))
        start, stop = 0, 0
        if logical.dim is not None:
            start, stop = logical.bounds(axis)
            value = value.narrow(logical.dim, 0, stop - start)
        tensors[name] = value.to("cpu", copy=True, memory_format=torch.contiguous_format)
        entries[name] = {
            "shape": list(logical.shape),
            "dim": logical.dim,
            "shards": [{"file": file, "start": start, "stop": stop}],
        }
    return tensors, entries


def merge_entries(parts: Iterable[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """One table of tensors from those of all ranks."""
    merged: dict[str, dict[str, Any]] = {}
    for entries in parts:
        for name, entry in entries.items():
            if name in merged:
                merged[name]["shards"].extend(entry["shards"])
            else:
                merged[name] = {**entry, "shards": list(entry["shards"])}
    return merged


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """One safetensors file, flushed to the disk.  OSError where it cannot be written."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:  # not an OSError, whatever the reason
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(f"{path}: {error}") from None
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    sync(path)


def open_tensors(path: Path, remedy: str) -> Any:
    """A safetensors file to read from.  OSError where it cannot be opened; ValueError, with the ``remedy``, where it is
    damaged."""
    with path.open("rb"):  # of a file without rights safetensors says that it does not exist
        pass
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from None


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def save(
    root: Path,
    manifest: Manifest,
    mesh: Mesh,
    *,
    weights: dict[str, Tensor],
    entries: dict[str, dict[str, Any]],
    optimizer: dict[str, Tensor],
    tokenizer: Path | None,
    keep_last: int,
) -> Path:
    """Write the checkpoint of ``manifest.step`` below ``root``; collective over all ranks.  Returns its folder.

    ``weights`` and ``entries`` are this rank's (empty where it has none to write), ``optimizer`` its own partition.  A
    failure on any rank leaves every older checkpoint and ``latest`` as they were and raises OSError on all of them.
    """
    final = step_folder(root, manifest.step)
    beside = root / f".{final.name}.tmp"
    problem = _attempt(mesh, lambda: _fresh_folder(beside) if mesh.is_writer else None)
    if problem is None:
        problem = _attempt(mesh, lambda: _write_rank(beside, mesh, weights, optimizer))
    if problem is None:
        gathered: list[Any] = [entries]
        if dist.is_initialized():
            gathered = [None] * mesh.size
            dist.all_gather_object(gathered, entries)
        whole = dataclasses.replace(manifest, tensors=merge_entries(gathered))
        problem = _attempt(mesh, lambda: _publish(root, beside, final, whole, tokenizer) if mesh.is_writer else None)
    if problem is not None:
        if mesh.is_writer:  # a full disk has better use for the room
            shutil.rmtree(beside, ignore_errors=True)
        raise OSError(
            f"the checkpoint of step {manifest.step} was not saved ({problem}); older ones are untouched: "
            "the same command goes on from the latest"
        )
    problem = _attempt(mesh, lambda: _forget_old(root, keep_last) if mesh.is_writer else None)
    if problem is not None:
        raise OSError(
            f"the checkpoint of step {manifest.step} is saved, but an older one cannot be removed ({problem})"
        )
    return final


def _attempt(mesh: Mesh, action: Any) -> str | None:
    """Run an action on every rank; the first rank's failure, in words, for all of them."""
    problem: str | None = None
    try:
        action()
    except OSError as error:
        problem = f"rank {mesh.rank}: {explain(error)}"
    if not dist.is_initialized():
        return problem
    problems: list[Any] = [None] * mesh.size
    dist.all_gather_object(problems, problem)
    return next((p for p in problems if p), None)


def _fresh_folder(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _write_rank(folder: Path, mesh: Mesh, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
    if weights:
        write_tensors(folder / weights_file(mesh), weights)
    if optimizer:
        write_tensors(folder / optimizer_file(mesh.rank), optimizer)


def weights_file(mesh: Mesh) -> str:
    return f"weights-t{mesh.tensor.rank:02d}-p{mesh.pipeline.rank:02d}.safetensors"


def optimizer_file(rank: int) -> str:
    return f"optimizer-{rank:05d}.safetensors"


def _publish(root: Path, beside: Path, final: Path, manifest: Manifest, tokenizer: Path | None) -> None:
    if tokenizer is not None:
        shutil.copytree(tokenizer, beside / "tokenizer")
        for file in (beside / "tokenizer").iterdir():
            sync(file)
    manifest.write(beside)
    sync(beside)
    if final.exists():  # saved before by a run that was resumed from further back
        old = _hide(final)
        try:
            beside.replace(final)
        except OSError:
            old.replace(final)
            raise
        _remove(old)
    else:
        beside.replace(final)
    sync(root)
    write_text(root / "latest", final.name + "\n")


def _hide(folder: Path) -> Path:
    """Rename a checkpoint so that it is none any more, before it is removed file by file."""
    hidden = folder.with_name(f".{folder.name}.old")
    _remove(hidden)
    return folder.replace(hidden)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _forget_old(root: Path, keep_last: int) -> None:
    """Remove all but the newest ``keep_last`` checkpoints (0 keeps all) and what an interrupted save left."""
    for leftover in root.glob(".step-*"):
        _remove(leftover)
    if keep_last:
        for folder in steps(root)[:-keep_last]:
            _remove(_hide(folder))


# Finding and reading.


def steps(root: Path) -> list[Path]:
    """The whole checkpoints below ``root``, oldest first."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if _STEP.fullmatch(p.name) and (p / MANIFEST).is_file()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def find(path: Path) -> Path:
    """The checkpoint that a path means: a checkpoint folder, a ``checkpoints`` folder or a run folder (its latest)."""
    if (path / MANIFEST).is_file():
        return path
    for root in (path, path / "checkpoints"):
        newest = latest(root) if root.is_dir() else None
        if newest is not None:
            return newest
    raise ValueError(f"{path} has no checkpoint: give a run folder, its checkpoints folder or one step-… folder")


def latest(root: Path) -> Path | None:
    """The checkpoint that ``latest`` names, or where that is missing or stale the newest whole one.

    ValueError where ``root`` is no folder and cannot become one."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root} is a file where the folder of checkpoints belongs: move it, or set another run_dir")
    pointer = root / "latest"
    if pointer.is_file():
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if _STEP.fullmatch(name) and (root / name / MANIFEST).is_file():
            return root / name
    whole = steps(root)
    return whole[-1] if whole else None


class Reader:
    """Reads logical tensors, or slices of them, from a checkpoint saved under any layout."""

    def __init__(self, folder: Path, manifest: Manifest | None = None) -> None:
        self.folder = folder
        self.manifest = manifest or Manifest.read(folder)
        self._files: dict[str, Any] = {}

    def names(self) -> list[str]:
        return list(self.manifest.tensors)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """The whole logical tensor; ValueError where it is not of the ``shape`` that the model needs."""
        entry = self._entry(name, shape)
        return self._range(name, entry, 0, entry["shape"][entry["dim"]] if entry["dim"] is not None else 0)

    def local(self, name: str, logical: Logical, axis: Axis, local_shape: Iterable[int]) -> Tensor:
        """A rank's slice, padded, in the parameter's own shape; reads only what it needs."""
        entry = self._entry(name, logical.shape)
        if logical.dim is None or entry["dim"] != logical.dim:  # an imported checkpoint lies there whole
            return logical.slice(self.tensor(name), axis, tuple(local_shape))
        value = self._range(name, entry, *logical.bounds(axis))
        return logical.pad(value, axis).reshape(tuple(local_shape))

    def optimizer(self, rank: int) -> dict[str, Tensor]:
        """The optimizer partition that this rank saved."""
        handle = self._open(optimizer_file(rank))
        return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)

    def _entry(self, name: str, shape: tuple[int, ...] | None) -> dict[str, Any]:
        """What the manifest says of a tensor, which must be of this shape (None: of any)."""
        if name not in self.manifest.tensors:
            raise ValueError(f"{self.folder} has no tensor {name}: the checkpoint is of another model configuration")
        entry = self.manifest.tensors[name]
        if not _is_whole(entry):
            raise ValueError(
                f"{self.folder / MANIFEST} is damaged: it does not say where {name} lies; take another checkpoint"
            )
        if shape not in (None, tuple(entry["shape"])):
            raise ValueError(
                f"{name} in {self.folder} has shape {tuple(entry['shape'])}, the model needs {shape}: "
                "the checkpoint is of another model configuration"
            )
        return entry

    def _range(self, name: str, entry: dict[str, Any], start: int, stop: int) -> Tensor:
        dim = entry["dim"]
        if dim is None:
            file = entry["shards"][0]["file"]
            view = self._slice(file, name, entry["shape"])
            return view[:] if entry["shape"] else self._open(file).get_tensor(name)  # a number has no slices
        pieces = []
        for shard in sorted(entry["shards"], key=lambda s: s["start"]):
            low, high = max(start, shard["start"]), min(stop, shard["stop"])
            if low < high:
                shape = [*entry["shape"]]
                shape[dim] = shard["stop"] - shard["start"]
                view = self._slice(shard["file"], name, shape)
                index = [slice(None)] * len(shape)
                index[dim] = slice(low - shard["start"], high - shard["start"])
                pieces.append(view[tuple(index)])
        if not pieces:  # a rank that holds nothing but padding
            shape = list(entry["shape"])
            shape[dim] = 0
            return torch.empty(shape)
        whole = torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0]
        if whole.shape[dim] != stop - start:
            raise ValueError(f"{name} in {self.folder} lacks entries {start}..{stop} along dimension {dim}")
        return whole

    def _slice(self, file: str, name: str, shape: list[int]) -> Any:
        try:
            view = self._open(file).get_slice(name)
        except SafetensorError:
            raise ValueError(f"{self.folder / file} lacks {name}: the checkpoint is not whole, take another") from None
        if view.get_shape() != shape or not view.get_dtype().startswith(("F", "BF", "I64")):
            raise ValueError(
                f"{self.folder / file} has {name} as {view.get_dtype()} {view.get_shape()}, {MANIFEST} says that it "
                f"is a weight of shape {shape}: the checkpoint is not whole, take another"
            )
        return view

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.folder / file
            if Path(file).name != file or not path.is_file():
                raise ValueError(f"{path} is missing: the checkpoint is not whole, take another")
            self._files[file] = open_tensors(path, "take another checkpoint")
        return self._files[file]


def _is_whole(entry: Any) -> bool:
    """Whether a tensor's entry in the manifest says all that reading it takes."""
    try:
        shape, dim, shards = entry["shape"], entry["dim"], entry["shards"]
        bounds = [] if dim is None else [shape[dim], *(shard[end] for shard in shards for end in ("start", "stop"))]
        numbers = all(isinstance(number, int) for number in (*shape, *bounds))
        return bool(numbers and shards and all(isinstance(shard["file"], str) for shard in shards))
    except (KeyError, TypeError, IndexError):
        return False


@torch.no_grad()
def load_weights(module: nn.Module, reader: Reader, axis: Axis) -> None:
    """Fill a module's parameters with their slices.  Parameters must be whole (not partitioned by ZeRO 3)."""
    for name, parameter in module.named_parameters():
        logical = logical_of(parameter)
        parameter.copy_(reader.local(logical_name(name, parameter), logical, axis, parameter.shape))
