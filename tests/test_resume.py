"""A run that was interrupted and goes on is, to the bit, the run that was not; whatever fails, older saves stay."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from comparison import assert_identical
from runs import MEGA, MRA, NYSTROMFORMER, Run, ranks_of, settings, train_here
from safetensors.torch import load_file
from small_disk import no_file_larger_than

from farspan.launch.local import COMMAND
from farspan.pretrain import checkpoint as ckpt
from farspan.pretrain import resume
from farspan.pretrain.metrics import read_metrics
from farspan.version import __version__

STEPS, STOP = 6, 3
DROPOUT = {"model.hidden_dropout_prob": 0.1, "model.attention_probs_dropout_prob": 0.1}
SAVES = {"checkpoint.interval": STOP, "evaluation.interval": STOP, "evaluation.rows": 8, "schedule.name": "cosine"}
BFLOAT16 = {"training.dtype": "bfloat16"}
# Overflows in its first steps, and the scale both falls and rises before and after the stop.
FLOAT16 = {"training.dtype": "float16", "training.initial_loss_scale": 2.0**24, "training.loss_scale_window": 1}
NO_WEIGHTS = {"model.attention_probs_dropout_prob": 0.0}
OFFLOAD = {"parallel.offload_optimizer": True}


def replicas(zero_stage: int) -> dict:
    return {"parallel.data": 2, "parallel.zero_stage": zero_stage}


LAYOUTS = {
    "1 rank": {},
    "1 rank, bfloat16": BFLOAT16,
    "TP2 × PP2": {"parallel.tensor": 2, "parallel.pipeline": 2},
    **{f"DP2, ZeRO {stage}": replicas(stage) for stage in range(4)},
    **{f"DP2, ZeRO {stage}, bfloat16": replicas(stage) | BFLOAT16 for stage in range(4)},
    "PP2, bfloat16, untied": BFLOAT16 | {"parallel.pipeline": 2, "model.tie_word_embeddings": False},
    "TP2 × PP2 interleaved + SP": {
        "parallel.tensor": 2, "parallel.sequence": True, "parallel.pipeline": 2, "parallel.virtual_stages": 2,
    },
    "1 rank, float16": FLOAT16,
    "DP2, ZeRO 1, float16, lamb": replicas(1) | FLOAT16 | {"optimizer.name": "lamb"},
    "1 rank, ZeRO 1, offload": OFFLOAD,
    "DP2, ZeRO 3, offload, bfloat16": replicas(3) | OFFLOAD | BFLOAT16,
    "TP2, mega with batch norm": {"parallel.tensor": 2, "model": MEGA | {"normalization_type": "batchnorm"}},
    "DP2, ZeRO 1, bfloat16, mega with batch norm": replicas(1)
    | BFLOAT16
    | {"model": MEGA | {"normalization_type": "syncbatchnorm"}},
    "TP2, mra, bfloat16": {"parallel.tensor": 2, "model": MRA, "data.sequence_length": 96} | BFLOAT16 | NO_WEIGHTS,
    "DP2, ZeRO 3, nystromformer": replicas(3) | {"model": NYSTROMFORMER} | NO_WEIGHTS,
    "DP2, ZeRO 2, batch ramp": replicas(2) | {"training.batch_ramp": {"start": 4, "increment": 4, "samples": 10}},
}  # fmt: skip


@pytest.fixture
def start(ranks, prepared, tmp_path):
    """start(name, overrides, ...): train in a folder of that name; the error line of rank 0, if there was one."""

    def call(name, overrides, *, function=train_here, steps=STEPS, **options):
        values = settings(prepared, tmp_path / name, steps, DROPOUT | SAVES | overrides)
        errors = ranks.run(function, values, count=ranks_of(values), seconds=120, **options)
        assert len({error is None for error in errors}) == 1, errors
        return errors[0]

    return call


def everything(folder: Path) -> tuple[list, list, dict]:
    """Steps, evaluations, and every tensor of every file of the last checkpoint."""
    run = Run(folder)
    last = ckpt.find(folder)
    tensors = {f"{path.name} {k}": t for path in last.glob("*.safetensors") for k, t in load_file(path).items()}
    return run.steps(), run.validations(), tensors


def assert_same_run(folder: Path, expected: Path) -> None:
    steps, validations, tensors = everything(folder)
    assert (steps, validations) == everything(expected)[:2]
    assert {name[:7] for name in tensors} == {"weights", "optimiz"}
    assert_identical(tensors, everything(expected)[2])
    manifest, of_whole = (ckpt.Manifest.read(ckpt.find(of)) for of in (folder, expected))
    for said in ("step", "files", "tensors", "trainer", "metrics"):
        assert getattr(manifest, said) == getattr(of_whole, said), said


@pytest.mark.parametrize("name", LAYOUTS)
def test_resumed_equals_uninterrupted(start, tmp_path, name):
    assert start("whole", LAYOUTS[name]) is None
    assert start("parts", LAYOUTS[name], stop_after=STOP) is None
    _leave_what_a_killed_process_leaves(tmp_path / "parts")
    assert start("parts", LAYOUTS[name]) is None
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert not list((tmp_path / "parts/checkpoints").glob(".*"))


def _leave_what_a_killed_process_leaves(run: Path) -> None:
    """Steps past the save, half a line, half a save."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": STOP + 1, "loss": 1.0, "grad_norm": 1.0}) + '\n{"step": 5, "lo')
    beside = run / f"checkpoints/.step-{STEPS:08d}.tmp"
    beside.mkdir()
    (beside / "weights-00000.safetensors").write_bytes(b"half of it")


