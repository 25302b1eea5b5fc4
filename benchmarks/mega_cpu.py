"""One MEGA layer on a CPU, forward and backward: Farspan's against transformers 4.37's, and its growth with the length.

512 features, 1024 of values and of the feed-forward, 128 shared, moving average of 16 dimensions in both directions,
softmax in chunks of 128, rotary bias, float32, one row, the same weights on both sides.  Every side runs in a process
of its own, transformers' under an interpreter that has it.  Outputs and input gradients must agree before anything is
timed; then the sides run in turn, and the ratio is the median over the pairs.  Memory is measured in fresh processes.

    python benchmarks/mega_cpu.py [--transformers4 PYTHON] [--quick] [--out benchmarks/mega_cpu]

Without --transformers4 only Farspan's side runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from farspan.benchmarks.about import about, bullets

WORKER = Path(__file__).with_name("mega_cpu_worker.py")
AGREE = 1e-4  # outputs and input gradients, relative to the largest value
COMPARED, QUICK_COMPARED = 4096, 256
LENGTHS: tuple[int, ...] = (1024, 4096, 16384, 65536)
QUICK_LENGTHS: tuple[int, ...] = (256, 512)
# What the layer is held to, at COMPARED and from there to the longest.
FASTER, SMALLER, GROWTH = 3.0, 3.0, 18.0


class Worker:
    """A side in a process of its own; every method of its ``Side`` can be called."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._answer()

    def __call__(self, name: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a side's process ended: see above")
        return json.loads(line)


class Sides:
    """Starts workers."""

    def __init__(self, transformers4: str | None, threads: int, folder: str) -> None:
        self.pythons = {"farspan": sys.executable} | ({"transformers": transformers4} if transformers4 else {})
        self.threads, self.folder = threads, folder

    @contextmanager
    def worker(self, side: str, dropout: float = 0.0) -> Iterator[Worker]:
        command = [self.pythons[side], str(WORKER), side, str(self.threads), str(dropout), self.folder]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "PYTHONSAFEPATH": "1"}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=self.folder
        )
        try:
            yield Worker(process)
        finally:
            process.terminate()
            process.wait()

    @contextmanager
    def both(self, dropout: float = 0.0) -> Iterator[dict[str, Worker]]:
        """Of every side, Farspan's first (it saves the weights that the other loads)."""
        with ExitStack() as stack:
            yield {side: stack.enter_context(self.worker(side, dropout)) for side in self.pythons}

    def memory(self, side: str, length: int) -> int:
        with self.worker(side) as worker:
            return int(worker("memory", length))


def check(workers: dict[str, Worker], length: int) -> dict[str, float]:
    """The differences between the sides, all within AGREE."""
    workers["farspan"]("save", length)
    found: dict[str, float] = workers["transformers"]("differ")
    if max(found.values()) > AGREE:
        raise SystemExit(f"the two sides differ at length {length}, nothing was timed: {found} (limit {AGREE})")
    return found


def in_turn(workers: dict[str, Worker], length: int, pairs: int) -> dict[str, list[float]]:
    """Seconds of each side, pair by pair, the order changing; one step of each warms up."""
    times: dict[str, list[float]] = {side: [] for side in workers}
    for worker in workers.values():
        worker("time", length, 1)
    for pair in range(pairs):
        for side in list(workers)[:: -1 if pair % 2 else 1]:
            times[side].append(workers[side]("time", length, 1))
        print(f"  {length}: " + ", ".join(f"{s} {t[-1]:.3f} s" for s, t in times.items()), file=sys.stderr, flush=True)
    return times


