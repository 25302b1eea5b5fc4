"""Compilers, and how they make a library of an operation's sources.

torch's own loader (``torch.utils.cpp_extension.load``) links every extension with torch and waits for ever at the lock
of a process that was killed.  The sources here need no header of torch, so that a build takes seconds and one library
serves every version of it; ninja runs the compilers, which torch's module finds.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

# "emulated" is for tests: a CUDA source run by a CPU (native/emulator.h).
Kind = Literal["cuda", "cpu", "emulated"]
LOWEST_CAPABILITY = (8, 0)  # bfloat16, cp.async and these products on tensor cores
HEADERS = Path(__file__).parent / "native"
LINES = 12  # of a compiler's, at the end of an error

_COMMON = ("-std=c++17",)
_HOST = (*_COMMON, "-fPIC", "-fno-gnu-unique", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
_FLAGS: dict[Kind, tuple[str, ...]] = {
    "cuda": (*_COMMON, "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
    # Neither of the last two lets the order of a sum change.
    "cpu": (*_HOST, "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-pthread"),
    "emulated": (*_HOST, "-O2", "-pthread"),
}


class BuildError(Exception):
    """Why there is no library, in a line for the user; ``output``: the compiler's last lines, if it is its fault."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


@dataclasses.dataclass(frozen=True)
class Target:
    """What a library is for."""

    kind: Kind
    architecture: str  # "sm_90", or the processor's

    @staticmethod
    def cuda(capability: tuple[int, int]) -> Target:
        if capability < LOWEST_CAPABILITY:
            have, need = (".".join(map(str, c)) for c in (capability, LOWEST_CAPABILITY))
            raise BuildError(f"the GPU's compute capability is {have}, the kernels need {need}")
        return Target("cuda", f"sm_{capability[0]}{capability[1]}")

    @staticmethod
    def host(kind: Kind) -> Target:
        return Target(kind, platform.machine())

    def __str__(self) -> str:
        return f"{self.kind} {self.architecture}"


def compiler(target: Target) -> str:
    """The path of the compiler for it.  BuildError: there is none."""
    from torch.utils import cpp_extension

    if target.kind == "cuda":
        homes = [Path(home) / "bin" / "nvcc" for home in (os.environ.get("CUDA_HOME"), cpp_extension.CUDA_HOME) if home]
        for nvcc in homes:
            if nvcc.is_file():
                return str(nvcc)
        if found := shutil.which("nvcc"):
            return found
        raise BuildError("no nvcc was found: install the CUDA toolkit, or set CUDA_HOME to where it is")
    name = cpp_extension.get_cxx_compiler()
    if found := shutil.which(name):
        return found
    raise BuildError(f"no C++ compiler was found as {name!r}: install g++ or clang++, or set CXX")


@functools.cache
def version_of(path: str) -> str:
    """What a compiler says of itself.  BuildError: it does not run."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{path} --version fails: {error}") from error
    return done.stdout.strip()


def release_of(path: str) -> str:
    """The line of ``version_of`` with the release."""
    lines = version_of(path).splitlines()
    return next((line for line in lines if "release" in line), lines[0] if lines else "")


def common_flags(kind: Kind) -> tuple[str, ...]:
    """Those that do not depend on the compiler at hand."""
    return _FLAGS[kind]


def flags(target: Target) -> tuple[str, ...]:
    """Those of the compiler, but for the folders of headers."""
    if target.kind != "cuda":
        return _FLAGS[target.kind]
    number = target.architecture.removeprefix("sm_")
    known = architectures(compiler(target))
    if not known or number in known:
        return (*_FLAGS["cuda"], "-gencode", f"arch=compute_{number},code=sm_{number}")
    # A GPU newer than the compiler takes the newest intermediate code and translates it itself.
    older = max((k for k in known if int(k) < int(number)), key=int, default=None)
    if older is None:
        raise BuildError(
            f"nvcc knows {', '.join(f'sm_{k}' for k in known)}, not sm_{number}: install another CUDA toolkit"
        )
    return (*_FLAGS["cuda"], "-gencode", f"arch=compute_{older},code=compute_{older}")


@functools.cache
def architectures(nvcc: str) -> tuple[str, ...]:
    """Numbers of the compute capabilities that it compiles for, such as "90"."""
    done = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    return tuple(re.findall(r"compute_(\d+)", done.stdout))


def processor() -> str:
    """What code for this processor alone depends on: a cluster's nodes may differ, and share their files."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = {line.split(":", 1)[0].strip(): line.split(":", 1)[1] for line in text.splitlines() if ":" in line}
    return " ".join(str(found.get(name, "")).strip() for name in ("model name", "flags", "Features"))


