"""Every CUDA source compiles for sm_80 and sm_90 without a warning, within recorded bounds of registers and spills."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from resources import ARCHITECTURES, RECORD, Usage, compile_all, parse

from farspan.kernels import forms, toolchain
from farspan.kernels.library import declarations
from farspan.kernels.toolchain import Target

MARGIN = 16  # registers that another compiler's release may take more
OPERATIONS = sorted(name for name, operation in forms.OPERATIONS.items() if operation.sources("cuda"))

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc: there is none")


@pytest.fixture(scope="module")
def compiled() -> dict[str, tuple[str, dict[str, Usage]]]:
    return compile_all()


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


@needs_nvcc
@pytest.mark.timeout(900)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_warnings(compiled: dict[str, tuple[str, dict[str, Usage]]], operation: str) -> None:
    assert compiled[operation][0] == ""


@needs_nvcc
@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_registers_and_spills(
    compiled: dict[str, tuple[str, dict[str, Usage]]], recorded: dict[str, Any], operation: str, architecture: str
) -> None:
    """A kernel that is not in the record, takes more than it says, or spills where it did not: look, then record."""
    same = recorded["compiler"] == toolchain.release_of(toolchain.compiler(Target("cuda", architecture)))
    found, bounds = compiled[operation][1][architecture], recorded["operations"][operation][architecture]
    assert found and set(found) == set(bounds), "kernels and the record differ: python tests/support/resources.py"
    for kernel, usage in found.items():
        assert usage["registers"] <= bounds[kernel]["registers"] + (0 if same else MARGIN), kernel
        assert usage["spilled"] <= bounds[kernel]["spilled"] or not same, kernel


def test_most_kernels_spill_nothing(recorded: dict[str, Any]) -> None:
    for usages in recorded["operations"].values():
        for usage in usages.values():
            spilling = [kernel for kernel, used in usage.items() if used["spilled"]]
            assert len(spilling) <= len(usage) / 4, spilling


@pytest.mark.parametrize("operation", OPERATIONS)
def test_launchers_are_declared(operation: str) -> None:
    """On one line each (see native/device.h), and none escapes by another spelling."""
    for kind in ("cuda", "cpu"):
        for source in forms.OPERATIONS[operation].sources(kind):  # type: ignore[arg-type]
            found = declarations([source])
            assert found and len(found) == source.read_text().count("FARSPAN_EXPORT int"), source
            for types in found.values():
                assert types[-1] == ("void*" if kind == "cuda" else "int")


def test_the_report_is_read() -> None:
    said = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1kv' for 'sm_80'
ptxas info    : Function properties for _Z1kv
    0 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 372 bytes cmem[0]
ptxas info    : Compile time = 1.635 ms
a.cu(3): warning #177-D: variable "x" was declared but never referenced
"""
    rest, usage = parse(said)
    assert rest == 'a.cu(3): warning #177-D: variable "x" was declared but never referenced'
    assert list(usage["sm_80"].values()) == [{"spilled": 20, "registers": 40}] and not usage["sm_90"]
