"""``farspan launch check``: what a node is told before ranks start on it."""

from __future__ import annotations

import json
import os
import platform
import socket
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from runs import settings

from farspan.launch.cli import main
from farspan.launch.exit_codes import DONE, IO_ERROR, USER_ERROR
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
    problem = check.unseen(tmp_path / "logs" / "expected.json")
    assert problem is not None and problem.endswith("set run_dir to a folder that all nodes share")


def command(folder: Path, data: Path, *words: str) -> list[str]:
    """Of a node of a run in this folder."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings(data, folder / "run", 4, {})), encoding="utf-8")
    (folder / "run").mkdir(exist_ok=True)
    return ["launch", "check", *words, str(path)]


def test_what_another_node_has_is_a_fault_of_the_node(
    tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another node may have it; data that the first one does not have either are the configuration's."""
    monkeypatch.setattr(check, "_SHARED_SECONDS", 0.3)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    there, absent, unseen = tmp_path / "expected.json", tmp_path / "no data", ("--expect", str(tmp_path / "none.json"))
    check.write_expected(there)
    for number in ("0", "1"):
        monkeypatch.setenv("SLURM_NODEID", number)
        assert main(command(tmp_path, prepared, "--expect", str(there))) == DONE
        assert main(command(tmp_path, prepared, *unseen)) == IO_ERROR
        assert "set run_dir to a folder that all nodes share" in capsys.readouterr().err
        assert main(command(tmp_path, absent)) == (USER_ERROR if number == "0" else IO_ERROR)
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{socket.gethostname()}: " in line and str(absent) in line


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    assert check.unwritable(tmp_path) is None and list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert check.unwritable(tmp_path / "file") == f"{tmp_path / 'file'} cannot be written to (Not a directory)"
    assert check.unwritable(tmp_path / "x") == f"{tmp_path / 'x'} cannot be written to (No such file or directory)"


def test_the_first_nodes_name_must_lead_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    assert check.unknown_address() is None
    monkeypatch.setenv("SLURM_JOB_NODELIST", "no-such-host-[1-2].invalid")
    problem = check.unknown_address()
    assert problem is not None and problem.startswith("the name no-such-host-1.invalid of the first rank's machine")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert check.unknown_address() is None
