"""Compilers, the cache of compiled kernels, and the form in which each hot operation would run."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from ...kernels import cache, forms, toolchain
from ...kernels.toolchain import BuildError, Target
from ..tables import size
from .disk import FileSystem, nearest_folder
from .report import Section

SMALLEST_CACHE = 500 << 20  # bytes: all kernels for one kind of GPU, and what a compiler writes meanwhile


def look(section: Section, *, quick: bool, operations: Iterable[str] | None = None, offload: bool = False) -> None:
    """``operations``: those that the run's model uses, else all.  ``offload``: whether DeepSpeed's CPU Adam is used."""
    try:
        mode = forms.current_mode()
    except ValueError:  # said with the environment's variables
        return
    section.facts |= {"mode": mode, "compilers": {}, "cache": str(forms.cache_folder()), "kernels": {}}
    gpu = torch.cuda.is_available()
    for target in (Target.host("cpu"), Target("cuda", "")):
        try:
            path = toolchain.compiler(target)
            release = toolchain.release_of(path)
            section.facts["compilers"][target.kind] = {"path": path, "release": release}
            section.say(f"{target.kind}: {path}, {release}")
            if target.kind == "cuda":
                _nvcc_fits(section, release, offload=offload)
        except BuildError as error:
            section.facts["compilers"][target.kind] = None
            section.say(f"{target.kind}: {error}")
            if mode == "auto" and (gpu if target.kind == "cuda" else not gpu):
                section.warn(
                    f"{error}",
                    "kernels that are not in the cache cannot be built; PyTorch's own operations run instead, slower",
                    "mend that, or build where there is one: farspan kernels build --cache FOLDER",
                )
    if offload and not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        section.fault(
            f"Python.h is not in {sysconfig.get_paths()['include']}",
            "parallel.offload_optimizer updates with DeepSpeed's CPU Adam, which is compiled with it first",
            "install python3-dev (python3-devel), or leave offload_optimizer out",
        )
    _cache(section)
    names = [name for name in operations or forms.OPERATIONS if name in forms.OPERATIONS]
    if quick:
        section.say(f"kernels (mode {mode}): built, or taken from the cache, when a run starts")
        if mode == "require":
            _required(section, names)
        return
    _forms(section, names, mode)


def _nvcc_fits(section: Section, release: str, *, offload: bool) -> None:
    found = re.search(r"release (\d+)\.(\d+)", release)
    if found is None or torch.version.cuda is None:
        return
    major = int(torch.version.cuda.split(".")[0])
    if int(found[1]) == major:
        return
    said = f"nvcc is of CUDA {found[1]}.{found[2]} and torch is built for CUDA {torch.version.cuda}"
    mend = f"install the CUDA {major} toolkit beside it and set CUDA_HOME"
    if offload:
        section.fault(
            said,
            "DeepSpeed refuses to compile its CPU Adam (CUDAMismatchException), which parallel.offload_optimizer needs",
            f"{mend}, or leave offload_optimizer out",
        )
    else:
        section.warn(said, "two CUDA runtimes come into one process, and the driver must be new enough for both", mend)


def _cache(section: Section) -> None:
    folder = forms.cache_folder()
    near = nearest_folder(folder)
    filesystem = FileSystem.of(near)
    built = len(list(folder.glob("[!.]*/build.json")))
    said = f"cache of kernels {folder} ({filesystem.kind or '?'}): {built} libraries"
    try:
        with tempfile.TemporaryFile(dir=near) as file:
            file.write(b"x")
        section.facts["cache_writable"] = True
    except OSError as error:
        section.facts["cache_writable"] = False
        section.warn(
            f"the cache of kernels {folder} cannot be written: {error.strerror}",
            "what is not in it is not built: PyTorch's own operations run, or a run that requires kernels ends",
            "set FARSPAN_KERNEL_CACHE or kernels.cache to another folder, or run farspan kernels build beforehand",
        )
        said += ", which cannot be written"
    space = os.statvfs(near)
    free = space.f_bavail * space.f_frsize
    section.facts["cache_free_bytes"] = free
    section.say(f"{said}, {size(free)} free")
    if free < SMALLEST_CACHE:
        section.warn(
            f"the cache of kernels {folder} has {size(free)} left",
            "compilers fail on a full disk; homes often have a small quota",
            "set FARSPAN_KERNEL_CACHE to a larger disk",
        )


def _required(section: Section, names: list[str]) -> None:
    """Whether what a run requires is there or can be built, without building it."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    for name in names:
        sources = forms.OPERATIONS[name].sources("cuda" if device.type == "cuda" else "cpu")
        if not sources:
            continue
        try:
            if device.type == "cuda":
                target = Target.cuda(torch.cuda.get_device_capability(device))
            else:
                target = Target.host("cpu")
            prefix = cache.prefix_of(name, sources, target)
            if not any(forms.cache_folder().glob(f"{prefix}-*")):
                toolchain.compiler(target)
        except BuildError as error:
            _cannot(section, f"kernels.mode is require and {name} cannot be had for {device.type}: {error}")
            return


def _forms(section: Section, names: list[str], mode: str) -> None:
    """Built now where they are not there yet: what a run would do at its start."""
    devices = [torch.device("cuda", 0), torch.device("cpu")] if torch.cuda.is_available() else [torch.device("cpu")]
    section.say(f"kernels (mode {mode})")
    for device in devices:
        for name in names:
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said):  # it stands on the page
                    chosen = forms.choice(name, device)
            except ValueError as error:
                _cannot(section, " ".join(str(error).split()))
                return
            section.facts["kernels"][f"{name} on {device.type}"] = str(chosen)
            section.say(f"  {name} on {device.type}: {chosen}")


def _cannot(section: Section, what: str) -> None:
    section.fault(what, "a run ends at its start", "install the compiler it names, or set kernels.mode to auto")
