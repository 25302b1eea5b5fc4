"""``farspan kernels build | list``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from farspan.kernels import forms
from farspan.launch.cli import main

Run = Callable[..., tuple[int, str, str]]

SOURCE = """
#include "{header}"
FARSPAN_EXPORT int nothing(const void* x, {last}) {{
    (void)x;
    {use}
    return 0;
}}
"""


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """One small operation, and a cache of its own."""
    files = {"cuda": tmp_path / "nothing.cu", "cpu": tmp_path / "nothing.cpp"}
    files["cuda"].write_text(SOURCE.format(header="device.h", last="void* stream", use="(void)stream;"))
    files["cpu"].write_text(SOURCE.format(header="cpu.h", last="int threads", use="(void)threads;"))
    operations = {"nothing": forms.Operation((str(files["cuda"]),), (str(files["cpu"]),))}
    monkeypatch.setattr(forms, "OPERATIONS", operations)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("FARSPAN_KERNEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FARSPAN_KERNELS", raising=False)
    forms.configure()
    yield tmp_path
    forms.configure()


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(arguments)
        except SystemExit as end:
            code = int(str(end.code))
        said = capfd.readouterr()
        return code, said.out, said.err

    return run


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler: there is no c++")
class TestBuild:
    def test_for_a_cpu(self, run: Run, settings: Path) -> None:
        code, out, _ = run("kernels", "build", "--device", "cpu")
        assert code == 0 and "nothing, cpu " in out and "built in" in out and str(settings / "cache") in out
        code, out, _ = run("kernels", "build", "--device", "cpu")
        assert code == 0 and "there already" in out
        code, out, _ = run("kernels", "list")
        assert code == 0 and "nothing, cpu " in out and "in use" in out

    @pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc: there is none")
    def test_for_gpus_that_are_elsewhere(self, run: Run, settings: Path) -> None:
        other = str(settings / "shared")
        code, out, _ = run("kernels", "build", "--device", "cuda", "--capability", "8.0", "9.0", "--cache", other)
        assert code == 0 and "nothing, cuda sm_80: built in" in out and "nothing, cuda sm_90: built in" in out
        code, out, _ = run("kernels", "list", "--cache", other)
        assert code == 0 and out.count("in use") == 2

    def test_without_nvcc_the_forms_for_a_cpu_are_built(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("farspan.kernels.toolchain.compiler", _no_nvcc)
        code, out, _ = run("kernels", "build")
        assert code == 0 and "cuda: left out: no nvcc" in out and "nothing, cpu " in out
        code, _, err = run("kernels", "build", "--capability", "9.0")
        assert code == 2 and err == "farspan: no nvcc\n"

    def test_what_fails_is_said_and_the_rest_goes_on(self, run: Run, settings: Path) -> None:
        (settings / "nothing.cpp").write_text("nonsense\n")
        code, out, _ = run("kernels", "build", "--device", "cpu")
        assert code == 1 and "nothing, cpu" in out and "nothing.cpp:1:1: error" in out

    def test_what_is_not_used_is_removed(self, run: Run, settings: Path) -> None:
        run("kernels", "build", "--device", "cpu")
        with (settings / "nothing.cpp").open("a") as file:
            file.write("// more\n")
        run("kernels", "build", "--device", "cpu")
        (settings / "cache" / "junk").mkdir()
        _, out, _ = run("kernels", "list")
        assert out.count("in use") == 1 and out.count("of other sources") == 1 and "junk: damaged" in out
        _, out, _ = run("kernels", "list", "--remove-unused")
        assert out.count("removed") == 2
        _, out, _ = run("kernels", "list")
        assert out.count("in use") == 1 and "other" not in out and "damaged" not in out

    def test_what_others_built_is_kept_where_there_is_no_compiler(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run("kernels", "build", "--device", "cpu")
        monkeypatch.setenv("CXX", "/nowhere/c++")
        _, out, _ = run("kernels", "list", "--remove-unused")
        assert "in use" in out and "removed" not in out


def _no_nvcc(target: object) -> str:
    from farspan.kernels.toolchain import BuildError, Target

    assert isinstance(target, Target)
    if target.kind == "cuda":
        raise BuildError("no nvcc")
    found = shutil.which("c++")
    assert found
    return found


def test_an_empty_cache(run: Run) -> None:
    code, out, _ = run("kernels", "list")
    assert code == 0 and "has no kernels: they are built on first use" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--operations", "soup"], "invalid choice: 'soup'"),
        (["--capability", "nine"], "'nine' is no compute capability such as 9.0"),
    ],
)
def test_bad_arguments(run: Run, arguments: list[str], words: str) -> None:
    code, _, err = run("kernels", "build", *arguments)
    assert code == 2 and words in err
