"""Runs in which a rank stops answering: all are reported, the one is named, the run ends, and goes on when it is
started again.

FARSPAN_TEST_HANG_SECONDS=30 for a machine that is so busy that a step of a tiny model takes seconds.
"""

from __future__ import annotations

import dataclasses
import os
import random
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from comparison import assert_identical
from faults import Member, alive, members, until, until_gone
from ranks import Ranks
from runs import Run, ranks_of, settings, train_here

from farspan.launch import hang_report
from farspan.launch.exit_codes import HUNG
from farspan.launch.local import COMMAND
from farspan.pretrain.metrics import read_metrics

HANG = float(os.environ.get("FARSPAN_TEST_HANG_SECONDS", "5"))
WRITING = 12.0  # seconds that stacks, reports and the end may take
STEPS = 60
TINY = {
    "model.num_hidden_layers": 2,
    "model.hidden_dropout_prob": 0.1,
    "training.global_batch_size": 4,
    "checkpoint.interval": 2,
    "health.hang_seconds": HANG,
    "health.straggler_factor": 0,
}
DP2 = {"parallel.data": 2}
LAYOUTS = {"TP2 × PP2": {"parallel.tensor": 2, "parallel.pipeline": 2}, "DP2": DP2}


def farspan_train(file: str, fault: str | None = None, rank: int = 0, at: int = 3, seconds: float = 0.0) -> int:
    """What the command does on one rank, with a ``fault`` there when the batch of step ``at`` is asked for."""
    import ctypes

    from farspan.launch.cli import main
    from farspan.pretrain import run, saving
    from farspan.pretrain.data.loader import Loader

    take = Loader.batch

    def in_a_trap() -> None:
        if fault == "loops":
            while True:
                pass
        elif fault == "holds the GIL":
            c, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
            c.pthread_mutex_lock(mutex)
            c.pthread_mutex_lock(mutex)
        else:
            time.sleep(1e6)

    def batch(self: Loader, step: int) -> Any:
        if fault is not None and int(os.environ["RANK"]) == rank and step == at:
            in_a_trap()
        return take(self, step)

    def slowly(module: Any, name: str) -> None:
        original = getattr(module, name)

        def later(*args: Any, **kwargs: Any) -> Any:
            time.sleep(seconds)
            return original(*args, **kwargs)

        patch.setattr(module, name, later)

    with pytest.MonkeyPatch.context() as patch:
        if fault != "is slow":
            patch.setattr(Loader, "batch", batch)
        else:
            slowly(run, "prepare_kernels")
            slowly(saving.Saving, "save")
            slowly(saving.Saving, "finish")
            patch.setattr(run, "stage_runner", _slow_stages(run.stage_runner, seconds / 4))
        return main(["train", file])


def _slow_stages(stage_runner: Any, seconds: float) -> Any:
    """Each microbatch of an evaluation takes so long."""

    def runner(*args: Any, **kwargs: Any) -> Any:
        run_stage = stage_runner(*args, **kwargs)
        if kwargs["dropout"] is not None:
            return run_stage

        def slow(*inputs: Any) -> Any:
            time.sleep(seconds)
            return run_stage(*inputs)

        return slow

    return runner


