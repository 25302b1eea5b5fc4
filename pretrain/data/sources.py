"""Where text comes from: files and datasets, cut into shards by a rule that depends on them alone."""

from __future__ import annotations

import dataclasses
import functools
import glob
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

FORMATS = ("text", "jsonl", "parquet", "dataset")
SEPARATORS = ("blank-line", "line", "file")
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MEBIBYTE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Reading:
    """How sources are read: ``format`` None goes by the name; the rest as the options of ``farspan prepare``."""

    format: str | None = None
    text_field: str = "text"
    document_separator: str = "blank-line"
    dataset_config: str | None = None
    dataset_split: str = "train"


@dataclasses.dataclass(frozen=True)
class Source:
    """One file or dataset.  ``size`` is in bytes, ``units`` in what it can be cut by: bytes, row groups or rows."""

    format: str
    path: str
    size: int
    units: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """The documents of a source that start in [start, stop) of its units."""

    source: Source
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes, about."""
        return self.source.size * (self.stop - self.start) // max(self.source.units, 1)


def find_sources(inputs: Sequence[str | Path], reading: Reading) -> list[Source]:
    """Look up files, globs (sorted) and dataset names.

    Raises:
        ValueError: an unknown format or separator, a glob without a match, a compressed file.
    """
    if reading.format not in (None, *FORMATS):
        raise ValueError(f"unknown format {reading.format!r}: choose one of {', '.join(FORMATS)}")
    if reading.document_separator not in SEPARATORS:
        raise ValueError(f"unknown separator {reading.document_separator!r}: choose one of {', '.join(SEPARATORS)}")
    if not inputs:
        raise ValueError("no input: name files, globs or a dataset")
    return [source for given in inputs for source in _expand(str(given), reading)]


def _expand(given: str, reading: Reading) -> list[Source]:
    path = Path(given)
    if reading.format == "dataset" or (reading.format is None and path.is_dir()):
        return [_dataset_source(given, reading)]
    if path.is_file():
        names = [given]
    elif glob.has_magic(given):
        # Path.glob takes no absolute pattern.
        names = sorted(name for name in glob.glob(given, recursive=True) if Path(name).is_file())  # noqa: PTH207
        if not names:
            raise ValueError(f"input {given!r} matches no file")
    elif path.is_dir():
        raise ValueError(f"input {given} is a folder: name its files, as in '{given}/*', or say --format dataset")
    elif reading.format is None and not path.suffix and not path.is_absolute():
        return [_dataset_source(given, reading)]
    else:
        raise ValueError(
            f"input {given} is no file or folder: check the path, or say --format dataset for a name on the hub"
        )
    return [_file_source(name, reading) for name in names]


def _file_source(name: str, reading: Reading) -> Source:
    path = Path(name)
    if path.suffix in _COMPRESSED:
        raise ValueError(f"input {name} is compressed: unpack it first")
    kind = reading.format or _SUFFIXES.get(path.suffix, "text")
    size = path.stat().st_size
    if kind == "parquet":
        return Source(kind, name, size, _open_parquet(name).metadata.num_row_groups)
    return Source(kind, name, size, size)


def _dataset_source(name: str, reading: Reading) -> Source:
    dataset = _load_dataset(name, reading)
    return Source("dataset", name, dataset.data.nbytes, len(dataset))


def plan_shards(sources: Sequence[Source], reading: Reading, shard_bytes: int | None = None) -> list[list[Piece]]:
    """Cut the sources, in order, into shards of about ``shard_bytes``.

    By default 1/1024 of the whole, at least 1 MiB and at most 256 MiB.  The result depends on nothing but the sources.
    """
    whole = sum(source.size for source in sources)
    limit = shard_bytes or min(max(whole // 1024, _MEBIBYTE), 256 * _MEBIBYTE)
    shards: list[list[Piece]] = [[]]
    filled = 0
    for source in sources:
        # A file that is one document is not cut.
        one = source.format == "text" and reading.document_separator == "file"
        bytes_per_unit = max(source.size, 1) / max(source.units, 1)
        start = 0
        while start < source.units:
            room = source.units if one else max(int((limit - filled) / bytes_per_unit), 1)
            piece = Piece(source, start, min(start + room, source.units))
            shards[-1].append(piece)
            filled += piece.size
            start = piece.stop
            if filled + bytes_per_unit > limit:
                shards.append([])
                filled = 0
    return [shard for shard in shards if shard]


def read_documents(piece: Piece, reading: Reading) -> Iterator[str]:
    """The texts of the documents that start in a piece, in order; empty ones included.

    Raises:
        ValueError: naming the place, for text that is not UTF-8, a line that is not JSON, a missing field.
    """
    path = piece.source.path
    if piece.source.format == "parquet":
        file = _open_parquet(path)
        for group in range(piece.start, piece.stop):
            column = _column(file.schema_arrow.names, reading.text_field, path)
            for value in file.read_row_group(group, columns=[column]).column(column).to_pylist():
                yield _as_text(value, reading.text_field, path)
    elif piece.source.format == "dataset":
        dataset = _load_dataset(path, reading)
        column = _column(dataset.column_names, reading.text_field, path)
        for start in range(piece.start, piece.stop, 1000):
            for value in dataset[start : min(start + 1000, piece.stop)][column]:
                yield _as_text(value, reading.text_field, path)
    elif piece.source.format == "jsonl":
        for offset, line in _lines(piece):
            if line.strip():
                yield _json_text(line, reading.text_field, f"{path} at byte {offset}")
    elif reading.document_separator == "file":
        yield _decode(Path(path).read_bytes().removeprefix(_BYTE_ORDER_MARK), path, 0)
    elif reading.document_separator == "line":
        for offset, line in _lines(piece):
            yield _decode(line, path, offset)
    else:
        yield from _paragraphs(piece)


def _lines(piece: Piece, past_end: bool = False) -> Iterator[tuple[int, bytes]]:
    """Lines, with their offsets, that start in the piece, or from there on."""
    with Path(piece.source.path).open("rb") as file:
        if piece.start:
            # The line that holds the byte before belongs to the piece before.
            file.seek(piece.start - 1)
            file.readline()
        offset = file.tell()
        while past_end or offset < piece.stop:
            line = file.readline()
            if not line:
                return
            yield offset, line if offset else line.removeprefix(_BYTE_ORDER_MARK)
            offset += len(line)


def _paragraphs(piece: Piece) -> Iterator[str]:
    """Documents between blank lines; one that starts in the piece is read to its end."""
    path = piece.source.path
    paragraph: list[bytes] = []
    begin = 0
    after_blank = _follows_blank_line(piece)
    for offset, line in _lines(piece, past_end=True):
        blank = not line.strip()
        if blank and paragraph:
            yield _decode(b"".join(paragraph), path, begin)
            paragraph = []
        if offset >= piece.stop and not paragraph:
            return
        if not blank and (paragraph or after_blank):
            begin = begin if paragraph else offset
            paragraph.append(line)
        after_blank = blank
    if paragraph:
        yield _decode(b"".join(paragraph), path, begin)


def _follows_blank_line(piece: Piece) -> bool:
    """Whether the first line that starts in the piece may begin a document."""
    if not piece.start:
        return True
    with Path(piece.source.path).open("rb") as file:
        start = _line_start(file, piece.start - 1)
        file.seek(start)
        return not file.readline().removeprefix(b"" if start else _BYTE_ORDER_MARK).strip()


def _line_start(file: IO[bytes], position: int) -> int:
    """Where the line that holds the byte at ``position`` starts."""
    end = position
    while end:
        begin = max(end - 65536, 0)
        file.seek(begin)
        newline = file.read(end - begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0


def _decode(raw: bytes, path: str, offset: int) -> str:
    try:
        return raw.decode("utf-8").replace("\r\n", "\n").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text at byte {offset + error.start}: convert it first") from None


def _json_text(line: bytes, field: str, place: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not a line of JSON: {error}") from None
    if not isinstance(value, dict) or field not in value:
        found = f"has the fields {', '.join(value)}" if isinstance(value, dict) else "is not an object"
        raise ValueError(f"{place} {found}: name the one that holds the text with --text-field, not {field!r}")
    return _as_text(value[field], field, place)


def _as_text(value: Any, field: str, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} of {place} holds {type(value).__name__}, not text: set --text-field")
    # JSON can hold half a surrogate pair, which is no character.
    return value.encode("utf-8", "replace").decode("utf-8").strip()


def _column(names: Sequence[str], field: str, path: str) -> str:
    if field not in names:
        raise ValueError(f"{path} has the fields {', '.join(names)}: name the text's with --text-field, not {field!r}")
    return field


def _open_parquet(path: str) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from None


@functools.lru_cache(maxsize=1)
def _load_dataset(name: str, reading: Reading) -> Any:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            loaded = datasets.load_from_disk(name)
            return loaded[reading.dataset_split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(name, reading.dataset_config, split=reading.dataset_split)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = f"; if it is none, name its files, as in '{name}/*'" if Path(name).is_dir() else ""
        raise ValueError(
            f"input {name} is no file, and datasets cannot load it (split {reading.dataset_split!r}): {reason}{hint}"
        ) from None
