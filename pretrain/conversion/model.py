"""Which model a checkpoint or a Hugging Face folder is of: its architecture, configuration and heads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .. import checkpoint as ckpt
from ..models import ARCHITECTURES, architecture
from ..models.base import LanguageModel
from ..models.config import ModelConfig
from ..validation import one_line


def model_of(
    manifest: ckpt.Manifest, folder: Path | None = None
) -> tuple[type[LanguageModel], ModelConfig, tuple[str, ...]]:
    """Architecture, configuration and heads of a checkpoint; ``folder``: where it lies, for messages."""
    where = Path(ckpt.MANIFEST) if folder is None else folder / ckpt.MANIFEST
    cls = architecture_of(str(manifest.model.get("model_type", "")), where)
    for head in manifest.heads:
        if head not in cls.heads_allowed:
            raise ValueError(f"{where}: {cls.name} has no head {head!r}, only {', '.join(cls.heads_allowed)}")
    return cls, parse_config(cls, manifest.model, where), manifest.heads


def architecture_of(model_type: str, where: Path) -> type[LanguageModel]:
    for known in ARCHITECTURES.values():
        if known.own_code is not None and known.own_code.model_type == model_type:
            return known
    try:
        return architecture(model_type)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def parse_config(cls: type[LanguageModel], fields: Mapping[str, Any], where: Path) -> ModelConfig:
    try:
        return cls.config_class.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"{where}: {one_line(error)}") from None
