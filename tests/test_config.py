from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

import farspan
from farspan.kernels.activation import ACTIVATIONS
from farspan.launch.cli import main
from farspan.pretrain.config import Config, Section, check_world
from farspan.pretrain.config_file import load_config
from farspan.pretrain.models import ARCHITECTURES
from farspan.pretrain.models.dense_attention import DenseAttentionConfig

BASE: dict[str, Any] = {
    "run_dir": "runs/a",
    "model": {
        "model_type": "roberta-prelayernorm", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 96,
    },
    "data": {"folder": "data/a"},
}  # fmt: skip
SECTIONS = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


def test_values_of_the_file_and_overrides(file: Path) -> None:
    overrides = ["optimizer.lr=3e-4", "model.hidden_act=gelu_new", "evaluation.interval=5", "logging.tensorboard=false"]
    config = load_config(file, [*overrides, "training.steps=10", "training.steps=20", "parallel.data=4"])
    assert (config.model.hidden_size, config.model.num_hidden_layers) == (64, 2)
    assert (config.optimizer.lr, config.model.hidden_act, config.evaluation.interval) == (3e-4, "gelu_new", 5)
    assert config.logging.tensorboard is False
    assert config.training.steps == 20  # the last one wins
    assert config.parallel.data == 4
    assert config.model.model_fields_set >= {"hidden_act", "hidden_size"}
    assert "vocab_size" not in config.model.model_fields_set


def test_a_path_with_an_equals_sign(file: Path) -> None:
    assert load_config(file, ["run_dir=runs/lr=1"]).run_dir == "runs/lr=1"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_saved_loads_equal(name: str, file: Path, tmp_path: Path) -> None:
    overrides = [f"model={{model_type: {name}}}", "optimizer.lr=1e-20", "run_dir=runs/ünïcode", "parallel.data=2"]
    config = load_config(file, overrides)
    saved = tmp_path / "saved.yaml"
    saved.write_text(config.to_yaml(), encoding="utf-8")
    again = load_config(saved)
    assert again == config
    assert again.to_yaml() == config.to_yaml()
    assert set(yaml.safe_load(config.to_yaml())) == set(Config.model_fields)
    assert type(again.model) is ARCHITECTURES[name].config_class


