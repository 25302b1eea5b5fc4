"""What users do wrong: one line says it, the exit code is 2, nothing is lost, and nothing is left half made."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bad_files import CHECKPOINT, CONVERSION, DATA, INPUT, TOKENIZER
from bad_input import (
    CONFIGURATION,
    ENVIRONMENT,
    EXPORT,
    IMPORT,
    LAUNCHED,
    PLACES,
    PREPARE,
    RESUME,
    STEP,
    STEPS,
    STOP,
    WEIGHTS,
    Kind,
)
from runs import Run, settings
from small_disk import no_file_larger_than

from farspan.launch.cli import main
from farspan.launch.exit_codes import IO_ERROR
from farspan.launch.local import COMMAND
from farspan.pretrain import checkpoint as ckpt
from farspan.pretrain.files import explain

KINDS = {
    "configuration": CONFIGURATION,
    "data": DATA,
    "input": INPUT,
    "tokenizer": TOKENIZER,
    "checkpoint": CHECKPOINT,
    "conversion": CONVERSION,
    "places": PLACES,
    "environment": ENVIRONMENT,
}
VARIABLES = (*LAUNCHED, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_JOB_ID", "SLURM_STEP_ID", "OMPI_COMM_WORLD_RANK")


def clear_variables(patch: pytest.MonkeyPatch) -> None:
    """As where no launcher runs; what a run exports is taken back with the patch."""
    for name in (*VARIABLES, "FARSPAN_TRACEBACK"):
        patch.setenv(name, "")
        patch.delenv(name)
    patch.setattr(sys, "path", list(sys.path))
    patch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_variables(monkeypatch)


@pytest.fixture(scope="module")
def original(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a test before anything is done to it."""
    place = tmp_path_factory.mktemp("bad-input")
    shutil.copytree(prepared, place / "data")
    (place / "text.txt").write_text("Some text.\n\nMore of it.\n")
    configure(place)
    with pytest.MonkeyPatch.context() as patch:
        clear_variables(patch)
        assert main(["train", str(place / "run.yaml"), "--stop-after", str(STOP)]) == 0
        assert main(["convert", "to-hf", str(place / "run"), str(place / "hf")]) == 0
    return place


