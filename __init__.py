"""Farspan: distributed pretraining of MEGA, Megatron-BERT, MRA, Nyströmformer and RoBERTa-PreLayerNorm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .pretrain.load import load

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # `import farspan` stays light: torch and the models are imported when something is loaded.
    if name == "load":
        from .pretrain.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
