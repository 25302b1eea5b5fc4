"""A process that ends with the one that started it, however that ends (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with(parent: int, number: int = signal.SIGKILL) -> Callable[[], None] | None:
    """What a process does to get a signal from Linux when its parent ends; elsewhere None."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # too late: the parent is gone
            os._exit(1)

    return ask


def die_with_launcher(environ: Mapping[str, str] = os.environ) -> None:
    """In a rank of torchrun or DeepSpeed, whose ranks would go on when the launcher is killed, and keep the run from
    those that are started after them."""
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in environ or _is_deepspeeds(parent):
        ask = die_with(parent)
        if ask is not None:
            ask()


def _is_deepspeeds(pid: int) -> bool:
    try:
        return b"deepspeed.launcher.launch" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
