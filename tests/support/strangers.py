"""Exported folders where Farspan is not: interpreters of their own, this environment's and one that
``FARSPAN_TEST_TRANSFORMERS4`` names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_OTHER = os.environ.get("FARSPAN_TEST_TRANSFORMERS4")
_REASON = "FARSPAN_TEST_TRANSFORMERS4 names no Python with transformers 4.37 or later"

in_each_interpreter = pytest.mark.parametrize(
    "python",
    [
        pytest.param(sys.executable, id="this-transformers"),
        pytest.param(_OTHER, id="transformers-4", marks=pytest.mark.skipif(not _OTHER, reason=_REASON)),
    ],
)


def run(python: str, script: str, cases: list[dict[str, Any]], folder: Path) -> None:
    """A script that gets the cases as JSON, and prints the version of transformers when all is well."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    environment.pop("PYTHONPATH", None)
    arguments = [python, "-W", "ignore", "-c", script, json.dumps(cases)]
    result = subprocess.run(arguments, env=environment, cwd=folder, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.startswith("transformers ")


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that is made inside."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return output
