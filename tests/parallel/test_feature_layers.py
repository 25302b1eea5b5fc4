"""Layers of features on two tensor ranks against the whole block in float64, composed as MEGA composes them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_close, assert_differs
from models import fill
from sharded import merged, random, run, state, with_sequence
from torch import nn

from farspan.parallel.feature_layers import (
    FeatureLinear,
    FeatureParameter,
    FeatureReduceLinear,
    SharedLinear,
    SharedParameter,
)
from farspan.parallel.mappings import (
    from_features,
    gather_features,
    gather_for_shares,
    scatter_sequence,
    sum_over,
    to_features,
)
from farspan.parallel.mesh import Mesh
from farspan.parallel.normalization import LayerNorm
from farspan.parallel.sharding import initialize, logical_of

S, B, H, Z, V = 6, 3, 8, 4, 12
LAYOUTS = pytest.mark.parametrize(
    ("tensor", "sequence"), [(1, False), (2, False), (2, True)], ids=["one rank", "tensor", "sequence"]
)


class Block(nn.Module):
    """A sum over earlier positions, attention by its features, two gates: where shares and sums meet in MEGA."""

    def __init__(self, mesh):
        super().__init__()
        self.mesh = mesh
        self.norm = LayerNorm(mesh, H, 1e-5)
        self.damping = FeatureParameter(mesh, 2, H, 3, dim=1, std=1.0)
        self.residual = FeatureParameter(mesh, H, dim=0, std=1.0)
        self.values = FeatureLinear(mesh, H, V, std=1.0)
        self.gate = FeatureLinear(mesh, H, H, std=1.0)
        self.shared = SharedLinear(mesh, H, Z, std=1.0)
        self.scale = SharedParameter(mesh, 2, Z, std=1.0)
        self.output = FeatureReduceLinear(mesh, V, H, std=1.0)

    def forward(self, x):
        whole = gather_for_shares(self.norm(x), self.mesh)
        own = H // self.mesh.tensor.size
        mine = whole.narrow(-1, self.mesh.tensor.rank * own, own)
        damping = self.damping().prod(0).sum(-1)
        averaged = gather_features((mine * damping).cumsum(0) + mine * self.residual(), self.mesh.tensor)
        values = torch.tanh(self.values(whole))
        query, key = (self.shared(averaged).unsqueeze(2) * self.scale()).unbind(2)
        weights = torch.einsum("sbz,tbz->bst", query, key).softmax(-1)
        y = self.output(torch.einsum("bst,tbv->sbv", weights, values))
        gate = torch.sigmoid(self.gate(averaged))
        residual = to_features(x, self.mesh)
        out = from_features(residual + gate * (y - residual), self.mesh)
        # Of what each rank has a share: the mean of all gates, which every rank goes on to use.
        mean = sum_over(gate.sum((0, 2)), self.mesh.tensor) / (S * H)
        return out, gate * mean.unsqueeze(1)


def block(mesh, sequence, x, upstream, upstream_of_gates):
    mesh = with_sequence(mesh, sequence)
    module = Block(mesh)
    fill(module.double(), mesh.tensor, std=0.7)
    x = scatter_sequence(x, mesh).clone().requires_grad_()
    y, gates = module(x)
    n = gates.shape[-1]
    mine = upstream_of_gates.narrow(-1, mesh.tensor.rank * n, n)
    torch.autograd.backward((y, gates), (scatter_sequence(upstream, mesh), mine))
    return *state(module), y.detach(), gates.detach(), x.grad


def written_out(w, x):
    """The same on whole tensors."""
    normed = F.layer_norm(x, (H,), w["norm.weight"], w["norm.bias"], 1e-5)
    linear = lambda name, x: x @ w[f"{name}.weight"].t() + w[f"{name}.bias"]  # noqa: E731
    damping = (w["damping.weight"][0] * w["damping.weight"][1]).sum(-1)
    earlier = torch.stack([normed[: i + 1].sum(0) for i in range(S)])
    averaged = earlier * damping + normed * w["residual.weight"]
    shared = linear("shared", averaged)
    query, key = shared * w["scale.weight"][0], shared * w["scale.weight"][1]
    rows = []
    for row in range(B):
        weights = (query[:, row] @ key[:, row].t()).softmax(-1)
        rows.append(weights @ torch.tanh(linear("values", normed[:, row])))
    y = linear("output", torch.stack(rows, 1))
    gate = 1 / (1 + torch.exp(-linear("gate", averaged)))
    return x * (1 - gate) + gate * y, gate * gate.mean((0, 2)).unsqueeze(1)


@LAYOUTS
def test_a_block_is_the_whole(ranks, tensor, sequence):
    x, upstream, upstream_of_gates = (random(S, B, H, seed=seed).double() for seed in range(3))
    parts = run(ranks, block, sequence, x, upstream, upstream_of_gates, tensor=tensor)
    whole, gradients = merged(parts)
    assert whole["damping.weight"].shape == (2, H, 3) and whole["output.weight"].shape == (H, V)
    exact = x.clone().requires_grad_()
    y, gates = written_out(whole, exact)
    torch.autograd.backward((y, gates), (upstream, upstream_of_gates))
    if sequence:
        found, gradient = (torch.cat([part[i] for part in parts]) for i in (2, 4))
        assert_close(found, y.detach(), "output")
        assert_close(gradient, exact.grad, "gradient of the input")
    else:
        for part in parts:
            assert_close(part[2], y.detach(), "output")
            assert_close(part[4], exact.grad, "gradient of the input")
    assert_close(torch.cat([part[3] for part in parts], -1), gates.detach(), "gates")
    assert set(gradients) == set(whole)
    for name, value in whole.items():
        assert_close(gradients[name], value.grad, f"gradient of {name}")
        assert_differs(gradients[name].roll(1), value.grad, f"gradient of {name}, rolled")


# Each by itself.

MAKE = {
    "FeatureLinear": lambda mesh: FeatureLinear(mesh, H, V, std=1.0),
    "SharedLinear": lambda mesh: SharedLinear(mesh, H, V, std=1.0),
    "FeatureReduceLinear": lambda mesh: FeatureReduceLinear(mesh, H, V, std=1.0),
}


def linear(mesh, kind, x, upstream):
    """Inputs, results and gradients as each rank has them: whole, or its own features."""
    own = lambda t: t.chunk(mesh.tensor.size, -1)[mesh.tensor.rank]  # noqa: E731
    module = MAKE[kind](mesh)
    fill(module, mesh.tensor, std=0.7)
    x = (own(x) if kind == "FeatureReduceLinear" else x).clone().requires_grad_()
    y = module(x)
    # A shared product serves each rank's own part of the work: here half of the upstream gradient.
    y.backward(upstream / mesh.tensor.size if kind == "SharedLinear" else own(upstream))
    return *state(module), y.detach(), x.grad


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("kind", MAKE)
def test_products(ranks, kind, tensor):
    x, upstream = random(S, B, H), random(S, B, V, seed=1)
    parts = run(ranks, linear, kind, x, upstream, tensor=tensor)
    whole, gradients = merged(parts)
    exact = x.double().requires_grad_()
    y = F.linear(exact, whole["weight"], whole["bias"])
    y.backward(upstream.double())
    found = [part[2] for part in parts]
    for result in found if kind == "SharedLinear" else [torch.cat(found, -1)]:
        assert_close(result, y.detach(), "output")
    shares = [part[3] for part in parts]
    gradient = torch.cat(shares, -1) if kind == "FeatureReduceLinear" else torch.stack(shares).sum(0)
    assert_close(gradient, exact.grad, "gradient of the input")
    for name, value in whole.items():
        assert_close(gradients[name], value.grad, f"gradient of {name}")


def test_what_parameters_say_of_themselves():
    module = Block(Mesh.solo())
    initialize(module, 3, Mesh.solo().tensor)
    split = {"damping", "residual", "values", "gate", "output"}
    for name, parameter in module.named_parameters():
        logical = logical_of(parameter)
        assert parameter.tensor_model_parallel == (name.split(".")[0] in split), name
        assert (logical.dim is not None) == parameter.tensor_model_parallel, name
        assert logical.shape == tuple(parameter.shape), name
        decayed = name.endswith(".weight") and isinstance(
            module.get_submodule(name.rpartition(".")[0]), (FeatureLinear, SharedLinear, FeatureReduceLinear)
        )
        assert logical.decay == decayed, name
    filled = SharedParameter(Mesh.solo(), 2, Z, fill=1.5)
    means = FeatureParameter(Mesh.solo(), 4, 2, dim=0, std=1e-4, means=(1.0, -1.0), decay=True)
    for some in (filled, means):
        initialize(some, 3, Mesh.solo().tensor)
    assert torch.equal(filled().detach(), torch.full((2, Z), 1.5))
    torch.testing.assert_close(means().detach(), torch.tensor([1.0, -1.0]).expand(4, 2), rtol=0, atol=1e-2)
    assert logical_of(means.weight).decay


def refuse(mesh):
    for make, message in (
        (lambda: FeatureLinear(mesh, 4, 5, std=1.0), r"output features \(5\) does not divide by the tensor size \(2\)"),
        (lambda: FeatureReduceLinear(mesh, 5, 4, std=1.0), r"input features \(5\) does not divide"),
        (lambda: FeatureReduceLinear(mesh, 4, 5, std=1.0), r"output features \(5\) does not divide"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_features_that_do_not_divide_are_refused(ranks):
    ranks.on_mesh(refuse, tensor=2)
