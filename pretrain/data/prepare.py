"""``farspan prepare``: text to token shards, in parallel processes, resumable.

While it works, the folder holds ``settings.json`` and ``.partial/``, with the document lengths of each finished shard.
An error leaves it so, to go on from, or no folder at all if it was new and nothing is finished.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ...version import __version__
from ..checksums import of_file
from ..files import parents_of, read_mapping, replacing, write_json
from .hashing import Int64, hash64, uniform
from .sources import FORMATS, SEPARATORS, Piece, Reading, find_sources, plan_shards, read_documents
from .store import (
    MANIFEST,
    SPLITS,
    TOKENIZER,
    read_manifest,
    shard_name,
    token_dtype,
    write_index,
    write_manifest,
    write_shard,
)
from .tokenizer import TOKENIZER_FILE, TOKENIZER_KINDS, Encoder, Vocabulary, copy_tokenizer, train_tokenizer

_SETTINGS = "settings.json"
_PARTIAL = ".partial"
_CHECKSUMS = "_checksums"
# Purposes of random words.
_SPLIT, _SHUFFLE, _SAMPLE = range(200, 203)
# A tokenizer learns from at most this much text, drawn from the whole input.
_TRAINING_BYTES = 1 << 30
_ENCODE_CHARACTERS = 1 << 22


@dataclasses.dataclass(frozen=True)
class _Job:
    """One shard: what a process needs to make it."""

    out: Path
    number: int
    pieces: tuple[Piece, ...]
    reading: Reading
    validation_fraction: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.number:05d}"

    @property
    def lengths_file(self) -> Path:
        """Document lengths of the shard, and its checksums, by split: it is there when the shard is finished."""
        return self.out / _PARTIAL / f"{self.name}.npz"

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    def documents(self) -> Iterator[str]:
        texts = (text for piece in self.pieces for text in read_documents(piece, self.reading))
        return (text for text in texts if text)

    def is_validation(self, documents: Int64) -> Any:
        """Which documents of the shard, by number, are set aside, as booleans."""
        return uniform(hash64(self.seed, _SPLIT, self.number, documents)) < self.validation_fraction


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    reading: Reading = Reading(),  # noqa: B008 (frozen)
    tokenizer: str | Path | None = None,
    train_kind: str | None = None,
    vocab_size: int = 32768,
    lowercase: bool = False,
    validation_fraction: float = 0.01,
    seed: int = 0,
    processes: int | None = None,
    shard_bytes: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenize text into a dataset folder; see ``store`` for what it holds.

    The same settings on the same folder go on where an earlier call stopped.  The result does not depend on the number
    of processes.

    Args:
        inputs: files, globs, folders or names of datasets.
        out: folder to make.
        reading: how the inputs are read.
        tokenizer: a Hugging Face tokenizer folder (or a name that transformers knows); else one is trained.
        train_kind: "bpe" (default), "wordpiece" or "unigram".
        vocab_size, lowercase: of a trained tokenizer.
        validation_fraction: share of the documents that make the validation split, in [0, 1).
        seed: of the split and of the order of documents.
        processes: how many work in parallel; None takes every core this process may use.
        shard_bytes: text per shard, see ``plan_shards``.
        progress: show progress bars, where stderr is a terminal.

    Returns:
        The manifest, as in ``dataset.json``.

    Raises:
        ValueError: in one line, for settings or inputs that do not work, or a folder made with other settings.
        OSError: the folder cannot be written, or the disk is full.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}: set it to 0 or more, and below 1")
    if tokenizer is not None and train_kind is not None:
        raise ValueError("a tokenizer is either given or trained: drop --tokenizer or --train-tokenizer")
    if processes is not None and processes < 1:
        raise ValueError(f"processes is {processes}: set it to 1 or more")
    out = Path(out)
    kind = train_kind or "bpe"
    if kind not in TOKENIZER_KINDS:
        raise ValueError(f"unknown tokenizer kind {kind!r}: choose one of {', '.join(TOKENIZER_KINDS)}")
    if tokenizer is not None and (Path(tokenizer) / TOKENIZER_FILE).is_file():
        Vocabulary.from_folder(tokenizer)  # says what is wrong with it before anything is made
    sources = find_sources(inputs, reading)
    progress = progress and sys.stderr.isatty()
    trained = {"kind": kind, "vocab_size": vocab_size, "lowercase": lowercase}
    settings: dict[str, Any] = {
        "inputs": [dataclasses.asdict(source) for source in sources],
        "reading": dataclasses.asdict(reading),
        "tokenizer": trained if tokenizer is None else _describe_tokenizer(tokenizer),
        "validation_fraction": validation_fraction,
        "seed": seed,
        "shard_bytes": shard_bytes,
    }
    with parents_of(out), _removed_if_nothing_is_made(out):
        finished = _claim(out, settings)
        if finished is not None:
            return finished
        shards = plan_shards(sources, reading, shard_bytes)
        jobs = [
            _Job(out, number, tuple(pieces), reading, validation_fraction, seed) for number, pieces in enumerate(shards)
        ]
        if not (out / TOKENIZER).exists():
            _make_tokenizer(out, jobs, tokenizer, trained, progress)
        vocabulary = Vocabulary.from_folder(out / TOKENIZER)
        _tokenize(jobs, vocabulary.size, processes or len(os.sched_getaffinity(0)), progress)
        return _finish(out, jobs, vocabulary, settings)


@contextlib.contextmanager
def _removed_if_nothing_is_made(out: Path) -> Iterator[None]:
    """Where an error of the user's or the system's ends the block and no shard with text is finished, a folder that was
    new or empty is so again.  Finished shards stay, and what an interrupt leaves: the same command goes on from there.
    """
    existed = out.is_dir()
    new = not any(out.iterdir()) if existed else not out.exists()
    try:
        yield
    except (ValueError, OSError):
        if new and out.is_dir() and not _has_finished_text(out):
            for made in out.iterdir():
                shutil.rmtree(made) if made.is_dir() else made.unlink()
            if not existed:
                out.rmdir()
        raise


def _has_finished_text(out: Path) -> bool:
    for lengths_file in (out / _PARTIAL).glob("*.npz"):
        with np.load(lengths_file) as lengths:
            if any(lengths[split].size for split in SPLITS):
                return True
    return False


def _describe_tokenizer(tokenizer: str | Path) -> dict[str, Any]:
    path = Path(tokenizer) / TOKENIZER_FILE
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return {"name": str(tokenizer), "sha256": digest}


def _claim(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Mark the folder as being made with these settings; its manifest if it is finished.

    Raises:
        ValueError: it holds something else, or was made with other settings.
    """
    recorded = out / _SETTINGS
    if (out / MANIFEST).is_file():
        manifest = read_manifest(out)
        _compare(out, manifest.get("settings", {}), settings)
        shutil.rmtree(out / _PARTIAL, ignore_errors=True)
        return manifest
    if recorded.is_file():
        there = read_mapping(recorded, "a dataset being prepared", f"remove {out} and prepare the data again")
        _compare(out, there, settings)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a dataset being prepared: choose another folder")
    (out / _PARTIAL).mkdir(parents=True, exist_ok=True)
    if not recorded.is_file():
        write_json(recorded, settings)
    return None


