"""Reads a configuration: one YAML file, and overrides ``section.key=value`` whose values are YAML too."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from .config import Config, Section
from .models import ARCHITECTURES
from .validation import one_line


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply ``section.key=value`` overrides, check everything.  ValueError in one line."""
    path = Path(path)
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a safe loader
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{path} is no file: give the path of a configuration, such as one in configs/") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a mapping of sections: see configs/ for examples")
    for override in overrides or []:
        _apply(value, override)
    return parse_config(value, str(path))


def parse_config(value: dict[str, Any], where: str) -> Config:
    """Check a mapping as read from YAML; ValueError in one line that starts with ``where``."""
    try:
        return Config.model_validate(value)
    except ValidationError as error:
        model = value.get("model")
        known = known_keys(model.get("model_type") if isinstance(model, dict) else None)
        raise ValueError(f"{where}: {one_line(error, known=known)}") from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, where YAML would drop the first value without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _apply(value: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ValueError(f"override {override!r} is not of the form section.key=value")
    for part in parts[:-1]:
        value = value.setdefault(part, {})
        if not isinstance(value, dict):
            raise ValueError(f"override {override!r}: {part} is not a section")
    try:
        value[parts[-1]] = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        raise ValueError(f"override {override!r}: {text!r} is not a YAML value") from None


def known_keys(model_type: Any = None) -> list[str]:
    """``section.key`` of all keys that there are, and the sections' own; of the model's, those of this architecture, or
    where that is none of all of them."""
    models = [cls for name, cls in ARCHITECTURES.items() if name == model_type] or list(ARCHITECTURES.values())
    keys: list[str] = []
    for name, field in Config.model_fields.items():
        keys.append(name)
        if name == "model":
            keys += sorted({f"model.{k}" for cls in models for k in cls.config_class.model_fields})
        else:
            keys += _keys_below(name, field.annotation)
    return keys


def _keys_below(name: str, annotation: Any) -> list[str]:
    """Of a section (or one that may be null) and of the sections in it; none for a single value."""
    section = next((kind for kind in (annotation, *get_args(annotation)) if _is_section(kind)), None)
    if section is None:
        return []
    keys: list[str] = []
    for key, field in section.model_fields.items():
        keys += [f"{name}.{key}", *_keys_below(f"{name}.{key}", field.annotation)]
    return keys


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)
