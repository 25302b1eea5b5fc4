"""Saving while training goes on: a snapshot in host memory, files written behind it by a thread of every rank.

A save goes through two stages, and every rank learns at the same step that one is over: every rank writes its files;
then the first writes the manifest, renames the folder and removes what is not to be kept.  Threads do all that touches
the disk and talk to nobody; what ranks tell each other they tell in ``save``, ``poll`` and ``finish``, which all of
them call alike.
"""

from __future__ import annotations

import dataclasses
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...parallel.mesh import Mesh
from ...parallel.parts import Piece
from ...parallel.roll_call import RollCall
from ..files import explain
from . import folders
from .folders import Retention
from .manifest import TOKENIZER, Entry, Manifest, Shard, merge_entries
from .reader import tensor_key
from .tensor_file import copy_checked, write_tensors


@dataclasses.dataclass(frozen=True)
class Saved:
    """How a save ended, the same on every rank but for the times, which are this rank's, and for ``bytes`` and
    ``warning``, which the writer knows.

    ``problem``: why there is no checkpoint, in words; None: there is one.  ``warning``: what went wrong after it was
    there.  ``stall_seconds``: how long training stood still for it; ``seconds``: from its beginning to its end.
    """

    step: int
    folder: Path
    bytes: int
    stall_seconds: float
    seconds: float
    problem: str | None = None
    warning: str | None = None


