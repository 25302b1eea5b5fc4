"""A spike sends the run back, the data of the spike are left out, and a fresh run from its config.yaml is the same run.

The spikes are in the data: some samples' losses, and their gradients, are many times what they should be.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from comparison import assert_identical
from runs import Run, ranks_of, settings, train_here
from safetensors.torch import load_file

from farspan.pretrain import checkpoint as ckpt
from farspan.pretrain.metrics import read_metrics

STEPS, INTERVAL, ROWS = 16, 3, 8
# Steps 9 to 11.  Found after step 10, when step 9 was saved: back to 6, steps 8 to 11 are left out.
POISON = ((64, 88),)
SPIKES = {
    "spikes.action": "rollback", "spikes.window": 4, "spikes.patience": 2, "spikes.gradient_norm_factor": 0.0,
    "spikes.loss_deviations": 200.0, "spikes.skip_before": 1, "spikes.skip_after": 1,
}  # fmt: skip
COMMON = SPIKES | {
    "model.num_hidden_layers": 2,
    "model.hidden_dropout_prob": 0.1,
    "schedule.name": "cosine",
    "evaluation.interval": 4,
    "evaluation.rows": 8,
    "checkpoint.interval": INTERVAL,
    "checkpoint.keep_last": 2,
}
LAYOUTS = {
    "1 rank": {},
    "1 rank, synchronous": {"checkpoint.asynchronous": False},
    "2 ranks, TP2": {"parallel.tensor": 2},
    "TP2 × PP2": {"parallel.tensor": 2, "parallel.pipeline": 2},
    "DP2, ZeRO 1, bfloat16": {"parallel.data": 2, "parallel.zero_stage": 1, "training.dtype": "bfloat16"},
    "DP2, ZeRO 3": {"parallel.data": 2, "parallel.zero_stage": 3},
    "1 rank, batch ramp": {"training.batch_ramp": {"start": 4, "increment": 2, "samples": 32}},
}
OF_THE_MACHINE = {"tokens_per_second", "step_seconds", "data_wait_seconds", "peak_memory_bytes"}

Answer = tuple[str | None, list[str]]


def train_poisoned(
    values: dict[str, Any],
    poison: Sequence[tuple[int, int]] = POISON,
    factor: float = 40.0,
    at_step: int = 0,
    then: str | None = None,
    **options: Any,
) -> Answer:
    """Train, with losses ``factor`` times as large in microbatches that have poisoned samples; the error and what
    was said.  ``then``: which function is called, once, at the end of step ``at_step``."""
    from farspan.pretrain.losses import LossFunction
    from farspan.pretrain.metrics import MetricsWriter

    healthy, message, train, said = LossFunction.__call__, MetricsWriter.message, MetricsWriter.train, []
    happened = []

    def sick(self, outputs, batch, counts):
        loss, statistics = healthy(self, outputs, batch, counts)
        if any(begin <= sample < end for sample in batch.sample_ids.tolist() for begin, end in poison):
            statistics = statistics.clone()
            statistics[0] *= factor
            loss = loss * factor
        return loss, statistics

    def heard(self, text):
        said.append(text)
        message(self, text)

    def reported(self, metrics):
        train(self, metrics)
        if then is not None and metrics.step == at_step and not happened:
            happened.append(globals()[then](values))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LossFunction, "__call__", sick)
        patch.setattr(MetricsWriter, "message", heard)
        patch.setattr(MetricsWriter, "train", reported)
        return train_here(values, **options), said


@pytest.fixture
def start(ranks, prepared, tmp_path):
    """start(name, overrides, ...): train in a folder of that name; what rank 0 answers."""

    def call(name, overrides, *, function=train_poisoned, steps=STEPS, **options):
        if overrides.get("parallel.zero_stage") == 3:
            ranks.stop()  # DeepSpeed compares numbers that a process's past decides
        values = settings(prepared, tmp_path / name, steps, COMMON | overrides)
        return ranks.run(function, values, count=ranks_of(values), seconds=120, **options)[0]

    return call


def repeat(ranks, folder: Path, into: Path) -> Run:
    """A fresh run from a run's config.yaml, where no data are poisoned."""
    values = yaml.safe_load((folder / "config.yaml").read_text()) | {"run_dir": str(into)}
    if values["parallel"]["zero_stage"] == 3:
        ranks.stop()
    assert ranks.run(train_here, values, count=ranks_of({"parallel": _set(values["parallel"])}), seconds=120)[0] is None
    return Run(into)


def _set(parallel: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parallel.items() if value is not None}


