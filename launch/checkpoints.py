"""``farspan checkpoint ls | verify | diff``: what a run has saved, whether it is whole, how two of them differ."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..parallel.parts import Part
from ..pretrain.checkpoint import MANIFEST, Manifest, Reader, diff, whole
from ..pretrain.checkpoint import find as find_one
from ..pretrain.checkpoint.folders import step_of
from ..pretrain.checkpoint.manifest import TOKENIZER
from ..pretrain.checkpoint.tensor_file import CheckedFile, TensorFile
from ..pretrain.conversion.from_huggingface import read_model
from ..pretrain.conversion.imported import logical_shapes
from ..pretrain.conversion.model import model_of
from . import checkpoint_listing
from .checkpoint_listing import find, layout, reason
from .options import positive
from .tables import Progress, shorten, size, some, table

_LS = """\
Of a run: a line for each checkpoint.  Of one checkpoint: its tensors.  Only manifests are read.

  farspan checkpoint ls runs/RUN
  farspan checkpoint ls runs/RUN/checkpoints/step-00001000 --tensors
"""
_VERIFY = """\
Read every byte of a run's latest checkpoint, of all of them, or of one, and compare it with the checksums; see that
the files make up every tensor of the model and the optimizer's state.  Exit code 0: whole; 1: damaged.

  farspan checkpoint verify runs/RUN --all
"""
_DIFF = """\
Compare two checkpoints, saved under any layouts, or one and a Hugging Face folder: configuration, and every tensor, a
portion at a time.  Exit code 0: the same tensors; 1: others.  A relative difference is the largest difference between
two values over the largest magnitude in the tensor.

  farspan checkpoint diff runs/A runs/B --weights-only --tolerance 1e-5