def growth(worker: Worker, lengths: tuple[int, ...], rounds: int) -> list[dict[str, float]]:
    """Of Farspan, by length: seconds of a pass and of its moving average, lengths in turn."""
    times: dict[int, list[list[float]]] = {length: [[], []] for length in lengths}
    for turn in range(rounds + 1):
        for length, kept in times.items():
            steps = max(1, min(4, lengths[-1] // length // 4))
            seconds = [worker("time", length, steps, part) for part in ("forward", "average")]
            if turn:  # the first warms up
                for into, value in zip(kept, seconds, strict=True):
                    into.append(value)
        print(f"  lengths, round {turn} of {rounds}", file=sys.stderr, flush=True)
    rows = []
    for length, kept in times.items():
        whole, average = (statistics.median(values) for values in kept)
        row = {
            "length": length,
            "seconds": whole,
            "tokens_per_second": length / whole,
            "average_share": average / whole,
        }
        rows.append(row)
    return rows


def measure(sides: Sides, compared: int, lengths: tuple[int, ...], pairs: int, rounds: int) -> dict[str, Any]:
    results: dict[str, Any] = {"compared": compared, "comparisons": []}
    if "transformers" in sides.pythons:
        for dropout in (0.0, 0.1):
            with sides.both(dropout) as workers:
                if not dropout:
                    results["versions"] = workers["transformers"]("versions")
                    results["differences"] = check(workers, compared)
                times = in_turn(workers, compared, pairs)
            ratios = [b / a for a, b in zip(times["farspan"], times["transformers"], strict=True)]
            medians = {side: statistics.median(values) for side, values in times.items()}
            results["comparisons"].append(
                {"dropout": dropout, **medians, "ratio": statistics.median(ratios), "lowest": min(ratios),
                 "highest": max(ratios)}
            )  # fmt: skip
        results["their_memory"] = sides.memory("transformers", compared)
    with sides.worker("farspan") as worker:
        results["lengths"] = growth(worker, lengths, rounds)
    for row in results["lengths"]:
        row["memory"] = sides.memory("farspan", row["length"])
    return results


def table(results: dict[str, Any]) -> tuple[list[str], bool]:
    """The tables, and whether everything is within its limit."""
    lines, held = [], []
    by_length = {row["length"]: row for row in results["lengths"]}
    compared = results["compared"]
    if results["comparisons"]:
        ours, theirs = by_length[compared]["memory"], results["their_memory"]
        lines += [f"| length {compared} | Farspan | transformers | ratio (lowest, highest) |", "|---|---|---|---|"]
        for c in results["comparisons"]:
            lines.append(
                f"| seconds, dropout {c['dropout']:g} | {c['farspan']:.3f} | {c['transformers']:.3f} "
                f"| **{c['ratio']:.2f}** ({c['lowest']:.2f}, {c['highest']:.2f}) |"
            )
        lines.append(f"| peak memory, MiB | {ours / 2**20:.0f} | {theirs / 2**20:.0f} | **{theirs / ours:.2f}** |")
        held += [results["comparisons"][0]["ratio"] >= FASTER, theirs / ours >= SMALLER]
        found = ", ".join(f"{name} {value:.1e}" for name, value in results["differences"].items())
        lines += ["", f"Largest difference between the two, relative to the largest value: {found}.", ""]
    lines += [
        "| Farspan, length | seconds | tokens/s | moving average's share | peak memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for row in results["lengths"]:
        lines.append(
            f"| {row['length']} | {row['seconds']:.3f} | {row['tokens_per_second']:,.0f} | {row['average_share']:.0%} "
            f"| {row['memory'] / 2**20:,.0f} |"
        )
    last = max(by_length)
    grown = by_length[last]["seconds"] / by_length[compared]["seconds"]
    held.append(grown <= GROWTH * last / compared / 16)
    lines += [
        "",
        f"From {compared:,} to {last:,}, {last // compared} times the length: **{grown:.1f}** times the time.",
    ]
    return lines, all(held)


def report(results: dict[str, Any], lines: list[str], held: bool, threads: int, out: str) -> None:
    where = about("torch") | {"threads": str(threads)}
    where |= {f"the other side's {name}": version for name, version in results.get("versions", {}).items()}
    page = [
        "# One MEGA layer on a CPU: against transformers, and by length",
        "",
        "Forward and backward of attention and normalised feed-forward: 512 features, 1024 of values and of the",
        "feed-forward, 128 shared, moving average of 16 dimensions in both directions, softmax in chunks of 128,",
        "rotary bias, float32, one row, the same weights. Sides in turn, medians, each in a process of its own; peak",
        "memory is what the first pass of a fresh process adds to model and input.",
        "Farspan's side keeps freed memory, as its runs on a CPU do (`parallel/memory.py`); transformers' is as it is.",
        "`python benchmarks/mega_cpu.py --transformers4 PYTHON`",
        "",
        f"Limits: {FASTER:g} times faster than transformers, {SMALLER:g} times less memory, {GROWTH:g} times the time",
        f"for 16 times the length: {'held' if held else 'NOT HELD'}.",
        "",
        *bullets(where),
        "",
        *lines,
        "",
    ]
    Path(f"{out}.md").write_text("\n".join(page))
    Path(f"{out}.json").write_text(json.dumps({"about": where, **results}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers4", metavar="PYTHON", help="an interpreter that has transformers 4.37")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of steps in the comparison (default: 7)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over the lengths (default: 3)")
    parser.add_argument("--quick", action="store_true", help="short lengths, one pair: whether it runs")
    parser.add_argument("--out", metavar="PATH", help="write PATH.md and PATH.json")
    arguments = parser.parse_args()
    pairs, rounds, compared, lengths = arguments.pairs, arguments.rounds, COMPARED, LENGTHS
    if arguments.quick:
        pairs, rounds, compared, lengths = 1, 1, QUICK_COMPARED, QUICK_LENGTHS
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Sides(arguments.transformers4, arguments.threads, folder), compared, lengths, pairs, rounds)
    lines, held = table(results)
    print("\n".join(lines))
    if arguments.out:
        report(results, lines, held, arguments.threads, arguments.out)
    return 0 if held or arguments.quick else 1


if __name__ == "__main__":
    raise SystemExit(main())
