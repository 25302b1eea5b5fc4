"""MEGA on a GPU: its moving average in every form, and a whole model's losses and gradients, against float64 on the
CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import difference
from models import Description, dropout_key, loss_of, make_batch
from torch import Tensor

from farspan.kernels.ema import ema
from farspan.parallel.mesh import Mesh

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch sees none"),
]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunked": {"use_chunking": True, "chunk_size": 5, "attention_activation": "laplace", "truncation": 4},
    "causal": {"is_decoder": True, "bidirectional": False, "use_feature_dropout": True},
}


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("length", [1, 65, 4097])
def test_the_moving_average(length: int, directions: int) -> None:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(length, 2, 32, generator=generator)
    parameters = [torch.randn(directions, 32, 16, generator=generator) for _ in range(4)]

    def run(device: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.to(device, dtype, copy=True).requires_grad_() for t in (x, *parameters)]
        y, _ = ema(*inputs)
        y.square().sum().backward()
        return [y.detach().cpu(), *(t.grad.cpu() for t in inputs)]

    for found, expected in zip(run("cuda", torch.float32), run("cpu", torch.float64), strict=True):
        assert difference(found, expected) < 1e-3  # products of float32 may go through TF32


@pytest.mark.parametrize("rows", ["full", "padding", "document"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model(kind: str, rows: Any) -> None:
    def run(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        model = Description("mega", KINDS[kind], dtype).filled(Mesh.solo()).to(device)
        batch = make_batch(model.config, rows).to(torch.device(device))
        loss = loss_of(model, model(batch, dropout=dropout_key(batch)), batch)
        loss.backward()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach().cpu()} | gradients

    found, expected = run("cuda", torch.float32), run("cpu", torch.float64)
    assert found.keys() == expected.keys()
    largest = max(g.abs().max().item() for name, g in expected.items() if name != "loss")
    for name, value in expected.items():
        assert difference(found[name], value, None if name == "loss" else largest) < 5e-3, name
