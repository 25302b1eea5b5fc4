"""The layers on two tensor ranks against torch's own in float64, forward and backward."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_close, assert_differs
from models import fill
from sharded import merged, random, run, state

from farspan.parallel.layers import (
    ColumnParallelLinear,
    Embedding,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    padded_vocabulary,
    require_divisible,
    word_table,
)
from farspan.parallel.mappings import copy_to_tensor_region
from farspan.parallel.mesh import Mesh

S, B, H = 5, 3, 8


# Column and row.


def products(mesh, x, upstream):
    module = torch.nn.ModuleDict(
        {"qkv": ColumnParallelLinear(mesh, H, 12, std=1.0, parts=3), "out": RowParallelLinear(mesh, 12, H, std=1.0)}
    )
    fill(module, mesh.tensor, std=1.0)
    x = x.clone().requires_grad_()
    inner = module["qkv"](x)
    y = module["out"](inner)
    y.backward(upstream)
    return *state(module), y.detach(), x.grad, inner.detach()


@pytest.mark.parametrize("tensor", [1, 2])
def test_column_then_row(ranks, tensor):
    x, upstream = random(S, B, H), random(S, B, H, seed=1)
    parts = run(ranks, products, x, upstream, tensor=tensor)
    whole, gradients = merged(parts)
    assert whole["qkv.weight"].shape == (3, 4, H) and whole["out.weight"].shape == (H, 12)
    # The features of q, k and v are split each by itself; the row-parallel product takes them in the ranks' order.
    order = torch.arange(12).view(3, tensor, -1).transpose(0, 1).flatten()
    exact = x.double().requires_grad_()
    inner = F.linear(exact, whole["qkv.weight"].flatten(0, 1), whole["qkv.bias"].flatten())[..., order]
    y = F.linear(inner, whole["out.weight"], whole["out.bias"])
    y.backward(upstream.double())
    assert_close(torch.cat([part[4] for part in parts], -1), inner.detach(), "inner features")
    for part in parts:
        assert_close(part[2], y.detach(), "output")
        assert_close(part[3], exact.grad, "gradient of the input")
    for name, value in whole.items():
        assert_close(gradients[name], value.grad, f"gradient of {name}")
        assert_differs(gradients[name].roll(1), value.grad, f"gradient of {name}, rolled")


# Embeddings.


def look_up(mesh, rows, padding, ids, upstream):
    module = VocabParallelEmbedding(mesh, rows, H, std=1.0, padding_index=padding)
    fill(module, mesh.tensor)
    y = module(ids)
    y.backward(upstream)
    return *state(module), y.detach()


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(("rows", "padding"), [(97, 1), (129, None), (129, 128), (300, 0), (512, 5)])
def test_vocabulary_parallel_embedding(ranks, rows, padding, tensor):
    ids = torch.randint(rows, (S, B), generator=torch.Generator().manual_seed(2))
    ids[0, 0], ids[1, :2], ids[2, 0] = 0, rows - 1, padding or 0
    upstream = random(S, B, H, seed=3)
    parts = run(ranks, look_up, rows, padding, ids, upstream, tensor=tensor)
    whole, gradients = merged(parts)
    y = F.embedding(ids, whole["weight"], padding_idx=padding)
    y.backward(upstream.double())
    for part in parts:
        assert torch.equal(part[2], y.detach().float())
    assert_close(gradients["weight"], whole["weight"].grad, "gradient")
    if padding is not None:
        assert not gradients["weight"][padding].any()


# The head.


def make_head(mesh, size, offset):
    module = VocabParallelHead(mesh, size, H, weight=word_table(mesh, size, H, std=1.0, padding_index=None))
    module.bias.logical = dataclasses.replace(module.bias.logical, fill=offset)
    fill(module, mesh.tensor, std=1.0)
    return module


def head(mesh, size, offset, x, labels, upstream):
    module = make_head(mesh, size, offset)
    x = x.clone().requires_grad_()
    losses, correct = module.loss(x, module.weight, labels, count_correct=True)
    (losses * upstream).sum().backward()
    parameters, gradient = state(module), x.grad
    again = x.detach().requires_grad_()
    logits = module.logits(again, module.weight)
    torch.autograd.backward(logits.logsumexp(-1).sum(), inputs=[again])
    uncounted = module.loss(x, module.weight, labels, count_correct=False)[1]
    return *parameters, losses.detach(), correct, gradient, logits.detach(), again.grad, uncounted


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(("size", "offset"), [(97, 0.0), (129, 0.0), (129, -60.0), (256, 0.0), (300, -60.0)])
def test_head(ranks, size, offset, tensor):
    """With the offset every logit is far below zero: padding that took part as a zero would be the best guess."""
    n = 40
    x, upstream = random(n, H), random(n, seed=5)
    labels = torch.randint(size, (n,), generator=torch.Generator().manual_seed(4))
    labels[:2] = torch.tensor([0, size - 1])
    with torch.no_grad():
        solo = make_head(Mesh.solo(), size, offset)
        labels[::2] = solo.logits(x, solo.weight).argmax(-1)[::2]  # half of the guesses are right
    parts = run(ranks, head, size, offset, x, labels, upstream, tensor=tensor)
    whole, gradients = merged(parts)
    exact, again = x.double().requires_grad_(), x.double().requires_grad_()
    logits = F.linear(exact, whole["weight"], whole["bias"])
    losses = F.cross_entropy(logits, labels, reduction="none")
    (losses * upstream.double()).sum().backward()
    F.linear(again, whole["weight"].detach(), whole["bias"].detach()).logsumexp(-1).sum().backward()
    right = (logits.argmax(-1) == labels).float()
    assert 0.5 <= right.mean() < 1 and logits.max() < (0 if offset else 100)
    for _, _, found, correct, gradient, found_logits, through_logits, uncounted in parts:
        assert_close(found, losses.detach(), "losses")
        assert torch.equal(correct, right) and not uncounted.any()
        assert_close(gradient, exact.grad, "gradient of the input")
        assert_close(found_logits, logits.detach(), "logits")
        assert_close(through_logits, again.grad, "gradient of the input through the whole logits")
    for name, value in whole.items():
        assert_close(gradients[name], value.grad, f"gradient of {name}")


def guess(mesh, weight_of_all, labels):
    module = VocabParallelHead(mesh, len(weight_of_all), H, weight=None)
    fill(module, mesh.tensor, std=0.0)
    part = torch.zeros(module.part, H)
    own = weight_of_all[mesh.tensor.rank * module.part :][: module.part]
    part[: len(own)] = own
    return module.loss(torch.ones(len(labels), H), part, labels, count_correct=True)[1]


def test_the_first_of_equal_logits_is_the_guess(ranks):
    """Also where the others are another rank's."""
    weight = torch.zeros(300, H)
    labels = torch.tensor([0, 3, 255, 256, 299])
    for places, right in (([], 0), ([255, 256], 255), ([256, 299], 256), ([3, 299], 3)):
        weight.zero_()[places] = 1.0
        for correct in [guess(Mesh.solo(), weight, labels), *ranks.on_mesh(guess, weight, labels, tensor=2)]:
            assert labels[correct > 0].tolist() == [right]


