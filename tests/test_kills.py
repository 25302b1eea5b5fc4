"""SIGKILL to all ranks at random moments, saves included, many times in one run: it ends as if nothing had happened.

The disk is slow, so that a save lasts some steps: an asynchronous one is killed while training goes on beside it.

FARSPAN_TEST_KILLS=100 kills every run a hundred times.  FARSPAN_TEST_SEED takes the seed that a failure names; the
moments are the same as far as the machine keeps time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from runs import ranks_of, settings, train_here
from slow_disk import slow_down

from farspan.pretrain import checkpoint as ckpt
from farspan.pretrain.metrics import read_metrics

KILLS = max(10, int(os.environ.get("FARSPAN_TEST_KILLS", "12")))
INTERVAL, KEPT = 2, 2
SAVE_STEPS = 1.5  # as long as so many steps lasts a save
STEPS = 3 * KILLS
TINY = {
    "model.num_hidden_layers": 2,
    "model.hidden_dropout_prob": 0.1,
    "model.attention_probs_dropout_prob": 0.1,
    "training.global_batch_size": 4,
    "schedule.name": "cosine",
    "evaluation.interval": 3,
    "evaluation.rows": 4,
    "checkpoint.interval": INTERVAL,
}
LAYOUTS = {
    "1 rank": {},
    "TP2 × PP2": {"parallel.tensor": 2, "parallel.pipeline": 2},
    "DP2, ZeRO 3": {"parallel.data": 2, "parallel.zero_stage": 3},
}
# What can be seen of a save from outside, from its beginning to its end, and of a start.
SIGNS_OF_A_SAVE = (
    "checkpoints/.step-*.tmp",
    "checkpoints/.step-*.tmp/weights-*",
    "checkpoints/.step-*.tmp/optimizer-*",
    "checkpoints/.step-*.tmp/tokenizer",
    "checkpoints/.step-*.tmp/*manifest.json*",
    "checkpoints/step-*",
    "checkpoints/*latest.*",
    "checkpoints/.step-*.old",
)
SIGNS_OF_A_START = ("*config.yaml.*", "*metrics.jsonl.new")
PAUSE_SECONDS = 0.002  # before every change that a rank makes to a folder
OF_THE_MACHINE = {"tokens_per_second", "step_seconds", "data_wait_seconds", "peak_memory_bytes"}

Line = dict[str, Any]
Signs = set[tuple[str, int, int]]


def train_with_pauses(values: dict[str, Any], bytes_per_second: float) -> str | None:
    """Train on a slow disk, and pause before every change to a folder: a kill may fall between any two of them, and in
    the midst of a file."""
    changes = {"os.rename", "os.mkdir", "os.rmdir", "os.remove"}

    def pause(event: str, arguments: tuple[Any, ...]) -> None:
        if event in changes or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            time.sleep(PAUSE_SECONDS)

    sys.addaudithook(pause)
    with pytest.MonkeyPatch.context() as patch:
        slow_down(patch, lambda: bytes_per_second)
        return train_here(values)


@dataclasses.dataclass(frozen=True)
class Folder:
    """A run folder as it looks from outside, while ranks write to it or after they were killed."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def lines(self) -> list[Line]:
        """What metrics.jsonl says of steps, but for times and memory."""
        lines = [line for line in self._all_lines() if "failed_saves" not in line]
        return [{key: value for key, value in line.items() if key not in OF_THE_MACHINE} for line in lines]

    def saves(self) -> list[Line]:
        """What metrics.jsonl says of saves."""
        return [line for line in self._all_lines() if "failed_saves" in line]

    def _all_lines(self) -> list[Line]:
        path = self.path / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    def is_beside_a_save(self) -> bool:
        """Whether steps were made after the one that is being saved."""
        saving = [int(path.name.split("-")[1].split(".")[0]) for path in self.checkpoints.glob(".step-*.tmp")]
        lines = self.lines()
        return bool(saving and lines) and lines[-1]["step"] > max(saving)

    def saved_step(self) -> int:
        """Where a resume begins."""
        newest = ckpt.latest(self.checkpoints)
        return 0 if newest is None else int(newest.name.removeprefix("step-"))

    def unfinished(self) -> Signs:
        """What a save leaves that did not come to its end: what it writes beside or has not removed yet, a checkpoint
        that ``latest`` does not name yet, one too many."""
        saved = ckpt.steps(self.checkpoints)
        newest = ckpt.latest(self.checkpoints)
        odd = [path for path in saved if newest is not None and path.name > newest.name] + saved[:-KEPT]
        patterns = (f"checkpoints/{path.name}" for path in odd)
        return self.signs("checkpoints/.*", "checkpoints/*latest.*", *patterns)

    def signs(self, *patterns: str) -> Signs:
        """What matches; a new file is another sign than an old one of the same name."""
        found: Signs = set()
        # Path.glob stumbles over a folder that vanishes while it looks.
        for name in (n for p in patterns for n in glob.glob(p, root_dir=self.path, include_hidden=True)):  # noqa: PTH207
            with contextlib.suppress(FileNotFoundError):
                status = (self.path / name).stat()
                found.add((name, status.st_ino, status.st_ctime_ns))
        return found


