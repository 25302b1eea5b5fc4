"""The manifest of a checkpoint: what it is of, and where in which file which values lie.

    format, version   "farspan-checkpoint", 2
    step              updates that are in it
    model, heads      the model section of the configuration; which heads it has
    files             name → {bytes, checksums}: of every ``BLOCK`` bytes, XXH3 of 64 bits in hexadecimal, end to end
    tokenizer         as ``files``, of those in the folder tokenizer
    tensors           logical name → {shape, step, dtypes: {kind: dtype}, shards: {kind: [[file, dim, start, stop,
                      begin, end], …]}}: the file, by its number in ``files``, has values begin to end of the slice
                      start to stop of dimension dim, flattened.  Kinds are "weight", "master" (float32, where weights
                      are of lower precision) and the optimizer's own, as "exp_avg"; step: how often it was updated
    layout            the sizes it was saved under; nothing depends on them.  Empty: weights alone
    trainer           what a resume needs beside tensors
    metrics           loss and validation loss at that step
    huggingface       config.json and second tensor names of the folder it was imported from
    config            the whole resolved configuration
    written_by        version and commit of Farspan

It is written last, and ends with the checksum of itself.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...parallel.parts import Part
from ..files import read_mapping, write_text
from .tensor_file import checksum

FORMAT, VERSION = "farspan-checkpoint", 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"  # the folder
_REMEDY = "take another checkpoint"
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
}


@dataclasses.dataclass(frozen=True)
class Shard:
    """Where values of a logical tensor lie: in which file, and which values."""

    file: str
    part: Part


@dataclasses.dataclass(frozen=True)
class Entry:
    """A logical tensor: its shape, the dtype and the shards of every kind, and how often it was updated."""

    shape: tuple[int, ...]
    dtypes: Mapping[str, torch.dtype]
    shards: Mapping[str, tuple[Shard, ...]]
    step: float | None = None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself; see above."""

    step: int
    model: dict[str, Any]
    heads: tuple[str, ...]
    tensors: Mapping[str, Entry] = dataclasses.field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    tokenizer: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    layout: dict[str, int] = dataclasses.field(default_factory=dict)
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    huggingface: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    written_by: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all its tensors' files."""
        return sum(int(about["bytes"]) for about in self.files.values())

    def write(self, folder: Path) -> None:
        """The manifest is whole or not there.  OSError where it cannot be written."""
        write_text(folder / MANIFEST, self.text())

    def text(self) -> str:
        """One line for every tensor and every file."""
        numbers = {name: number for number, name in enumerate(self.files)}
        tensors = {name: _entry_to_json(entry, numbers) for name, entry in self.tensors.items()}
        values: dict[str, Any] = {"format": FORMAT, "version": VERSION, "step": self.step, "heads": list(self.heads)}
        for name in ("model", "layout", "trainer", "metrics", "huggingface", "config", "written_by"):
            values[name] = getattr(self, name)
        lines = [f"{json.dumps(name)}: {json.dumps(value, indent=1)}" for name, value in values.items()]
        for name, table in (("files", self.files), ("tokenizer", self.tokenizer), ("tensors", tensors)):
            inner = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
            lines.append(f"{json.dumps(name)}: {{\n{inner}\n}}")
        body = ",\n".join(lines)
        return f'{{\n{body},\n"checksum": "{checksum(body.encode())}"\n}}\n'

    @staticmethod
    def read(folder: Path) -> Manifest:
        """ValueError in one line where there is none, or it is damaged, or of another format."""
        path = folder / MANIFEST
        value = read_mapping(path, "a Farspan checkpoint", _REMEDY)
        if value.get("format") != FORMAT or value.get("version") != VERSION:
            raise ValueError(
                f"{path} is {value.get('format')!r} version {value.get('version')!r}; "
                f"this Farspan reads {FORMAT!r} version {VERSION}: take the Farspan that wrote it"
            )
        text = path.read_text(encoding="utf-8")
        body = text[text.index("\n") + 1 : text.rindex(',\n"checksum"')] if ',\n"checksum"' in text else ""
        if checksum(body.encode()) != value.get("checksum"):
            raise ValueError(f"{path} is damaged (it is not what was written): {_REMEDY}")
        return _parse(value, path)


