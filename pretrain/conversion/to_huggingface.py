"""From a checkpoint of any layout to a Hugging Face folder, on one CPU: a table of keys per architecture, exact.

A stream: of the weights no more than one tensor of the export is in memory, and the portion of a file that it is read
by.  What is read is verified by its checksums.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...parallel.parts import Part
from .. import checkpoint as ckpt
from ..files import new_folder, sync, write_json, write_text
from ..models.base import LanguageModel
from ..models.config import ModelConfig
from ..models.own_code import OwnCode
from .imported import TOKENIZER_FILES, copy_tokenizer, logical_shapes
from .model import model_of
from .model_card import model_card
from .read_ahead import ReadAhead
from .renaming import Public, public_tensors

MAX_SHARD_SIZE = "5GB"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def to_huggingface(
    checkpoint: str | Path,
    out: str | Path,
    dtype: str | None = None,
    *,
    stock: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    check: Callable[[Path], None] | None = None,
) -> str | None:
    """Write a checkpoint as a Hugging Face folder: config.json, model.safetensors, a model card, tokenizer files, and
    where stock transformers lacks the architecture or computes something else its modelling files.

    ``checkpoint``: a step folder, or a run (its latest).  ``dtype``: float32, bfloat16 or float16; as saved by default.
    ``stock``: for the stock classes, without modelling files; ValueError where these would give other logits.
    ``max_shard_size``: bytes, or "500MB"; a larger model comes in several files and an index.  ``check``: is given the
    written folder before it gets its name, and raises where it is not to get it.  ``out`` must not exist, or be empty;
    it appears whole or not at all.  Returns what to know when loading it, if anything.
    """
    folder, target = ckpt.find(Path(checkpoint)), Path(out)
    largest = _bytes(max_shard_size)
    reader = ckpt.Reader(folder)
    cls, config, heads = model_of(reader.manifest, folder)
    code = None if stock else cls.own_code
    if stock and (difference := cls.stock_difference(config)):
        raise ValueError(
            f"the stock {cls.name} classes of transformers would give other logits ({difference}): export without "
            "--stock, which brings modelling files that are right"
        )
    tensors = _Tensors(reader, cls, config, heads, _dtype(dtype) if dtype else None)
    note = cls.stock_note(config) if code is None else None
    with new_folder(target) as beside:
        tensors.write(beside, largest)
        origin = reader.manifest.huggingface.get("config", {})
        fields = export_config(cls, config, heads, origin, tensors.dtype, code)
        write_json(beside / "config.json", fields)
        for file in [] if code is None else code.files():
            shutil.copyfile(file, beside / file.name)
            sync(beside / file.name)
        copy_tokenizer(folder / "tokenizer", beside)
        card = model_card(
            reader.manifest, config, fields, tensors.parameters, heads=heads, own_code=code is not None, note=note,
            tokenizer=any((beside / name).is_file() for name in TOKENIZER_FILES),
        )  # fmt: skip
        write_text(beside / "README.md", card)
        if check is not None:
            check(beside)
    if code is not None:
        return "load it with from_pretrained(folder, trust_remote_code=True): its modelling files are in it"
    return note


class _Tensors:
    """The tensors of an export, each put together from the checkpoint when it is written."""

    def __init__(
        self,
        reader: ckpt.Reader,
        cls: type[LanguageModel],
        config: ModelConfig,
        heads: tuple[str, ...],
        cast: torch.dtype | None,
    ) -> None:
        self._reader = reader
        self._logical = logical_shapes(cls, config, heads)
        self._public = public_tensors(cls.huggingface_keys(config, heads), self._logical)
        self.parameters = sum(map(math.prod, self._logical.values()))
        origin = reader.manifest.huggingface
        aliases = cls.huggingface_aliases(config, heads)
        for alias in _exported_aliases(cls, config, heads, origin):
            self._public[alias] = self._public[aliases[alias]]
        constants = cls.huggingface_constants(config, heads)
        self._constants = {name: constants[name] for name in origin.get("constants", constants)}
        self._dtypes = {name: self._dtype_of(public, cast) for name, public in self._public.items()}
        self.dtype = next(iter(self._dtypes.values()))

    def write(self, folder: Path, largest: int) -> None:
        """As one file, or where that had more than ``largest`` bytes several and an index, as transformers does."""
        described = {name: (self._dtypes[name], public.shape) for name, public in self._public.items()}
        described |= {name: (value.dtype, tuple(value.shape)) for name, value in self._constants.items()}
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in described.items()}
        shards = _shards(sizes, largest)
        files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        if len(shards) == 1:
            files = ["model.safetensors"]
        for file, names in zip(files, shards, strict=True):
            # In the order in which they are written.
            names.sort(key=lambda name: -described[name][0].itemsize)
            with ReadAhead(self._read, {name: sizes[name] for name in names}, max(sizes.values())) as read:
                ckpt.write_stream(folder / file, {name: described[name] for name in names}, read, {"format": "pt"})
        if len(shards) > 1:
            weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            write_json(folder / "model.safetensors.index.json", index)

    def _read(self, name: str) -> Tensor:
        if name in self._constants:
            return self._constants[name]
        public = self._public[name]
        values = torch.empty(public.shape, dtype=self._dtypes[name])
        into = values.view(-1)
        for logical, begin, end in public.runs:
            part = Part.whole(self._logical[logical]).run(begin, end)
            self._reader.read("weight", logical, part, into[: part.values])
            into = into[part.values :]
        return values

    def _dtype_of(self, public: Public, cast: torch.dtype | None) -> torch.dtype:
        saved = self._reader.dtype(public.runs[0][0])
        return cast if cast is not None and saved.is_floating_point else saved


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
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _bytes(size: int | str) -> int:
    found = re.fullmatch(r"(\d+)\s*([KMG]I?B)?", str(size).strip().upper())
    count = int(found[1]) * _UNITS[found[2] or ""] if found else 0
    if not count:
        raise ValueError(f"max-shard-size {size!r} is no size of a file: give bytes, or a number and KB, MB or GB")
    return count


def _shards(sizes: Mapping[str, int], largest: int) -> list[list[str]]:
    """Tensors of these sizes, in order, in files of at most so many bytes (a larger one by itself)."""
    shards: list[list[str]] = [[]]
    room = largest
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = largest
        shards[-1].append(name)
        room -= size
    return shards


def _exported_aliases(
    cls: type[LanguageModel], config: ModelConfig, heads: tuple[str, ...], origin: Mapping[str, Any]
) -> list[str]:
    """Which second names an export carries: those of the folder it came from; for a model trained here none, but for
    untied embeddings, where transformers 5 reads the decoder's own bias and 4 the head's."""
    if origin:
        return list(origin["aliases"])
    return [] if config.tie_word_embeddings else list(cls.huggingface_aliases(config, heads))