def content(checkpoint: Path) -> dict[str, Any]:
    """All files of a checkpoint, and what its manifest says but for the run's folder, how many checkpoints stay, and
    the state of the clone that wrote it."""
    files: dict[str, Any] = {
        str(path.relative_to(checkpoint)): path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()
    }
    manifest = json.loads(files[ckpt.MANIFEST])
    del manifest["config"]["run_dir"], manifest["config"]["checkpoint"]["keep_last"]
    del manifest["checksum"], manifest["written_by"]
    return files | {ckpt.MANIFEST: manifest}


@dataclasses.dataclass
class Run:
    """A configuration, and fresh ranks for every start."""

    pool: Ranks
    values: dict[str, Any]
    function: Callable[..., str | None]
    arguments: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        self.folder = Folder(Path(self.values["run_dir"]))
        self.count = ranks_of(self.values)

    def start(self) -> None:
        self.saved, self.found = self.folder.saved_step(), self.folder.signs("metrics.jsonl")
        self.pool.begin(self.function, self.values, *self.arguments, count=self.count)

    def step(self) -> int:
        """How far this start has come; metrics.jsonl as it was found does not count."""
        path = self.folder.path / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if self.folder.signs("metrics.jsonl") - self.found else []
        steps = (json.loads(line)["step"] for line in reversed(lines) if b"failed_saves" not in line)
        return int(next(steps, self.saved))

    def wait(self, moment: Callable[[], Any], pause: float = 0.001) -> None:
        """Look now and again until it is time."""
        end = time.monotonic() + 120
        while not moment():
            self._assert_running()
            assert time.monotonic() < end, "what was waited for does not come"
            time.sleep(pause)

    def finish(self) -> None:
        errors = self.pool.finish(seconds=40 * KILLS)
        assert not any(errors), errors
        self.pool.stop()

    def kill(self) -> None:
        """All ranks, and all of them at work."""
        self._assert_running()
        assert self.pool.stop() == [-9] * self.count

    def _assert_running(self) -> None:
        assert not self.pool.answered(), f"the run has ended: {self.pool.finish()}"


@dataclasses.dataclass(frozen=True)
class Moment:
    """When to kill: some ``seconds`` after the sight of a ``sign`` once ``steps`` are done that were not saved before,
    or, without one, after the start.  At the latest after three saves, and before the last one of the run."""

    sign: str | None = None
    steps: int = 0
    seconds: float = 0.0

    def wait(self, run: Run) -> None:
        end = time.monotonic() + self.seconds
        over = min(run.saved + 3 * INTERVAL + 1, STEPS - INTERVAL)
        if self.sign is None:
            return run.wait(lambda: time.monotonic() >= end or run.step() >= over)
        run.wait(lambda: run.step() >= min(run.saved + self.steps, over))
        seen = run.folder.signs(self.sign)
        run.wait(lambda: run.folder.signs(self.sign) - seen or run.step() >= over, PAUSE_SECONDS / 20)
        end = time.monotonic() + self.seconds
        return run.wait(lambda: time.monotonic() >= end or run.step() >= over)


