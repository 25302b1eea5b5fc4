"""All options together: a combination trains as a single rank does, and resumes, or is refused at the start.

What may not stand together is written down here a second time, in ``REFUSED``.  The configuration must refuse just
that, with the reason that the documentation gives, and what it accepts must run: every pair of values occurs in some
run.  ``FARSPAN_TEST_COMBINATIONS=200`` runs so many more combinations, drawn at random.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import BFLOAT16, RELATIVE, assert_identical, difference
from cpuinfo import get_cpu_info
from pairwise import Combination, Options, Rule, complete, covering, every_pair, pairs
from runs import MODEL, Run, ranks_of, settings, train_here
from safetensors.torch import load_file

import farspan
from farspan.benchmarks.layouts import worst
from farspan.pretrain import checkpoint as ckpt
from farspan.pretrain.config import check_world
from farspan.pretrain.config_file import parse_config

STEPS, STOP, ROWS = 4, 2, 8
# Of loss and gradient norm, against a single rank.
TOLERANCES = {"float32": (RELATIVE, RELATIVE), "bfloat16": (BFLOAT16, BFLOAT16), "float16": (1e-3, 1e-2)}

# Ranks = tensor × pipeline × data.
LAYOUT: Options = {
    "parallel.tensor": (1, 2),
    "parallel.sequence": (False, True),
    "parallel.pipeline": (1, 2, 4),
    "parallel.virtual_stages": (1, 2),
    "parallel.data": (1, 2, 3),
    "parallel.zero_stage": (0, 1, 2, 3),
    "parallel.offload_optimizer": (False, True),
    "training.recompute": ("none", "selective", "full"),
    "training.micro_batch_size": (2, 1, 3, 4),
}
# What is computed, whatever the layout.
KIND: Options = {
    "training.dtype": ("float32", "bfloat16", "float16"),
    "objective.name": ("mlm", "clm", "mlm+nsp", "mlm+sop"),
    "data.rows": ("packed", "padded", "pairs"),
    "model.model_type": ("roberta-prelayernorm", "megatron-bert"),
    "model.position_embedding_type": ("absolute", "relative_key", "relative_key_query"),
    "model.num_hidden_layers": (4, 5),
    "model.tie_word_embeddings": (True, False),
    "dropout": (0.0, 0.1),
    "optimizer.name": ("adamw", "lamb"),
    "training.batch_ramp": ("none", "4 to 8"),
    "training.gradient_clipping": (0.0, 1.0),
}
OPTIONS: Options = LAYOUT | KIND
DEFAULTS: Combination = {key: values[0] for key, values in OPTIONS.items()}
RAMPS = {"none": None, "4 to 8": {"start": 4, "increment": 4, "samples": 6}}
# Values that are refused wherever they occur, or nearly.
ODD: Options = {
    "parallel.tensor": (3,),
    "parallel.pipeline": (8,),
    "parallel.data": (5, 9),
    "training.micro_batch_size": (5, 16),
    "data.sequence_length": (32, 31),
    "model.type_vocab_size": (2, 1),
}


def smallest(ramp: str) -> int:
    """The smallest batch that occurs; the evaluation has that of the largest."""
    return RAMPS[ramp]["start"] if RAMPS[ramp] else ROWS


# What must be refused: its reason in the configuration's line.  First the table of docs/layout-contract.md, row by row.
DOCUMENTED = [
    Rule(
        ("parallel.zero_stage", "parallel.pipeline"),
        lambda zero, pipeline: zero >= 2 and pipeline > 1,
        r"parallel.zero_stage \d does not go with parallel.pipeline \d",
    ),
    Rule(
        ("parallel.sequence", "parallel.tensor"),
        lambda sequence, tensor: sequence and tensor == 1,
        r"parallel.sequence splits over the tensor ranks and parallel.tensor is 1",
    ),
    Rule(
        ("parallel.sequence", "parallel.tensor", "data.sequence_length"),
        lambda sequence, tensor, length: sequence and length % tensor > 0,
        r"data.sequence_length \d+ does not divide by parallel.tensor \d+, as parallel.sequence needs",
    ),
    Rule(
        ("parallel.virtual_stages", "parallel.pipeline"),
        lambda chunks, pipeline: chunks > 1 and pipeline == 1,
        r"parallel.virtual_stages \d interleaves over pipeline ranks and parallel.pipeline is 1",
    ),
    Rule(
        ("parallel.virtual_stages", "parallel.pipeline", "parallel.data", "training.batch_ramp"),
        lambda chunks, pipeline, data, ramp: chunks > 1 and smallest(ramp) < data * pipeline,
        r"leaves \d+ to some of \d data ranks, and the interleaved schedule needs parallel.pipeline \d microbatches",
    ),
    Rule(
        ("parallel.pipeline", "parallel.virtual_stages", "model.num_hidden_layers"),
        lambda pipeline, chunks, layers: pipeline * chunks > layers,
        r"parallel.pipeline \d( × virtual_stages \d)? exceeds model.num_hidden_layers \d",
    ),
    Rule(
        ("parallel.offload_optimizer", "parallel.zero_stage"),
        lambda offload, zero: offload and zero == 0,
        r"parallel.offload_optimizer is part of ZeRO and parallel.zero_stage is 0",
    ),
    Rule(
        ("parallel.offload_optimizer", "parallel.zero_stage", "training.dtype"),
        lambda offload, zero, dtype: offload and zero == 2 and dtype != "float32",
        r"parallel.offload_optimizer with parallel.zero_stage 2 .* in training.dtype b?float16",
    ),
    Rule(
        ("parallel.offload_optimizer", "optimizer.name"),
        lambda offload, optimizer: offload and optimizer != "adamw",
        r"parallel.offload_optimizer updates with DeepSpeed's CPU Adam, optimizer.name is lamb",
    ),
    Rule(
        ("parallel.tensor",),
        lambda tensor: any(MODEL[name] % tensor for name in ("num_attention_heads", "intermediate_size")),
        r"model.(num_attention_heads|intermediate_size) \d+ does not divide by parallel.tensor \d",
    ),
    Rule(
        ("parallel.data", "training.batch_ramp"),
        lambda data, ramp: smallest(ramp) < data,
        r"(global_batch_size|batch_ramp's size) \d+ leaves some of \d data ranks without a row",
    ),
]  # fmt: skip
REFUSED = [
    *DOCUMENTED,
    Rule(
        ("objective.name", "data.rows"),
        lambda objective, rows: (rows == "pairs") != (objective in ("mlm+nsp", "mlm+sop")),
        r"objective.name [\w+]+ needs data.rows (packed or padded|pairs), it is \w+",
    ),
    Rule(
        ("objective.name", "model.model_type"),
        lambda objective, model: objective in ("mlm+nsp", "mlm+sop") and model == "roberta-prelayernorm",
        r"objective.name [\w+]+ needs the nsp head, which roberta-prelayernorm does not have",
    ),
    Rule(
        ("data.rows", "model.type_vocab_size"),
        lambda rows, types: rows == "pairs" and types < 2,
        r"data.rows pairs needs model.type_vocab_size of at least 2, it is 1",
    ),
]
# What is not drawn here, though it runs.
LARGE = Rule(
    ("parallel.tensor", "parallel.pipeline", "parallel.data"),
    lambda tensor, pipeline, data: tensor * pipeline * data > 4,
    "ranks enough for this machine",
)
VACUOUS = Rule(
    ("parallel.zero_stage", "parallel.data", "parallel.offload_optimizer"),
    lambda zero, data, offload: zero > 0 and data == 1 and not offload,
    "one replica has nothing to partition: all stages of ZeRO are the same",
)
# ZeRO 3, which wants new ranks each time, last.
COVERING = sorted(covering(OPTIONS, [*REFUSED, LARGE, VACUOUS], seed=12), key=lambda x: x["parallel.zero_stage"] == 3)


# Hidden states that did not lie row by row in memory: a pipeline could not send them.
STRIDED = DEFAULTS | {"model.model_type": "megatron-bert", "parallel.tensor": 2, "parallel.pipeline": 2}


def drawn(count: int) -> Iterator[Combination]:
    """At random, without the bounds that make a covering small."""
    rng = random.Random(0)
    for _ in range(count):
        combination = complete(OPTIONS, [*REFUSED, LARGE], {}, rng)
        assert combination is not None
        yield combination


COMBINATIONS = [STRIDED, *COVERING, *drawn(int(os.environ.get("FARSPAN_TEST_COMBINATIONS", "0")))]


def overrides_of(combination: Combination) -> dict[str, Any]:
    """The keys of a configuration that a combination stands for."""
    keys = {key: value for key, value in combination.items() if "." in key}
    keys["training.batch_ramp"] = RAMPS[combination["training.batch_ramp"]]
    keys["model.is_decoder"] = combination["objective.name"] == "clm"
    for place in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        keys[f"model.{place}"] = combination["dropout"]
    if combination["optimizer.name"] == "lamb":
        keys["optimizer.lr"] = 1e-2
    if combination["training.dtype"] == "float16":
        keys["training.initial_loss_scale"] = (
            1024.0  # near the largest number one layout may skip what another does not
        )
    return keys | {"checkpoint.interval": STOP, "evaluation.interval": STEPS, "evaluation.rows": ROWS}


def words(combination: Combination) -> str:
    """What of it differs from the first values."""
    return " ".join(
        f"{key.removesuffix('.name').split('.')[-1]}={value}"
        for key, value in combination.items()
        if value != DEFAULTS[key]
    )


def train_told(values: dict, cpu_info: dict) -> str | None:
    """Train on a processor that is known: DeepSpeed's CPU Adam looks at it three times, a second each."""
    import cpuinfo

    cpuinfo.get_cpu_info = lambda: cpu_info
    return train_here(values)


