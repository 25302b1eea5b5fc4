"""Skipped steps and spikes are noticed from the gradient norms alone, also across a resume."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from farspan.parallel.loss_scale import LossScale
from farspan.pretrain.watch import Watch

NORMS = st.lists(st.sampled_from([1.0, 1.5, 2.0, 3.9, 4.1, 9.0, math.inf, math.nan]), max_size=40)


def expected(norms: list[float], factor: float, window: int) -> list[str]:
    """The definition, without a state: "", "spike" or "skipped" for every step."""
    words = []
    for step, norm in enumerate(norms):
        before = [n for n in norms[:step] if math.isfinite(n)][-window:]
        middle = sorted(before)
        median = (middle[(window - 1) // 2] + middle[window // 2]) / 2 if len(before) == window else math.inf
        skipped = not math.isfinite(norm)
        words.append("skipped" if skipped else "spike" if norm > factor * median else "")
    return words


def said(watch: Watch, norm: float) -> str:
    reason = watch.see(norm)
    return "" if reason is None else "skipped" if "skipped" in reason else "spike"


@given(norms=NORMS, window=st.integers(2, 5), stop=st.integers(0, 40))
def test_what_is_seen_is_the_definition_also_after_a_resume(norms: list[float], window: int, stop: int) -> None:
    watch, words = Watch(2.0, window), []
    for step, norm in enumerate(norms):
        if step == stop:  # through a file, as a checkpoint does
            state, watch = json.loads(json.dumps(watch.state())), Watch(2.0, window)
            watch.load_state(state)
        words.append(said(watch, norm))
    assert words == expected(norms, 2.0, window)
    assert watch.skipped == words.count("skipped")
    in_a_row = 0
    while in_a_row < len(words) and words[-1 - in_a_row] == "skipped":
        in_a_row += 1
    assert watch.skipped_in_a_row == in_a_row


def test_without_a_factor_nothing_is_a_spike() -> None:
    watch = Watch(0.0, 2)
    assert [said(watch, norm) for norm in (1.0, 1.0, 1e9)] == ["", "", ""]


@given(finite=st.lists(st.booleans(), max_size=60), window=st.integers(1, 5), first=st.integers(0, 24))
def test_the_loss_scale_halves_at_an_overflow_and_doubles_after_a_window(finite, window: int, first: int) -> None:
    scale, exponent, good = LossScale(2.0**first, window), first, 0
    for step, fine in enumerate(finite):
        if step % 7 == 3:
            state, scale = json.loads(json.dumps(scale.state())), LossScale(1.0, window)
            scale.load_state(state)
        scale.update(fine)
        good = good + 1 if fine else 0
        if not fine:
            exponent = max(exponent - 1, 0)
        elif good == window:
            exponent, good = min(exponent + 1, 24), 0
        assert scale.value == 2.0**exponent


def test_without_a_window_the_scale_stays() -> None:
    scale = LossScale()
    for fine in (True, False, True):
        scale.update(fine)
    assert scale.value == 1.0
