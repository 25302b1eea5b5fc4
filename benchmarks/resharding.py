"""Resumed under another layout, measured: every step after it against the run that was never stopped.

For every architecture a tiny run of 40 steps: saved at step 20 under six layouts, resumed from each under six others.
Loss and gradient norm of steps 21 to 40, and weights and optimizer moments after them, are compared with those of an
uninterrupted run on one rank; resumed under the layout that saved it, a run must be that layout's uninterrupted one to
the bit.  Dropout 0.1, real text, batch size and learning rate change on the way; an evaluation at the save.  Up to four
ranks on a CPU.  In bfloat16 and float16, a few of the layouts; the limit is what two seeds differ by.

    python benchmarks/resharding.py [--architectures mega …] [--dtypes float32 bfloat16 …] [--continue]
                                     [--out benchmarks/resharding]

With --out, what is measured replaces its part of the page, and the others stay; with --continue what is there stays.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "benchmarks"]
sys.path.append(str(ROOT / "tests/support"))

from forking import ForkServer  # noqa: E402
from ranks import Ranks  # noqa: E402
from runs import MEGA, MODEL, MRA, NYSTROMFORMER, Run, prepare_text, ranks_of, settings, train_here  # noqa: E402

from farspan.benchmarks.about import about, bullets  # noqa: E402
from farspan.pretrain import checkpoint as ckpt  # noqa: E402

LIMIT = 1e-4  # float32, relative: of losses and gradient norms of every step, and of tensors after the last
STEPS, SAVE = 40, 20
PACKAGES = ("torch", "megatron-core", "deepspeed")


def _layout(tensor: int = 1, pipeline: int = 1, data: int = 1, **more: Any) -> dict[str, Any]:
    sizes = {"tensor": tensor, "pipeline": pipeline, "data": data, **more}
    return {f"parallel.{key}": value for key, value in sizes.items() if value != 1}


SAVED: dict[str, dict[str, Any]] = {
    "1 rank": {},
    "TP2 × PP2 + SP": _layout(tensor=2, pipeline=2, sequence=True),
    "DP4, ZeRO 3": _layout(data=4, zero_stage=3),
    "PP2 interleaved": _layout(pipeline=2, virtual_stages=2),
    "DP2, ZeRO 2": _layout(data=2, zero_stage=2),
    "TP2 × DP2, ZeRO 1": _layout(tensor=2, data=2) | {"parallel.zero_stage": 1},
}
RESUMED: dict[str, dict[str, Any]] = {
    "PP4": _layout(pipeline=4),
    "TP4 + SP, microbatches of 4": _layout(tensor=4, sequence=True) | {"training.micro_batch_size": 4},
    "DP4, ZeRO 1": _layout(data=4) | {"parallel.zero_stage": 1},
    "PP2 × DP2, ZeRO 0": _layout(pipeline=2, data=2, zero_stage=0),
    "TP2 × PP2 interleaved": _layout(tensor=2, pipeline=2, virtual_stages=2),
    "DP2, ZeRO 3, offload": _layout(data=2, zero_stage=3, offload_optimizer=True),
}
LAYOUTS = SAVED | RESUMED

DROPOUT = {"model.hidden_dropout_prob": 0.1, "model.attention_probs_dropout_prob": 0.1}
NO_WEIGHTS = {"model.hidden_dropout_prob": 0.1}  # attention weights that are never formed cannot be dropped
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mega": {"model": MEGA},
    "megatron-bert": {"model": MODEL | {"model_type": "megatron-bert"}, "objective.name": "mlm+nsp"}
    | {"data.rows": "pairs"}
    | DROPOUT,
    "mra": {"model": MRA, "data.sequence_length": 96} | NO_WEIGHTS,
    "nystromformer": {"model": NYSTROMFORMER} | NO_WEIGHTS,
    "roberta-prelayernorm": DROPOUT,
}
DTYPES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"training.dtype": "bfloat16"},
    # The scale rises before the save and after it; near an overflow layouts skip different steps.
    "float16": {"training.dtype": "float16", "training.initial_loss_scale": 2.0**8, "training.loss_scale_window": 6},
}
IN_16_BITS = "roberta-prelayernorm"
# From which layout to which others there.
SHORTER: dict[str, tuple[str, ...]] = {
    "TP2 × PP2 + SP": ("DP4, ZeRO 1", "DP2, ZeRO 3, offload"),
    "DP4, ZeRO 3": ("PP4", "PP2 × DP2, ZeRO 0"),
    "PP2 interleaved": ("TP4 + SP, microbatches of 4", "DP4, ZeRO 1"),
}


def recipe(steps: int, save: int) -> dict[str, Any]:
    """A learning rate that falls and a batch that grows, both half-way when the run is saved."""
    grows = save + save // 4  # the first step of the full batch
    return {
        "training.global_batch_size": 16,
        "training.batch_ramp": {"start": 8, "increment": 8, "samples": 8 * grows},
        "schedule.name": "cosine",
        "schedule.warmup_steps": save // 4,
        "evaluation.interval": save,
        "evaluation.rows": 16,
        "checkpoint.interval": save,
        "checkpoint.keep_last": 0,
        "training.steps": steps,
    }


@dataclasses.dataclass(frozen=True)
class Differences:
    """The largest relative differences of two runs from a step on: of a loss, a gradient norm, a validation loss; and
    at their ends of a weight and an optimizer's tensor, against the largest value of that tensor."""

    loss: float
    gradient_norm: float
    validation: float
    weights: float
    moments: float

    def within(self, limit: Differences) -> bool:
        return all(mine <= theirs for mine, theirs in zip(*map(dataclasses.astuple, (self, limit)), strict=True))

    @staticmethod
    def of(run: Run, expected: Run, first: int = 0) -> Differences:
        """From the step after ``first`` on."""
        losses, norms = zip(*(run.steps()[first:]), strict=True)
        expected_losses, expected_norms = zip(*(expected.steps()[first:]), strict=True)
        ours, theirs = state_of(run), state_of(expected)
        if ours.keys() != theirs.keys():
            other = sorted(ours.keys() ^ theirs.keys())
            raise ValueError(
                f"{run.folder} and {expected.folder} keep other tensors: {other[0]} and {len(other) - 1} more"
            )
        tensors = {True: 0.0, False: 0.0}
        for (kind, name), value in theirs.items():
            size = value.abs().max().item() or 1.0
            difference = (ours[kind, name] - value).abs().max().item() / size
            tensors[kind == "weight"] = max(tensors.get(kind == "weight", 0.0), difference)
        validations = zip(run.validations(), expected.validations(), strict=True)
        return Differences(
            _relative(losses, expected_losses),
            _relative(norms, expected_norms),
            max(abs(mine / other - 1) for (mine, _), (other, _) in validations),
            tensors[True],
            tensors[False],
        )


def _relative(found: tuple[float | None, ...], expected: tuple[float | None, ...]) -> float:
    """None is what is not finite; infinite where that is so in one run alone, which then has skipped a step."""
    differences = [0.0]
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:
            differences.append(0.0 if a is b else math.inf)
        else:
            differences.append(abs(a - b) / abs(b))
    return max(differences)


def state_of(run: Run) -> dict[tuple[str, str], Any]:
    """Every logical tensor of the last checkpoint, in float64, by its kind and name.  Masters stand for the weights."""
    reader = ckpt.Reader(ckpt.find(run.folder))
    state = {}
    for name in reader.names():
        kinds = set(reader.kinds(name))
        for kind in kinds - ({"weight"} if "master" in kinds else set()):
            state["weight" if kind == "master" else kind, name] = reader.tensor(name, kind=kind).double()
    return state


def identical(run: Run, expected: Run) -> bool:
    """Whether metrics and all files of the last checkpoint are the same to the bit."""
    folders = ckpt.find(run.folder), ckpt.find(expected.folder)
    mine, theirs = ({p.name: p.read_bytes() for p in folder.glob("*.safetensors")} for folder in folders)
    said = (run.steps(), run.validations()) == (expected.steps(), expected.validations())
    manifests = [ckpt.Manifest.read(folder) for folder in folders]
    states = [(manifest.step, manifest.trainer, manifest.tensors, manifest.metrics) for manifest in manifests]
    return said and mine == theirs and states[0] == states[1]


