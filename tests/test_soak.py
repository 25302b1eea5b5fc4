"""A few of the faults of `benchmarks/soak.py` over one run, each kind once; what it measures in full is on its page."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[1] / "benchmarks/soak.py"
KINDS = ("kill-rank", "stop-rank", "kill-agent", "full-disk", "poisoned-batch", "damaged-checkpoint")

pytestmark = [pytest.mark.alone, pytest.mark.long]


@pytest.mark.timeout(900)
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="only root can mount a disk to be filled")
def test_a_run_outlives_a_fault_of_each_kind() -> None:
    command = [sys.executable, "-P", str(SOAK), "--faults", str(len(KINDS)), "--only", *KINDS]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert ended.returncode == 0, ended.stdout[-8000:]
    assert "It finished." in ended.stdout
    rows = [line for line in ended.stdout.splitlines() if line.startswith("| ") and " 1 |" in line]
    assert len(rows) >= len(KINDS), ended.stdout[-3000:]
