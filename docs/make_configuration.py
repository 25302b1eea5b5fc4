"""Writes docs/configuration.md from the schema of the configuration:

python docs/make_configuration.py            writes the page
python docs/make_configuration.py --check    exits 1 where the page is not what would be written
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import torch
import yaml
from pydantic.fields import FieldInfo

from farspan.kernels.activation import ACTIVATIONS
from farspan.pretrain.config import Config, Section, check_world
from farspan.pretrain.config_file import parse_config
from farspan.pretrain.models import ARCHITECTURES
from farspan.pretrain.models.config import ModelConfig
from farspan.pretrain.objectives import OBJECTIVES

PAGE = Path(__file__).with_name("configuration.md")

HEAD = """\
# Configuration

<!-- Written by docs/make_configuration.py: change the fields' descriptions in the code, then run it. -->

A run is one YAML file of sections, and overrides `section.key=value` on the command line, whose values are YAML too:

    farspan train configs/roberta-prelayernorm-base-mlm.yaml data.folder=data/mine run_dir=runs/mine optimizer.lr=3e-4

`farspan train CONFIG --print-config` prints every key with its value and stops. Everything on this page is checked
before a rank starts; what is wrong is said in one line, with exit code 2. An unknown key is an error that names the
nearest known one; so is a key given twice. Nothing changes a configuration after the start: the resolved one is
`config.yaml` in the run folder and is part of every checkpoint.

`run_dir`, `model.model_type` and `data.folder` are required; everything else has a default. In the tables `null` means
not set.
"""

REFUSED_HEAD = """\
## What must fit together

Each line is what Farspan says when these values are set (in a file that is otherwise right, and where ranks are
named, on so many).

