"""What a checkpoint costs: how long a save takes and how long training stands still for it, asynchronous and not,
beside a plain write of as many bytes; how long a resume verifies and loads.  One rank on a CPU, weights and both
moments of AdamW in float32, real steps on real text.

    python benchmarks/saves.py [--layers 16] [--out benchmarks/saves]
    python benchmarks/saves.py --slow-disk-seconds 600     a disk so slow that a save takes that long; its own section
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "benchmarks"]
sys.path.append(str(ROOT / "tests/support"))

from farspan.benchmarks.about import about, bullets  # noqa: E402

LIMIT = 0.02  # of the time that a save takes: how long training may stand still
WARM = 3  # steps before the first save
HIDDEN = 768

Lines = list[dict[str, Any]]


def settings(data: Path, run: Path, layers: int, steps: int, asynchronous: bool) -> dict[str, Any]:
    from runs import settings

    model = {
        "model_type": "roberta-prelayernorm",
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "intermediate_size": 4 * HIDDEN,
        "max_position_embeddings": 130,
    }
    overrides = {"model": model, "checkpoint.asynchronous": asynchronous, "logging.interval": 10**6}
    overrides |= {"training.global_batch_size": 1, "training.micro_batch_size": 1, "data.sequence_length": 128}
    return settings(data, run, steps, overrides)


class Enough(Exception):
    """All is measured."""


def train(values: dict[str, Any], saved: Collection[int] = (), slow: float | None = None) -> dict[str, Any]:
    """In a process of its own: train, save after these steps alone (none: after the last).  The last save is on a disk
    that takes ``slow`` bytes a second (None: as it is), and once it is there all ends.

    What metrics.jsonl says, and how long a start verified and built the engine.
    """
    import pytest
    from slow_disk import slow_down

    from farspan.launch.local import free_port
    from farspan.pretrain import run
    from farspan.pretrain import train as loop
    from farspan.pretrain.config_file import parse_config
    from farspan.pretrain.metrics import MetricsWriter, SaveMetrics, read_metrics
    from farspan.pretrain.saving import Saving

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    seconds: dict[str, float] = {}
    report, ended = MetricsWriter.saved, []  # type: Any, list[int]

    def reported(self: MetricsWriter, metrics: SaveMetrics) -> None:
        report(self, metrics)
        ended.append(metrics.step)
        if slow is not None and len(ended) == len(saved):
            raise Enough

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            began = time.perf_counter()
            result = function(*args)
            seconds[name] = time.perf_counter() - began
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "find_start", timed("find_start", loop.find_start))
        patch.setattr(run, "build_engine", timed("build_engine", run.build_engine))
        if saved:
            patch.setattr(Saving, "due", lambda self, done, last: done in saved)
        if slow is not None:
            slow_down(patch, lambda: slow if len(ended) == len(saved) - 1 else 1e12)
        patch.setattr(MetricsWriter, "saved", reported)
        with contextlib.suppress(Enough):
            loop.train(parse_config(values, "the benchmark"))
    return {"lines": read_metrics(Path(values["run_dir"]) / "metrics.jsonl"), "seconds": seconds}


def apart(function: Any, *args: Any) -> Any:
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def steps_of(lines: Lines, first: int, last: int = 10**9) -> list[float]:
    return [line["step_seconds"] for line in lines if "loss" in line and first <= line["step"] <= last]


def save_of(lines: Lines, step: int) -> dict[str, Any]:
    return next(line for line in lines if "save_seconds" in line and line["step"] == step)


def beside(lines: Lines, step: int) -> list[float]:
    """The seconds of the steps that ended between the beginning and the end of the save after ``step``: in the file
    its line comes after theirs."""
    end = next(number for number, line in enumerate(lines) if "save_seconds" in line and line["step"] == step)
    return steps_of(lines[:end], step + 1)


def plain_write(path: Path, size: int) -> float:
    """Seconds for a write of so many bytes by one thread, in portions of 16 MiB, flushed to the disk."""
    portion = os.urandom(2**24)
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        left = size
        while left:
            left -= file.write(portion[:left])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def forget_pages(folder: Path) -> None:
    """So that a resume reads from the disk."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, data: Path, layers: int) -> dict[str, Any]:
    """The second of two saves, both ways: the first makes the buffers of the snapshot."""
    result: dict[str, Any] = {}
    second = WARM + 12
    for name, asynchronous in (("synchronous", False), ("asynchronous", True)):
        run = folder / name
        found = apart(train, settings(data, run, layers, second + 20, asynchronous), (WARM, second))
        lines, save = found["lines"], save_of(found["lines"], second)
        alone = steps_of(lines, second - 8, second)
        result[name] = {"seconds": save["save_seconds"], "stall_seconds": save["save_stall_seconds"]}
        result[name] |= {"first_stall_seconds": save_of(lines, WARM)["save_stall_seconds"]}
        result[name] |= {"step_seconds": statistics.median(alone), "bytes": save["save_bytes"]}
        if asynchronous:
            during = beside(lines, second)
            result[name] |= {"steps_beside": len(during), "step_seconds_beside": statistics.median(during or [0.0])}
    result["plain_write_seconds"] = [plain_write(folder / "plain", save["save_bytes"]) for _ in range(2)]
    forget_pages(run)
    resumed = apart(train, settings(data, run, layers, second, True))["seconds"]
    fresh = apart(train, settings(data, folder / "fresh", layers, WARM, True), (0,))["seconds"]  # none is saved
    result["resume"] = {"verify_seconds": resumed["find_start"], "load_seconds": resumed["build_engine"]}
    return result | {"build_seconds": fresh["build_engine"]}


