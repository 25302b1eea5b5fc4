"""Tensors read in a thread while those before them are written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class ReadAhead:
    """Gives the tensors of ``sizes``, which are asked for in its order, reading further ones meanwhile: as many as have
    with the one that was given last at most ``room`` bytes.

    What reading raises is raised where the tensor is asked for.  Tensors are copied by one thread of torch's meanwhile:
    more would take the time of the one that writes.
    """

    def __init__(self, read: Callable[[str], Tensor], sizes: Mapping[str, int], room: int) -> None:
        self._read, self._room = read, room
        self._left = deque(sizes.items())
        self._reading: deque[tuple[str, int, Future[Tensor]]] = deque()
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> ReadAhead:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

    def __call__(self, name: str) -> Tensor:
        if not self._reading:
            self._begin()
        first, size, tensor = self._reading.popleft()
        assert first == name, f"{name} was asked for, {first} is next"
        taken = size + sum(size for _, size, _ in self._reading)
        while self._left and taken + self._left[0][1] <= self._room:
            taken += self._left[0][1]
            self._begin()
        return tensor.result()

    def _begin(self) -> None:
        name, size = self._left.popleft()
        self._reading.append((name, size, self._thread.submit(self._read, name)))
