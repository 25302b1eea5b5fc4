"""Training with compiled kernels gives the losses of the references, dropout's masks included.

On a CPU two forms of kernels can run: those compiled for it, and the CUDA sources, emulated thread by thread.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Description, dropout_key, loss_of

from farspan.kernels import forms
from farspan.kernels.library import Library
from farspan.parallel.mesh import Mesh
from farspan.pretrain import run
from farspan.pretrain.config import KernelsConfig
from farspan.pretrain.models import architecture

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler: there is no c++")
STEPS = 4
SIZES = {"hidden_size": 64, "intermediate_size": 96, "nffn_hidden_size": 96, "num_hidden_layers": 2}
ROBERTA = ("roberta-prelayernorm", {}, 48)
MEGA = ("mega", {"ema_projection_size": 16, "shared_representation_size": 32, "max_positions": 80}, 80)
MRA = ("mra", {"block_per_row": 2, "max_position_embeddings": 208}, 208)
NYSTROMFORMER = ("nystromformer", {"num_landmarks": 16, "conv_kernel_size": 5, "max_position_embeddings": 48}, 48)
MODELS = {
    "roberta-prelayernorm": ROBERTA,
    "megatron-bert": ("megatron-bert", {}, 48),
    "mega": MEGA,
    "mra": MRA,
    "nystromformer": NYSTROMFORMER,
}
Form = Callable[[], contextlib.AbstractContextManager[None]]
FORMS: dict[str, Form] = {
    "for the CPU": lambda: forms.mode("require"),
    "CUDA, emulated": lambda: forms.emulated(),
    "CUDA, emulated in another order": lambda: forms.emulated(5),
}
# Of losses; twice the rounding of what is added up in 16 bits.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def prepared(mesh: Mesh, lacks: int | None) -> tuple[str, bool]:
    """What a rank says it runs, and whether dropout is compiled, where one rank cannot build it."""
    choose = forms._choose

    def without_compiler(operation: str, device: torch.device, mode: str) -> forms.Choice:
        lacking = operation == "dropout" and mesh.rank == lacks
        return forms.Choice(None, "there is no compiler") if lacking else choose(operation, device, mode)

    model = types.SimpleNamespace(model_type="roberta-prelayernorm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "_choose", without_compiler)
        config = types.SimpleNamespace(model=model, kernels=KernelsConfig())
        said = run.prepare_kernels(config, mesh), forms.compiled("dropout", mesh.device)
    forms.configure()
    return said


def test_a_form_that_a_rank_lacks_runs_nowhere(ranks: Any) -> None:
    """What tensor ranks compute alike must stay the same, to the bit."""
    assert [compiled for _, compiled in ranks.on_mesh(prepared, None, tensor=2, seconds=200)] == [True, True]
    (said, first), (_, second) = ranks.on_mesh(prepared, 1, tensor=2, seconds=200)
    assert (first, second) == (False, False)
    assert "dropout reference (rank 1: there is no compiler), layer_norm compiled" in said
    (said, first), (_, second) = ranks.on_mesh(prepared, 0, tensor=2, seconds=200)
    assert (first, second) == (False, False) and "dropout reference (there is no compiler)" in said


def describe(model: tuple[str, dict[str, Any], int], dtype: torch.dtype = torch.float32) -> Description:
    name, fields, length = model
    known = architecture(name).config_class.model_fields
    sizes = {"max_position_embeddings": length + 2} | SIZES | fields
    return Description(name, {key: value for key, value in sizes.items() if key in known}, dtype, length)


def train(description: Description, attention: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of a few steps, and the gradients of the last."""
    model, batch = description.filled(Mesh.solo()), description.batch(attention)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, model(batch, dropout=dropout_key(batch, step)), batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@functools.cache
def expected(name: str, dtype: torch.dtype, attention: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    with forms.mode("reference"):
        return train(describe(MODELS[name], dtype), attention)


@pytest.mark.parametrize("form", ["for the CPU", "CUDA, emulated"])
@pytest.mark.parametrize("name", MODELS)
def test_in_float32(name: str, form: str) -> None:
    check(name, torch.float32, "document", form)


@pytest.mark.parametrize("name", ["mega", "mra"])
def test_with_padding_and_another_order(name: str) -> None:
    check(name, torch.float32, "padding", "CUDA, emulated in another order")


@pytest.mark.parametrize("name", MODELS)
def test_in_16_bits(name: str) -> None:
    check(name, torch.bfloat16, "document", "CUDA, emulated")


def check(name: str, dtype: torch.dtype, attention: str, form: str) -> None:
    called: set[str] = set()
    call = Library.call

    def watched(self: Library, function: str, *arguments: Any) -> None:
        called.add(function.rsplit("_", 1)[0])
        call(self, function, *arguments)

    with pytest.MonkeyPatch.context() as patch, FORMS[form]():
        patch.setattr(Library, "call", watched)
        found, gradients = train(describe(MODELS[name], dtype), attention)
    assert called, "no kernel ran"
    losses, of_reference = expected(name, dtype, attention)
    assert found == pytest.approx(losses, rel=TOLERANCE[dtype])
    assert len(set(found)) == STEPS
    largest = max(g.abs().max().item() for g in of_reference.values())
    for key, gradient in of_reference.items():
        difference = (gradients[key].double() - gradient.double()).abs().max().item()
        assert difference <= 50 * TOLERANCE[dtype] * max(gradient.abs().max().item(), 1e-3 * largest), key