class Trials:
    """Runs of one configuration under many layouts."""

    def __init__(self, pool: Ranks, data: Path, folder: Path, overrides: Mapping[str, Any]) -> None:
        self.pool, self.data, self.folder = pool, data, folder
        self.overrides = recipe(STEPS, SAVE) | dict(overrides)
        self._whole: dict[str, Run] = {}

    def train(self, name: str, overrides: Mapping[str, Any], **options: Any) -> Run:
        """Train in a folder of this name, or go on there."""
        if overrides.get("parallel.zero_stage") == 3:
            # DeepSpeed numbers modules for as long as a process lives, and compares the numbers of all ranks.
            self.pool.stop()
        folder = self.folder / name
        values = settings(self.data, folder, STEPS, self.overrides | dict(overrides))
        errors = self.pool.run(train_here, values, count=ranks_of(values), seconds=600, **options)
        if any(errors):
            raise RuntimeError(f"{name}: {errors}")
        return Run(folder)

    def whole(self, layout: str) -> Run:
        """The uninterrupted run, which saved on the way."""
        if layout not in self._whole:
            self._whole[layout] = self.train(f"whole {layout}", LAYOUTS[layout])
        return self._whole[layout]

    def resumed(self, source: str, target: str) -> Run:
        """Saved under ``source`` half-way, gone on under ``target``."""
        whole, folder = self.whole(source), self.folder / f"{source} to {target}"
        step = f"checkpoints/step-{SAVE:08d}"
        shutil.copytree(whole.folder / step, folder / step)
        lines = (whole.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= SAVE]
        (folder / "metrics.jsonl").write_text("".join(kept))
        return self.train(folder.name, LAYOUTS[target])


def layouts_of(dtype: str) -> dict[str, tuple[str, ...]]:
    """Under which layouts a run is saved, and under which it goes on from each."""
    return {source: tuple(RESUMED) for source in SAVED} if dtype == "float32" else SHORTER


def measured(
    pool: Ranks,
    data: Path,
    folder: Path,
    architecture: str,
    dtype: str,
    result: dict[str, Any],
    keep: Callable[[], None] = lambda: None,
) -> None:
    """Fill in what ``result`` does not have yet; ``keep`` is called whenever a row is added."""
    rows, pairs = result.setdefault("rows", {}), layouts_of(dtype)
    if all(source in rows for source in pairs):
        return
    trials = Trials(pool, data, folder, ARCHITECTURES[architecture] | DTYPES[dtype])
    single, limit = trials.whole("1 rank"), Differences(*[LIMIT] * 5)
    if dtype != "float32":
        limit = Differences.of(trials.train("another seed", {"training.seed": 4321}), single, SAVE)
    steps = single.steps()
    result["losses"] = {step: steps[step - 1][0] for step in (1, SAVE, STEPS)}
    result["limit"] = dataclasses.asdict(limit)
    for source, targets in pairs.items():
        if source in rows:
            continue
        began, cells = time.monotonic(), {}
        run = trials.resumed(source, source)
        same = identical(run, trials.whole(source))
        shutil.rmtree(run.folder)
        for target in targets:
            run = trials.resumed(source, target)
            found = Differences.of(run, single, SAVE)
            cells[target] = {"held": found.within(limit)} | dataclasses.asdict(found)
            shutil.rmtree(run.folder)
        losses = " ".join(f"{cell['loss']:.1e}" for cell in cells.values())
        print(f"  saved under {source}: the same bit-equal {same}, others {losses}", flush=True)
        seconds = round(time.monotonic() - began)
        rows[source] = {"same": same, "cells": cells, "seconds": seconds, "about": about(*PACKAGES)}
        keep()


def is_held(result: Mapping[str, Any], dtype: str) -> bool:
    """Whether every cell was measured and is within its limit."""
    rows = result["rows"]
    return set(rows) == set(layouts_of(dtype)) and all(
        row["same"] and all(cell["held"] for cell in row["cells"].values()) for row in rows.values()
    )