def train_without(values: dict, what: str) -> str | None:
    """Train with a fault: the optimizer's state is not restored, or dropout counts its steps from the resume."""
    from farspan.kernels.dropout import DropoutKey
    from farspan.parallel.engine import Engine

    rows = DropoutKey.rows
    with pytest.MonkeyPatch.context() as patch:
        if what == "optimizer state":
            patch.setattr(Engine, "load_optimizer", lambda self, saved: None)
        else:
            earlier = lambda key: dataclasses.replace(key, step=key.step - STOP)  # noqa: E731
            patch.setattr(DropoutKey, "rows", lambda self, *args: rows(earlier(self), *args))
        return train_here(values)


@pytest.mark.parametrize("what", ["optimizer state", "the step"])
def test_a_resume_that_forgets_is_seen(start, tmp_path, what):
    assert start("whole", {}) is None
    assert start("parts", {}, stop_after=STOP) is None
    assert start("parts", {}, function=train_without, what=what) is None
    steps, expected = Run(tmp_path / "parts").steps(), Run(tmp_path / "whole").steps()
    assert steps[:STOP] == expected[:STOP]
    # The first gradient after the resume is that of the same weights: the state shows one step later.
    assert steps[STOP + 1 :] != expected[STOP + 1 :]


def test_killed_between_saves(start, prepared, tmp_path):
    """By the command line, with SIGKILL."""
    steps, interval = 60, 10
    overrides = {"checkpoint.interval": interval}
    assert start("whole", overrides, steps=steps) is None
    values = settings(prepared, tmp_path / "parts", steps, DROPOUT | SAVES | overrides)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    command = [*COMMAND, "train", str(tmp_path / "run.yaml")]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    metrics = tmp_path / "parts/metrics.jsonl"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 100
            saved = tmp_path / "parts/checkpoints"  # written behind the training, which may be some steps ahead
            while not ckpt.steps(saved) or metrics.read_bytes().count(b'"loss"') < interval + 3:
                assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
                time.sleep(0.005)
        finally:
            process.kill()
            process.wait()
        assert metrics.read_bytes().count(b'"loss"') < steps
        subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=120, check=True)
    assert b"from " + str(tmp_path / "parts/checkpoints/step-").encode() in (tmp_path / "log").read_bytes()
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.fixture(scope="module")
def other_data(prepared, tmp_path_factory):
    """The same text and tokenizer, split otherwise."""
    from farspan.pretrain.data.prepare import prepare

    out = tmp_path_factory.mktemp("other") / "data"
    text = prepared.parent / "text.txt"
    prepare([text], out, tokenizer=prepared / "tokenizer", validation_fraction=0.2, processes=1, progress=False)
    return out