"""
_MOST = 10  # lines of what differs most, and of names


def add_arguments(checkpoint: argparse.ArgumentParser) -> None:
    """The actions of ``farspan checkpoint``."""
    raw = argparse.RawDescriptionHelpFormatter
    actions = checkpoint.add_subparsers(title="actions", metavar="ACTION", required=True)
    place = "run folder, its checkpoints folder, or one checkpoint"

    ls = actions.add_parser("ls", help="what there is", description=_LS, formatter_class=raw)
    ls.add_argument("path", metavar="RUN|CHECKPOINT", type=Path, help=place)
    ls.add_argument("--tensors", action="store_true", help="of one checkpoint: every tensor, not sums by layer")
    ls.add_argument("--json", action="store_true", help="as JSON")
    ls.set_defaults(run=_while_read(checkpoint_listing.run), parser=ls)

    verify = actions.add_parser("verify", help="whether it is whole", description=_VERIFY, formatter_class=raw)
    verify.add_argument("path", metavar="RUN|CHECKPOINT", type=Path, help=place)
    verify.add_argument("--all", action="store_true", help="all checkpoints of a run, not the latest alone")
    verify.add_argument("--jobs", type=positive, metavar="N", help="files read at once (default: cores, 8 at most)")
    verify.set_defaults(run=_while_read(run_verify), parser=verify)

    compare = actions.add_parser("diff", help="how two differ", description=_DIFF, formatter_class=raw)
    compare.add_argument(
        "first", metavar="A", type=Path, help=f"{place}; of a run the latest; or a Hugging Face folder"
    )
    compare.add_argument("second", metavar="B", type=Path, help="as A")
    compare.add_argument("--weights-only", action="store_true", help="leave the optimizer's state out")
    compare.add_argument(
        "--tolerance", type=_tolerance, metavar="R", help="relative difference up to which they are the same "
        "(default: none, they are the same to the bit)",
    )  # fmt: skip
    compare.set_defaults(run=_while_read(run_diff), parser=compare)


def _while_read(action: Callable[[argparse.Namespace], int | None]) -> Callable[[argparse.Namespace], int | None]:
    """The action, which ends without a word where nobody reads on what it prints (``| head``)."""

    def run(args: argparse.Namespace) -> int | None:
        try:
            code = action(args)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
            return 128 + signal.SIGPIPE
        return code

    return run


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up, such as 1e-5")
    return value


# Verifying.


def run_verify(args: argparse.Namespace) -> int:
    """1 where a checkpoint is not whole."""
    root, found = find(args.path)
    if not found:
        raise ValueError(f"{root} has no checkpoint, only what an interrupted save has left")
    chosen = found[:1] if not args.all else sorted(found, key=step_of) if root is not None else found
    jobs = args.jobs or min(os.cpu_count() or 1, 8)
    damaged = 0
    pool = ThreadPoolExecutor(jobs)
    try:
        for folder in chosen:
            problems, said = _verify(folder, pool)
            damaged += bool(problems)
            outcome = f"damaged: {some(problems, 3, '; ')}" if problems else said
            print(f"{folder.name or folder}: {outcome}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return int(damaged > 0)


def _verify(folder: Path, pool: Executor) -> tuple[list[str], str]:
    """What is wrong with a checkpoint; what to say where nothing is."""
    try:
        manifest = Manifest.read(folder)
        shapes = logical_shapes(*model_of(manifest, folder))
    except (ValueError, OSError) as error:
        return [reason(error, folder)], ""

    expected, reading = whole.expected_in_files(manifest), []  # type: dict[str, whole.Contents], list[CheckedFile]

    def check(path: Path, about: Mapping[str, Any], contents: whole.Contents | None) -> str | None:
        try:
            with CheckedFile(path, about) if contents is None else TensorFile(path, about) as file:
                reading.append(file)
                file.verify()
                if isinstance(file, TensorFile) and contents is not None:
                    whole.check_contents(file, contents)
        except (ValueError, OSError) as error:
            return reason(error, folder)
        return None

    futures = [pool.submit(check, folder / name, about, expected[name]) for name, about in manifest.files.items()]
    tokenizer = manifest.tokenizer.items()
    futures += [pool.submit(check, folder / TOKENIZER / name, about, None) for name, about in tokenizer]
    with Progress(folder.name, manifest.bytes) as progress:
        while wait(futures, timeout=0.2).not_done:
            progress.reach(sum(file.bytes_read for file in reading))
    problems = list(whole.tensor_problems(manifest, shapes))
    problems += [problem for future in futures if (problem := future.result()) is not None]
    said = f"whole ({size(manifest.bytes)} in {len(manifest.files)} files, {len(manifest.tensors)} tensors)"
    others = whole.strangers(folder, manifest)
    return problems, said + (f"; not part of it: {some(others, _MOST)}" if others else "")


# Comparing.


def run_diff(args: argparse.Namespace) -> int:
    """1 where tensors differ by more than the tolerance."""
    (first, one), (second, other) = (_open(path) for path in (args.first, args.second))
    print(f"A  {first.folder}\nB  {second.folder}\n")
    for line in _facts(one, other):
        print(line)
    pairs = diff.pairs(first, second, weights_only=args.weights_only)
    differences = []
    with Progress("compared", sum(math.prod(first.shape(name)) for _, name in pairs.common)) as progress:
        for kind, name in pairs.common:
            differences.append(diff.difference(first, second, kind, name))
            progress.reach(progress.done + differences[-1].values)
    for line in _tensors(differences):
        print(line)
    others = list(_only_in_one(pairs))
    if not args.weights_only:
        others += _update_counts(one, other)
    for line in ["", *others] if others else []:
        print(line)
    apart = sum(not one.within(args.tolerance) for one in differences)
    same = "to the bit" if args.tolerance is None else f"within {args.tolerance:g}"
    print()
    if apart or others:
        print(
            f"not the same: {apart} of {len(differences)} tensors are not the same {same}"
            + "; see above" * bool(others)
        )
    else:
        print(f"the same {same}: {len(differences)} tensors")
    return int(bool(apart or others))


class _Folder:
    """A Hugging Face folder, as ``diff`` reads it: the last tensor that was asked for is in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, read_model(folder)
        self._shapes, self._last = self.model.shapes(), ("", torch.empty(0))

    def names(self) -> list[str]:
        return list(self._shapes)

    def kinds(self, name: str) -> tuple[str, ...]:
        return ("weight",)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str, kind: str = "weight") -> torch.dtype:
        return self.model.dtypes[name]

    def read(self, kind: str, name: str, part: Part, into: Tensor) -> None:
        if self._last[0] != name:
            self._last = name, self.model.read(name).contiguous().view(-1)
        into.copy_(self._last[1][part.begin : part.end])  # of all of it, as ``diff`` asks for it


def _open(path: Path) -> tuple[Reader | _Folder, Manifest]:
    if (path / "config.json").is_file() and not (path / MANIFEST).exists():
        folder = _Folder(path)
        return folder, Manifest(step=0, model=folder.model.config.model_dump(), heads=folder.model.heads)
    reader = Reader(find_one(path))
    return reader, reader.manifest


