"""Every kernel, on a CPU: within the memory it is given, whatever the order of its threads, in every dtype."""

from __future__ import annotations

import shutil

import kernel_calls
import pytest
import torch
from guarded import in_child

from farspan.kernels import forms

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler: there is no c++")
CPU = torch.device("cpu")


@pytest.mark.parametrize("operation", sorted(kernel_calls.CALLS))
def test_emulated(operation: str) -> None:
    with forms.emulated():
        assert forms.compiled(operation, CPU)  # built here, not in a child
        in_child(lambda: kernel_calls.run(operation, "cpu"))


@pytest.mark.parametrize("operation", sorted(name for name, o in forms.OPERATIONS.items() if o.sources("cpu")))
def test_compiled_for_the_cpu(operation: str) -> None:
    assert forms.compiled(operation, CPU)
    in_child(lambda: kernel_calls.run(operation, "cpu"))


def test_all_operations_are_called() -> None:
    assert sorted(kernel_calls.CALLS) == sorted(forms.OPERATIONS)
