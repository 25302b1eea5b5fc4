from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_suite import ReferenceSuite

import farspan.kernels.ema
from farspan.pretrain.models.config import ModelConfig

CAUSAL = {"is_decoder": True, "bidirectional": False}
CHUNKED = {"use_chunking": True, "chunk_size": 5}  # rows are no multiple of it
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunked": CHUNKED | {"normalization_type": "layernorm", "add_token_type_embeddings": True},
    "laplace-simple": CHUNKED
    | {"attention_activation": "laplace", "relative_positional_bias": "simple", "tie_word_embeddings": False},
    "relu2-truncated": {
        "attention_activation": "relu2",
        "truncation": 4,
        "normalization_type": "rmsnorm",
        "vocab_size": 256,
        "activation": "gelu",
    },
    "after": {"normalize_before_mega": False, "normalize_before_ffn": False, "relative_positional_bias": "simple"},
    "bare": {"use_normalized_ffn": False, "add_lm_hidden_dense_layer": False, "norm_affine": False},
    "feature-dropout": CHUNKED | {"use_feature_dropout": True, "normalization_type": "layernorm"},
    "batchnorm": {"normalization_type": "batchnorm", "bidirectional": False},
    "causal": CAUSAL | {"vocab_size": 97},
    "causal-chunked": CAUSAL | CHUNKED | {"attention_activation": "relu2", "relative_positional_bias": "simple"},
    "causal-laplace": CAUSAL
    | {"attention_activation": "laplace", "normalization_type": "layernorm", "tie_word_embeddings": False},
    "causal-truncated": CAUSAL | CHUNKED | {"truncation": 3, "use_feature_dropout": True},
}


class TestMega(ReferenceSuite):
    model_type = "mega"
    variants = VARIANTS
    dtype = torch.float64

    def in_transformers(self, config: ModelConfig) -> bool:
        return False

    def huggingface_config(self, folder: Path) -> dict[str, Any]:
        return json.loads((folder / "config.json").read_text())

    def test_flops_of_a_training_step(self, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[override]
        """Of the model, whichever way its moving average is computed: as a recurrence it has no products."""
        monkeypatch.setattr(farspan.kernels.ema, "DEFAULT", "recurrence")
        super().test_flops_of_a_training_step(variant)
