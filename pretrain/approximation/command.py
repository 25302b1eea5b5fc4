"""``farspan bench approximation``: its options, and what is measured where."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .captured import TrainedModel
    from .measure import Inputs

DESCRIPTION = """\
How far MRA-2, MRA-2-s (without block means) and Nyström attention are from exact softmax attention, by budget and
length, with the time and memory of each beside it: approximation.md, .json and .png.

Error: the Frobenius norm of the difference from the exact output over the norm of the exact output, of every head of
every layer and row by itself, then their mean.  Attention alone: Nyströmformer's convolution is left out.

With MODEL the queries, keys and values are those of its layers on the text of --input; without, those of a synthetic
model whose tokens attend to their neighbours and to others of their topic.
"""
LENGTHS, BLOCKS, LANDMARKS = [512, 1024, 2048, 4096], [1, 2, 4, 8, 16], [32, 64, 128]
HEADS, HEAD_SIZE = 12, 64  # of the synthetic model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line of ``farspan bench approximation``."""
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", nargs="?", metavar="MODEL", help="checkpoint, run folder or Hugging Face folder")
    parser.add_argument("--input", nargs="+", metavar="TEXT", help="files or quoted globs of text for MODEL")
    for name, default, what in (
        ("lengths", None, f"tokens a row (default: {_joined(LENGTHS)}, with MODEL as far as it goes)"),
        ("blocks", BLOCKS, f"MRA's exact blocks for each row of blocks (default: {_joined(BLOCKS)})"),
        ("landmarks", LANDMARKS, f"of Nyström attention (default: {_joined(LANDMARKS)})"),
    ):
        parser.add_argument(f"--{name}", type=_numbers, default=default, metavar="N,N,...", help=what)
    parser.add_argument(
        "--share", type=float, default=0.125, help="of all blocks, MRA's budget at every length too (default: 0.125)"
    )
    parser.add_argument("--rows", type=int, default=4, help="rows that errors are the mean of (default: 4)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="of time, the median is shown; 0: errors alone (default: 3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic model (default: 0)")
    parser.add_argument("--threads", type=int, help="threads to compute with (default: as torch finds it)")
    parser.add_argument("--out", type=Path, default=Path("approximation"), help="folder (default: approximation)")
    parser.add_argument("--replace", action="store_true", help="replace the results that are in the folder")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError, in one line, for what cannot be measured."""
    _check(args)
    from .report import FILES, lines_of, write

    existing = [args.out / name for name in FILES if (args.out / name).exists()]
    if existing and not args.replace:
        raise ValueError(f"{existing[0]} is there already: give another folder with --out, or --replace")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"{args.out} is a file: give a folder with --out")
    results = measure(args)
    print("\n".join(lines_of(results)))
    note = write(results, args.out)
    print(f"farspan: wrote {args.out}" + (f"; {note}" if note else ""), file=sys.stderr)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as it stands in approximation.json."""
    import torch

    from .measure import in_turn, medians, peak_memory
    from .methods import AUTHORS, fixed_share, methods

    model = None
    if args.model is not None:
        from .captured import TrainedModel

        model = TrainedModel(args.model)
    if args.threads:
        torch.set_num_threads(args.threads)
    lengths = _lengths(args.lengths, model)
    results: dict[str, Any] = {"about": _about(model, args), "share": args.share, "points": []}
    for length in lengths:
        all_methods = methods(length, args.blocks, args.landmarks, args.share)
        errors, inputs = _errors(all_methods, args, model, length)
        costs: dict[Any, Any] = {}
        memory: dict[Any, int] = {}
        if args.rounds:
            named = {method: method for method in all_methods}
            costs = medians(in_turn(named, inputs, args.rounds))
            memory = peak_memory(named, inputs, torch.get_num_threads())
        for method in all_methods:
            forward, both = costs.get(method, (None, None))
            results["points"].append(
                {
                    "length": length, "method": method.kind, "budget": method.budget, "share": method.share(length),
                    "at_fixed_share": method.budget == fixed_share(length, args.share), "error": errors[method],
                    "authors_error": AUTHORS.get((method.kind, length, method.budget)), "forward_seconds": forward,
                    "forward_and_backward_seconds": both, "peak_memory_bytes": memory.get(method),
                }
            )  # fmt: skip
        print(f"  length {length}: done", file=sys.stderr, flush=True)
    return results


def _errors(
    all_methods: list[Any], args: argparse.Namespace, model: TrainedModel | None, length: int
) -> tuple[dict[Any, float], Inputs]:
    """The mean error of every method, and the inputs [1, heads, length, d] that time and memory are measured with."""
    import torch

    from .methods import relative_errors
    from .synthetic import synthetic_qkv

    found: dict[Any, list[torch.Tensor]] = {method: [] for method in all_methods}
    rows = None if model is None else model.rows(args.input, length, args.rows)
    for row in range(args.rows if rows is None else len(rows)):
        if model is None or rows is None:
            layers = [synthetic_qkv(1, HEADS, length, HEAD_SIZE, args.seed * args.rows + row)]
        else:
            layers = model.layers(rows[row])
        for inputs in layers:
            with torch.no_grad():
                exact = all_methods[0](*inputs)
                for method, kept in found.items():
                    kept.append(relative_errors(method(*inputs), exact))
    return {method: torch.cat(kept).mean().item() for method, kept in found.items()}, layers[len(layers) // 2]


def _check(args: argparse.Namespace) -> None:
    if args.model is not None and not args.input:
        raise ValueError("a model is measured on text: name files with --input")
    if args.model is None and args.input:
        raise ValueError("--input is text for a model: name the model, or leave --input out")
    if not 0 < args.share <= 1:
        raise ValueError(f"--share {args.share:g} of all blocks: set it above 0 and at most 1")
    if args.rows < 1:
        raise ValueError(f"--rows {args.rows}: set 1 or more")
    if args.rounds < 0:
        raise ValueError(f"--rounds {args.rounds}: set 1 or more, or 0 for errors alone")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads {args.threads}: set 1 or more")


def _lengths(given: list[int] | None, model: TrainedModel | None) -> list[int]:
    if model is None:
        return given or LENGTHS
    if given is None:
        return [length for length in LENGTHS if length <= model.longest] or [model.longest]
    if max(given) > model.longest:
        raise ValueError(f"--lengths {max(given)}: this model has positions for {model.longest}")
    return given


def _about(model: TrainedModel | None, args: argparse.Namespace) -> dict[str, str]:
    """Where the numbers come from."""
    import torch

    from ..bench.about import about

    what = f"synthetic, {HEADS} heads of {HEAD_SIZE}, seed {args.seed}" if model is None else model.name
    return {
        "queries, keys and values": what,
        "rows of each length": str(args.rows) if model is None else f"up to {args.rows}",
        **about(torch.device("cpu")),
    }


def _joined(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers from 1 up, such as 512,1024")
    return sorted({int(part) for part in parts})
