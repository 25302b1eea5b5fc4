"""Compiled kernels from source to call: built once, kept whole, waited for, and what is said where that fails."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from farspan.kernels import cache, forms, toolchain
from farspan.kernels.library import Library, declarations
from farspan.kernels.toolchain import BuildError, Target

CPU = torch.device("cpu")
HOST = Target.host("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler: there is no c++")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc: there is none")

ON_CPU = """
#include "cpu.h"
FARSPAN_EXPORT int twice(const void* x, void* y, int64_t n, int threads) {
    if (n < 0) return farspan::INVALID;
    farspan::parallel(threads, n, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) static_cast<float*>(y)[i] = 2 * static_cast<const float*>(x)[i];
    });
    return 0;
}
"""
ON_CUDA = """
#include "device.h"
__global__ void kernel(const float* x, float* y, int64_t n) {
    int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) y[i] = 2 * x[i];
}
FARSPAN_EXPORT int twice(const void* x, void* y, int64_t n, void* stream) {
    dim3 grid(static_cast<unsigned>((n + 63) / 64));
    return farspan::launch(kernel, grid, dim3(64), 0, stream, static_cast<const float*>(x), static_cast<float*>(y), n);
}
"""


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "a folder" / "of sources"
    folder.mkdir(parents=True)
    files = {"cpu": folder / "double.cpp", "cuda": folder / "double.cu"}
    files["cpu"].write_text(ON_CPU)
    files["cuda"].write_text(ON_CUDA)
    return files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def double(sources: dict[str, Path], root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An operation of that name, and settings of its own."""
    operation = forms.Operation((str(sources["cuda"]),), (str(sources["cpu"]),))
    monkeypatch.setitem(forms.OPERATIONS, "double", operation)
    monkeypatch.delenv(forms.VARIABLE, raising=False)
    monkeypatch.setattr(forms, "_said", set())
    forms.configure(cache=root, limit=60)
    yield
    forms.configure()


def build(sources: dict[str, Path], root: Path, target: Target = HOST, limit: float = 60) -> cache.Built:
    return cache.library("double", [sources["cuda" if target.kind != "cpu" else "cpu"]], target, root, limit)


def in_another(source: Path, root: Path) -> str:
    """The program of a process that asks for the library."""
    return (
        "from pathlib import Path; from farspan.kernels import cache; from farspan.kernels.toolchain import Target; "
        f"built = cache.library('double', [Path({str(source)!r})], Target.host('cpu'), Path({str(root)!r}), 60)"
    )


def doubled(device: torch.device = CPU) -> list[float]:
    x, y = torch.arange(100.0), torch.zeros(100)
    forms.library("double", device).call("twice", x, y, 100)
    return y.tolist()


EXPECTED = [2.0 * i for i in range(100)]