class Runs:
    """Trains combinations, in folders of their own."""

    def __init__(self, ranks, data: Path, root: Path) -> None:
        self.ranks, self.data, self.root = ranks, data, root
        self.singles: dict[str, Run] = {}
        self.cpu_info = get_cpu_info()

    def train(self, combination: Combination, name: str, *, again: bool = False) -> Run:
        """``again``: on the ranks that have just done so."""
        if combination["parallel.zero_stage"] == 3 and not again:
            self.ranks.stop()  # DeepSpeed compares numbers that a process's past decides
        values = settings(self.data, self.root / name, STEPS, overrides_of(combination))
        errors = self.ranks.run(train_told, values, self.cpu_info, count=ranks_of(values), seconds=200)
        assert not any(errors), f"accepted by the configuration and refused by a rank: {errors}"
        return Run(self.root / name)

    def single(self, combination: Combination) -> Run:
        """The same mathematics on one rank, with nothing set that spreads it."""
        plain = DEFAULTS | {key: combination[key] for key in KIND}
        key = json.dumps(plain)
        if key not in self.singles:
            self.singles[key] = self.train(plain, f"single-{len(self.singles)}")
        return self.singles[key]


@pytest.fixture(scope="module")
def runs(ranks, prepared, tmp_path_factory):
    return Runs(ranks, prepared, tmp_path_factory.mktemp("combinations"))


