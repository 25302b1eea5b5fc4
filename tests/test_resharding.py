"""A run saved under one layout goes on under any other as if nothing had happened, and reads no more than it needs.

FARSPAN_TEST_RESHARDING=all runs the full matrix of benchmarks/resharding.py too.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import shutil
from collections.abc import Collection

import pytest
import torch
import torch.distributed as dist
from comparison import BFLOAT16, RELATIVE
from ranks import Ranks
from runs import MEGA, Run, ranks_of, settings, train_here

from farspan.benchmarks.resharding import (
    ARCHITECTURES,
    DROPOUT,
    LAYOUTS,
    RESUMED,
    SAVED,
    Differences,
    is_held,
    measured,
)
from farspan.parallel.parts import Part
from farspan.parallel.sharding import logical_of
from farspan.pretrain import checkpoint as ckpt

TENSORS = 1e-4  # weights and moments, relative to the largest of a tensor: Adam divides small gradients by themselves
FLOAT32 = Differences(RELATIVE, RELATIVE, RELATIVE, TENSORS, TENSORS)
IN_16_BITS = Differences(BFLOAT16, BFLOAT16, BFLOAT16, 0.2, 0.2)
BATCHNORM = {"model": MEGA | {"normalization_type": "batchnorm"}}
FLOAT16 = {"training.dtype": "float16", "training.initial_loss_scale": 2.0**8, "training.loss_scale_window": 3}
EACH = 2  # steps under each layout of a chain


# The state of an engine, found without the code that saves and restores it.


def local_values(engine, kind: str) -> dict[str, torch.Tensor]:
    """This rank's values, in the parameters' own shapes, of "weight", "master" or a tensor of the optimizer;
    collective.  Without those that the optimizer does not have."""
    mine, names = engine.optimizer, engine.local.names
    partitioned = mine.stage if mine.partitioned else 0

    def gathered(own: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(own) for _ in range(engine.mesh.data.size)]
        dist.all_gather(parts, own.contiguous(), group=engine.mesh.data.group)
        return parts

    if kind == "weight" and partitioned == 3:
        shards = [(p, torch.cat(gathered(p.ds_tensor.detach().view(-1)))) for p in engine.module.parameters()]
        return {names[p]: values[: p.ds_numel].view(p.ds_shape) for p, values in shards}
    if kind == "weight":
        return {names[p]: p.detach() for p in engine.module.parameters()}

    def state(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return mine.optimizer.state.get(tensor, {}) | {"master": tensor.detach()}

    if not partitioned:
        pairs = zip(mine.parameters, mine.masters, strict=True)
        return {names[p]: state(master)[kind] for p, master in pairs if kind in state(master)}
    zero, found = mine.engine.optimizer, {}
    groups = zero.fp16_groups if partitioned == 3 else zero.round_robin_bit16_groups
    flats = zero.fp32_partitioned_groups_flat if partitioned == 3 else zero.single_partition_of_fp32_groups
    for parameters, flat in zip(groups, flats, strict=True):
        if kind not in state(flat):
            continue
        parts, begin = gathered(state(flat)[kind]), 0
        whole = torch.cat(parts)
        for parameter in parameters:
            if partitioned == 3:  # on every replica a shard of every parameter, one after the other
                shard, shape = parameter.ds_tensor.ds_numel, parameter.ds_shape
                values = torch.cat([part[begin : begin + shard] for part in parts])[: shape.numel()]
                begin += shard
            else:  # one parameter after the other, cut anywhere
                shape = parameter.shape
                values = whole[begin : begin + shape.numel()]
                begin += shape.numel()
            found[names[parameter]] = values.view(shape)
    return found


def what_differs(engine, reader: ckpt.Reader) -> list[str]:
    """What is not, to the bit, what the checkpoint has; collective."""
    wrong, seen = [], set()
    by_name = {engine.local.names[p]: p for p in engine.module.parameters()}
    for kind in ("weight", "master", "exp_avg", "exp_avg_sq") if engine.mixed else ("weight", "exp_avg", "exp_avg_sq"):
        for name, values in local_values(engine, kind).items():
            seen.add((kind, name))
            if kind not in reader.kinds(name):  # saved before the first update
                wrong += [f"{kind} {name} of nothing"] if values.any() and kind != "master" else []
                continue
            logical, whole = logical_of(by_name[name]), reader.tensor(name, kind=kind)
            expected = logical.slice(whole, engine.mesh.tensor, values.shape)
            if not torch.equal(values.cpu(), expected) or values.dtype != expected.dtype:
                wrong.append(f"{kind} {name}")
    wrong += [f"no {kind} {name}" for name in by_name for kind in reader.kinds(name) if (kind, name) not in seen]
    steps = {name: reader.step(name) for name in engine.optimizer_steps() if reader.step(name) is not None}
    if steps and steps != engine.optimizer_steps():
        wrong.append("numbers of updates")
    if engine.loss_scale.state() != reader.manifest.trainer["loss_scale"]:
        wrong.append("loss scale")
    return wrong


FORGOTTEN = "layers.2.feed_forward.down.weight"


@dataclasses.dataclass(frozen=True)
class Forgetful:
    """A checkpoint that has lost something."""

    saved: ckpt.Reader
    what: str

    def kinds(self, name: str) -> Collection[str]:
        return self.saved.kinds(name)

    def step(self, name: str) -> float | None:
        return 1.0 if self.what == "the step" else self.saved.step(name)

    def read(self, kind: str, name: str, part: Part, into: torch.Tensor) -> None:
        lost = {"the moments": True, "a moment of one tensor": name == FORGOTTEN}.get(self.what, False)
        if not (lost and kind == "exp_avg"):
            self.saved.read(kind, name, part, into)


def train_and_look(values: dict, forget: str = "nothing", **options) -> tuple[str | None, list[str]]:
    """Train, and before the first step compare the engine's state with the checkpoint's.  ``forget``: a fault, what
    is not restored."""
    from farspan.parallel import engine as of_engine
    from farspan.pretrain import run

    build, restore, wrong = run.build_engine, of_engine.restore_optimizer, []

    def look(config, mesh, start, loss):
        engine = build(config, mesh, start, loss)
        if start.reader is not None:
            wrong.extend(what_differs(engine, ckpt.Reader(start.reader.folder)))
        return engine

    def forgetful(optimizer, updated, local, saved, *, masters):
        if forget == "the masters":
            masters = False
        if forget != "the optimizer":
            restore(optimizer, updated, local, Forgetful(saved, forget), masters=masters)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "build_engine", look)
        if forget != "nothing":
            patch.setattr(of_engine, "restore_optimizer", forgetful)
        return train_here(values, **options), wrong


@pytest.fixture
def start(ranks, prepared, tmp_path):
    """start(name, steps, overrides, ...): train in a folder of that name; the error line of rank 0, if there was one,
    and what of the state was not what the checkpoint has, on any rank."""

    def call(name, steps, overrides, **options):
        values = settings(prepared, tmp_path / name, steps, overrides)
        if values.get("parallel", {}).get("zero_stage") == 3:
            ranks.stop()  # DeepSpeed numbers modules as long as a process lives, and compares the numbers of all ranks
        answers = ranks.run(train_and_look, values, count=ranks_of(values), seconds=200, **options)
        assert len({error is None for error, _ in answers}) == 1, answers
        return answers[0][0], [line for _, wrong in answers for line in wrong]

    return call


def schedule(steps: int) -> dict:
    """Learning rate and batch size that change on the way."""
    return {
        "training.global_batch_size": 16,
        "training.batch_ramp": {"start": 8, "increment": 8, "samples": 8 * (steps // 2 + 1)},
        "schedule.name": "cosine",
        "evaluation.interval": EACH,
        "evaluation.rows": 16,
        "checkpoint.interval": EACH,
    }


# What is trained, the layouts it goes through, and how far it may be from the run that stayed on one rank (None: any).
SOME = ["TP2 × PP2 + SP", "DP4, ZeRO 3", "PP2 interleaved", "DP2, ZeRO 2"]
CHAINS = {
    "roberta-prelayernorm": (DROPOUT, [*LAYOUTS, "1 rank"], FLOAT32),
    "mega": (ARCHITECTURES["mega"], ["DP4, ZeRO 3", "TP2 × PP2 interleaved", "DP2, ZeRO 2"], FLOAT32),
    "mega with batch norm": (BATCHNORM, ["PP2 interleaved", "DP2, ZeRO 2", "TP2 × DP2, ZeRO 1"], FLOAT32),
    "megatron-bert, pairs": (ARCHITECTURES["megatron-bert"], SOME[:3], FLOAT32),
    "mra": (ARCHITECTURES["mra"], ["TP2 × DP2, ZeRO 1", "PP4", "DP4, ZeRO 1"], FLOAT32),
    "nystromformer": (ARCHITECTURES["nystromformer"], ["PP2 × DP2, ZeRO 0", "DP2, ZeRO 3, offload", "1 rank"], FLOAT32),
    "lamb": (DROPOUT | {"optimizer.name": "lamb", "optimizer.lr": 1e-2}, [*SOME[:2], "DP2, ZeRO 2"], FLOAT32),
    "untied": (DROPOUT | {"model.tie_word_embeddings": False}, SOME[1:3], FLOAT32),
    "bfloat16": (
        DROPOUT | {"training.dtype": "bfloat16"},
        [*SOME, "DP2, ZeRO 3, offload"],
        IN_16_BITS,
    ),
    "float16": (DROPOUT | FLOAT16, SOME[1:], IN_16_BITS),
    # Saved before the first update and after it.  Replicas overflow earlier, and then skip other steps.
    "float16 that overflows": (DROPOUT | FLOAT16 | {"training.initial_loss_scale": 2.0**21}, SOME[:3], None),
}


@pytest.mark.parametrize("kind", CHAINS)
def test_through_many_layouts(start, tmp_path, capsys, kind):
    """Every layout goes on from the one before: the state is the saved one to the bit, what follows the run that never
    changed its layout."""
    overrides, layouts, limit = CHAINS[kind]
    steps = EACH * len(layouts)
    overrides = schedule(steps) | overrides
    assert start("whole", steps, overrides) == (None, [])
    for number, layout in enumerate(layouts, 1):
        found = start("chain", steps, overrides | LAYOUTS[layout], stop_after=EACH * number)
        assert found == (None, []), f"under {layout}"
    if limit is None:
        return
    differences = Differences.of(Run(tmp_path / "chain"), Run(tmp_path / "whole"))
    with capsys.disabled():
        print(f"\n{kind}: {differences}", end="")
    assert differences.within(limit), differences


def test_every_layout_is_a_source_and_a_target():
    changes = [change for _, layouts, _ in CHAINS.values() for change in itertools.pairwise(layouts)]
    assert {source for source, _ in changes} == {target for _, target in changes} == set(LAYOUTS)
    assert len(SAVED) == len(RESUMED) == 6 and len(LAYOUTS) == 12


# What is forgotten, in which precision, and what of the state is said to differ: a name begins with it.
FAULTS = [
    ("nothing", "float32", None),
    ("the optimizer", "float32", "no exp_avg"),
    ("the moments", "float32", "exp_avg "),
    ("a moment of one tensor", "float32", f"exp_avg {FORGOTTEN}"),
    ("the step", "float32", "numbers of updates"),
    ("nothing", "bfloat16", None),
    ("the masters", "bfloat16", "master "),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resume_that_forgets_is_seen(start, tmp_path, dtype):
    """Before its first step, and in float32 in what follows: what the chains above compare would not be equal."""
    overrides = schedule(4) | DROPOUT | {"training.dtype": dtype}
    assert start("whole", 4, overrides | LAYOUTS["PP2 interleaved"], stop_after=2) == (None, [])
    faults = [(forget, words) for forget, of, words in FAULTS if of == dtype]
    for forget, _ in faults:
        shutil.copytree(tmp_path / "whole", tmp_path / forget)
    assert start("whole", 4, overrides | LAYOUTS["PP2 interleaved"]) == (None, [])
    for forget, words in faults:
        error, wrong = start(forget, 4, overrides | LAYOUTS["DP2, ZeRO 2"], forget=forget)
        assert error is None
        assert bool(wrong) == (words is not None) and all(line.startswith(words) for line in wrong), wrong
        if dtype == "float32":
            differences = Differences.of(Run(tmp_path / forget), Run(tmp_path / "whole"))
            assert differences.within(FLOAT32) == (words is None), f"{forget}: {differences}"


def test_what_differs_is_refused_under_another_layout(start, tmp_path):
    overrides = schedule(4) | DROPOUT
    assert start("run", 4, overrides | LAYOUTS["PP2 interleaved"], stop_after=2) == (None, [])
    before = {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    refused = {
        "training.seed 1234, now it is 7": {"training.seed": 7},
        "training.dtype 'float32', now it is 'bfloat16'": {"training.dtype": "bfloat16"},
        "model.hidden_size 32, now it is 64": {"model.hidden_size": 64},
        "training.global_batch_size 16, now it is 24": {"training.global_batch_size": 24},
    }
    for words, change in refused.items():
        error, _ = start("run", 4, overrides | LAYOUTS["TP2 × DP2, ZeRO 1"] | change)
        assert error is not None and f"was saved with {words}" in error, error
    assert {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()} == before
    assert start("run", 4, overrides | LAYOUTS["TP2 × DP2, ZeRO 1"]) == (None, [])


def test_past_a_damaged_checkpoint_under_another_layout(start, tmp_path):
    """The newest is damaged where a rank alone looks: all of them go on from the one before."""
    overrides = schedule(4) | DROPOUT | {"checkpoint.keep_last": 0}
    assert start("whole", 4, overrides | LAYOUTS["DP2, ZeRO 2"]) == (None, [])
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    damaged = tmp_path / "run/checkpoints/step-00000004/optimizer-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert start("run", 4, overrides | LAYOUTS["TP2 × PP2 + SP"]) == (None, [])
    assert Run(tmp_path / "run").layout()["tensor"] == 2
    differences = Differences.of(Run(tmp_path / "run"), Run(tmp_path / "whole"))
    assert max(dataclasses.astuple(differences)) > 0.0 and differences.within(FLOAT32), differences


@pytest.mark.timeout(3600)
@pytest.mark.skipif(os.environ.get("FARSPAN_TEST_RESHARDING") != "all", reason="FARSPAN_TEST_RESHARDING=all runs it")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_matrix(fork_server, prepared, tmp_path, architecture):
    pool, result = Ranks(fork_server), {}
    try:
        measured(pool, prepared, tmp_path, architecture, "float32", result)
    finally:
        pool.stop()
    assert sum(len(row["cells"]) for row in result["rows"].values()) == 36
    assert is_held(result, "float32"), result["rows"]


# What is read.


def train_and_count(values: dict, **options) -> dict:
    """What this rank reads of the checkpoint after it was verified, in bytes: "read", and, found by the number of
    every single value, "needed", "gaps" (between needed runs too short to be read alone) and "headers"."""
    from farspan.pretrain import run

    build, counted = run.build_engine, {}

    def count(config, mesh, start, loss):
        engine = build(config, mesh, start, loss)
        reader = start.reader
        counted["read"] = reader.bytes_read
        found = [_bytes_of(reader, name, kind, wanted) for name, kind, wanted in _wanted(engine)]
        counted["needed"], counted["gaps"] = (sum(column) for column in zip(*found, strict=True))
        opened = [reader.folder / name for name in reader._files]
        counted["headers"] = sum(8 + int.from_bytes(path.open("rb").read(8), "little") for path in opened)
        counted["checkpoint"] = reader.manifest.bytes
        return engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "build_engine", count)
        assert train_here(values, **options) is None
    return counted


def _wanted(engine):
    """The numbers of the values, in their logical tensors, that a rank needs: of weights all of its stage, of the
    optimizer's what it updates."""
    updated = {held.parameter: held for _, members in engine.optimizer.updated for held in members}
    for parameter, name in engine.local.names.items():
        logical = logical_of(parameter)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        numbers = torch.arange(1, math.prod(logical.shape) + 1).view(logical.shape)
        numbers = logical.slice(numbers, engine.mesh.tensor, shape).reshape(-1)  # padding is 0
        yield name, "weight", numbers[numbers > 0]
        if parameter in updated:
            held = updated[parameter]
            part = numbers[held.begin : held.begin + held.stop - held.start]
            for kind in ("exp_avg", "exp_avg_sq"):
                yield name, kind, part[part > 0]