@needs_compiler
class TestBuilding:
    def test_once(self, sources: dict[str, Path], root: Path) -> None:
        first, second = build(sources, root), build(sources, root)
        assert first.seconds > 0 and second.seconds == 0 and first.folder == second.folder
        assert [p.name for p in root.iterdir() if not p.name.endswith(".lock")] == [first.folder.name]
        record = json.loads((first.folder / "build.json").read_text())
        assert record["torch"] == torch.__version__ and "-march=native" in record["flags"]

    def test_both_forms_compute(self) -> None:
        assert doubled() == EXPECTED
        for order in (0, 1, 7):
            with forms.emulated(order):
                assert doubled() == EXPECTED
        assert doubled() == EXPECTED

    @pytest.mark.parametrize("change", ["source", "header", "flags", "torch", "processor", "compiler"])
    def test_what_a_library_depends_on_is_in_its_name(
        self, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch, change: str
    ) -> None:
        before = cache.name_of("double", [sources["cpu"]], HOST)
        assert before == cache.name_of("double", [sources["cpu"]], HOST)
        if change == "source":
            sources["cpu"].write_text(ON_CPU + "// more\n")
        elif change == "header":
            (sources["cpu"].parent / "own.h").write_text("int x;\n")
        elif change == "flags":
            monkeypatch.setitem(toolchain._FLAGS, "cpu", (*toolchain._FLAGS["cpu"], "-g"))
        elif change == "torch":
            monkeypatch.setattr(torch, "__version__", "9.9")
        elif change == "processor":
            monkeypatch.setattr(toolchain, "processor", lambda: "another")
        else:
            monkeypatch.setattr(toolchain, "version_of", lambda path: "gcc 99")
        assert cache.name_of("double", [sources["cpu"]], HOST) != before

    def test_the_compilers_last_lines_are_in_the_error(self, sources: dict[str, Path], root: Path) -> None:
        sources["cpu"].write_text(ON_CPU + "int broken( { return nonsense; }\n")
        with pytest.raises(BuildError, match=r"double\.cpp:10:15: error") as caught:
            build(sources, root)
        assert len(str(caught.value).splitlines()) == 1
        assert "return nonsense" in caught.value.output
        assert 2 <= len(caught.value.output.splitlines()) <= toolchain.LINES
        assert not [p for p in root.iterdir() if not p.name.endswith(".lock")], "nothing is left"

    def test_a_compiler_that_takes_too_long(self, sources: dict[str, Path], root: Path, tmp_path: Path) -> None:
        slow = tmp_path / "c++"
        slow.write_text("#!/bin/sh\n[ $1 = --version ] && echo slow && exit\nsleep 60\n")
        slow.chmod(0o755)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CXX", str(slow))
            began = time.monotonic()
            with pytest.raises(BuildError, match="build_timeout_seconds"):
                build(sources, root, limit=1)
            assert time.monotonic() - began < 20

    def test_a_killed_build_leaves_nothing_in_the_way(
        self, sources: dict[str, Path], root: Path, tmp_path: Path
    ) -> None:
        """Killed while it compiles: its lock is gone with it, what it left is cleared by the next one."""
        slow, started = tmp_path / "c++", tmp_path / "started"
        slow.write_text(
            "#!/bin/sh\n[ $1 = --version ] && exec c++ --version\n"
            f"echo $$ > {started}.new\nmv {started}.new {started}\nexec sleep 60\n"
        )
        slow.chmod(0o755)
        code = in_another(sources["cpu"], root)
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code], env={**os.environ, "CXX": str(slow)}, start_new_session=True
        )
        while not started.exists():
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        os.kill(int(started.read_text()), signal.SIGKILL)  # the compiler, which nobody waits for any more
        (leftover,) = [p for p in root.iterdir() if p.name.endswith(".part")]  # it was killed while it built
        assert build(sources, root, limit=100.0).seconds > 0
        assert leftover.exists(), "another node may still build there"
        long_ago = time.time() - 101.0
        os.utime(leftover, (long_ago, long_ago))
        shutil.rmtree(build(sources, root).path.parent)
        assert build(sources, root, limit=100.0).seconds > 0
        assert [p for p in root.iterdir() if p.name.endswith(".part")] == []

    def test_others_wait_for_the_one_that_builds(self, sources: dict[str, Path], root: Path) -> None:
        code = in_another(sources["cpu"], root) + "; print(built.seconds > 0)"
        ranks = [
            subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)
        ]
        said = [rank.communicate(timeout=100)[0].strip() for rank in ranks]
        assert sorted(said) == ["False", "False", "True"]

    def test_those_that_wait_take_what_is_built(self, sources: dict[str, Path], root: Path) -> None:
        """All at once, and not one after another as the lock comes to them."""
        built = build(sources, root)
        aside = built.folder.rename(root / "aside")
        with (root / f".{built.folder.name}.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            later = threading.Timer(0.3, aside.rename, [built.folder])
            later.start()
            found = build(sources, root, limit=20)
            later.join()
        assert found.folder == built.folder and found.seconds == 0

    def test_waiting_has_a_limit(self, sources: dict[str, Path], root: Path) -> None:
        root.mkdir()
        name = cache.name_of("double", [sources["cpu"]], HOST)
        with (root / f".{name}.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(BuildError, match="another process has been building for more than 0 s"):
                build(sources, root, limit=0.3)
        assert build(sources, root).seconds > 0

    def test_a_call_is_checked_against_the_declaration(self, sources: dict[str, Path], root: Path) -> None:
        assert declarations([sources["cpu"]]) == {"twice": ["const void*", "void*", "int64_t", "int"]}
        library = Library(build(sources, root).path, [sources["cpu"]], threads=True)
        x = torch.zeros(3)
        with pytest.raises(TypeError):
            library.call("twice", x, x)
        with pytest.raises(Exception, match="argument 3"):
            library.call("twice", x, x, 1.5)
        with pytest.raises(KeyError):
            library.call("thrice", x)
        with pytest.raises(RuntimeError, match="twice: invalid value"):
            library.call("twice", x, x, -1)


@needs_compiler
class TestTrouble:
    """Each ends in a line and the reference, or in an error where compiled forms are required."""

    def reference_or_error(self, capfd: pytest.CaptureFixture[str], match: str) -> None:
        forms.configure(cache=forms.cache_folder(), limit=5)
        assert not forms.compiled("double", CPU)
        assert "reference" in forms.describe(["double"], CPU)
        said = capfd.readouterr().err
        assert "farspan: double: the reference in PyTorch runs: " in said and match in said
        assert not forms.compiled("double", CPU) and not capfd.readouterr().err, "said once"
        forms.configure("require", forms.cache_folder(), 5)
        with pytest.raises(ValueError, match=r"kernels\.mode is require and double cannot be had for cpu") as caught:
            forms.compiled("double", CPU)
        assert match in str(caught.value)

    def test_no_compiler(self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "/nowhere/c++")
        self.reference_or_error(
            capfd, "no C++ compiler was found as '/nowhere/c++': install g++ or clang++, or set CXX"
        )

    def test_no_ninja(self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "ninja", None)
        found = shutil.which
        monkeypatch.setattr(shutil, "which", lambda name: None if name == "ninja" else found(name))
        self.reference_or_error(capfd, "ninja is not installed")

    def test_a_source_that_does_not_compile(self, capfd: pytest.CaptureFixture[str], sources: dict[str, Path]) -> None:
        sources["cpu"].write_text(ON_CPU.replace("2 *", "2 **"))
        self.reference_or_error(capfd, "error")

    def test_a_compiler_that_is_killed(
        self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """As a system that is out of memory does it."""
        victim = tmp_path / "c++"
        victim.write_text("#!/bin/sh\n[ $1 = --version ] && exec c++ --version\nkill -9 $$\n")
        victim.chmod(0o755)
        monkeypatch.setenv("CXX", str(victim))
        self.reference_or_error(capfd, "the compiler fails: Killed")

    def test_a_folder_that_cannot_be_written(
        self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, root: Path
    ) -> None:
        opened = Path.open

        def refuse(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if self.parent == root and mode != "rb":
                raise OSError(30, "Read-only file system", str(self))
            return opened(self, mode, *args, **kwargs)

        root.mkdir()
        if os.geteuid() == 0:  # to whom rights mean nothing
            monkeypatch.setattr(Path, "open", refuse)
        else:
            root.chmod(0o500)
        self.reference_or_error(capfd, "cannot be written and has no double for cpu")

    def test_a_file_in_the_folders_place(self, capfd: pytest.CaptureFixture[str], root: Path) -> None:
        root.write_text("")
        self.reference_or_error(capfd, "File exists")

    def test_a_node_without_a_compiler_takes_what_another_has_built(
        self, sources: dict[str, Path], root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        built = build(sources, root)
        monkeypatch.setenv("CXX", "/nowhere/c++")
        found = build(sources, root)
        assert found.folder == built.folder and not found.seconds
        assert doubled() == EXPECTED
        sources["cpu"].write_text(ON_CPU + "// more\n")
        with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
            build(sources, root)

    def test_a_read_only_cache_serves_what_it_has(
        self, sources: dict[str, Path], root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build(sources, root)

        def refuse(*args: object, **kwargs: object) -> None:
            raise AssertionError("nothing is to be written")

        monkeypatch.setattr(Path, "mkdir", refuse)
        assert doubled() == EXPECTED

    @pytest.mark.parametrize("damage", ["cut short", "empty", "other bytes", "no record", "no library", "bad record"])
    def test_a_damaged_library_is_built_anew(
        self, sources: dict[str, Path], root: Path, capfd: pytest.CaptureFixture[str], damage: str
    ) -> None:
        built = build(sources, root)
        content = built.path.read_bytes()
        if damage == "no record":
            (built.folder / "build.json").unlink()
        elif damage == "bad record":
            (built.folder / "build.json").write_text("{")
        elif damage == "no library":
            built.path.unlink()
        else:
            changed = {"cut short": content[:1000], "empty": b"", "other bytes": content[:-1] + b"x"}[damage]
            built.path.write_bytes(changed)
        assert [type(entry) for entry in cache.contents(root)] == [type(root)]
        assert doubled() == EXPECTED
        said = capfd.readouterr()
        assert "is damaged" in said.err + said.out and "built anew" in said.err + said.out
        assert len(cache.contents(root)) == 1 and isinstance(cache.contents(root)[0], cache.Built)

    def test_a_damaged_library_that_cannot_be_built_anew(
        self, sources: dict[str, Path], root: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        built = build(sources, root)
        built.path.write_bytes(b"")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(toolchain, "compile_library", _fail)
            self.reference_or_error(capfd, "the compiler fails: for the test")


def _fail(*args: object) -> Path:
    raise BuildError("the compiler fails: for the test")


@needs_compiler
class TestModes:
    def test_reference(self) -> None:
        with forms.mode("reference"):
            assert not forms.compiled("double", CPU)
            assert forms.describe(["double"], CPU) == "kernels (reference): double reference (as the mode says)"
        assert forms.compiled("double", CPU)

    def test_the_environment_comes_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(forms.VARIABLE, "reference")
        forms.configure("require")
        assert not forms.compiled("double", CPU)
        with forms.mode("auto"):
            assert forms.compiled("double", CPU)
        assert os.environ[forms.VARIABLE] == "reference"

    def test_an_unknown_mode(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(forms.VARIABLE, "fast")
        with pytest.raises(ValueError, match="FARSPAN_KERNELS is 'fast', must be one of auto, require, reference"):
            forms.compiled("double", CPU)

    def test_declined(self, capfd: pytest.CaptureFixture[str]) -> None:
        for _ in range(2):
            forms.declined("double", "7 features are no multiple of 8")
        assert capfd.readouterr().err.count("7 features") == 1
        with forms.mode("require"), pytest.raises(ValueError, match="7 features"):
            forms.declined("double", "7 features are no multiple of 8")

    def test_one_line_says_what_runs(self) -> None:
        assert [chosen.library is not None for chosen in forms.prepare(["double", "pinv"], CPU).values()] == [
            True,
            False,
        ]
        said = forms.describe(["double", "pinv"], CPU)
        assert said.startswith("kernels (auto): double compiled (cpu ")
        assert said.endswith("pinv reference (there is no cpu form)")

    def test_under_a_compiler_of_graphs(self) -> None:
        @torch.compile(fullgraph=True, backend="eager")
        def choose(x: torch.Tensor) -> torch.Tensor:
            return x + 1 if forms.compiled("double", x.device) else x

        assert choose(torch.zeros(2)).tolist() == [1, 1]

        @torch.compile(fullgraph=True, backend="eager")
        def decline(x: torch.Tensor) -> torch.Tensor:
            forms.declined("double", f"{len(x)} numbers of a graph")
            return x + 1

        assert decline(torch.zeros(2)).tolist() == [1, 1]

    def test_a_device_without_any_form(self) -> None:
        assert forms.compiled("double", CPU)
        assert str(forms.choice("double", torch.device("mps"))) == "reference (there is no form for mps)"


class TestCapabilities:
    @needs_nvcc
    def test_flags(self) -> None:
        assert toolchain.flags(Target.cuda((9, 0)))[-1] == "arch=compute_90,code=sm_90"

    @needs_nvcc
    def test_a_gpu_that_the_compiler_does_not_know_translates_for_itself(self) -> None:
        newest = max(toolchain.architectures(toolchain.compiler(Target("cuda", ""))), key=int)
        assert toolchain.flags(Target("cuda", "sm_999"))[-1] == f"arch=compute_{newest},code=compute_{newest}"

    def test_too_old(self) -> None:
        with pytest.raises(BuildError, match=r"compute capability is 7\.5, the kernels need 8\.0"):
            Target.cuda((7, 5))

    @needs_nvcc
    def test_a_library_for_a_gpu_says_why_it_does_not_run(self, sources: dict[str, Path], root: Path) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        built = build(sources, root, Target.cuda((8, 0)))
        library = Library(built.path, [sources["cuda"]], threads=False)
        with pytest.raises(BuildError, match=r"does not run on this machine: .*(driver|device)"):
            library.probe()
