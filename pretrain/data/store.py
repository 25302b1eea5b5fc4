"""A prepared dataset on disk: token ids in shards, with one index of document offsets per split.

dataset.json                 manifest, written last, with checksums of every MiB of shards and indices
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

from ..checksums import Checksums, digits_of, of_file
from ..files import read_mapping, replacing, write_json
from .hashing import Int64
from .shard import OpenFiles, Shard, Tokens

FORMAT = "farspan-tokens"
VERSION = 1
MANIFEST = "dataset.json"
INDEX = "index.npy"
TOKENIZER = "tokenizer"
SPLITS = ("train", "validation")

# Entries looked at together where a whole array is gone through.
_SCAN = 1 << 24
# Bytes from which an index is mapped, and shared by the processes of a machine; a smaller one is read.
_MAPPED = 1 << 26


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
        width = np.dtype(manifest["dtype"]).itemsize
        known = [(shard.get("checksums"), digits_of(shard["tokens"] * width)) for shard in described["shards"]]
        index = described.get("index_checksums")  # of manifests before there were any, neither
        if not all(said is None or (isinstance(said, str) and len(said) == digits) for said, digits in known):
            return f"split {split!r} has a shard with checksums of another size"
        if not (index is None or isinstance(index, str)):
            return f"split {split!r} has no checksums of its index"
    return None


def tokenizer_digest(folder: str | Path) -> str | None:
    """SHA-256 of the ``tokenizer.json`` that lies with a dataset; None where there is none."""
    path = Path(folder) / TOKENIZER / "tokenizer.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


class TokenStore:
    """One split of a prepared dataset, read-only.  What is read is compared with the checksums of ``dataset.json``:
    the index at once, a shard's block the first time that it is touched.

    Args:
        folder: what ``farspan prepare`` wrote.
        split: "train" or "validation".
        share: (n, of how many): of the shards only every so manieth is looked at now, from number n on, for that there
            are others who look at the rest; what is wrong with one of those is said when it is read.

    Raises:
        ValueError: in one line, for a missing or foreign manifest, an unknown or empty split, a damaged shard or index,
            another tokenizer than the one that made the tokens.  Methods that read raise it, and OSError, as
            ``Shard`` does.

    Attributes:
        checked: False where the manifest, of an older Farspan, has no checksums.
    """

    def __init__(self, folder: str | Path, split: str = "train", *, share: tuple[int, int] = (0, 1)) -> None:
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
        files = OpenFiles()
        self._shards = [
            Shard(self.folder / shard["file"], shard["tokens"], dtype, shard.get("checksums"), files)
            for shard in described["shards"]
        ]
        for shard in self._shards[share[0] :: share[1]]:
            shard.check()
        self.checked = all("checksums" in shard for shard in described["shards"])
        self._shard_starts = np.cumsum([0] + [shard.size for shard in self._shards]).tolist()
        self.offsets: Int64 = self._open_index(self.folder / split / INDEX, described.get("index_checksums"))

    def _open_index(self, path: Path, checksums: str | None) -> Int64:
        try:
            damaged = checksums is not None and of_file(path) != checksums
            offsets = np.load(path, mmap_mode="r" if path.stat().st_size >= _MAPPED else None)
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"index {path} cannot be read ({error}): prepare the data again") from None
        if (
            offsets.shape != (self.documents + 1,)
            or offsets[-1] != self.tokens
            or self._shard_starts[-1] != self.tokens
        ):
            raise ValueError(f"index {path} does not agree with {MANIFEST}: prepare the data again")
        if damaged:
            raise ValueError(
                f"index {path} is damaged (it is not what was written): put a whole copy in its place, or prepare the "
                "data again"
            )
        if offsets.dtype != np.int64 or not _ascends_from_0(offsets):
            raise ValueError(f"index {path} is damaged (no ascending int64 offsets): prepare the data again")
        return offsets.view(np.ndarray)

    def document(self, index: int) -> Tokens:
        """Token ids of one document, without special tokens, in the stored type."""
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index} of {self.documents}")
        start, stop = self.offsets[index : index + 2].tolist()
        pieces = self._pieces(start, stop - start)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces) if pieces else self._shards[0].read(0, 0)

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
        for shard in self._shards:
            for start in range(0, shard.size, _SCAN):
                part = shard.read(start, start + _SCAN)
                found = np.flatnonzero(part >= self._vocabulary_size)
                if found.size:
                    place = int(found[0])
                    return ValueError(
                        f"shard {shard.path} is damaged (its token {start + place} is {part[place]}, {MANIFEST} says "
                        f"that ids are below {self._vocabulary_size}): prepare the data again"
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
            piece = self._shards[shard].read(first, first + length)
            pieces.append(piece)
            start += piece.size
            length -= piece.size
        return pieces

    def unigram_entropy(self) -> float:
        """Entropy in nats of the split's token frequencies: the loss of the best model that ignores all context."""
        counts = np.zeros(0, np.int64)
        for shard in self._shards:
            for start in range(0, shard.size, _SCAN):
                part = np.bincount(shard.read(start, start + _SCAN), minlength=counts.size)
                part[: counts.size] += counts
                counts = part
        share = counts[counts > 0] / self.tokens
        return -math.fsum((share * np.log(share)).tolist())


def _ascends_from_0(offsets: Int64) -> bool:
    parts = (offsets[start : start + _SCAN + 1] for start in range(0, offsets.size, _SCAN))
    return bool(offsets[0] == 0) and all(bool((part[1:] >= part[:-1]).all()) for part in parts)


def write_shard(path: Path, documents: Sequence[Tokens], dtype: np.dtype[Any]) -> tuple[Int64, str]:
    """Write documents end to end into ``path``, atomically; returns their lengths, int64 [documents], and the checksums
    of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    checksums = Checksums()
    with replacing(path) as file:
        for document in documents:
            content = np.ascontiguousarray(document, dtype).tobytes()
            checksums.update(content)
            file.write(content)
    return np.array([len(document) for document in documents], np.int64), checksums.finish()


def write_index(folder: Path, split: str, lengths: Sequence[Int64], checksums: Sequence[str]) -> dict[str, Any]:
    """Write a split's index from the document lengths of its shards 00000.bin, 00001.bin, ...; describe the split, with
    the ``checksums`` of the shards."""
    sizes = np.concatenate([np.zeros(1, np.int64), *lengths])
    (folder / split).mkdir(parents=True, exist_ok=True)
    with replacing(folder / split / INDEX) as file:
        np.save(file, np.cumsum(sizes))
    shards = [
        {"file": shard_name(split, number), "documents": len(part), "tokens": int(part.sum()), "checksums": said}
        for number, (part, said) in enumerate(zip(lengths, checksums, strict=True))
    ]
    described = {"documents": len(sizes) - 1, "tokens": int(sizes.sum()), "shards": shards}
    return described | {"index_checksums": of_file(folder / split / INDEX)}


def shard_name(split: str, number: int) -> str:
    return f"{split}/{number:05d}.bin"


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
        arrays = [[np.asarray(document, dtype) for document in shard] for shard in shards]
        written = [write_shard(folder / shard_name(split, n), array, dtype) for n, array in enumerate(arrays)]
        described[split] = write_index(folder, split, [one[0] for one in written], [one[1] for one in written])
    write_manifest(folder, described, dtype, vocabulary_size=vocabulary_size)
