"""Norms against torch's own in float64, here and on the ranks of a mesh."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_all_close, assert_close, assert_differs, merge
from models import fill
from sharded import random, run, state, with_sequence
from torch import nn

from farspan.parallel.mesh import Mesh
from farspan.parallel.normalization import BatchNorm, LayerNorm, RMSNorm, ScaleNorm, norm_of
from farspan.parallel.sharding import initialize, logical_of

S, B, H, EPS = 6, 4, 8, 1e-3
X, UPSTREAM = 2 * random(S, B, H) + 1, random(S, B, H, seed=1)


def part(t, mesh):
    """This rank's rows and, under sequence parallelism, positions."""
    t = t.chunk(mesh.data.size, 1)[mesh.data.rank]
    return t.chunk(mesh.tensor.size)[mesh.tensor.rank] if mesh.sequence_parallel else t


def joined(parts, *, data=1, sequence=False):
    """The whole of what ``part`` cut, in the order of the ranks."""
    tensor = len(parts) // data
    rows = [parts[i : i + tensor] for i in range(0, len(parts), tensor)]
    return torch.cat([torch.cat(row) if sequence else row[0] for row in rows], 1)


# Of each token.

CLASSES = {"layernorm": LayerNorm, "rmsnorm": RMSNorm, "scalenorm": ScaleNorm}
WEIGHTS = {"layernorm": {"weight", "bias"}, "rmsnorm": {"weight"}, "scalenorm": {"weight"}}


class TorchScaleNorm(nn.Module):
    """What MEGA calls so: the scalar times x, divided by the root of its mean square."""

    def __init__(self, affine):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1)) if affine else None

    def forward(self, x):
        y = x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt()
        return y if self.weight is None else self.weight * y


def truth(kind, values):
    """torch's module with these weights, in float64."""
    affine = bool(values)
    if kind == "scalenorm":
        module = TorchScaleNorm(affine)
    else:
        module = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}[kind](H, EPS, elementwise_affine=affine)
    module.load_state_dict(values)
    return module.double()


def of_tokens(mesh, kind, affine, sequence):
    mesh = with_sequence(mesh, sequence)
    module = norm_of(kind, mesh, H, EPS, affine=affine)
    fill(module, mesh.tensor, std=0.5)
    assert type(module) is CLASSES[kind]
    x = part(X, mesh).clone().requires_grad_()
    y = module(x)
    y.backward(part(UPSTREAM, mesh))
    return *state(module), y.detach(), x.grad


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
def test_of_each_token(ranks, kind, affine, tensor, sequence):
    parts = run(ranks, of_tokens, kind, affine, sequence, tensor=tensor)
    values, gradients = ({n: merge([p[i][n] for p in parts]) for n in parts[0][i]} for i in range(2))
    assert set(values) == (WEIGHTS[kind] if affine else set())
    module, x = truth(kind, values), X.double().requires_grad_()
    y = module(x)
    y.backward(UPSTREAM.double())
    assert_close(joined([p[2] for p in parts], sequence=sequence), y.detach(), "output")
    assert_close(joined([p[3] for p in parts], sequence=sequence), x.grad, "gradient of the input")
    assert_all_close(gradients, {name: p.grad for name, p in module.named_parameters()}, "gradient of")


@pytest.mark.parametrize("kind", CLASSES)
def test_bfloat16_is_rounded_once(kind):
    """Statistics, and what follows up to the result, are float32: nearly every value is the nearest to the exact."""
    module = norm_of(kind, Mesh.solo(), 64, EPS, affine=True)
    initialize(module, 0, Mesh.solo().tensor)
    x = (random(200, 1, 64) + 16).bfloat16()
    y = module.bfloat16()(x)
    wide = x.double()
    wide = wide - wide.mean(-1, keepdim=True) if kind == "layernorm" else wide
    exact = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    assert y.dtype == torch.bfloat16
    assert (y == exact.bfloat16()).double().mean() > 0.99


def test_scale_norm_has_one_number():
    module = norm_of("scalenorm", Mesh.solo(), H, EPS, affine=True)
    assert module.weight.shape == (1,) and logical_of(module.weight).shape == (1,)


# Batch norm.

