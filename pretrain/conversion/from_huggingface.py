"""From a Hugging Face folder to a checkpoint of weights, on one CPU."""

from __future__ import annotations

from pathlib import Path

from .huggingface_folder import HuggingFaceFolder
from .imported import Imported, write_imported


def from_huggingface(folder: str | Path, out: str | Path) -> str | None:
    """Write a Hugging Face folder as a checkpoint of weights, to convert back or to start from
    (``checkpoint.initialize_from``).  ``out`` must not exist, or be empty.  Returns what is peculiar in the folder, if
    anything."""
    source = HuggingFaceFolder(Path(folder))
    cls, config, heads = source.model()
    tensors = source.logical_tensors(cls, config, heads)
    origin = {
        "config": source.config,
        "aliases": sorted(source.keys() & set(cls.huggingface_aliases(config, heads))),
        "constants": sorted(source.keys() & set(cls.huggingface_constants(config, heads))),
    }
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    model = Imported(cls, config, heads, tensors.__getitem__, dtypes, source.folder, origin)
    write_imported(model, Path(out))
    return cls.import_note(source.config)
