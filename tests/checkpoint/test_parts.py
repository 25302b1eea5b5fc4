"""Parts of tensors and what they have in common, against index arithmetic that looks at every value."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from checkpoints import refused, taken
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.parallel.mesh import Axis
from farspan.parallel.parts import Part, Runs, cover, overlap
from farspan.parallel.sharding import Logical

SMALL = st.integers(0, 5)
SHAPES = st.one_of(
    st.lists(SMALL, max_size=4).map(tuple),
    st.tuples(st.integers(1000, 4000), st.integers(1, 4), st.integers(1, 3)),  # thousands of rows before the slice
    st.tuples(st.integers(1, 3), st.integers(500, 2000), st.integers(1, 3)),
)


@st.composite
def parts(draw, shape, dim):
    """Any run of any slice; often one that begins or ends within a row, or all of it."""
    size = shape[dim] if shape else 1
    start = draw(st.integers(0, size))
    stop = draw(st.integers(start, size))
    part = Part.of_slice(shape, dim, start, stop) if shape else Part.whole(shape)
    if draw(st.booleans()):
        return part
    begin = draw(st.integers(0, part.slice_values))
    return part.run(begin, draw(st.integers(begin, part.slice_values)))


@st.composite
def pairs(draw):
    shape = draw(SHAPES)
    dim = draw(st.integers(0, max(len(shape) - 1, 0)))
    return draw(parts(shape, dim)), draw(parts(shape, dim))


def numbered(shape):
    return torch.arange(math.prod(shape)).view(shape)


def check_overlap(source, target):
    """Copied by the runs, the target has exactly those values of its own that the source has, each written once."""
    full = numbered(source.shape)
    have, want = taken(full, source), taken(full, target)
    found = overlap(source, target)
    expected = torch.where(torch.isin(want, have), want, -1)
    copied, times = torch.full_like(want, -1), torch.zeros_like(want)
    for runs in found:
        assert runs.count >= 1 and runs.length >= 1
        runs.copy(have, copied)
        for begin, into in runs:
            assert begin >= 0 and begin + runs.length <= len(have) and 0 <= into <= len(want) - runs.length
            times[into : into + runs.length] += 1
        assert runs.source_end == max(begin for begin, _ in runs) + runs.length
    assert torch.equal(copied, expected)
    assert torch.equal(times, (expected >= 0).long())
    starts = [at for runs in found for at in runs]
    assert len(found) <= 3 and starts == sorted(starts)


@settings(deadline=None, max_examples=400)
@given(pairs())
def test_overlap_is_every_common_value_once(pair):
    check_overlap(*pair)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple).flatmap(
    lambda shape: st.tuples(st.just(shape), st.permutations(range(len(shape))), st.booleans())
), st.data())  # fmt: skip
def test_parts_of_slices_of_different_dimensions(case, data):
    """One of them is of the whole tensor; which one, and whether it is a run of it, does not matter."""
    shape, (dim, other, *_), swap = case
    whole = Part.of_slice(shape, dim, 0, shape[dim])
    begin = data.draw(st.integers(0, whole.values))
    pair = whole.run(begin, data.draw(st.integers(begin, whole.values))), data.draw(parts(shape, other))
    check_overlap(*reversed(pair) if swap else pair)


def test_cuts_along_two_dimensions_have_no_runs_in_common():
    rows, columns = Part.of_slice((4, 6), 0, 0, 2), Part.of_slice((4, 6), 1, 3, 6)
    refused(lambda: overlap(rows, columns), "a tensor of shape (4, 6) is cut along dimension 1, not 0")
    refused(lambda: overlap(columns, rows), "a tensor of shape (4, 6) is cut along dimension 0, not 1")


def test_many_rows_are_three_groups():
    """Not one object a row: a row-parallel matrix has tens of thousands."""
    source = Part.of_slice((50_000, 64), 1, 16, 32).run(3, 50_000 * 16 - 1)
    found = overlap(source, Part.of_slice((50_000, 64), 1, 24, 64))
    assert [runs.count for runs in found] == [1, 49_998, 1]


@settings(deadline=None, max_examples=200)
@given(pairs(), st.data())
def test_some_of_the_runs_from_what_was_read_of_them(pair, data):
    """Read portion by portion, each from its own beginning, they are the same as all at once."""
    source, target = pair
    have = taken(numbered(source.shape), source)
    at_once, bit_by_bit = (torch.full((target.values,), -1) for _ in range(2))
    for runs in overlap(source, target):
        runs.copy(have, at_once)
        size = data.draw(st.integers(1, runs.count))
        for first in range(0, runs.count, size):
            some = runs.some(first, min(size, runs.count - first))
            some.from_start().copy(have[some.source : some.source_end].clone(), bit_by_bit)
    assert torch.equal(at_once, bit_by_bit)


def test_runs_are_copied_into_a_view_and_another_dtype():
    memory = torch.zeros(20)
    Runs(1, 0, 2, count=3, source_step=4, target_step=3).copy(torch.arange(12), memory[5:15])
    assert memory.tolist() == [0] * 5 + [1, 2, 0, 5, 6, 0, 9, 10] + [0] * 7


@settings(deadline=None)
@given(SHAPES, st.data())
def test_a_part_counts_its_values(shape, data):
    dim = data.draw(st.integers(0, max(len(shape) - 1, 0)))
    part = data.draw(parts(shape, dim))
    full = numbered(shape)
    cut = full.narrow(dim, part.start, part.stop - part.start) if shape else full
    assert part.slice_shape == tuple(cut.shape) and part.slice_values == cut.numel()
    assert part.values == len(taken(full, part))
    assert part.is_slice == (part.values == part.slice_values)
    assert Part.whole(shape).is_slice and Part.whole(shape).values == full.numel()


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "logical",
    [
        Logical((97, 3), dim=0, padded=104), Logical((16,), dim=0), Logical((3, 8, 5), dim=1), Logical((7, 24), dim=1),
        Logical((5, 2)), Logical(()), Logical((3, 2), dim=0, padded=8),
    ],
)  # fmt: skip
def test_what_a_rank_holds_is_its_slice_without_padding(logical, size):
    full = numbered(logical.shape) + 1
    for rank in range(size):
        axis = Axis(rank, size, None)
        part = Part.of_rank(logical, axis)
        local = logical.slice(full, axis, logical.local_shape(axis)).flatten()
        assert torch.equal(taken(full, part), local[local > 0])
        # Of the rank's values with padding, flattened, a partition's: what is left of them without it.
        for begin, end in ((0, 4), (3, len(local)), (len(local) - 1, len(local))):
            assert torch.equal(taken(full, part.run(begin, end)), local[begin:end][local[begin:end] > 0])


# Whether parts are all of a tensor.


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_parts_cover_a_tensor_where_every_value_is_in_one_of_them(data):
    """Parts as layouts have them, some of which are left out, moved or there twice."""
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=3)))
    dim = data.draw(st.integers(0, max(len(shape) - 1, 0)))
    size = shape[dim] if shape else 1
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=2))})
    held = []
    for start, stop in itertools.pairwise(cuts):
        part = Part.of_slice(shape, dim, start, stop) if shape else Part.whole(shape)
        ends = sorted({0, part.values, *data.draw(st.lists(st.integers(0, part.values), max_size=2))})
        held += [part.run(*run) for run in itertools.pairwise(ends)]
    times = torch.zeros(math.prod(shape), dtype=torch.int64)
    held += [data.draw(parts(shape, dim)) for _ in range(data.draw(st.integers(0, 1)))]
    if held and data.draw(st.booleans()):
        held.pop(data.draw(st.integers(0, len(held) - 1)))
    for part in held:
        times[taken(numbered(shape), part)] += 1
    whole = bool((times == 1).all())
    found = cover(data.draw(st.permutations(held)), shape)
    assert found == whole or (whole and len({(p.start, p.stop) for p in held}) > len(cuts) - 1)


def test_parts_of_two_dimensions_do_not_cover():
    rows, columns = Part.of_slice((2, 2), 0, 0, 1), Part.of_slice((2, 2), 1, 0, 1)
    assert not cover([rows, columns], (2, 2)) and not cover([rows, rows], (2, 2)) and not cover([], (2, 2))
    assert cover([], (2, 0)) and cover([Part.whole(())], ()) and not cover([Part.whole(())] * 2, ())
