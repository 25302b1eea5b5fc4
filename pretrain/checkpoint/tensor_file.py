"""Safetensors files (https://github.com/huggingface/safetensors, "Format") written as a stream and read by the range.

The library writes a file from tensors that are all in memory, and checks nothing that it reads.  Here a file is written
tensor by tensor, with a checksum of every ``BLOCK`` of it, and any range of values is read with the checksums of the
blocks that it lies in.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...parallel.parts import end_to_end
from ..checksums import BLOCK, Checksums, checksum, digits_of, of_block
from ..files import sync

_AT_ONCE = 16 * BLOCK  # what is read before it is verified: as much as a processor's cache holds
_BEHIND = 64 * BLOCK  # what is written before the system is asked to bring it to the disk
_LONGEST_HEADER = 100_000_000  # bytes; as the library has it
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def open_tensors(path: Path, remedy: str) -> Any:
    """A safetensors file of somebody else's, to read from.  OSError where it cannot be opened; ValueError, with the
    ``remedy``, where it is damaged."""
    with path.open("rb"):  # of a file without rights safetensors says that it does not exist
        pass
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from None


def values_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy().data)


# Writing.


class _Checked:
    """A file being written, and the checksums of its blocks so far."""

    @staticmethod
    @contextlib.contextmanager
    def open(path: Path) -> Iterator[_Checked]:
        """A new file, flushed to the disk when the block ends."""
        with _naming(path), path.open("wb", buffering=0) as file:
            checked = _Checked(file)
            yield checked
            checked.finish()
            os.fsync(file.fileno())

    @property
    def about(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"bytes": self.size, "checksums": self.checksums}

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.checksums = file, 0, ""
        self._checksums, self._sent = Checksums(), 0

    def write(self, content: bytes | memoryview) -> None:
        view = memoryview(content)
        self.size += len(view)
        while len(view):
            part = view[: self.file.write(view[:BLOCK])]  # a raw file may take less than it is given
            self._checksums.update(part)
            view = view[len(part) :]
            if self.size - len(view) - self._sent >= _BEHIND:
                self._send(self.size - len(view))

    def _send(self, end: int) -> None:
        """Have what was written so far brought to the disk meanwhile, and what is there leave the page cache: nobody
        reads it soon, the flush at the end finds little left, and the same pages are written to again and again instead
        of ever new ones (5 GB on a virtual machine: 2.4 s instead of 13)."""
        if hasattr(os, "posix_fadvise"):  # not on every system
            os.posix_fadvise(self.file.fileno(), 0, end, os.POSIX_FADV_DONTNEED)
        self._sent = end

    def finish(self) -> None:
        self.checksums = self._checksums.finish()


def write_stream(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """One safetensors file of these tensors, each of them ``read`` when its turn comes; flushed to the disk.

    Returns what a manifest says of it: {"bytes", "checksums"}, the latter those of all its blocks, end to end.  OSError
    where it cannot be written; AssertionError where ``read`` gives another dtype or shape.
    """
    # Sorted by the size of an element, so that every tensor is aligned to its own.
    names = sorted(shapes, key=lambda name: -shapes[name][0].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        dtype, shape = shapes[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _Checked.open(path) as checked:
        checked.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = read(name)
            assert (tensor.dtype, tuple(tensor.shape)) == shapes[name], f"{name}: {tensor.dtype} {tuple(tensor.shape)}"
            checked.write(values_of(tensor.contiguous()))
            del tensor  # before the next one is there
    return checked.about


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """``write_stream`` of tensors that are in memory."""
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_stream(path, shapes, lambda name: tensors[name], metadata)


def copy_checked(files: Iterable[Path], target: Path) -> dict[str, dict[str, Any]]:
    """Copy files into a new folder, flushed to the disk; what a manifest says of them.  OSError where one cannot be
    read or written."""
    target.mkdir()
    copied: dict[str, dict[str, Any]] = {}
    for file in sorted(files):
        with _Checked.open(target / file.name) as checked:
            checked.write(file.read_bytes())
        copied[file.name] = checked.about
    sync(target)
    return copied


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An error of the system inside names the file: a write that fails does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:  # else it has words of its own
            error.filename = str(path)
        raise


# Reading.


class CheckedFile:
    """A file of a checkpoint, to be verified.  ``about``: what the manifest says of it.  ValueError where it is
    damaged, missing or none, OSError where it cannot be read.

    It may be a link, as caches of downloads have them: what is read is verified.  Devices and pipes are not opened.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self.size, self._checksums = int(about["bytes"]), str(about["checksums"])
        self.bytes_read = 0
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise ValueError(f"{path} is no file: the checkpoint is not whole, take another")
            self._file = path.open("rb", buffering=0)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{path} is missing: the checkpoint is not whole, take another") from None
        found = os.fstat(self._file.fileno()).st_size
        if found != self.size or len(self._checksums) != digits_of(self.size):
            raise self._damage(f"it has {found} bytes, {self.size} were written")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def verify(self) -> None:
        """Read all of it and compare the checksums."""
        buffer = torch.empty(_AT_ONCE, dtype=torch.uint8)
        for begin in range(0, self.size, len(buffer)):
            self._read_checked(begin, min(begin + len(buffer), self.size), buffer)

    def _read_checked(self, begin: int, end: int, buffer: Tensor) -> None:
        """Whole blocks, from byte ``begin``, into the beginning of ``buffer``."""
        self._read_raw(begin, buffer[: end - begin])
        content = values_of(buffer)
        for start in range(begin, end, BLOCK):
            number = start // BLOCK
            block = content[start - begin : min(start + BLOCK, end) - begin]
            if checksum(block) != of_block(self._checksums, number):
                raise self._damage(f"bytes {start} to {min(start + BLOCK, end)} are not those that were written")

    def _read_raw(self, begin: int, into: Tensor) -> None:
        view = values_of(into)
        while len(view):
            with _naming(self.path):
                count = os.preadv(self._file.fileno(), [view[: 2**30]], begin)
            if count == 0:
                raise self._damage("it has become shorter")
            self.bytes_read += count
            begin, view = begin + count, view[count:]

    def _damage(self, reason: str) -> ValueError:
        return ValueError(f"{self.path} is damaged ({reason}): take another checkpoint")