def lines(folder: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of steps and evaluations."""
    of_steps = [line for line in read_metrics(folder / "metrics.jsonl") if "failed_saves" not in line]
    return [{key: value for key, value in line.items() if key not in OF_THE_MACHINE} for line in of_steps]


def assert_same_run(folder: Path, other: Path) -> None:
    """Every step, evaluation, weight and moment, to the bit."""
    assert lines(folder) == lines(other)
    ours, theirs = ckpt.find(folder), ckpt.find(other)
    assert ours.name == theirs.name
    files = [
        {f"{p.name} {k}": t for p in of.glob("*.safetensors") for k, t in load_file(p).items()} for of in (ours, theirs)
    ]
    assert_identical(*files)
    watches = [ckpt.Manifest.read(of).trainer["watch"] for of in (ours, theirs)]
    assert watches[0] == watches[1]


def undone(folder: Path) -> list[dict[str, Any]]:
    """What undone.jsonl says of steps, evaluations and spikes."""
    of_steps = [line for line in read_metrics(folder / "undone.jsonl") if "failed_saves" not in line]
    return [{key: value for key, value in line.items() if key not in OF_THE_MACHINE} for line in of_steps]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollbacks.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_spike_is_undone_and_the_run_can_be_repeated(start, ranks, tmp_path, name):
    folder = tmp_path / "run"
    ramp = "training.batch_ramp" in LAYOUTS[name]
    poison = ((34, 58),) if ramp else POISON  # of steps 8 to 10
    error, said = start("run", LAYOUTS[name], poison=poison)
    assert error is None
    (record,) = records(folder)
    assert (record["step"], record["first_step"], record["checkpoint_step"]) == (10, 9, 6) or ramp
    if not ramp:
        assert record["skip"] == {"step": 8, "samples": 4 * ROWS} and record["first_sample"] == 7 * ROWS
    assert len(record["losses"]) == len(record["gradient_norms"]) == 4
    assert record["losses"][-1] > 10 * record["losses"][0]
    (line,) = [line for line in said if "back to step" in line]
    assert f"samples {record['first_sample']} to " in line and "rollback 1 of at most 10" in line
    steps = [line["step"] for line in lines(folder) if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    assert max(loss for loss, _ in Run(folder).steps()) < 10
    assert {line["rollback"] for line in undone(folder)} == {1}
    there = [line["step"] for line in undone(folder) if "lr" in line]
    assert there == list(range(record["checkpoint_step"] + 1, record["step"] + 1))
    assert sum("worst_samples" in line for line in undone(folder)) == 2
    assert not (folder / "spikes.jsonl").exists() or not (folder / "spikes.jsonl").read_text()

    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["skip"] == [record["skip"]]
    repeat(ranks, folder, tmp_path / "repeated")
    assert not (tmp_path / "repeated/rollbacks.jsonl").exists()
    assert_same_run(folder, tmp_path / "repeated")


def test_without_the_rollback_the_poison_is_trained_on(start, ranks, tmp_path):
    """What the other tests would not see if nothing was poisoned."""
    error, _ = start("run", {"spikes.action": "log"})
    assert error is None and not (tmp_path / "run/rollbacks.jsonl").exists()
    assert [loss > 50 for loss, _ in Run(tmp_path / "run").steps()] == [9 <= step <= 11 for step in range(1, STEPS + 1)]
    spikes = [json.loads(line) for line in (tmp_path / "run/spikes.jsonl").read_text().splitlines()]
    # Of the four losses before the third two are large already.
    assert [spike["step"] for spike in spikes] == [9, 10] and "deviations above" in spikes[0]["reason"]
    repeat(ranks, tmp_path / "run", tmp_path / "healthy")
    poisoned, healthy = Run(tmp_path / "run").steps(), Run(tmp_path / "healthy").steps()
    assert poisoned[:8] == healthy[:8] and poisoned[8] != healthy[8]


@pytest.mark.parametrize("second", [(128, 152), (104, 128)], ids=["later", "so soon that the two are one"])
def test_two_spikes(start, ranks, tmp_path, second):
    error, _ = start("run", {}, poison=(*POISON, second), steps=20)
    assert error is None
    first, then = records(tmp_path / "run")
    assert [first["rollback"], then["rollback"]] == [1, 2]
    assert then["skips_before"] == first["skips"] == [first["skip"]]
    # Whatever the steps are, what is left out is whole: from before the first poisoned sample to after the last.
    left_out = sum(skip["samples"] for skip in then["skips"])
    assert left_out % ROWS == 0 and left_out >= 8 * ROWS
    assert max(loss for loss, _ in Run(tmp_path / "run").steps()) < 10
    repeat(ranks, tmp_path / "run", tmp_path / "repeated")
    assert_same_run(tmp_path / "run", tmp_path / "repeated")


def test_after_so_many_rollbacks_the_run_ends(start, tmp_path):
    """All data are poisoned from some sample on: it is not the data."""
    error, _ = start("run", {"spikes.max_rollbacks": 2}, poison=[(64, 10**9)])
    assert error is not None and "\n" not in error
    assert "the run has gone back 2 times (spikes.max_rollbacks); its checkpoints are untouched" in error
    assert len(records(tmp_path / "run")) == 2
    assert ckpt.latest(tmp_path / "run/checkpoints") is not None
    again, _ = start("run", {"spikes.max_rollbacks": 2}, poison=[(64, 10**9)])
    assert again is not None and "the run has gone back 2 times" in again


def without_checkpoints(values: dict[str, Any]) -> None:
    for folder in (Path(values["run_dir"]) / "checkpoints").glob("step-*"):
        shutil.rmtree(folder)


def test_without_a_good_checkpoint_the_run_goes_on(start, tmp_path):
    overrides = {"checkpoint.asynchronous": False, "spikes.window": 6}  # all three steps are out of line
    error, said = start("run", overrides, at_step=8, then=without_checkpoints.__name__)
    assert error is None and not (tmp_path / "run/rollbacks.jsonl").exists()
    (line,) = [line for line in said if "no rollback" in line]
    assert "step 10" in line and "no whole checkpoint is left from before step 9: the run goes on" in line
    assert [loss > 50 for loss, _ in Run(tmp_path / "run").steps()] == [9 <= step <= 11 for step in range(1, STEPS + 1)]


def with_a_full_disk(values: dict[str, Any]) -> None:
    from farspan.pretrain import rollbacks

    def write(path: Path, text: str) -> None:
        raise OSError(28, os.strerror(28), str(path))

    rollbacks.write_text = write


def test_what_cannot_be_recorded_is_not_done(start, ranks, tmp_path):
    error, said = start("run", {}, at_step=8, then=with_a_full_disk.__name__)
    ranks.stop()  # the disk of that process stays full
    assert error is None and not (tmp_path / "run/rollbacks.jsonl").exists()
    (line,) = [line for line in said if "no rollback" in line]
    assert "it cannot be recorded" in line and "No space left on device" in line
    assert [line["step"] for line in lines(tmp_path / "run") if "lr" in line] == list(range(1, STEPS + 1))


def test_before_the_first_checkpoint_it_begins_anew(start, ranks, tmp_path):
    error, said = start("run", {"checkpoint.interval": 10})
    assert error is None and any("back to the initial values" in line for line in said)
    (record,) = records(tmp_path / "run")
    assert record["checkpoint_step"] == 0 and record["skip"]["step"] == 8
    repeat(ranks, tmp_path / "run", tmp_path / "repeated")
    assert_same_run(tmp_path / "run", tmp_path / "repeated")


def test_steps_that_are_not_finite(start, ranks, tmp_path):
    overrides = {"training.max_skipped_steps": 2}
    error, said = start("run", overrides, factor=math.inf)
    assert error is None
    (record,) = records(tmp_path / "run")
    assert (record["step"], record["first_step"], record["checkpoint_step"]) == (10, 9, 6)
    assert any("2 steps in a row are not finite" in line for line in said)
    repeat(ranks, tmp_path / "run", tmp_path / "repeated")
    assert_same_run(tmp_path / "run", tmp_path / "repeated")
    assert lines(tmp_path / "run")[-1]["step"] == STEPS


def test_a_checkpoint_that_good_ones_must_not_make_room_for(start, tmp_path):
    """Saved at every step, two are kept: those before the spike too, or there would be none."""
    error, _ = start("run", {"checkpoint.interval": 1, "spikes.patience": 2, "spikes.skip_before": 3})
    assert error is None
    (record,) = records(tmp_path / "run")
    assert record["checkpoint_step"] == 5 and record["skip"] == {"step": 6, "samples": 6 * ROWS}


def ask_to_stop(values: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_asked_to_stop_while_going_back(start, ranks, tmp_path):
    assert start("whole", {})[0] is None
    error, said = start("run", {}, at_step=10, then=ask_to_stop.__name__)
    assert error is None and len(records(tmp_path / "run")) == 1
    assert len([line for line in said if line.startswith("roberta")]) == 1, "it did not go on"
    assert start("run", {})[0] is None
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# What a resume takes for granted.


def test_a_resume_takes_what_the_run_leaves_out(start, tmp_path):
    assert start("whole", {})[0] is None
    assert start("run", {}, stop_after=12)[0] is None
    assert records(tmp_path / "run")
    error, _ = start("run", {"data.skip": [{"step": 3, "samples": 8}]})
    assert error is not None and "lacks what the rollbacks of" in error and "[{step: 8, samples: 32}]" in error
    # By hand, beside it, from a later step on.
    assert start("run", {})[0] is None
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_by_hand(start, ranks, tmp_path):
    """A user who has seen a spike goes back and leaves out what caused it."""
    skip = [{"step": 8, "samples": 24}, {"step": 9, "samples": 8}]
    assert start("run", {"spikes.action": "log"}, stop_after=6)[0] is None
    error, _ = start("run", {"data.skip": [{"step": 6, "samples": 8}]})
    assert error is not None and "was saved with data.skip [], now it is [{step: 6, samples: 8}]: set it back" in error
    assert start("run", {"data.skip": skip})[0] is None
    assert not (tmp_path / "run/rollbacks.jsonl").exists()
    # From step 9 on it is what a single skip of as much gives; step 8 has the samples from 80 on.
    assert start("other", {"data.skip": [{"step": 8, "samples": 24}, {"step": 9, "samples": 8}]})[0] is None
    assert_same_run(tmp_path / "run", tmp_path / "other")


def test_a_damaged_record_is_one_line(start, tmp_path):
    assert start("run", {}, stop_after=12)[0] is None
    path = tmp_path / "run/rollbacks.jsonl"
    path.write_text(path.read_text()[:-20])
    error, _ = start("run", {})
    assert error is not None and "rollbacks.jsonl is damaged (line 1 is no rollback)" in error


# Kills.


def killed_at(values: dict[str, Any], number: int) -> Answer:
    """SIGKILL before the ``number``-th change to a folder after a spike was found, until the next step is reported."""
    from farspan.pretrain.going_back import GoingBack
    from farspan.pretrain.metrics import MetricsWriter

    counted, counting = 0, False

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal counted
        changes = event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate")
        if event == "open" and isinstance(arguments[2], int):
            changes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR)) and str(values["run_dir"]) in str(arguments[0])
        if counting and changes:
            counted += 1
            if counted == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    prepared, train = GoingBack._rollback, MetricsWriter.train

    def begin(self, *args):
        nonlocal counting
        counting = True
        return prepared(self, *args)

    def end(self, metrics):
        nonlocal counting
        counting = False
        train(self, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GoingBack, "_rollback", begin)
        patch.setattr(MetricsWriter, "train", end)
        error, said = train_poisoned(values)
    return error, [*said, f"counted {counted}"]


@pytest.mark.timeout(600)
def test_killed_in_the_midst(ranks, start, prepared, tmp_path):
    """At every change to a folder from the decision to the first step after it: the resumed run is the same."""
    assert start("whole", {})[0] is None
    assert start("begun", {}, stop_after=6)[0] is None
    values = settings(prepared, tmp_path / "begun", STEPS, COMMON)
    number, moments = 0, []
    while True:
        number += 1
        folder = tmp_path / f"killed{number}"
        shutil.copytree(tmp_path / "begun", folder)
        ranks.begin(killed_at, values | {"run_dir": str(folder)}, number, count=1)
        try:
            _, said = ranks.finish(120)[0]
        except Exception as error:
            assert "ended with code -9" in str(error), error
        else:
            assert said[-1] == f"counted {number - 1}", said
            break
        moments.append((folder / "rollbacks.jsonl").exists())
        assert start(folder.name, {})[0] is None
        assert_same_run(folder, tmp_path / "whole")
        assert [one | {"time": ""} for one in records(folder)] == [
            one | {"time": ""} for one in records(tmp_path / "whole")
        ]
        assert undone(folder) == undone(tmp_path / "whole")
        assert not list((folder / "checkpoints").glob(".step-*"))
        shutil.rmtree(folder)
    assert number > 10 and set(moments) == {False, True}, moments


@pytest.mark.parametrize("sign", ["undone.jsonl", "rollbacks.jsonl"])
def test_all_ranks_killed_in_the_midst(ranks, start, prepared, tmp_path, sign):
    two = {"parallel.data": 2}
    assert start("whole", two)[0] is None
    ranks.begin(train_poisoned, settings(prepared, tmp_path / "run", STEPS, COMMON | two), count=2)
    end = time.monotonic() + 60
    while not (tmp_path / "run" / sign).exists():
        assert time.monotonic() < end and not ranks.answered(), "there was no rollback"
        time.sleep(0.001)
    assert ranks.stop()[:2] == [-9, -9]
    assert len(lines(tmp_path / "run")) < len(lines(tmp_path / "whole"))
    assert start("run", two)[0] is None
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert len(records(tmp_path / "run")) == 1