def table(architecture: str, dtype: str, result: Mapping[str, Any]) -> list[str]:
    """The part of the page that one architecture has."""
    rows, pairs = result["rows"], layouts_of(dtype)
    cells = [cell for row in rows.values() for cell in row["cells"].values()]
    targets = [target for target in RESUMED if any(target in others for others in pairs.values())]
    held, same = sum(cell["held"] for cell in cells), sum(row["same"] for row in rows.values())

    def said(cell: Mapping[str, Any] | None) -> str:
        if cell is None:
            return ""
        return f"{cell['loss']:.1e} / {cell['gradient_norm']:.1e}" + ("" if cell["held"] else " **NOT HELD**")

    def worst(key: str, words: str) -> str:
        return f"{words} {max(cell[key] for cell in cells):.1e} (limit {result['limit'][key]:.0e})"

    first, saved, last = result["losses"].values()
    lines = [
        f"## {architecture}, {dtype}: {held} of {sum(map(len, pairs.values()))} held, same layout bit-equal {same} of "
        f"{len(pairs)}",
        "",
        f"Loss {first:.3f} at first, {saved:.3f} when saved, {last:.3f} at the end. Worst relative difference:",
        f"{worst('loss', 'losses')}, {worst('gradient_norm', 'gradient norms')},",
        f"{worst('validation', 'validation loss')},",
        f"{worst('weights', 'weights at the end')}, {worst('moments', 'moments')}.",
        "",
        f"| saved under | the same | {' | '.join(targets)} |",
        "|---" * (len(targets) + 2) + "|",
    ]
    for source, row in rows.items():
        equal = "bit-equal" if row["same"] else "**NOT EQUAL**"
        lines.append(f"| {source} | {equal} | {' | '.join(said(row['cells'].get(target)) for target in targets)} |")
    when = dict.fromkeys(f"{row['about']['commit']}, {row['about']['date']}" for row in rows.values())
    seconds = sum(row["seconds"] for row in rows.values())
    return [*lines, "", f"Commit {'; '.join(when)}; {seconds / 60:.0f} minutes.", ""]


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """``results``: by architecture and dtype, "mega, float32"."""
    found = [row["about"] for result in results.values() for row in result["rows"].values()]
    latest = max(found, key=lambda one: one["date"])
    lines = [
        "# Resumed under another layout, measured",
        "",
        f"A run of {STEPS} steps is saved at step {SAVE} under one layout and goes on under another; what follows is",
        "compared with the run on one rank that was never stopped: the largest relative difference of a step's loss /",
        f"gradient norm over steps {SAVE + 1} to {STEPS}. Weights (in 16 bits masters) and moments at the end are",
        "compared as whole logical tensors, relative to each one's largest value. Tiny models of four layers, dropout",
        "0.1, real text, a batch that grows from 8 to 16 rows after the save, learning rate on a cosine, evaluation at",
        "the save. TP: tensor ranks, SP: sequence parallelism, PP: pipeline ranks, DP: replicas; gloo, on a CPU.",
        "MEGA here has no batch norm: its statistics are those of a microbatch, so that with it",
        "`training.micro_batch_size` must stay as it is. In 16 bits the limit is what two seeds differ by.",
        "`python benchmarks/resharding.py`",
        "",
        *bullets({key: value for key, value in latest.items() if key not in ("date", "commit")}),
        "",
    ]
    for dtype in DTYPES:
        for architecture in ARCHITECTURES:
            if name_of(architecture, dtype) in results:
                lines += table(architecture, dtype, results[name_of(architecture, dtype)])
    return "\n".join(lines)


def name_of(architecture: str, dtype: str) -> str:
    return f"{architecture}, {dtype}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--continue", dest="goes_on", action="store_true", help="measure only what PATH.json lacks")
    parser.add_argument("--out", metavar="PATH", help="write PATH.md and PATH.json")
    arguments = parser.parse_args()
    out = Path(arguments.out) if arguments.out else None
    results: dict[str, Any] = {}
    if out is not None and out.with_suffix(".json").is_file():
        results = json.loads(out.with_suffix(".json").read_text())
    wanted = [(a, d) for d in arguments.dtypes for a in arguments.architectures if d == "float32" or a == IN_16_BITS]

    def keep() -> None:
        if out is not None:
            out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
            out.with_suffix(".md").write_text(page(results))

    server = ForkServer()
    pool = Ranks(server)
    try:
        with tempfile.TemporaryDirectory() as folder:
            data = prepare_text(Path(folder))
            for architecture, dtype in wanted:
                name = name_of(architecture, dtype)
                print(name, flush=True)
                known = results.get(name, {}) if arguments.goes_on else {}
                results[name] = known
                measured(pool, data, Path(folder) / name, architecture, dtype, known, keep)
    finally:
        pool.stop()
        server.stop()
    print(page(results))
    return 0 if all(is_held(results[name_of(*one)], one[1]) for one in wanted) else 1


if __name__ == "__main__":
    raise SystemExit(main())
