"""Attention of long rows on a CPU: MRA-2 and Nyström attention against exact attention, time and memory by length.

The core of one layer (queries, keys and values to the heads' outputs), 12 heads of 64 features, one row, float32,
forward and backward, on the synthetic model of ``farspan bench approximation``: MRA-2 at 8 blocks a row, Nyström
attention at 64 landmarks without and with its convolution of 65 positions (and the gradient of its weights), and
``scaled_dot_product_attention``.  Times: all in turn in one process, the order changing; with one thread (the default)
of the process's own time, for which what else runs counts for little, else by the clock on the wall.  Memory: what a
pass adds to the peak of a fresh process over inputs and the output's gradient.

    python benchmarks/long_attention_cpu.py [--quick] [--threads N] [--out benchmarks/long_attention_cpu]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farspan.benchmarks.about import about, bullets
from farspan.kernels.nystrom import position_convolution
from farspan.parallel.memory import keep_freed_memory
from farspan.pretrain.approximation.measure import Attention, forward_and_backward, peak_memory
from farspan.pretrain.approximation.methods import Method
from farspan.pretrain.approximation.synthetic import synthetic_qkv

HEADS, SIZE, CONVOLUTION = 12, 64, 65
LENGTHS: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768)
LONGEST_EXACT = 16384  # and of times
# What is asked for: less time than exact attention from CHEAPER_FROM on, and memory that grows at most GROWTH-fold from
# a quarter of the longest length to it.
CHEAPER_FROM, GROWTH = 2048, 5.0
EXACT = "exact"


@dataclasses.dataclass(eq=False)
class Convolved:
    """Attention to which the convolution of values is added, as in Nyströmformer."""

    attention: Method
    weight: Tensor  # [heads, positions]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(q, k, v) + position_convolution(v, self.weight)


def attentions() -> dict[str, Attention]:
    weight = 0.02 * torch.randn(HEADS, CONVOLUTION, generator=torch.Generator().manual_seed(0))
    nystrom = Method("Nyström", 64)
    return {
        EXACT: Method("exact"),
        "MRA-2": Method("MRA-2", 8),
        "Nyström": nystrom,
        "Nyström, convolution": Convolved(nystrom, weight.requires_grad_()),
    }


def times(length: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each in every round; short lengths are warmed up."""
    inputs, found = synthetic_qkv(1, HEADS, length, SIZE), attentions()
    upstream = torch.ones_like(inputs[2])
    kept: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(rounds + (length <= 4096)):
        for name in list(found)[:: -1 if turn % 2 else 1]:
            kept[name].append(forward_and_backward(found[name], inputs, upstream))
    print(f"  {length}: " + ", ".join(f"{n} {min(t):.3f} s" for n, t in kept.items()), file=sys.stderr, flush=True)
    return {name: seconds[-rounds:] for name, seconds in kept.items()}


def memory(length: int, threads: int) -> dict[str, int]:
    some = {name: a for name, a in attentions().items() if name != EXACT or length <= LONGEST_EXACT}
    return peak_memory(some, synthetic_qkv(1, HEADS, length, SIZE), threads)


