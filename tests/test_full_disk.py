"""A disk that is full while a checkpoint is saved: it is said and counted, training goes on, older ones stay."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import yaml
from ranks import Ranks
from runs import Run, settings, train_here
from small_disk import no_file_larger_than

from farspan.launch.exit_codes import IO_ERROR
from farspan.launch.local import COMMAND
from farspan.pretrain import checkpoint as ckpt
from farspan.pretrain.metrics import read_metrics

SAVED, STEPS, HARMED = (2, 4, 6), 6, 4
TINY = {
    "model.num_hidden_layers": 2,
    "model.hidden_dropout_prob": 0.1,
    "training.global_batch_size": 4,
    "checkpoint.interval": 2,
    "checkpoint.keep_last": 0,
    "logging.tensorboard": True,
}
REPLICAS = {"parallel.data": 2, "parallel.zero_stage": 1}
# Which file cannot be written, beyond how many bytes.
FILES = {
    "weights-00000.safetensors": 30_000,
    "optimizer-00001.safetensors": 0,
    "tokenizer.json": 100,
    "manifest.json": 1000,
    "latest": 5,
}


def train_and_listen(values: dict[str, Any], file: str | None, at: int) -> tuple[str | None, str]:
    """Train; in the save after step ``at`` a file of this name cannot be written whole.  The error line, and what was
    said on the console."""
    from farspan.pretrain import files
    from farspan.pretrain.checkpoint import folders, saver, tensor_file

    size = FILES.get(file or "", 0)
    write, replacing, publish = tensor_file._Checked.write, files.replacing, folders.publish
    saving: list[int] = []

    def full_write(self: Any, content: bytes | memoryview) -> None:
        path = Path(self.file.name)
        harmed = path.name == file and f"step-{at:08d}" in str(path)
        with no_file_larger_than(size) if harmed else contextlib.nullcontext():
            write(self, content)

    @contextlib.contextmanager
    def full_replacing(path: Path) -> Iterator[IO[bytes]]:
        harmed = path.name == file and (f"step-{at:08d}" in str(path) or at in saving)
        with no_file_larger_than(size) if harmed else contextlib.nullcontext(), replacing(path) as opened:
            yield opened

    def remembered(beside: Path, final: Path) -> None:
        saving[:] = [folders.step_of(final)]
        publish(beside, final)

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(tensor_file._Checked, "write", full_write)
        patch.setattr(saver.folders, "publish", remembered)
        for module in (files, folders):
            patch.setattr(module, "replacing", full_replacing)
        return train_here(values), said.getvalue()


@pytest.fixture(scope="module")
def whole(ranks, prepared, tmp_path_factory):
    """A run that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert ranks.run(train_here, settings(prepared, run, STEPS, TINY | REPLICAS), count=2) == [None, None]
    return Run(run)


def saves_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if "failed_saves" in line]


def curve(run: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def step(number: int) -> str:
    return f"step-{number:08d}"


@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "synchronous"])
@pytest.mark.parametrize("file", FILES)
def test_a_save_that_fails(ranks, prepared, tmp_path, whole, file, asynchronous):
    run = tmp_path / "run"
    values = settings(prepared, run, STEPS, TINY | REPLICAS | {"checkpoint.asynchronous": asynchronous})
    answers = ranks.run(train_and_listen, values, file, HARMED, count=2, seconds=120)
    assert [error for error, _ in answers] == [None, None]
    assert Run(run).steps() == whole.steps()
    first, failed, last = saves_of(run)
    assert [(line["step"], line["failed_saves"]) for line in (first, failed, last)] == [(2, 0), (4, 1), (6, 1)]
    assert file in failed["save_problem"] and "File too large" in failed["save_problem"]
    assert "save_problem" not in first and "save_problem" not in last and last["save_bytes"] > 0
    (line,) = [line for line in answers[0][1].splitlines() if "was not saved" in line]
    assert line.startswith(f"the checkpoint of step {HARMED} was not saved (") and failed["save_problem"] in line
    assert "1 failed so far, training goes on" in line and answers[1][1] == ""
    assert curve(run, "checkpoint/failed_saves") == [(2, 0.0), (4, 1.0), (6, 1.0)]
    assert names(run / "checkpoints") == ["latest", step(2), step(6)]
    for saved in (2, 6):
        ckpt.Reader(run / "checkpoints" / step(saved)).verify()
    assert (run / "checkpoints/latest").read_text() == f"{step(6)}\n"


@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "synchronous"])
def test_the_last_save_fails(ranks, prepared, tmp_path, whole, asynchronous):
    """One line on every rank, and the same command goes on."""
    run, file = tmp_path / "run", "optimizer-00001.safetensors"
    values = settings(prepared, run, STEPS, TINY | REPLICAS | {"checkpoint.asynchronous": asynchronous})
    answers = ranks.run(train_and_listen, values, file, STEPS, count=2, seconds=120)
    for error, _ in answers:
        assert error is not None and error.startswith(f"the checkpoint of step {STEPS} was not saved (rank 1: ")
        assert error.endswith("older ones are untouched: the same command goes on from the latest")
    assert names(run / "checkpoints") == ["latest", step(2), step(4)]
    assert ranks.run(train_here, values, count=2) == [None, None]
    assert Run(run).steps() == whole.steps()
    assert names(run / "checkpoints") == ["latest", step(2), step(4), step(6)]
    assert [(line["step"], line["failed_saves"]) for line in saves_of(run)][-1] == (6, 0)


