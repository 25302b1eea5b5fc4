"""The record of a run's rollbacks, and what follows from it for the run folder and for a resume.

rollbacks.jsonl     a line a rollback, written before anything is undone: after a kill at any moment it is resumed
undone.jsonl        the lines of metrics.jsonl and spikes.jsonl of steps that were undone, with the rollback's number
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import checkpoint as ckpt
from .config import Config
from .files import explain, write_text
from .metrics import complete_lines, json_line
from .skips import Skip, described, ordered

RECORDS, UNDONE = "rollbacks.jsonl", "undone.jsonl"
_LINES = ("metrics.jsonl", "spikes.jsonl")


@dataclasses.dataclass(frozen=True)
class Rollback:
    """One rollback; steps are counted from 1, samples over the whole run.

    ``step``: after which it was found.  ``first_step``: of the spike.  ``checkpoint_step``: where the run went back to
    (0: initial values).  ``skip``: from which step on how many samples are left out, the first of which would have been
    ``first_sample``.  ``skips_before``, ``skips``: all that the run left out before, and leaves out from then on.
    ``losses`` and ``gradient_norms``: of the last steps that were not skipped, the spike included.
    """

    rollback: int  # its number, from 1
    time: str  # ISO 8601, UTC
    step: int
    first_step: int
    reason: str
    checkpoint_step: int
    skip: Skip
    first_sample: int
    skips_before: tuple[Skip, ...]
    skips: tuple[Skip, ...]
    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]

    @staticmethod
    def from_json(values: dict[str, Any]) -> Rollback:
        """KeyError, TypeError or ValueError where it is none."""
        known = {field.name: values[field.name] for field in dataclasses.fields(Rollback)}
        for name in ("rollback", "step", "first_step", "checkpoint_step"):
            if type(known[name]) is not int:
                raise TypeError(f"{name} is no number")
        known["skip"] = Skip(**known["skip"])
        for name in ("skips_before", "skips"):
            known[name] = tuple(Skip(**skip) for skip in known[name])
        for name in ("losses", "gradient_norms"):
            known[name] = tuple(map(float, known[name]))
        return Rollback(**known)

    def to_json(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["skip"] = self.skip._asdict()
        return values | {name: [skip._asdict() for skip in values[name]] for name in ("skips_before", "skips")}


def read(run_dir: Path | str) -> tuple[Rollback, ...]:
    """A run's rollbacks so far.  ValueError in one line where the record is damaged."""
    path = Path(run_dir) / RECORDS
    if not path.is_file():
        return ()
    found: list[Rollback] = []
    for line in path.read_bytes().splitlines():
        try:
            found.append(Rollback.from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path} is damaged (line {len(found) + 1} is no rollback), and the data of the run depend on it: "
                "put the right one there, or set another run_dir"
            ) from None
    return tuple(found)


def add(run_dir: Path | str, rollback: Rollback) -> None:
    """Record a rollback, on the disk when this returns: first what is undone by it, then the line that counts.  OSError
    where that fails; nothing has happened then."""
    folder = Path(run_dir)
    earlier = read(folder)
    kept = [
        line
        for line, values in _lines(folder / UNDONE)
        if values.get("rollback", 0) <= len(earlier)  # others are of one that was not recorded
    ]
    for name in _LINES:
        undone = [values for _, values in _lines(folder / name) if values["step"] > rollback.checkpoint_step]
        kept += [json_line({"rollback": rollback.rollback} | values) for values in undone]
    write_text(folder / UNDONE, "".join(kept))
    write_text(folder / RECORDS, "".join(json_line(one.to_json()) for one in (*earlier, rollback)))


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """One after another: a million of them are gigabytes."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line, values in complete_lines(file):
            yield line.decode(), values


def with_skips(config: Config, rollbacks: Sequence[Rollback]) -> Config:
    """The configuration with what the run's rollbacks leave out.  ValueError in one line where it says otherwise.

    It may be the one that the run began with, or a later one, by hand, that leaves out more.
    """
    if not rollbacks:
        return config
    said, now = config.data.skips, ordered(rollbacks[-1].skips)
    if said in [ordered(rollback.skips_before) for rollback in rollbacks]:
        return config.with_skips(now)
    if set(now) <= set(said):
        return config
    raise ValueError(
        f"data.skip {described(said)} lacks what the rollbacks of {config.run_dir} leave out, {described(now)}: "
        f"leave data.skip as the run began, or take it from {Path(config.run_dir) / 'config.yaml'}"
    )


def is_undone(folder: Path, rollbacks: Sequence[Rollback]) -> bool:
    """Whether a checkpoint was saved after a step that was undone later on."""
    if all(ckpt.step_of(folder) <= rollback.checkpoint_step for rollback in rollbacks):
        return False
    try:
        manifest = ckpt.Manifest.read(folder)
    except (ValueError, OSError):
        return False  # nobody takes it
    later = rollbacks[manifest.trainer.get("rollbacks", 0) :]
    return any(manifest.step > rollback.checkpoint_step for rollback in later)


def remove_undone(root: Path, rollbacks: Sequence[Rollback]) -> None:
    """Remove the checkpoints that rollbacks have undone.  OSError where one cannot be removed."""
    undone = [folder for folder in ckpt.steps(root) if is_undone(folder, rollbacks)] if rollbacks else []
    if not undone:
        return
    try:
        ckpt.undo(root, undone)
    except OSError as error:
        raise OSError(error.errno, f"what a rollback has undone cannot be removed: {explain(error)}") from None


def table(rollbacks: Sequence[Rollback]) -> str:
    """All of them in Markdown."""
    lines = ["| rollback | found after step | back to step | left out | why |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {one.rollback} | {one.step} | {one.checkpoint_step} | {one.skip.samples} samples from {one.first_sample} "
        f"on, at step {one.skip.step} | {one.reason} |"
        for one in rollbacks
    ]
    return "\n".join(lines)
