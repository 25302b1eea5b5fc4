"""float16 with its loss scale, and steps that are not finite: skipped, counted, told, in every layout alike."""

from __future__ import annotations

import json
import math

import pytest
import torch
from comparison import assert_identical
from runs import Run, ranks_of, settings, train_here

from farspan.pretrain import checkpoint as ckpt
from farspan.pretrain.metrics import read_metrics

DROPOUT = {"model.hidden_dropout_prob": 0.1, "model.attention_probs_dropout_prob": 0.1}
FLOAT16 = {"training.dtype": "float16"}
LAYOUTS = {
    "1 rank": {},
    "TP2 + SP": {"parallel.tensor": 2, "parallel.sequence": True},
    "PP2 interleaved": {"parallel.pipeline": 2, "parallel.virtual_stages": 2},
    **{f"DP2, ZeRO {stage}": {"parallel.data": 2, "parallel.zero_stage": stage} for stage in range(4)},
    "ZeRO 1, offload": {"parallel.zero_stage": 1, "parallel.offload_optimizer": True},
    "DP2, ZeRO 3, offload": {"parallel.data": 2, "parallel.zero_stage": 3, "parallel.offload_optimizer": True},
    "DP2, ZeRO 2, offload": {"parallel.data": 2, "parallel.zero_stage": 2, "parallel.offload_optimizer": True},
}
IN_FLOAT16 = [name for name in LAYOUTS if name != "DP2, ZeRO 2, offload"]  # that one is refused
POISONED_STEP, POISONED_SAMPLE, ROWS = 3, 19, 8  # the sample is of the third step, of the first of two replicas


@pytest.fixture
def start(ranks, prepared, tmp_path):
    """start(name, overrides, ...): train in a folder of that name; the error line, if there was one."""

    def call(name, overrides, *, function=train_here, steps=6, **options):
        if overrides.get("parallel.zero_stage") == 3:
            ranks.stop()  # DeepSpeed compares numbers that a process's past decides
        values = settings(prepared, tmp_path / name, steps, overrides)
        errors = ranks.run(function, values, count=ranks_of(values), seconds=120, **options)
        assert len({error is None for error in errors}) == 1, errors
        return errors[0]

    return call


def lines_of(folder) -> list[dict]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if "lr" in line]


def train_poisoned(values: dict, what: str) -> str | None:
    """Train with one microbatch whose loss is not finite: its value alone, or a gradient alone."""
    from farspan.pretrain.losses import LossFunction

    healthy = LossFunction.__call__

    def sick(self, outputs, batch, counts):
        loss, statistics = healthy(self, outputs, batch, counts)
        if POISONED_SAMPLE not in batch.sample_ids.tolist():
            return loss, statistics
        if what == "loss":  # an infinite value with a finite gradient
            statistics = statistics.clone()
            statistics[0] = math.inf
            statistics[self.statistics + batch.sample_ids.tolist().index(POISONED_SAMPLE)] = math.inf
            return loss + math.inf, statistics
        return loss + (loss - loss.detach()) * math.nan, statistics.nan_to_num()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LossFunction, "__call__", sick)
        return train_here(values)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped(start, tmp_path, name, what):
    """The other steps are those of a run that never made it: the skipped one changed no weight and no moment."""
    saves = {"checkpoint.interval": 1, "checkpoint.keep_last": 0}
    assert start("poisoned", DROPOUT | saves | LAYOUTS[name], function=train_poisoned, what=what) is None
    lines = lines_of(tmp_path / "poisoned")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1, 1]
    finite = [line["grad_norm"] is not None for line in lines]
    assert finite == [step != POISONED_STEP for step in range(1, 7)]
    assert (lines[POISONED_STEP - 1]["loss"] is None) == (what == "loss")
    (spike,) = [json.loads(line) for line in (tmp_path / "poisoned/spikes.jsonl").read_text().splitlines()]
    assert (spike["step"], spike["first_sample"], spike["samples"]) == (POISONED_STEP, 2 * ROWS, ROWS)
    assert "not finite: skipped" in spike["reason"]
    assert {row["sample"] for row in spike["worst_samples"]} == set(range(2 * ROWS, 3 * ROWS))
    if what == "loss":
        assert spike["worst_samples"][0] == {"sample": POISONED_SAMPLE, "loss": "inf"}
    readers = [ckpt.Reader(tmp_path / f"poisoned/checkpoints/step-{step:08d}") for step in (2, 3, 4)]
    before, skipped, after = ({n: reader.tensor(n) for n in reader.names()} for reader in readers)
    assert_identical(skipped, before)
    assert any(not torch.equal(after[n], before[n]) for n in after)
    states = [state_of(reader) for reader in readers]
    assert_identical(states[1], states[0])
    assert states[2].keys() == states[0].keys()
    assert [{entry.step for entry in reader.manifest.tensors.values()} - {None} for reader in readers] == [
        {2},
        {2},
        {3},
    ]