def test_print_config(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(file), "--print-config", "training.steps=7", "model.layer_norm_eps=1e-6"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["training"]["steps"] == 7
    assert printed["model"]["layer_norm_eps"] == 1e-6
    assert printed["schedule"]["name"] == "linear"  # defaults are said too
    assert main(["train", str(file), "--print-config", "training.steps=0"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"farspan: {file}: training.steps = 0: must be greater than 0\n"


def test_nothing_changes_after_the_start(file: Path) -> None:
    config = load_config(file)
    for part in (config, *(getattr(config, name) for name in (*SECTIONS, "model"))):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, next(iter(type(part).model_fields)), 1)


# Keys.


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        *((f"{section}.{field[:-1]}x=1", f"{section}.{field}") for section, cls in SECTIONS.items()
          for field in cls.model_fields if len(field) > 4 and field not in ("beta1", "beta2")),
        *((f"model.{field[:-1]}x=1", f"model.{field}") for field in DenseAttentionConfig.model_fields),
        ("traning.steps=1", "training"),
        ("modle.hidden_size=1", "model"),
        ("rundir=a", "run_dir"),
        ("optimizer.betas=1", "optimizer.beta2"),
        ("training.lr=1", "optimizer.lr"),  # the right name in the wrong section
        ("model.warmup_steps=1", "schedule.warmup_steps"),
        ("hidden_size=1", "model.hidden_size"),
    ],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest(override: str, meant: str, file: Path) -> None:
    key = override.partition("=")[0]
    shown = key if "." not in key or key.split(".")[0] in (*SECTIONS, "model") else key.split(".")[0]
    assert refused(file, override) == f"{file}: unknown key {shown}: did you mean {meant}?"


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(path, list(overrides))
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert "\n" not in message
    assert "Value error" not in message
    assert "pydantic" not in message
    return message


# Values.  Each: what is set, and what the one line says of it.

MEGATRON = "model.model_type=megatron-bert"
MEGA = "model={model_type: mega, num_hidden_layers: 2, normalization_type: batchnorm}"
REFUSED: list[tuple[list[str], str]] = [
    # One value.
    (["training.steps=0"], "training.steps = 0: must be greater than 0"),
    (["training.steps=many"], "training.steps = 'many': must be a valid integer, unable to parse string as an integer"),
    (["training.steps="], "training.steps = None: must be a valid integer"),
    (["training.dtype=float8"], "training.dtype = 'float8': must be 'float32', 'bfloat16' or 'float16'"),
    (["training.seed=9223372036854775808"],
     "training.seed = 9223372036854775808: must be less than 9223372036854775808"),
    (["parallel.zero_stage=4"], "parallel.zero_stage = 4: must be 0, 1, 2 or 3"),
    (["optimizer.lr=.nan"], "optimizer.lr = nan: must be a finite number"),
    (["schedule.name=step"], "schedule.name = 'step': must be 'linear', 'cosine', 'wsd' or 'constant'"),
    (["data.rows=ragged"], "data.rows = 'ragged': must be 'packed', 'padded' or 'pairs'"),
    (["logging=3"], "logging = 3: must be a section of keys, fill it or leave it out"),
    (["training.steps=0", "training.seed=-1", "optimizer.lr=0"],
     "training.steps = 0: must be greater than 0 (and 2 more problems)"),
    # The model.
    (["model.model_type=bert"],
     "model.model_type 'bert' is unknown: choose one of mega, megatron-bert, mra, nystromformer, roberta-prelayernorm"),
    (["model={hidden_size: 3}"],
     "model.model_type is missing: set it to one of mega, megatron-bert, mra, nystromformer, roberta-prelayernorm"),
    (["model.model_type=[]"],
     "model.model_type is []: set it to one of mega, megatron-bert, mra, nystromformer, roberta-prelayernorm"),
    (["model.hidden_size=65"],
     "model.hidden_size 65 does not divide by num_attention_heads 4: set one to fit the other"),
    (["model.hidden_act=gelo"], f"model.hidden_act 'gelo' is unknown: choose one of {', '.join(ACTIVATIONS)}"),
    (["model.hidden_dropout_prob=1"], "model.hidden_dropout_prob = 1: must be less than 1"),
    (["model.pad_token_id=-1"], "model.pad_token_id = -1: must be greater than or equal to 0"),
    (["model.pad_token_id=null"], "model.pad_token_id = None: must be a valid integer"),
    (["model.vocab_size=20", "model.pad_token_id=20"], "model.pad_token_id 20 is not below vocab_size 20: lower it"),
    (["model.pad_token_id=511"],
     "model.max_position_embeddings 512 leaves no position: they are counted from pad_token_id 511 + 1, raise it"),
    # Model and objective.
    (["objective.name=mln"], "objective.name 'mln' is unknown: choose one of mlm, clm, mlm+nsp, mlm+sop"),
    (["objective.mask_fraction=0.95"],
     "objective.mask_fraction 0.95 + random_fraction 0.1 exceeds 1: lower one"),
    (["objective.name=clm"],
     "objective.name clm needs model.is_decoder true, it is false: set one to fit the other"),
    (["model.is_decoder=true"],
     "objective.name mlm needs model.is_decoder false, it is true: set one to fit the other"),
    (["objective.name=mlm+nsp", "data.rows=pairs"],
     "objective.name mlm+nsp needs the nsp head, which roberta-prelayernorm does not have: "
     "set another objective or architecture"),
    (["data.rows=pairs"],
     "objective.name mlm needs data.rows packed or padded, it is pairs: set one to fit the other"),
    ([MEGATRON, "objective.name=mlm+nsp"],
     "objective.name mlm+nsp needs data.rows pairs, it is packed: set one to fit the other"),
    ([MEGATRON, "objective.name=mlm+nsp", "data.rows=pairs", "model.type_vocab_size=1"],
     "data.rows pairs needs model.type_vocab_size of at least 2, it is 1: raise it"),
    (["data.sequence_length=511"],  # RoBERTa's positions start after the padding's
     "data.sequence_length 511 is longer than the model's positions (510): "
     "lower it or raise model.max_position_embeddings"),
    ([MEGATRON, "data.sequence_length=513"],
     "data.sequence_length 513 is longer than the model's positions (512): "
     "lower it or raise model.max_position_embeddings"),
    # The layout.
    (["parallel.tensor=3"],
     "model.num_attention_heads 4 does not divide by parallel.tensor 3: set parallel.tensor to a divisor"),
    (["parallel.tensor=2", "model.intermediate_size=95"],
     "model.intermediate_size 95 does not divide by parallel.tensor 2: set parallel.tensor to a divisor"),
    (["parallel.pipeline=3"],
     "parallel.pipeline 3 exceeds model.num_hidden_layers 2: set at most that, a stage needs a layer"),
    *(([f"parallel.zero_stage={stage}", "parallel.pipeline=2"],
       f"parallel.zero_stage {stage} does not go with parallel.pipeline 2 (gradients of all microbatches are needed at "
       "once): set zero_stage to 0 or 1, or pipeline to 1") for stage in (2, 3)),
    (["parallel.data=33"],
     "training.global_batch_size 32 leaves some of 33 data ranks without a row: set at least 33, or parallel.data to "
     "fewer"),
    ([MEGA, "parallel.data=3"],
     "training.global_batch_size 32 does not make equal microbatches of training.micro_batch_size 8 on 3 data ranks, "
     "as a model needs whose rows depend on the others of their microbatch: set a multiple of 24"),
    (["parallel.sequence=true"],
     "parallel.sequence splits over the tensor ranks and parallel.tensor is 1: raise it, or leave sequence out"),
    (["parallel.tensor=2", "parallel.sequence=true", "data.sequence_length=31"],
     "data.sequence_length 31 does not divide by parallel.tensor 2, as parallel.sequence needs: set a multiple"),
    (["parallel.virtual_stages=2"],
     "parallel.virtual_stages 2 interleaves over pipeline ranks and parallel.pipeline is 1: "
     "raise it, or leave virtual_stages out"),
    (["parallel.virtual_stages=2", "parallel.pipeline=2"],
     "parallel.pipeline 2 × virtual_stages 2 exceeds model.num_hidden_layers 2: "
     "set at most that, a stage needs a layer"),
    (["parallel.virtual_stages=2", "parallel.pipeline=2", "model.num_hidden_layers=4", "parallel.data=17"],
     "training.global_batch_size 32 leaves 1 to some of 17 data ranks, and the interleaved schedule needs "
     "parallel.pipeline 2 microbatches on each: set at least 34"),
    (["parallel.offload_optimizer=true", "parallel.zero_stage=0"],
     "parallel.offload_optimizer is part of ZeRO and parallel.zero_stage is 0: set zero_stage to 1, 2 or 3"),
    (["parallel.offload_optimizer=true", "parallel.zero_stage=2", "training.dtype=float16"],
     "parallel.offload_optimizer with parallel.zero_stage 2 makes DeepSpeed add up the gradients of microbatches in "
     "training.dtype float16: set zero_stage to 1 or 3, or dtype to float32"),
    (["parallel.offload_optimizer=true", "optimizer.name=lamb"],
     "parallel.offload_optimizer updates with DeepSpeed's CPU Adam, optimizer.name is lamb: "
     "set adamw, or leave offload_optimizer out"),
    (["training.batch_ramp={start: 12, increment: 8, samples: 100}"],
     "training.batch_ramp: a batch ramp from 12 by 8 does not arrive at 32: set start below "
     "training.global_batch_size, "
     "and an increment that divides the difference"),
    (["training.batch_ramp={start: 12, increment: 4, samples: 100}", "parallel.data=16"],
     "training.batch_ramp's size 12 leaves some of 16 data ranks without a row: set at least 16, or parallel.data to "
     "fewer"),
    # The schedule.
    (["schedule.warmup_steps=1001"],
     "schedule: 1001 warm-up steps do not fit: set 0 to 1000, the number of training steps"),
    (["schedule.name=wsd"],
     "schedule: schedule wsd needs decay_steps, the length of its last phase (a tenth of all is usual)"),
    (["schedule.decay_steps=5"], "schedule: decay_steps belongs to schedule wsd; schedule linear takes none"),
    (["schedule.name=wsd", "schedule.decay_steps=901", "schedule.warmup_steps=100"],
     "schedule: 100 warm-up steps and 901 decay steps exceed the 1000 training steps: shorten one of them"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=lambda value: str(value[0] if value else ""))
def test_what_does_not_fit_is_one_line(overrides: list[str], message: str, file: Path) -> None:
    assert refused(file, *overrides) == f"{file}: {message}"


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.tensor=4", "parallel.pipeline=2", "parallel.zero_stage=1", "parallel.data=4"],
        ["parallel.zero_stage=3", "parallel.data=2"],
        [MEGATRON, "objective.name=mlm+nsp", "data.rows=pairs", "data.sequence_length=512"],
        ["objective.name=clm", "model.is_decoder=true", "data.rows=padded", "data.sequence_length=510"],
        ["model.position_embedding_type=relative_key", "data.sequence_length=512"],
        ["schedule.name=wsd", "schedule.decay_steps=900", "schedule.warmup_steps=100"],
        ["schedule.warmup_steps=1000", "training.dtype=bfloat16", "checkpoint.initialize_from=runs/b"],
    ],
)
def test_what_fits_is_taken(overrides: list[str], file: Path) -> None:
    load_config(file, overrides)


