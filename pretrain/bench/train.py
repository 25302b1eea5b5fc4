"""``farspan bench train``: its options, and what is measured in which order."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .kernels import check_out, device_of, write

if TYPE_CHECKING:
    import torch

    from .train_models import Dropout, Setup

DESCRIPTION = """\
What a training step of the five architectures costs on this device: tokens/s, step time, model FLOPs utilization (MFU)
and peak memory, beside transformers in the same run: train.md and .json.

On a GPU in bfloat16: base and large size at 512, 4,096 and 32,768 tokens.  On a CPU in float32: base size at 512.
A page keeps what it has of the other device, and with --keep what it has of this one.
"""
LENGTHS = {"cuda": [512, 4096, 32768], "cpu": [512]}
MODELS = {"cuda": ["large", "base"], "cpu": ["base"]}
STEPS = {"cuda": 10, "cpu": 3}
PACKAGES = ("deepspeed", "megatron-core", "transformers", "flash-attn")
NEEDED = {"deepspeed": "deepspeed", "megatron": "megatron-core", "pydantic": "pydantic"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line of ``farspan bench train``."""
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--architectures", metavar="A,B,...", help="such as mega,mra (default: all five)")
    parser.add_argument("--sizes", metavar="A,B,...", help="of tiny, base, large (default: as above)")
    parser.add_argument("--lengths", metavar="N,N,...", help="tokens a row (default: as above)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    parser.add_argument(
        "--rows", type=int, metavar="N", help="rows a step (default: as many as fit, 65,536 tokens at most)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="steps to time (default: 10 on a GPU, 3 on a CPU)")
    parser.add_argument("--dropout", type=float, default=0.1, help="of hidden states (default: 0.1)")
    parser.add_argument("--attention-dropout", type=float, default=0.0, help="of attention's weights (default: 0)")
    parser.add_argument("--minutes", type=float, metavar="N", help="begin nothing new after so many")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument(
        "--profile", action="store_true", help="a step's TensorBoard trace and longest operations of each"
    )
    parser.add_argument("--threads", type=int, help="threads on a CPU (default: as torch finds it)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder (default: bench)")
    parser.add_argument("--replace", action="store_true", help="replace the results that are in the folder")
    parser.add_argument("--keep", action="store_true", help="measure only what the results in the folder do not have")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError, in one line, for what cannot be measured."""
    _require_packages()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # megatron-core takes a GPU that it sees
    import torch

    from ...kernels import forms
    from .about import about
    from .train_page import PAGE, lines_of

    device = device_of(args.device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("farspan bench train measures one device: start it without a launcher")
    check_out(args.out, [PAGE], args.replace or args.keep)
    for name in ("rows", "steps", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: set 1 or more")
    setups, _ = chosen(args, device.type), dropout_of(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    results = _earlier(args.out / f"{PAGE}.json")
    section: dict[str, Any] = {"about": about(device, *PACKAGES), "rows": []}
    section["about"]["dropout"] = str(dropout_of(args))
    forms.prepare(forms.OPERATIONS, device)
    section["about"]["kernels"] = forms.describe(forms.OPERATIONS, device)
    if args.keep and device.type in results:
        section["rows"] = results[device.type]["rows"]
    results[device.type] = section
    try:
        for row in _rows(args, setups, device, section["rows"]):
            section["rows"] = [*section["rows"], row]
            write(args.out, PAGE, lines_of(results), results)  # what is measured stays, whatever happens next
    finally:
        section["rows"].sort(key=_order)
    lines = lines_of(results)
    print("\n".join(lines))
    write(args.out, PAGE, lines, results)
    print(f"farspan: wrote {args.out}", file=sys.stderr)


def _rows(args: argparse.Namespace, setups: list[Setup], device: torch.device, earlier: list[dict[str, Any]]) -> Any:
    from ...parallel.memory import keep_freed_memory
    from .train_measure import measure
    from .train_sides import one_rank

    began, have = time.monotonic(), {_key(row) for row in earlier}
    if device.type == "cpu":
        keep_freed_memory()
    with one_rank(device) as mesh:
        for setup in setups:
            if (setup.architecture, setup.size, setup.length) in have:
                continue
            if args.minutes is not None and time.monotonic() - began > 60 * args.minutes:
                print(f"  {setup.name}: not begun, --minutes {args.minutes:g} are over", file=sys.stderr)
                continue
            row = measure(
                setup, mesh, rows=args.rows, steps=args.steps or (1 if args.quick else STEPS[device.type]),
                dropout=dropout_of(args), beside=not args.alone, profile=args.out / "traces" if args.profile else None,
            )  # fmt: skip
            print(f"  {_in_short(setup, row)}", file=sys.stderr, flush=True)
            yield row


def chosen(args: argparse.Namespace, device: str) -> list[Setup]:
    """What is asked for, the gate's models first.  ValueError for what there is not."""
    from ..models import ARCHITECTURES
    from .train_models import SIZES, Setup
    from .train_page import GATES

    architectures = _among("architectures", args.architectures, sorted(ARCHITECTURES), sorted(ARCHITECTURES))
    sizes = _among("sizes", args.sizes, list(SIZES), ["tiny"] if args.quick else MODELS[device])
    lengths = [64] if args.quick else LENGTHS[device]
    if args.lengths is not None:
        if not all(part.isascii() and part.isdigit() and int(part) for part in args.lengths.split(",")):
            raise ValueError(f"--lengths {args.lengths}: give numbers from 1 up, such as 512,4096")
        lengths = sorted({int(part) for part in args.lengths.split(",")})
    setups = [Setup(name, size, length) for length in lengths for size in sizes for name in architectures]
    return sorted(setups, key=lambda setup: setup not in GATES)


def dropout_of(args: argparse.Namespace) -> Dropout:
    """ValueError: a share that is none."""
    from .train_models import Dropout

    for name, value in (("dropout", args.dropout), ("attention-dropout", args.attention_dropout)):
        if not 0 <= value < 1:
            raise ValueError(f"--{name} {value:g}: set 0 or more, and less than 1")
    return Dropout(args.dropout, args.attention_dropout)


def _among(name: str, given: str | None, known: list[str], default: list[str]) -> list[str]:
    if given is None:
        return default
    names = given.split(",")
    if unknown := [part for part in names if part not in known]:
        raise ValueError(f"--{name} {unknown[0]}: choose from {', '.join(known)}")
    return names


def _require_packages() -> None:
    """ValueError: what a training step needs is not installed."""
    import importlib.util

    if missing := [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]:
        raise ValueError(
            f"a training step needs {' and '.join(missing)}, not installed here: pip install {' '.join(missing)}"
        )


def _earlier(path: Path) -> dict[str, Any]:
    from ..files import read_mapping

    return read_mapping(path, "a folder of results") if path.exists() else {}


def _key(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["architecture"], row["size"], row["length"]


def _order(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["architecture"], {"tiny": 0, "base": 1, "large": 2}[row["size"]], row["length"]


def _in_short(setup: Setup, row: dict[str, Any]) -> str:
    sides = ("farspan", "transformers")
    shown = [
        f"{s} {row[s].get('why') or format(row[s]['tokens_per_second'], ',.0f') + ' tokens/s'}"
        for s in sides
        if s in row
    ]
    return f"{setup.name}: {'; '.join(shown)}"
