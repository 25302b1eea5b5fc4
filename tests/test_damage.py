"""Checkpoints damaged at random: a resume continues from one that is whole, or says in one line that there is none.

FARSPAN_TEST_DAMAGE=500 damages so many.  FARSPAN_TEST_SEED takes the seed that a failure names.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import ranks_of, settings, train_here

from farspan.pretrain import checkpoint as ckpt
from farspan.pretrain.metrics import read_metrics

CASES = int(os.environ.get("FARSPAN_TEST_DAMAGE", "50"))
SEED = int(os.environ.get("FARSPAN_TEST_SEED", random.randrange(2**32)))
SAVED, STEPS = (2, 4, 6), 8
TINY = {
    "model.num_hidden_layers": 2,
    "model.hidden_dropout_prob": 0.1,
    "training.global_batch_size": 4,
    "checkpoint.interval": 2,
    "checkpoint.keep_last": 0,
}
LAYOUTS = {
    "1 rank": {},
    "TP2": {"parallel.tensor": 2},
    "DP2, ZeRO 3, bfloat16": {"parallel.data": 2, "parallel.zero_stage": 3, "training.dtype": "bfloat16"},
}
OF_STEPS = ("step", "loss", "grad_norm", "lr", "tokens")

Steps = list[dict[str, Any]]


# What may happen to a file; ``twin`` is the file of that name in another checkpoint.


def flipped(rng: random.Random, path: Path, twin: Path) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 10))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def overwritten(rng: random.Random, path: Path, twin: Path) -> None:
    """A run of bytes, with zeros or with anything."""
    content, length = bytearray(path.read_bytes()), rng.randint(1, 5000)
    begin = rng.randrange(len(content))
    other = rng.choice((bytes(length), rng.randbytes(length)))
    content[begin : begin + length] = other[: len(content) - begin]
    path.write_bytes(content)


def cut(rng: random.Random, path: Path, twin: Path) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def emptied(rng: random.Random, path: Path, twin: Path) -> None:
    os.truncate(path, 0)


def extended(rng: random.Random, path: Path, twin: Path) -> None:
    with path.open("ab") as file:
        file.write(rng.choice((b"\n", b" ", b"\0" * 4096, rng.randbytes(rng.randint(1, 5000)))))


def shortened_inside(rng: random.Random, path: Path, twin: Path) -> None:
    """A byte is gone, what comes after it moves up."""
    content = bytearray(path.read_bytes())
    del content[rng.randrange(len(content))]
    path.write_bytes(content)


def removed(rng: random.Random, path: Path, twin: Path) -> None:
    path.unlink()


def a_folder(rng: random.Random, path: Path, twin: Path) -> None:
    path.unlink()
    path.mkdir()


def a_link_to_nothing(rng: random.Random, path: Path, twin: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


def swapped(rng: random.Random, path: Path, twin: Path) -> None:
    path.rename(path.with_name("third"))
    twin.rename(path)
    path.with_name("third").rename(twin)


def copied(rng: random.Random, path: Path, twin: Path) -> None:
    shutil.copyfile(twin, path)


HARMS = (flipped, flipped, overwritten, cut, emptied, extended, shortened_inside, removed, a_folder, a_link_to_nothing)
HARMS += (swapped, copied)


def edited(rng: random.Random, manifest: Path) -> None:
    """One value of the manifest, somewhere in it, by somebody who leaves the rest as it was written."""
    value = json.loads(manifest.read_text())
    inner, keys = value, []
    while isinstance(inner, dict | list) and inner:
        key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        keys.append((inner, key))
        inner = inner[key]
    holder, key = keys[-1]
    holder[key] = rng.choice([None, -1, 0, 3, "x", 1e300, [], {}])
    manifest.write_text(json.dumps(value, indent=1))


def renamed_pointer(rng: random.Random, pointer: Path) -> None:
    """``latest`` is wrong, or nothing that could be read."""
    pointer.unlink()
    content = rng.choice([None, b"", b"step-00000099\n", b"../../etc\n", rng.randbytes(20), *SAVED])
    if content is not None:
        pointer.write_bytes(content if isinstance(content, bytes) else f"step-{content:08d}\n".encode())


def damage(rng: random.Random, root: Path) -> list[str]:
    """Damage some checkpoints below ``root``, one in five times all of them; what was done, in words."""
    every = rng.random() < 0.2
    steps = list(SAVED) if every else rng.sample(SAVED, rng.randint(1, len(SAVED) - 1))
    done = []
    for step in steps:
        folder, twin = (root / f"step-{s:08d}" for s in (step, rng.choice([s for s in SAVED if s != step])))
        kind = rng.random()
        if kind < 0.15:
            edited(rng, folder / ckpt.MANIFEST)
            done.append(f"edited {folder.name}")
            continue
        if kind < 0.2:
            shutil.rmtree(folder)
            done.append(f"no {folder.name}")
            continue
        # The tensors' files and the manifest half of the time, any file the other half.
        of_tensors = sorted({*folder.glob("*.safetensors"), folder / ckpt.MANIFEST})
        names = rng.choice((of_tensors, sorted(path for path in folder.rglob("*") if path.is_file())))
        path = rng.choice([path for path in names if path.is_file()] or [folder / "none"])
        harm: Callable[[random.Random, Path, Path], None] = rng.choice(HARMS)
        other = twin / path.relative_to(folder)
        if path.is_file() and path.stat().st_size and other.is_file():
            harm(rng, path, other)
            done.append(f"{harm.__name__} {path.relative_to(root)}")
    if rng.random() < 0.3:
        renamed_pointer(rng, root / "latest")
        done.append("latest")
    return done


def content(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder of a folder, but for what the folder of a run says to people."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def expected_step(root: Path, whole: Path) -> int | None:
    """Where a resume must begin, by what can be seen without reading a manifest: 0 where no checkpoint is left at all,
    None where there are only damaged ones."""
    left = [step for step in SAVED if (root / f"step-{step:08d}").exists()]
    same = []
    for step in left:
        here, there = (content(folder / f"step-{step:08d}") for folder in (root, whole))
        if all(here.get(name, "missing") == value for name, value in there.items()):
            same.append(step)
    pointer = root / "latest"
    name = pointer.read_bytes().strip() if pointer.is_file() else b""
    match = re.fullmatch(rb"step-(\d{8})", name)
    named = int(match[1]) if match else max(left, default=0)
    before = [step for step in same if step <= named]
    return max(before or same, default=None) if left else 0


def steps_of(run: Path) -> Steps:
    lines = read_metrics(run / "metrics.jsonl")
    return [{key: line[key] for key in OF_STEPS} for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def whole(ranks, prepared, tmp_path_factory):
    """Runs that nothing happened to, and such that were stopped after the last of ``SAVED``; by layout, when asked."""
    folder = tmp_path_factory.mktemp("damage")

    def run_of(layout: str) -> tuple[Path, Path]:
        end, begin = folder / layout / "whole", folder / layout / "stopped"
        for run, stop in ((end, None), (begin, SAVED[-1])):
            if not run.exists():
                values = settings(prepared, run, STEPS, TINY | LAYOUTS[layout])
                errors = ranks.run(train_here, values, count=ranks_of(values), seconds=120, stop_after=stop)
                assert not any(errors), errors
        assert [path.name for path in ckpt.steps(begin / "checkpoints")] == [f"step-{step:08d}" for step in SAVED]
        return end, begin

    return run_of


@pytest.mark.parametrize("case", range(CASES))
def test_no_resume_continues_from_damage(ranks, prepared, tmp_path, whole, case):
    rng = random.Random(f"{SEED} {case}")
    layout = rng.choice(["1 rank"] * 4 + list(LAYOUTS))
    end, begin = whole(layout)
    run = tmp_path / "run"
    shutil.copytree(begin, run)
    done = damage(rng, run / "checkpoints")
    expected = expected_step(run / "checkpoints", begin / "checkpoints")
    before = content(run)
    values = settings(prepared, run, STEPS, TINY | LAYOUTS[layout])
    try:
        error, *others = ranks.run(train_here, values, count=ranks_of(values), seconds=120)
        assert all(other == error for other in others)
        if expected is None:
            assert error is not None and "has no whole checkpoint" in error and "\n" not in error
            assert content(run) == before
            return
        assert error is None
        assert steps_of(run) == steps_of(end)
        # It saved what comes after where it began.
        saves = [line["step"] for line in read_metrics(run / "metrics.jsonl") if "save_seconds" in line]
        assert saves == [*SAVED, STEPS]
        for name in (f"checkpoints/step-{step:08d}" for step in (*SAVED, STEPS) if step > expected):
            ours, theirs = content(run / name), content(end / name)
            del ours[ckpt.MANIFEST], theirs[ckpt.MANIFEST]  # they name the folder of the run
            assert ours == theirs
    except BaseException as problem:
        problem.add_note(f"FARSPAN_TEST_SEED={SEED}, case {case}, {layout}: {done}; expected to begin at {expected}")
        raise
