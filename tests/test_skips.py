"""What is left out of the stream of samples, against the stream written out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from farspan.pretrain.schedule import BatchSizes
from farspan.pretrain.skips import Skip, described, ordered, skipping

SKIPS = st.lists(st.builds(Skip, st.integers(1, 12), st.integers(1, 9)), max_size=4)
RAMPS = st.sampled_from([{}, {"start": 2, "increment": 2, "samples": 9}])


def stream(sizes: BatchSizes, skips: list[Skip], steps: int) -> list[range]:
    """One step after the other: what is left out at a step, then its rows."""
    place, rows = 0, []
    for step in range(steps):
        place += sum(samples for at, samples in skips if at == step + 1)
        size = len(sizes.samples_of(step))
        rows.append(range(place, place + size))
        place += size
    return rows


@given(skips=SKIPS, ramp=RAMPS)
def test_the_stream_goes_on_behind_what_is_left_out(skips, ramp) -> None:
    plain, sizes = BatchSizes(6, **ramp), BatchSizes(6, **ramp, skips=tuple(skips))
    assert [sizes.samples_of(step) for step in range(15)] == stream(plain, skips, 15)
    same = BatchSizes(6, **ramp, skips=ordered(skips))
    assert [same.samples_of(step) for step in range(15)] == stream(plain, skips, 15)
    assert [step for step, _ in ordered(skips)] == sorted({step for step, _ in skips})
    assert ordered(skips, 5) == tuple(skip for skip in ordered(skips) if skip.step <= 5)


@given(skips=SKIPS, ramp=RAMPS, first=st.integers(1, 12), length=st.integers(0, 6))
def test_a_window_that_is_left_out(skips, ramp, first: int, length: int) -> None:
    """Steps before it keep their data; none of its data is in any step from then on, nor what was left out before."""
    sizes, last = BatchSizes(6, **ramp, skips=tuple(skips)), first + length
    after = BatchSizes(6, **ramp, skips=skipping(sizes, first, last))
    for step in range(first - 1):
        assert after.samples_of(step) == sizes.samples_of(step)
    assert after.samples_of(first - 1).start == sizes.samples_of(last).start
    seen_before = {sample for step in range(20) for sample in sizes.samples_of(step)}
    window = {sample for step in range(first - 1, last) for sample in sizes.samples_of(step)}
    new = {sample for step in range(first - 1, 15) for sample in after.samples_of(step)}
    assert not new & window
    # What was left out on the way stays so, from wherever the stream is now; later skips follow at their own steps.
    left_out = set(range(sizes.samples_of(last).start)) - seen_before
    assert not new & left_out


def test_words() -> None:
    assert described(()) == "[]"
    assert described((Skip(3, 8), Skip(9, 1))) == "[{step: 3, samples: 8}, {step: 9, samples: 1}]"
