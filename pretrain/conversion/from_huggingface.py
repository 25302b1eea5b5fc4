"""From a Hugging Face folder to a checkpoint of weights, on one CPU, a tensor at a time."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from ..models.huggingface_keys import sources
from .huggingface_folder import HuggingFaceFolder
from .imported import Imported, logical_shapes, write_imported
from .renaming import logical_tensors


def read_model(path: Path) -> Imported:
    """The model of a Hugging Face folder; ValueError where it is none that is trained here."""
    folder = HuggingFaceFolder(path)
    cls, config, heads = folder.model()
    shapes, keys = logical_shapes(cls, config, heads), cls.huggingface_keys(config, heads)
    dtypes = {
        name: functools.reduce(torch.promote_types, [folder.dtype(source.tensor) for source in sources(of_one)])
        for name, of_one in keys.items()
    }

    def read(name: str) -> Tensor:
        return logical_tensors(folder.tensor, {name: keys[name]}, shapes)[name]

    origin = {
        "config": folder.config,
        "aliases": sorted(folder.keys() & set(cls.huggingface_aliases(config, heads))),
        "constants": sorted(folder.keys() & set(cls.huggingface_constants(config, heads))),
    }
    return Imported(cls, config, heads, read, dtypes, path, origin, cls.import_note(folder.config))


def from_huggingface(folder: str | Path, out: str | Path) -> str | None:
    """Write a Hugging Face folder as a checkpoint of weights, to convert back or to start from
    (``checkpoint.initialize_from``).  ``out`` must not exist, or be empty.  Returns what is peculiar in the folder, if
    anything."""
    model = read_model(Path(folder))
    write_imported(model, Path(out))
    return model.note
