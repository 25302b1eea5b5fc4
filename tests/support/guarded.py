"""Compiled kernels held to the memory they are given: a step beyond a tensor, either way, ends the process.

in_child(lambda: run the operation)      inside ``guarded_calls`` in a process of its own; AssertionError where it dies
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from farspan.kernels.library import Library

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(x: Tensor, *, at_end: bool) -> Tensor:
    """A copy of the same strides with an inaccessible page right after its last number (up to 15 bytes are left, so
    that it begins at a multiple of 16), or right before its first.  Never freed."""
    if not x.numel():
        return x
    extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    flat = x.as_strided((extent,), (1,))
    size, page = extent * x.element_size(), mmap.PAGESIZE
    pages = -(-size // page)
    base = _libc.mmap(
        None, (pages + 2) * page, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANON, -1, 0
    )
    assert base not in (None, ctypes.c_void_p(-1).value)
    for fence in (base, base + (pages + 1) * page):
        assert _libc.mprotect(fence, page, 0) == 0
    start = (base + (pages + 1) * page - size) // 16 * 16 if at_end else base + page
    buffer = (ctypes.c_char * size).from_address(start)
    copy = torch.frombuffer(buffer, dtype=x.dtype, count=extent)
    copy.copy_(flat)
    return copy.as_strided(x.shape, x.stride())


@contextlib.contextmanager
def guarded_calls(*, at_end: bool) -> Iterator[None]:
    """Every tensor that a library's function is called with is ``guarded``; what is written comes back."""
    call = Library.call

    def guarded_call(self: Library, function: str, *arguments: Any) -> None:
        copies = [guarded(a, at_end=at_end) if isinstance(a, Tensor) else a for a in arguments]
        call(self, function, *copies)
        for argument, copy in zip(arguments, copies, strict=True):
            if isinstance(argument, Tensor):
                argument.data.copy_(copy)  # not seen by autograd, which would say that an input has changed

    Library.call = guarded_call  # type: ignore[method-assign]
    try:
        yield
    finally:
        Library.call = call  # type: ignore[method-assign]


def in_child(run: Callable[[], object], *, seconds: float = 120) -> None:
    """AssertionError: memory beyond a tensor is touched, or ``run`` fails, in a child process."""
    for at_end in (True, False):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.set_num_threads(1)  # the parent's threads are not here
                with guarded_calls(at_end=at_end):
                    run()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        status, end = _wait(child, time.monotonic() + seconds)
        place = "after" if at_end else "before"
        assert not os.WIFSIGNALED(status), (
            f"{signal.Signals(os.WTERMSIG(status)).name}: {'time is over' if end else f'memory {place} a tensor'}"
        )
        assert os.WEXITSTATUS(status) == 0, "it fails in the child: see what it printed"


def _wait(child: int, end: float) -> tuple[int, bool]:
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status, False
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1], True
