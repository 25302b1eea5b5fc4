"""A model from elsewhere, tensor by tensor, and the checkpoint of weights that is made of it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...parallel.mesh import Mesh
from ...parallel.parts import Part
from ...parallel.sharding import logical_of
from .. import checkpoint as ckpt
from ..files import new_folder, sync
from ..models.base import LanguageModel, Stage
from ..models.config import ModelConfig
from ..provenance import written_by

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt",
    "added_tokens.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
)  # fmt: skip
_FILE = "weights-00000.safetensors"


@dataclasses.dataclass(frozen=True)
class Imported:
    """A model from elsewhere.

    ``read``: the whole logical tensor of a name, read when it is asked for; ``dtypes``: of every one.  ``tokenizer``: a
    folder whose tokenizer files go with it.  ``huggingface``: config.json, second names and constants of the Hugging
    Face folder that it comes from.  ``note``: what is peculiar in the source.
    """

    cls: type[LanguageModel]
    config: ModelConfig
    heads: tuple[str, ...]
    read: Callable[[str], Tensor]
    dtypes: Mapping[str, torch.dtype]
    tokenizer: Path | None = None
    huggingface: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every logical tensor."""
        return logical_shapes(self.cls, self.config, self.heads)


def build(cls: type[LanguageModel], config: ModelConfig, heads: tuple[str, ...]) -> LanguageModel:
    """The whole model on one CPU process, its parameters not yet filled."""
    return cls(config, Mesh.solo(), stage=Stage.whole(config), heads=heads)


def logical_shapes(cls: type[LanguageModel], config: ModelConfig, heads: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The shape of every logical tensor of a model; takes no memory."""
    with torch.device("meta"):
        return {name: logical_of(p).shape for name, p in build(cls, config, heads).named_parameters()}


def write_imported(model: Imported, out: Path) -> None:
    """Write it as a checkpoint of weights, a tensor at a time.  ``out`` must not exist, or be empty; it appears whole
    or not at all.  OSError where it cannot be written."""
    shapes = model.shapes()
    tensors = {
        name: ckpt.Entry(shape, {"weight": model.dtypes[name]}, {"weight": (ckpt.Shard(_FILE, Part.whole(shape)),)})
        for name, shape in shapes.items()
    }
    with new_folder(out) as beside:
        about = ckpt.write_stream(
            beside / _FILE, {name: (model.dtypes[name], shape) for name, shape in shapes.items()}, model.read
        )
        tokenizer = tokenizer_files(model.tokenizer)
        copied = ckpt.copy_checked(tokenizer, beside / ckpt.TOKENIZER) if tokenizer else {}
        ckpt.Manifest(
            step=0,
            model=model.config.model_dump(),
            heads=model.heads,
            tensors=tensors,
            files={_FILE: about},
            tokenizer=copied,
            huggingface=dict(model.huggingface),
            written_by=written_by(),
        ).write(beside)


def copy_tokenizer(source: Path, target: Path) -> None:
    for file in tokenizer_files(source):
        shutil.copyfile(file, target / file.name)
        sync(target / file.name)


def tokenizer_files(folder: Path | None) -> list[Path]:
    """The files of a tokenizer that a folder has."""
    return [] if folder is None else [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
