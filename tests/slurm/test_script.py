"""What ``farspan launch slurm --dry-run`` prints, against SLURM's own parser and scheduler: ``sbatch --test-only``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import farspan

ROOT = Path(farspan.__file__).resolve().parent
CLUSTER = Path(__file__).with_name("cluster.sh")
CONFIG = ROOT / "configs/roberta-prelayernorm-base-mlm.yaml"
pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of a controller that knows 1,024 nodes of 128 cores and 8 GPUs; none of them is there."""
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([CLUSTER, "large", str(folder)], capture_output=True, text=True)
    if started.returncode == 3:
        pytest.skip(started.stderr.strip().splitlines()[-1])
    assert started.returncode == 0, started.stderr
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    yield kept | {"SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run([CLUSTER, "stop", str(folder)], capture_output=True)


def test_only(script: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    path = folder / "script.sbatch"
    path.write_text(script)
    return subprocess.run(["sbatch", "--test-only", path], capture_output=True, text=True, env=environment, cwd=folder)


test_only.__test__ = False  # type: ignore[attr-defined] - it is named after sbatch's option


def dry_run(*options: str) -> str:
    command = [sys.executable, "-P", "-m", "farspan.launch.cli", "launch", "slurm", "--dry-run", *options]
    command += [str(CONFIG), "training.global_batch_size=65536", "evaluation.rows=65536"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("nodes", [1, 2, 64, 1024])
def test_the_script_is_one_that_slurm_takes(environment: dict[str, str], tmp_path: Path, nodes: int) -> None:
    options = ["--nodes", str(nodes), "--gpus-per-node", "8", "--cpus-per-task", "8", "--time", "1-12:00:00"]
    options += ["--until-done", "--again", "chain" if nodes == 2 else "requeue", "--partition", "main", "--mem", "900G"]
    tested = test_only(dry_run(*options, "--sbatch", "comment=two words"), tmp_path, environment)
    found = re.search(r"using (\d+) processors on nodes (\S+) in partition main", tested.stderr)
    assert tested.returncode == 0 and found, tested.stderr
    assert int(found[1]) == 64 * nodes
    assert found[2] == ("large1" if nodes == 1 else f"large[1-{nodes}]")


def test_what_cannot_run_is_told(environment: dict[str, str], tmp_path: Path) -> None:
    script = dry_run("--nodes", "2", "--gpus-per-node", "8", "--time", "60")
    assert test_only(script, tmp_path, environment).returncode == 0
    for line, instead in (
        ("--nodes=2", "--nodes=1025"),
        ("--gpus-per-node=8", "--gpus-per-node=9"),
        ("--time=60", "--time=x"),
    ):
        assert line in script
        assert test_only(script.replace(line, instead), tmp_path, environment).returncode != 0


def test_the_plain_script(environment: dict[str, str], tmp_path: Path) -> None:
    """As it lies there, before anything is filled in."""
    (tmp_path / "runs/mine/logs").mkdir(parents=True)
    tested = test_only((ROOT / "launch/slurm.sbatch").read_text(), tmp_path, environment)
    assert tested.returncode == 0 and "using 128 processors on nodes large[1-2]" in tested.stderr