# Files and overrides that cannot be read.


@pytest.mark.parametrize("override", ["training.steps", "=3", ".steps=3", "training..steps=3", "training.steps.=3"])
def test_an_override_that_is_none(override: str, file: Path) -> None:
    assert refused(file, override) == f"override {override!r} is not of the form section.key=value"


def test_an_override_below_a_value(file: Path) -> None:
    assert refused(file, "run_dir.x=3") == "override 'run_dir.x=3': run_dir is not a section"
    assert refused(file, "training.steps=[1") == "override 'training.steps=[1': '[1' is not a YAML value"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1\nb: 2", "is not YAML: while parsing a flow sequence"),
        (b"\xff\xfe\x00", "is not YAML: 'utf-8' codec"),
        (b"- 1", "is not a mapping of sections: see configs/ for examples"),
        (b"", "is not a mapping of sections: see configs/ for examples"),
        (b"training: {steps: 1}\ntraining: {seed: 1}", "is not YAML: training is given twice"),
        (b"training:\n  steps: 1\n  steps: 2", "is not YAML: steps is given twice"),
        (b"run_dir: a", "model is missing: set it (and 1 more problem)"),
        (b"run_dir: a\nmodel: {model_type: megatron-bert}\ndata:", "data = None: must be a section of keys"),
        (b"a: !!python/object/apply:os.getcwd []", "is not YAML: could not determine a constructor"),
    ],
)
def test_a_file_that_cannot_be_read(content: bytes, message: str, file: Path) -> None:
    file.write_bytes(content)
    assert message in refused(file)
    assert str(file) in refused(file)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        assert refused(path) == f"{path} is no file: give the path of a configuration, such as one in configs/"