# Small things.


def shared(mesh, x):
    x = x.clone().requires_grad_()
    (copy_to_tensor_region(x, mesh.tensor) * (mesh.tensor.rank + 1)).sum().backward()
    return x.grad


def test_copy_sums_the_gradients_of_all_ranks(ranks):
    assert all(torch.equal(grad, torch.full((3,), 3.0)) for grad in ranks.on_mesh(shared, torch.ones(3), tensor=2))


def test_embedding_held_whole():
    module = Embedding(Mesh.solo(), 9, H, std=1.0, padding_index=2)
    fill(module, Mesh.solo().tensor)
    ids = torch.tensor([[1, 2], [2, 8]])
    assert torch.equal(module(ids), module.weight[ids])
    module(ids).sum().backward()
    assert module.weight.grad.sum(1).tolist() == [0, H, 0, 0, 0, 0, 0, 0, H]


@pytest.mark.parametrize(("size", "tensor", "padded"), [(1, 1, 128), (128, 1, 128), (129, 2, 256), (257, 2, 512)])
def test_padded_vocabulary(size, tensor, padded):
    assert padded_vocabulary(size, tensor) == padded


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"heads \(6\) does not divide by the tensor size \(4\): set parallel.tensor"):
        require_divisible("heads", 6, 4)
