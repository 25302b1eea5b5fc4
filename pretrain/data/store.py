"""A prepared dataset on disk: token ids in memory-mapped shards, with one index of document offsets per split.

dataset.json                 manifest, written last
tokenizer/                   a Hugging Face tokenizer folder
train/00000.bin ...          token ids, little-endian uint16 or uint32, documents end to end, without special tokens
train/index.npy              int64 [documents + 1], where each document starts in the shards laid end to end
validation/...               the same
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..files import replacing, write_json
from .hashing import Int64

FORMAT = "farspan-tokens"
VERSION = 1
MANIFEST = "dataset.json"
INDEX = "index.npy"
SPLITS = ("train", "validation")

Tokens = npt.NDArray[np.unsignedinteger[Any]]


def token_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """The narrowest stored type that holds every id below ``vocabulary_size``."""
    return np.dtype("<u2") if vocabulary_size <= 1 << 16 else np.dtype("<u4")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read ``dataset.json``; a folder without one, or of another version, is a ``ValueError``."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a prepared dataset (it has no {MANIFEST}): run `farspan prepare` to make one, "
            "or run it again if it was interrupted"
        )
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise ValueError(
            f"{path} has format {manifest.get('format')!r} version {manifest.get('version')!r}, this Farspan reads "
            f"{FORMAT!r} version {VERSION}: prepare the data again"
        )
    return dict(manifest)


class TokenStore:
    """One split of a prepared dataset, read-only.

    Args:
        folder: what ``farspan prepare`` wrote.
        split: "train" or "validation".

    Raises:
        ValueError: in one line, for a missing or foreign manifest, an unknown or empty split, a damaged shard or index.
    """

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        self.folder = Path(folder)
        self.split = split
        manifest = read_manifest(folder)
        if split not in manifest["splits"]:
            raise ValueError(f"{folder} has no split {split!r}: it has {', '.join(manifest['splits'])}")
        described = manifest["splits"][split]
        self.documents: int = described["documents"]
        self.tokens: int = described["tokens"]
        if not self.documents:
            raise ValueError(
                f"split {split!r} of {folder} has no documents: prepare it with a larger share of the text"
            )
        dtype = np.dtype(manifest["dtype"])
        self._shards = [
            _open_shard(self.folder / shard["file"], shard["tokens"], dtype) for shard in described["shards"]
        ]
        self._shard_starts = np.cumsum([0] + [shard.size for shard in self._shards]).tolist()
        self.offsets: Int64 = self._open_index(self.folder / split / INDEX)

    def _open_index(self, path: Path) -> Int64:
        try:
            offsets = np.load(path, mmap_mode="r")
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"index {path} cannot be read ({error}): prepare the data again") from None
        if (
            offsets.shape != (self.documents + 1,)
            or offsets[-1] != self.tokens
            or self._shard_starts[-1] != self.tokens
        ):
            raise ValueError(f"index {path} does not agree with {MANIFEST}: prepare the data again")
        return offsets.view(np.ndarray)

    def document(self, index: int) -> Tokens:
        """Token ids of one document, without special tokens, in the stored type."""
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index} of {self.documents}")
        start, stop = self.offsets[index : index + 2].tolist()
        pieces = self._pieces(start, stop - start)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces) if pieces else self._shards[0][:0]

    def read(self, starts: Int64, lengths: Int64) -> Int64:
        """Tokens of the ranges [start, start + length) of the split's stream, one after the other.

        A range that runs past the end goes on at the beginning.  Returns int64 [sum of lengths].
        """
        pieces = [
            piece
            for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
            for piece in self._pieces(start, length)
        ]
        return np.concatenate(pieces, dtype=np.int64) if pieces else np.zeros(0, np.int64)

    def _pieces(self, start: int, length: int) -> list[Tokens]:
        pieces = []
        while length > 0:
            shard = bisect.bisect_right(self._shard_starts, start) - 1
            if shard == len(self._shards):  # past the end
                start = 0
                continue
            first = start - self._shard_starts[shard]
            piece = self._shards[shard][first : first + length]
            pieces.append(piece)
            start += piece.size
            length -= piece.size
        return pieces

    def unigram_entropy(self) -> float:
        """Entropy in nats of the split's token frequencies: the loss of the best model that ignores all context."""
        counts = np.zeros(0, np.int64)
        for shard in self._shards:
            for start in range(0, shard.size, 1 << 24):
                part = np.bincount(shard[start : start + (1 << 24)], minlength=counts.size)
                part[: counts.size] += counts
                counts = part
        share = counts[counts > 0] / self.tokens
        return -math.fsum((share * np.log(share)).tolist())


def _open_shard(path: Path, tokens: int, dtype: np.dtype[Any]) -> Tokens:
    expected = tokens * dtype.itemsize
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        found = "is missing" if size is None else f"has {size} bytes"
        raise ValueError(f"shard {path} {found}, {MANIFEST} says {expected} bytes: prepare the data again")
    if not tokens:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    # A plain array over the map: slices of np.memmap itself cost several times more.
    return np.memmap(path, dtype, "r").view(np.ndarray)


def write_shard(path: Path, documents: Sequence[Tokens], dtype: np.dtype[Any]) -> Int64:
    """Write documents end to end into ``path``, atomically; returns their lengths, int64 [documents]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        for document in documents:
            file.write(np.ascontiguousarray(document, dtype).tobytes())
    return np.array([len(document) for document in documents], np.int64)


def write_index(folder: Path, split: str, lengths: Sequence[Int64]) -> dict[str, Any]:
    """Write a split's index from the document lengths of its shards 00000.bin, 00001.bin, ...; describe the split."""
    sizes = np.concatenate([np.zeros(1, np.int64), *lengths])
    (folder / split).mkdir(parents=True, exist_ok=True)
    with replacing(folder / split / INDEX) as file:
        np.save(file, np.cumsum(sizes))
    shards = [
        {"file": f"{split}/{number:05d}.bin", "documents": len(part), "tokens": int(part.sum())}
        for number, part in enumerate(lengths)
    ]
    return {"documents": len(sizes) - 1, "tokens": int(sizes.sum()), "shards": shards}


def write_manifest(folder: Path, splits: Mapping[str, Any], dtype: np.dtype[Any], **described: Any) -> None:
    """Write ``dataset.json``, which makes the folder a finished dataset."""
    content = {"format": FORMAT, "version": VERSION, "dtype": dtype.str, "splits": dict(splits), **described}
    write_json(folder / MANIFEST, content)


def write_dataset(
    folder: str | Path, splits: Mapping[str, Sequence[Sequence[Sequence[int]]]], vocabulary_size: int
) -> None:
    """Write a whole dataset of token ids, given as split → shards → documents, without a tokenizer folder."""
    folder, dtype = Path(folder), token_dtype(vocabulary_size)
    described = {}
    for split, shards in splits.items():
        paths = [folder / split / f"{number:05d}.bin" for number in range(len(shards))]
        arrays = [[np.asarray(document, dtype) for document in shard] for shard in shards]
        described[split] = write_index(
            folder, split, [write_shard(p, a, dtype) for p, a in zip(paths, arrays, strict=True)]
        )
    write_manifest(folder, described, dtype)