@dataclasses.dataclass
class Started:
    """A run on fresh ranks, each with its guard."""

    pool: Ranks
    values: dict[str, Any]

    def __post_init__(self) -> None:
        self.folder = Path(self.values["run_dir"])
        self.file = self.folder.with_suffix(".yaml")
        self.file.write_text(yaml.safe_dump(self.values))
        self.count = ranks_of(self.values)

    def begin(self, *fault: Any) -> None:
        self.pool.begin(farspan_train, str(self.file), *fault, count=self.count)

    def step(self) -> int:
        path = self.folder / "metrics.jsonl"
        return max((line["step"] for line in read_metrics(path)), default=0) if path.exists() else 0

    def members(self) -> dict[int, Member]:
        found = members(*self.pool.pids)
        assert sorted(found) == list(range(self.count)) and all(member.guard for member in found.values())
        return found

    def end(self, seconds: float) -> list[int]:
        """The exit codes of ranks that end by themselves; their guards end with them."""
        pids = [pid for member in self.members().values() for pid in (member.pid, member.guard)]
        until_gone(pids, seconds)
        return self.pool.stop()

    def finish(self) -> list[int]:
        return self.pool.finish(240.0)

    @property
    def hangs(self) -> list[Path]:
        return [p for p in (self.folder / "hangs").glob("*") if not p.name.startswith(".")]

    def reports(self) -> dict[int, tuple[str, hang_report.Report]]:
        (folder,) = self.hangs
        assert sorted(path.name for path in folder.iterdir()) == [
            *(f"rank-{rank:05d}.txt" for rank in range(self.count)),
            "summary.txt",
        ]
        texts = {rank: (folder / f"rank-{rank:05d}.txt").read_text() for rank in range(self.count)}
        return {rank: (text, hang_report.from_text(text)) for rank, text in texts.items()}

    def named(self) -> list[int]:
        """The ranks at which the summary says the run hangs."""
        (folder,) = self.hangs
        found = re.findall(r"^the run hangs at rank (\d+) of", (folder / "summary.txt").read_text(), re.M)
        return [int(rank) for rank in found]


@pytest.fixture
def started(fork_server, prepared, tmp_path):
    pool = Ranks(fork_server)

    def call(name: str = "run", steps: int = STEPS, **overrides: Any) -> Started:
        return Started(pool, settings(prepared, tmp_path / name, steps, TINY | overrides))

    yield call
    pool.stop()


def assert_same(folder: Path, whole: Path) -> None:
    assert Run(folder).steps() == Run(whole).steps()
    assert_identical(Run(folder).weights(), Run(whole).weights())


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("layout", "rank"), [("TP2 × PP2", None), ("DP2", 0)])
def test_a_stopped_rank_is_named_and_the_run_goes_on_later(started, layout, rank):
    """At a random moment; with every rank's stack; and the same command ends as if nothing had happened."""
    run = started(**LAYOUTS[layout])
    rank = random.randrange(run.count) if rank is None else rank
    run.begin()
    until(lambda: run.step() >= 5, 120)
    time.sleep(random.uniform(0.0, 0.3))
    victim = run.members()[rank]
    victim.stop()
    began = time.monotonic()
    assert run.end(60.0) == [HUNG] * run.count
    seconds = time.monotonic() - began
    print(f"stopped rank {rank}: all is over after {seconds:.1f} s, after step {run.step()}")
    assert HANG - 1.0 < seconds < HANG + WRITING
    assert run.named() == [rank]
    for number, (text, report) in run.reports().items():
        assert (report["rank"], report["world"]) == (number, run.count)
        assert re.search(r'File ".*pretrain/train.py", line \d+ in _train', text), text
        assert re.search(r"^Thread .*\n(  File .*\n)*  File .*loader.py", text, re.M), "all threads"
        assert report["record"]["phase"] in ("training", "saving") and report["record"]["step"] >= 4
        assert report["record"]["last"]["name"].split()[0] in text
        waits = hang_report.waits_for(report, {n: r for n, (_, r) in run.reports().items()})
        assert number == rank or waits is not None
    assert run.reports()[rank][1]["process"]["state"] == "T"
    assert run.reports()[rank][1]["pid"] == victim.pid
    assert 5 <= run.step() < STEPS

    run.begin()
    assert run.finish() == [0] * run.count
    whole = started("whole", **LAYOUTS[layout])
    errors = run.pool.run(train_here, whole.values, count=run.count, seconds=240.0)
    assert errors == [None] * run.count
    assert_same(run.folder, whole.folder)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("fault", "rank", "codes"),
    [("loops", 1, [HUNG, HUNG]), ("sleeps in the loader", 0, [HUNG, HUNG]), ("holds the GIL", 1, [HUNG, -9])],
)
def test_a_rank_in_a_trap_is_named(started, fault, rank, codes):
    run = started(**DP2)
    run.begin(fault, rank, 3)
    until(lambda: run.step() >= 3, 120)
    assert run.end(60.0) == codes
    assert run.named() == [rank]
    text, report = run.reports()[rank]
    assert report["process"]["state"] == ("R" if fault == "loops" else "S")
    assert "in in_a_trap" in report["top"] and "in batch" in text
    assert not report["record"]["last"]["waiting"]
    other = run.reports()[1 - rank][1]
    assert other["record"]["last"]["waiting"]
    assert hang_report.waits_for(other, {n: r for n, (_, r) in run.reports().items()}) == [rank]


