"""Which form of each operation runs: a compiled kernel, or the reference in PyTorch.

Mode "auto" takes the compiled form where the device has one and it can be built, and says in a line where it cannot;
"require" fails there instead; "reference" never does.  Set by ``configure`` (``kernels`` in a run's configuration) and
by FARSPAN_KERNELS, which wins.  Libraries are built on first use (``prepare`` does it ahead) and kept (``cache``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

import torch

from . import cache, toolchain
from .constants import constant_when_compiled
from .library import DTYPES, Library
from .toolchain import BuildError, Kind, Target

Mode = Literal["auto", "require", "reference"]
MODES = get_args(Mode)
VARIABLE = "FARSPAN_KERNELS"
HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Operation:
    """Sources of the compiled forms, relative to this folder; none: there is no such form."""

    cuda: tuple[str, ...] = ()
    cpu: tuple[str, ...] = ()  # only where it takes at most 1 / 1.3 of the reference's time

    def sources(self, kind: Kind) -> list[Path]:
        return [HERE / name for name in (self.cpu if kind == "cpu" else self.cuda)]


OPERATIONS = {
    "layer_norm": Operation(("layer_norm/layer_norm.cu",), ("layer_norm/layer_norm_cpu.cpp",)),
    "dropout": Operation(("dropout/dropout.cu",), ("dropout/dropout_cpu.cpp",)),
    "attention": Operation(("attention/attention.cu",)),
    "ema": Operation(("ema/ema.cu",)),
    "mra": Operation(("mra/mra.cu",), ("mra/mra_cpu.cpp",)),
    "pinv": Operation(("pinv/pinv.cu",)),
    "lm_head": Operation(("lm_head/lm_head.cu",), ("lm_head/lm_head_cpu.cpp",)),
    "activation": Operation(("activation/activation.cu",)),
}


@dataclasses.dataclass
class _Settings:
    mode: Mode = "auto"
    cache: Path | None = None
    limit: float = 600.0
    emulated: int | None = None  # the order of threads


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs for an operation on a device, and why."""

    library: Library | None
    reason: str  # "cuda sm_90, built in 21 s"; of a reference: why it is one

    def __str__(self) -> str:
        return f"compiled ({self.reason})" if self.library else f"reference ({self.reason})"


_settings = _Settings()
_choices: dict[tuple[str, str, torch.device, bool], Choice] = {}  # by operation, mode, device, and whether emulated
_said: set[str] = set()


def configure(mode: Mode = "auto", cache: str | Path | None = None, limit: float = 600.0) -> None:
    """``cache``: the folder of libraries, None: ``cache.default_folder``.  ``limit``: seconds that a build may take."""
    _settings.mode, _settings.cache, _settings.limit = mode, None if cache is None else Path(cache), limit
    _choices.clear()


def current_mode() -> Mode:
    """ValueError: the environment has one that there is not."""
    found = os.environ.get(VARIABLE) or _settings.mode
    if found not in MODES:
        raise ValueError(f"{VARIABLE} is {found!r}, must be one of {', '.join(MODES)}")
    return found  # type: ignore[return-value]


def cache_folder() -> Path:
    return _settings.cache or cache.default_folder()


@constant_when_compiled
def compiled(operation: str, device: torch.device) -> bool:
    """Whether the compiled form is to be used there; built now if it was not yet.  ValueError: required, and none."""
    return choice(operation, device).library is not None


def library(operation: str, device: torch.device) -> Library:
    """That of the compiled form, where ``compiled``."""
    found = choice(operation, device).library
    assert found is not None, f"{operation} has no compiled form on {device}"
    return found


def dtype_code(dtype: torch.dtype) -> int:
    """What launchers take for a dtype; KeyError: they do not compute in it."""
    return DTYPES[dtype]


@constant_when_compiled
def declined(operation: str, reason: str) -> None:
    """Say once that the reference runs although there is a compiled form.  ValueError where that is required."""
    if current_mode() == "require":
        raise ValueError(f"kernels.mode is require and {operation} has no compiled form for this: {reason}")
    _say(f"{operation}: the reference in PyTorch runs: {reason}")


def choice(operation: str, device: torch.device) -> Choice:
    key = _key(operation, device)
    if key not in _choices:
        _choices[key] = _choose(operation, device, current_mode())
    found = _choices[key]
    if found.library is not None and _settings.emulated is not None:
        found.library.emulate_in_order(_settings.emulated)
    return found


def prepare(operations: Iterable[str], device: torch.device) -> dict[str, Choice]:
    """Build or load what a run will use."""
    names = list(operations)
    with ThreadPoolExecutor(toolchain.jobs()) as pool:
        return dict(zip(names, pool.map(lambda name: choice(name, device), names), strict=True))


def forgo(operation: str, device: torch.device, reason: str) -> None:
    """Let the reference run there although there is a compiled form."""
    _choices[_key(operation, device)] = Choice(None, reason)


def describe(operations: Iterable[str], device: torch.device) -> str:
    """One line that says which form each operation runs."""
    found = [f"{name} {choice(name, device)}" for name in operations]
    return f"kernels ({current_mode()}): {', '.join(found) or 'none used'}"


def _key(operation: str, device: torch.device) -> tuple[str, str, torch.device, bool]:
    return operation, current_mode(), device, _settings.emulated is not None


def _kind(device: torch.device) -> Kind:
    if device.type == "cuda":
        return "cuda"
    return "cpu" if _settings.emulated is None else "emulated"


def _choose(operation: str, device: torch.device, mode: Mode) -> Choice:
    kind = _kind(device)
    sources = OPERATIONS[operation].sources(kind)
    if mode == "reference":
        return Choice(None, "as the mode says")
    if device.type not in ("cuda", "cpu", "meta"):
        return Choice(None, f"there is no form for {device.type}")
    if not sources:
        return Choice(None, f"there is no {kind} form")
    try:
        target = Target.cuda(torch.cuda.get_device_capability(device)) if kind == "cuda" else Target.host(kind)
        built = cache.library(operation, sources, target, cache_folder(), _settings.limit)
        found = Library(built.path, sources, threads=kind == "cpu")
        if kind == "cuda":
            with torch.cuda.device(device):
                found.probe()
    except BuildError as error:
        if error.output:
            _say(f"{operation}: the compiler's last lines:\n{error.output}")
        if mode == "require":
            raise ValueError(f"kernels.mode is require and {operation} cannot be had for {kind}: {error}") from error
        _say(f"{operation}: the reference in PyTorch runs: {error}")
        return Choice(None, str(error))
    return Choice(found, f"{target}, " + (f"built in {built.seconds:.0f} s" if built.seconds else "from the cache"))


def _say(text: str) -> None:
    """Once, and by the first rank alone."""
    if text not in _said and os.environ.get("RANK", "0") == "0":
        _said.add(text)
        print(f"farspan: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def mode(value: Mode) -> Iterator[None]:
    """Another mode within, whatever the environment says."""
    before, variable = _settings.mode, os.environ.pop(VARIABLE, None)
    _settings.mode = value
    try:
        yield
    finally:
        _settings.mode = before
        if variable is not None:
            os.environ[VARIABLE] = variable


@contextlib.contextmanager
def emulated(order: int = 0) -> Iterator[None]:
    """For tests: on a CPU the CUDA sources run, emulated; ``order`` is that of their threads (native/emulator.h)."""
    before = _settings.emulated
    _settings.emulated = order
    try:
        with mode("require"):
            yield
    finally:
        _settings.emulated = before
