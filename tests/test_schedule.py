from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farspan.pretrain.schedule import BatchSizes, check_schedule, learning_rate

BASE: dict[str, Any] = {"peak": 1e-3, "total_steps": 100, "warmup_steps": 10, "name": "linear"}


def curve(**settings: Any) -> list[float]:
    return [learning_rate(step, **settings) for step in range(settings["total_steps"])]


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd", "constant"])
def test_warm_up_is_the_line_from_a_tenth_of_the_peak_to_the_peak(name: str) -> None:
    settings = BASE | {"name": name} | ({"decay_steps": 20} if name == "wsd" else {})
    assert curve(**settings)[:10] == pytest.approx([1e-4 * k for k in range(1, 11)], rel=1e-12)


def test_linear_has_equal_steps_down_to_the_minimum() -> None:
    values = curve(**BASE, minimum_ratio=0.1)
    exact = [Fraction(1) - Fraction(9, 10) * Fraction(step - 9, 90) for step in range(10, 100)]
    assert values[10:] == pytest.approx([1e-3 * float(x) for x in exact], rel=1e-12)
    assert values[-1] == pytest.approx(1e-4, rel=1e-12)


def test_cosine_is_half_way_in_the_middle() -> None:
    values = curve(**BASE | {"name": "cosine"}, minimum_ratio=0.1)
    assert values[9 + 45] == pytest.approx(1e-3 * (0.1 + 0.9 / 2), rel=1e-12)
    assert values[9 + 30] == pytest.approx(1e-3 * (0.1 + 0.9 * 3 / 4), rel=1e-12)  # cos(pi / 3) = 1 / 2
    assert values[-1] == pytest.approx(1e-4, rel=1e-12)


def test_wsd_is_flat_and_decays_over_its_last_steps_only() -> None:
    values = curve(**BASE | {"name": "wsd"}, decay_steps=20)
    assert values[9:80] == [1e-3] * 71
    assert values[80:] == pytest.approx([1e-3 * (1 - k / 20) for k in range(1, 21)], abs=1e-18)


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    assert curve(peak=2.0, total_steps=5, warmup_steps=0, name="linear") == [2.0, 1.5, 1.0, 0.5, 0.0]
    assert curve(peak=2.0, total_steps=1, warmup_steps=0, name="linear") == [2.0]


def test_after_the_end_the_last_value_stays() -> None:
    assert learning_rate(1000, **BASE, minimum_ratio=0.5) == learning_rate(99, **BASE, minimum_ratio=0.5)
    assert learning_rate(1000, **BASE | {"name": "constant"}) == 1e-3


@st.composite
def all_settings(draw: st.DrawFn) -> dict[str, Any]:
    total = draw(st.integers(1, 300))
    name = draw(st.sampled_from(["linear", "cosine", "wsd", "constant"]))
    decay = draw(st.integers(1, total)) if name == "wsd" else None
    return {
        "peak": draw(st.floats(1e-8, 10.0)),
        "total_steps": total,
        "warmup_steps": draw(st.integers(0, total - (decay or 0))),
        "name": name,
        "minimum_ratio": draw(st.floats(0.0, 1.0)),
        "decay_steps": decay,
    }


@given(all_settings())
def test_bounds_direction_and_continuity(settings: dict[str, Any]) -> None:
    values = curve(**settings)
    peak, total, warmup = settings["peak"], settings["total_steps"], settings["warmup_steps"]
    slack = 1e-12 * peak
    assert all(0.0 <= x <= peak + slack for x in values)
    assert all(x >= settings["minimum_ratio"] * peak - slack for x in values[warmup:])
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    # No jump is larger than one step of the steepest phase: the warm-up's, the line's, or the cosine's middle.
    falling = settings["decay_steps"] or max(total - max(warmup, 1), 1)
    largest = max(1 / max(warmup, 1) if warmup else 0.0, (math.pi / 2) / falling) * peak
    assert all(abs(b - a) <= largest + slack for a, b in itertools.pairwise(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "linaer"}, "linaer.*linear, cosine, wsd, constant"),
        ({"peak": 0.0}, "peak"),
        ({"peak": math.nan}, "peak"),
        ({"total_steps": 0}, "at least 1"),
        ({"warmup_steps": 101}, "101 warm-up steps.*100"),
        ({"warmup_steps": -1}, "warm-up"),
        ({"minimum_ratio": 1.5}, "from 0 to 1"),
        ({"name": "wsd"}, "needs decay_steps"),
        ({"decay_steps": 10}, "belongs to schedule wsd"),
        ({"name": "wsd", "decay_steps": 0}, "at least 1"),
        ({"name": "wsd", "decay_steps": 91}, "10 warm-up steps and 91 decay steps exceed the 100"),
    ],
)
def test_bad_settings_are_named_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_schedule(**BASE | change)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        learning_rate(0, **BASE | change)


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no step -1"):
        learning_rate(-1, **BASE)


@given(
    start=st.integers(1, 8),
    increment=st.integers(1, 8),
    count=st.integers(1, 6),
    samples=st.integers(0, 500),
)
def test_a_batch_ramp_as_one_that_counts_samples(start, increment, count, samples):
    size = start + increment * count
    sizes, seen = BatchSizes(size, start, increment, samples), 0
    used = []
    for step in range(200):
        rows = sizes.samples_of(step)
        assert rows.start == seen, "a sample is lost or repeated"
        seen += len(rows)
        used.append(len(rows))
    assert used == sorted(used) and set(used[: used.index(size) + 1]) == set(sizes.sizes) if size in used else True
    for number, rows in enumerate(sizes.sizes[:-1], 1):
        if rows + increment in used:
            before = sum(used[: used.index(rows + increment)])
            assert before >= samples * number / count
            # One step less would not have done.
            assert used.count(rows) == 1 or before - rows < samples * number / count


def test_without_a_ramp_all_steps_are_equal():
    assert [BatchSizes(6).samples_of(step) for step in (0, 1, 7)] == [range(6), range(6, 12), range(42, 48)]


@pytest.mark.parametrize("ramp", [(8, 4), (2, 4), (2, 0)])
def test_a_ramp_that_does_not_arrive_is_refused(ramp):
    with pytest.raises(ValueError, match=f"a batch ramp from {ramp[0]} by {ramp[1]} does not arrive at 8"):
        BatchSizes(8, *ramp, 100)
