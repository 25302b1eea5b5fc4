"""Which versions there are, whether they fit each other, and what in the environment changes what they do."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from ...kernels import forms
from ...pretrain.provenance import COMPUTING, ROOT, commit, sources_digest
from ...version import __version__
from .clashes import CLASHES, convolution_error
from .report import Finding, Section, Severity
from .requirements import broken, installed_twice, own_requirements, version_of

PACKAGES = (
    *COMPUTING, "ninja", "datasets", "tokenizers", "safetensors", "pydantic", "tensorboard", "transformers",
)  # fmt: skip

# Variables that change what a run does, with what is to be said of them where they have one of these values.
_VARIABLES: dict[str, tuple[str, str]] = {
    "CUDA_LAUNCH_BLOCKING": ("1", "each kernel waits for the one before: steps take several times as long"),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL", "every collective is preceded by another one that compares shapes"),
    "NCCL_P2P_DISABLE": ("1", "GPUs of a node talk through host memory instead of NVLink or PCIe"),
    "NCCL_IB_DISABLE": ("1", "nodes talk over TCP even where there is InfiniBand"),
    "NCCL_SHM_DISABLE": ("1", "GPUs without a direct path talk over the network"),
    "TORCH_NCCL_BLOCKING_WAIT": ("1", "the host waits in every collective"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": ("1", "each tensor is taken from the driver and given back"),
}
_SHOWN = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF", "LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "CUDA_HOME", "CXX", "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "GLOO_SOCKET_IFNAME", "FARSPAN_KERNELS", "FARSPAN_KERNEL_CACHE",
    "TORCH_EXTENSIONS_DIR",
)  # fmt: skip


def look(section: Section, *, quick: bool) -> None:
    section.facts |= {
        "farspan": __version__,
        "sources": sources_digest(),
        "commit": commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: version_of(name) for name in PACKAGES},
    }
    facts = section.facts
    made_of = f"commit {facts['commit']}, sources {facts['sources']}"
    section.say(f"Farspan {__version__} ({made_of}), Python {facts['python']}, {facts['system']}")
    section.say(", ".join(f"{name} {found or 'is not installed'}" for name, found in facts["packages"].items()))
    _requirements(section)
    section.facts["clashes"] = []
    for clash in CLASHES:
        if (found := clash.found()) is not None:
            section.facts["clashes"].append(found)
            section.findings.append(Finding(clash.severity, f"{found} ({clash.source})", clash.why, clash.mend))
    _environment(section)
    if not quick:
        _known_wrong(section)
        _imports(section)


def _requirements(section: Section) -> None:
    found = broken()
    section.facts["broken_requirements"] = [f"{one.by}: {one.requirement}: {one.found}" for one in found]
    for one in found:
        has = f"{one.found} is installed" if one.found else "it is not installed"
        remedy = "use another Python" if one.requirement.startswith("Python") else f'pip install "{one.requirement}"'
        why = "Farspan is written for this range" if one.direct else f"{one.by.split()[0]} may fail when it comes to it"
        severity: Severity = "fault" if one.direct else "warning"
        section.findings.append(Finding(severity, f"{one.by} asks for {one.requirement} and {has}", why, remedy))
    names = [*PACKAGES, "packaging", *(name.split(">")[0].split("=")[0] for name in own_requirements()[1])]
    for twice in installed_twice(names):
        places = ", ".join(f"{version} in {folder}" for version, folder in twice.places)
        section.warn(
            f"{twice.name} is installed {len(twice.places)} times: {places}",
            "the first is imported here; another start (another user, sudo, python -s) may find the other",
            f"pip uninstall {twice.name} where it should not be (PYTHONNOUSERSITE=1 hides packages of ~/.local)",
        )


def _environment(section: Section) -> None:
    shown = {name: os.environ[name] for name in (*_SHOWN, *_VARIABLES) if os.environ.get(name)}
    section.facts["environment"] = shown
    if shown:
        section.say("environment: " + ", ".join(f"{name}={value}" for name, value in shown.items()))
    for name, (value, why) in _VARIABLES.items():
        if shown.get(name) == value:
            section.warn(f"{name} is {value}", why, f"unset {name}, unless it is meant")
    mode = shown.get(forms.VARIABLE)
    if mode is not None and mode not in forms.MODES:
        section.fault(
            f"{forms.VARIABLE} is {mode!r}",
            "a run refuses it",
            f"set it to one of {', '.join(forms.MODES)}, or unset it",
        )


def _known_wrong(section: Section) -> None:
    if torch.backends.mkldnn.is_available():
        error = section.facts["depthwise_convolution_error"] = convolution_error()
        if error > 1e-3:
            section.say(
                f"torch {torch.__version__} gets the gradient of a wide depthwise convolution's weights wrong on this "
                f"processor (by {error:.0%} of it, in float32): no model of Farspan's uses it, others may"
            )


def _imports(section: Section) -> None:
    """That all of it can be imported, in a process of its own: what fails there fails every run."""
    command = [sys.executable, "-P", "-c", "import farspan.pretrain.train"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT.parent), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    except subprocess.TimeoutExpired:
        section.warn(
            "importing Farspan and what it stands on takes more than 300 s",
            "each rank does it at the start of each run",
            "put the Python environment on a faster disk, or into a container image",
        )
        return
    section.facts["imports"] = done.returncode == 0
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        section.fault(
            f"Farspan cannot be imported: {lines[-1] if lines else f'exit code {done.returncode}'}",
            "no run starts",
            f"see the whole of it with: {Path(sys.executable).name} -c 'import farspan.pretrain.train'",
        )
