"""What a result page says of where its numbers come from."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def about(*packages: str) -> dict[str, str]:
    """Processor, date, commit, Python and the versions of ``packages``."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return {
        "CPU": f"{cpu[1] if cpu else platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown",
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def bullets(values: dict[str, str]) -> list[str]:
    return [f"- {name}: {value}" for name, value in values.items()]