def _facts(first: Manifest, second: Manifest) -> list[str]:
    """What the manifests say, side by side, and the configuration where it differs."""

    def facts(of: Manifest) -> dict[str, str]:
        scale = of.trainer.get("loss_scale")
        return {
            "step": str(of.step),
            "saved with": layout(of.layout),
            "data": str(of.trainer.get("data", "unknown"))[:16],
            "heads": ", ".join(map(str, of.heads)) or "none",
            "loss scale": f"{scale.get('value')}" if isinstance(scale, dict) else "unknown",
            "written by": " ".join(map(str, of.written_by.values())) or "unknown",
        } | {name.replace("_", " "): f"{value}" for name, value in of.metrics.items()}

    a, b = facts(first), facts(second)
    lines = [("", "A", "B")]
    for name in dict.fromkeys([*a, *b]):
        lines.append((name, a.get(name, ""), "the same" if a.get(name) == b.get(name) else b.get(name, "")))
    # One of them may be of weights alone, without the configuration of a run.
    config = [of.config if first.config and second.config else {} for of in (first, second)]
    changed = diff.changed_values(config[0] | {"model": first.model}, config[1] | {"model": second.model})
    lines += [(key, shorten(str(one), 32), shorten(str(other), 32)) for key, (one, other) in changed.items()]
    what = "configuration" if first.config and second.config else "model's configuration"
    return [*table(lines), *([] if changed else [f"{what}: the same"]), ""]


def _tensors(differences: Sequence[diff.Difference]) -> Iterator[str]:
    """What is equal of each kind, where the largest differences are, and what differs most."""
    for kind in dict.fromkeys(one.kind for one in differences):
        of_kind = [one for one in differences if one.kind == kind]
        apart = [one for one in of_kind if not one.bit_equal]
        if not apart:
            yield f"{kind}: {len(of_kind)} tensors, all bit-equal"
            continue
        values, unequal = sum(one.values for one in of_kind), sum(one.unequal for one in of_kind)
        dtypes = {one.dtypes for one in apart if one.dtypes[0] != one.dtypes[1]}
        names = [" and ".join(str(dtype).removeprefix("torch.") for dtype in both) for both in dtypes]
        said = f"{kind}: {len(of_kind)} tensors, {len(of_kind) - len(apart)} bit-equal"
        yield f"{said}; {unequal:,} of {values:,} values differ" + (f" ({', '.join(names)})" if names else "")
        relative, absolute = max(apart, key=lambda one: one.relative), max(apart, key=lambda one: one.absolute)
        yield f"  largest relative difference {relative.relative:.3g} in {relative.name}"
        yield f"  largest absolute difference {absolute.absolute:.3g} in {absolute.name}"
    most = sorted((one for one in differences if not one.bit_equal), key=lambda one: -one.relative)[:_MOST]
    if most:
        lines = [("differs most", "kind", "relative", "absolute", "values that differ")]
        for one in most:
            share = f"{one.unequal:,} of {one.values:,}"
            lines.append((shorten(one.name, 44), one.kind, f"{one.relative:.3g}", f"{one.absolute:.3g}", share))
        yield ""
        yield from table(lines, right={2, 3, 4})


def _only_in_one(pairs: diff.Pairs) -> Iterator[str]:
    for letter, only in (("A", pairs.first_only), ("B", pairs.second_only)):
        for kind in dict.fromkeys(kind for kind, _ in only):
            names = [name for k, name in only if k == kind]
            yield f"only in {letter}: {kind} of {some(names, 1)}"
    for name, (one, other) in list(pairs.shapes.items())[:_MOST]:
        yield f"other shapes: {name} is {list(one)} in A, {list(other)} in B"
    if len(pairs.shapes) > _MOST:
        yield f"and {len(pairs.shapes) - _MOST} more"


def _update_counts(first: Manifest, second: Manifest) -> list[str]:
    """How often tensors were updated, where that differs."""
    changed: dict[tuple[float | None, float | None], list[str]] = {}
    for name in first.tensors.keys() & second.tensors.keys():
        counts = first.tensors[name].step, second.tensors[name].step
        if counts[0] != counts[1]:
            changed.setdefault(counts, []).append(name)
    return [
        f"updates: {'none' if one is None else f'{one:g}'} in A, {'none' if other is None else f'{other:g}'} in B, of "
        f"{some(sorted(names), 1)}"
        for (one, other), names in changed.items()
    ]
