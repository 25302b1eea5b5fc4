"""The architectures.  A new one is one file beside this one and one line in ``ARCHITECTURES``."""

from __future__ import annotations

from .base import LanguageModel
from .mega import Mega
from .megatron_bert import MegatronBert
from .mra import Mra
from .nystromformer import Nystromformer
from .roberta_prelayernorm import RobertaPreLayerNorm

ARCHITECTURES: dict[str, type[LanguageModel]] = {
    model.name: model
    for model in (
        Mega,
        MegatronBert,
        Mra,
        Nystromformer,
        RobertaPreLayerNorm,
    )
}


def architecture(model_type: str) -> type[LanguageModel]:
    """The model class of a ``model_type``; ValueError names the known ones."""
    if model_type not in ARCHITECTURES:
        raise ValueError(f"model_type {model_type!r} is unknown: choose one of {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[model_type]
