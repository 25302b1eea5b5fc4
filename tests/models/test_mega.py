from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_all_close, assert_close, assert_differs, merge
from models import Description, dropout_key, loss_of, make_batch
from reference_suite import ReferenceSuite

import farspan.kernels.ema
from farspan.parallel.mesh import Mesh
from farspan.parallel.sharding import logical_of
from farspan.pretrain.models.base import Encoder

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


# Attention to an encoder, which no pretraining objective has.

CROSS = CAUSAL | {"add_cross_attention": True, "max_positions": 32}
CROSS_KINDS: dict[str, dict[str, Any]] = {
    "softmax": CROSS,
    "laplace, simple, chunked": CROSS
    | {"attention_activation": "laplace", "relative_positional_bias": "simple", "use_chunking": True, "chunk_size": 24},
    "relu2, after, feature dropout": CROSS
    | {"attention_activation": "relu2", "normalize_before_mega": False, "use_feature_dropout": True},
}


def cross_pass(mesh: Mesh, described: Description, dropping: bool, *, sequence_parallel: bool = False) -> Any:
    """Losses, the gradient of the encoder's hidden states, and those of the parameters."""
    torch.set_num_threads(1)
    model = described.filled(dataclasses.replace(mesh, sequence_parallel=sequence_parallel))
    batch = make_batch(model.config, "padding")
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(batch.rows, 21, model.config.hidden_size, dtype=described.dtype, generator=generator)
    hidden.requires_grad_()
    real = torch.arange(21) < torch.tensor([[21], [3], [0], [12]])  # one row has no encoder tokens at all
    key = dropout_key(batch) if dropping else None
    outputs = model(batch, dropout=key, encoder=Encoder(hidden, real))
    loss_of(model, outputs, batch).backward()
    gradients = {name: (logical_of(p), p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return outputs["lm_losses"].detach(), hidden.grad, gradients


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])
@pytest.mark.parametrize("kind", CROSS_KINDS)
def test_attention_to_an_encoder_on_two_tensor_ranks(ranks: Any, kind: str, sequence_parallel: bool) -> None:
    described = Description("mega", CROSS_KINDS[kind], torch.float64)
    results = []
    for dropping in (False, True):
        losses, encoder, gradients = cross_pass(Mesh.solo(), described, dropping)
        assert losses.isfinite().all() and encoder.abs().max() > 0
        parts = ranks.on_mesh(cross_pass, described, dropping, tensor=2, sequence_parallel=sequence_parallel)
        for part in parts:
            assert_close(part[0], losses, "losses")
            assert_close(part[1], encoder, "gradient of the encoder's hidden states")
        assert_all_close(
            {name: merge([part[2][name] for part in parts]) for name in gradients},
            {name: merge([value]) for name, value in gradients.items()},
            "gradient of",
            lambda name: name.replace("cross_attention.key.bias", "cross_attention.key.weight"),
        )
        results.append(losses)
    assert_differs(results[1], results[0], "dropout")


def test_a_decoder_without_its_encoder_is_told() -> None:
    described = Description("mega", CROSS)
    model = described.filled(Mesh.solo())
    with pytest.raises(ValueError, match="attends to an encoder's hidden states: give encoder_hidden_states"):
        model(make_batch(described.config, "full"))
