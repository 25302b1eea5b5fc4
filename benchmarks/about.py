"""What a result page says of where its numbers come from."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform

from farspan.pretrain.bench.about import bullets, commit, processor

__all__ = ["about", "bullets"]


def about(*packages: str) -> dict[str, str]:
    """Processor, date, commit, Python and the versions of ``packages``."""
    return {
        "CPU": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }
