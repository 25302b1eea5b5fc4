"""``farspan kernels build | list``: compile ahead, for a cluster's shared file system, and see what is there."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..kernels import cache, forms, toolchain
from ..kernels.toolchain import BuildError, Target

BUILD = """\
Compile kernels ahead of a run, on a machine that needs no GPU:

  farspan kernels build --cache /shared/farspan-kernels --capability 8.0 9.0
  export FARSPAN_KERNEL_CACHE=/shared/farspan-kernels        (or kernels.cache in the configuration)

What is there already is left.  Forms for a CPU are for processors like this machine's; others build their own.
"""


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--operations", nargs="+", choices=sorted(forms.OPERATIONS), metavar="NAME", help="only these (default: all)"
    )
    parser.add_argument(
        "--capability", nargs="+", type=_capability, metavar="X.Y",
        help="compute capabilities of the GPUs (default: of those here; without one 8.0 and 9.0 where there is nvcc)",
    )  # fmt: skip
    parser.add_argument("--device", nargs="+", choices=("cuda", "cpu"), help="forms for these (default: both)")
    _add_cache_argument(parser)
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="of each (default: 600)")


def add_list_arguments(parser: argparse.ArgumentParser) -> None:
    _add_cache_argument(parser)
    parser.add_argument(
        "--remove-unused", action="store_true",
        help="remove damaged libraries and those of other versions, compilers or processors than this environment's",
    )  # fmt: skip


def _add_cache_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", metavar="DIR", help=f"instead of {cache.VARIABLE} or ~/.cache/farspan/kernels")


def build(args: argparse.Namespace) -> int:
    """1 where something could not be built."""
    root, failed = _root(args), False
    targets, notes = _targets(args.device or ("cuda", "cpu"), args.capability)
    for note in notes:
        print(note)
    if not targets:
        raise ValueError("nothing can be built here: see `farspan doctor`")
    wanted = [
        (name, sources, target)
        for name in args.operations or forms.OPERATIONS
        for target in targets
        if (sources := forms.OPERATIONS[name].sources(target.kind))
    ]

    def make(one: tuple[str, list[Path], Target]) -> cache.Built | BuildError:
        try:
            return cache.library(*one, root, args.timeout)
        except BuildError as error:
            return error

    with ThreadPoolExecutor(toolchain.jobs()) as pool:
        for (name, _, target), result in zip(wanted, pool.map(make, wanted), strict=True):
            if isinstance(result, BuildError):
                failed, said = True, "\n".join(filter(None, (str(result), result.output)))
            else:
                said = f"built in {result.seconds:.1f} s" if result.seconds else "there already"
            print(f"{name}, {target}: {said}", flush=True)
    print(f"in {root}")
    return int(failed)


def show(args: argparse.Namespace) -> None:
    root = _root(args)
    found = cache.contents(root)
    if not found:
        print(f"{root} has no kernels: they are built on first use, or by `farspan kernels build`")
        return
    for entry in found:
        folder = entry if isinstance(entry, Path) else entry.folder
        in_use = isinstance(entry, cache.Built) and _is_in_use(entry)
        said = _describe(entry, in_use=in_use)
        if args.remove_unused and not in_use:
            shutil.rmtree(folder)
            said += ": removed"
        print(said)
    print(f"in {root}")


def _describe(entry: cache.Built | Path, *, in_use: bool) -> str:
    if isinstance(entry, Path):
        return f"{entry.name}: damaged, built anew when it is used"
    record = json.loads((entry.folder / "build.json").read_text())
    size, made = entry.path.stat().st_size, time.localtime(entry.path.stat().st_mtime)
    state = "in use" if in_use else "of other sources, versions or machines"
    return (
        f"{entry.operation}, {entry.target}: {state}, {size / 1024:.0f} KiB, {time.strftime('%Y-%m-%d %H:%M', made)}, "
        f"built in {record['seconds']} s by {entry.compiler}, torch {record['torch']}"
    )


def _is_in_use(entry: cache.Built) -> bool:
    """Whether a run here would take it; where there is no compiler for it, whether it might."""
    operation = forms.OPERATIONS.get(entry.operation)
    if operation is None or not (sources := operation.sources(entry.target.kind)):
        return False
    try:
        return entry.folder.name == cache.name_of(entry.operation, sources, entry.target)
    except BuildError:
        return entry.folder.name.startswith(cache.prefix_of(entry.operation, sources, entry.target))


def _targets(kinds: Sequence[str], capabilities: list[tuple[int, int]] | None) -> tuple[list[Target], list[str]]:
    """What to build for, and why something is left out."""
    targets, notes = [], []
    for kind in kinds:
        try:
            if kind == "cpu":
                found = [Target.host("cpu")]
            else:
                devices = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
                found = [Target.cuda(c) for c in capabilities or sorted(devices) or [(8, 0), (9, 0)]]
            toolchain.compiler(found[0])
            targets += found
        except BuildError as error:
            if kind == "cuda" and capabilities:
                raise ValueError(str(error)) from error
            notes.append(f"{kind}: left out: {error}")
    return targets, notes


def _root(args: argparse.Namespace) -> Path:
    return Path(args.cache).expanduser() if args.cache else forms.cache_folder()


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no compute capability such as 9.0")
    return int(major), int(minor)
