"""Versions known to clash although each package's own requirements hold.  Every entry has the place where it is told.

What Farspan's ranges exclude is not repeated here (``requirements``).
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from packaging.version import Version

from .report import Severity
from .requirements import version_of


@dataclasses.dataclass(frozen=True)
class Clash:
    """``found``: what clashes here, in words; None: nothing."""

    found: Callable[[], str | None]
    severity: Severity
    why: str
    mend: str
    source: str


def _apex() -> str | None:
    """The package of that name on PyPI is a toolkit for web pages; NVIDIA's is built from its repository."""
    try:
        files = metadata.distribution("apex").files or []
    except metadata.PackageNotFoundError:
        return None
    if any(str(file).startswith("apex/normalization") for file in files):
        return None
    return f"apex {version_of('apex')} is PyPI's, which has nothing to do with NVIDIA's"


def _tensorboard() -> str | None:
    board, tools = version_of("tensorboard"), version_of("setuptools")
    if board is None or tools is None or Version(board) >= Version("2.21") or Version(tools) < Version("82"):
        return None
    return f"tensorboard {board} imports pkg_resources, which setuptools {tools} no longer has"


def _nccl() -> str | None:
    """Another libnccl than torch's wheel came with, from LD_LIBRARY_PATH, LD_PRELOAD or another package."""
    wheels = [name for name in ("nvidia-nccl-cu11", "nvidia-nccl-cu12", "nvidia-nccl-cu13") if version_of(name)]
    if len(wheels) > 1:
        return f"{' and '.join(wheels)} are both installed: they are one folder, and the last one installed lies there"
    if not wheels or not torch.cuda.is_available():
        return None
    loaded, wheel = loaded_nccl(), Version(version_of(wheels[0]) or "0")
    if loaded is None or loaded == wheel.release[:3]:
        return None
    return f"NCCL {'.'.join(map(str, loaded))} is loaded and torch was installed with {wheels[0]} {wheel}"


def loaded_nccl() -> tuple[int, ...] | None:
    """The version of the library that this process has in its memory (``ncclGetVersion``); None: none, or statically
    linked."""
    try:
        text = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    path = re.search(r"(/\S*libnccl\.so\S*)", text)
    if path is None:
        return None
    number = ctypes.c_int()
    if ctypes.CDLL(path[1]).ncclGetVersion(ctypes.byref(number)):
        return None
    # nccl.h, NCCL_VERSION: from 2.9 on two digits for each of minor and patch.
    return number.value // 10000, number.value // 100 % 100, number.value % 100


def _transformer_engine() -> str | None:
    """megatron-core imports it where it is installed."""
    if version_of("transformer-engine-torch") is None and version_of("transformer-engine") is None:
        return None
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError) as error:
        return f"transformer-engine is installed and cannot be imported ({' '.join(str(error).split())[:200]})"
    return None


def _pynvml() -> str | None:
    return None if version_of("pynvml") is None else f"pynvml {version_of('pynvml')} is installed"


CLASHES = (
    Clash(
        _apex, "warning",
        "where Farspan's own layer norm cannot be built, NVIDIA's is taken if there is an apex: this one is none",
        "pip uninstall apex; NVIDIA's is built from github.com/NVIDIA/apex",
        "github.com/NVIDIA/apex/issues/1063",
    ),
    Clash(
        _tensorboard, "warning",
        "runs write their logs all the same, but the command tensorboard that shows them ends at once",
        'pip install "tensorboard>=2.21", or "setuptools<82"',
        "github.com/tensorflow/tensorboard/issues/7107",
    ),
    Clash(
        _nccl, "warning",
        "an older NCCL lacks functions that torch calls (undefined symbol), and nodes with different ones do not meet",
        "take the folder with libnccl out of LD_LIBRARY_PATH and LD_PRELOAD, and leave one nvidia-nccl-cu* installed",
        "github.com/pytorch/pytorch/issues/119072",
    ),
    Clash(
        _transformer_engine, "fault",
        "megatron-core imports it where it finds it; one that was built for another torch has undefined symbols",
        "build it for this torch, or pip uninstall transformer-engine transformer-engine-torch: Farspan needs none",
        "github.com/NVIDIA/TransformerEngine/issues/1192",
    ),
    Clash(
        _pynvml, "warning",
        "torch takes it for NVIDIA's own nvidia-ml-py, whose module has the same name, and warns at every start",
        "pip uninstall pynvml && pip install nvidia-ml-py",
        "torch/cuda/__init__.py",
    ),
)  # fmt: skip


def convolution_error() -> float:
    """Relative error of torch's gradient of a wide depthwise convolution's weights on this processor, measured.

    About 0.1 with torch 2.13's oneDNN and AVX-512 (float32, from 35 weights on), 1e-6 where it is right.  Farspan does
    not use it (kernels/nystrom.py); what an exported Nyströmformer is fine-tuned with may.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 12, 256, 32, generator=generator)
    gradient = torch.randn(x.shape, generator=generator)
    weight = torch.randn(12, 1, 65, 1, generator=generator)
    found = []
    for dtype in (torch.float32, torch.float64):
        w = weight.to(dtype).requires_grad_()
        y = torch.nn.functional.conv2d(x.to(dtype), w, padding=(32, 0), groups=12)
        found.append(torch.autograd.grad(y, w, gradient.to(dtype))[0].double())
    return float((found[0] - found[1]).norm() / found[1].norm())
