"""A Megatron-BERT checkpoint of 1.3 billion parameters to safetensors: memory and time, beside copying the same bytes.

The checkpoint has random float32 weights in the files that eight ranks of tensor 4 × pipeline 2 would save.  They are
converted by `farspan convert to-hf` in a fresh process, whose peak memory is what the kernel counts (ru_maxrss: code
and mapped files too) and the anonymous part of it, sampled.  The same files are copied by `cp` to the same disk.  Both
sides end when their files are on the disk (fsync), and run in turn, once with the checkpoint in the page cache and once
without.

    python benchmarks/convert.py [--quick] [--scratch FOLDER] [--out benchmarks]

--scratch: an empty or new folder with room for three times the checkpoint, 16 GB; by default one beside the temporary
files.  --quick: a small model, which says nothing of the limits.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Neither torch nor farspan here: a process that is started counts the memory of the one that starts it.

FARSPAN = Path(__file__).resolve().parents[1]
TENSOR, PIPELINE = 4, 2
LARGE = {"num_hidden_layers": 24, "hidden_size": 2048, "num_attention_heads": 32, "intermediate_size": 8192}
LARGE |= {"vocab_size": 50257, "max_position_embeddings": 1024}  # no tensor rank has as many words as another
SMALL = {**LARGE, "num_hidden_layers": 4, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048}
MEMORY, TIMES = 3 * 2**30, 2.0  # what a conversion is held to
STATES = ("in the page cache", "not in the page cache")


# The checkpoint.


def make(folder: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Write it, rank by rank; parameters and the bytes of the largest tensor."""
    import math

    import torch

    from farspan.parallel.mesh import Axis, Mesh, SoloGroup
    from farspan.parallel.state import Local
    from farspan.pretrain import checkpoint as ckpt
    from farspan.pretrain.checkpoint.manifest import merge_entries
    from farspan.pretrain.models import architecture
    from farspan.pretrain.models.base import Stage
    from farspan.pretrain.provenance import written_by

    cls = architecture("megatron-bert")
    config = cls.config_class(**fields)
    one, dtype = SoloGroup(), torch.float32
    files: dict[str, Any] = {}
    entries = []
    folder.mkdir(parents=True)
    for rank in range(TENSOR * PIPELINE):
        stage, axis = rank // TENSOR, Axis(rank % TENSOR, TENSOR, one)
        mesh = Mesh(axis, Axis(stage, PIPELINE, one), Axis(0, 1, one), axis, one, torch.device("meta"))
        with torch.device("meta"):
            model = cls(config, mesh, stage=Stage.of(config, stage, PIPELINE), heads=("lm", "nsp"))
        local = Local.of(model, axis)
        pieces = {
            piece.name: piece.part
            for parameter in local.names
            for piece in local.pieces("weight", parameter, 0, parameter.detach(), copies=True)
        }
        file = f"weights-{rank:05d}.safetensors"
        shapes = {name: (dtype, part.slice_shape) for name, part in pieces.items()}
        torch.manual_seed(rank)
        files[file] = ckpt.write_stream(folder / file, shapes, lambda name: torch.randn(shapes[name][1]) * 0.02)  # noqa: B023
        for name, part in pieces.items():
            shards = {"weight": (ckpt.Shard(file, part),)}
            entries.append({name: ckpt.Entry(part.shape, {"weight": dtype}, shards)})
    tensors = merge_entries(entries)
    layout = {"tensor": TENSOR, "pipeline": PIPELINE, "virtual_stages": 1, "data": 1, "zero_stage": 0}
    ckpt.Manifest(
        step=1, model=config.model_dump(), heads=("lm", "nsp"), tensors=tensors, files=files, layout=layout,
        written_by=written_by(),
    ).write(folder)  # fmt: skip
    sizes = [math.prod(entry.shape) for entry in tensors.values()]
    return {"parameters": sum(sizes), "largest_tensor": max(sizes) * dtype.itemsize}


def check(checkpoint: Path, out: Path) -> int:
    """Compare every value of the export with the checkpoint's; how many there are."""
    import torch
    from safetensors import safe_open

    from farspan.pretrain import checkpoint as ckpt
    from farspan.pretrain.conversion.model import model_of
    from farspan.pretrain.conversion.renaming import rename

    reader = ckpt.Reader(checkpoint)
    cls, config, heads = model_of(reader.manifest)
    keys = cls.huggingface_keys(config, heads)
    files = [safe_open(path, "pt") for path in sorted(out.glob("*.safetensors"))]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)
    values = 0
    for name in reader.names():
        for key, value in rename({name: reader.tensor(name)}, keys).items():
            if not torch.equal(where[key].get_tensor(key), value):
                raise SystemExit(f"{key} is not what the checkpoint has: nothing was measured")
            values += value.numel()
            del where[key]
    if where:
        raise SystemExit(f"the export has {sorted(where)} which the checkpoint does not have: nothing was measured")
    return values


# Measuring.


