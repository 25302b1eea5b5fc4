"""Whether a checkpoint is whole, beside its checksums: what the files must hold, and which tensors a model needs.

That the manifest names every value of a tensor once is seen when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from .manifest import MANIFEST, TOKENIZER, Entry, Manifest
from .reader import tensor_key
from .tensor_file import TensorFile

Contents = dict[str, tuple[torch.dtype, int]]  # name in a file → dtype, number of values


def expected_in_files(manifest: Manifest) -> dict[str, Contents]:
    """What the manifest says that each file holds."""
    expected: dict[str, Contents] = {name: {} for name in manifest.files}
    for name, entry in manifest.tensors.items():
        for kind, shards in entry.shards.items():
            for shard in shards:
                expected[shard.file][tensor_key(kind, name)] = entry.dtypes[kind], shard.part.values
    return expected


def check_contents(file: TensorFile, expected: Contents) -> None:
    """ValueError where a file holds other tensors than the manifest says."""
    found = {name: (dtype, values) for name, (dtype, values, _) in file.tensors.items()}
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if wrong:
        here, there = (_describe(contents.get(wrong[0])) for contents in (found, expected))
        raise ValueError(f"{file.path} has {here} under {wrong[0]} where {MANIFEST} says {there}")


def _describe(one: tuple[torch.dtype, int] | None) -> str:
    return "nothing" if one is None else f"{one[1]} values of {str(one[0]).removeprefix('torch.')}"


def strangers(folder: Path, manifest: Manifest) -> list[str]:
    """What lies in a checkpoint's folder and is none of it."""
    known = {MANIFEST, *manifest.files, *([TOKENIZER] if manifest.tokenizer else [])}
    here = [path.name for path in folder.iterdir() if path.name not in known]
    if manifest.tokenizer and (folder / TOKENIZER).is_dir():
        inside = (folder / TOKENIZER).iterdir()
        here += [f"{TOKENIZER}/{path.name}" for path in inside if path.name not in manifest.tokenizer]
    return sorted(here)


def tensor_problems(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """What keeps the tensors of a manifest from being a model's, whose logical tensors have these ``shapes``, with an
    optimizer's state or without."""
    tensors = manifest.tensors
    for name, shape in shapes.items():
        entry = tensors.get(name)
        if entry is None:
            yield f"{name} is missing"
        elif entry.shape != shape:
            yield f"{name} has shape {entry.shape}, the model needs {shape}"
        elif "weight" not in entry.shards:
            yield f"{name} has no weight"
    yield from (f"{name} is no tensor of the model" for name in tensors if name not in shapes)
    yield from _state_problems(tensors)


def _state_problems(tensors: Mapping[str, Entry]) -> Iterator[str]:
    """A tensor that was updated has all that the optimizer keeps of others; one that never was has none of it."""
    kept = {kind for entry in tensors.values() for kind in entry.shards} - {"weight", "master"}
    updated = {name: entry for name, entry in tensors.items() if kept & entry.shards.keys()}
    masters = any("master" in entry.shards for entry in updated.values())
    for name, entry in updated.items():
        lacks = sorted((kept | ({"master"} if masters else set())) - entry.shards.keys())
        if lacks:
            yield f"{name} has no {lacks[0]}, others have"
        elif entry.step is None:
            yield f"{name} has moments and was never updated"
    for name, entry in tensors.items():
        if name not in updated and entry.step is not None:
            yield f"{name} was updated and has no moments"