def measure(lengths: tuple[int, ...], rounds: int, threads: int) -> list[dict[str, Any]]:
    load = os.getloadavg()[0]
    rows: list[dict[str, Any]] = [{"length": n, "load": load, "memory": memory(n, threads)} for n in lengths]
    keep_freed_memory()  # as a run on a CPU does; the same for all
    for row in rows:
        if row["length"] > LONGEST_EXACT:
            continue
        row["load"], seconds = os.getloadavg()[0], times(row["length"], max(3, rounds - row["length"] // 2048))
        row["seconds"] = seconds
        for name, values in seconds.items():
            ratios = [a / b for a, b in zip(seconds[EXACT], values, strict=True)]
            summary = {"best": min(values), "median": statistics.median(values)}
            row[name] = summary | {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return rows


def table(rows: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """The tables, and whether what is asked for holds."""
    names = [name for name in rows[0]["memory"] if name != EXACT]
    lines = [
        f"| tokens | exact, ms: median (best) | {' | '.join(f'{name} | times faster' for name in names)} | load |",
        "|---" * (3 + 2 * len(names)) + "|",
    ]
    held = True
    for row in rows:
        if EXACT not in row:
            continue
        cells = [_milliseconds(row[EXACT])]
        for name in names:
            found = row[name]
            cells += [_milliseconds(found), f"**{found['ratio']:.2f}** ({found['lowest']:.2f}–{found['highest']:.2f})"]
            held &= row["length"] < CHEAPER_FROM or found["ratio"] > 1
        lines.append(f"| {row['length']:,} | {' | '.join(cells)} | {row['load']:.1f} |")
    lines += ["", f"| peak memory, MiB | {EXACT} | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for row in rows:
        cells = [f"{row['memory'][n] / 2**20:,.0f}" if n in row["memory"] else "–" for n in (EXACT, *names)]
        lines.append(f"| {row['length']:,} | {' | '.join(cells)} |")
    last = rows[-1]
    quarter = next((row for row in rows if row["length"] * 4 == last["length"]), None)
    if quarter is not None:
        grown = {name: last["memory"][name] / quarter["memory"][name] for name in names}
        held &= max(grown.values()) <= GROWTH
        said = ", ".join(f"{name} {value:.2f}" for name, value in grown.items())
        lines += ["", f"Memory from {quarter['length']:,} to {last['length']:,} tokens grows by: {said}."]
    return lines, held


def _milliseconds(found: dict[str, float]) -> str:
    return f"{found['median'] * 1e3:,.1f} ({found['best'] * 1e3:,.1f})"


def plot(rows: list[dict[str, Any]], path: str) -> None:
    from matplotlib.figure import Figure  # here: processes that measure memory read this file too

    figure = Figure(figsize=(11, 4.5), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2)
    for name in rows[0]["memory"]:
        timed = [row for row in rows if name in row]
        left.plot([r["length"] for r in timed], [r[name]["median"] for r in timed], "o-", label=name)
        held = [row for row in rows if name in row["memory"]]
        right.plot([r["length"] for r in held], [r["memory"][name] / 2**20 for r in held], "o-", label=name)
    for axis, title, unit in ((left, "Time", "seconds"), (right, "Peak memory", "MiB")):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks([row["length"] for row in rows], [f"{row['length']:,}" for row in rows])
        axis.set_xlabel("tokens")
        axis.set_ylabel(unit)
        axis.set_title(f"{title}, forward and backward")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path)


def report(rows: list[dict[str, Any]], lines: list[str], held: bool, where: dict[str, str], out: str) -> None:
    page = [
        "# Attention of long rows on a CPU",
        "",
        "Forward and backward of the core of one layer: 12 heads of 64 features, one row, float32, synthetic queries",
        "and keys that are correlated (`pretrain/approximation/synthetic.py`). MRA-2 at 8 blocks a row, Nyström",
        "attention at 64 landmarks, without and with the convolution of 65 positions, against",
        "`scaled_dot_product_attention`. All in turn in one process, the order changing: medians and best of at least",
        "3, with one thread of the process's own time, else by the clock on the wall; times faster: the median over",
        "the rounds (lowest–highest). Peak memory is what a pass adds in a fresh process to inputs and the output's",
        "gradient. Load: how many processes wanted to run before a row was timed. How far the results are from exact",
        "attention: [approximation.md](approximation.md).",
        f"`python benchmarks/long_attention_cpu.py --threads {where['threads']} --out benchmarks/long_attention_cpu`",
        "",
        f"Asked for: less time than exact attention from {CHEAPER_FROM:,} tokens on, and at most {GROWTH:g} times the",
        f"memory at 32,768 tokens that there is at 8,192: {'held' if held else 'NOT HELD'}.",
        "",
        *bullets(where),
        "",
        *lines,
        "",
        f"![The same as curves]({Path(out).name}.png)",
        "",
    ]
    plot(rows, f"{out}.png")
    Path(f"{out}.md").write_text("\n".join(page))
    Path(f"{out}.json").write_text(json.dumps({"about": where, "lengths": rows}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="to compute with (default: 1)")
    parser.add_argument("--rounds", type=int, default=5, help="at short lengths; fewer at long ones (default: 5)")
    parser.add_argument("--quick", action="store_true", help="short lengths: whether it runs")
    parser.add_argument("--out", metavar="PATH", help="write PATH.md, PATH.json and PATH.png")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lengths, rounds = ((64, 256), 1) if arguments.quick else (LENGTHS, arguments.rounds)
    where = about("torch") | {"threads": str(arguments.threads)}
    rows = measure(lengths, rounds, arguments.threads)
    lines, held = table(rows)
    print("\n".join(lines))
    if arguments.out:
        report(rows, lines, held, where, arguments.out)
    return 0 if held or arguments.quick else 1


if __name__ == "__main__":
    raise SystemExit(main())
