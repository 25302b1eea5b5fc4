"""Reading a checkpoint: logical tensors, or any part of them, whatever layout it was saved under."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...parallel.mesh import Axis
from ...parallel.parts import Part, Runs, overlap
from ...parallel.sharding import logical_name, logical_of
from .manifest import MANIFEST, TOKENIZER, Entry, Manifest, Shard
from .tensor_file import CheckedFile, TensorFile

_PORTION = 2**24  # values that are read at once where they are copied to several places
_LONG_RUN = 4096  # bytes from which a run is worth a read of its own
_OPEN_FILES = 256  # at a time: a thousand ranks write two thousand, and a process may not open as many


def tensor_key(kind: str, name: str) -> str:
    """The name of a tensor in a file."""
    return name if kind == "weight" else f"{kind}:{name}"


class Wanted(NamedTuple):
    """A part that is to be read, and the 1-D tensor to fill with it."""

    kind: str
    name: str
    part: Part
    into: Tensor


class Reader:
    """Reads logical tensors, or parts of them, from a checkpoint saved under any layout.

    What is read is verified by its checksums, unless ``trust`` was called: then no byte is read that is not asked for,
    but for what lies between short runs.
    ValueError in one line where something is damaged or missing.
    """

    def __init__(self, folder: Path, manifest: Manifest | None = None) -> None:
        self.folder = folder
        self.manifest = manifest or Manifest.read(folder)
        self._files: dict[str, TensorFile] = {}
        self._bytes_read = 0  # of files that are closed
        self._trusted = False

    def trust(self) -> None:
        """All files were verified a moment ago."""
        for name in list(self._files):
            self._close(name)
        self._trusted = True

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compare the checksums of every ``parts``-th file, from number ``part`` on; ValueError where one differs."""
        files = [(self.folder / name, about) for name, about in self.manifest.files.items()]
        files += [(self.folder / TOKENIZER / name, about) for name, about in self.manifest.tokenizer.items()]
        for path, about in files[part::parts]:
            with CheckedFile(path, about) as file:
                file.verify()

    @property
    def bytes_read(self) -> int:
        """So far, but for what ``verify`` read."""
        return self._bytes_read + sum(file.bytes_read for file in self._files.values())

    def names(self) -> list[str]:
        return list(self.manifest.tensors)

    def dtype(self, name: str, kind: str = "weight") -> torch.dtype:
        return self._entry(name, kind).dtypes[kind]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def tensor(self, name: str, shape: tuple[int, ...] | None = None, kind: str = "weight") -> Tensor:
        """The whole logical tensor; ValueError where it is not of the ``shape`` that the model needs."""
        entry = self._entry(name, kind, shape)
        for shard in entry.shards[kind]:  # before memory is asked for that nothing would fill
            self._file_with(tensor_key(kind, name), entry.dtypes[kind], shard)
        values = torch.empty(entry.shape, dtype=entry.dtypes[kind])
        self.read(kind, name, Part.whole(entry.shape), values.view(-1))
        return values

    # As an optimizer reads it (``parallel.state.SavedState``).

    def kinds(self, name: str) -> Collection[str]:
        return self._entry(name).shards.keys()

    def step(self, name: str) -> float | None:
        return self._entry(name).step

    def read(self, kind: str, name: str, part: Part, into: Tensor) -> None:
        """Fill ``into``, 1-D, of any dtype and device, with the values of that part."""
        self.read_all([Wanted(kind, name, part, into)])

    def read_all(self, wanted: Iterable[Wanted]) -> None:
        """The same for many parts, file by file: where ZeRO 3 has spread each tensor over a thousand files, one is
        opened once."""
        copies = [copy for one in wanted for copy in self._copies(one)]
        for key, dtype, shard, runs, into in sorted(copies, key=lambda copy: copy[2].file):
            self._copy(key, dtype, shard, runs, into)

    def _copies(self, wanted: Wanted) -> list[tuple[str, torch.dtype, Shard, Runs, Tensor]]:
        kind, name, part, into = wanted
        assert into.is_contiguous() and len(into) == part.values, "values are counted from the part's first on"
        entry = self._entry(name, kind, part.shape)
        key, dtype = tensor_key(kind, name), entry.dtypes[kind]
        found = [(key, dtype, shard, runs, into) for shard in entry.shards[kind] for runs in overlap(shard.part, part)]
        if missing := part.values - sum(runs.count * runs.length for *_, runs, _ in found):
            raise ValueError(
                f"{self.folder} lacks {missing} of the {part.values} values of {kind} {name} that are needed"
            )
        return found

    def _copy(self, key: str, dtype: torch.dtype, shard: Shard, runs: Runs, into: Tensor) -> None:
        file = self._file_with(key, dtype, shard)
        if runs.count == 1 or (self._trusted and runs.length * dtype.itemsize >= _LONG_RUN):
            direct = into.dtype == dtype and into.device.type == "cpu"
            for source, target in runs:
                if direct:
                    file.read_into(key, source, into[target : target + runs.length])
                    continue
                for begin in range(0, runs.length, _PORTION):
                    end = min(begin + _PORTION, runs.length)
                    into[target + begin : target + end].copy_(file.read(key, source + begin, source + end))
            return
        at_once = max(1, _PORTION // max(runs.source_step, 1))
        for number in range(0, runs.count, at_once):  # with what lies between them: short runs are many
            some = runs.some(number, min(at_once, runs.count - number))
            some.from_start().copy(file.read(key, some.source, some.source_end), into)

    def _entry(self, name: str, kind: str = "weight", shape: tuple[int, ...] | None = None) -> Entry:
        """What the manifest says of a tensor, which must have this kind and shape (None: any)."""
        entry = self.manifest.tensors.get(name)
        if entry is None:
            raise ValueError(f"{self.folder} has no tensor {name}: the checkpoint is of another model configuration")
        if kind not in entry.shards or kind not in entry.dtypes:
            raise ValueError(f"{self.folder} has no {kind} of {name}: it was saved with another optimizer or precision")
        if shape not in (None, entry.shape):
            raise ValueError(
                f"{name} in {self.folder} has shape {entry.shape}, the model needs {shape}: "
                "the checkpoint is of another model configuration"
            )
        return entry

    def _file_with(self, key: str, dtype: torch.dtype, shard: Shard) -> TensorFile:
        """A shard's file; ValueError where it does not have what the manifest says."""
        file = self._open(shard.file)
        found = file.tensors.get(key)
        if found is None or found[:2] != (dtype, shard.part.values):
            said = "nothing" if found is None else f"{found[1]} values of {found[0]}"
            raise ValueError(
                f"{file.path} has {said} under {key} where {MANIFEST} says {shard.part.values} values of {dtype}: "
                "the checkpoint is not whole, take another"
            )
        return file

    def _open(self, name: str) -> TensorFile:
        if name not in self._files:
            if len(self._files) >= _OPEN_FILES:  # the one that was opened first
                self._close(next(iter(self._files)))
            about = self.manifest.files[name]
            self._files[name] = TensorFile(self.folder / name, about, trusted=self._trusted)
        return self._files[name]

    def _close(self, name: str) -> None:
        file = self._files.pop(name)
        self._bytes_read += file.bytes_read
        file.close()


def load_weights(module: nn.Module, reader: Reader, axis: Axis) -> None:
    """Fill a module's parameters with their slices.  Parameters must be whole (not partitioned by ZeRO 3)."""
    wanted = []
    for name, parameter in module.named_parameters():
        logical, values = logical_of(parameter), parameter.detach().view(-1)
        part = Part.of_rank(logical, axis)
        assert len(values) == part.values or logical.dim == 0, "padding is at the end"
        values[part.values :] = 0
        wanted.append(Wanted("weight", logical_name(name, parameter), part, values[: part.values]))
    reader.read_all(wanted)
