"""Batches made ahead of the training step, in a background thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from ...parallel.mesh import even_share
from ..batch import Batch
from ..schedule import BatchSizes

if TYPE_CHECKING:
    from ..objectives import Objective


class Loader:
    """This data rank's batch of every global step, made a few steps ahead.

    Data rank r of R takes the r-th of R slices of a step's samples (``even_share``: where they do not divide, the first
    ranks have one more).  Nothing is replayed, whichever step comes first.

    Args:
        objective: makes the batches.
        sizes: which samples a step holds over all data ranks.
        data_rank, data_size: this rank's place among the data-parallel ranks.
        prefetch: steps made ahead; 0 makes every batch when it is asked for, without a thread.
        pin_memory: page-locked tensors, for copies to a GPU that overlap with work.

    Attributes:
        wait_seconds: how long the consumer has waited for batches so far.
    """

    def __init__(
        self,
        objective: Objective,
        sizes: BatchSizes,
        *,
        data_rank: int = 0,
        data_size: int = 1,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        for size in sizes.sizes:
            if size < data_size:
                raise ValueError(
                    f"a global batch of {size} rows leaves some of {data_size} data ranks without one: "
                    f"set it to at least {data_size}, or start fewer ranks"
                )
        if not 0 <= data_rank < data_size:
            raise ValueError(f"data rank {data_rank} is outside [0, {data_size})")
        self.objective = objective
        self.wait_seconds = 0.0
        self._sizes, self._data_rank, self._data_size = sizes, data_rank, data_size
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        self._worker: _Worker | None = None

    def make(self, step: int) -> Batch:
        """Make the batch of one step now, in this thread."""
        samples = self._sizes.samples_of(step)
        mine = even_share(len(samples), self._data_rank, self._data_size)
        batch = self.objective.batch(np.arange(samples.start + mine.start, samples.start + mine.stop))
        return batch.pin_memory() if self._pin_memory else batch

    def batch(self, step: int) -> Batch:
        """The batch of a step; the steps after it are then made ahead.

        An error of the background thread is raised here.
        """
        began = time.perf_counter()
        try:
            if not self._prefetch:
                return self.make(step)
            if self._worker is None or self._worker.next_step != step:
                self.close()
                self._worker = _Worker(self, step, self._prefetch)
            try:
                return self._worker.take()
            except BaseException:
                self.close()
                raise
        finally:
            self.wait_seconds += time.perf_counter() - began

    def steps(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """The batches of steps start, start + 1, ..., up to ``stop`` or without end."""
        step = start
        while stop is None or step < stop:
            yield self.batch(step)
            step += 1

    def close(self) -> None:
        """End the background thread; a later ``batch`` starts another."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Worker:
    """One thread that makes consecutive batches into a bounded queue."""

    def __init__(self, loader: Loader, step: int, prefetch: int) -> None:
        self.next_step = step
        self._loader = loader
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(prefetch)
        self._stopping = threading.Event()
        # A daemon: a consumer that dies without closing must still be able to exit.
        self._thread = threading.Thread(target=self._run, args=(step,), name="farspan-loader", daemon=True)
        self._thread.start()

    def _run(self, step: int) -> None:
        while not self._stopping.is_set():
            try:
                made: Batch | BaseException = self._loader.make(step)
            except BaseException as error:
                made = error
            self._put(made)
            if isinstance(made, BaseException):
                return
            step += 1

    def _put(self, made: Batch | BaseException) -> None:
        while not self._stopping.is_set():
            try:
                self._queue.put(made, timeout=0.1)
                return
            except queue.Full:
                continue

    def take(self) -> Batch:
        made = self._queue.get()
        if isinstance(made, BaseException):
            raise made
        self.next_step += 1
        return made

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
