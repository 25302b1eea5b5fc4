"""What is done to activations between layers, on two tensor ranks: values and gradients, each with its own upstream."""

from __future__ import annotations

import pytest
import torch
from sharded import random, with_sequence

from farspan.parallel.mappings import (
    copy_to_tensor_region,
    from_features,
    gather_features,
    gather_for_shares,
    gather_sequence,
    max_over,
    on_sequence_part,
    scatter_features,
    scatter_sequence,
    sequence_part,
    sum_over,
    to_features,
)
from farspan.parallel.mesh import Mesh

S, B, H, RANKS = 6, 3, 8, 2
WHOLE = random(S, B, H)
POSITIONS, FEATURES = WHOLE.chunk(RANKS), WHOLE.chunk(RANKS, -1)
EACH = random(RANKS, S, B, H, seed=1)  # different on the two ranks: shares, or upstreams
SUM = EACH.sum(0)

OF_MESH = {f.__name__: f for f in (to_features, from_features, gather_for_shares, gather_sequence, scatter_sequence)}
OF_AXIS = {f.__name__: f for f in (gather_features, scatter_features, sum_over, max_over, copy_to_tensor_region)}


def apply(mesh, name, sequence, xs, upstreams):
    """The result and the gradient on one rank, which has its own of ``xs`` and of ``upstreams``."""
    mesh = with_sequence(mesh, sequence)
    x = xs[mesh.tensor.rank].clone().requires_grad_()
    if name == "on_sequence_part":
        y = on_sequence_part(x, mesh)
    else:
        y = OF_MESH[name](x, mesh) if name in OF_MESH else OF_AXIS[name](x, mesh.tensor)
    y.backward(upstreams[mesh.tensor.rank])
    return y.detach(), x.grad


def both(x):
    return [x] * RANKS


# name, sequence parallelism, inputs of the ranks, results, upstream gradients, gradients of the inputs
CASES = [
    # Between products all have the same, or a part of the positions; what is the same has the same gradient everywhere.
    ("to_features", False, both(WHOLE), FEATURES, SUM.chunk(2, -1), both(SUM)),
    ("to_features", True, POSITIONS, FEATURES, SUM.chunk(2, -1), SUM.chunk(2)),
    ("from_features", False, FEATURES, both(WHOLE), both(SUM), SUM.chunk(2, -1)),
    ("from_features", True, FEATURES, POSITIONS, SUM.chunk(2), SUM.chunk(2, -1)),
    ("gather_sequence", False, both(WHOLE), both(WHOLE), both(SUM), both(SUM)),
    ("gather_sequence", True, POSITIONS, both(WHOLE), both(SUM), SUM.chunk(2)),
    ("scatter_sequence", False, both(WHOLE), both(WHOLE), both(SUM), both(SUM)),
    ("scatter_sequence", True, both(WHOLE), POSITIONS, SUM.chunk(2), both(SUM)),
    # Each rank goes on with a part of the work: gradients are shares, which are summed.
    ("gather_for_shares", False, both(WHOLE), both(WHOLE), EACH, both(SUM)),
    ("gather_for_shares", True, POSITIONS, both(WHOLE), EACH, SUM.chunk(2)),
    ("gather_features", False, FEATURES, both(WHOLE), EACH, SUM.chunk(2, -1)),
    ("copy_to_tensor_region", False, both(WHOLE), both(WHOLE), EACH, both(SUM)),
    ("on_sequence_part", False, both(WHOLE), both(WHOLE), EACH, EACH),
    ("on_sequence_part", True, both(WHOLE), both(WHOLE), EACH, both(SUM)),
    # Each rank has a share of the value.
    ("scatter_features", False, EACH, SUM.chunk(2, -1), FEATURES, both(WHOLE)),
    ("sum_over", False, EACH, both(SUM), EACH, both(SUM)),
    # The rank with the larger value has all of the gradient; what both have, half each.
    ("max_over", False, EACH, both(EACH.amax(0)), EACH, SUM * (EACH.amax(0) == EACH)),
    ("max_over", False, both(WHOLE), both(WHOLE), EACH, both(SUM / 2)),
]


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{case[0]}{'-sequence' * case[1]}" for i, case in enumerate(CASES)])
def test_values_and_gradients(ranks, case):
    name, sequence, xs, results, upstreams, gradients = case
    found = ranks.on_mesh(apply, name, sequence, list(xs), list(upstreams), tensor=RANKS)
    for (y, gradient), result, expected in zip(found, results, gradients, strict=True):
        torch.testing.assert_close(y, result)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", [*OF_MESH, *OF_AXIS])
def test_nothing_happens_on_one_rank(name):
    mesh = Mesh.solo()
    assert (OF_MESH[name](WHOLE, mesh) if name in OF_MESH else OF_AXIS[name](WHOLE, mesh.tensor)) is WHOLE


def summed(mesh, x):
    before = x.clone()
    sum_over(x, mesh.tensor)
    return torch.equal(x, before)


def test_a_sum_leaves_the_shares_as_they_were(ranks):
    assert all(ranks.on_mesh(summed, torch.ones(3), tensor=RANKS))


def parts(mesh):
    results = [sequence_part(6, with_sequence(mesh, sequence)) for sequence in (False, True)]
    with pytest.raises(ValueError, match=r"rows of 7 tokens do not split over parallel.tensor 2, as parallel.sequence"):
        sequence_part(7, with_sequence(mesh, True))
    return results


def test_the_part_of_the_positions(ranks):
    assert ranks.on_mesh(parts, tensor=RANKS) == [[slice(0, 6), slice(0, 3)], [slice(0, 6), slice(3, 6)]]