@pytest.mark.parametrize("number", range(len(COMBINATIONS)), ids=lambda number: words(COMBINATIONS[number]))
def test_it_trains_as_a_single_rank(runs, number):
    combination = COMBINATIONS[number]
    single, run = runs.single(combination), runs.train(combination, f"run-{number}")
    allowed = TOLERANCES[combination["training.dtype"]]
    assert len(run.steps()) == STEPS and all(map(math.isfinite, itertools.chain(*run.steps())))
    assert_within(worst(run.steps(), single.steps()), allowed, "loss and gradient norm")
    (validation,), (expected,) = run.validations(), single.validations()
    assert difference(validation[0], expected[0]) <= allowed[0], "loss of the evaluation"
    if combination["training.dtype"] == "float32":
        assert difference(validation[1], expected[1]) <= RELATIVE, "accuracy"
    if number % 4 == 0 or number > len(COVERING):
        assert_resumes(runs, combination, run)


def assert_within(found: tuple[float, float], allowed: tuple[float, float], what: str) -> None:
    assert all(a <= b for a, b in zip(found, allowed, strict=True)), f"{what}: {found}, allowed {allowed}"


def assert_resumes(runs: Runs, combination: Combination, whole: Run) -> None:
    """From the save at half, to the bit."""
    parts = whole.folder.with_name(f"{whole.folder.name}-resumed")
    shutil.copytree(whole.folder, parts)
    shutil.rmtree(ckpt.find(parts))
    half = ckpt.find(parts)
    assert half.name == f"step-{STOP:08d}"
    before = {path: path.stat().st_mtime_ns for path in half.iterdir()}
    run = runs.train(combination, parts.name, again=True)
    assert {path: path.stat().st_mtime_ns for path in half.iterdir()} == before, "it began anew"
    assert (run.steps(), run.validations()) == (whole.steps(), whole.validations())
    assert_identical(saved(run), saved(whole))


