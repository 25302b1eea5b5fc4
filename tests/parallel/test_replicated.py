"""The optimizer step without partitions, against torch's AdamW and clip_grad_norm_."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_all_close, assert_close, assert_differs, assert_identical
from hypothesis import given
from hypothesis import strategies as st
from models import fill
from torch import nn

from farspan.parallel.layers import Linear
from farspan.parallel.mesh import Mesh
from farspan.parallel.normalization import LayerNorm
from farspan.parallel.replicated import ReplicatedOptimizer, parameter_groups, sum_of_squares

STEPS, CLIP, RATES = 6, 0.7, [1e-2, 2e-2, 5e-3, 1e-2, 1e-3, 3e-2]
ADAMW = {"betas": (0.9, 0.95), "eps": 1e-6, "fused": True}


def make_module():
    module = nn.Sequential(Linear(None, 6, 10, std=1.0), LayerNorm(None, 10, 1e-5), Linear(None, 10, 4, std=1.0))
    fill(module, Mesh.solo().tensor, std=0.5)
    return module


def make_adamw(groups):
    return torch.optim.AdamW(
        [{"params": g["params"], "weight_decay": 0.1 if g["decayed"] else 0.0} for g in groups], lr=1.0, **ADAMW
    )


def data(step, rows=8):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(rows, 6, generator=generator), 3 * torch.randn(rows, 4, generator=generator)


def loss_share(module, x, y, total):
    return F.mse_loss(module(x), y.to(x.dtype), reduction="sum") / total


def train_ours(mesh, dtype=torch.float32, *, clip=CLIP, microbatches=2):
    """Gradient norms and weights; every replica takes its part of the rows."""
    module = make_module().to(dtype)
    optimizer = ReplicatedOptimizer(module, mesh, make_adamw, clip=clip)
    norms = []
    for step in range(STEPS):
        x, y = (t.chunk(mesh.data.size)[mesh.data.rank] for t in data(step))
        optimizer.begin_step()
        for part in range(microbatches):
            optimizer.before_microbatch(last=part == microbatches - 1)
            inputs = x.chunk(microbatches)[part].to(dtype)
            loss_share(optimizer, inputs, y.chunk(microbatches)[part], 8).backward()
        norms.append(optimizer.step(RATES[step], 1.0))
    return norms, {name: p.detach() for name, p in module.named_parameters()}


def train_plainly(clip=CLIP):
    module = make_module().double()
    decayed = [p for name, p in module.named_parameters() if name in ("0.weight", "2.weight")]
    others = [p for p in module.parameters() if all(p is not d for d in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, **(ADAMW | {"fused": False}))
    norms = []
    for step in range(STEPS):
        x, y = data(step)
        optimizer.zero_grad()
        loss_share(module, x.double(), y, 8).backward()
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), clip or float("inf")).item())
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        optimizer.step()
    return norms, {name: p.detach() for name, p in module.named_parameters()}


@pytest.mark.parametrize("clip", [CLIP, 0.0])
def test_one_rank_is_adamw(clip):
    norms, weights = train_ours(Mesh.solo(), clip=clip)
    expected_norms, expected = train_plainly(clip)
    assert min(expected_norms) > CLIP, "clipping must be at work"
    assert_close(norms, expected_norms, "norms")
    assert_all_close(weights, expected, "weights")
    other = train_plainly(0.0 if clip else CLIP)[1]
    assert_differs(weights["0.weight"], other["0.weight"], "clipping must matter")


def test_two_replicas_are_one_with_the_whole_batch(ranks):
    found = ranks.on_mesh(train_ours, data=2)
    expected_norms, expected = train_plainly()
    for norms, weights in found:
        assert_close(norms, expected_norms, "norms")
        assert_all_close(weights, expected, "weights")
    assert_identical(found[0][1], found[1][1])


def test_bfloat16_loses_no_small_update():
    """Two hundred updates, each far below half a unit in the last place of the weights (1 / 256 at 1)."""
    module = LayerNorm(None, 8, 1e-5)
    fill(module, Mesh.solo().tensor, std=0.0)
    module.bfloat16()
    sgd = lambda groups: torch.optim.SGD([{"params": g["params"]} for g in groups], lr=1.0)  # noqa: E731
    optimizer = ReplicatedOptimizer(module, Mesh.solo(), sgd, clip=0.0)
    for _ in range(200):
        optimizer.begin_step()
        (module.weight.float().sum() * 1.0).backward()
        assert abs(optimizer.step(1e-4, 1.0) - 8**0.5) < 1e-6
    assert_close(optimizer.masters[0], torch.full((8,), 0.98), "masters")
    assert torch.equal(module.weight.detach(), torch.full((8,), 0.98).bfloat16())


def test_bfloat16_accumulates_gradients_in_float32():
    """A gradient of 1 and two hundred of 1 / 512, each of which 1 swallows in bfloat16."""
    module = LayerNorm(None, 8, 1e-5).bfloat16()
    fill(module, Mesh.solo().tensor)
    optimizer = ReplicatedOptimizer(module, Mesh.solo(), make_adamw, clip=0.0)
    optimizer.begin_step()
    for share in [1.0] + [1 / 512] * 200:
        (module.weight * share).sum().backward()
    expected = torch.full((8,), 1 + 200 / 512)
    gradient = optimizer.gradient(module.weight)
    assert gradient.dtype == torch.float32 and torch.equal(gradient, expected)
    assert abs(optimizer.step(0.0, 1.0) - expected.norm().item()) < 1e-6


def test_groups_follow_the_parameters_descriptions():
    module = make_module()
    module[2].weight.requires_grad_(False)
    groups = parameter_groups(module.parameters())
    assert [(g["decayed"], len(g["params"])) for g in groups] == [(True, 1), (False, 4)]
    assert groups[0]["params"][0] is module[0].weight


@given(st.integers(0, 20_000), st.floats(-8, 8), st.integers(0, 99))
def test_sum_of_squares(size, magnitude, seed):
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 10**magnitude
    exact = x.double().square().sum()
    found = sum_of_squares(x)
    assert found.dtype == torch.float64 and found.shape == ()
    assert_close(found, exact, "sum")


def test_sum_of_squares_of_a_large_tensor():
    x = torch.full((3, 1 << 21), 0.1)
    assert_close(sum_of_squares(x), x.double().square().sum(), "sum")
