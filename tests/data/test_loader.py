from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from farspan.pretrain.batch import Batch
from farspan.pretrain.data.loader import Loader
from farspan.pretrain.schedule import BatchSizes


class Counting:
    """Stands in for an objective: each row is its index."""

    def __init__(self, fail_at=None, seconds=0.0):
        self.made = []
        self.fail_at = fail_at
        self.seconds = seconds

    def batch(self, indices: np.ndarray) -> Batch:
        time.sleep(self.seconds)
        if self.fail_at in indices:
            raise RuntimeError("the disk is gone")
        self.made.append(indices[0])
        rows = torch.from_numpy(indices)[:, None]
        return Batch(rows, rows, rows, rows, rows[:, 0], "full", rows, rows.float())


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "farspan-loader"]


def wait_until(condition):
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not threads()


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 1_000_000])
@pytest.mark.parametrize(("ranks", "sizes"), [(3, {4}), (5, {2, 3}), (12, {1})])
def test_ranks_share_each_global_batch(prefetch, start, ranks, sizes):
    seen = []
    for rank in range(ranks):
        with Loader(Counting(), BatchSizes(12), data_rank=rank, data_size=ranks, prefetch=prefetch) as loader:
            seen.append(torch.stack([batch.sample_ids for batch in loader.steps(start, start + 4)]))
    assert {part.shape[1] for part in seen} == sizes
    together = torch.cat(seen, dim=1)
    assert together.flatten().tolist() == list(range(start * 12, (start + 4) * 12))


def test_steps_in_any_order():
    with Loader(Counting(), BatchSizes(2)) as loader:
        for step in (5, 6, 2, 3, 3, 9):
            assert loader.batch(step).sample_ids.tolist() == [2 * step, 2 * step + 1]
            assert len(threads()) == 1


def test_batches_are_made_ahead_but_not_without_bound():
    objective = Counting()
    with Loader(objective, BatchSizes(1), prefetch=3) as loader:
        loader.batch(0)
        wait_until(lambda: len(objective.made) >= 4)
        time.sleep(0.2)
        assert len(objective.made) <= 5


def test_waiting_is_measured():
    objective = Counting(seconds=0.2)
    with Loader(objective, BatchSizes(1), prefetch=2) as loader:
        loader.batch(0)
        assert loader.wait_seconds > 0.19
        wait_until(lambda: len(objective.made) >= 3)
        waited = loader.wait_seconds
        loader.batch(1)
        assert loader.wait_seconds - waited < 0.15


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_reach_the_consumer(prefetch):
    loader = Loader(Counting(fail_at=2), BatchSizes(1), prefetch=prefetch)
    assert [loader.batch(step).sample_ids.item() for step in range(2)] == [0, 1]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the disk is gone"):
            loader.batch(2)
    assert loader.batch(3).sample_ids.item() == 3
    loader.close()


def test_errors_are_one_clear_line():
    with pytest.raises(ValueError, match="3 rows leaves some of 4 data ranks without one: set it to at least 4, or"):
        Loader(Counting(), BatchSizes(3), data_size=4)
    with pytest.raises(ValueError, match="outside"):
        Loader(Counting(), BatchSizes(8), data_rank=4, data_size=4)


def test_a_ramp_gives_each_sample_once():
    sizes = BatchSizes(12, start=4, increment=4, samples=20)
    seen: list[int] = []
    for step in range(8):
        parts = []
        for rank in range(2):
            with Loader(Counting(), sizes, data_rank=rank, data_size=2, prefetch=2 * rank) as loader:
                parts.append(loader.batch(step).sample_ids)
        seen += torch.cat(parts).tolist()
    assert seen == list(range(len(seen)))