@pytest.mark.timeout(300)
def test_what_takes_long_is_no_hang(started):
    """A start, saves and an evaluation longer than the limit, and a rank that stands still for less than it."""
    slow = {"evaluation.interval": 4, "evaluation.rows": 16, "training.micro_batch_size": 1, "checkpoint.interval": 4}
    run = started(steps=4, **DP2, **slow)
    run.begin("is slow", 0, 0, 1.4 * HANG)
    until(lambda: run.step() >= 1, 120)
    with run.members()[1].stopped():
        time.sleep(0.5 * HANG)
    assert run.finish() == [0, 0]
    assert run.step() == 4 and run.hangs == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("command", [["train"], ["launch", "torchrun", "--max-restarts", "0"]])
def test_the_command_itself(command, prepared, tmp_path):
    """With ranks of its own: its exit code, what it says, and what it leaves."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings(prepared, tmp_path / "run", 10**6, TINY | DP2)))
    process = subprocess.Popen(
        [*COMMAND, *command, str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        metrics = tmp_path / "run/metrics.jsonl"
        until(lambda: process.poll() is not None or (metrics.exists() and len(read_metrics(metrics)) >= 3), 200)
        found = members(process.pid)
        assert sorted(found) == [0, 1], process.communicate(timeout=10)
        found[1].stop()
        seconds = until(lambda: list((tmp_path / "run/hangs").glob("2*/summary.txt")), 60)
        assert seconds < HANG + WRITING
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == HUNG
    summary = next((tmp_path / "run/hangs").glob("2*/summary.txt"))
    assert f"farspan: the run hangs at rank 1 of 2 ({os.uname().nodename}, pid {found[1].pid}): stopped" in error
    if command == ["train"]:
        assert f"farspan: the run hung, its guards ended it (exit code {HUNG}): {summary} has the stacks\n" in error
        assert "Traceback" not in error
    else:
        assert f"1 starts in a row brought no new checkpoint (exit code {HUNG}): given up" in error
    assert "memory" not in error
    assert not any(alive(pid) for member in found.values() for pid in (member.pid, member.guard) if pid)


@pytest.mark.timeout(300)
def test_a_slow_rank_and_no_other_is_named(started):
    """Of two ranks of a stage the one that stands still for most of the time."""
    health = {"health.straggler_factor": 2.0, "health.straggler_window": 16, "logging.tensorboard": True}
    run = started(steps=10**6, **LAYOUTS["TP2 × PP2"], **health)
    rank = random.randrange(run.count)
    run.begin()
    until(lambda: run.step() >= 5, 120)

    def stragglers() -> list[dict[str, Any]]:
        return [line for line in read_metrics(run.folder / "metrics.jsonl") if "straggler" in line]

    with run.members()[rank].slowed(0.06, 0.02):
        until(stragglers, 150, f"the name of rank {rank}")
    assert run.hangs == []
    codes = run.pool.stop()
    assert codes == [-9] * run.count
    assert {line["straggler"] for line in stragglers()} == {rank}, stragglers()
    assert stragglers()[0]["host"] == os.uname().nodename and stragglers()[0]["ratio"] >= 2.0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    step = stragglers()[0]["step"]
    curve = {event.step: event.value for event in events.Scalars("health/slowest_rank")}
    assert curve.get(step, rank) == rank
    assert events.Scalars("health/slowest_busy_ratio")
