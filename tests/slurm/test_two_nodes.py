"""The real SLURM, two nodes of it: what clusters do to a job, and a run that finishes by itself as if nothing had been.

Needs root, Debian's slurm-wlm and munge: `tests/slurm/run.sh` installs them where they are not there.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import Run, settings

from farspan.launch.launchers.processes import environment_of

CLUSTER = Path(__file__).with_name("cluster.sh")
SLOW = [sys.executable, "-P", str(Path(__file__).with_name("slow_farspan.py"))]
STEPS, INTERVAL, MARGIN_SECONDS = 24, 4, 20
pytestmark = [pytest.mark.alone, pytest.mark.timeout(1200)]


class Cluster:
    """SLURM as its own commands show it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "SBATCH_", "SRUN_", "FARSPAN_J"))
        } | {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def script(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([CLUSTER, *words], capture_output=True, text=True, env=self.environment)

    def ask(self, *words: str) -> str:
        ended = subprocess.run(words, capture_output=True, text=True, env=self.environment, timeout=120)
        return ended.stdout.strip()

    def state(self, job: str) -> str:
        """Empty where SLURM has forgotten it."""
        return self.ask("squeue", "--noheader", "--jobs", job, "--format=%T")

    def jobs(self) -> list[str]:
        return self.ask("squeue", "--noheader", "--format=%i").split()

    def restarts(self, job: str) -> int:
        told = self.ask("scontrol", "--oneliner", "show", "job", job)
        return int(told.partition(" Restarts=")[2].partition(" ")[0] or 0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster(tmp_path_factory.mktemp("slurm"))
    started = found.script("start", str(found.folder))
    if started.returncode == 3:
        pytest.skip(started.stderr.strip().splitlines()[-1])
    assert started.returncode == 0, started.stderr
    try:
        yield found
    finally:
        found.script("stop", str(found.folder))
        for daemon in ("slurmctld", "slurmd", "munged"):
            left = subprocess.run(["pgrep", "-af", daemon], capture_output=True, text=True).stdout
            assert str(found.folder) not in left


class Trained:
    """A run under SLURM."""

    def __init__(self, cluster: Cluster, data: Path, folder: Path, **overrides: Any) -> None:
        self.cluster, self.folder = cluster, folder
        values = {"parallel.data": 2, "checkpoint.interval": INTERVAL, "checkpoint.margin_seconds": MARGIN_SECONDS}
        values |= {"model.num_hidden_layers": 2, "model.hidden_dropout_prob": 0.1, "logging.interval": 1}
        self.config = folder.with_suffix(".yaml")
        self.config.write_text(yaml.safe_dump(settings(data, folder, STEPS, values | overrides)))

    def submit(self, *options: str, step_seconds: float = 0.5) -> str:
        command = [*SLOW, "launch", "slurm", "--nodes", "2", "--cpus-per-task", str(min(2, os.cpu_count() or 1))]
        command += ["--farspan", shlex.join(SLOW), "--max-restarts", "8", *options, str(self.config)]
        environment = self.cluster.environment | {"FARSPAN_TEST_STEP_SECONDS": str(step_seconds)}
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=self.folder.parent)
        assert ended.returncode == 0, ended.stderr
        self.job = ended.stdout.strip()
        return self.job

    def step(self) -> int:
        with contextlib.suppress(OSError, ValueError, IndexError):
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
            return int(max(json.loads(line)["step"] for line in lines if '"loss"' in line))
        return 0

    def output(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("logs/*.out")))

    def told(self, event: str) -> list[dict[str, Any]]:
        lines = (self.folder / "restarts.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["event"] == event]

    def wait(self, moment: Callable[[], Any], what: str, seconds: float = 600) -> None:
        end = time.monotonic() + seconds
        while not moment():
            assert time.monotonic() < end, f"{what} does not come\n{self.output()}"
            time.sleep(0.2)

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: self.step() >= step, f"step {step}")

    def finish(self) -> None:
        self.wait(lambda: not self.cluster.jobs(), "the end")
        assert self.told("end")[-1]["why"] == f"all {STEPS} steps are done", self.output()


@pytest.fixture(scope="module")
def whole(cluster: Cluster, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Nothing happens to this one."""
    run = Trained(cluster, prepared, tmp_path_factory.mktemp("whole") / "run")
    run.submit("--time", "20")
    run.finish()
    assert len(run.told("start")) == 1
    return run


@pytest.fixture
def run(cluster: Cluster, prepared: Path, tmp_path: Path) -> Iterator[Trained]:
    found = Trained(cluster, prepared, tmp_path / "run")
    yield found
    if cluster.jobs():
        cluster.ask("scancel", *cluster.jobs())
        found.wait(lambda: not cluster.jobs(), "the end of what was cancelled", 60)


def assert_same(run: Trained, whole: Trained, starts: int) -> None:
    assert Run(run.folder).steps() == Run(whole.folder).steps()
    mine, theirs = Run(run.folder).weights(), Run(whole.folder).weights()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert len(run.told("start")) >= starts
    for folder in run.folder.glob("logs/*-*/"):
        if not (folder / "endings").exists():
            assert len(list(folder.glob("rank-0000[01].log"))) == 2


def test_the_undisturbed_run(whole: Trained) -> None:
    assert len(Run(whole.folder).steps()) == STEPS
    rank_0 = (whole.folder / f"logs/{whole.job}-0/rank-00000.log").read_text()
    assert f"step {STEPS}/{STEPS}" in rank_0 and f"step {STEPS}/{STEPS}" in whole.output()
    assert whole.told("start")[0]["nodes"] == "farspan-n[1-2]"


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("USR1", "requeue"),
        pytest.param("TERM", "requeue", marks=pytest.mark.long),
        pytest.param("USR1", "chain", marks=pytest.mark.long),
    ],
)
def test_scancel_with_a_signal(run: Trained, whole: Trained, name: str, again: str) -> None:
    """Also without --until-done: it was asked to stop."""
    job = run.submit("--time", "20", "--again", again)
    run.wait_for_step(INTERVAL + 2)
    run.cluster.ask("scancel", f"--signal={name}", job)
    run.finish()
    assert_same(run, whole, starts=2)
    first = run.told("end")[0]
    assert first["asked"] and first["step"] > INTERVAL and first["then"] == again
    assert first["code"] in (75, 143)  # what srun says where a rank took longer to leave than the first one
    assert run.told("start")[1]["step"] == first["step"]
    assert (run.told("start")[1]["job"] != job) == (again == "chain")
    assert {line["series"] for line in run.told("start")} == {job}


@pytest.mark.long
@pytest.mark.parametrize("again", ["requeue", "chain"])
def test_a_job_that_is_given_little_environment(run: Trained, whole: Trained, again: str) -> None:
    """As --export=NONE, which many sites advise: the script's own words reach ranks and the next job all the same."""
    kept = "PATH,SLURM_CONF,OMP_NUM_THREADS,FARSPAN_TEST_STEP_SECONDS"
    job = run.submit("--time", "20", "--again", again, "--sbatch", f"export={kept}")
    run.wait_for_step(INTERVAL + 2)
    run.cluster.ask("scancel", "--signal=USR1", job)
    run.finish()
    assert_same(run, whole, starts=2)
    assert {line["series"] for line in run.told("start")} == {job}
    noted = json.loads((run.folder / f"logs/{job}-0/endings/rank-00000.json").read_text())
    assert noted["code"] == 75


@pytest.mark.long
def test_the_time_limit(run: Trained, whole: Trained) -> None:
    """SLURM counts in minutes: the run is made longer than one that is long enough for its start."""
    began, ended = whole.told("start")[0], whole.told("end")[0]
    busy = _seconds(began["time"], ended["time"])
    minutes = math.ceil((2 * busy + MARGIN_SECONDS) / 60)
    run.submit("--time", str(minutes), step_seconds=60 * minutes / STEPS)
    run.finish()
    assert_same(run, whole, starts=2)
    assert all(end["asked"] and end["code"] in (75, 143) for end in run.told("end")[:-1])


def _seconds(begin: str, end: str) -> float:
    from datetime import datetime

    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()


@pytest.mark.long
def test_scontrol_requeue(run: Trained, whole: Trained) -> None:
    job = run.submit("--time", "20")
    run.wait_for_step(INTERVAL + 2)
    run.cluster.ask("scontrol", "requeue", job)
    run.finish()
    assert_same(run, whole, starts=2)
    assert run.told("start")[1]["restart"] == 1 and run.told("start")[1]["step"] >= INTERVAL


@pytest.mark.long
@pytest.mark.parametrize("node", [2, 1], ids=["of the other node", "of the first node"])
def test_a_slurmd_is_killed(run: Trained, whole: Trained, node: int) -> None:
    """And comes back when its node has been given up."""
    job = run.submit("--time", "20", "--until-done", step_seconds=4)  # SLURM takes 20 s and more to notice
    run.wait_for_step(INTERVAL + 2)
    run.cluster.script("kill", str(run.cluster.folder), str(node))
    run.wait(lambda: run.cluster.restarts(job) >= 1, "SLURM's noticing it")
    run.cluster.script("revive", str(run.cluster.folder), str(node))
    run.finish()
    assert_same(run, whole, starts=2)
    assert run.told("start")[1]["step"] >= INTERVAL


def _rank_1(config: Path) -> int:
    """Its process; not srun, whose words are the same from there on."""
    found = subprocess.run(
        ["pgrep", "-f", f"^{sys.executable} .* train {config}"], capture_output=True, text=True
    ).stdout
    (pid,) = (pid for pid in map(int, found.split()) if environment_of(pid).get("SLURM_PROCID") == "1")
    return pid


@pytest.mark.long
def test_a_rank_is_killed(run: Trained, whole: Trained) -> None:
    run.submit("--time", "20", "--until-done")
    run.wait_for_step(INTERVAL + 2)
    os.kill(_rank_1(run.config), signal.SIGKILL)
    run.finish()
    assert_same(run, whole, starts=2)
    assert run.told("end")[0]["then"] == "requeue" and not run.told("end")[0]["asked"]


@pytest.mark.parametrize("again", ["requeue", pytest.param("chain", marks=pytest.mark.long)])
def test_scancel_ends_it_for_good(run: Trained, again: str) -> None:
    job = run.submit("--time", "20", "--until-done", "--again", again)
    run.wait_for_step(2)
    run.cluster.ask("scancel", job)
    run.wait(lambda: not run.cluster.jobs(), "the end")
    assert len(run.told("start")) == 1
    assert 2 <= run.told("end")[0]["step"] < STEPS  # it saved
    assert "cancelled" in run.told("end")[0]["why"]


@pytest.mark.long
def test_a_user_error_ends_it_for_good(run: Trained, tmp_path: Path) -> None:
    text = run.config.read_text()
    run.config.write_text(text.replace(yaml.safe_load(text)["data"]["folder"], str(tmp_path / "nowhere")))
    run.submit("--time", "20", "--until-done")
    run.wait(lambda: not run.cluster.jobs(), "the end")
    assert len(run.told("start")) == 1
    assert run.told("end")[0]["then"] == "none" and "nowhere" in run.told("end")[0]["why"]
