"""compute-sanitizer over every operation: no access beyond memory, no race in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import kernel_calls
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch sees none"),
]
# Of the exit codes of what it runs, one that Python does not use.
FOUND = 86
REFUSED = ("Device not supported", "Unable to find", "not supported on this device")


def sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    beside = Path(home) / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(beside) if beside.is_file() else None)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("operation", sorted(kernel_calls.CALLS))
def test_clean(operation: str, tool: str) -> None:
    program = sanitizer()
    if program is None:
        pytest.skip("needs compute-sanitizer of the CUDA toolkit: there is none")
    kernel_calls.run(operation, "cuda")  # built, and outside the checker's time
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND)]
    # Libraries' kernels are not ours to judge, and would take the longest.
    command += ["--kernel-regex", "kns=farspan"] if tool == "racecheck" else []
    done = subprocess.run(
        [*command, sys.executable, "-P", kernel_calls.__file__, operation, "cuda"],
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # every tensor an allocation of its own
    )
    said = done.stdout + done.stderr
    if any(word in said for word in REFUSED):
        pytest.skip(f"compute-sanitizer does not work on this machine: {said.strip().splitlines()[-1]}")
    assert done.returncode == 0, said[-4000:]
