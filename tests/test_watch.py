"""Skipped steps and spikes are noticed from losses and gradient norms alone, also across a resume."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farspan.parallel.loss_scale import LossScale
from farspan.pretrain.config import SpikesConfig
from farspan.pretrain.watch import Watch

NORMS = st.sampled_from([1.0, 1.5, 2.0, 3.9, 4.1, 9.0, math.inf, math.nan])
LOSSES = st.sampled_from([1.0, 1.1, 1.25, 1.3, 2.0, 5.0, 5.5, 90.0])
STEPS = st.lists(st.tuples(LOSSES, NORMS), max_size=40)


def middle(values: list[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def expected(steps: list[tuple[float, float]], factor: float, deviations: float, window: int) -> list[str]:
    """The definition, without a state: "", "norm", "loss", "both" or "skipped" for every step."""
    words = []
    for number, (loss, norm) in enumerate(steps):
        if not math.isfinite(norm):
            words.append("skipped")
            continue
        before = [step for step in steps[:number] if math.isfinite(step[1])][-window:]
        if len(before) < window:
            words.append("")
            continue
        losses, norms = [step[0] for step in before], [step[1] for step in before]
        spread = 1.4826 * middle([abs(one - middle(losses)) for one in losses])
        high = loss > middle(losses) + deviations * max(spread, 2**-20 * middle(losses))
        large = norm > factor * middle(norms)
        words.append("both" if high and large else "loss" if high else "norm" if large else "")
    return words


def said(reason: str | None) -> str:
    if reason is None:
        return ""
    if "skipped" in reason:
        return "skipped"
    loss, norm = "its loss" in reason, "its gradient norm" in reason
    return "both" if loss and norm else "loss" if loss else "norm"


@given(steps=STEPS, window=st.integers(2, 5), patience=st.integers(1, 3), stop=st.integers(0, 40))
def test_what_is_seen_is_the_definition_also_after_a_resume(steps, window: int, patience: int, stop: int) -> None:
    words, spikes, watch = [], [], Watch(2.0, 3.0, window, patience)
    for number, (loss, norm) in enumerate(steps):
        if number == stop:  # through a file, as a checkpoint does
            state, watch = json.loads(json.dumps(watch.state())), Watch(2.0, 3.0, window, patience)
            watch.load_state(state)
        words.append(said(watch.see(number + 1, loss, norm)))
        if watch.in_a_spike:
            spikes.append((number + 1, watch.first))
        in_a_row = 0
        while in_a_row < len(words) and words[-1 - in_a_row] == "skipped":
            in_a_row += 1
        assert watch.skipped_in_a_row == in_a_row
        assert not in_a_row or watch.first_skipped == number + 2 - in_a_row
    assert words == expected(steps, 2.0, 3.0, window)
    assert watch.skipped == words.count("skipped")
    found = []
    for number in range(len(words)):
        row = [(n + 1, w) for n, w in enumerate(words[: number + 1]) if w != "skipped"]
        row = row[max([i + 1 for i, (_, w) in enumerate(row) if not w], default=0) :]
        if len(row) >= patience:
            found.append((number + 1, row[0][0]))
    assert spikes == found


def test_without_a_factor_nothing_is_a_spike() -> None:
    watch = Watch(0.0, 0.0, 2, 1)
    assert [watch.see(step, value, value) for step, value in enumerate((1.0, 1.0, 1e9))] == [None] * 3


def test_an_older_checkpoints_state() -> None:
    watch = Watch(2.0, 3.0, 2, 1)
    watch.load_state({"skipped": 3, "skipped_in_a_row": 1, "norms": [1.0, 1.0]})
    assert (watch.skipped, watch.skipped_in_a_row, watch.out_of_line) == (3, 1, 0)
    assert said(watch.see(9, 1.0, 2.5)) == "norm"


def watch_by_default() -> Watch:
    spikes = SpikesConfig()
    return Watch(spikes.gradient_norm_factor, spikes.loss_deviations, spikes.window, spikes.patience)


def curve(steps: int, noise: str, seed: int) -> np.ndarray:
    """A loss that falls from 10 to 2, and its noise."""
    rng = np.random.default_rng(seed)
    drawn = {
        "normal": rng.normal(size=steps),
        "heavy tails": rng.standard_t(4, size=steps),
        "skewed": rng.lognormal(0.0, 0.5, size=steps),
    }[noise]
    return 2 + 8 * np.exp(-np.arange(steps) / 1500) + 0.05 * drawn


@pytest.mark.parametrize("noise", ["normal", "heavy tails", "skewed"])
def test_no_false_alarm_in_ten_thousand_steps(noise: str) -> None:
    """Single steps may stand out where tails are heavy; three in a row do not, nor does any step of normal noise."""
    watch, rng, single = watch_by_default(), np.random.default_rng(1), 0
    for step, loss in enumerate(curve(10_000, noise, 0).tolist(), 1):
        single += watch.see(step, loss, float(rng.lognormal(0.0, 0.3))) is not None
        assert not watch.in_a_spike, step
    assert single <= (0 if noise == "normal" else 20)


@pytest.mark.parametrize("height", [0.6, 1.0, 5.0])
@pytest.mark.parametrize("at", [70, 500, 3000, 9000])
def test_a_jump_is_found(at: int, height: float) -> None:
    """As high as 12 standard deviations of the noise and more, where the loss falls no faster than it is noisy."""
    watch, losses = watch_by_default(), curve(10_000, "normal", 2)
    losses[at:] += height if at > 500 else 3 * height
    for step, loss in enumerate(losses[: at + 3].tolist()):
        watch.see(step, loss, 1.0)
        assert watch.in_a_spike == (step == at + 2)
    assert watch.first == at


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
