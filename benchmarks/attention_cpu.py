"""Attention over packed documents on a CPU: the dense form under a mask against documents in groups.

Forward and backward of ``kernels.attention`` in float32, 12 heads of 64 features, q, k and v views of one tensor, full
rows of documents whose lengths are exponentially distributed.  The two forms run in turn in one process; times are
medians, with one thread of the process's own time (what else runs on the machine counts for little), else by the clock
on the wall.  The last columns are what the rule of ``kernels.documents`` expects and what it picks.

    python benchmarks/attention_cpu.py [--threads 1 2] [--pairs 5] [--out benchmarks/attention_cpu]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from farspan.benchmarks.about import about, bullets
from farspan.kernels.attention import attention
from farspan.kernels.documents import Documents, Form
from farspan.kernels.dropout import DropoutKey

HEADS, SIZE = 12, 64
SHAPES = ((8, 128), (8, 512), (2, 2048))  # rows, length; fewer long rows: dense weights under dropout fill the memory
MEAN_LENGTHS = (25, 100, 400)
FORMS: tuple[Form, Form] = ("dense", "grouped")
COLUMNS = (
    "threads", "rows", "length", "mean", "dropout", "documents", "dense", "grouped", "ratio", "lowest", "highest",
    "expected", "picks",
)  # fmt: skip


def packed(rows: int, length: int, mean: int) -> Tensor:
    """Document numbers [rows, length] of rows cut full from a stream of documents."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(rows, length, dtype=torch.int64)
    for row in ids:
        at, document = 0, 0
        while at < length:
            n = int(torch.empty(()).exponential_(1 / mean, generator=generator)) + 1
            document += 1
            row[at : at + n] = document
            at += n
    return ids


def compare(rows: int, length: int, mean: int, p: float, pairs: int) -> dict[str, float | str]:
    """One line of the table: milliseconds of a forward and backward pass."""
    ids = packed(rows, length, mean)
    index = torch.arange(length)
    qkv = torch.randn(length, rows, 3, HEADS, SIZE, requires_grad=True)
    upstream = torch.randn(length, rows, HEADS, SIZE)
    heads = torch.arange(HEADS).view(-1, 1, 1) << 32
    keys = DropoutKey(1, 1, torch.arange(rows)).rows(2, heads + index.unsqueeze(1))

    def step(form: Form) -> Callable[[], None]:
        documents = Documents.of(ids, index.expand(rows, length), "document", causal=False, form=form)

        def run() -> None:
            qkv.grad = None
            q, k, v = qkv.unbind(2)
            attention(q, k, v, documents, p=p, keys=keys if p else None).backward(upstream)

        return run

    times = in_turn([step(form) for form in FORMS], pairs)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    rule = Documents.of(ids, index.expand(rows, length), "document", causal=False)
    assert rule.stretches is not None
    dense, grouped = rule.costs(HEADS * SIZE)
    return {
        "rows": rows, "length": length, "mean": mean, "dropout": p, "documents": len(rule.stretches.lengths),
        "dense": 1e3 * statistics.median(times[0]), "grouped": 1e3 * statistics.median(times[1]),
        "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
        "expected": dense / grouped, "picks": rule.form(qkv[:, :, 0], explicit=p > 0),
    }  # fmt: skip


def in_turn(steps: list[Callable[[], None]], pairs: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in steps]
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for i in range(pairs + 1):
        for kept, step in zip(times, steps, strict=True):
            began = clock()
            step()
            if i:  # the first warms up
                kept.append(clock() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pairs", type=int, default=5, help="measured passes of each form")
    parser.add_argument("--out", help="write the page to OUT.md")
    arguments = parser.parse_args()
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    print(*lines, sep="\n")
    for threads, (rows, length), p, mean in itertools.product(arguments.threads, SHAPES, (0.0, 0.1), MEAN_LENGTHS):
        torch.set_num_threads(threads)
        line = {"threads": threads, **compare(rows, length, mean, p, arguments.pairs)}
        cells = (f"{x:.3g}" if isinstance(x, float) else str(x) for x in (line[name] for name in COLUMNS))
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if arguments.out:
        Path(f"{arguments.out}.md").write_text(page(lines, arguments.pairs, arguments.threads))


def page(table: list[str], pairs: int, threads: list[int]) -> str:
    lines = [
        "# Attention over packed documents on a CPU: a mask against groups",
        "",
        f"`python benchmarks/attention_cpu.py --threads {' '.join(map(str, threads))} --pairs {pairs}`",
        "",
        f"Forward and backward of one attention, float32, {HEADS} heads of {SIZE} features, rows full of documents of",
        "exponentially distributed lengths (`mean` tokens, cut at the end of a row). `dense`, `grouped`: milliseconds,",
        "medians of runs in turn, with one thread of processor time, with more by the wall clock; `ratio`: dense over",
        "grouped, median over the pairs, with the lowest and the highest; `expected`: the same by the rule in",
        "`kernels/documents.py`; `picks`: the form that the rule picks.",
        "",
        *bullets(about("torch")),
        "",
        *table,
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