"""

# A right file, and what makes it wrong.
RIGHT = """
run_dir: runs/mine
model: {model_type: megatron-bert, num_hidden_layers: 4}
data: {folder: data/mine}
"""
# Keys whose values are the names of a table.
TABLES: Mapping[str, Any] = {
    "model.model_type": sorted(ARCHITECTURES),
    "model.hidden_act": ACTIVATIONS,
    "model.activation": ACTIVATIONS,
    "objective.name": OBJECTIVES,
}
REFUSED: tuple[Mapping[str, Any], ...] = (
    {"model.model_type": "bert"},
    {"model.hidden_size": 1000},
    {"model.hidden_act": "gleu"},
    {"model.is_decoder": True},
    {"model.model_type": "mega", "objective.name": "clm", "model.is_decoder": True},
    {"model.model_type": "mega", "model.use_chunking": True},
    {"model.model_type": "mega", "model.shared_representation_size": 33},
    {"model.model_type": "mega", "model.relative_positional_bias": "simple", "model.chunk_size": 4096},
    {"model.model_type": "mega", "model.relative_positional_bias": "simple", "data.sequence_length": 4096},
    {"model.model_type": "mega", "model.add_cross_attention": True},
    {"model.model_type": "mega", "model.normalization_type": "batchnorm", "parallel.zero_stage": 3},
    {"model.model_type": "mra", "objective.name": "clm", "model.is_decoder": True},
    {"model.model_type": "mra", "model.attention_probs_dropout_prob": 0.1},
    {"model.model_type": "nystromformer", "model.num_landmarks": 512, "model.segment_means_seq_len": 64},
    {"model.model_type": "nystromformer", "model.conv_kernel_size": 64},
    {"objective.name": "clm"},
    {"objective.name": "mlm+nsp"},
    {"objective.name": "mlm+nsp", "data.rows": "pairs", "model.type_vocab_size": 1},
    {"objective.name": "mlm+nsp", "data.rows": "pairs", "model.model_type": "roberta-prelayernorm"},
    {"objective.mask_fraction": 0.8, "objective.random_fraction": 0.3},
    {"data.sequence_length": 1024},
    {"schedule.warmup_steps": 2000},
    {"schedule.name": "wsd"},
    {"schedule.decay_steps": 100},
    {"parallel.tensor": 3},
    {"parallel.pipeline": 8},
    {"parallel.pipeline": 2, "parallel.zero_stage": 2},
    {"parallel.data": 33},
    {"model.model_type": "mega", "model.normalization_type": "batchnorm", "parallel.data": 3},
    {"parallel.sequence": True},
    {"parallel.sequence": True, "parallel.tensor": 16, "data.sequence_length": 100},
    {"parallel.virtual_stages": 2},
    {"parallel.virtual_stages": 4, "parallel.pipeline": 2},
    {"parallel.virtual_stages": 2, "parallel.pipeline": 2, "training.global_batch_size": 1, "ranks": 2},
    {"parallel.offload_optimizer": True, "parallel.zero_stage": 0},
    {"parallel.offload_optimizer": True, "parallel.zero_stage": 2, "training.dtype": "bfloat16"},
    {"parallel.offload_optimizer": True, "optimizer.name": "lamb"},
    {"training.batch_ramp": {"start": 8, "increment": 16, "samples": 1000}},
    {"training.batch_ramp": {"start": 4, "increment": 4, "samples": 1000}, "ranks": 6},
    {"parallel.tensor": 2, "ranks": 3},
    {"parallel.data": 2, "ranks": 4},
    {"evaluation.interval": 10, "evaluation.rows": 1, "ranks": 2},
    {"checkpoint.keep_best": 1},
    {"spikes.action": "rollback"},
    {"spikes.patience": 40},
)


def page() -> str:
    parts = [HEAD, _table("## run", "The run as a whole.", _rows({"run_dir": [(Config.model_fields["run_dir"], "")]}))]
    for name, field in Config.model_fields.items():
        if name == "model":
            parts.append(_table("## model", _MODEL, _rows(_model_fields())))
        elif _is_section(field.annotation):
            parts.append(_table(f"## {name}", _text(field.annotation), _rows(_section_fields(name, field))))
    return "\n".join(parts) + "\n" + REFUSED_HEAD + "".join(map(_refused, REFUSED))


_MODEL = (
    "The architecture and its sizes, under the names of Hugging Face's config.json. Where architectures differ, their "
    "names stand beside the key or the default."
)


def _text(section: Any) -> str:
    return " ".join(str(section.__doc__).split())


Fields = Mapping[str, list[tuple[FieldInfo, str]]]  # key → its field, by architecture ("": there is one alone)


def _section_fields(name: str, field: FieldInfo) -> Fields:
    """Those of a section, and of the sections in it."""
    fields: dict[str, list[tuple[FieldInfo, str]]] = {}
    for key, inner in _kind(field)[0].model_fields.items():
        fields[f"{name}.{key}"] = [(inner, "")]  # of a section in a list, too, the keys follow
        if _is_section(_kind(inner)[0]):
            fields |= _section_fields(f"{name}.{key}", inner)
    return fields


def _kind(field: FieldInfo) -> tuple[Any, bool]:
    """The type of a key that is set (of a list: of what is in it), and whether it may be null."""
    if get_origin(field.annotation) is tuple:
        return get_args(field.annotation)[0], False
    if get_origin(field.annotation) not in (Union, types.UnionType):
        return field.annotation, False
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    assert len(kinds) == 1, f"{field.annotation}: say here what such a type may be"
    return kinds[0], True


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _model_fields() -> Fields:
    fields: dict[str, list[tuple[FieldInfo, str]]] = {}
    for name, architecture in sorted(ARCHITECTURES.items()):
        for key, field in architecture.config_class.model_fields.items():
            fields.setdefault(f"model.{key}", []).append((field, name))
    return fields


def _rows(fields: Fields) -> Iterator[tuple[str, ...]]:
    """Key, values, default, meaning: a row for all architectures whose field is the same but for the default."""
    for key, owners in fields.items():
        if key == "model.model_type":  # every architecture's own name
            owners = [(ModelConfig.model_fields["model_type"], "")]
        alike: dict[tuple[str, str], list[tuple[FieldInfo, str]]] = {}
        for field, owner in owners:
            allowed = " ".join(f"`{name}`" for name in TABLES[key]) if key in TABLES else values(field)
            alike.setdefault((allowed, _said(key, field)), []).append((field, owner))
        for (allowed, said), group in alike.items():
            some = len(owners) > len(group) or ("" not in {o for _, o in group} and len(group) < len(ARCHITECTURES))
            names = " (" + ", ".join(owner for _, owner in group) + ")" if some else ""
            yield f"`{key}`{names}", allowed, _defaults(group), said


def _said(key: str, field: FieldInfo) -> str:
    if not field.description:
        raise SystemExit(f"{key} has no description: give its Field one")
    return field.description


def values(field: FieldInfo) -> str:
    """What a key may be, in words and signs."""
    kind, nullable = _kind(field)
    optional = " or `null`" if nullable else ""
    if get_origin(field.annotation) is tuple:
        return "list of sections"
    if _is_section(kind):
        return "section" + optional
    if get_origin(kind) is Literal:
        return " ".join(f"`{value}`" for value in get_args(kind)) + optional
    word = {int: "integer", float: "number", str: "text", bool: "`true` `false`"}[kind]  # type: ignore[index]
    low, high = "", ""
    for bound in field.metadata:
        match bound:
            case annotated_types.MinLen(min_length=1):
                low = "not empty"
            case annotated_types.Gt(gt=limit):
                low = f"≥ {limit + 1}" if kind is int else f"> {_number(limit)}"  # type: ignore[operator]
            case annotated_types.Ge(ge=limit):
                low = f"≥ {_number(limit)}"
            case annotated_types.Lt(lt=limit):
                high = f"< {_number(limit)}"
            case annotated_types.Le(le=limit):
                high = f"≤ {_number(limit)}"
            case _:
                raise SystemExit(f"{bound}: say here what such a constraint means")
    return " ".join(filter(None, (word, ", ".join(filter(None, (low, high)))))) + optional


def _number(value: Any) -> str:
    power = int(value).bit_length() - 1
    return f"2^{power}" if value >= 1024 and value == 2**power else f"{value:.10g}"


def _defaults(group: list[tuple[FieldInfo, str]]) -> str:
    shown = [_default(field) for field, _ in group]
    common = max(sorted(set(shown)), key=shown.count)
    others = [f"{owner}: {text}" for text, (_, owner) in zip(shown, group, strict=True) if text != common]
    return "; ".join([common, *others])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return f"`{_flow(field.default)}`"


def _flow(value: Any) -> str:
    """A value as one would write it in YAML."""
    if isinstance(value, float):
        return f"{value:.10g}"
    return yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...").strip()


def _table(title: str, text: str, rows: Iterator[tuple[str, ...]]) -> str:
    head = ("key", "values", "default", "meaning")
    lines = [head, ("---",) * len(head), *(tuple(cell.replace("|", r"\|") for cell in row) for row in rows)]
    return f"{title}\n\n{text}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _refused(wrong: Mapping[str, Any]) -> str:
    given = " ".join(f"{key}={_flow(value)}" for key, value in wrong.items() if key != "ranks")
    ranks = f", {wrong['ranks']} ranks" if "ranks" in wrong else ""
    return f"- `{given}`{ranks}:<br>{refusal(wrong)}\n"


def refusal(wrong: Mapping[str, Any]) -> str:
    """What is said of a right file with these values in it."""
    file = yaml.safe_load(RIGHT)
    for key, value in wrong.items():
        section, _, name = key.partition(".")
        if name:
            file.setdefault(section, {})[name] = value
    try:
        config = parse_config(file, "run.yaml")
        check_world(config, wrong.get("ranks", 1), torch.device("cpu"))
    except ValueError as error:
        return str(error).removeprefix("run.yaml: ")
    raise SystemExit(f"{dict(wrong)} is not refused: change REFUSED")


def main() -> int:
    if sys.argv[1:] == ["--check"]:
        same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page()
        print("docs/configuration.md is up to date" if same else "run python docs/make_configuration.py")
        return 0 if same else 1
    if sys.argv[1:]:
        print(__doc__, file=sys.stderr)
        return 2
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