def _compare(out: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    here = json.loads(json.dumps(here))
    different = [
        f"{name} was {_brief(there.get(name))}, now {_brief(value)}"
        for name, value in here.items()
        if value != there.get(name)
    ]
    if different:
        raise ValueError(
            f"{out} was begun with other settings: {'; '.join(different)}. Use the same ones, or another folder"
        )


def _brief(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} inputs of {sum(source['size'] for source in value)} bytes"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {inner}" for name, inner in value.items()) + ")"
    return str(value)


def _make_tokenizer(
    out: Path, jobs: Sequence[_Job], tokenizer: str | Path | None, trained: dict[str, Any], progress: bool
) -> None:
    beside = out / _PARTIAL / f"{TOKENIZER}.{os.getpid()}"
    try:
        if tokenizer is not None:
            copy_tokenizer(tokenizer, beside)
        else:
            texts = _training_texts(jobs)
            train_tokenizer(
                trained["kind"],
                texts,
                beside,
                vocab_size=trained["vocab_size"],
                lowercase=trained["lowercase"],
                progress=progress,
            )
        beside.rename(out / TOKENIZER)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _training_texts(jobs: Sequence[_Job]) -> Iterator[str]:
    """Documents that are not set aside for validation, shard by shard in random order, up to a limit."""
    left = _TRAINING_BYTES
    for number in np.argsort(hash64(jobs[0].seed if jobs else 0, _SAMPLE, np.arange(len(jobs)))).tolist():
        job = jobs[number]
        if left <= 0:
            return
        left -= job.size
        for index, text in enumerate(job.documents()):
            if not job.is_validation(np.array([index]))[0]:
                yield text


