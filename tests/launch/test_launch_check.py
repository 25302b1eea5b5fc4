"""``farspan launch check``: what a node is told before ranks start on it."""

from __future__ import annotations

import json
import platform
import socket
from importlib.metadata import version
from pathlib import Path

import pytest

from farspan.launch.launchers import check
from farspan.version import __version__


@pytest.fixture
def expected(tmp_path: Path) -> Path:
    path = tmp_path / "expected.json"
    check.write_expected(path)
    return path


def test_the_first_node_says_what_the_others_must_have(expected: Path) -> None:
    said = json.loads(expected.read_text())
    assert said["host"] == socket.gethostname() and len(said["versions"].pop("farspan's sources")) == 8
    packages = {name: version(name) for name in ("torch", "deepspeed", "megatron-core", "numpy")}
    assert said["versions"] == {"farspan": __version__, "python": platform.python_version(), **packages}
    assert check.compare(expected) is None


@pytest.mark.parametrize(("name", "theirs"), [("farspan's sources", "00000000"), ("torch", "1.0"), ("numpy", None)])
def test_what_differs_is_named(expected: Path, name: str, theirs: str | None) -> None:
    said = json.loads(expected.read_text())
    mine, said["versions"][name], said["host"] = said["versions"][name], theirs, "n1"
    expected.write_text(json.dumps(said))
    there = theirs or "not installed"
    assert check.compare(expected) == f"{name} is {mine} here and {there} on n1: install the same on all nodes"


def test_what_the_first_node_wrote_is_waited_for_and_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_SHARED_SECONDS", 0.3)
    problem = check.compare(tmp_path / "logs" / "expected.json")
    assert problem is not None and problem.endswith("set run_dir to a folder that all nodes share")