def test_ranks_may_have_had_other_runs_before(runs):
    """ZeRO 3 leaves another linear function behind, ZeRO 2 depends on the order of gradients: here half of the replicas
    have had the one before the other."""
    shards = DEFAULTS | {"parallel.data": 2, "parallel.zero_stage": 3}
    single = runs.single(shards)
    runs.train(shards, "shards")
    both = runs.train(DEFAULTS | {"parallel.tensor": 2, "parallel.data": 2, "parallel.zero_stage": 2}, "both")
    assert_within(worst(both.steps(), single.steps()), TOLERANCES["float32"], "loss and gradient norm")


def saved(run: Run) -> dict[str, torch.Tensor]:
    files = sorted(ckpt.find(run.folder).glob("*.safetensors"))
    return {f"{path.name} {name}": tensor for path in files for name, tensor in load_file(path).items()}


def test_every_pair_occurs():
    """Or no combination has it: that is found by trying them all."""
    occurs = {pair for combination in COVERING for pair in pairs(combination)}
    for pair in every_pair(OPTIONS):
        if pair not in occurs:
            assert complete(OPTIONS, [*REFUSED, LARGE], dict(pair), random.Random(0)) is None, pair
    for combination in COVERING:
        assert not any(rule.broken(combination) for rule in REFUSED)


def verdict(combination: Combination, told: bool) -> str | None:
    """The line that refuses it before anything starts, if one does; ``told`` how many replicas there are, or with as
    many ranks as they need."""
    values = settings(Path("data"), Path("run"), STEPS, overrides_of(combination))
    count = ranks_of(values)
    if not told:
        del values["parallel"]["data"]
    try:
        check_world(parse_config(values, "a test"), count, torch.device("cpu"))
    except ValueError as error:
        return str(error)
    return None


def neighbours() -> Iterator[Combination]:
    """Combinations that run, with one value changed, also to one that hardly ever fits; then two."""
    values = {name: (*OPTIONS.get(name, ()), *ODD.get(name, ())) for name in {**OPTIONS, **ODD}}
    changes = [(name, value) for name in values for value in values[name]]
    rng = random.Random(3)
    for combination in COVERING:
        for name, value in changes:
            yield combination | {name: value}
            yield combination | dict(rng.sample(changes, 2)) | {name: value}


@pytest.mark.parametrize("told", [True, False], ids=["replicas told", "replicas counted"])
def test_the_configuration_refuses_just_these(told):
    alone = set()
    for combination in neighbours():
        line, broken = verdict(combination, told), [rule for rule in REFUSED if rule.broken(combination)]
        if line is None or not broken:
            assert line is None and not broken, f"{line} for {combination}, broken: {[r.reason for r in broken]}"
            continue
        assert "\n" not in line
        assert any(re.search(rule.reason, line) for rule in broken), f"{line} for {combination}"
        if len(broken) == 1:
            alone.add(broken[0].reason)
    assert alone == {rule.reason for rule in REFUSED}, "each is a reason of its own"


def test_the_documentation_has_what_is_refused():
    page = (Path(farspan.__file__).parent / "docs/layout-contract.md").read_text(encoding="utf-8")
    table = page.partition("| refused | because |\n|---|---|\n")[2].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()]
    for cell, rule in zip(cells, DOCUMENTED, strict=True):
        assert {*re.findall(r"`(\w+\.\w+)`", cell)} <= {*rule.options}, cell
