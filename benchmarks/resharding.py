"""Resumed under another layout, measured: every step after it against the run that was never stopped.

For every architecture a tiny run of 40 steps: saved at step 20 under six layouts, resumed from each under six others.
Loss and gradient norm of steps 21 to 40, and weights and optimizer moments after them, are compared with those of an
uninterrupted run on one rank; resumed under the layout that saved it, a run must be that layout's uninterrupted one to
the bit.  Dropout 0.1, real text, batch size and learning rate change on the way; an evaluation at the save.  Up to four
ranks on a CPU.  In bfloat16 and float16, a few of the layouts; the limit is what two seeds differ by.

    python benchmarks/resharding.py [--architectures mega …] [--dtypes float32 bfloat16 …] [--out benchmarks/resharding]

With --out, what is measured replaces its part of the page, and the others stay.
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
from collections.abc import Mapping
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
SHORTER = {
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
            raise ValueError(f"{run.folder} and {expected.folder} keep other tensors: {sorted(ours ^ theirs.keys())}")
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
    """Runs of one configuration under many layouts, each in fresh processes: what DeepSpeed numbers in a process that
    lives on would tell ranks with different pasts apart."""

    def __init__(self, pool: Ranks, data: Path, folder: Path, overrides: Mapping[str, Any]) -> None:
        self.pool, self.data, self.folder = pool, data, folder
        self.overrides = recipe(STEPS, SAVE) | dict(overrides)
        self._whole: dict[str, Run] = {}

    def train(self, name: str, overrides: Mapping[str, Any], **options: Any) -> Run:
        """Train in a folder of this name, or go on there."""
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


def measure(trials: Trials, pairs: Mapping[str, tuple[str, ...]], limit: Differences) -> dict[str, Any]:
    """From every layout to its others, and to itself."""
    single = trials.whole("1 rank")
    same, cells = {}, []
    for source, targets in pairs.items():
        run = trials.resumed(source, source)
        same[source] = identical(run, trials.whole(source))
        shutil.rmtree(run.folder)
        for target in targets:
            run = trials.resumed(source, target)
            found = Differences.of(run, single, SAVE)
            cells.append({"from": source, "to": target, "held": found.within(limit)} | dataclasses.asdict(found))
            shutil.rmtree(run.folder)
        losses = " ".join(f"{cell['loss']:.1e}" for cell in cells[-len(targets) :])
        print(f"  saved under {source}: the same bit-equal {same[source]}, others {losses}", flush=True)
    steps = single.steps()
    return {
        "first_loss": steps[0][0],
        "saved_loss": steps[SAVE - 1][0],
        "last_loss": steps[-1][0],
        "limit": dataclasses.asdict(limit),
        "same": same,
        "cells": cells,
    }


def measured(pool: Ranks, data: Path, folder: Path, architecture: str, dtype: str) -> dict[str, Any]:
    began = time.monotonic()
    kind = ARCHITECTURES[architecture] | DTYPES[dtype]
    trials = Trials(pool, data, folder, kind)
    if dtype == "float32":
        limit = Differences(*[LIMIT] * 5)
        result = measure(trials, {source: tuple(RESUMED) for source in SAVED}, limit)
    else:
        seed = trials.train("another seed", {"training.seed": 4321})
        limit = Differences.of(seed, trials.whole("1 rank"), SAVE)
        result = measure(trials, SHORTER, limit)
    packages = about("torch", "megatron-core", "deepspeed")
    return {"about": packages, "seconds": round(time.monotonic() - began)} | result


def table(architecture: str, dtype: str, result: Mapping[str, Any]) -> list[str]:
    """The part of the page that one architecture has."""
    cells = {(cell["from"], cell["to"]): cell for cell in result["cells"]}
    targets = list(dict.fromkeys(cell["to"] for cell in result["cells"]))
    held, same = sum(cell["held"] for cell in cells.values()), result["same"]

    def said(cell: Mapping[str, Any] | None) -> str:
        if cell is None:
            return ""
        return f"{cell['loss']:.1e} / {cell['gradient_norm']:.1e}" + ("" if cell["held"] else " **NOT HELD**")

    def worst(key: str) -> str:
        return f"{max(cell[key] for cell in cells.values()):.1e} (limit {result['limit'][key]:.0e})"

    lines = [
        f"## {architecture}, {dtype}: {held} of {len(cells)} held, same layout bit-equal {sum(same.values())} of "
        f"{len(same)}",
        "",
        f"Loss {result['first_loss']:.3f} at first, {result['saved_loss']:.3f} when saved, {result['last_loss']:.3f} "
        f"at the end. Worst relative difference from the uninterrupted run: losses {worst('loss')}, gradient norms "
        f"{worst('gradient_norm')}, validation losses {worst('validation')}, weights after step {STEPS} "
        f"{worst('weights')}, moments {worst('moments')}. {result['seconds']} s.",
        "",
        f"| saved under | resumed under the same | {' | '.join(targets)} |",
        "|---" * (len(targets) + 2) + "|",
    ]
    for source, equal in same.items():
        row = [said(cells.get((source, target))) for target in targets]
        lines.append(f"| {source} | {'bit-equal' if equal else '**NOT EQUAL**'} | {' | '.join(row)} |")
    found = result["about"]
    return [*lines, "", f"Commit {found['commit']}, {found['date']}.", ""]


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """``results``: by architecture and dtype, "mega, float32"."""
    latest = max(results.values(), key=lambda result: result["about"]["date"])["about"]
    lines = [
        "# Resumed under another layout, measured",
        "",
        f"A run of {STEPS} steps is saved at step {SAVE} under one layout and goes on under another; what follows is",
        "compared with the run on one rank that was never stopped: the largest relative difference of a step's loss /",
        f"gradient norm over steps {SAVE + 1} to {STEPS}. Weights and moments (masters in 16 bits) at the end are",
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
    order = [f"{architecture}, {dtype}" for dtype in DTYPES for architecture in ARCHITECTURES]
    for name in order:
        if name in results:
            lines += table(*name.split(", "), results[name])
    return "\n".join(lines)


def held(result: Mapping[str, Any]) -> bool:
    return all(cell["held"] for cell in result["cells"]) and all(result["same"].values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--out", metavar="PATH", help="write PATH.md and PATH.json")
    arguments = parser.parse_args()
    out = Path(arguments.out) if arguments.out else None
    results: dict[str, Any] = {}
    if out is not None and out.with_suffix(".json").is_file():
        results = json.loads(out.with_suffix(".json").read_text())
    wanted = [(a, d) for d in arguments.dtypes for a in arguments.architectures if d == "float32" or a == IN_16_BITS]
    server = ForkServer()
    pool = Ranks(server)
    try:
        with tempfile.TemporaryDirectory() as folder:
            data = prepare_text(Path(folder))
            for architecture, dtype in wanted:
                name = f"{architecture}, {dtype}"
                print(name, flush=True)
                results[name] = measured(pool, data, Path(folder) / name, architecture, dtype)
                if out is not None:
                    out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
                    out.with_suffix(".md").write_text(page(results))
    finally:
        pool.stop()
        server.stop()
    print(page(results))
    return 0 if all(held(results[f"{architecture}, {dtype}"]) for architecture, dtype in wanted) else 1


if __name__ == "__main__":
    raise SystemExit(main())
