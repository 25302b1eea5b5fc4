"""Host memory of a process that computes on a CPU."""

from __future__ import annotations

import ctypes

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed for the next tensor, whatever its size, until the process ends.

    glibc returns blocks beyond 32 MiB to the system at once, and a training step frees and takes the same tensors over
    and over: at long sequences a quarter of its time goes into fresh pages.  Returns whether it could be set (glibc).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