class _Work(threading.Thread):
    """Something that touches the disk, in a thread that does not keep a process alive."""

    def __init__(self, action: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.action, self.result, self.problem = action, None, None  # type: Callable[[], Any], Any, str | None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.action()
        except OSError as error:
            self.problem = explain(error)
        except BaseException as error:  # a fault of ours: raised where the training is
            self.error = error

    def outcome(self) -> str | None:
        """What went wrong with the disk, in words."""
        if self.error is not None:
            raise self.error
        return self.problem


@dataclasses.dataclass
class _Pending:
    """A save that is under way."""

    manifest: Manifest
    tokenizer: Path | None
    beside: Path
    final: Path
    began: float
    work: _Work
    writing: bool = True  # its files; then the manifest
    bytes: int = 0
    stall: float = 0.0


class Saver:
    """Saves checkpoints below ``root``, one at a time.

    ``asynchronous``: ``save`` returns when the state is copied; the copy is kept, and used again for the next one.
    Otherwise it returns when all is on the disk, and nothing is copied on a CPU.  ``confirm``: called on the writer
    before a checkpoint gets its name; what it raises is raised where the training is.
    """

    def __init__(
        self,
        root: Path,
        mesh: Mesh,
        retention: Retention,
        *,
        asynchronous: bool = False,
        confirm: Callable[[], None] | None = None,
    ) -> None:
        self.root, self.mesh, self.retention, self.asynchronous = root, mesh, retention, asynchronous
        self.confirm = confirm or _nothing
        self.failed = 0  # saves
        self._pending: _Pending | None = None
        self._host: dict[str, Tensor] = {}
        self._roll_call = RollCall(mesh)  # whose threads have ended
        if mesh.is_writer:
            folders.clear(root)
        mesh.first_problem(None)  # nobody writes there before that

    def save(
        self,
        manifest: Manifest,
        pieces: Sequence[Piece],
        steps: dict[str, float],
        tokenizer: Path | None = None,
        before: Callable[[], None] | None = None,
    ) -> list[Saved]:
        """Begin to save what this rank holds; collective.  A save that is still under way is waited for.

        ``manifest``: without tensors and files.  ``pieces``: that this rank writes.  ``steps``: how often each tensor
        was updated.  ``before``: what the writer does first, in a thread; an OSError there is one of the save.  Returns
        how saves have ended meanwhile: the one before, and without ``asynchronous`` this one.
        """
        ended = [saved] if (saved := self.finish()) is not None else []
        began = time.perf_counter()  # the time until then is the earlier save's
        final = folders.step_folder(self.root, manifest.step)
        beside = folders.folder_beside(final)

        def write() -> bytes:
            if before is not None and self.mesh.is_writer:
                before()
            beside.mkdir(parents=True, exist_ok=True)
            return pickle.dumps((_write_files(beside, names, values), entries))

        entries = _entries(pieces, steps, self.mesh.rank)
        # Training may go on and change what was copied.
        values = {tensor_key(p.kind, p.name): self._host_copy(p).view(_stored_shape(p)) for p in pieces}
        names = {tensor_key(p.kind, p.name): _file_of(p, self.mesh.rank) for p in pieces}
        if self.asynchronous and self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)
        self._pending = _Pending(manifest, tokenizer, beside, final, began, _Work(write))
        self._pending.stall = time.perf_counter() - began
        if not self.asynchronous and (saved := self.finish()) is not None:
            ended.append(saved)
        return ended

    def poll(self) -> Saved | None:
        """Take note of what threads have done, without waiting; collective.  How the save has ended, if it has."""
        return self._advance(wait=False)

    def finish(self) -> Saved | None:
        """Wait for a save that is under way; collective.  How it has ended."""
        saved = None
        while self._pending is not None:
            saved = self._advance(wait=True)
        return saved

    def _advance(self, *, wait: bool) -> Saved | None:
        pending = self._pending
        if pending is None:
            return None
        began = time.perf_counter()
        if wait:
            pending.work.join()
            self._roll_call.answer()
        saved = self._next_stage(pending) if wait or self._all_over(pending) else None
        pending.stall += time.perf_counter() - began
        if saved is None:
            return None
        seconds = time.perf_counter() - pending.began
        return self._ended(dataclasses.replace(saved, stall_seconds=pending.stall, seconds=seconds))

    def _all_over(self, pending: _Pending) -> bool:
        """Whether all threads have ended; of several ranks, whether they had when that was asked, at the poll before:
        the answer comes while a step is made, and nobody waits for the others."""
        if self.mesh.size == 1:
            return not pending.work.is_alive()
        said = self._roll_call.answer()
        if said is not None and all(ended for (ended,) in said):
            return True
        self._roll_call.ask(not pending.work.is_alive())
        return False

    def _next_stage(self, pending: _Pending) -> Saved | None:
        """All ranks have ended the stage they were in: begin the next, or say how the save has ended."""
        problem, result = self.mesh.first_problem(pending.work.outcome()), pending.work.result
        saved = Saved(pending.manifest.step, pending.final, pending.bytes, 0.0, 0.0)
        if problem is not None:
            if self.mesh.is_writer:  # a full disk has better use for the room
                shutil.rmtree(pending.beside, ignore_errors=True)
            return dataclasses.replace(saved, problem=problem)
        if not pending.writing:
            return dataclasses.replace(saved, warning=result)
        pending.writing = False
        written = self._gather(result)
        pending.work = _Work((lambda: self._publish(pending, written)) if self.mesh.is_writer else _nothing)
        return None

    def _publish(self, pending: _Pending, written: Sequence[bytes]) -> str | None:
        """The last stage, on the writer; why older checkpoints cannot be removed, in words, if they cannot."""
        said: list[tuple[dict[str, Any], dict[str, Entry]]] = [pickle.loads(of_rank) for of_rank in written]
        files = {name: about for of_rank, _ in said for name, about in of_rank.items()}
        tensors = merge_entries(of_rank for _, of_rank in said)
        manifest = dataclasses.replace(pending.manifest, files=files, tensors=tensors)
        if pending.tokenizer is not None:
            ours = [file for file in pending.tokenizer.iterdir() if file.is_file()]
            copied = copy_checked(ours, pending.beside / TOKENIZER)
            manifest = dataclasses.replace(manifest, tokenizer=copied)
        pending.bytes = manifest.bytes
        manifest.write(pending.beside)
        self.confirm()
        folders.publish(pending.beside, pending.final)
        try:
            folders.forget(self.root, pending.final, self.retention)
        except OSError as error:
            return explain(error)
        return None

    def _ended(self, saved: Saved) -> Saved:
        self._pending = None
        self.failed += saved.problem is not None
        return saved

    def _host_copy(self, piece: Piece) -> Tensor:
        """A piece's values in host memory, where nothing changes them while they are written."""
        if not self.asynchronous:
            return piece.values.cpu()
        key = tensor_key(piece.kind, piece.name)
        if key not in self._host:
            pinned = piece.values.device.type == "cuda"
            self._host[key] = torch.empty(piece.values.shape, dtype=piece.values.dtype, pin_memory=pinned)
        return self._host[key].copy_(piece.values, non_blocking=True)

    def _gather(self, value: bytes) -> list[bytes]:
        """What every rank has, on the writer; elsewhere nothing.  Of a thousand ranks it is many megabytes: packed and
        unpacked in threads."""
        if not dist.is_initialized():
            return [value]
        values: list[bytes] | None = [b""] * self.mesh.size if self.mesh.is_writer else None
        dist.gather_object(value, values, dst=0)
        return values or []


def _nothing() -> None:
    pass


def _file_of(piece: Piece, rank: int) -> str:
    return f"{'weights' if piece.kind == 'weight' else 'optimizer'}-{rank:05d}.safetensors"


def _stored_shape(piece: Piece) -> tuple[int, ...]:
    return piece.part.slice_shape if piece.part.is_slice else (piece.part.values,)


def _entries(pieces: Sequence[Piece], steps: Mapping[str, float], rank: int) -> dict[str, Entry]:
    """What the manifest says of this rank's pieces."""

    def entry(piece: Piece) -> Entry:
        shards = {piece.kind: (Shard(_file_of(piece, rank), piece.part),)}
        return Entry(piece.part.shape, {piece.kind: piece.values.dtype}, shards, steps.get(piece.name))

    return merge_entries({piece.name: entry(piece)} for piece in pieces)


def _write_files(folder: Path, files: dict[str, str], values: dict[str, Tensor]) -> dict[str, Any]:
    """A rank's files (``files``: in which a tensor goes); what the manifest says of them."""
    return {
        name: write_tensors(folder / name, {key: values[key] for key, file in files.items() if file == name})
        for name in sorted(set(files.values()))
    }
