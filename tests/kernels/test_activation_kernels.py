"""bias + GELU in CUDA, emulated: against PyTorch in float64, as an operation of torch, in the feed-forward."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from activation_cases import DTYPES, SHAPES, assert_accurate, inputs, run
from comparison import assert_all_close, assert_identical
from guarded import in_child
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from farspan.kernels import forms
from farspan.kernels.activation import bias_gelu, kernel
from farspan.parallel.mesh import Mesh
from farspan.pretrain.models.feed_forward import FeedForward

ORDERS = tuple(functools.partial(forms.emulated, order) for order in (0, 1, 7))


@pytest.mark.parametrize("approximate", [False, True], ids=["erf", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_near_float64_in_any_order(dtype: torch.dtype, approximate: bool) -> None:
    for shape in SHAPES:
        assert_accurate(inputs(shape, dtype), approximate, *ORDERS)
    assert_accurate(inputs((5, 24), dtype, torch.float32), approximate, ORDERS[2])
    assert_accurate(inputs((5, 24), torch.float32, dtype), approximate, ORDERS[2])


def test_many_rows_sum_to_the_bias() -> None:
    assert_accurate(inputs((700, 8), torch.float32), False, *ORDERS[:2])


def test_strides_and_addresses() -> None:
    x, bias, gradient = inputs((6, 16), torch.float32)
    shifted = torch.empty(6 * 16 + 1)[1:].view(6, 16).copy_(x)
    with forms.emulated():
        expected = run(functools.partial(bias_gelu, approximate=False), x, bias, gradient)
        for other in (shifted, x.T.contiguous().T):
            assert_identical(run(functools.partial(bias_gelu, approximate=False), other, bias, gradient), expected)


def test_gradients_of_what_asks_for_them() -> None:
    x, bias, gradient = inputs((4, 8), torch.float32)
    with forms.emulated():
        both = run(functools.partial(bias_gelu, approximate=True), x, bias, gradient)
        for which, name in ((0, "gradient of x"), (1, "gradient of the bias")):
            given = [x.clone(), bias.clone()]
            given[which].requires_grad_()
            (found,) = torch.autograd.grad(bias_gelu(*given, True), given[which], gradient)
            assert torch.equal(found, both[name])


def test_nothing_to_do() -> None:
    x, bias = torch.zeros(0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    with forms.emulated():
        y = bias_gelu(x, bias, False)
        y.sum().backward()
    assert y.shape == x.shape and bias.grad is not None and not bias.grad.any()


def test_an_operation_of_torch() -> None:
    x, bias, gradient = inputs((4, 8), torch.float32)
    with forms.emulated():
        torch.library.opcheck(kernel.bias_gelu_forward, (x.requires_grad_(), bias.requires_grad_(), True))
        torch.library.opcheck(kernel.bias_gelu_backward, (gradient, x.detach(), bias.detach(), True))


def test_compiled_and_computed_again() -> None:
    given = inputs((4, 8), torch.float32)
    function = functools.partial(bias_gelu, approximate=False)
    with forms.emulated():
        expected = run(function, *given)
        whole = torch.compile(lambda x, bias: bias_gelu(x, bias, False), fullgraph=True, backend="aot_eager")
        for other in (whole, functools.partial(checkpoint, function, use_reentrant=False)):
            assert_identical(run(other, *given), expected)


def test_what_it_does_not_take() -> None:
    x, bias, _ = inputs((4, 12), torch.float32)
    with forms.emulated():
        with pytest.raises(ValueError, match="12 features"):
            bias_gelu(x, bias, False)
        double, its_bias = x.double(), bias.double()
        assert torch.equal(bias_gelu(double, its_bias, False), F.gelu(double + its_bias))
        x, one = torch.randn(4, 16), torch.ones(1)
        assert torch.equal(bias_gelu(x, one, False), F.gelu(x + one))


def test_no_memory_but_its_own_is_touched() -> None:
    def touch() -> None:
        torch.set_default_dtype(torch.bfloat16)  # sums have 32 bits all the same
        with forms.emulated():
            for dtype in (torch.float32, torch.bfloat16):
                for shape in ((1, 8), (33, 264)):
                    run(functools.partial(bias_gelu, approximate=False), *inputs(shape, dtype))

    in_child(touch)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_the_feed_forward_leaves_the_bias_to_it(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = FeedForward(Mesh.solo(), 8, 16, activation=activation, std=0.5)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(5, 2, 8)
    calls: list[Tensor] = []
    forward = kernel.bias_gelu_forward
    monkeypatch.setattr(kernel, "bias_gelu_forward", lambda *given: calls.append(given[0]) or forward(*given))

    def step() -> dict[str, Tensor]:
        layer.zero_grad()
        y = layer(x)
        y.square().sum().backward()
        return {"y": y.detach()} | {name: p.grad.clone() for name, p in layer.named_parameters()}

    with forms.mode("reference"):
        expected = step()
    assert not calls
    assert torch.equal(
        expected["y"], F.linear(layer.activation(F.linear(x, layer.up.weight, layer.up.bias)), *layer.down.parameters())
    )
    with forms.emulated():
        found = step()
    assert len(calls) == (0 if activation == "relu" else 1)
    assert_all_close(found, expected, activation)


def feed_forward(mesh: Mesh, form: str) -> dict[str, Tensor]:
    """On every rank the same numbers, of its own part of the features."""
    layer = FeedForward(mesh, 8, 32, activation="gelu", std=0.5)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    x = torch.randn(6, 2, 8, generator=torch.Generator().manual_seed(mesh.tensor.rank))
    if not mesh.sequence_parallel:
        x = mesh.tensor.all_reduce(x, torch.distributed.ReduceOp.SUM)
    with forms.emulated() if form == "emulated" else forms.mode("reference"):
        y = layer(x.requires_grad_())
        y.square().sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad} | {name: p.grad.clone() for name, p in layer.named_parameters()}


def test_of_features_split_over_ranks(ranks: Any) -> None:
    expected, found = (ranks.on_mesh(feed_forward, form, tensor=2) for form in ("reference", "emulated"))
    for one, other in zip(found, expected, strict=True):
        assert_all_close(one, other, "feed-forward")
        assert not torch.equal(one["up.bias"], other["up.bias"])  # another order of the sum: it did run
