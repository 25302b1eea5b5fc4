"""A Hugging Face folder: config.json, and weights that are read a tensor at a time."""

from __future__ import annotations

import dataclasses
import functools
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint as ckpt
from ..files import read_json, read_mapping
from ..models.base import LanguageModel
from ..models.config import ModelConfig
from ..models.huggingface_keys import tensor_names
from .imported import logical_shapes
from .model import architecture_of, parse_config
from .renaming import public_tensors

# Buffers that older files carry, and a pooler that no head here reads.
_IGNORED = re.compile(r"(\w+\.)?(embeddings\.(position_ids|token_type_ids)|pooler\.dense\.(weight|bias))")
_COUNTERS = re.compile(r".*\.num_batches_tracked")  # whole numbers by nature
_WEIGHTS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = _WEIGHTS | {"I64": torch.int64}
# Fields that are refused, but for these values, where an architecture has none of the name.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
    "position_embedding_type": ("absolute", None),
}


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class HuggingFaceFolder:
    """A folder with config.json and weights in safetensors (one file or sharded) or a PyTorch state dict.

    Files are mapped: memory is taken by what was read last, not by what the folder holds (but for state dicts older
    than torch 1.6, which can only be read whole).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_mapping(folder / "config.json", "a Hugging Face model folder")
        self._tensors: dict[str, _Stored] = {}
        names = self._safetensors_names()
        if all((folder / name).is_file() for name in names):
            for name in names:
                self._add_safetensors(folder / name)
        elif (folder / "pytorch_model.bin").is_file():
            self._add_state_dict(folder / "pytorch_model.bin")
        else:
            raise ValueError(f"{folder} has no weights: {', '.join(names)} or pytorch_model.bin is needed")

    def keys(self) -> set[str]:
        return set(self._tensors)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def tensor(self, key: str) -> Tensor:
        return self._tensors[key].read()

    def model(self) -> tuple[type[LanguageModel], ModelConfig, tuple[str, ...]]:
        """The architecture, its configuration and the heads that the folder has tensors for."""
        cls = architecture_of(str(self.config.get("model_type", "")), self.folder / "config.json")
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
        config = parse_config(cls, fields, self.folder / "config.json")
        closest: set[str] | None = None  # what is missing, by the heads of which the least is
        for heads in (("lm", "nsp"), ("lm",), ("nsp",), ()):
            if not set(heads) <= set(cls.heads_allowed):
                continue
            needed = tensor_names(cls.huggingface_keys(config, heads))
            missing = needed - self.keys()
            if not missing:
                second = cls.huggingface_aliases(config, heads).keys() | cls.huggingface_constants(config, heads).keys()
                self._refuse_unknown(needed | second)
                self._check_tensors(cls, config, heads)
                self._prefer_second_names(cls, config, heads)
                return cls, config, heads
            if closest is None or len(missing) < len(closest):
                closest = missing
        shown = ", ".join(sorted(closest or ())[:3])
        raise ValueError(f"{self.folder} lacks tensors of a {cls.name} model of this config.json, such as {shown}")

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
            stored = _Stored(tuple(value.shape), value.dtype, functools.partial(_itself, value))
            self._add(path, key, stored, str(value.dtype))

    def _add_safetensors(self, path: Path) -> None:
        handle = ckpt.open_tensors(path, "copy it again")
        for key in handle.keys():  # noqa: SIM118 (not a dict)
            view = handle.get_slice(key)
            said = view.get_dtype()
            dtype = _DTYPES.get(said, torch.uint8)  # one of the others
            self._add(
                path, key, _Stored(tuple(view.get_shape()), dtype, functools.partial(handle.get_tensor, key)), said
            )

    def _add(self, path: Path, key: str, stored: _Stored, said: str) -> None:
        if not (stored.dtype in _WEIGHTS.values() or _IGNORED.fullmatch(key) or _COUNTERS.fullmatch(key)):
            raise ValueError(f"{key} in {path} is of type {said}: give weights in floating point, not quantized ones")
        self._tensors[key] = stored

    def _check_tensors(self, cls: type[LanguageModel], config: ModelConfig, heads: tuple[str, ...]) -> None:
        publics = public_tensors(cls.huggingface_keys(config, heads), logical_shapes(cls, config, heads))
        for key, public in publics.items():
            if self._tensors[key].shape != public.shape:
                raise ValueError(
                    f"{key} in {self.folder} has shape {self._tensors[key].shape}, its config.json makes it "
                    f"{public.shape}: give the config.json that belongs to the weights"
                )

    def _prefer_second_names(self, cls: type[LanguageModel], config: ModelConfig, heads: tuple[str, ...]) -> None:
        """Without tied embeddings transformers 5 computes with a bias of the second name, and keeps another of the
        first, which 4 makes the same."""
        if not config.tie_word_embeddings:
            for alias, name in cls.huggingface_aliases(config, heads).items():
                self._tensors[name] = self._tensors.get(alias, self._tensors[name])

    def _refuse_unknown(self, needed: set[str]) -> None:
        unknown = sorted(k for k in self.keys() - needed if not _IGNORED.fullmatch(k))
        if unknown:
            raise ValueError(
                f"{self.folder} has {len(unknown)} tensors that this config.json does not account for, "
                f"such as {unknown[0]}: importing would drop them"
            )


def _itself(value: Tensor) -> Tensor:
    return value
