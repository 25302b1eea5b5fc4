"""The long-input architectures on a GPU: what is their own, and whole models' losses and gradients, against float64 on
the CPU."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from comparison import difference

pytest.importorskip("megatron.core", reason="needs megatron-core: models stand on it, kernels do not")

from models import Description, dropout_key, loss_of
from torch import Tensor

from farspan.kernels.ema import ema
from farspan.kernels.mra import Form, mra_attention
from farspan.kernels.nystrom import nystrom_attention, position_convolution
from farspan.parallel.mesh import Mesh

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch sees none"),
]
LONG = {"max_position_embeddings": 208}
CHUNKED = {"use_chunking": True, "chunk_size": 5, "attention_activation": "laplace", "truncation": 4}
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "mega": ("mega", {}, 16),
    "mega, chunked": ("mega", CHUNKED, 16),
    "mega, causal": ("mega", {"is_decoder": True, "bidirectional": False, "use_feature_dropout": True}, 16),
    "mra": ("mra", LONG | {"block_per_row": 2}, 208),
    "mra, sparse": ("mra", LONG | {"block_per_row": 2, "approx_mode": "sparse"}, 208),
    "nystromformer": ("nystromformer", {"num_landmarks": 4, "conv_kernel_size": 5}, 16),
    "nystromformer, as released": ("nystromformer", {"num_landmarks": 4, "inv_coeff_init_option": False}, 16),
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


@pytest.mark.parametrize("form", get_args(Form))
@pytest.mark.parametrize(("length", "budget", "sparse"), [(33, 1, False), (700, 60, False), (1024, 128, True)])
def test_multiresolution_attention(length: int, budget: int, sparse: bool, form: Any) -> None:
    """And twice the same bits."""
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(3)) < 0.8

    def run(device: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = _attention_inputs(length, device, dtype)
        y = mra_attention(*inputs, budget=budget, mask=mask.to(device), sparse=sparse, diagonal_blocks=2, form=form)
        y.square().sum().backward()
        return [y.detach().cpu(), *(t.grad.cpu() for t in inputs)]

    found = run("cuda", torch.float32)
    for first, second, expected in zip(found, run("cuda", torch.float32), run("cpu", torch.float64), strict=True):
        assert difference(first, expected) < 1e-3
        assert form == "reference" or torch.equal(first, second)


@pytest.mark.parametrize("length", [64, 513])
def test_attention_through_landmarks(length: int) -> None:
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(3)) < 0.8
    weight = torch.randn(3, 65, generator=torch.Generator().manual_seed(4))

    def run(device: str, dtype: torch.dtype) -> list[Tensor]:
        inputs, real = _attention_inputs(length, device, dtype), mask.to(device)
        y = nystrom_attention(*inputs, landmarks=16, mask=real)
        y = y + position_convolution(inputs[2], weight.to(device, dtype), real)
        y.square().sum().backward()
        return [y.detach().cpu(), *(t.grad.cpu() for t in inputs)]

    for found, expected in zip(run("cuda", torch.float32), run("cpu", torch.float64), strict=True):
        assert difference(found, expected) < 1e-3


def _attention_inputs(length: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    drawn = [torch.randn(2, 3, length, 48, generator=generator) for _ in range(3)]
    return [t.to(device, dtype, copy=True).requires_grad_() for t in drawn]


@pytest.mark.parametrize("rows", ["full", "padding", "document"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model(name: str, rows: Any) -> None:
    model_type, fields, length = MODELS[name]

    def run(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        described = Description(model_type, fields, dtype, length)
        model = described.filled(Mesh.solo()).to(device)
        batch = described.batch(rows).to(torch.device(device))
        loss = loss_of(model, model(batch, dropout=dropout_key(batch)), batch)
        loss.backward()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach().cpu()} | gradients

    found, expected = run("cuda", torch.float32), run("cpu", torch.float64)
    assert found.keys() == expected.keys()
    largest = max(g.abs().max().item() for name, g in expected.items() if name != "loss")
    for name, value in expected.items():
        assert difference(found[name], value, None if name == "loss" else largest) < 5e-3, name