def jobs() -> int:
    """How many compilers run at once: MAX_JOBS, as for torch's extensions, or one a processor."""
    asked = os.environ.get("MAX_JOBS", "")
    return int(asked) if asked.isdigit() and int(asked) else os.cpu_count() or 1


def compile_library(sources: Sequence[Path], target: Target, folder: Path, limit: float) -> Path:
    """Make ``folder``/library.so; ``limit``: seconds that it may take.  BuildError with the compiler's last lines."""
    program, options = compiler(target), list(flags(target))
    options += [f"-I{HEADERS}", *sorted({f"-I{source.parent}" for source in sources})]
    if target.kind == "cuda" and (host := os.environ.get("CXX")):
        options += ["-ccbin", host]
    language = ["-x", "c++"] if target.kind == "emulated" else []
    commands = " ".join(_quote(part) for part in (program, *options))
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {commands} {' '.join(language)} -c $in -o $out",
        "rule link",
        f"  command = {commands} -shared $in -o $out",
    ]
    objects = [f"{source.stem}.o" for source in sources]
    lines += [f"build {name}: compile {_path(source)}" for name, source in zip(objects, sources, strict=True)]
    lines += [f"build library.so: link {' '.join(objects)}", "default library.so", ""]
    (folder / "build.ninja").write_text("\n".join(lines))
    code, output = _run([_ninja(), "-C", str(folder)], limit)
    (folder / "build.log").write_text(output)
    if code:
        raise BuildError(*_last_words(output, program))
    return folder / "library.so"


def _run(command: list[str], limit: float) -> tuple[int, str]:
    """Exit code and what was said.  The compilers end with it, also when this is interrupted."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise BuildError(
                    f"the compiler took more than {limit:.0f} s: raise kernels.build_timeout_seconds"
                ) from error
            raise
        return process.returncode, output


def _last_words(output: str, program: str) -> tuple[str, str]:
    """The first error, and what stands about it at the end."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    lines = [line for line in lines if not re.match(r"ninja: |\[\d+/\d+\]|FAILED: |In file included", line)]
    lines = [line for line in lines if not line.startswith(program)]
    first = next((i for i, line in enumerate(lines) if re.search(r"\berror\b|fatal|Killed", line)), 0)
    shown = lines[first:][:LINES] if len(lines) - first > LINES else lines[-LINES:]
    reason = lines[first].strip() if lines else f"{program} ended without a word"
    return f"the compiler fails: {reason}", "\n".join(f"  {line}" for line in shown)


def _ninja() -> str:
    try:
        import ninja

        path = Path(ninja.BIN_DIR) / "ninja"
        if path.is_file():
            return str(path)
    except ImportError:
        pass
    if found := shutil.which("ninja"):
        return found
    raise BuildError("ninja is not installed: pip install ninja")


def _quote(text: str) -> str:
    """For the shell that ninja starts, and for ninja itself."""
    import shlex

    return shlex.quote(text).replace("$", "$$")


def _path(path: Path) -> str:
    """In a ninja file."""
    return re.sub(r"([$ :])", r"$\1", str(path))
