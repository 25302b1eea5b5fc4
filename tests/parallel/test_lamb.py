"""LAMB against algorithm 2 in float64, with the parameters whole, split over tensor ranks, and in ZeRO's partitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_all_close, assert_close, merge
from hypothesis import given, settings
from hypothesis import strategies as st
from small_net import INNER, OUT, WORDS, H, SmallNet
from torch import nn

from farspan.parallel.lamb import Contents, Lamb
from farspan.parallel.mesh import Axis, Mesh
from farspan.parallel.replicated import ReplicatedOptimizer
from farspan.parallel.sharding import logical_of
from farspan.parallel.zero import ZeroOptimizer, import_deepspeed

BETAS, EPS, DECAY, CLIP = (0.9, 0.97), 1e-6, 0.1, 0.5
RATES = [1e-2, 2e-2, 5e-3, 1e-2, 2e-2, 1e-2]
ROWS = 8


class PlainLamb:
    """Algorithm 2 as it stands in the paper, with the bias correction of its text, a parameter at a time in float64."""

    def __init__(self, weights, decayed):
        self.weights, self.decayed, self.t = weights, decayed, 0
        self.m = {name: torch.zeros_like(x) for name, x in weights.items()}
        self.v = {name: torch.zeros_like(x) for name, x in weights.items()}

    def step(self, gradients, rate):
        self.t += 1
        for name, g in gradients.items():
            x = self.weights[name]
            self.m[name] = BETAS[0] * self.m[name] + (1 - BETAS[0]) * g
            self.v[name] = BETAS[1] * self.v[name] + (1 - BETAS[1]) * g**2
            m_hat, v_hat = self.m[name] / (1 - BETAS[0] ** self.t), self.v[name] / (1 - BETAS[1] ** self.t)
            update, ratio = m_hat / (v_hat.sqrt() + EPS), 1.0
            if name in self.decayed:
                update = update + DECAY * x
                if x.norm() > 0 and update.norm() > 0:
                    ratio = x.norm() / update.norm()
            self.weights[name] = x - rate * ratio * update


def make_lamb(groups):
    decays = ({**group, "weight_decay": DECAY if group["decayed"] else 0.0} for group in groups)
    return Lamb(list(decays), lr=1.0, betas=BETAS, eps=EPS)


# The optimizer alone.


SHAPES = {"matrix": (70, 90), "vector": (5000,), "zero": (4, 4), "idle": (3,), "bias": (11,), "scalar": (1,)}
DECAYED = {"matrix", "vector", "zero", "idle"}


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(s, generator=generator) * (name != "zero") for name, s in SHAPES.items()}


def gradients_of(step):
    generator = torch.Generator().manual_seed(100 + step)
    return {name: 10.0**-step * torch.randn(s, generator=generator) for name, s in SHAPES.items() if name != "idle"}


def lamb_of(weights):
    groups = [
        {"params": [x for n, x in weights.items() if (n in DECAYED) == on], "decayed": on} for on in (True, False)
    ]
    return make_lamb(groups)


def test_one_process_is_algorithm_2():
    weights, expected = tensors(), PlainLamb({n: x.double() for n, x in tensors().items()}, DECAYED)
    optimizer = lamb_of(weights)
    for step, rate in enumerate(RATES):
        for name, gradient in gradients_of(step).items():
            weights[name].grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        expected.step({n: g.double() for n, g in gradients_of(step).items()}, rate)
        assert_all_close(weights, expected.weights, f"step {step}")
    assert torch.equal(weights["idle"], tensors()["idle"]) and weights["idle"] not in optimizer.state
    assert weights["zero"].any(), "from zero the ratio is 1"
    state = optimizer.state[weights["matrix"]]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"} and state["step"] == len(RATES)
    assert_close(state["exp_avg"], expected.m["matrix"], "first moment")
    assert_close(state["exp_avg_sq"], expected.v["matrix"], "second moment")


def test_a_step_is_relative_to_the_weights():
    """Whatever the size of weights and gradient, the weights move by the learning rate times their norm."""
    moved = []
    for size in (1.0, 1e3):
        weights = torch.randn(30, 40, generator=torch.Generator().manual_seed(1)) * size
        start, weights.grad = weights.clone(), torch.linspace(1, 2, 1200).view(30, 40) * size**2
        Lamb([{"params": [weights]}], lr=0.01).step()
        assert abs(((weights - start).norm() / start.norm()).item() - 0.01) < 1e-6
        moved.append(weights / size)
    assert_close(moved[1], moved[0], "weights")


# Which values of a partition are of which parameter.


def painted(contents, size):
    """The number of the parameter of each value, -1 for padding."""
    owners = torch.full((size,), -1)
    for segment in contents.segments:
        assert segment.start < segment.stop <= size and (owners[segment.start : segment.stop] == -1).all()
        owners[segment.start : segment.stop] = segment.parameter
    assert len({segment.parameter for segment in contents.segments}) == len(contents.segments)
    return owners


SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=8)


@settings(deadline=None)
@given(sizes=SIZES, gaps=st.lists(st.integers(0, 3), min_size=8, max_size=8), ranks=st.integers(1, 5))
def test_slices_of_a_flat_buffer(sizes, gaps, ranks):
    gaps = gaps[: len(sizes)]
    owners = [owner for number in range(len(sizes)) for owner in (number, -1)]
    flat = torch.tensor(owners).repeat_interleave(
        torch.tensor([n for pair in zip(sizes, gaps, strict=True) for n in pair])
    )
    flat = F.pad(flat, (0, -len(flat) % ranks), value=-1)
    offsets = [flat.tolist().index(number) for number in range(len(sizes))]
    for rank, part in enumerate(flat.chunk(ranks)):
        contents = Contents.of_slice(rank * len(part), (rank + 1) * len(part), offsets, sizes)
        assert torch.equal(painted(contents, len(part)), part) and contents.parameters == len(sizes)


@settings(deadline=None)
@given(sizes=SIZES, ranks=st.integers(1, 5))
def test_shards_of_every_parameter(sizes, ranks):
    padded = [F.pad(torch.full((n,), i), (0, -n % ranks), value=-1) for i, n in enumerate(sizes)]
    for rank in range(ranks):
        part = torch.cat([x.view(ranks, -1)[rank] for x in padded])
        contents = Contents.of_shards(Axis(rank, ranks, None), sizes)
        assert torch.equal(painted(contents, len(part)), part) and contents.parameters == len(sizes)


# In training, in every layout.


def plain_net(w, ids):
    x = F.embedding(ids, w["words.weight"], padding_idx=1)
    inner = F.gelu(F.linear(x, w["up.weight"].view(INNER, H), w["up.bias"].view(INNER)))
    x = x + F.linear(inner, w["down.weight"], w["down.bias"])
    return F.linear(F.layer_norm(x, (H,), w["norm.weight"], w["norm.bias"], 1e-5), w["out.weight"], w["out.bias"])


def data(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(WORDS, (ROWS, 2), generator=generator), torch.randn(ROWS, 2, OUT, generator=generator)


def loss_of(outputs, targets):
    return F.mse_loss(outputs, targets.to(outputs.dtype), reduction="sum") / (ROWS * 2)


def train(mesh, zero_stage=0):
    """Gradient norms, and (Logical, value) of the weights at the end; each replica takes its part of the rows."""
    module = SmallNet(mesh)
    if zero_stage == 0:
        optimizer = ReplicatedOptimizer(module, mesh, make_lamb, clip=CLIP)
    else:
        optimizer = ZeroOptimizer(module, mesh, make_lamb, stage=zero_stage, clip=CLIP)
    norms = []
    for step, rate in enumerate(RATES):
        ids, targets = (t.chunk(mesh.data.size)[mesh.data.rank] for t in data(step))
        optimizer.begin_step()
        optimizer.before_microbatch(last=True)
        loss = loss_of(optimizer(ids), targets) * (mesh.data.size if optimizer.averages_gradients else 1)
        loss.backward()
        norms.append(optimizer.step(rate, 1.0))
    weights = {}
    for name, parameter in module.named_parameters():
        with import_deepspeed().zero.GatheredParameters([parameter], enabled=zero_stage == 3):
            weights[name] = logical_of(parameter), parameter.detach().clone()
    return norms, weights


def train_plainly():
    net = SmallNet(Mesh.solo())
    decayed = {name for name, p in net.named_parameters() if p.dim() > 1 and name != "up.bias"}
    assert decayed == {"words.weight", "up.weight", "down.weight", "out.weight"}
    optimizer = PlainLamb(
        {n: merge([(logical_of(p), p.detach())]).double() for n, p in net.named_parameters()}, decayed
    )
    norms = []
    for step, rate in enumerate(RATES):
        leaves = {name: x.clone().requires_grad_() for name, x in optimizer.weights.items()}
        ids, targets = data(step)
        loss_of(plain_net(leaves, ids), targets).backward()
        norms.append(nn.utils.clip_grad_norm_(leaves.values(), CLIP).item())
        optimizer.step({name: x.grad for name, x in leaves.items()}, rate)
    assert min(norms) > CLIP, "clipping must be at work"
    return norms, optimizer.weights


def check(found, tensor=1):
    expected_norms, expected = train_plainly()
    for norms, _ in found:
        assert_close(norms, expected_norms, "norms")
    for replica in (found[i : i + tensor] for i in range(0, len(found), tensor)):
        merged = {name: merge([weights[name] for _, weights in replica]) for name in expected}
        assert_all_close(merged, expected, "weights")


def test_one_rank():
    check([train(Mesh.solo())])


@pytest.mark.parametrize(
    ("tensor", "data", "zero_stage"), [(2, 1, 0), (1, 2, 0), (1, 2, 1), (1, 2, 2), (2, 2, 1), (1, 2, 3)]
)
def test_layouts(ranks, tensor, data, zero_stage):
    if zero_stage == 3:
        ranks.stop()  # DeepSpeed numbers modules for as long as a process lives, and compares the numbers of ranks
    check(ranks.on_mesh(train, zero_stage=zero_stage, tensor=tensor, data=data, seconds=120), tensor)