# What only the start shows.

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("overrides", "ranks", "data"),
    [([], 1, 1), ([], 4, 4), (["parallel.tensor=2", "parallel.pipeline=2"], 8, 2), (["parallel.data=2"], 2, 2)],
)
def test_ranks_that_fit(overrides: list[str], ranks: int, data: int, file: Path) -> None:
    assert check_world(load_config(file, overrides), ranks, CPU) == data


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        (["parallel.tensor=2"], 3,
         "3 ranks do not make parallel.tensor 2 × pipeline 1: start a multiple of 2 ranks, or change the parallel "
         "section"),
        (["parallel.data=2", "parallel.tensor=2"], 2,
         "2 ranks do not make parallel.tensor 2 × pipeline 1 × data 2: start 4 ranks, or change the parallel section"),
        ([], 33,
         "training.global_batch_size 32 leaves some of 33 data ranks without a row: set at least 33, or parallel.data "
         "to fewer"),
        (["evaluation.interval=1", "evaluation.rows=1"], 2,
         "evaluation.rows 1 leaves some of 2 data ranks without a row: set at least 2, or parallel.data to fewer"),
    ],
)  # fmt: skip
def test_ranks_that_do_not_fit(overrides: list[str], ranks: int, message: str, file: Path) -> None:
    with pytest.raises(ValueError, match="ranks") as caught:
        check_world(load_config(file, overrides), ranks, CPU)
    assert str(caught.value) == message


def test_rows_of_an_evaluation_that_never_comes_do_not_matter(file: Path) -> None:
    assert check_world(load_config(file, ["evaluation.rows=40"]), 2, CPU) == 2