def _bytes_of(reader: ckpt.Reader, name: str, kind: str, wanted: torch.Tensor) -> tuple[int, int]:
    entry = reader.manifest.tensors[name]
    size, needed, gaps = entry.dtypes[kind].itemsize, 0, 0
    for shard in entry.shards[kind]:
        part = shard.part
        numbers = torch.arange(1, math.prod(entry.shape) + 1).view(entry.shape)
        numbers = numbers.narrow(part.dim, part.start, part.stop - part.start).reshape(-1)[part.begin : part.end]
        places = torch.isin(numbers, wanted).nonzero().view(-1)
        needed += len(places) * size
        steps = places.diff()
        ends = (steps > 1).nonzero().view(-1)  # of runs
        if len(ends) > 1 and int(ends.diff().max()) * size < 4096:
            gaps += int((steps - 1).sum()) * size
    return needed, gaps


WIDE = {"model.intermediate_size": 2048}


@pytest.mark.parametrize(
    ("source", "target", "share"),
    [
        # share: of the checkpoint's bytes, the most that a rank may read
        ("1 rank", "TP2 × PP2 + SP", 0.29),
        ("DP4, ZeRO 3", "PP4", 0.29),
        ("TP2 × DP2, ZeRO 1", "PP2 × DP2, ZeRO 0", 0.54),
        ("PP2 interleaved", "DP4, ZeRO 3", 0.54),  # every replica reads all weights, which are a third
        ("TP2 × PP2 interleaved", "TP2 × PP2 interleaved", 0.29),
    ],
)
def test_no_more_is_read_than_needed(ranks, prepared, tmp_path, source, target, share):
    """After the checksums were verified, in which every file is read once by one rank."""
    overrides = {"training.global_batch_size": 8} | WIDE
    for name, function in ((source, train_here), (target, train_and_count)):
        values = settings(prepared, tmp_path / "run", 4, overrides | LAYOUTS[name])
        ranks.stop()  # as above
        counts = ranks.run(function, values, count=ranks_of(values), seconds=200, stop_after=1)
    for counted in counts:
        exact = counted["needed"] + counted["headers"]
        assert exact <= counted["read"] <= exact + counted["gaps"]
        assert counted["read"] <= share * counted["checkpoint"], counted
        assert counted["gaps"] < 0.02 * counted["checkpoint"]
