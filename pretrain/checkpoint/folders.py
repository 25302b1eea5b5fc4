"""The folder of a run's checkpoints: which there are, which is the latest, which are kept.

checkpoints/
    step-00000100/            whole: renamed when all of it is on the disk
        manifest.json         written last
        weights-00000.safetensors, optimizer-00000.safetensors, …   what rank 0 wrote, …
        tokenizer/            so that a conversion needs nothing but this folder
    latest                    the name of the newest
    .step-00000200.tmp/       being written, or left by a process that was killed
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..files import replacing, sync, write_text
from .manifest import MANIFEST, Manifest

_STEP = re.compile(r"step-[0-9]{8,18}")


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def folder_beside(final: Path) -> Path:
    """Where a checkpoint is written before it is renamed."""
    return final.with_name(f".{final.name}.tmp")


def candidates(root: Path) -> list[Path]:
    """The checkpoints below ``root``, whole or not, in the order in which a resume tries them: the one that ``latest``
    names, those before it, the newest first, then those after it, which a run that went back has left behind.

    ValueError where ``root`` is no folder and cannot become one.
    """
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root} is a file where the folder of checkpoints belongs: move it, or set another run_dir")
    if not root.is_dir():
        return []
    found = sorted((p for p in root.iterdir() if _STEP.fullmatch(p.name)), key=step_of, reverse=True)
    pointer = root / "latest"
    name = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
    if not _STEP.fullmatch(name):
        return found
    newest = step_of(root / name)  # it may be gone: those after it are left behind all the same
    return [p for p in found if step_of(p) <= newest] + [p for p in found if step_of(p) > newest]


def steps(root: Path) -> list[Path]:
    """The checkpoints below ``root`` that have a manifest, oldest first."""
    return sorted((p for p in candidates(root) if (p / MANIFEST).is_file()), key=step_of)


def latest(root: Path) -> Path | None:
    """The first of the ``candidates`` that has a manifest."""
    return next((folder for folder in candidates(root) if (folder / MANIFEST).is_file()), None)


def find(path: Path) -> Path:
    """The checkpoint that a path means: a checkpoint folder, a ``checkpoints`` folder or a run folder (its latest)."""
    if (path / MANIFEST).is_file():
        return path
    for root in (path, path / "checkpoints"):
        newest = latest(root) if root.is_dir() else None
        if newest is not None:
            return newest
    raise ValueError(f"{path} has no checkpoint: give a run folder, its checkpoints folder or one step-… folder")


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest ``last`` (0: all), those whose step divides by ``every`` (0: none for that),
    the ``best`` with the lowest validation loss, and those that going back ``reach`` steps may need (0: none for
    that)."""

    last: int = 0
    every: int = 0
    best: int = 0
    reach: int = 0

    def forgotten(self, folders: Sequence[Path]) -> list[Path]:
        """Those of ``folders``, oldest first, that go."""
        if not self.last:
            return []
        kept = {*folders[-self.last :]}
        kept |= {folder for folder in folders if self.every and step_of(folder) % self.every == 0}
        if self.best:
            losses = {folder: loss for folder in folders if (loss := validation_loss(folder)) is not None}
            kept |= {*sorted(losses, key=lambda folder: (losses[folder], -step_of(folder)))[: self.best]}
        kept |= {*within_reach(folders, self.reach)}
        return [folder for folder in folders if folder not in kept]


def within_reach(folders: Sequence[Path], steps_back: int) -> list[Path]:
    """Those of ``folders``, oldest first, that a run may need which goes back so many steps from now on: the newest
    that is so far back already, and those after it."""
    if not steps_back or not folders:
        return []
    far = sum(step_of(folder) <= step_of(folders[-1]) - steps_back for folder in folders)
    return list(folders[max(far - 1, 0) :])


def validation_loss(folder: Path) -> float | None:
    """At the step of a checkpoint; None where it was not measured, or the checkpoint is damaged."""
    try:
        return _validation_loss(folder, (folder / MANIFEST).stat().st_mtime_ns)
    except (ValueError, OSError):
        return None


@functools.lru_cache(maxsize=4096)  # asked of all that are kept, after each save
def _validation_loss(folder: Path, _written: int) -> float | None:
    loss = Manifest.read(folder).metrics.get("validation_loss")
    return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else None


def clear(root: Path) -> None:
    """Remove what saves of a killed process have left, as far as that is possible: it may fill the disk."""
    for leftover in root.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def publish(beside: Path, final: Path) -> None:
    """Give a checkpoint that is whole its name, and let ``latest`` name it.  An OSError leaves an older one there."""
    sync(beside)
    with replacing(final.parent / "latest") as pointer:
        pointer.write(f"{final.name}\n".encode())
        pointer.flush()  # a full disk says so here: what follows needs no room
        os.fsync(pointer.fileno())
        # Saved before by a run that was resumed from further back; ``forget`` removes it.
        old = _hide(final) if final.exists() else None
        try:
            beside.replace(final)
        except OSError:
            if old is not None:
                old.replace(final)
            raise
        sync(final.parent)


def forget(root: Path, newest: Path, retention: Retention) -> None:
    """Remove what is not to be kept now that ``newest`` is there, and what an interrupted save left.  OSError where
    something cannot be removed; everything else is."""
    problems: list[OSError] = []
    # Later ones, of a run that went back, are none of this run's until it has come to them.
    going = retention.forgotten([p for p in steps(root) if step_of(p) <= step_of(newest)])
    for folder in (*root.glob(".step-*"), *going):
        try:
            remove(_hide(folder) if folder in going else folder)
        except OSError as error:
            problems.append(error)
    if problems:
        raise problems[0]


def undo(root: Path, undone: Sequence[Path]) -> None:
    """Remove checkpoints that are none of the run any more; ``latest`` names the newest of the others, or is gone."""
    left = [folder for folder in steps(root) if folder not in undone]
    if left:
        write_text(root / "latest", f"{left[-1].name}\n")
    else:
        (root / "latest").unlink(missing_ok=True)
    for folder in undone:
        remove(_hide(folder))
    sync(root)


def _hide(folder: Path) -> Path:
    """Rename a checkpoint so that it is none any more, before it is removed file by file."""
    hidden = folder.with_name(f".{folder.name}.old")
    remove(hidden)
    return folder.replace(hidden)


def remove(folder: Path) -> None:
    """It, whatever it is; of a link nothing but itself."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