def test_a_dtype_that_the_device_lacks(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank asks its own device."""
    devices = {0: ("H100", (9, 0)), 1: ("Tesla V100", (7, 0)), 2: ("A100", (8, 0))}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: devices[device.index][1])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: devices[device.index][0])
    config = load_config(file, ["training.dtype=bfloat16"])
    for device in (CPU, torch.device("cuda", 0), torch.device("cuda", 2)):
        assert check_world(config, 1, device) == 1
    with pytest.raises(ValueError, match=r"training\.dtype bfloat16 is not supported by Tesla V100: set float32"):
        check_world(config, 1, torch.device("cuda", 1))
    assert check_world(load_config(file), 1, torch.device("cuda", 1)) == 1


# The tokenizer's sizes.


def test_the_tokenizer_fills_in_what_the_file_leaves_open(file: Path) -> None:
    model = load_config(file).with_vocabulary(1000, pad=3, bos=4, eos=5).model
    assert (model.vocab_size, model.pad_token_id, model.bos_token_id, model.eos_token_id) == (1000, 3, 4, 5)
    said = load_config(file, ["model.vocab_size=1024", "model.pad_token_id=3", "model.eos_token_id=9"])
    model = said.with_vocabulary(1000, pad=3, bos=4, eos=5).model
    assert (model.vocab_size, model.pad_token_id, model.bos_token_id, model.eos_token_id) == (1024, 3, 4, 9)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vocab_size=999", "model.vocab_size 999 is smaller than the tokenizer's 1000 in data/a: leave it out, "),
        ("model.pad_token_id=1", r"model.pad_token_id 1 is not the tokenizer's \(3\) in data/a: leave it out, "),
    ],
)
def test_sizes_that_are_not_the_tokenizers(override: str, message: str, file: Path) -> None:
    with pytest.raises(ValueError, match=message + "or prepare the data with another tokenizer"):
        load_config(file, [override]).with_vocabulary(1000, pad=3, bos=4, eos=5)


# No dead knobs: every key is read somewhere.

ROOT = Path(farspan.__file__).resolve().parent
# Hugging Face's fields that nothing computes with, kept for the config.json of an export.
PASSED_ON = {"bos_token_id", "eos_token_id"}


def attributes_read(*skip: str) -> Iterator[tuple[str, str]]:
    """(owner, attribute) of every attribute that the package reads: ("optimizer", "lr") of ``config.optimizer.lr``."""
    for folder in ("kernels", "parallel", "pretrain", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.relative_to(ROOT).as_posix() not in skip and "export" not in path.parts:  # files for others
                yield from owners_and_attributes(path.read_text(encoding="utf-8"))


def owners_and_attributes(source: str) -> Iterator[tuple[str, str]]:
    """Local names are followed: ``settings = config.optimizer``, ``a, b = config.training, config.checkpoint``."""
    tree = ast.parse(source)
    named: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=True))
            for name, section in pairs:
                if isinstance(name, ast.Name) and isinstance(section, ast.Attribute):
                    named[name.id] = section.attr
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            if isinstance(owner, ast.Attribute):
                yield owner.attr, node.attr
            elif isinstance(owner, ast.Name):
                yield named.get(owner.id, owner.id), node.attr


def dead_knobs(read: set[tuple[str, str]]) -> list[str]:
    dead = [f"{s}.{key}" for s, cls in SECTIONS.items() for key in cls.model_fields if (s, key) not in read]
    dead += [name for name in ("run_dir", "model", *SECTIONS) if ("config", name) not in read]
    names = {name for owner, name in read if owner in ("config", "self", "model")}
    fields = {key for architecture in ARCHITECTURES.values() for key in architecture.config_class.model_fields}
    return dead + sorted(f"model.{key}" for key in fields - names - PASSED_ON)


def test_every_key_is_read_somewhere() -> None:
    # parallel.data is compared with the number of ranks there, and decides nothing else; the sizes of the batches are
    # read there into one object, training.batch_sizes, and so is data.skip, config.batch_sizes.
    assert ("training", "batch_sizes") in set(attributes_read("pretrain/config.py"))
    here = set(owners_and_attributes((ROOT / "pretrain/config.py").read_text(encoding="utf-8")))
    sizes = {
        ("training", name) for owner, name in here if owner == "self" and name in ("global_batch_size", "batch_ramp")
    }
    assert ("config", "batch_sizes") in set(attributes_read("pretrain/config.py"))
    own = (here & {("parallel", "data"), ("self", "skip")}) | sizes
    own |= {("data", "skip")} & {("data" if owner == "self" else owner, name) for owner, name in own}
    read = set(attributes_read("pretrain/config.py")) | own
    assert dead_knobs(read) == [], "set in a configuration, but nothing reads it"


def test_the_search_for_dead_knobs_sees_one() -> None:
    read = set(
        attributes_read("pretrain/config.py", "pretrain/train.py", "pretrain/run.py", "pretrain/models/mega/model.py")
    )
    dead = dead_knobs(read)
    assert {"logging.tensorboard", "schedule.warmup_steps", "model.nffn_activation_dropout_prob"} <= set(dead)
    assert not {"optimizer.beta1", "model.layer_norm_eps"} & set(dead)
    assert len(SECTIONS) == len(Config.model_fields) - 2  # but run_dir and model
    assert set(owners_and_attributes("def f(c):\n    a, b = c.optimizer, c.data\n    return a.lr + b.x.y")) == {
        ("c", "optimizer"), ("c", "data"), ("optimizer", "lr"), ("data", "x"), ("x", "y"),
    }  # fmt: skip
