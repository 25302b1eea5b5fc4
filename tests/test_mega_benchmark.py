"""The benchmark of a MEGA layer runs, with the other side's agreement check where transformers 4 can be reached."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "mega_cpu.py"
OTHER = "FARSPAN_TEST_TRANSFORMERS4"


def quick(out: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-P", str(BENCHMARK), "--quick", "--threads", "1", "--out", str(out), *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(out.with_suffix(".json").read_text())
    return found


def test_without_the_other_side(tmp_path: Path) -> None:
    """Farspan's alone: nothing is compared, everything else is measured."""
    found = quick(tmp_path / "page")
    assert not found["comparisons"] and "differences" not in found
    assert [row["length"] for row in found["lengths"]] == [256, 512]
    for row in found["lengths"]:
        assert row["seconds"] > 0 and row["memory"] > 0 and row["average_share"] > 0
    assert "tokens/s" in (tmp_path / "page.md").read_text()


@pytest.mark.skipif(OTHER not in os.environ, reason=f"{OTHER} names no interpreter with transformers 4.37")
def test_with_the_other_side(tmp_path: Path) -> None:
    found = quick(tmp_path / "page", "--transformers4", os.environ[OTHER])
    assert set(found["differences"]) == {"output", "input gradient"}
    assert 0 < max(found["differences"].values()) < 1e-4
    assert [c["dropout"] for c in found["comparisons"]] == [0.0, 0.1]