def prepare(files: list[Path], state: str) -> None:
    """The files in the page cache, or not; nothing left to be written."""
    os.sync()
    for path in files:
        with path.open("rb", buffering=0) as file:
            if state == STATES[0]:
                while file.read(2**24):
                    pass
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def convert(checkpoint: Path, out: Path) -> dict[str, float]:
    """Seconds, and peaks of memory in bytes, of a fresh process."""
    command = [sys.executable, "-P", "-m", "farspan.launch.cli", "convert", "to-hf", str(checkpoint), str(out)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    anonymous = 0
    while True:
        found, status, usage = os.wait4(process.pid, os.WNOHANG)
        if found:
            break
        anonymous = max(anonymous, rss_anonymous(process.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the conversion ended with {process.returncode}")
    processor = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "peak": usage.ru_maxrss * 1024, "anonymous": anonymous, "processor": processor}


def rss_anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def copy(files: list[Path], out: Path) -> dict[str, float]:
    """Seconds of cp, until all is on the disk."""
    out.mkdir()
    began = time.perf_counter()
    subprocess.run(["cp", *map(str, files), str(out)], check=True)
    for path in (*sorted(out.iterdir()), out):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return {"seconds": time.perf_counter() - began}


def measure(scratch: Path, fields: dict[str, Any], rounds: int) -> dict[str, Any]:
    checkpoint, out = scratch / "checkpoint", scratch / "out"
    results = run_here("--make", checkpoint, fields)
    files = sorted(checkpoint.glob("*.safetensors"))
    results |= {"bytes": sum(path.stat().st_size for path in files), "load_before": os.getloadavg()[0], "states": []}
    convert(checkpoint, out)
    results["compared"] = run_here("--check", checkpoint, str(out))
    shutil.rmtree(out)
    for state in STATES:
        sides: dict[str, list[dict[str, float]]] = {"convert": [], "copy": []}
        for number in range(rounds):
            for side in list(sides)[:: -1 if number % 2 else 1]:
                prepare(files, state)
                sides[side].append(convert(checkpoint, out) if side == "convert" else copy(files, out))
                shutil.rmtree(out)
            last = {side: f"{found[-1]['seconds']:.1f} s" for side, found in sides.items()}
            print(f"  {state}, {number + 1} of {rounds}: {last}", file=sys.stderr, flush=True)
        seconds = {side: [found["seconds"] for found in of_side] for side, of_side in sides.items()}
        ratios = [a / b for a, b in zip(seconds["convert"], seconds["copy"], strict=True)]
        results["states"].append(
            {"state": state, "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
            | {f"{side}_seconds": statistics.median(values) for side, values in seconds.items()}
            | {"processor": statistics.median(found["processor"] for found in sides["convert"])}
            | {name: max(found[name] for found in sides["convert"]) for name in ("peak", "anonymous")}
        )
    results["peak"] = max(row["peak"] for row in results["states"])
    results["held"] = results["peak"] < MEMORY and all(row["ratio"] <= TIMES for row in results["states"])
    return results


def run_here(what: str, folder: Path, argument: Any) -> Any:
    """``make`` or ``check`` in a process of its own."""
    command = [sys.executable, "-P", __file__, what, str(folder), json.dumps(argument)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


# The page.


def page(results: dict[str, Any], about: list[str], quick: bool) -> str:
    gib, head = 2**30, []
    if quick:
        head = ["A small model, to try the script: it says nothing of the limits.", ""]
    held = "held" if results["held"] else "not held"
    rows = [
        f"| {row['state']} | {row['convert_seconds']:.1f} | {row['copy_seconds']:.1f} | **{row['ratio']:.2f}** "
        f"({row['lowest']:.2f}, {row['highest']:.2f}) | {row['processor']:.1f} | **{row['peak'] / gib:.2f}** | "
        f"{row['anonymous'] / gib:.2f} |"
        for row in results["states"]
    ]
    return "\n".join(
        [
            "# Converting a checkpoint of 1.3 billion parameters to safetensors",
            "",
            *head,
            f"Megatron-BERT, {results['parameters']:,} random float32 parameters, {results['bytes'] / 1e9:.2f} GB in "
            f"the files of tensor {TENSOR} ×",
            f"pipeline {PIPELINE} ranks; the largest tensor has {results['largest_tensor'] / 1e6:.0f} MB. "
            "`farspan convert to-hf` in a fresh process, which reads with",
            "checksums, against `cp` of the same files to the same disk, both until all is on the disk (fsync). The",
            "sides in turn, medians of seconds and of the ratio of a turn; the highest peaks of memory. All "
            f"{results['compared']:,}",
            "values were compared with the checkpoint's before anything was timed.",
            "`python benchmarks/convert.py`",
            "",
            f"Limits: {MEMORY // gib} GiB of memory, {TIMES:.0f} times the copy: {held}.",
            "",
            *about,
            f"- load of the machine before: {results['load_before']:.1f}",
            "",
            "| the checkpoint | convert, s | copy, s | ratio (lowest, highest) | processor, s | peak memory, GiB "
            "| of that anonymous |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, one turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of the two sides (default: 3)")
    parser.add_argument("--scratch", type=Path, help="where checkpoint, export and copy are made, and removed")
    parser.add_argument("--out", type=Path, help="folder for convert.md and convert.json")
    args = parser.parse_args()
    fields, rounds = (SMALL, 1) if args.quick else (LARGE, args.rounds)
    if args.scratch is not None:
        args.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        results = measure(Path(scratch), fields, rounds)
    from farspan.benchmarks.about import about, bullets

    results |= {"model": fields, "about": about("torch", "safetensors")}
    text = page(results, bullets(results["about"]), args.quick)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "convert.md").write_text(text, encoding="utf-8")
        (args.out / "convert.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0 if results["held"] else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        print(json.dumps(make(Path(sys.argv[2]), json.loads(sys.argv[3]))))
    elif sys.argv[1:2] == ["--check"]:
        print(json.dumps(check(Path(sys.argv[2]), Path(json.loads(sys.argv[3])))))
    else:
        sys.exit(main())