def merge_entries(parts: Iterable[Mapping[str, Entry]]) -> dict[str, Entry]:
    """One table of tensors from those of all ranks."""
    merged: dict[str, Entry] = {}
    for entries in parts:
        for name, entry in entries.items():
            if name not in merged:
                merged[name] = entry
                continue
            old = merged[name]
            shards = {kind: (*old.shards.get(kind, ()), *more) for kind, more in entry.shards.items()}
            step = entry.step if old.step is None else old.step
            merged[name] = Entry(old.shape, {**old.dtypes, **entry.dtypes}, {**old.shards, **shards}, step)
    return merged


def _entry_to_json(entry: Entry, numbers: Mapping[str, int]) -> dict[str, Any]:
    def shard(one: Shard) -> list[int]:
        part = one.part
        return [numbers[one.file], part.dim, part.start, part.stop, part.begin, part.end]

    return {
        "shape": list(entry.shape),
        "step": entry.step,
        "dtypes": {kind: str(dtype).removeprefix("torch.") for kind, dtype in entry.dtypes.items()},
        "shards": {kind: [shard(one) for one in shards] for kind, shards in entry.shards.items()},
    }


def _entry_from_json(value: Mapping[str, Any], files: list[str]) -> Entry:
    """ValueError, KeyError, TypeError, IndexError or AttributeError where it is none."""
    shape = tuple(_number(size) for size in value["shape"])

    def shard(numbers: list[int]) -> Shard:
        file, dim, start, stop, begin, end = map(_number, numbers)
        part = Part(shape, dim, start, stop, begin, end)
        if (shape and dim >= len(shape)) or not start <= stop <= (shape or (1,))[dim]:
            raise ValueError("a slice that the tensor does not have")
        if not begin <= end <= part.slice_values:
            raise ValueError("values that the slice does not have")
        return Shard(files[file], part)

    step = value["step"]
    return Entry(
        shape,
        {kind: DTYPES[name] for kind, name in value["dtypes"].items()},
        {kind: tuple(map(shard, shards)) for kind, shards in value["shards"].items()},
        None if step is None else float(step),
    )


def _number(value: Any) -> int:
    if not isinstance(value, int) or value < 0 or value > 2**62:
        raise ValueError(f"{value!r} is no number of values")
    return value


def _parse(value: dict[str, Any], path: Path) -> Manifest:
    def damaged(reason: str) -> ValueError:
        return ValueError(f"{path} is damaged: {reason}; {_REMEDY}")

    for name, kind in (("step", int), ("heads", list)):
        if not isinstance(value.get(name), kind):
            raise damaged(f"its {name} is {value.get(name)!r}" if name in value else f"it says nothing of {name}")
    tables = (
        "model",
        "files",
        "tokenizer",
        "tensors",
        "layout",
        "trainer",
        "metrics",
        "huggingface",
        "config",
        "written_by",
    )
    for name in tables:
        if not isinstance(value.get(name), dict):
            raise damaged(f"its {name} is no mapping" if name in value else f"it says nothing of {name}")
    for name, about in (*value["files"].items(), *value["tokenizer"].items()):
        if Path(name).name != name or name in (".", ".."):
            raise damaged(f"it names the file {name!r}, which does not lie in its folder")
        whole = isinstance(about, dict) and isinstance(about.get("bytes"), int) and about["bytes"] >= 0
        if not (whole and isinstance(about.get("checksums"), str)):
            raise damaged(f"it does not say how large {name} is")
    files = list(value["files"])
    entries: dict[str, Entry] = {}
    for name, entry in value["tensors"].items():
        try:
            entries[name] = _entry_from_json(entry, files)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError):
            raise damaged(f"it does not say where {name} lies") from None
    fields = {name: value[name] for name in ("step", *tables)} | {"heads": tuple(value["heads"]), "tensors": entries}
    return Manifest(**fields)