def measure_slow(folder: Path, data: Path, layers: int, seconds: float) -> dict[str, Any]:
    """A save that takes so long, beside steps that go on."""
    found = apart(train, settings(data, folder / "short", layers, 2 * WARM, True), (WARM,))
    size = save_of(found["lines"], WARM)["save_bytes"]
    values = settings(data, folder / "slow", layers, 10**6, True)
    lines = apart(train, values, (WARM, WARM + 12), size / seconds)["lines"]
    save = save_of(lines, WARM + 12)
    return {
        "seconds": save["save_seconds"],
        "stall_seconds": save["save_stall_seconds"],
        "bytes": size,
        "bytes_per_second": size / seconds,
        "steps_beside": len(beside(lines, WARM + 12)),
        "step_seconds_beside": statistics.median(beside(lines, WARM + 12)),
        "step_seconds": statistics.median(steps_of(lines, WARM + 1, WARM + 12)),
        "limit": LIMIT,
    }


def page(result: dict[str, Any]) -> str:
    lines = ["# Saving and resuming", "", " ".join(line.strip() for line in PAGE.strip().splitlines()), ""]
    for part in (_page_of_saves(result.get("saves")), _page_of_slow_disk(result.get("slow_disk"))):
        lines += part
    return "\n".join(lines).rstrip() + "\n"


PAGE = """
One rank on a CPU trains with AdamW in float32 and saves weights and both moments, one file of each, with a checksum of
every MiB, flushed to the disk. The stall is how long training stood still for a save, as metrics.jsonl and TensorBoard
(`checkpoint/save_stall_seconds`) have it.
"""


def _page_of_saves(found: dict[str, Any] | None) -> list[str]:
    lines = ["## On the disk as it is", "", "`python benchmarks/saves.py`", ""]
    if found is None:
        return [*lines, "Not measured.", ""]
    sync, behind, resume = found["synchronous"], found["asynchronous"], found["resume"]
    size, plain = sync["bytes"], min(found["plain_write_seconds"])

    def row(name: str, seconds: float, stall: str, note: str) -> str:
        return f"| {name} | {seconds:.1f} s | {size / seconds / 1e6:,.0f} MB/s | {stall} | {note} |"

    return [
        *lines,
        *bullets(found["about"]),
        f"- model: {found['layers']} layers of width {HIDDEN}; a checkpoint has {size / 1e9:.2f} GB",
        "",
        "| | time | rate | stall | |",
        "|---|---|---|---|---|",
        row(
            "a plain write of as many bytes, fsync", plain, "–", "one file, one thread, no checksum; the better of two"
        ),
        row("synchronous save", sync["seconds"], f"{sync['stall_seconds']:.2f} s", ""),
        row(
            "asynchronous save",
            behind["seconds"],
            f"{behind['stall_seconds']:.2f} s",
            f"the first, which makes the buffers of the snapshot: {behind['first_stall_seconds']:.2f} s; "
            f"{behind['steps_beside']} steps beside it, of {behind['step_seconds_beside']:.2f} s each, "
            f"{behind['step_seconds']:.2f} s without a save",
        ),
        row("resume: verify all checksums", resume["verify_seconds"], "–", "from the disk, not from memory"),
        row(
            "resume: build the engine and load",
            resume["load_seconds"],
            "–",
            f"of it {found['build_seconds']:.1f} s as from initial values",
        ),
        "",
    ]


def _page_of_slow_disk(found: dict[str, Any] | None) -> list[str]:
    lines = ["## On a slow disk", "", "`python benchmarks/saves.py --slow-disk-seconds 600`", ""]
    if found is None:
        return [*lines, "Not measured.", ""]
    share = found["stall_seconds"] / found["seconds"]
    return [
        *lines,
        f"Every write of the checkpoint's files sleeps: the disk takes {found['bytes_per_second'] / 1e6:.2f} MB/s. "
        f"The save is asynchronous; the gate is a stall of less than {LIMIT:.0%} of its time.",
        "",
        *bullets(found["about"]),
        f"- model: {found['layers']} layers of width {HIDDEN}; a checkpoint has {found['bytes'] / 1e9:.2f} GB",
        "",
        "| save | stall | share | steps beside it | a step beside it | a step without a save | verdict |",
        "|---|---|---|---|---|---|---|",
        f"| {found['seconds']:.0f} s | {found['stall_seconds']:.2f} s | {share:.2%} | {found['steps_beside']} "
        f"| {found['step_seconds_beside']:.2f} s | {found['step_seconds']:.2f} s "
        f"| {'holds' if share < LIMIT else 'does not hold'} |",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--slow-disk-seconds", type=float, metavar="SECONDS")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/saves", help="of .md and .json")
    parser.add_argument("--scratch", type=Path, help="on which disk to save; by default where temporary files are")
    arguments = parser.parse_args()
    from runs import prepare_text

    where = {"load of the machine before": f"{os.getloadavg()[0]:.1f}"}
    path = arguments.out.with_suffix(".json")
    result = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = Path(scratch)
        data = prepare_text(folder)
        if arguments.slow_disk_seconds is None:
            name, found = "saves", measure(folder, data, arguments.layers)
        else:
            name, found = "slow_disk", measure_slow(folder, data, arguments.layers, arguments.slow_disk_seconds)
    about_it = about("torch", "deepspeed") | {"threads": os.environ.get("OMP_NUM_THREADS", "as torch chooses")} | where
    result[name] = found | {"layers": arguments.layers, "about": about_it}
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(result))
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
