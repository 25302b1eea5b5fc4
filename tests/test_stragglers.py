"""Ranks that are slower than those that do the same work: found by medians, named once, and when it is over."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farspan.pretrain.config import HealthConfig
from farspan.pretrain.metrics import HealthMetrics, MetricsWriter, read_metrics
from farspan.pretrain.stragglers import Stragglers

FACTOR = 1.5


def hosts(ranks: int) -> list[str]:
    return [f"n{rank // 2}" for rank in range(ranks)]


def feed(stages: list[int], rows: list[list[float]], window: int = 4) -> list[HealthMetrics | None]:
    stragglers = Stragglers(stages, hosts(len(stages)), FACTOR, window)
    return [stragglers.see(step, row) for step, row in enumerate(rows, 1)]


@given(st.data())
def test_ratios_are_those_of_the_definition(data: st.DataObject) -> None:
    window = data.draw(st.integers(2, 5))
    stages = data.draw(st.lists(st.integers(0, 2), min_size=2, max_size=9))
    seconds = st.floats(0.01, 10.0)
    rows = data.draw(
        st.lists(st.lists(seconds, min_size=len(stages), max_size=len(stages)), min_size=window, max_size=12)
    )
    named: set[int] = set()
    for step, found in enumerate(feed(stages, rows, window), 1):
        recent = rows[max(0, step - window) : step]
        ratios = {}
        for rank, stage in enumerate(stages):
            medians = [statistics.median(row[other] for row in recent) for other in range(len(stages))]
            others = [medians[other] for other, at in enumerate(stages) if at == stage and other != rank]
            if others:
                ratios[rank] = medians[rank] / statistics.median(others)
        if step < window or not ratios:
            assert found is None
            continue
        assert found is not None
        assert found.step == step and found.window == window
        assert found.slowest_busy_ratio == pytest.approx(max(ratios.values()))
        assert ratios[found.slowest_rank] == pytest.approx(max(ratios.values()))
        if any(math.isclose(ratio, edge, rel_tol=1e-9) for ratio in ratios.values() for edge in (FACTOR, 1.25)):
            return  # a rounding decides
        begun = {rank for rank, ratio in ratios.items() if ratio >= FACTOR} - named
        ended = {rank for rank in named if ratios[rank] < 1.25}
        assert {one.rank for one in found.begun} == begun
        assert {one.rank for one in found.ended} == ended
        for one in found.begun:
            assert one.host == hosts(len(stages))[one.rank]
            assert one.ratio == pytest.approx(ratios[one.rank])
            assert one.busy_seconds / one.others_seconds == pytest.approx(one.ratio)
        named = (named | begun) - ended


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_a_factor_that_names_everybody_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="would name ranks that are no slower than others: set it above 1, or to 0"):
        HealthConfig(straggler_factor=factor)


def test_single_slow_steps_are_nobodys() -> None:
    rows = [[1.0, 1.0, 9.0 if step % 3 == 0 else 1.0, 1.0] for step in range(40)]
    assert not any(found.begun for found in feed([0] * 4, rows, 8) if found is not None)


def test_stages_have_different_work() -> None:
    """The second takes three times as long: only within a stage is that slow."""
    same = [[1.0, 1.0, 3.0, 3.0] for _ in range(8)]
    assert not any(found.begun for found in feed([0, 0, 1, 1], same) if found is not None)
    assert any(found.begun for found in feed([0] * 4, same) if found is not None)


def test_alone_in_its_stage_nobody_is_compared() -> None:
    assert feed([0, 1, 2], [[1.0, 5.0, 1.0]] * 8) == [None] * 8


def test_ranks_that_were_never_busy_have_no_ratio() -> None:
    found = feed([0, 0, 1, 1], [[0.0, 0.0, 1.0, 2.0]] * 4)[-1]
    assert found is not None and found.slowest_rank == 3 and found.slowest_busy_ratio == 2.0
    assert feed([0, 0], [[0.0, 0.0]] * 4)[-1] is None


def test_what_is_written(tmp_path, capsys) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [[1.0, 1.0, 1.0, 1.0]] * 4 + [[1.0, 1.0, 1.0, 2.0]] * 6 + [[1.0, 1.0, 1.0, 1.0]] * 6
    with MetricsWriter(tmp_path, is_writer=True, total_steps=100) as writer:
        for found in feed([0] * 4, rows):
            writer.health(found)
    begins, ends = read_metrics(tmp_path / "metrics.jsonl")
    # The median of four steps: the second slow one makes it 1.5, the third 2.
    assert begins == {
        "step": 6, "straggler": 3, "host": "n1", "ratio": 1.5, "busy_seconds": 1.5, "others_seconds": 1.0,
    }  # fmt: skip
    assert ends == {"step": 13, "straggler_ended": 3, "host": "n1"}
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 6: rank 3 (n1) is slow: busy for 1.5 s a step, 1.5 times as long as the other ranks of its pipeline "
        "stage (1 s; medians of 4 steps)",
        "step 13: rank 3 (n1) is as fast as the others again",
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    ratios = {event.step: event.value for event in events.Scalars("health/slowest_busy_ratio")}
    assert sorted(ratios) == list(range(4, 17)) and (ratios[4], ratios[6], ratios[8]) == (1.0, 1.5, 2.0)
    assert {event.step: event.value for event in events.Scalars("health/slowest_rank")}[8] == 3
