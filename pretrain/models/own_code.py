"""Exports that bring their own modelling files, for architectures that a transformers lacks or computes otherwise."""

from __future__ import annotations

import dataclasses
from pathlib import Path

EXPORT = Path(__file__).resolve().parents[1] / "export"


@dataclasses.dataclass(frozen=True)
class OwnCode:
    """Files in ``pretrain/export`` that a folder carries for ``from_pretrained(folder, trust_remote_code=True)``.

    ``auto_map``: Hugging Face's table from an Auto class to the class in these files.  ``model_type``: what config.json
    says where stock classes would compute something else, so that they do not try.  ``needed``: where a stock class may
    do so without a word (for want of a kernel), so that it always says that.
    """

    names: tuple[str, ...]
    model_type: str
    auto_map: dict[str, str]
    needed: bool = False

    def files(self) -> list[Path]:
        return [EXPORT / name for name in self.names]
