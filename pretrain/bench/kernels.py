"""``farspan bench kernels``: its options, and what is measured where."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .kernel_cases import Case

DESCRIPTION = """\
What the fused operations cost, each compared with float64 first.

On a GPU: times by events, share of the byte or FLOP floor, launches, peak memory, beside the peers that are installed
(torch, torch.compile, apex, transformers 4.37's MRA kernels and FFT, FlashFFTConv), against the targets for one H200:
kernels.md and .json.  Each operation runs in a process of its own.

On a CPU: the reference in PyTorch, the compiled form in C++ where there is one, and torch's own operation, in turn:
kernels_cpu.md and .json, and a kernels.md that says "not measured" where there is none.
"""
PACKAGES = ("triton", "transformers", "apex", "flashfftconv")
SECONDS = 4.0  # of an operation on a CPU
PASS_SECONDS = 0.25  # of a pass on a GPU
LIMIT = 300.0  # seconds without a word from an operation's process; torch.compile and peers build there


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line of ``farspan bench kernels``."""
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--operations", metavar="A,B,...", help="such as layer_norm,mra (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    parser.add_argument("--threads", type=int, help="threads on a CPU (default: as torch finds it)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; no targets")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder (default: bench)")
    parser.add_argument("--replace", action="store_true", help="replace the results that are in the folder")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError, in one line, for what cannot be measured."""
    import torch

    from .about import about
    from .kernel_list import cases
    from .kernel_page import CPU_PAGE, GPU_PAGE, cpu_lines, gpu_lines

    device = device_of(args.device)
    chosen = _chosen(cases(device.type, quick=args.quick), args.operations)
    page = GPU_PAGE if device.type == "cuda" else CPU_PAGE
    check_out(args.out, [page], args.replace)
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads {args.threads}: set 1 or more")
    if args.threads:
        torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"about": about(device, *PACKAGES), **_measured(chosen, device, args.quick)}
    lines = gpu_lines(results, chosen) if device.type == "cuda" else cpu_lines(results)
    print("\n".join(lines))
    write(args.out, page, lines, results)
    if device.type == "cpu" and not args.quick and not _has_rows(args.out / f"{GPU_PAGE}.json"):
        nothing: dict[str, Any] = {"about": {}, "rows": []}
        write(args.out, GPU_PAGE, gpu_lines(nothing, cases("cuda")), nothing)
    print(f"farspan: wrote {args.out}", file=sys.stderr)


def _measured(chosen: Sequence[Case], device: torch.device, quick: bool) -> dict[str, Any]:
    from ...kernels import forms
    from ...parallel.memory import keep_freed_memory
    from .kernel_measure import ceilings_apart, measure, measure_apart

    rows, found = [], {}
    # Built here, so that a row's process need not.
    operations = dict.fromkeys(case.operation for case in chosen)
    forms.prepare(operations, device)
    print(f"  {forms.describe(operations, device)}", file=sys.stderr, flush=True)
    if device.type == "cuda":
        seconds = 0.02 if quick else PASS_SECONDS
        found["ceilings"] = ceilings_apart(device, seconds)
    else:
        keep_freed_memory()
    for case in chosen:
        if device.type == "cuda":
            row = measure_apart(case.name, device, seconds, quick, LIMIT)
        else:
            row = measure(case, device, 0.05 if quick else SECONDS)
        rows.append(row)
        print(f"  {_in_short(row)}", file=sys.stderr, flush=True)
    return {**found, "rows": rows}


def _has_rows(path: Path) -> bool:
    from ..files import read_mapping

    return path.exists() and bool(read_mapping(path, "a folder of results").get("rows"))


def _in_short(row: dict[str, Any]) -> str:
    name = f"{row['title']}, {row['shape']}"
    if "failed" in row:
        return f"{name}: failed: {row['failed']}"
    check = row["check"]
    error = max(check["errors"].items(), key=lambda item: item[1])
    return f"{name}: {'right' if check['right'] else 'WRONG'}, largest error {error[1]:.1e} in {error[0]}"


def _chosen(known: list[Case], operations: str | None) -> list[Case]:
    if operations is None:
        return known
    names = operations.split(",")
    allowed = dict.fromkeys(case.operation for case in known)
    if unknown := [name for name in names if name not in allowed]:
        raise ValueError(f"--operations {unknown[0]}: choose from {', '.join(allowed)}")
    return [case for case in known if case.operation in names]


def device_of(name: str | None) -> torch.device:
    """The device that is asked for, or the best there is; ValueError where it is not there."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; leave it out to measure the CPU")
    return torch.device("cuda", 0) if name != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def check_out(out: Path, pages: Sequence[str], replace: bool) -> None:
    """ValueError: results are in the folder already, or it is none."""
    existing = [path for page in pages for end in ("md", "json") if (path := out / f"{page}.{end}").exists()]
    if existing and not replace:
        raise ValueError(f"{existing[0]} is there already: give another folder with --out, or --replace")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder with --out")


def write(out: Path, page: str, lines: Sequence[str], results: dict[str, Any]) -> None:
    """Write the page and the numbers beside it, each whole."""
    from ..files import parents_of, write_json, write_text

    with parents_of(out / page):
        write_text(out / f"{page}.md", "\n".join(lines) + "\n")
        write_json(out / f"{page}.json", results)
