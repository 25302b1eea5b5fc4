"""How a prepared dataset, a checkpoint or a model folder is spoiled; a ``Harm`` does it to the folder of a test."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import edit as edit_manifest
from safetensors.torch import load_file, save_file

Harm = Callable[[Path], Any]


def nothing(place: Path) -> None:
    pass


def cut(name: str) -> Harm:
    """Half of the file is gone."""

    def harm(place: Path) -> None:
        content = (place / name).read_bytes()
        (place / name).write_bytes(content[: len(content) // 2])

    return harm


def gone(name: str) -> Harm:
    return lambda place: shutil.rmtree(place / name) if (place / name).is_dir() else (place / name).unlink()


def written(name: str, content: str | bytes) -> Harm:
    """A file with this content, new or in place of another."""

    def harm(place: Path) -> None:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return harm


def added(name: str, content: str) -> Harm:
    return lambda place: written(name, (place / name).read_text() + content)(place)


def edited(name: str, change: Callable[[Any], Any]) -> Harm:
    """A JSON file, changed in place, or replaced by what ``change`` returns."""

    def harm(place: Path) -> None:
        value = json.loads((place / name).read_text())
        changed = change(value)
        (place / name).write_text(json.dumps(value if changed is None else changed))

    return harm


def in_manifest(folder: str, change: Callable[[Any], Any]) -> Harm:
    """The manifest of a checkpoint, with the checksum that fits."""
    return lambda place: edit_manifest(place / folder, change)


def overwritten(name: str, at: int, content: bytes) -> Harm:
    def harm(place: Path) -> None:
        whole = bytearray((place / name).read_bytes())
        whole[at : at + len(content)] = content
        (place / name).write_bytes(whole)

    return harm


def with_tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Harm:
    def harm(place: Path) -> None:
        tensors = {key: tensor.clone() for key, tensor in load_file(place / name).items()}
        change(tensors)
        save_file(tensors, place / name)

    return harm


def swapped_index(place: Path) -> None:
    path = place / "data/train/index.npy"
    offsets = np.load(path)
    offsets[[5, 6]] = offsets[[6, 5]]
    np.save(path, offsets)


def without_roles(*roles: str, folder: str = "data/tokenizer") -> Harm:
    def harm(place: Path) -> None:
        gone(f"{folder}/special_tokens_map.json")(place)
        keep = lambda fields: {key: value for key, value in fields.items() if key not in roles}  # noqa: E731
        edited(f"{folder}/tokenizer_config.json", keep)(place)

    return harm


def with_swapped_words(fields: dict[str, Any]) -> None:
    vocabulary = fields["model"]["vocab"]
    first, second = list(vocabulary)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def copied(name: str, to: str) -> Harm:
    return lambda place: shutil.copytree(place / name, place / to)


def pickled(value: Any) -> Harm:
    """A pickle in the place of the export's safetensors."""

    def harm(place: Path) -> None:
        (place / "hf/model.safetensors").unlink()
        torch.save(value, place / "hf/pytorch_model.bin")

    return harm


def both(*harms: Harm) -> Harm:
    return lambda place: [harm(place) for harm in harms]
