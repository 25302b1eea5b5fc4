"""To and from Hugging Face: a table of keys per architecture, exact both ways, on one CPU whatever the run's layout.

Logical tensors are the same numbers under other names, or several Hugging Face tensors stacked (query, key, value), so
nothing is computed and nothing rounded.
"""

from __future__ import annotations

import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from . import checkpoint as ckpt
from .conversion.imported import Imported, copy_tokenizer, logical_shapes, write_imported
from .files import new_folder, read_json, read_mapping, sync, write_json
from .models import ARCHITECTURES, architecture
from .models.base import LanguageModel
from .models.config import ModelConfig
from .models.huggingface_keys import HuggingFaceKeys, Source, sources, tensor_names
from .models.own_code import OwnCode
from .validation import one_line

# Buffers that older files carry, and a pooler that no head here reads.
_IGNORED = re.compile(r"(\w+\.)?(embeddings\.(position_ids|token_type_ids)|pooler\.dense\.(weight|bias))")
_COUNTERS = re.compile(r".*\.num_batches_tracked")  # whole numbers by nature
# Fields that are refused, but for these values, where an architecture has none of the name.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
    "position_embedding_type": ("absolute", None),
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class HuggingFaceFolder:
    """A folder with config.json and weights in safetensors (one file or sharded) or a PyTorch state dict."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_mapping(folder / "config.json", "a Hugging Face model folder")
        self._read: dict[str, Callable[[], Tensor]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        names = self._safetensors_names()
        if all((folder / name).is_file() for name in names):
            for name in names:
                self._add_safetensors(folder / name)
        elif (folder / "pytorch_model.bin").is_file():
            self._add_state_dict(folder / "pytorch_model.bin")
        else:
            raise ValueError(f"{folder} has no weights: {', '.join(names)} or pytorch_model.bin is needed")

    def _safetensors_names(self) -> list[str]:
        index = self.folder / "model.safetensors.index.json"
        if not index.is_file():
            return ["model.safetensors"]
        value = read_json(index, "a safetensors index")
        table = value.get("weight_map") if isinstance(value, dict) else None
        names = sorted({str(name) for name in table.values()}) if isinstance(table, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"{index} is damaged: its weight_map should name files of {self.folder}")
        return names

    def _add_state_dict(self, path: Path) -> None:
        try:  # weights_only: nothing in the file is executed; files older than torch 1.6 are no zip, and not mapped
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError):
            reason = "it is damaged, or holds more than tensors"
            raise ValueError(f"{path} cannot be read as tensors alone ({reason}): save it as safetensors") from None
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            reason = "it is no dictionary of tensors"
            raise ValueError(f"{path} cannot be read as tensors alone ({reason}): save it as safetensors")
        for key, value in state.items():
            self._read[key] = lambda value=value: value  # type: ignore[misc]
            self._note(path, key, list(value.shape), str(value.dtype), value.is_floating_point())

    def _add_safetensors(self, path: Path) -> None:
        handle = ckpt.open_tensors(path, "copy it again")
        for key in handle.keys():  # noqa: SIM118 (not a dict)
            self._read[key] = lambda key=key: handle.get_tensor(key)  # type: ignore[misc]
            view = handle.get_slice(key)
            self._note(path, key, view.get_shape(), view.get_dtype(), view.get_dtype().startswith(("F", "BF")))

    def _note(self, path: Path, key: str, shape: list[int], dtype: str, floating: bool) -> None:
        if not floating and not _IGNORED.fullmatch(key) and not _COUNTERS.fullmatch(key):
            raise ValueError(f"{key} in {path} is of type {dtype}: give weights in floating point, not quantized ones")
        self._shapes[key] = tuple(shape)

    def keys(self) -> set[str]:
        return set(self._read)

    def tensor(self, key: str) -> Tensor:
        return self._read[key]()

    def model(self) -> tuple[type[LanguageModel], ModelConfig, tuple[str, ...]]:
        """The architecture, its configuration and the heads that the folder has tensors for."""
        cls = _architecture(str(self.config.get("model_type", "")), self.folder / "config.json")
        for field, allowed in _UNUSED.items():
            if field not in cls.config_class.model_fields and self.config.get(field) not in allowed:
                raise ValueError(f"{self.folder}/config.json sets {field}, which no pretraining objective here uses")
        fields = {name: self.config[name] for name in cls.config_class.model_fields if name in self.config}
        if self.config["model_type"] == cls.name:
            fields |= cls.stock_fields(self.config)
        fields = {name: value for name, value in fields.items() if name not in cls.unapplied_fields}
        fields["model_type"] = cls.name
        if self.config.get("pad_token_id", "missing") is None:
            fields["pad_token_id"] = None
        config = _parse(cls, fields, self.folder / "config.json")
        closest: set[str] | None = None  # what is missing, by the heads of which the least is
        for heads in (("lm", "nsp"), ("lm",), ("nsp",), ()):
            if not set(heads) <= set(cls.heads_allowed):
                continue
            needed = tensor_names(cls.huggingface_keys(config, heads))
            missing = needed - self.keys()
            if not missing:
                second = cls.huggingface_aliases(config, heads).keys() | cls.huggingface_constants(config, heads).keys()
                self._refuse_unknown(needed | second)
                self._check_shapes(cls, config, heads)
                self._prefer_second_names(cls, config, heads)
                return cls, config, heads
            if closest is None or len(missing) < len(closest):
                closest = missing
        shown = ", ".join(sorted(closest or ())[:3])
        raise ValueError(f"{self.folder} lacks tensors of a {cls.name} model of this config.json, such as {shown}")

    def logical_tensors(
        self, cls: type[LanguageModel], config: ModelConfig, heads: tuple[str, ...]
    ) -> dict[str, Tensor]:
        """The weights that the model of ``model()`` needs."""
        shapes = logical_shapes(cls, config, heads)
        return logical_tensors(self.tensor, cls.huggingface_keys(config, heads), shapes)

    def _check_shapes(self, cls: type[LanguageModel], config: ModelConfig, heads: tuple[str, ...]) -> None:
        shapes = logical_shapes(cls, config, heads)
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        for key, tensor in rename(tensors, cls.huggingface_keys(config, heads)).items():
            if self._shapes[key] != tuple(tensor.shape):
                raise ValueError(
                    f"{key} in {self.folder} has shape {self._shapes[key]}, its config.json makes it "
                    f"{tuple(tensor.shape)}: give the config.json that belongs to the weights"
                )

    def _prefer_second_names(self, cls: type[LanguageModel], config: ModelConfig, heads: tuple[str, ...]) -> None:
        """Without tied embeddings transformers 5 computes with a bias of the second name, and keeps another of the
        first, which 4 makes the same."""
        if not config.tie_word_embeddings:
            for alias, name in cls.huggingface_aliases(config, heads).items():
                self._read[name] = self._read.get(alias, self._read[name])

    def _refuse_unknown(self, needed: set[str]) -> None:
        unknown = sorted(k for k in self.keys() - needed if not _IGNORED.fullmatch(k))
        if unknown:
            raise ValueError(
                f"{self.folder} has {len(unknown)} tensors that this config.json does not account for, "
                f"such as {unknown[0]}: importing would drop them"
            )


def logical_tensors(
    read: Callable[[str], Tensor], keys: HuggingFaceKeys, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The logical tensors of a model, of these shapes, from their Hugging Face tensors."""

    def piece(source: Source) -> Tensor:
        whole = read(source.tensor)
        return whole if source.rows is None else whole[slice(*source.rows)]

    def logical(name: str) -> Tensor:
        pieces = [piece(source) for source in sources(keys[name])]
        return (pieces[0] if len(pieces) == 1 else torch.stack(pieces)).reshape(shapes[name])

    return {name: logical(name) for name in keys}