def moments(rng: random.Random, start_seconds: float, step_seconds: float) -> list[Moment]:
    """Half of them in saves, of which every other one is not the first, at once or later; some while a run folder is
    opened; the others at any time from the start to the third save."""
    saves, starts = (itertools.cycle(rng.sample(signs, len(signs))) for signs in (SIGNS_OF_A_SAVE, SIGNS_OF_A_START))
    save_seconds = SAVE_STEPS * step_seconds
    later = (rng.uniform(0.0, save_seconds) if n // 2 % 2 else 0.0 for n in itertools.count())
    chosen = [Moment(next(saves), 1 + n % 2 * INTERVAL, next(later)) for n in range(KILLS // 2)]
    chosen += [Moment(next(starts)) for _ in range(KILLS // 6)]
    while len(chosen) < KILLS:
        early = rng.uniform(0.0, start_seconds)
        late = start_seconds + rng.uniform(0.0, 3 * (INTERVAL * step_seconds + save_seconds))
        chosen.append(Moment(seconds=rng.choice((early, late))))
    rng.shuffle(chosen)
    return chosen


@pytest.mark.timeout(120 + 40 * KILLS)
@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "synchronous"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_many_times(fork_server, prepared, tmp_path, layout, asynchronous):
    seed = int(os.environ.get("FARSPAN_TEST_SEED", random.randrange(2**32)))
    pool = Ranks(fork_server)

    def run(name: str, keep_last: int, function: Callable[..., str | None]) -> Run:
        overrides = TINY | LAYOUTS[layout] | {"checkpoint.keep_last": keep_last}
        overrides |= {"checkpoint.asynchronous": asynchronous}
        return Run(pool, settings(prepared, tmp_path / name, STEPS, overrides), function)

    try:
        _compare(run("whole", 0, train_here), run("killed", KEPT, train_with_pauses), random.Random(seed))
    except BaseException as error:
        error.add_note(f"FARSPAN_TEST_SEED={seed} FARSPAN_TEST_KILLS={KILLS}")
        raise
    finally:
        pool.stop()


def _compare(whole: Run, killed: Run, rng: random.Random) -> None:
    whole.pool.run(ranks_of, whole.values, count=whole.count)  # the fork server is ready
    began = time.monotonic()
    whole.start()
    whole.wait(whole.step)
    first = time.monotonic()
    whole.finish()
    expected = whole.folder.lines()
    assert [line["step"] for line in expected if "loss" in line] == list(range(1, STEPS + 1))
    step_seconds = (time.monotonic() - first) / STEPS
    killed.arguments = (_bytes_of_a_rank(whole.folder) / (SAVE_STEPS * step_seconds),)

    gains, in_saves, beside = [], 0, 0
    for moment in moments(rng, first - began, step_seconds):
        unfinished = killed.folder.unfinished()
        killed.start()
        moment.wait(killed)
        killed.kill()
        in_save = bool(killed.folder.unfinished() - unfinished)
        in_saves += in_save
        beside += in_save and killed.folder.is_beside_a_save()
        gains.append(killed.folder.saved_step() - killed.saved)
        _check_what_a_kill_leaves(killed.folder, whole.folder, expected)
    print(f"{KILLS} kills, {in_saves} in a save, {beside} in steps beside one; steps saved between them: {gains}")
    assert min(gains) == 0 < max(gains) < STEPS
    assert in_saves >= KILLS // 4
    if killed.values["checkpoint"]["asynchronous"]:
        assert beside > 0
    else:
        assert beside == 0

    killed.start()
    killed.finish()
    assert killed.folder.lines() == expected
    saves = killed.folder.saves()
    assert (killed.folder.path / "metrics.jsonl").read_bytes().count(b"\n") == len(expected) + len(saves)
    steps = [save["step"] for save in saves]
    assert sorted(set(steps)) == steps and {save["failed_saves"] for save in saves} == {0}
    kept = [f"step-{step:08d}" for step in range(STEPS - INTERVAL * (KEPT - 1), STEPS + 1, INTERVAL)]
    for name in kept:
        assert content(killed.folder.checkpoints / name) == content(whole.folder.checkpoints / name)
    assert (killed.folder.checkpoints / "latest").read_text() == kept[-1] + "\n"
    names = {"checkpoints", "config.yaml", "metrics.jsonl", "latest", *kept}
    found = {path.name for folder in (killed.folder.path, killed.folder.checkpoints) for path in folder.iterdir()}
    assert found == names


def _bytes_of_a_rank(folder: Folder) -> int:
    """How much the rank writes that writes most."""
    checkpoint = ckpt.find(folder.checkpoints)
    ranks = {path.stem.split("-")[1] for path in checkpoint.glob("*.safetensors")}
    return max(sum(p.stat().st_size for p in checkpoint.glob(f"*-{rank}.safetensors")) for rank in ranks)


def _check_what_a_kill_leaves(folder: Folder, whole: Folder, expected: list[Line]) -> None:
    """A checkpoint and metrics that a resume can trust: as the uninterrupted run had them."""
    for checkpoint in ckpt.steps(folder.checkpoints):
        ckpt.Reader(checkpoint).verify()
        assert content(checkpoint) == content(whole.checkpoints / checkpoint.name), f"{checkpoint} differs"
    lines = folder.lines()
    assert lines == expected[: len(lines)]
    assert len(lines) >= sum(line["step"] <= folder.saved_step() for line in expected)
