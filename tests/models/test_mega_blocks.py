"""A long sequence taken by blocks of positions on a CPU gives what it gives as a whole, dropout included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Description, Result, dropout_key, make_batch, training_pass

from farspan.kernels.documents import AttentionKind
from farspan.parallel.mesh import Mesh
from farspan.pretrain.models.mega import attention

KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "post-norm": {"normalize_before_mega": False, "normalize_before_ffn": False},
    "feature dropout": {"use_feature_dropout": True},
    "batch norm": {"normalization_type": "batchnorm"},
    "causal laplace": {"is_decoder": True, "bidirectional": False, "attention_activation": "laplace"},
}


@pytest.mark.parametrize("rows", ["full", "padding", "document"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks(kind: str, rows: AttentionKind, monkeypatch: pytest.MonkeyPatch) -> None:
    """38 positions in chunks of 4: a short last block, and a short last chunk."""
    description = Description("mega", {"use_chunking": True, "chunk_size": 4, "max_positions": 64} | KINDS[kind])
    model = description.filled(Mesh.solo())
    batch = make_batch(model.config, rows, rows=3, length=38)

    def run(block: int) -> Result:
        monkeypatch.setattr(attention, "BLOCK", block)
        return training_pass(model, batch, dropout_key(batch))

    whole, blocks = run(10**9), run(24)
    for name, value in whole.outputs.items():
        torch.testing.assert_close(blocks.outputs[name], value, rtol=1e-6, atol=1e-6)
    for name, (_, gradient) in whole.gradients.items():
        torch.testing.assert_close(blocks.gradients[name][1], gradient, rtol=1e-5, atol=1e-6)
