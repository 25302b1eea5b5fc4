"""Time and memory of attention in heads on a CPU, forward and backward.

Knows torch and kernels alone, so that a process that measures memory starts quickly.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Name = TypeVar("Name")
Inputs = tuple[Tensor, Tensor, Tensor]


def forward_and_backward(attention: Attention, inputs: Inputs, upstream: Tensor) -> float:
    """Seconds of a pass, with gradients of q, k, v and of what parameters the attention has."""
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    began = _clock()
    attention(q, k, v).backward(upstream)
    return _clock() - began


def forward(attention: Attention, inputs: Inputs) -> float:
    """Seconds of a pass without gradients."""
    with torch.no_grad():
        began = _clock()
        attention(*inputs)
        return _clock() - began


def _clock() -> float:
    """With one thread the process's own time, for which what else runs on the machine counts for little; else that of
    the clock on the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def in_turn(
    attentions: Mapping[Name, Attention], inputs: Inputs, rounds: int
) -> dict[Name, tuple[list[float], list[float]]]:
    """Seconds of the forward pass, and of both, of each in every round: all in turn, the order changing, after a round
    that warms up."""
    found: dict[Name, tuple[list[float], list[float]]] = {name: ([], []) for name in attentions}
    upstream = torch.ones_like(inputs[2])
    for turn in range(rounds + 1):
        for name in list(attentions)[:: -1 if turn % 2 else 1]:
            seconds = forward(attentions[name], inputs), forward_and_backward(attentions[name], inputs, upstream)
            for kept, value in zip(found[name], seconds, strict=True):
                kept.extend([value] if turn else [])
    return found


def medians(found: dict[Name, tuple[list[float], list[float]]]) -> dict[Name, tuple[float, float]]:
    return {name: (statistics.median(a), statistics.median(b)) for name, (a, b) in found.items()}


def peak_memory(attentions: Mapping[Name, Attention], inputs: Inputs, threads: int) -> dict[Name, int]:
    """Bytes by which a forward and backward pass raises the peak of resident memory over what is held with inputs and
    the output's gradient ready, of each in a fresh process.  An attention must be picklable.

    ValueError: a process ended before it had measured, which is what the system does where memory is short.
    """
    context = multiprocessing.get_context("forkserver")
    # What is compared, and what torch imports in the first backward pass of a process.
    context.set_forkserver_preload([f"{__package__}.methods", "torch.fx.experimental.symbolic_shapes"])
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inputs.pt"
        torch.save(inputs, file)
        for name, attention in attentions.items():
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as process:
                try:
                    found[name] = process.submit(_peak, attention, file, threads).result()
                except BrokenProcessPool:
                    raise ValueError(
                        f"a process that measured memory at length {inputs[0].shape[2]} was ended, perhaps by the "
                        "system for want of memory: give shorter lengths"
                    ) from None
    return found


def _peak(attention: Attention, file: Path, threads: int) -> int:
    torch.set_num_threads(threads)
    inputs = torch.load(file)
    upstream = torch.ones_like(inputs[2])
    small = [x[..., : min(64, x.shape[2]), :].clone() for x in (*inputs, upstream)]
    forward_and_backward(attention, (small[0], small[1], small[2]), small[3])  # what is loaded at first use
    forget_peak()
    before = resident("VmRSS")
    forward_and_backward(attention, inputs, upstream)
    return resident("VmHWM") - before


def forget_peak() -> None:
    """Give what is free back to the system, and start the peak anew."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc
        trim(0)
    with contextlib.suppress(OSError):  # else the peak is that of loading, where that was more
        Path("/proc/self/clear_refs").write_text("5")


def resident(name: str) -> int:
    """VmRSS or VmHWM (the peak) of this process, bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
