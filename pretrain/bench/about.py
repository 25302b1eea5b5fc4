"""What a result page says of where its numbers come from."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from ...version import __version__
from ..provenance import commit


def about(device: torch.device, *packages: str) -> dict[str, str]:
    """Hardware, driver, versions (of the ``packages`` that are installed too), commit and date."""
    found: dict[str, str] = {}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["GPU"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} SMs, "
            f"L2 {l2_bytes(device) / 2**20:.0f} MiB"
        )
        found["driver"] = driver()
        found["CUDA of torch"] = str(torch.version.cuda)
    found["CPU"] = f"{processor()}, {len(os.sched_getaffinity(0))} cores"
    found["threads"] = str(torch.get_num_threads())
    found["load of the machine before"] = f"{os.getloadavg()[0]:.1f}"
    found["torch"] = torch.__version__
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    found["python"] = platform.python_version()
    found["farspan"] = f"{__version__}, commit {commit()}"
    found["date"] = datetime.date.today().isoformat()
    return found


def driver() -> str:
    return _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]


def processor() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()):
            return found[1]
    return platform.machine()


def l2_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def bullets(values: dict[str, str]) -> list[str]:
    return [f"- {name}: {value}" for name, value in values.items()]


def _said_by(*command: str) -> str:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or "unknown"
    return "unknown"
