"""`farspan bench kernels` and `farspan bench train` from end to end on a GPU, at tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch sees none"),
]


def bench(question: str, out: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "farspan.launch.cli", "bench", question, "--quick", "--out", str(out)]
    ended = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    (results,) = out.glob("*.json")
    found: dict[str, Any] = json.loads(results.read_text())
    return found


@pytest.mark.timeout(1200)
def test_kernels(tmp_path: Path) -> None:
    found = bench("kernels", tmp_path)
    assert found["ceilings"]["copy"] > 1e11 and found["ceilings"]["matmul"] > 1e13
    for row in found["rows"]:
        assert "failed" not in row and row["check"]["right"], row
        assert all(0 < timing["seconds"] < 1 for timing in row["measured"].values()), row
        assert not row["beside"]["host waits"] and all(timing["captured"] for timing in row["measured"].values()), row
        assert "measured" in row["peers"]["reference"], row


@pytest.mark.timeout(1200)
def test_train(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    pytest.importorskip("deepspeed")
    found = bench("train", tmp_path, "--profile")["cuda"]
    assert len(found["rows"]) == 5
    for row in found["rows"]:
        assert row["farspan"]["tokens_per_second"] > 0 and row["farspan"]["peak_memory_bytes"] > 0, row
    assert len(list((tmp_path / "traces").iterdir())) == 5
