"""A prepared dataset on disk: token ids in memory-mapped shards, with one index of document offsets per split.

dataset.json                 manifest, written last
tokenizer/                   a Hugging Face tokenizer folder
train/00000.bin ...          token ids, little-endian uint16 or uint32, documents end to end, without special tokens
train/index.npy              int64 [documents + 1], where each document starts in the shards laid end to end
validation/...               the same
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..files import read_mapping, replacing, write_json
from .hashing import Int64

FORMAT = "farspan-tokens"
VERSION = 1
MANIFEST = "dataset.json"
INDEX = "index.npy"
TOKENIZER = "tokenizer"
SPLITS = ("train", "validation")

# Entries looked at together where a whole array is gone through.
_SCAN = 1 << 24

Tokens = npt.NDArray[np.unsignedinteger[Any]]


def token_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """The narrowest stored type that holds every id below ``vocabulary_size``."""
    return np.dtype("<u2") if vocabulary_size <= 1 << 16 else np.dtype("<u4")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read ``dataset.json``; a folder without one, a damaged one, or one of another version is a ``ValueError``."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a prepared dataset (it has no {MANIFEST}): run `farspan prepare` to make one, "
            "or run it again if it was interrupted"
        )
    manifest = read_mapping(path, "a prepared dataset", "prepare the data again")
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise ValueError(
            f"{path} has format {manifest.get('format')!r} version {manifest.get('version')!r}, this Farspan reads "
            f"{FORMAT!r} version {VERSION}: prepare the data again"
        )
    if problem := _find_damage(manifest):
        raise ValueError(f"{path} is damaged ({problem}): prepare the data again")
    return manifest


def _find_damage(manifest: dict[str, Any]) -> str | None:
    """What the reader needs and the manifest does not say, if anything."""
    if manifest.get("dtype") not in ("<u2", "<u4"):
        return f"dtype is {manifest.get('dtype')!r}, not '<u2' or '<u4'"
    if not isinstance(manifest.get("vocabulary_size", 1), int):
        return "vocabulary_size is no number"
    if not isinstance(manifest.get("splits"), dict):
        return "it names no splits"
    for split, described in manifest["splits"].items():
        try:
            counts = [described["documents"], described["tokens"], *(shard["tokens"] for shard in described["shards"])]
            names = [shard["file"] for shard in described["shards"]]
        except (KeyError, TypeError):
            return f"split {split!r} lacks documents, tokens or shards"
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            return f"split {split!r} has a count that is no number"
        if not all(isinstance(name, str) for name in names):
            return f"split {split!r} has a shard without a name"
    return None


def tokenizer_digest(folder: str | Path) -> str | None:
    """SHA-256 of the ``tokenizer.json`` that lies with a dataset; None where there is none."""
    path = Path(folder) / TOKENIZER / "tokenizer.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


class TokenStore:
    """One split of a prepared dataset, read-only.

    Args:
        folder: what ``farspan prepare`` wrote.
        split: "train" or "validation".

    Raises:
        ValueError: in one line, for a missing or foreign manifest, an unknown or empty split, a damaged shard or index,
            another tokenizer than the one that made the tokens.
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
        made_with = manifest.get("tokenizer_sha256")  # not in manifests of Farspan 0.1.0.dev0
        if made_with is not None and made_with != tokenizer_digest(folder):
            raise ValueError(
                f"{self.folder / TOKENIZER} is not the tokenizer that the tokens of {folder} were made with: "
                "put that one back, or prepare the data again"
            )
        dtype = np.dtype(manifest["dtype"])
        self._vocabulary_size: int = manifest.get("vocabulary_size", np.iinfo(dtype).max + 1)
        self._paths = [self.folder / shard["file"] for shard in described["shards"]]
        self._shards = [
            _open_shard(path, shard["tokens"], dtype)
            for path, shard in zip(self._paths, described["shards"], strict=True)
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
        if offsets.dtype != np.int64 or not _ascends_from_0(offsets):
            raise ValueError(f"index {path} is damaged (no ascending int64 offsets): prepare the data again")
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
        tokens = np.concatenate(pieces, dtype=np.int64) if pieces else np.zeros(0, np.int64)
        if tokens.size and tokens.max() >= self._vocabulary_size:
            raise self._foreign_token()
        return tokens

    def _foreign_token(self) -> ValueError:
        """What to say of the first token id that is outside of the vocabulary."""
        for path, shard in zip(self._paths, self._shards, strict=True):
            for start in range(0, shard.size, _SCAN):
                found = np.flatnonzero(shard[start : start + _SCAN] >= self._vocabulary_size)
                if found.size:
                    place = start + int(found[0])
                    return ValueError(
                        f"shard {path} is damaged (its token {place} is {shard[place]}, {MANIFEST} says that ids are "
                        f"below {self._vocabulary_size}): prepare the data again"
                    )
        raise AssertionError("every token is in the vocabulary")

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
            for start in range(0, shard.size, _SCAN):
                part = np.bincount(shard[start : start + _SCAN], minlength=counts.size)
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


def _ascends_from_0(offsets: Int64) -> bool:
    parts = (offsets[start : start + _SCAN + 1] for start in range(0, offsets.size, _SCAN))
    return bool(offsets[0] == 0) and all(bool((part[1:] >= part[:-1]).all()) for part in parts)


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
    """Write ``dataset.json``, which makes the folder a finished dataset, from its tokenizer and shards."""
    content = {"format": FORMAT, "version": VERSION, "dtype": dtype.str, "splits": dict(splits)}
    content |= {"tokenizer_sha256": tokenizer_digest(folder), **described}
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
    write_manifest(folder, described, dtype, vocabulary_size=vocabulary_size)