def state_of(reader: ckpt.Reader) -> dict[str, torch.Tensor]:
    """All that the optimizer keeps."""
    pairs = [(kind, name) for name in reader.names() for kind in reader.kinds(name) if kind != "weight"]
    assert pairs
    return {f"{kind} {name}": reader.tensor(name, kind=kind) for kind, name in pairs}


def test_the_skip_is_the_same_in_every_layout(start, tmp_path):
    assert start("single", DROPOUT, function=train_poisoned, what="gradient") is None
    for name, overrides in list(LAYOUTS.items())[1:]:
        assert start(name, DROPOUT | overrides, function=train_poisoned, what="gradient") is None
        for ours, theirs in zip(lines_of(tmp_path / name), lines_of(tmp_path / "single"), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), name
            if theirs["grad_norm"] is not None:
                assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5), name


def test_a_run_that_only_skips_ends(start, tmp_path):
    """Weights that a far too high rate has thrown to infinity never recover."""
    overrides = {"optimizer.lr": 1e30, "schedule.warmup_steps": 0, "training.max_skipped_steps": 3}
    error = start("run", overrides | {"checkpoint.interval": 1}, steps=20)
    assert error is not None and "in a row whose loss or gradient is not finite (training.max_skipped_steps)" in error
    lines = lines_of(tmp_path / "run")
    assert len(lines) < 10 and lines[-1]["skipped_steps"] == 3
    assert [line["grad_norm"] for line in lines[-3:]] == [None] * 3


@pytest.mark.parametrize("name", IN_FLOAT16)
def test_float16_follows_float32(start, tmp_path, name):
    assert start("float32", DROPOUT) is None
    assert start("run", DROPOUT | FLOAT16 | LAYOUTS[name]) is None
    lines = lines_of(tmp_path / "run")
    assert {line["loss_scale"] for line in lines} == {65536.0}
    pairs = zip(Run(tmp_path / "run").steps(), Run(tmp_path / "float32").steps(), strict=True)
    for (loss, norm), (loss32, norm32) in pairs:
        assert loss != loss32 and loss == pytest.approx(loss32, rel=1e-3)
        assert norm == pytest.approx(norm32, rel=1e-2)


@pytest.mark.parametrize("name", IN_FLOAT16)
def test_the_loss_scale_finds_its_height(start, tmp_path, name):
    """Too high it halves, a step skipped each time, until the gradients fit; then it doubles after each window."""
    scaling = {"training.initial_loss_scale": 2.0**24, "training.loss_scale_window": 2}
    assert start("run", DROPOUT | FLOAT16 | scaling | LAYOUTS[name], steps=16) is None
    lines, scale, good, skipped = lines_of(tmp_path / "run"), 2.0**24, 0, 0
    for line in lines:
        assert line["loss_scale"] == scale
        if line["grad_norm"] is None:
            scale, good, skipped = scale / 2, 0, skipped + 1
        else:
            good += 1
            if good == 2:
                scale, good = min(scale * 2, 2.0**24), 0
        assert line["skipped_steps"] == skipped
    assert skipped >= 2 and lines[-1]["loss"] < lines[0]["loss"]


def test_a_spike_names_its_samples(start, tmp_path):
    """A gradient norm far above the median is told but not skipped."""
    watching = {"spikes.window": 2, "spikes.patience": 1, "spikes.gradient_norm_factor": 3.0}
    assert start("run", watching, function=train_with_a_spike, steps=5) is None
    (spike,) = [json.loads(line) for line in (tmp_path / "run/spikes.jsonl").read_text().splitlines()]
    assert spike["step"] == POISONED_STEP and "times the median of 2 steps" in spike["reason"]
    assert spike["worst_samples"][0]["sample"] == POISONED_SAMPLE
    assert [line["skipped_steps"] for line in lines_of(tmp_path / "run")] == [0] * 5


def train_with_a_spike(values: dict) -> str | None:
    """One row's loss, and the gradient of its microbatch, a hundredfold."""
    from farspan.pretrain.losses import LossFunction

    healthy = LossFunction.__call__

    def spiking(self, outputs, batch, counts):
        loss, statistics = healthy(self, outputs, batch, counts)
        samples = batch.sample_ids.tolist()
        if POISONED_SAMPLE in samples:
            statistics[self.statistics + samples.index(POISONED_SAMPLE)] *= 100
            loss = loss * 100
        return loss, statistics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LossFunction, "__call__", spiking)
        return train_here(values)
