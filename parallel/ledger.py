"""What collective this rank is in, or was in last, and how long it has waited in them.

Every collective and every message between two ranks, ours, megatron-core's or DeepSpeed's, ends in a method of
torch's ``ProcessGroup``, and whoever waits for it in ``Work.wait``: those are wrapped, here alone.  (torch has no hook
for it: its flight recorder is not told who waits, and nobody can read it while the process hangs.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# Method of ProcessGroup → what torch.distributed calls it.  Names that a release of torch lacks are passed over.
_COLLECTIVES = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "allgather_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather_into_tensor",
    "_allgather_base": "all_gather_into_tensor",
    "all_gather_single": "all_gather_into_tensor",
    "all_gather_single_coalesced": "all_gather_into_tensor",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter_tensor",
    "reduce_scatter_single": "reduce_scatter_tensor",
    "reduce_scatter_single_coalesced": "reduce_scatter_tensor",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_tensor",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all_single",
    "all_to_all_single": "all_to_all_single",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "barrier": "barrier",
    "monitored_barrier": "monitored_barrier",
}
_MESSAGES = ("send", "recv")


class Board(Protocol):
    """Where the ledger is shown while it is written: ``pretrain.heartbeat.Heartbeat``."""

    def group(self, key: str, name: str, ranks: list[int]) -> int | None: ...
    def name(self, name: str) -> int | None: ...
    def begun(self, slot: int, number: int, name: int, elements: int) -> None: ...
    def waits(self, slot: int, number: int, name: int, elements: int) -> None: ...
    def ended(self, slot: int, number: int) -> None: ...


@dataclasses.dataclass
class _Series:
    """The collectives of a group, or the messages from one rank to another, in the order in which they begin: the same
    on all ranks that take part."""

    slot: int | None  # on the board
    count: int = 0


@dataclasses.dataclass(frozen=True)
class _Entry:
    series: _Series
    number: int  # in its series, from 1
    name: int | None  # on the board
    elements: int
    on_gpu: bool
    launched: Any = None  # a CUDA event, of a collective that runs in the stream that launches it


class Ledger:
    """Counts the collectives of this process, tells the board, and adds up the time spent waiting in them.

    On a CPU that is time of this thread; on a GPU time in which its stream could do nothing else.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        # Not kept alive by this: a group that is destroyed, a request that nobody waits for.
        self._series: weakref.WeakKeyDictionary[Any, dict[str, _Series]] = weakref.WeakKeyDictionary()
        self._entries: weakref.WeakKeyDictionary[Any, _Entry] = weakref.WeakKeyDictionary()
        self._newest: _Entry | None = None
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def waited(self) -> float:
        """Seconds waited since this was last asked; those that a GPU has not come to yet count the next time."""
        waiting = []
        for begin, end in self._events:
            if end.query():
                self._seconds += begin.elapsed_time(end) / 1000
            else:
                waiting.append((begin, end))
        seconds, self._seconds, self._events = self._seconds, 0.0, waiting
        return seconds

    @contextlib.contextmanager
    def installed(self) -> Iterator[Ledger]:
        """While it is open, all collectives of the process are seen."""
        before: list[tuple[type, str, Any]] = []

        def wrap(owner: type, method: str, wrapper: Callable[[Any, str], Any]) -> None:
            if method in vars(owner):
                # Not what getattr gives: put back, that would be a function that gets no self.
                before.append((owner, method, vars(owner)[method]))
                setattr(owner, method, wrapper(getattr(owner, method), method))

        try:
            for method in _COLLECTIVES:
                wrap(dist.ProcessGroup, method, self._collective)
            for method in _MESSAGES:
                wrap(dist.ProcessGroup, method, self._message)
            wrap(dist.ProcessGroup, "_end_coalescing", self._coalesced)
            wrap(dist.Work, "wait", self._wait)
            yield self
        finally:
            for owner, method, original in before:
                setattr(owner, method, original)

    # The wrappers.

    def _collective(self, original: Any, method: str) -> Any:
        name = _COLLECTIVES[method]

        def collective(group: Any, *args: Any, **kwargs: Any) -> Any:
            return self._begin(group, "", None, name, original, args, kwargs)

        return collective

    def _message(self, original: Any, method: str) -> Any:
        sends = method == "send"

        def message(group: Any, tensors: Any, peer: int, *args: Any, **kwargs: Any) -> Any:
            pair = (group.rank(), peer) if sends else (peer, group.rank())
            return self._begin(group, f" {pair[0]}>{pair[1]}", pair, method, original, (tensors, peer, *args), kwargs)

        return message

    def _coalesced(self, original: Any, _: str) -> Any:
        def end(group: Any, *args: Any, **kwargs: Any) -> Any:
            return self._remember(original(group, *args, **kwargs), self._newest)

        return end

    def _wait(self, original: Any, _: str) -> Any:
        def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            entry = self._entries.get(work)
            if entry is None:
                return original(work, *args, **kwargs)
            shown = entry.series.slot is not None and entry.name is not None
            if shown:
                self._board.waits(entry.series.slot, entry.number, entry.name, entry.elements)  # type: ignore[arg-type]
            begin = (entry.launched or _event()) if entry.on_gpu else None
            began = time.perf_counter()
            try:
                return original(work, *args, **kwargs)
            finally:
                if begin is None:
                    self._seconds += time.perf_counter() - began
                else:
                    self._events.append((begin, _event()))
                if shown:
                    self._board.ended(entry.series.slot, entry.number)  # type: ignore[arg-type]

        return wait

    def _begin(
        self, group: Any, kind: str, pair: tuple[int, int] | None, name: str, original: Any, args: Any, kwargs: Any
    ) -> Any:
        series = self._series_of(group, kind, pair)
        series.count += 1
        tensor = _first_tensor(args)
        of = name if tensor is None else f"{name} {str(tensor.dtype).removeprefix('torch.')}"
        number, elements = self._board.name(of), 0 if tensor is None else tensor.numel()
        on_gpu = tensor is not None and tensor.is_cuda
        launched = _event() if on_gpu and not getattr(args[-1], "asyncOp", True) else None
        entry = self._newest = _Entry(series, series.count, number, elements, on_gpu, launched)
        if series.slot is not None and number is not None:
            self._board.begun(series.slot, series.count, number, elements)
        work = original(group, *args, **kwargs)
        if work is None and launched is not None:  # NCCL: the stream waits for it, nobody else will
            self._events.append((launched, _event()))
            if series.slot is not None and number is not None:
                self._board.ended(series.slot, entry.number)
        return self._remember(work, entry)

    def _remember(self, work: Any, entry: _Entry | None) -> Any:
        if work is not None and entry is not None:
            self._entries[work] = entry
        return work

    def _series_of(self, group: Any, kind: str, pair: tuple[int, int] | None) -> _Series:
        of_group = self._series.setdefault(group, {})
        if kind not in of_group:
            ranks, name = dist.get_process_group_ranks(group), group.group_desc
            if pair is not None:
                ranks = [ranks[place] for place in pair]
                name += f" (messages from rank {ranks[0]} to {ranks[1]})"
            slot = self._board.group(group.group_name + kind, name, ranks)
            of_group[kind] = _Series(slot)
        return of_group[kind]


def _first_tensor(values: Any) -> Tensor | None:
    """Of what a collective is given: tensors, or lists of them, or lists of lists."""
    for value in values:
        if isinstance(value, Tensor):
            return value
        if isinstance(value, list | tuple) and (found := _first_tensor(value)) is not None:
            return found
    return None


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