def rename(tensors: Mapping[str, Tensor], keys: HuggingFaceKeys) -> dict[str, Tensor]:
    """{logical name: tensor} under Hugging Face's names (weights or gradients)."""
    renamed: dict[str, Tensor] = {}
    rows: dict[str, dict[int, Tensor]] = {}  # of tensors that are several logical ones: first row → piece
    for name, value in tensors.items():
        of_one = sources(keys[name])
        for source, piece in zip(of_one, [value] if len(of_one) == 1 else value.unbind(0), strict=True):
            if source.shape is not None:
                piece = piece.reshape(source.shape)
            if source.rows is None:
                renamed[source.tensor] = piece
            else:
                rows.setdefault(source.tensor, {})[source.rows[0]] = piece
    return renamed | {name: torch.cat([pieces[first] for first in sorted(pieces)]) for name, pieces in rows.items()}


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


def model_of(
    manifest: ckpt.Manifest, folder: Path | None = None
) -> tuple[type[LanguageModel], ModelConfig, tuple[str, ...]]:
    """Architecture, configuration and heads of a checkpoint; ``folder``: where it lies, for messages."""
    where = Path(ckpt.MANIFEST) if folder is None else folder / ckpt.MANIFEST
    cls = _architecture(str(manifest.model.get("model_type", "")), where)
    for head in manifest.heads:
        if head not in cls.heads_allowed:
            raise ValueError(f"{where}: {cls.name} has no head {head!r}, only {', '.join(cls.heads_allowed)}")
    return cls, _parse(cls, manifest.model, where), manifest.heads


def _architecture(model_type: str, where: Path) -> type[LanguageModel]:
    for known in ARCHITECTURES.values():
        if known.own_code is not None and known.own_code.model_type == model_type:
            return known
    try:
        return architecture(model_type)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _parse(cls: type[LanguageModel], fields: Mapping[str, Any], where: Path) -> ModelConfig:
    try:
        return cls.config_class.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"{where}: {one_line(error)}") from None


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
