"""What a checkpoint keeps of the optimizer: from every layout all of it once, into every layout bit by bit."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from checkpoints import InMemory, taken
from models import fill
from small_net import OUT, WORDS, H, SmallNet
from torch import nn

from farspan.parallel.engine import Engine
from farspan.parallel.lamb import Lamb
from farspan.parallel.loss_scale import LossScale
from farspan.parallel.mesh import Axis, Mesh
from farspan.parallel.parts import Part, cover
from farspan.parallel.sharding import Logical, logical_of
from farspan.parallel.state import Local

ROWS = 12
RATES = [1e-2, 2e-2, 5e-3]


class Net(SmallNet):
    """And one that is not trained."""

    def __init__(self, mesh):
        super().__init__(mesh)
        self.fixed = nn.Parameter(torch.empty(5), requires_grad=False)
        self.fixed.logical = Logical((5,))
        fill(self, mesh.tensor, std=0.5)


def make_optimizer(name, groups):
    groups = [{**group, "weight_decay": 0.1 if group["decayed"] else 0.0} for group in groups]
    common = {"lr": 1.0, "betas": (0.9, 0.97), "eps": 1e-6}
    return Lamb(groups, **common) if name == "lamb" else torch.optim.AdamW(groups, **common, fused=True)


def engine_of(mesh, module, zero_stage, dtype, name):
    return Engine(
        module, mesh, functools.partial(make_optimizer, name), tied=None, zero_stage=zero_stage,
        offload_optimizer=False, dtype=dtype, clip=0.5, hidden_size=H, statistics=1, loss_scale=LossScale(),
    )  # fmt: skip


def train_step(engine, mesh, step):
    generator = torch.Generator().manual_seed(step)
    ids, targets = torch.randint(WORDS, (ROWS, 2), generator=generator), torch.randn(ROWS, 2, OUT, generator=generator)
    ids, targets = (t.chunk(mesh.data.size)[mesh.data.rank] for t in (ids, targets))
    optimizer = engine.optimizer
    optimizer.begin_step()
    optimizer.before_microbatch(last=True)
    outputs = optimizer(ids)
    loss = F.mse_loss(outputs, targets.to(outputs.dtype), reduction="sum") / (ROWS * 2)
    (loss * (mesh.data.size if optimizer.averages_gradients else 1)).backward()
    assert math.isfinite(optimizer.step(RATES[step], 1.0))


def kept(engine):
    """What this rank would save."""
    pieces = [(p.kind, p.name, p.part, p.values.detach().clone()) for p in engine.pieces()]
    return pieces, engine.optimizer_steps()


def assemble(found):
    """The whole tensors from what all ranks keep: every value of each from exactly one of them."""
    parts, values, steps = {}, {}, {}
    for pieces, of_rank in found:
        assert len({(kind, name) for kind, name, _, _ in pieces}) == len(pieces), "a rank has one part of each"
        for kind, name, part, held in pieces:
            assert held.dim() == 1 and len(held) == part.values > 0
            parts.setdefault((name, kind), []).append(part)
            full = values.setdefault(name, {}).setdefault(kind, torch.full(part.shape, torch.nan, dtype=held.dtype))
            where = taken(torch.arange(full.numel()).view(part.shape), part)
            full.view(-1)[where] = held
        for name, step in of_rank.items():
            assert steps.setdefault(name, step) == step
    for (name, kind), of_tensor in parts.items():
        assert cover(of_tensor, tuple(values[name][kind].shape)), (name, kind)
    return InMemory(values, steps)


@torch.no_grad()
def filled(mesh, saved):
    """The model with the weights of a checkpoint."""
    module = Net(mesh)
    for name, parameter in module.named_parameters():
        full = saved.tensors[name]["weight"].float()
        parameter.copy_(logical_of(parameter).slice(full, mesh.tensor, parameter.shape))
    return module


def save_and_restore(mesh, zero_stage, dtype, name, saved):
    """What a rank keeps at the start, after two steps, after a restore of ``saved`` and a step later; here it goes on
    from its own state as if nothing had been."""
    engine = engine_of(mesh, Net(mesh), zero_stage, dtype, name)
    first = kept(engine)
    for step in range(2):
        train_step(engine, mesh, step)
    trained = kept(engine)
    everywhere = [trained] * mesh.size
    if mesh.size > 1:
        dist.all_gather_object(everywhere, trained)
    train_step(engine, mesh, 2)
    after = [kept(engine)]
    for state in (assemble(everywhere), saved):
        engine = engine_of(mesh, filled(mesh, state), zero_stage, dtype, name)
        engine.load_optimizer(state)
        restored = kept(engine)
        train_step(engine, mesh, 2)
        after.append(kept(engine))
    for (*what, values), (*others, again) in zip(after[0][0], after[1][0], strict=True):
        assert what == others and torch.equal(values, again), what
    return first, trained, restored, after[2]


@functools.cache
def plainly(dtype, name):
    """Of one process: at the start, after two steps, and after three."""
    mesh = Mesh.solo()
    engine, found = engine_of(mesh, Net(mesh), 0, dtype, name), []
    for step in range(3):
        if step != 1:
            found.append(assemble([kept(engine)]))
        train_step(engine, mesh, step)
    return *found, assemble([kept(engine)])


def same(found, expected, tolerance=None):
    """The same tensors of every kind: bit by bit, or nearly."""
    assert {n: {*k} for n, k in found.tensors.items()} == {n: {*k} for n, k in expected.tensors.items()}
    assert found.steps == expected.steps
    for name, kinds in expected.tensors.items():
        for kind, values in kinds.items():
            other = found.tensors[name][kind]
            assert other.dtype == values.dtype
            if tolerance is None:
                assert torch.equal(other, values), (name, kind)
            else:
                assert (other.double() - values.double()).abs().max() <= tolerance * values.double().abs().max(), (
                    name,
                    kind,
                )


def check(found, dtype, name):
    start, trained, later = plainly(dtype, name)
    firsts, after, restored, continued = (assemble(of_ranks) for of_ranks in zip(*found, strict=True))
    moments = {"exp_avg", "exp_avg_sq"}
    masters = {"master"} if dtype != torch.float32 else set()
    for tensor, kinds in after.tensors.items():
        assert {*kinds} == ({"weight"} if tensor == "fixed" else {"weight"} | masters | moments)
        assert kinds["weight"].dtype == dtype
    assert after.steps == dict.fromkeys(set(after.tensors) - {"fixed"}, 2.0)
    assert {n: k["weight"] for n, k in firsts.tensors.items()}.keys() == start.tensors.keys()
    for tensor, kinds in firsts.tensors.items():
        assert torch.equal(kinds["weight"], start.tensors[tensor]["weight"])
    tolerance = 2e-5 if dtype == torch.float32 else 0.1
    same(after, trained, tolerance)
    same(restored, trained)
    same(continued, later, tolerance)


KINDS = [(torch.float32, "adamw"), (torch.bfloat16, "lamb")]


@pytest.mark.parametrize(("dtype", "name"), KINDS)
def test_one_rank(dtype, name):
    check([save_and_restore(Mesh.solo(), 0, dtype, name, plainly(dtype, name)[1])], dtype, name)


@pytest.mark.parametrize(("dtype", "name"), KINDS)
@pytest.mark.parametrize(
    ("tensor", "data", "zero_stage"), [(2, 1, 0), (1, 3, 0), (1, 2, 1), (2, 2, 1), (1, 3, 2), (1, 3, 3), (2, 2, 3)]
)
def test_layouts(ranks, tensor, data, zero_stage, dtype, name):
    if zero_stage == 3:
        ranks.stop()  # DeepSpeed numbers modules for as long as a process lives, and compares the numbers of ranks
    saved = plainly(dtype, name)[1]
    check(
        ranks.on_mesh(save_and_restore, zero_stage, dtype, name, saved, tensor=tensor, data=data, seconds=120),
        dtype,
        name,
    )


def test_what_is_said_by_another_rank():
    """Padding by nobody, copies of the tensor axis by the first rank, a tied tensor where it is first."""
    axes = [Axis(rank, 4, None) for rank in range(4)]
    words, norm, tied = (nn.Parameter(torch.arange(float(n))) for n in (6, 5, 6))
    words.logical, norm.logical = Logical((7, 3), dim=0, padded=8), Logical((5,))
    tied.logical = dataclasses.replace(words.logical, tied_to="words")
    for axis in axes:
        local = Local({words: "words", norm: "norm", tied: "words"}, axis)
        said = {
            parameter: [*local.pieces("weight", parameter, 0, parameter.detach(), True)] for parameter in local.names
        }
        assert [len(piece.values) for piece in said[words]] == [3 if axis.last else 6]
        assert [piece.name for piece in said[norm]] == ["norm"] * axis.first and said[tied] == []
        # Of a partition that begins within the padding, nothing.
        assert [len(p.values) for p in local.pieces("weight", words, 3, torch.zeros(3), False)] == [3] * (not axis.last)
    assert local.part(words, 2, 4) == Part((7, 3), 0, 6, 7, 2, 3)
