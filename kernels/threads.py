"""Work on a CPU shared among threads by the piece, where operations are too small to be shared one by one.

torch shares each operation among threads, which wait for one another after it.  Between hundreds of small operations
that costs more than it brings, and far more where something else wants the same cores: a waiting thread holds its core.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}  # by process (a fork has none of its parent's threads) and size


def for_each(function: Callable[[T], None], items: Sequence[T], device: torch.device) -> None:
    """``function`` of every item, on a CPU several at a time, each in a thread of its own that shares nothing further.

    Nothing is differentiated in it.  What the items write must be apart.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads < 2 or len(items) < 2:
        for item in items:
            function(item)
        return
    inference = torch.is_inference_mode_enabled()  # a thread begins without

    def call(item: T) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            function(item)

    for _ in _pool(threads).map(call, items):
        pass  # an exception is raised here


def _pool(threads: int) -> ThreadPoolExecutor:
    key = os.getpid(), threads
    if key not in _pools:
        started = threading.Barrier(threads + 1)

        def start() -> None:
            torch.set_num_threads(1)  # of this thread, but also of those that ask for the first time later
            torch.get_num_threads()  # asked
            started.wait()

        _pools[key] = ThreadPoolExecutor(threads, "farspan", initializer=start)
        for _ in range(threads):
            _pools[key].submit(int)
        started.wait()
        torch.set_num_threads(threads)
    return _pools[key]