def _tokenize(jobs: Sequence[_Job], vocabulary_size: int, processes: int, progress: bool) -> None:
    """Make the shards that are not there yet."""
    pending = [job for job in jobs if not job.lengths_file.is_file()]
    total, left = (sum(job.size for job in some) for some in (jobs, pending))
    make = functools.partial(_make_shard, vocabulary_size=vocabulary_size)
    with tqdm(
        desc="tokenize", total=total, initial=total - left, unit="B", unit_scale=True, disable=not progress
    ) as bar:
        if min(processes, len(pending)) <= 1:
            for job in pending:
                bar.update(make(job))
            return
        pool = concurrent.futures.ProcessPoolExecutor(
            min(processes, len(pending)), multiprocessing.get_context("spawn"), initializer=_start_process
        )
        try:
            for future in concurrent.futures.as_completed([pool.submit(make, job) for job in pending]):
                bar.update(future.result())
        except ValueError as error:  # was raised in another process: its words count, not where it comes up again
            raise ValueError(str(error)) from error
        except BrokenProcessPool:
            raise ValueError(
                "a process of `prepare` was killed, perhaps for lack of memory: run it again, with fewer --processes; "
                "what is finished is kept"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_process() -> None:
    """Keep a worker to one thread, and end it when its parent is gone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@functools.lru_cache(maxsize=1)
def _encoder(folder: Path) -> Encoder:
    return Encoder(folder)


def _make_shard(job: _Job, vocabulary_size: int) -> int:
    """Tokenize one shard into its files; returns the bytes of text it stands for."""
    dtype = token_dtype(vocabulary_size)
    encoder = _encoder(job.out / TOKENIZER)
    documents = [ids.astype(dtype) for texts in _batches(job.documents()) for ids in encoder.encode(texts)]
    numbers = np.arange(len(documents))
    validation = job.is_validation(numbers)
    order = np.argsort(hash64(job.seed, _SHUFFLE, job.number, numbers))
    made: dict[str, Any] = {}
    for split, members in (("train", ~validation), ("validation", validation)):
        chosen = [documents[number] for number in order[members[order]] if len(documents[number])]
        lengths, checksums = write_shard(job.out / shard_name(split, job.number), chosen, dtype)
        made |= {split: lengths, f"{split}{_CHECKSUMS}": np.array(checksums)}
    with replacing(job.lengths_file) as file:
        np.savez(file, **made)  # type: ignore[arg-type]
    return job.size


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Lists of texts, each of a few million characters."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters > _ENCODE_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _finish(out: Path, jobs: Sequence[_Job], vocabulary: Vocabulary, settings: dict[str, Any]) -> dict[str, Any]:
    splits = {}
    for split in SPLITS:
        lengths, checksums = [], []
        for job in jobs:
            with np.load(job.lengths_file) as stored:
                lengths.append(stored[split])
                known = f"{split}{_CHECKSUMS}" in stored  # not if an older Farspan has made it
                path = out / shard_name(split, job.number)
                checksums.append(str(stored[f"{split}{_CHECKSUMS}"]) if known else of_file(path))
        splits[split] = write_index(out, split, lengths, checksums)
        for leftover in (out / split).glob("*.tmp"):
            leftover.unlink()
    if not any(described["documents"] for described in splits.values()):
        raise ValueError(f"the input has no text: nothing was prepared in {out}")
    described = {"farspan": __version__, "vocabulary_size": vocabulary.size, "settings": settings}
    write_manifest(out, splits, token_dtype(vocabulary.size), **described)
    (out / _SETTINGS).unlink(missing_ok=True)
    shutil.rmtree(out / _PARTIAL, ignore_errors=True)
    return read_manifest(out)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line of ``farspan prepare``."""
    parser.description = "Turn text into token shards that `farspan train` reads. Run it again to go on after a stop."
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--input", nargs="+", required=True, help="files, quoted globs, or the folder or hub name of a dataset"
    )
    parser.add_argument("--format", choices=FORMATS, help="what the input is (default: by its name)")
    parser.add_argument("--text-field", default="text", help="field that holds the text (default: text)")
    parser.add_argument(
        "--document-separator",
        choices=SEPARATORS,
        default="blank-line",
        help="where documents of plain text end (default: blank-line)",
    )
    parser.add_argument("--dataset-config", help="configuration of a dataset that has several")
    parser.add_argument("--dataset-split", default="train", help="split of a dataset (default: train)")
    parser.add_argument("--tokenizer", help="Hugging Face tokenizer folder (default: train one)")
    parser.add_argument(
        "--train-tokenizer", choices=TOKENIZER_KINDS, help="tokenizer to train (default: bpe, byte-level as RoBERTa's)"
    )
    parser.add_argument("--vocab-size", type=int, default=32768, help="size of a trained tokenizer (default: 32768)")
    parser.add_argument("--lowercase", action="store_true", help="a trained tokenizer folds case")
    parser.add_argument(
        "--validation-fraction", type=float, default=0.01, help="share of documents for validation (default: 0.01)"
    )
    parser.add_argument("--processes", type=int, help="processes that work in parallel (default: all cores)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the order of documents (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Run ``farspan prepare`` on parsed arguments; returns the exit status."""
    manifest = prepare(
        args.input,
        args.out,
        reading=Reading(
            format=args.format,
            text_field=args.text_field,
            document_separator=args.document_separator,
            dataset_config=args.dataset_config,
            dataset_split=args.dataset_split,
        ),
        tokenizer=args.tokenizer,
        train_kind=args.train_tokenizer,
        vocab_size=args.vocab_size,
        lowercase=args.lowercase,
        validation_fraction=args.validation_fraction,
        seed=args.seed,
        processes=args.processes,
    )
    for split, described in manifest["splits"].items():
        print(f"{split}: {described['documents']:,} documents, {described['tokens']:,} tokens")
    print(f"vocabulary: {manifest['vocabulary_size']:,} ids; dataset in {args.out}")
    return 0
