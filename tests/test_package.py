"""What is built and installed: the package's modules, and nothing else of the repository."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import farspan

ROOT = Path(farspan.__file__).resolve().parent
VERSION = farspan.__version__
DIST_INFO = f"farspan-{VERSION}.dist-info"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy: setuptools leaves a folder ``build`` behind, whose old files would get into the next wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    not_tracked = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "*.egg-info", "tests", "text")
    shutil.copytree(ROOT, folder / "clone", ignore=not_tracked)
    # Folders that a wheel must leave out, large files aside.
    for path in ("tests/test_x.py", "launch/text/speech.txt", "configs/x.yaml", "benchmarks/x.py", "docs/x.py"):
        (folder / "clone" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "clone" / path).write_text("")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    # The build finds setuptools in this environment, not the clone's folder `kernels`.
    subprocess.run(
        [sys.executable, "-P", "-m", "pip", "wheel", *options, "--wheel-dir", folder, folder / "clone"],
        check=True,
        cwd=folder,
    )
    (built,) = folder.glob("*.whl")
    assert built.name == f"farspan-{VERSION}-py3-none-any.whl"
    return zipfile.ZipFile(built)


def test_the_modules_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    modules = {"__init__.py", "version.py", "py.typed"}
    for layer in ("kernels", "parallel", "pretrain", "launch"):
        modules |= {path.relative_to(ROOT).as_posix() for path in (ROOT / layer).rglob("*.py")}
    for kind in ("*.cu", "*.cuh", "*.cpp", "*.h"):  # what kernels are built from
        modules |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").rglob(kind)}
    modules.add("launch/slurm.sbatch")  # what `farspan launch slurm` fills in
    metadata = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    expected = {f"farspan/{path}" for path in modules} | {f"{DIST_INFO}/{path}" for path in metadata}
    # Recipes, the quickstart's text and shell scripts stay in the clone: they are examples to copy and change, and a
    # run needs nothing but its own YAML file.
    assert set(wheel.namelist()) == expected


def metadata(wheel: zipfile.ZipFile) -> Message:
    return email.message_from_bytes(wheel.read(f"{DIST_INFO}/METADATA"))


def test_metadata(wheel: zipfile.ZipFile) -> None:
    about = metadata(wheel)
    assert (about["Name"], about["Version"]) == ("farspan", VERSION)
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.11"
    assert "# Farspan" in str(about.get_payload())
    needed = about.get_all("Requires-Dist")
    assert needed is not None
    assert "torch>=2.11" in needed
    assert set(about.get_all("Provides-Extra") or ()) == {"bench", "hf", "tensorflow", "test"}
    assert not any("pytest" in line and "extra ==" not in line for line in needed)
    assert b"Apache License" in wheel.read(f"{DIST_INFO}/licenses/LICENSE")


def test_constraints_pin_what_is_needed(wheel: zipfile.ZipFile) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    needed = metadata(wheel).get_all("Requires-Dist") or []
    names = {re.split(r"[<>=!~;\[ ]", line)[0].lower().replace("_", "-") for line in needed}
    assert names <= pinned, f"constraints.txt does not pin {sorted(names - pinned)}"


def test_the_installed_command(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """As pip would lay it out, away from the clone."""
    wheel.extractall(tmp_path)
    assert wheel.read(f"{DIST_INFO}/entry_points.txt").decode().split() == [
        "[console_scripts]", "farspan", "=", "farspan.launch.cli:main",
    ]  # fmt: skip
    code = (
        "import sys, farspan; from farspan.launch.cli import main; "
        "print(farspan.__file__, farspan.__version__); main(['--version'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert ended.stdout.splitlines() == [f"{tmp_path / 'farspan' / '__init__.py'} {VERSION}", f"farspan {VERSION}"]


def test_the_command_is_installed() -> None:
    command = shutil.which("farspan", path=str(Path(sys.executable).parent))
    assert command is not None, "install the clone: pip install -e ."
    ended = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert ended.stdout == f"farspan {VERSION}\n"


def test_files_can_be_read_in_one_go() -> None:
    folders = ("kernels", "parallel", "pretrain", "launch", "benchmarks", "docs", "tests")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert {path: lines for path, lines in lengths.items() if lines > 600} == {}
    assert lengths[ROOT / "pretrain/train.py"] <= 250
    assert len(lengths) > 60
