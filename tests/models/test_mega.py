from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_suite import ReferenceSuite

import farspan.kernels.ema

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

    @pytest.fixture(autouse=True)
    def _own_code(self, remote_code: None) -> None:
        """Exports are loaded with the modelling files that they carry."""

    def _theirs(self, folder: Path, name: str, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        import transformers

        auto = getattr(transformers, name.replace("Mega", "AutoModel"))
        model, told = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not any(told.values()), told
        if not model.config.add_token_type_embeddings:
            inputs = {key: value for key, value in inputs.items() if key != "token_type_ids"}
        return dict(model.eval()(**inputs))

    def huggingface_config(self, folder: Path) -> dict[str, Any]:
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] in ("mega", "farspan_mega")
        return {key: value for key, value in config.items() if key not in ("auto_map", "model_type")}

    def test_flops_of_a_training_step(self, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[override]
        """Of the model, whichever way its moving average is computed: as a recurrence it has no products."""
        monkeypatch.setattr(farspan.kernels.ema, "DEFAULT", "recurrence")
        super().test_flops_of_a_training_step(variant)
