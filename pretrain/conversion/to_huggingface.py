"""From a checkpoint of any layout to a Hugging Face folder, on one CPU: a table of keys per architecture, exact."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint as ckpt
from ..files import new_folder, sync, write_json
from ..models.base import LanguageModel
from ..models.config import ModelConfig
from ..models.own_code import OwnCode
from .imported import copy_tokenizer, logical_shapes
from .model import model_of
from .renaming import rename

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def to_huggingface(
    checkpoint: str | Path, out: str | Path, dtype: str | None = None, *, stock: bool = False
) -> str | None:
    """Write a checkpoint as a Hugging Face folder: config.json, model.safetensors, tokenizer files, and where stock
    transformers lacks the architecture or computes something else its modelling files.

    ``checkpoint``: a step folder, or a run (its latest).  ``dtype``: float32, bfloat16 or float16; as saved by default.
    ``stock``: for the stock classes, without modelling files; ValueError where these would give other logits.
    ``out`` must not exist, or be empty; it appears whole or not at all.  Returns what to know when loading it, if
    anything.
    """
    folder, target = ckpt.find(Path(checkpoint)), Path(out)
    reader = ckpt.Reader(folder)
    cls, config, heads = model_of(reader.manifest, folder)
    code = None if stock else cls.own_code
    if stock and (difference := cls.stock_difference(config)):
        raise ValueError(
            f"the stock {cls.name} classes of transformers would give other logits ({difference}): export without "
            "--stock, which brings modelling files that are right"
        )
    cast = _dtype(dtype) if dtype else None
    logical = {name: reader.tensor(name, shape) for name, shape in logical_shapes(cls, config, heads).items()}
    if cast is not None:
        logical = {name: value.to(cast) if value.is_floating_point() else value for name, value in logical.items()}
    tensors = rename(logical, cls.huggingface_keys(config, heads))
    kind = next(iter(tensors.values())).dtype
    imported = reader.manifest.huggingface
    for alias in _exported_aliases(cls, config, heads, imported):
        tensors[alias] = tensors[cls.huggingface_aliases(config, heads)[alias]].clone()
    constants = cls.huggingface_constants(config, heads)
    tensors |= {name: constants[name] for name in imported.get("constants", constants)}
    origin = imported.get("config", {})
    with new_folder(target) as beside:
        ckpt.write_tensors(beside / "model.safetensors", tensors, {"format": "pt"})
        write_json(beside / "config.json", export_config(cls, config, heads, origin, kind, code))
        for file in [] if code is None else code.files():
            shutil.copyfile(file, beside / file.name)
            sync(beside / file.name)
        copy_tokenizer(folder / "tokenizer", beside)
    if code is not None:
        return "load it with from_pretrained(folder, trust_remote_code=True): its modelling files are in it"
    return cls.stock_note(config)


def export_config(
    cls: type[LanguageModel],
    config: ModelConfig,
    heads: tuple[str, ...],
    source: Mapping[str, Any],
    dtype: torch.dtype,
    code: OwnCode | None,
) -> dict[str, Any]:
    """The config.json of an export: ours over the fields of the folder it came from, if it came from one (which leaves
    out what every configuration has by default); what is not applied as it came."""
    fields = dict(source)
    for name, value in config.model_dump().items():
        if name in cls.unapplied_fields and name in source:
            continue
        missing = value == cls.config_class.model_fields[name].default and (source or value is None)
        if name in fields or not missing:
            fields[name] = value
    fields.setdefault("architectures", [cls.huggingface_class(heads, config)])
    fields["torch_dtype"] = str(dtype).removeprefix("torch.")
    fields.pop("dtype", None)
    fields.pop("auto_map", None)
    if code is not None:
        fields["auto_map"] = code.auto_map
        if code.needed or cls.stock_difference(config):
            fields["model_type"] = code.model_type
    return fields


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r} is unknown: choose one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _exported_aliases(
    cls: type[LanguageModel], config: ModelConfig, heads: tuple[str, ...], origin: Mapping[str, Any]
) -> list[str]:
    """Which second names an export carries: those of the folder it came from; for a model trained here none, but for
    untied embeddings, where transformers 5 reads the decoder's own bias and 4 the head's."""
    if origin:
        return list(origin["aliases"])
    return [] if config.tie_word_embeddings else list(cls.huggingface_aliases(config, heads))
