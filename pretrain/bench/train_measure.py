"""A training step of one model on one side: the rows that fit, time, memory, and where the time goes."""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...parallel.mesh import Mesh
from ..approximation.measure import forget_peak, resident
from ..hardware import model_flops_utilization, peak_flops_per_second
from .train_models import SIZES, Dropout, Setup
from .train_sides import FarspanSide, Side, TransformersSide, Unable

Found = dict[str, Any]
OURS, THEIRS = "farspan", "transformers"
TOKENS = {"cuda": 65536, "cpu": 1024}  # of a microbatch to begin with
WARM_UP = 3  # steps on a GPU; on a CPU one is enough
# What a CPU is thought to reach, for saying beforehand that a step would take too long.
CPU_FLOPS, LONGEST_STEP = 1e11, 120.0
DENSE = ("megatron-bert", "roberta-prelayernorm")
OPERATIONS = 12  # lines of a profile


def measure(
    setup: Setup,
    mesh: Mesh,
    *,
    rows: int | None,
    steps: int,
    dropout: Dropout,
    beside: bool,
    profile: Path | None,
) -> Found:
    """A row of the results: ``farspan`` and ``transformers``, each with its figures or ``why`` it has none."""
    device = mesh.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    row: Found = {
        "architecture": setup.architecture, "size": setup.size, "length": setup.length, "device": device.type,
        "dtype": str(dtype).split(".")[1],
    }  # fmt: skip
    wanted = rows or max(1, TOKENS[device.type] // setup.length)
    makers: dict[str, Callable[[], Side]] = {OURS: lambda: FarspanSide(setup, mesh, dtype, dropout)}
    if beside:
        makers[THEIRS] = lambda: TransformersSide(setup, device, dtype, dropout)
    measuring = _one_after_the_other if device.type == "cuda" else _in_turn
    row |= measuring(setup, makers, device, wanted, steps, profile)
    flops = setup.flops(setup.config(rows=1, dtype=dtype, dropout=dropout), 1)
    peak = peak_flops_per_second(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    for side in makers:
        if "why" not in row[side]:
            row[side] |= figures(row[side]["seconds"], row[side]["rows"], setup.length, flops, peak)
    return row


def figures(seconds: list[float], rows: int, length: int, flops_a_row: float, peak: float | None) -> Found:
    """From the seconds of steps: the median, tokens and the model's FLOPs a second, and the share of the peak."""
    step = statistics.median(seconds)
    flops = rows * flops_a_row / step
    return {
        "step_seconds": step, "tokens_per_second": rows * length / step, "flops_per_second": flops,
        "model_flops_utilization": model_flops_utilization(flops, peak),
    }  # fmt: skip


# On a GPU: one side after the other, each with the memory to itself.


def _one_after_the_other(
    setup: Setup,
    makers: dict[str, Callable[[], Side]],
    device: torch.device,
    rows: int,
    steps: int,
    profile: Path | None,
) -> Found:
    return {
        name: _guarded(lambda make=make, name=name: _alone(setup, name, make, rows, steps, profile))  # type: ignore[misc]
        for name, make in makers.items()
    }


def _alone(setup: Setup, name: str, make: Callable[[], Side], rows: int, steps: int, profile: Path | None) -> Found:
    side = make()
    loss, rows = _fitting(side, rows)
    for _ in range(WARM_UP - 1):
        side.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = [_timed(side) for _ in range(steps)]
    found = {
        "attention": side.attention, "rows": rows, "first_loss": loss, "seconds": seconds,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
    }  # fmt: skip
    if profile is not None and name == OURS:
        found["profile"] = profiled(side, profile, setup.name)
    return found


def _fitting(side: Side, rows: int) -> tuple[float, int]:
    """The loss of a first step with as many rows as fit, ``rows`` or a half of it, a quarter, ...; and how many."""
    while True:
        try:
            side.load(rows)
            return side.step(), rows
        except torch.OutOfMemoryError:
            if rows == 1:
                raise Unable("one row does not fit in memory") from None
        gc.collect()
        torch.cuda.empty_cache()
        rows //= 2


# On a CPU: in turn, so that a machine whose speed drifts does not decide.


def _in_turn(
    setup: Setup,
    makers: dict[str, Callable[[], Side]],
    device: torch.device,
    rows: int,
    steps: int,
    profile: Path | None,
) -> Found:
    sides: dict[str, Side] = {}
    found: Found = {}
    for name, make in makers.items():
        found[name] = _guarded(lambda make=make, name=name: _warmed_up(setup, name, make, rows, sides))  # type: ignore[misc]
    for turn in range(steps):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            step = _guarded(lambda name=name: {"seconds": _timed(sides[name])})  # type: ignore[misc]
            if "why" in step:
                found[name] = step
                del sides[name]
            else:
                found[name]["seconds"].append(step["seconds"])
    if profile is not None and OURS in sides:
        found[OURS]["profile"] = profiled(sides[OURS], profile, setup.name)
    return found


def _warmed_up(setup: Setup, name: str, make: Callable[[], Side], rows: int, sides: dict[str, Side]) -> Found:
    if why := too_much(setup, name, rows):
        raise Unable(why)
    forget_peak()
    before = resident("VmRSS")
    side = make()
    side.load(rows)
    loss = side.step()
    sides[name] = side
    memory = resident("VmHWM") - before
    return {"attention": side.attention, "rows": rows, "first_loss": loss, "seconds": [], "peak_memory_bytes": memory}


def too_much(setup: Setup, side: str, rows: int) -> str | None:
    """Why a CPU is spared a step: it would take too long, or more memory than there is, both roughly estimated."""
    size, tokens = SIZES[setup.size], rows * setup.length
    config = setup.config(rows=rows, dtype=torch.float32, dropout=Dropout())
    if (seconds := setup.flops(config, rows) / CPU_FLOPS) > LONGEST_STEP:
        return f"a step would take about {seconds / 60:.0f} minutes on a CPU"
    # 34 bytes for every feature of every token and layer at two bytes a number (arXiv 2205.05198, section 4.1).
    needed = 2 * 34.0 * tokens * size.layers * size.hidden
    if side == THEIRS and setup.architecture == "megatron-bert":  # weights of attention in memory
        needed += 3 * 4.0 * rows * size.layers * size.heads * setup.length**2
    there = _available()
    return f"a step would take about {needed / 2**30:.0f} GiB of memory" if needed > 0.9 * there else None


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _timed(side: Side) -> float:
    began = time.perf_counter()
    loss = side.step()  # waits for the device
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    if not math.isfinite(loss):
        raise Unable(f"the loss is {loss}")
    return seconds


def _guarded(work: Callable[[], Found]) -> Found:
    """What ``work`` finds, or why it could not."""
    try:
        return work()
    except Unable as unable:
        return {"why": str(unable)}
    except torch.OutOfMemoryError:
        return {"why": "the model does not fit in memory"}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        text = " ".join(str(error).split()) or type(error).__name__
        return {"why": f"failed: {text[:160]}"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# Where the time goes.


def profiled(side: Side, folder: Path, name: str) -> list[Found]:
    """A step's trace for TensorBoard in the folder; the operations that took longest, and their shares of all."""
    from torch.profiler import ProfilerActivity, profile, tensorboard_trace_handler

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    handler = tensorboard_trace_handler(str(folder), worker_name=name.replace(" ", "_"))
    with profile(activities=activities, on_trace_ready=handler) as profiler:
        side.step()
        if on_gpu:
            torch.cuda.synchronize()
    averages = profiler.key_averages()
    of_gpu = on_gpu and any(event.self_device_time_total for event in averages)
    spent = {
        event.key: ((event.self_device_time_total if of_gpu else event.self_cpu_time_total) / 1e6, event.count)
        for event in averages
        # An operation's kernels are listed beside it, by their own names.
        if not of_gpu or event.device_type == torch.autograd.DeviceType.CUDA
    }
    total = sum(seconds for seconds, _ in spent.values())
    longest = sorted(spent.items(), key=lambda item: -item[1][0])[:OPERATIONS]
    return [
        {"operation": key, "seconds": seconds, "share": seconds / total if total else 0.0, "calls": count}
        for key, (seconds, count) in longest
    ]
