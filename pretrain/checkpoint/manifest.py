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
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...parallel.parts import Part, cover
from ..checksums import checksum
from ..files import read_mapping, write_text

FORMAT, VERSION = "farspan-checkpoint", 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"  # the folder
_REMEDY = "take another checkpoint"
_LARGEST = 2**62  # number of values, bytes or steps
_CHECKSUM = ',\n"checksum": '
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
        return _sealed(",\n".join(lines))

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
        text = path.read_bytes().decode()  # the ends of lines as they are
        if text != _sealed(text.removeprefix("{\n").rpartition(_CHECKSUM)[0]):
            raise ValueError(f"{path} is damaged (it is not what was written): {_REMEDY}")
        return _parse(value, path)


def _sealed(body: str) -> str:
    """The text of a manifest, with the checksum of itself."""
    return f'{{\n{body}{_CHECKSUM}"{checksum(body.encode())}"\n}}\n'


def merge_entries(parts: Iterable[Mapping[str, Entry]]) -> dict[str, Entry]:
    """One table of tensors from those of all ranks."""
    merged: dict[str, Entry] = {}
    shards: dict[str, dict[str, list[Shard]]] = {}
    for entries in parts:
        for name, entry in entries.items():
            old = merged.setdefault(name, entry)
            step = entry.step if old.step is None else old.step
            merged[name] = Entry(old.shape, {**old.dtypes, **entry.dtypes}, {}, step)
            for kind, more in entry.shards.items():
                shards.setdefault(name, {}).setdefault(kind, []).extend(more)
    return {
        name: dataclasses.replace(entry, shards={kind: tuple(found) for kind, found in shards.get(name, {}).items()})
        for name, entry in merged.items()
    }


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
    """ValueError, KeyError, TypeError, IndexError or AttributeError where it is none, or values are missing."""
    shape = tuple(map(_number, _list(value["shape"])))
    _number(math.prod(shape))

    def shard(numbers: Any) -> Shard:
        file, dim, start, stop, begin, end = map(_number, _list(numbers))
        part = Part(shape, dim, start, stop, begin, end)
        if (shape and dim >= len(shape)) or not start <= stop <= (shape or (1,))[dim]:
            raise ValueError("a slice that the tensor does not have")
        if not begin <= end <= part.slice_values:
            raise ValueError("values that the slice does not have")
        return Shard(files[file], part)

    step = value["step"]
    if step is not None and not (type(step) in (int, float) and 0 <= step <= _LARGEST):
        raise ValueError("no number of updates")
    dtypes = {kind: DTYPES[name] for kind, name in value["dtypes"].items()}
    shards = {kind: tuple(map(shard, _list(found))) for kind, found in value["shards"].items()}
    for found in shards.values():
        names = [one.file for one in found if one.part.values]
        if len(set(names)) != len(names) or not cover((one.part for one in found), shape):
            raise ValueError("values that are nowhere, or in two places")
    if dtypes.keys() != shards.keys():
        raise ValueError("values without a dtype, or a dtype without values")
    return Entry(shape, dtypes, shards, None if step is None else float(step))


def _number(value: Any) -> int:
    """A number of values, bytes or steps."""
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ValueError("no number")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("no list")
    return value


def _file_name(name: str) -> bool:
    """Whether a file of this name lies in the folder that it is looked for in, on any system."""
    return Path(name).name == name not in ("", "..") and name.isprintable() and "\\" not in name and len(name) < 128


def _parse(value: dict[str, Any], path: Path) -> Manifest:
    def damaged(reason: str) -> ValueError:
        return ValueError(f"{path} is damaged: {reason}; {_REMEDY}")

    heads = value.get("heads")
    for name, right in (
        ("step", type(value.get("step")) is int and 0 <= value["step"] <= _LARGEST),
        ("heads", isinstance(heads, list) and all(isinstance(head, str) for head in heads)),
    ):
        if not right:
            raise damaged(f"its {name} is {value[name]!r}" if name in value else f"it says nothing of {name}")
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
        if not _file_name(name):
            raise damaged(f"it names the file {name!r}, which does not lie in its folder")
        try:
            whole = _number(about["bytes"]) >= 0 and isinstance(about["checksums"], str)
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise damaged(f"it does not say how large {name} is")
    files = list(value["files"])
    entries: dict[str, Entry] = {}
    for name, entry in value["tensors"].items():
        try:
            entries[name] = _entry_from_json(entry, files)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise damaged(f"it does not say where {name!r} lies") from None
    fields = {name: value[name] for name in ("step", *tables)} | {"heads": tuple(value["heads"]), "tensors": entries}
    return Manifest(**fields)