WEIGHT, BIAS = random(H, seed=4), random(H, seed=5)
REAL = torch.arange(S).unsqueeze(1) < torch.tensor([6, 4, 1, 5])
MICROBATCHES = [(X, REAL), (3 * random(S, B, H, seed=2), REAL.flip(0)), (random(S, B, H, seed=3) - 2, REAL.flip(1))]
TOGETHER, APART = [slice(0, B)], [slice(0, B // 2), slice(B // 2, B)]  # rows that share statistics
RUNNING = ("running_mean", "running_var", "num_batches_tracked")


def make(mesh, **options):
    module = BatchNorm(mesh, H, EPS, **options)
    initialize(module, 0, mesh.tensor)
    if module.weight is not None:
        with torch.no_grad():
            module.weight.copy_(WEIGHT)
            module.bias.copy_(BIAS)
    return module


def running(module):
    """As logical tensors."""
    parameters = {name: getattr(module, name) for name in RUNNING}
    return {name: merge([(logical_of(p), p.detach().clone())]) for name, p in parameters.items()}


def train(mesh, sequence=False, microbatches=MICROBATCHES, **options):
    """One step: of each microbatch output and gradient of the input, of the module gradients and running statistics."""
    mesh = with_sequence(mesh, sequence)
    module, outputs, inputs = make(mesh, **options), [], []
    for x, real in microbatches:
        x, real = part(x, mesh).clone().requires_grad_(), part(real, mesh)
        y = module(x, real, training=True)
        y.backward(part(UPSTREAM, mesh) * real.unsqueeze(-1))
        outputs.append(y.detach() * real.unsqueeze(-1))
        inputs.append(x.grad)
    module.end_step(keep=True)
    gradients = {} if module.weight is None else {"weight": module.weight.grad, "bias": module.bias.grad}
    return outputs, inputs, gradients, running(module)


def expected(rows_together, microbatches=MICROBATCHES, *, affine=True):
    """By torch's batch norm of the real tokens."""
    module = nn.BatchNorm1d(H, EPS, affine=affine).double()
    if affine:
        module.load_state_dict(module.state_dict() | {"weight": WEIGHT, "bias": BIAS})
    outputs, inputs, statistics = [], [], []
    for x, real in microbatches:
        x, y = x.double().requires_grad_(), torch.zeros(S, B, H, dtype=torch.float64)
        for rows in rows_together:
            tokens = x[:, rows][real[:, rows]]
            y[:, rows][real[:, rows]] = module(tokens)
            statistics.append(torch.stack((tokens.mean(0), tokens.var(0))).detach())
        y.backward(UPSTREAM.double() * real.unsqueeze(-1))
        outputs.append(y.detach())
        inputs.append(x.grad)
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    mean, variance = 0.1 * torch.stack(statistics).mean(0) + 0.9 * torch.tensor([[0.0], [1.0]])
    if len(statistics) == 1:  # torch's own
        assert_close(module.running_mean, mean, "mean")
        assert_close(module.running_var, variance, "variance")
    return outputs, inputs, gradients, dict(zip(RUNNING, (mean, variance, torch.tensor(1)), strict=True))


def compare(parts, truth, *, data=1, sequence=False):
    for i, what in enumerate(("output", "gradient of the input")):
        for number, value in enumerate(truth[i]):
            whole = joined([p[i][number] for p in parts], data=data, sequence=sequence)
            assert_close(whole, value, f"{what} {number}")
    replicas = parts[:: len(parts) // data]
    summed = {name: sum(p[2][name] for p in replicas) for name in replicas[0][2]}
    assert_all_close(summed, truth[2], "gradient of")
    for p in parts:
        assert_all_close(p[3], truth[3], "after the step")
        assert all(torch.equal(p[3][name], parts[0][3][name]) for name in RUNNING)


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("count", [1, 3])
def test_batch_norm_of_the_real_tokens(affine, count):
    some = MICROBATCHES[:count]
    compare([train(Mesh.solo(), microbatches=some, affine=affine)], expected(TOGETHER, some, affine=affine))
    everything = [(x, torch.ones_like(real)) for x, real in some]
    assert_differs(expected(TOGETHER, everything)[0][0], expected(TOGETHER, some)[0][0], "padding")


@pytest.mark.parametrize(
    ("tensor", "data", "sequence", "replicas"),
    [(2, 1, False, False), (2, 1, True, False), (1, 2, False, True), (1, 2, False, False), (2, 2, True, True)],
    ids=["tensor", "sequence", "replicas together", "replicas apart", "all together"],
)
def test_batch_norm_on_ranks(ranks, tensor, data, sequence, replicas):
    parts = ranks.on_mesh(train, sequence, replicas=replicas, tensor=tensor, data=data)
    together, apart = expected(TOGETHER), expected(APART)
    assert_differs(apart[0][0], together[0][0], "replicas apart")
    compare(parts, apart if data == 2 and not replicas else together, data=data, sequence=sequence)


def test_the_names_of_batch_norms():
    for kind, axes in (("batchnorm", 0), ("syncbatchnorm", 1)):
        module = norm_of(kind, Mesh.solo(), H, EPS, affine=False)
        assert type(module) is BatchNorm and len(module.axes) == axes and module.weight is None


def test_evaluation_goes_by_the_running_statistics():
    module, theirs = make(Mesh.solo()), nn.BatchNorm1d(H, EPS).double()
    with torch.no_grad():
        module.running_mean.copy_(random(H, seed=6))
        module.running_var.copy_(random(H, seed=7).square())
    theirs.load_state_dict(running(module) | {"weight": WEIGHT, "bias": BIAS})
    theirs.eval()
    before, x, exact = running(module), X.clone().requires_grad_(), X.double().requires_grad_()
    y = module(x, REAL, training=False)
    truth = theirs(exact.flatten(0, 1)).view_as(exact)
    y.backward(UPSTREAM)
    truth.backward(UPSTREAM.double())
    assert_close(y.detach(), truth.detach(), "output")
    assert_close(x.grad, exact.grad, "gradient of the input")
    for name, value in theirs.named_parameters():
        assert_close(getattr(module, name).grad, value.grad, f"gradient of {name}")
    module.end_step(keep=True)
    assert all(torch.equal(value, before[name]) for name, value in running(module).items())


def test_a_step_that_leaves_no_trace():
    module = make(Mesh.solo())
    before = running(module)
    module(*MICROBATCHES[0], training=True)
    module.end_step(keep=False)
    module.end_step(keep=True)  # of a step without microbatches
    assert all(torch.equal(value, before[name]) for name, value in running(module).items())
    for _ in range(2):
        module(*MICROBATCHES[0], training=True)
        module.end_step(keep=True)
    theirs = nn.BatchNorm1d(H, EPS).double()
    for _ in range(2):
        theirs(X.double()[REAL])
    assert_all_close(running(module), {name: getattr(theirs, name) for name in RUNNING}, "after two steps")


def test_without_a_real_token():
    module = make(Mesh.solo())
    x = X.clone().requires_grad_()
    y = module(x, torch.zeros_like(REAL), training=True)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu", torch.float16)],
    ids=["bfloat16", "to bfloat16", "half", "to float16"],
)
def test_running_statistics_stay_in_float32(cast):
    module = make(Mesh.solo())
    with torch.no_grad():
        module.running_mean.fill_(1 / 3)
        module.running_var.fill_(2 / 3)
    outer = cast(nn.Sequential(nn.Linear(2, 2), module))
    assert outer[0].weight.dtype == module.weight.dtype and module.weight.element_size() == 2
    for name, value in (("running_mean", 1 / 3), ("running_var", 2 / 3)):
        parameter = getattr(module, name)
        assert parameter.dtype == torch.float32 and torch.equal(parameter.detach(), torch.full((H,), value))
        assert not parameter.requires_grad and logical_of(parameter).shape == (H,)
    assert module.num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_batch_norm_of_other_types(dtype):
    """With a mean of 16 in every feature, statistics in bfloat16 would be those of other tokens."""
    x = (X / 2 + 16).to(dtype).requires_grad_()
    module = make(Mesh.solo(), affine=False).to(dtype)
    y = module(x, REAL, training=True)
    y.backward(UPSTREAM.to(dtype) * REAL.unsqueeze(-1))
    module.end_step(keep=True)
    exact = x.detach().double().requires_grad_()
    theirs = nn.BatchNorm1d(H, EPS, affine=False).double()
    truth = theirs(exact[REAL])
    truth.backward(UPSTREAM.to(dtype).double()[REAL])
    assert y.dtype == dtype
    assert (y[REAL] == truth.to(dtype)).double().mean() > 0.99 or dtype is torch.float64
    for ours, exactly in ((y[REAL], truth), (x.grad, exact.grad)):
        torch.testing.assert_close(ours.double(), exactly, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    assert_all_close(running(module), {name: getattr(theirs, name) for name in RUNNING}, "after the step")