# A file system that is full, where one can be mounted.


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(bytes) makes a disk of that size, or gives the disk that size; its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def size(count: int) -> Path:
        change = ["remount,"] if folder.is_mount() else [""]
        command = ["mount", "-t", "tmpfs", "-o", f"{change[0]}size={count}", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("a file system cannot be mounted here")
        return folder

    yield size
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def train_slowly(values: dict[str, Any]) -> str | None:
    from farspan.parallel.engine import Engine

    train_batch = Engine.train_batch

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.05)
        return train_batch(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "train_batch", slow)
        return train_here(values)


def room_for_one(whole: Run) -> int:
    """Bytes for a checkpoint, and no second beside it."""
    checkpoint = ckpt.find(whole.folder)
    return int(1.5 * sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()))


@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "synchronous"])
def test_a_disk_that_is_full_for_a_while(fork_server, prepared, small_disk, whole, asynchronous):
    disk, steps = small_disk(room_for_one(whole)), 60
    run = disk / "run"
    overrides = TINY | REPLICAS | {"checkpoint.keep_last": 1, "checkpoint.asynchronous": asynchronous}
    values = settings(prepared, run, steps, overrides)
    pool = Ranks(fork_server)
    try:
        pool.begin(train_slowly, values, count=2)
        end = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() or not any("save_problem" in line for line in saves_of(run)):
            assert time.monotonic() < end and not pool.answered()
            time.sleep(0.02)
        assert names(run / "checkpoints")[-2:] == ["latest", step(2)]
        small_disk(64 * 2**20)
        assert pool.finish(120) == [None, None]
    finally:
        pool.stop()
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line] == list(range(1, steps + 1))
    assert Run(run).steps()[:STEPS] == whole.steps()
    saves = saves_of(run)
    failed = [line["step"] for line in saves if "save_problem" in line]
    assert failed and failed == list(range(4, 4 + 2 * len(failed), 2))
    assert all(
        "No space left on device (free some space there)" in line["save_problem"]
        for line in saves
        if "save_problem" in line
    )
    assert [line["step"] for line in saves] == list(range(2, steps + 1, 2))
    assert saves[-1]["failed_saves"] == len(failed) < len(saves) - 1
    assert curve(run, "checkpoint/failed_saves") == [(line["step"], line["failed_saves"]) for line in saves]
    assert [number for number, _ in curve(run, "train/loss")] == list(range(1, steps + 1))
    assert names(run / "checkpoints") == ["latest", step(steps)]
    ckpt.Reader(run / "checkpoints" / step(steps)).verify()


def test_a_disk_that_others_fill(fork_server, prepared, small_disk, whole):
    """To its last byte, so that no line of metrics.jsonl can be written either: none is lost."""
    disk, steps = small_disk(64 * 2**20), 120
    run, theirs = disk / "run", disk / "theirs"
    values = settings(prepared, run, steps, TINY | REPLICAS)
    pool = Ranks(fork_server)

    def wait_until(moment: Callable[[], Any], pause: float) -> None:
        end = time.monotonic() + 60
        while not moment():
            assert not pool.answered(), f"the run has ended: {pool.finish()}"
            assert time.monotonic() < end
            time.sleep(pause)

    def is_stuck() -> bool:
        size = metrics.stat().st_size
        for _ in range(100):
            with contextlib.suppress(OSError):  # a save that fails makes room
                while True:
                    filling.write(bytes(2**16))
            time.sleep(0.005)
        return metrics.stat().st_size == size and size % os.sysconf("SC_PAGE_SIZE") == 0

    try:
        pool.begin(train_slowly, values, count=2)
        metrics = run / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and saves_of(run), 0.02)
        with theirs.open("wb", buffering=0) as filling:
            wait_until(is_stuck, 0.0)
        theirs.unlink()
        assert pool.finish(120) == [None, None]
    finally:
        pool.stop()
    lines = read_metrics(metrics)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, steps + 1))
    assert len(lines) == len(metrics.read_text().splitlines())
    assert curve(run, "checkpoint/failed_saves") == [(line["step"], line["failed_saves"]) for line in saves_of(run)]
    assert [number for number, _ in curve(run, "train/loss")] == list(range(1, steps + 1))
    saved = {line["step"] for line in saves_of(run) if "save_problem" not in line}
    assert {2, steps} <= saved != set(range(2, steps + 1, 2))
    assert names(run / "checkpoints") == ["latest", *(step(number) for number in sorted(saved))]


def test_a_command_on_a_full_disk(prepared, small_disk, tmp_path, whole):
    """It ends with one line; what was saved before is there, and nothing that is half made."""
    disk = small_disk(room_for_one(whole))
    run = disk / "run"
    values = settings(prepared, run, STEPS, TINY)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    command = [*COMMAND, "train", str(tmp_path / "run.yaml")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == IO_ERROR
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"farspan: the checkpoint of step {STEPS} was not saved ({run}/checkpoints/.step-")
    assert "No space left on device (free some space there)" in line
    assert names(run / "checkpoints") == ["latest", step(2)]
    ckpt.Reader(run / "checkpoints" / step(2)).verify()
    assert len(Run(run).steps()) == STEPS
    small_disk(64 * 2**20)
    subprocess.run(command, env=environment, capture_output=True, timeout=200, check=True)
    assert names(run / "checkpoints") == ["latest", step(2), step(4), step(6)]
