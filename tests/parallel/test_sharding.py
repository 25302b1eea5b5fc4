from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from farspan.parallel.mesh import Axis
from farspan.parallel.sharding import Logical, initial_value, initialize, logical_of


@st.composite
def splits(draw):
    """A logical tensor, the number of ranks, and whether the parameters are flattened."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    ranks = draw(st.integers(1, 4))
    dim = draw(st.none() | st.integers(0, len(shape) - 1))
    padded = None
    if dim is not None:
        length = draw(st.integers(1, 9))
        shape[dim] = length
        multiple = draw(st.integers(1, 5)) * ranks
        padded = math.ceil(length / multiple) * multiple
        if padded == length and draw(st.booleans()):
            padded = None
    return Logical(tuple(shape), dim=dim, padded=padded), ranks, draw(st.booleans())


@given(splits())
def test_slices_are_those_of_numpy_and_merge_again(split):
    logical, ranks, flat = split
    full = torch.arange(1.0, 1 + math.prod(logical.shape)).view(logical.shape)
    expected = [full.numpy()] * ranks
    if logical.dim is not None:
        widths = [(0, 0)] * full.dim()
        widths[logical.dim] = (0, (logical.padded or logical.shape[logical.dim]) - logical.shape[logical.dim])
        expected = np.split(np.pad(full.numpy(), widths), ranks, logical.dim)
    parts = []
    for rank in range(ranks):
        axis = Axis(rank, ranks, None)
        shape = logical.local_shape(axis)
        assert shape == expected[rank].shape
        parts.append(logical.slice(full, axis, (math.prod(shape),) if flat else shape))
        np.testing.assert_array_equal(parts[-1].numpy().reshape(shape), expected[rank])
    assert torch.equal(logical.merge(parts), full)
    if logical.dim is not None and ranks > 1 and not torch.equal(parts[0], parts[-1]):
        assert not torch.equal(logical.merge(parts[::-1]), full)


def test_a_tensor_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(4, 3\) was given where \(3, 4\) is needed"):
        Logical((3, 4), dim=0).slice(torch.zeros(4, 3), Axis(0, 1, None), (3, 4))
    with pytest.raises(TypeError, match="was not made by"):
        logical_of(nn.Parameter(torch.zeros(2)))


def test_initial_values_depend_on_seed_and_name_alone():
    logical = Logical((200, 300), std=0.02, zero_row=7)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    value = initial_value("layers.0.weight", logical, 1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    initial_value("another", logical, 1)
    assert torch.equal(initial_value("layers.0.weight", logical, 1), value)
    assert not value[7].any() and value[6].all()
    rest = torch.cat((value[:7], value[8:])).double()
    assert abs(rest.mean().item()) < 0.02 * 4 / math.sqrt(rest.numel())
    assert abs(rest.std().item() / 0.02 - 1) < 0.01
    for name, seed in (("layers.1.weight", 1), ("layers.0.weight", 2)):
        other = torch.cat([initial_value(name, logical, seed)[i] for i in (slice(7), slice(8, None))]).double()
        correlation = (other * rest).mean() / 0.02**2
        assert abs(correlation.item()) < 4 / math.sqrt(rest.numel())
    assert torch.equal(initial_value("x", Logical((3,), fill=1.0), 1), torch.ones(3))


@pytest.mark.parametrize("means", [(2.0,), (1.0, -1.0), (3.0, 0.0, 5.0), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)])
def test_means_repeat_along_the_last_dimension(means):
    logical = Logical((2, 4, 5), std=0.5, means=means)
    noise = initial_value("expansion", dataclasses.replace(logical, means=()), 1)
    value = initial_value("expansion", logical, 1)
    for i in range(5):
        torch.testing.assert_close(value[..., i], noise[..., i] + means[i % len(means)], rtol=0, atol=1e-6)
    zero = initial_value("expansion", dataclasses.replace(logical, zero_row=1), 1)
    assert torch.equal(zero[0], value[0]) and not zero[1].any()


class Holder(nn.Module):
    """Parameters of one tensor rank, in shapes of their own."""

    def __init__(self, logicals: dict[str, Logical], axis: Axis) -> None:
        super().__init__()
        for name, logical in logicals.items():
            parameter = nn.Parameter(torch.full(logical.local_shape(axis), torch.nan))
            parameter.logical = logical  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_same_values_however_many_ranks(ranks):
    words = Logical((129, 6), dim=0, padded=256, std=0.5, zero_row=1)
    logicals = {
        "words": words,
        "copy": dataclasses.replace(words, tied_to="words"),
        "qkv": Logical((3, 8, 6), dim=1, std=0.5),
        "output": Logical((6, 8), dim=1, std=0.5),
        "norm": Logical((6,), fill=1.0),
        "expansion": Logical((2, 8, 5), dim=1, std=0.5, means=(1.0, -1.0)),
        "residual": Logical((12,), dim=0, std=0.5, means=(1.0, 2.0, 4.0, 8.0, 16.0)),
    }
    holders = [Holder(logicals, Axis(rank, ranks, None)) for rank in range(ranks)]
    for rank, holder in enumerate(holders):
        initialize(holder, 3, Axis(rank, ranks, None))
    for name, logical in logicals.items():
        merged = logical.merge([getattr(holder, name).detach() for holder in holders])
        assert torch.equal(merged, initial_value("words" if name == "copy" else name, logical, 3))
    last = holders[-1].words.detach()
    assert not last[129 - 256 :].any() if ranks == 1 else not last[1:].any()
