"""What megatron-core needs to run where there is no GPU.

It names the current CUDA device in its mappings, schedules and point-to-point buffers.  With ``patch()`` those names
mean the CPU; inside ``cuda_means_cpu()`` a literal ``device="cuda"`` does too.  Both do nothing where there is a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def patch() -> None:
    """Make torch.cuda.current_device and torch.cuda.synchronize answer for the CPU.  Idempotent."""
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None


@contextlib.contextmanager
def cuda_means_cpu() -> Iterator[None]:
    if torch.cuda.is_available():
        yield
        return
    with _CudaMeansCpu():
        yield