@pytest.fixture
def place(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    configure(tmp_path)
    return tmp_path


def configure(place: Path) -> None:
    overrides = {"checkpoint.interval": STOP, "checkpoint.keep_last": 0}
    (place / "run.yaml").write_text(yaml.safe_dump(settings(place / "data", place / "run", STEPS, overrides)))


def content(place: Path) -> dict[str, bytes | None]:
    """Every file byte for byte, and every folder (None)."""
    return {str(p.relative_to(place)): p.read_bytes() if p.is_file() else None for p in sorted(place.rglob("*"))}


def words(command: str, place: Path) -> list[str]:
    return command.replace("@", str(place)).split(" ")


def assert_says(stderr: str, line: str, place: Path) -> None:
    """The line and nothing else; "…" stands for any words, or none."""
    pattern = re.escape(f"farspan: {line}\n".replace("@", str(place)))
    assert re.fullmatch(re.sub(r"(\\ )?…(\\ )?", ".*", pattern), stderr), stderr


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, id=f"{group}: {kind.name}") for group, kinds in KINDS.items() for kind in kinds]
)
def test_one_line_and_nothing_lost(
    kind: Kind, place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind.harm(place)
    for name, value in kind.environment.items():
        monkeypatch.setenv(name, value)
    before = content(place)
    assert main(words(kind.command, place)) == 2
    assert_says(capfd.readouterr().err, kind.line, place)
    after = content(place)
    assert set(after) - set(before) <= set(kind.leaves)
    assert {name: after.get(name) for name in before} == before


def test_names_are_unique() -> None:
    names = [(group, kind.name) for group, kinds in KINDS.items() for kind in kinds]
    assert len(names) == len(set(names))


def test_a_folder_that_was_empty_is_empty_again(place: Path) -> None:
    (place / "out").mkdir()
    (place / "bad.txt").write_bytes(b"\xff")
    for command in (f"{PREPARE} @/bad.txt", "convert to-hf @/run @/out --dtype int8"):
        assert main(words(command, place)) == 2
        assert list((place / "out").iterdir()) == []


def test_folders_above_are_not_left_either(place: Path) -> None:
    (place / "bad.txt").write_bytes(b"\xff")
    before = content(place)
    assert main(words("prepare @/a/b/c --vocab-size 300 --input @/bad.txt", place)) == 2
    with no_file_larger_than(1000):
        assert main(words("convert to-hf @/run @/a/b/c", place)) == 2
    assert content(place) == before


def test_shards_that_were_finished_are_kept(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The same command goes on from them once the input is right (of the same size: other input is another dataset)."""
    good, bad = place / "good.txt", place / "bad.txt"
    good.write_text("Good enough a text.\n\n" * 60_000)  # more than fits a shard
    bad.write_bytes(b"caf\xe9!")
    command = "prepare @/out --processes 2 --tokenizer @/data/tokenizer --input @/good.txt @/bad.txt"
    assert main(words(command, place)) == 2
    assert_says(capfd.readouterr().err, "@/bad.txt is not UTF-8 text at byte 3: convert it first", place)
    shard = place / "out/train/00000.bin"
    made = (shard.stat().st_ino, shard.read_bytes())
    bad.write_bytes("café".encode() + b"")
    assert main(words(command, place)) == 0
    assert (shard.stat().st_ino, shard.read_bytes()) == made
    assert not (place / "out/settings.json").exists()


# Rights.

_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h
_OVERRIDES = 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextlib.contextmanager
def ordinary_rights() -> Iterator[None]:
    """Inside, the rights of files hold for root too (in this thread)."""
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    effective = sets[0]
    sets[0] = effective & ~_OVERRIDES
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0


DENIED = "Permission denied (you need rights there, or another path)"


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
@pytest.mark.parametrize(
    ("command", "name", "mode", "line"),
    [
        ("train @/run.yaml run_dir=@/mine/run", "mine", 0o555, f"@/mine/run: {DENIED}"),
        ("prepare @/mine/out --input @/text.txt --vocab-size 300", "mine", 0o555, f"@/mine/out…: {DENIED}"),
        ("convert to-hf @/run @/mine/out", "mine", 0o555, f"@/mine/.out.tmp: {DENIED}"),
        (RESUME, "run", 0o555, f"@/run: {DENIED}"),
        (RESUME, "run.yaml", 0, f"@/run.yaml: {DENIED}"),
        (RESUME, WEIGHTS, 0, f"@/{WEIGHTS}: {DENIED}"),
        (RESUME, "data/dataset.json", 0, f"@/data/dataset.json: {DENIED}"),
        (RESUME, "data/train/00000.bin", 0, f"@/data/train/00000.bin: {DENIED}"),
        (IMPORT, "hf/model.safetensors", 0, f"@/hf/model.safetensors: {DENIED}"),
        (f"{PREPARE} @/text.txt", "text.txt", 0, f"@/text.txt: {DENIED}"),
    ],
)
def test_without_rights(
    command: str, name: str, mode: int, line: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "mine").mkdir()
    before = content(place)
    target = place / name
    rights = target.stat().st_mode
    target.chmod(mode)
    try:
        with ordinary_rights():
            with pytest.raises(PermissionError):  # or nothing would be tried here
                (target / "x").touch() if target.is_dir() else target.read_bytes()
            assert main(words(command, place)) == 2
    finally:
        target.chmod(rights)
    assert_says(capfd.readouterr().err, line, place)
    assert content(place) == before


# A full disk: no file may grow beyond a size, so that a write fails in the midst of a file.

FULL = "File too large (raise the limit on the size of files, ulimit -f)"


@pytest.mark.parametrize(
    ("command", "size", "line"),
    [
        (f"{PREPARE} @/text.txt", 400, f"@/out/settings.json: {FULL}"),
        (f"{PREPARE} @/text.txt", 4000, f"@/out/.partial/tokenizer.…/tokenizer.json: {FULL}"),
        ("prepare @/out --input @/run.yaml --tokenizer @/data/tokenizer", 20_000, f"@/out/train/00000.bin: {FULL}"),
        (EXPORT, 20_000, f"@/.out.tmp/model.safetensors: {FULL}"),
        (IMPORT, 20_000, f"@/.out.tmp/weights-00000.safetensors: {FULL}"),
        (RESUME, 200, f"@/run: {FULL}"),
        (RESUME, 1000, f"@/run/config.yaml: {FULL}"),
    ],
)
def test_a_disk_that_is_full(
    command: str, size: int, line: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "run.yaml").write_text((place / "run.yaml").read_text() + "# A comment.\n" * 4000)
    before = content(place)
    with no_file_larger_than(size):
        assert main(words(command, place)) == 2
    assert_says(capfd.readouterr().err, line, place)
    assert content(place) == before


def test_a_disk_that_is_full_when_a_checkpoint_is_saved(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = content(place / STEP)
    with no_file_larger_than(20_000):
        assert main(words(RESUME, place)) == IO_ERROR
    beside = f"@/run/checkpoints/.step-{STEPS:08d}.tmp/optimizer-00000.safetensors"
    line = (
        f"the checkpoint of step {STEPS} was not saved ({beside}: {FULL}); older ones are untouched: "
        "the same command goes on from the latest"
    )
    assert_says(capfd.readouterr().err, line, place)
    root = place / "run/checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["latest", Path(STEP).name]
    assert (content(place / STEP), ckpt.latest(root)) == (before, place / STEP)
    assert main(words(RESUME, place)) == 0
    assert len(Run(place / "run").steps()) == STEPS


def test_what_a_full_disk_is_called(monkeypatch: pytest.MonkeyPatch, place: Path, capfd: Any) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = content(place)
    monkeypatch.setattr(os, "fsync", full)
    assert main(words(f"{PREPARE} @/text.txt", place)) == IO_ERROR
    line = "@/out/settings.json: No space left on device (free some space there)"
    assert_says(capfd.readouterr().err, line, place)
    assert content(place) == before
    assert explain(OSError("10 requested and 3 written")) == "10 requested and 3 written"


# As users start it.


def start(command: str, place: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(
        [*COMMAND, *words(command, place)], capture_output=True, text=True, timeout=100, env=environment, **options
    )


def test_a_process_says_nothing_else(place: Path) -> None:
    (place / "bad.txt").write_bytes(b"\xff")
    before = content(place)
    ended = start(f"{PREPARE} @/bad.txt", place)
    assert ended.returncode == 2
    assert ended.stdout.strip() == ""
    assert_says(ended.stderr, "@/bad.txt is not UTF-8 text at byte 0: convert it first", place)
    assert content(place) == before


def test_a_disk_that_is_full_while_metrics_are_written(place: Path) -> None:
    """In a process of its own: it must also end without a word on the file that it could not close."""
    before = content(place)
    command, size = f"{RESUME} training.steps=60 checkpoint.interval=0", 8000
    ended = start(command, place, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    assert ended.returncode == IO_ERROR
    line = (
        f"the checkpoint of step 60 was not saved (@/run/metrics.jsonl: {FULL}); older ones are untouched: "
        "the same command goes on from the latest"
    )
    assert_says(ended.stderr, line, place)
    after = content(place)
    assert {name: after[name] for name in before if name.startswith("run/ch")} == {
        name: before[name] for name in before if name.startswith("run/ch")
    }
    assert len(after["run/metrics.jsonl"] or b"") == size
    assert main(words(RESUME, place)) == 0
    assert len(Run(place / "run").steps()) == STEPS
