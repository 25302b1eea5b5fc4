"""``farspan doctor``: what this machine has, and what a run here would do with it."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from ..kernels import forms, toolchain
from ..kernels.toolchain import BuildError, Target
from ..version import __version__

PACKAGES = ("torch", "deepspeed", "megatron-core", "ninja", "datasets", "tensorboard", "transformers")


def run() -> int:
    """Print it; 1 where a run would fail."""
    trouble: list[str] = []
    print(f"farspan {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for name in PACKAGES:
        try:
            print(f"  {name} {version(name)}")
        except PackageNotFoundError:
            optional = name == "transformers"
            print(f"  {name} is not installed" + (" (needed for exports' checks and some benchmarks)" * optional))
            if not optional:
                trouble.append(f"{name} is not installed: pip install {name}")
    print(f"  apex (NVIDIA's, optional): {_apex()}")
    print("devices")
    for line in _devices():
        print(f"  {line}")
    print("compilers")
    for target in (Target.host("cpu"), Target("cuda", "")):
        try:
            path = toolchain.compiler(target)
            print(f"  {target.kind}: {path}, {toolchain.release_of(path)}")
        except BuildError as error:
            print(f"  {target.kind}: {error}")
    trouble += _kernels()
    print("memory")
    print(f"  /dev/shm {_free('/dev/shm')}, here {_free('.')}")
    for line in trouble:
        print(f"farspan: {line}", file=sys.stderr)
    return int(bool(trouble))


def _devices() -> list[str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [f"{cores} processor cores, {torch.get_num_threads()} threads of torch"]
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return [*lines, f"no GPU ({built}): runs take the CPU"]
    for i in range(torch.cuda.device_count()):
        it = torch.cuda.get_device_properties(i)
        lines.append(f"GPU {i}: {it.name}, capability {it.major}.{it.minor}, {it.total_memory / 2**30:.0f} GiB")
    return lines


def _kernels() -> list[str]:
    """Which form each operation runs on the devices here; what fails."""
    folder = forms.cache_folder()
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    writable = "can be written" if os.access(parent, os.W_OK) else "cannot be written"
    print(f"kernels (mode {forms.current_mode()}, cache {folder}, which {writable})")
    devices = [torch.device("cuda", 0), torch.device("cpu")] if torch.cuda.is_available() else [torch.device("cpu")]
    for device in devices:
        for name in forms.OPERATIONS:
            try:
                print(f"  {name} on {device.type}: {forms.choice(name, device)}")
            except ValueError as error:
                return [" ".join(str(error).split())]
    return []


def _apex() -> str:
    """PyPI has an unrelated package of that name."""
    try:
        importlib.import_module("apex.normalization")
    except ImportError:
        return "not installed"
    return "installed"


def _free(path: str) -> str:
    try:
        return f"{shutil.disk_usage(path).free / 2**30:.1f} GiB free"
    except OSError:
        return "not there"