def test_what_cannot_continue_is_refused(start, tmp_path, other_data):
    assert start("run", {}, stop_after=STOP) is None
    before = {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    refused = {
        "was trained on other data than": {"data.folder": str(other_data)},
        "was saved with training.seed 1234, now it is 7": {"training.seed": 7},
        "was saved with model.hidden_size 32, now it is 64": {"model.hidden_size": 64},
        "was saved with objective.probability 0.15, now it is 0.3": {"objective.probability": 0.3},
        "was saved with data.sequence_length 32, now it is 16": {"data.sequence_length": 16},
        "was saved with training.global_batch_size 8, now it is 4": {"training.global_batch_size": 4},
        "was saved with training.batch_ramp None, now it is": {
            "training.batch_ramp": {"start": 4, "increment": 4, "samples": 9}
        },
        "was saved with optimizer.name 'adamw', now it is 'lamb'": {"optimizer.name": "lamb"},
        "was saved with data.rows 'packed', now it is 'padded'": {"data.rows": "padded"},
        "was saved with training.dtype 'float32', now it is 'bfloat16'": BFLOAT16,
        "is past training.steps 2": {"training.steps": 2, "schedule.warmup_steps": 0},
    }
    for words, overrides in refused.items():
        assert words in str(start("run", overrides)), overrides
    assert "already has checkpoints" in start("run", {}, resume="never")
    assert "has no checkpoint" in start("run", {}, resume=str(tmp_path / "nowhere"))
    assert {path: path.read_bytes() for path in before} == before
    assert start("run", {}) is None


# Damage.


def flip(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


# What happens to which file of the newest checkpoint, and what is said of it.
DAMAGE = {
    "flipped weights": ("weights-00000.safetensors", flip, "is damaged"),
    "cut weights": ("weights-00001.safetensors", cut, "is damaged"),
    "no weights": ("weights-00000.safetensors", Path.unlink, "is missing"),
    "flipped optimizer": ("optimizer-00001.safetensors", flip, "is damaged"),
    "cut optimizer": ("optimizer-00000.safetensors", cut, "is damaged"),
    "no optimizer": ("optimizer-00001.safetensors", Path.unlink, "is missing"),
    "flipped tokenizer": ("tokenizer/tokenizer.json", flip, "is damaged"),
    "flipped manifest": (ckpt.MANIFEST, flip, "is damaged"),
    "cut manifest": (ckpt.MANIFEST, cut, "is damaged"),
    "no manifest": (ckpt.MANIFEST, Path.unlink, "is missing"),
}


@pytest.fixture(scope="module")
def saved_twice(ranks, prepared, tmp_path_factory):
    """A run of two replicas with ZeRO 1, whole, saved at steps 3 and 6; to be read only."""
    folder = tmp_path_factory.mktemp("twice") / "run"
    values = settings(prepared, folder, STEPS, DROPOUT | SAVES | replicas(1) | {"checkpoint.keep_last": 0})
    assert ranks.run(train_here, values, count=2, seconds=120) == [None, None]
    return folder


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def train_and_listen(values: dict, **options) -> tuple[str | None, str]:
    """Train; the error line, and what was said on the console."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        return train_here(values, **options), said.getvalue()


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_newest_whole_checkpoint_is_taken(start, ranks, prepared, tmp_path, saved_twice, kind):
    """The newest one is damaged, ``latest`` names it, and one rank alone looks at the damaged file."""
    file, harm, words = DAMAGE[kind]
    shutil.copytree(saved_twice, tmp_path / "run")
    newest = tmp_path / f"run/checkpoints/step-{STEPS:08d}"
    harm(newest / file)
    assert (newest.parent / "latest").read_text() == newest.name + "\n"
    overrides = DROPOUT | SAVES | replicas(1) | {"checkpoint.keep_last": 0}
    values = settings(prepared, tmp_path / "run", STEPS, overrides)
    answers = ranks.run(train_and_listen, values, count=2, seconds=120)
    assert [error for error, _ in answers] == [None, None]
    said = answers[0][1].splitlines()
    refused = [line for line in said if "not taken: " in line]
    assert len(refused) == 1 and str(newest / file) in refused[0] and words in refused[0], said
    assert any(f"steps {STOP + 1} to {STEPS} from {newest.parent}/step-{STOP:08d}" in line for line in said), said
    assert_same_run(tmp_path / "run", saved_twice)
    assert sorted(path.name for path in newest.parent.iterdir()) == ["latest", f"step-{STOP:08d}", newest.name]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_that_was_asked_for(ranks, prepared, tmp_path, saved_twice, kind):
    """By its path: said in one line on every rank, and no other is taken for it."""
    file, harm, words = DAMAGE[kind]
    shutil.copytree(saved_twice, tmp_path / "run")
    newest = tmp_path / f"run/checkpoints/step-{STEPS:08d}"
    harm(newest / file)
    before = content(tmp_path)
    values = settings(prepared, tmp_path / "run", STEPS, DROPOUT | SAVES | replicas(1))
    errors = ranks.run(train_here, values, count=2, resume=str(newest), seconds=120)
    expected = "has no checkpoint" if kind == "no manifest" else words
    assert all(error is not None and expected in error and str(newest) in error for error in errors), errors
    assert len(set(errors)) == 1
    assert content(tmp_path) == before


def test_no_whole_checkpoint(tmp_path, prepared, saved_twice):
    """By the command line, on two ranks: one line, exit code 2, nothing is changed."""
    run = tmp_path / "run"
    shutil.copytree(saved_twice, run)
    flip(run / f"checkpoints/step-{STOP:08d}/optimizer-00001.safetensors")
    (run / f"checkpoints/step-{STEPS:08d}" / ckpt.MANIFEST).unlink()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(prepared, run, STEPS, DROPOUT | SAVES | replicas(1))))
    before = content(tmp_path)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    command = [*COMMAND, "train", str(tmp_path / "run.yaml")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    line = f"farspan: {run}/checkpoints has no whole checkpoint, 2 damaged: "
    assert ended.returncode == 2, ended.stderr
    assert next(said for said in ended.stderr.splitlines() if said.startswith("farspan: ")).startswith(line)
    assert "Traceback" not in ended.stderr and not ended.stdout
    assert content(tmp_path) == before


def train_as_another(values: dict) -> tuple[str | None, str]:
    """With another Farspan than the one that saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "written_by", lambda: {"version": "9.9.9", "commit": "abcdef0"})
        return train_and_listen(values)


def test_what_has_changed_since_is_said(ranks, prepared, tmp_path, saved_twice):
    """A run reads its configuration and Farspan anew whenever it comes back."""
    shutil.copytree(saved_twice, tmp_path / "run")
    overrides = DROPOUT | SAVES | replicas(1) | {"checkpoint.keep_last": 0}
    values = settings(prepared, tmp_path / "run", STEPS, overrides)
    assert "changed since" not in ranks.run(train_and_listen, values, count=2, seconds=120)[0][1]
    values = settings(prepared, tmp_path / "run", STEPS + 2, overrides | {"optimizer.lr": 2e-3})
    (error, said), (_, silence) = ranks.run(train_as_another, values, count=2, seconds=120)
    assert error is None and "changed since" not in silence
    (line,) = [line for line in said.splitlines() if "changed since" in line]
    assert f"changed since that was saved: Farspan {__version__} " in line and "→ 9.9.9 abcdef0" in line
    assert f"training.steps {STEPS} → {STEPS + 2}, optimizer.lr 0.001 → 0.002" in line


def test_weights_alone_are_not_resumed(start, tmp_path):
    assert start("run", {}, stop_after=STOP) is None
    step = ckpt.find(tmp_path / "run")
    dataclasses.replace(ckpt.Manifest.read(step), layout={}).write(step)
    assert "has weights but no optimizer state" in start("run", {})


# Saves that fail.


def train_on_a_full_disk(values: dict, file: str, failing: list[int]) -> str | None:
    """Train; when the ``failing`` steps are saved, no file of this name may grow beyond a kilobyte: a write fails as on
    a full disk."""
    from farspan.pretrain.checkpoint import saver

    write = saver.write_tensors

    def limited(path: Path, tensors: dict) -> dict:
        if path.name != file or not any(f"{step:08d}" in str(path) for step in failing):
            return write(path, tensors)
        with no_file_larger_than(1024):
            return write(path, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "write_tensors", limited)
        return train_here(values)


@pytest.mark.parametrize("file", ["weights-00000.safetensors", "optimizer-00001.safetensors"])
def test_a_failed_last_save_leaves_the_older_ones(start, tmp_path, file):
    overrides = replicas(1) | {"checkpoint.keep_last": 1}
    error = start("run", overrides, function=train_on_a_full_disk, file=file, failing=[STEPS])
    assert f"the checkpoint of step {STEPS} was not saved" in error and "older ones are untouched" in error
    assert file in error and "goes on from the latest" in error
    root = tmp_path / "run/checkpoints"
    assert (root / "latest").read_text() == f"step-{STOP:08d}\n"
    assert sorted(path.name for path in root.iterdir()) == ["latest", f"step-{STOP:08d}"]
    assert start("run", overrides) is None
    assert start("whole", overrides) is None
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_save_does_not_end_the_run(start, tmp_path, asynchronous):
    """It is counted; the next one is whole, and the run the same."""
    overrides = replicas(1) | {"checkpoint.keep_last": 0, "checkpoint.interval": 1}
    overrides |= {"checkpoint.asynchronous": asynchronous}
    file = "optimizer-00001.safetensors"
    assert start("run", overrides, function=train_on_a_full_disk, file=file, failing=[2, 3]) is None
    assert start("whole", overrides) is None
    assert [folder.name for folder in ckpt.steps(tmp_path / "run/checkpoints")] == [
        f"step-{step:08d}" for step in (1, 4, 5, 6)
    ]
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    saves = [line for line in read_metrics(tmp_path / "run/metrics.jsonl") if "failed_saves" in line]
    assert [line["step"] for line in saves] == [1, 2, 3, 4, 5, 6]
    assert [line["failed_saves"] for line in saves] == [0, 1, 2, 2, 2, 2]
    assert [file in line.get("save_problem", "") for line in saves] == [False, True, True, False, False, False]


def test_which_checkpoint_a_folder_means(tmp_path, saved_twice):
    shutil.copytree(saved_twice, tmp_path / "run")
    root = tmp_path / "run/checkpoints"
    (root / "latest").write_text("step-00000099\n")
    assert ckpt.find(root).name == f"step-{STEPS:08d}"
    (root / f"step-{STEPS:08d}/manifest.json").unlink()
    assert ckpt.find(root).name == f"step-{STOP:08d}"
    shutil.rmtree(root / f"step-{STOP:08d}")
    with pytest.raises(ValueError, match="has no checkpoint"):
        ckpt.find(root)


@pytest.mark.parametrize(("keep_last", "kept"), [(0, [1, 2, 3, 4]), (2, [3, 4])])
def test_keep_last(start, tmp_path, keep_last, kept):
    assert start("run", {"checkpoint.interval": 1, "checkpoint.keep_last": keep_last}, steps=4) is None
    root = tmp_path / "run/checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["latest", *(f"step-{step:08d}" for step in kept)]
    assert (root / "latest").read_text() == "step-00000004\n"
