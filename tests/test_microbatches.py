"""How a step's rows are spread over replicas and microbatches, whatever their numbers."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from farspan.parallel.mesh import even_share
from farspan.pretrain.batch import Batch, microbatch_count, microbatches

LENGTH = 5
NUMBERS = st.integers(1, 40)


def batch_of(rows: range, attention="document") -> Batch:
    """Each token is the number of its row; rows of a padded batch have 0 to 5 tokens."""
    ids = torch.arange(rows.start, rows.stop).unsqueeze(1).expand(-1, LENGTH).contiguous()
    real = torch.ones_like(ids) if attention == "document" else (torch.arange(LENGTH) < ids % (LENGTH + 1)).long()
    ones = torch.ones(len(rows), 2)
    places = torch.tensor([0, 1]).expand(len(rows), -1)
    return Batch(ids, real, ids, ids, ids[:, 0], attention, ids[:, :2], ones, places, ids[:, 0] % 2)


@given(st.integers(0, 200), NUMBERS)
def test_shares_are_those_of_numpy(count: int, parts: int) -> None:
    wanted = [part.tolist() for part in np.array_split(np.arange(count), parts)]
    assert [list(even_share(count, i, parts)) for i in range(parts)] == wanted


@given(st.integers(1, 200), NUMBERS, NUMBERS, st.integers(1, 4))
def test_every_replica_has_as_many_microbatches(rows: int, size: int, replicas: int, multiple: int) -> None:
    count = microbatch_count(rows, size, replicas=replicas, multiple=multiple)
    shares = [len(even_share(rows, i, replicas)) for i in range(replicas)]
    sizes = [len(even_share(share, i, count)) for share in shares for i in range(count)]
    assert count % multiple == 0 and sum(sizes) == rows and max(sizes) <= size
    assert (count - multiple) * size < max(shares), "fewer would do"
    if rows % (size * replicas * multiple) == 0:
        assert set(sizes) == {size}
    if size > 1 and multiple == 1 and rows >= replicas:
        assert min(sizes) >= 1


@given(st.integers(1, 30), st.integers(1, 30), st.booleans(), st.sampled_from(["document", "padding"]))
def test_every_row_counts_once(rows: int, count: int, equal: bool, attention: str) -> None:
    batch = batch_of(range(7, 7 + rows), attention)
    parts, shape = microbatches(batch, count, multiple=4, equal=equal)
    assert len(parts) == count
    assert [int(x) for part in parts for x in part.sample_ids[: part.own_rows]] == list(range(7, 7 + rows))
    for part in parts:
        assert part.rows >= 1 and part.label_weights[: part.own_rows].all()
        assert not part.label_weights[part.own_rows :].any()
        assert part.labels.tolist() == [[row, row] for row in part.sample_ids]
    shapes = {tuple(part.input_ids.shape) for part in parts}
    assert shape == max(shapes) and (len(shapes) == 1 or not equal)
    if attention == "padding":
        assert all(part.repeats in (0, 1) for part in parts), "one, where there is none"
    elif not equal:
        assert all(part.repeats == (part.own_rows == 0) for part in parts)


def test_views_where_nothing_is_repeated() -> None:
    """Where the numbers divide, as ever: consecutive rows, and no copy."""
    batch = batch_of(range(12))
    parts, shape = microbatches(batch, 3, multiple=8, equal=True)
    assert shape == (4, LENGTH)
    for i, part in enumerate(parts):
        assert part.repeats == 0 and part.sample_ids.tolist() == list(range(4 * i, 4 * i + 4))
        assert part.input_ids.data_ptr() == batch.input_ids[4 * i :].data_ptr()


def test_the_batch_itself_stays_as_it_is() -> None:
    batch = batch_of(range(3))
    microbatches(batch, 2, multiple=8, equal=True)
    assert batch.label_weights.all() and batch.repeats == 0
