"""Which processes a launcher has started, read from /proc (Linux; elsewhere none are found)."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path


def ranks_below(pid: int) -> list[int]:
    """The ranks among the descendants of a launcher's process: those that were given RANK, and not what ranks have
    started themselves."""
    children: dict[int, list[int]] = {}
    for process in _processes():
        if (parent := _parent(process)) is not None:
            children.setdefault(parent, []).append(process)
    found, looked = [], [pid]
    while looked:
        for child in children.get(looked.pop(), ()):
            if "RANK" in environment_of(child):
                found.append(child)
            else:
                looked.append(child)
    return sorted(found)


def kill_all(name: str, value: str) -> int:
    """SIGKILL to every process that was given this variable, wherever it hangs by now; how many there were."""
    found = [pid for pid in _processes() if pid != os.getpid() and environment_of(pid).get(name) == value]
    for pid in found:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return len(found)


def environment_of(pid: int) -> dict[str, str]:
    """What a process was started with; empty where that cannot be read."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(entry.partition("=")[::2] for entry in text.split("\0") if "=" in entry)


def _processes() -> Iterator[int]:
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):  # noqa: PTH208 - a Path each time is what makes it slow
            if name.isdigit():
                yield int(name)


def _parent(pid: int) -> int | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[1])
