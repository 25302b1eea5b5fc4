"""Training goes on while a slow disk takes a checkpoint.

FARSPAN_TEST_SLOW_SAVE_SECONDS=600 makes the save last ten minutes.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from runs import ranks_of, settings, train_here
from slow_disk import slow_down

from farspan.pretrain import checkpoint as ckpt
from farspan.pretrain.metrics import read_metrics

pytestmark = pytest.mark.alone

SECONDS = float(os.environ.get("FARSPAN_TEST_SLOW_SAVE_SECONDS", "15"))
SHORT = 3.0  # where a save only has to be slow
LIMIT = 0.02  # of the time that a save takes: how long training may stand still
STEP_SECONDS = 0.25  # that an accelerator would compute while the CPU has nothing to do
BEFORE = 8  # steps until the save
LAYOUTS = {"1 rank": {}, "DP2, ZeRO 1": {"parallel.data": 2, "parallel.zero_stage": 1}}


def train_on_a_slow_disk(values: dict[str, Any], bytes_per_second: float, saved: Collection[int]) -> str | None:
    """Train on such a disk, save after these steps and no others."""
    from farspan.parallel.engine import Engine
    from farspan.pretrain.saving import Saving

    train_batch = Engine.train_batch

    @functools.wraps(train_batch)
    def on_an_accelerator(*args: Any, **kwargs: Any) -> Any:
        time.sleep(STEP_SECONDS)
        return train_batch(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        slow_down(patch, lambda: bytes_per_second)
        patch.setattr(Engine, "train_batch", on_an_accelerator)
        patch.setattr(Saving, "due", lambda self, done, last: done in saved)
        return train_here(values)


@dataclasses.dataclass(frozen=True)
class Step:
    """``seconds`` of training, ``between`` that and the training of the step before, by the clock of the event file."""

    number: int
    end: float
    seconds: float
    between: float


class Run:
    """A run on a slow disk, until its last save is there."""

    def __init__(self, pool: Ranks, values: dict[str, Any], seconds: float, saves: tuple[int, ...]) -> None:
        self.folder = Path(values["run_dir"])
        self.saves: dict[int, dict[str, Any]] = {}
        # How much a rank writes, on a disk that is as fast as it is.
        short = values | {"run_dir": str(self.folder) + "-short"}
        error = pool.run(
            train_on_a_slow_disk,
            short | {"training": values["training"] | {"steps": 4}},
            1e12,
            (1,),
            count=ranks_of(values),
        )
        assert not any(error), error
        files = list(Path(short["run_dir"]).glob("checkpoints/step-*/*.safetensors"))
        sizes = [sum(f.stat().st_size for f in files if f.stem.endswith(f"{r:05d}")) for r in range(ranks_of(values))]
        pool.begin(train_on_a_slow_disk, values, max(sizes) / seconds, saves, count=ranks_of(values))
        end = time.monotonic() + 60 + 2 * len(saves) * seconds
        while len(self.saves) < len(saves) or self.lines[-1]["step"] < saves[-1] + BEFORE:
            assert time.monotonic() < end and not pool.answered(), self.lines[-3:]
            time.sleep(0.2)
            path = self.folder / "metrics.jsonl"
            self.lines = read_metrics(path) if path.exists() else []
            self.saves = {line["step"]: line for line in self.lines if "save_seconds" in line}
        pool.stop()

    def steps(self) -> list[Step]:
        """All but the first two, which warm up."""
        seconds = {line["step"]: line["step_seconds"] for line in self.lines if "loss" in line}
        ends = {event.step: event.wall_time for event in self.events("train/loss")}
        return [
            Step(n, ends[n], seconds[n], ends[n] - ends[n - 1] - seconds[n]) for n in sorted(seconds)[2:] if n in ends
        ]

    def events(self, name: str) -> list[Any]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.folder / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        return list(events.Scalars(name))


@pytest.fixture
def run(fork_server, prepared, tmp_path):
    pools: list[Ranks] = []

    def start(seconds: float, saves: tuple[int, ...] = (BEFORE,), **overrides: Any) -> Run:
        layout = {"logging.tensorboard": True, "training.global_batch_size": 4} | overrides
        pools.append(Ranks(fork_server))
        return Run(pools[-1], settings(prepared, tmp_path / f"run-{len(pools)}", 10**6, layout), seconds, saves)

    yield start
    for pool in pools:
        pool.stop()


def stalled(run: Run, save: dict[str, Any]) -> tuple[float, list[Step], list[Step]]:
    """How long training stood still for a save, by what is between the steps; the steps beside it, and the others."""
    steps = run.steps()
    begin = next(step.end for step in steps if step.number == save["step"])
    beside = [step for step in steps if begin < step.end <= begin + save["save_seconds"]]
    others = [step for step in steps if step.number <= save["step"] or step.end > begin + save["save_seconds"] + 1]
    usual = statistics.median(step.between for step in others)
    after = [
        step
        for step in steps
        if step.number > save["step"] and step.end - step.seconds - step.between < begin + save["save_seconds"]
    ]
    return sum(step.between - usual for step in after), beside, others


@pytest.mark.timeout(2 * (240 + 3 * SECONDS))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_goes_on_beside_a_slow_save(run, layout):
    for _ in range(2):  # now and then it is the machine that stands still
        found = run(SECONDS, **LAYOUTS[layout])
        (save,) = found.saves.values()
        seconds, said = save["save_seconds"], save["save_stall_seconds"]
        measured, beside, others = stalled(found, save)
        print(f"{layout}: a save of {seconds:.1f} s, {len(beside)} steps beside it; stall {said:.3f} s, "
              f"seen {measured:.3f} s")  # fmt: skip
        if measured < LIMIT * seconds:
            break
    assert seconds >= SECONDS
    assert said < LIMIT * seconds
    assert measured < LIMIT * seconds
    usual = statistics.median(step.seconds for step in others)
    assert statistics.median(step.seconds for step in beside) < 1.25 * usual
    assert len(beside) > 0.6 * seconds / usual
    (event,) = found.events("checkpoint/save_stall_seconds")
    assert (event.step, event.value) == (BEFORE, pytest.approx(said))
    reader = ckpt.Reader(ckpt.find(found.folder))
    reader.verify()
    assert reader.manifest.step == BEFORE


def test_without_asynchronous_saves_it_stands_still(run):
    found = run(SHORT, **{"checkpoint.asynchronous": False})
    (save,) = found.saves.values()
    measured, beside, _ = stalled(found, save)
    assert save["save_seconds"] >= SHORT and not beside
    for stall in (save["save_stall_seconds"], measured):
        assert stall == pytest.approx(save["save_seconds"], rel=0.1)


def test_a_save_waits_for_the_one_before_and_says_so(run):
    found = run(SHORT, (BEFORE, BEFORE + 4))
    first, second = found.saves.values()
    steps = {step.number: step for step in found.steps()}
    waited = steps[BEFORE + 5].between
    assert 0.3 * SHORT < waited < SHORT
    assert first["save_stall_seconds"] == pytest.approx(waited, abs=0.1 * SHORT)
    print(f"waited {waited:.2f} s; stalls {first['save_stall_seconds']:.2f}, {second['save_stall_seconds']:.2f} s")
    assert second["save_stall_seconds"] < 0.5 * waited  # is not told twice
