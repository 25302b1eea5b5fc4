"""How long things take: on a GPU by events over a captured graph of many calls, on a CPU in turn.

A call is ``call(i)``, on the i-th of several sets of inputs.  The sets together are larger than a GPU's L2 cache, and
results are kept until all sets had their turn, so that neither inputs nor results are found in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch

from .about import l2_bytes

Call = Callable[[int], object]
CACHES = 4  # times the L2 cache that the sets of inputs take together
MOST_SETS = 256


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call: the median, and the 10th and 90th percentile, over ``rounds`` rounds of all sets."""

    seconds: float
    low: float
    high: float
    rounds: int
    captured: bool = False  # a graph, so that what the host does between launches does not count

    @staticmethod
    def of(rounds: list[float], *, captured: bool = False) -> Timing:
        ordered = sorted(rounds)
        low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.9))
        return Timing(statistics.median(ordered), low, high, len(ordered), captured)


def sets_for(bytes_a_set: int, device: torch.device) -> int:
    """How many sets of inputs to rotate."""
    if device.type != "cuda":
        return 2
    return max(2, min(MOST_SETS, -(-CACHES * l2_bytes(device) // max(bytes_a_set, 1))))


# On a GPU.


def synchronises(call: Call) -> bool:
    """Whether the host waits for the device within a call (warmed up already), as far as torch can tell."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(0)
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()
    return False


def device_time(call: Call, sets: int, *, seconds: float, least: int = 7, most: int = 200) -> Timing:
    """Of a call on the current GPU, for about so many ``seconds`` of measuring.

    Calls are captured in one graph.  One in which the host waits cannot be, and is timed as the host launches it.
    """
    with own_stream() as stream:
        for _ in range(2):  # what is built, chosen or allocated at first use
            for i in range(sets):
                call(i)
        replay = None if synchronises(call) else _captured(call, sets, stream)
        captured = replay is not None
        replay = replay or (lambda: [call(i) for i in range(sets)])
        replay()
        stream.synchronize()
        began = time.perf_counter()
        replay()
        stream.synchronize()
        once = time.perf_counter() - began
        rounds = max(least, min(most, round(seconds / max(once, 1e-6))))
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
        for first, last in events:
            first.record(stream)
            replay()
            last.record(stream)
        stream.synchronize()
    return Timing.of([a.elapsed_time(b) / 1e3 / sets for a, b in events], captured=captured)


@contextlib.contextmanager
def own_stream() -> Iterator[torch.cuda.Stream]:
    """A stream that can be captured: the current one, but not the default.  A backward pass runs on the stream of its
    forward pass, so both must be called within the same block to be captured."""
    stream = torch.cuda.current_stream()
    if stream != torch.cuda.default_stream():
        yield stream
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.default_stream())
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.default_stream().wait_stream(stream)


def _captured(call: Call, sets: int, stream: torch.cuda.Stream) -> Callable[[], object] | None:
    """What runs all sets once, as one graph; None where a library does not allow it."""
    graph, results = torch.cuda.CUDAGraph(), []
    try:
        with torch.cuda.graph(graph, stream=stream):
            results += [call(i) for i in range(sets)]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None

    def replay() -> object:
        graph.replay()
        return results  # held as long as the graph, so that every set has memory of its own to write to

    return replay


def launches(call: Call) -> int | None:
    """What a call starts on the device (kernels, copies, fills); None where the profiler sees none."""
    from torch.profiler import ProfilerActivity, profile

    call(0)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call(0)
        torch.cuda.synchronize()
    found = [event for event in profiler.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(found) or None


def added_memory(call: Call) -> int:
    """Bytes by which a call raises the peak of allocated memory over what was held before it."""
    call(0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceilings(device: torch.device, *, seconds: float) -> dict[str, float]:
    """What the device reaches: ``copy``, bytes a second read and written by a copy of 1 GiB; ``matmul``, FLOP/s of a
    bfloat16 product of 8192 × 8192 matrices."""
    source = torch.empty(2**30, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    copy = device_time(lambda i: target.copy_(source), 2, seconds=seconds)
    n = 8192
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    matmul = device_time(lambda i: a @ b, 2, seconds=seconds)
    return {"copy": 2 * 2**30 / copy.seconds, "matmul": 2 * n**3 / matmul.seconds}


# On a CPU.


def in_turn(
    sides: Mapping[str, Call], sets: int, *, seconds: float, least: int = 3, most: int = 25
) -> dict[str, list[float]]:
    """Seconds a call of every side, round by round: sides in turn, the order changing, after a round that warms up.

    About so many ``seconds`` are spent.  A side whose call is short makes several calls a round.
    """
    calls = {}
    for name, call in sides.items():
        call(0)
        calls[name] = max(1, min(200, round(0.01 / max(_seconds(call, 1, sets), 1e-6))))
    a_round = sum(_seconds(call, calls[name], sets) * calls[name] for name, call in sides.items())
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(max(least, min(most, round(seconds / max(a_round, 1e-6))))):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            found[name].append(_seconds(sides[name], calls[name], sets))
    return found


def _seconds(call: Call, times: int, sets: int) -> float:
    began = time.perf_counter()
    for i in range(times):
        call(i % sets)
    return (time.perf_counter() - began) / times


def ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times as fast: the median over rounds."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