class TensorFile(CheckedFile):
    """A file that ``write_stream`` wrote.

    Of a ``trusted`` one, all of which was verified a moment ago, no more than the bytes that are asked for are read; of
    others the blocks that these lie in.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], *, trusted: bool = False) -> None:
        super().__init__(path, about)
        self.trusted = trusted
        self.tensors = self._header()

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name][0]

    def read(self, name: str, begin: int, end: int) -> Tensor:
        """Values [begin, end) of a tensor, flattened: a new tensor of one dimension."""
        dtype = self.dtype(name)
        first, last = self._bytes(name, begin, end)
        if self.trusted:
            values = torch.empty(end - begin, dtype=dtype)
            self._read_raw(first, values.view(torch.uint8))
            return values
        from_block, to_block = first // BLOCK * BLOCK, min(-(-last // BLOCK) * BLOCK, self.size)
        buffer = torch.empty(to_block - from_block, dtype=torch.uint8)
        self._read_checked(from_block, to_block, buffer)
        return buffer[first - from_block : last - from_block].view(dtype)

    def read_into(self, name: str, begin: int, target: Tensor) -> None:
        """Values from ``begin`` on, into a contiguous tensor of the same dtype in host memory, straight from the
        disk."""
        assert target.dtype == self.dtype(name)
        first, last = self._bytes(name, begin, begin + target.numel())
        into = target.view(-1).view(torch.uint8)
        if self.trusted:
            self._read_raw(first, into)
            return
        # Blocks that lie in it as a whole are verified where they come to lie; the others take a way round.
        inner, end = -(-first // BLOCK) * BLOCK, last // BLOCK * BLOCK
        if inner >= end:
            into.copy_(self.read(name, begin, begin + target.numel()).view(torch.uint8))
            return
        for start in range(inner, end, _AT_ONCE):
            stop = min(start + _AT_ONCE, end)
            self._read_checked(start, stop, into[start - first : stop - first])
        edge = torch.empty(BLOCK, dtype=torch.uint8)
        if first < inner:
            self._read_checked(inner - BLOCK, inner, edge)
            into[: inner - first] = edge[first - inner :]
        if end < last:
            self._read_checked(end, min(end + BLOCK, self.size), edge)
            into[end - first :] = edge[: last - end]

    def _bytes(self, name: str, begin: int, end: int) -> tuple[int, int]:
        dtype, values, offset = self.tensors[name]
        if not 0 <= begin <= end <= values:
            raise self._damage(f"{name} has {values} values, {begin} to {end} are needed")
        return offset + begin * dtype.itemsize, offset + end * dtype.itemsize

    def _header(self) -> dict[str, tuple[torch.dtype, int, int]]:
        """name → (dtype, number of values, where they begin in the file)."""
        prefix = self._read_block_range(0, min(8, self.size))
        length = int.from_bytes(prefix, "little")
        if length > min(_LONGEST_HEADER, self.size - 8):
            raise self._damage("its header is longer than the file")
        text = self._read_block_range(8, 8 + length)
        try:
            header = json.loads(text.decode(), object_pairs_hook=_without_twins)
            return _tensors_of(header, 8 + length, self.size)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._damage("its header is none of safetensors") from None

    def _read_block_range(self, begin: int, end: int) -> bytes:
        """These bytes, verified with the blocks that they lie in where they are not trusted."""
        if self.trusted:
            exact = torch.empty(end - begin, dtype=torch.uint8)
            self._read_raw(begin, exact)
            return bytes(values_of(exact))
        first, last = begin // BLOCK * BLOCK, min(-(-end // BLOCK) * BLOCK, self.size)
        buffer = torch.empty(last - first, dtype=torch.uint8)
        self._read_checked(first, last, buffer)
        return bytes(values_of(buffer[begin - first : end - first]))


def _tensors_of(header: dict[str, Any], start: int, size: int) -> dict[str, tuple[torch.dtype, int, int]]:
    """What a header describes, whose data are the bytes from ``start`` to ``size``: name → (dtype, number of values,
    where they begin in the file).  ValueError, KeyError, TypeError or AttributeError where it is none."""
    found: dict[str, tuple[torch.dtype, int, int]] = {}
    ranges = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError(f"{name}: no numbers of bytes or values")
        values = math.prod(shape)
        if end - begin != values * dtype.itemsize or (start + begin) % dtype.itemsize:
            raise ValueError(f"{name}: of another size, or not aligned")
        ranges.append((begin, end))
        found[name] = (dtype, values, start + begin)
    if not end_to_end(sorted(ranges), size - start):
        raise ValueError("tensors that are not end to end")
    return found


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where a key is in it twice."""
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a key is there twice")
    return found
