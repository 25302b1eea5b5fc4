from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.kernels.dropout import DropoutKey, dropout, dropout_add, keep_mask, stream, threshold

GOLDEN = 0x9E3779B97F4A7C15


def mask(
    *,
    seed: int = 1,
    steps: int = 1,
    layers: int = 1,
    samples: int = 1,
    positions: int = 1,
    features: int = 64,
    p: float = 0.1,
) -> torch.Tensor:
    """[steps, layers, samples, positions, features]"""
    index = torch.arange(positions).unsqueeze(1)
    return torch.stack(
        [
            torch.stack(
                [
                    keep_mask(
                        DropoutKey(seed, step, torch.arange(samples)).rows(stream(layer, 0), index), features, p
                    ).transpose(0, 1)
                    for layer in range(layers)
                ]
            )
            for step in range(steps)
        ]
    )


# The definition, on Python's integers: what any other implementation is held to.


def mix64(value: int) -> int:
    value %= 1 << 64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return value ^ (value >> 31)


def row_key(seed: int, step: int, sample: int, use: int, position: int) -> int:
    base = mix64(mix64(mix64(seed) + step * GOLDEN) + use * GOLDEN)
    return mix64(mix64(sample * GOLDEN + base) + position * GOLDEN)


def feature_bits(key: int, feature: int) -> int:
    low, high = key % (1 << 32), key >> 32
    h = (feature // 2 * 0x9E3779B9 + low) % (1 << 32)
    h = (h ^ (h >> 16)) * 0x7FEB352D % (1 << 32)
    h ^= high
    h = (h ^ (h >> 15)) * 0x846CA68B % (1 << 32)
    h ^= h >> 16
    return h >> 16 if feature % 2 else h % (1 << 16)


def test_mixing_is_splitmix64() -> None:
    # The first numbers of the generator's published example, seeded with 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mix64(1234567 + i * GOLDEN) for i in (1, 2, 3)] == expected


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**40),
    sample=st.integers(0, 2**50),
    layer=st.integers(-1, 200),
    place=st.integers(0, 15),
    position=st.integers(0, 2**40),
    features=st.integers(1, 9),
    p=st.floats(0.0, 0.999),
)
def test_masks_are_those_of_the_definition(
    seed: int, step: int, sample: int, layer: int, place: int, position: int, features: int, p: float
) -> None:
    use = stream(layer, place)
    keys = DropoutKey(seed, step, torch.tensor([sample])).rows(use, torch.tensor([[position]]))
    expected = row_key(seed, step, sample, use, position)
    assert keys.item() % (1 << 64) == expected
    kept = [feature_bits(expected, feature) >= round(p * 65536) for feature in range(features)]
    assert keep_mask(keys, features, p).flatten().tolist() == kept


KNOWN_KEYS = [["f6dc44878654997b", "4d29449f41b51fe8"], ["14bd7fe6be96567a", "08069215dd11db59"]]
KNOWN_MASKS = ["0011001110101110", "1000111000000011", "0000101011011011", "1101101000010110"]


def test_known_masks() -> None:
    """These never change: a resumed run and a fused kernel must see them."""
    keys = DropoutKey(1234, 7, torch.tensor([0, 5])).rows(stream(3, 1), torch.arange(2).unsqueeze(1))
    assert [[f"{k % (1 << 64):016x}" for k in row] for row in keys.tolist()] == KNOWN_KEYS
    rows = keep_mask(keys, 16, 0.5).long().flatten(0, 1).tolist()
    assert ["".join(map(str, row)) for row in rows] == KNOWN_MASKS


# Masks are functions of their key alone.


def test_a_row_is_the_same_in_any_batch() -> None:
    samples = torch.tensor([3, 1_000_000_007, 0, 12])
    index = torch.arange(10).unsqueeze(1)
    whole = keep_mask(DropoutKey(5, 2, samples).rows(9, index), 33, 0.3)
    for i in range(4):
        alone = keep_mask(DropoutKey(5, 2, samples[i : i + 1]).rows(9, index), 33, 0.3)
        assert torch.equal(alone, whole[:, i : i + 1])
    assert torch.equal(keep_mask(DropoutKey(5, 2, samples.flip(0)).rows(9, index), 33, 0.3), whole.flip(1))


def test_a_part_of_the_sequence_is_the_same() -> None:
    key, index = DropoutKey(5, 2, torch.arange(3)), torch.arange(12).unsqueeze(1)
    whole = keep_mask(key.rows(4, index), 20, 0.3)
    assert torch.equal(keep_mask(key.rows(4, index[5:9]), 20, 0.3), whole[5:9])


def test_a_part_of_the_heads_is_the_same() -> None:
    key, index = DropoutKey(5, 2, torch.arange(3)), torch.arange(6).unsqueeze(1)
    heads = torch.arange(8).view(-1, 1, 1) * (1 << 32)
    whole = keep_mask(key.rows(4, heads + index), 6, 0.3)  # [heads, s, b, s]
    assert whole.shape == (8, 6, 3, 6)
    for part in (slice(0, 4), slice(4, 8), slice(6, 8)):
        assert torch.equal(keep_mask(key.rows(4, heads[part] + index), 6, 0.3), whole[part])
    assert torch.equal(whole[0], keep_mask(key.rows(4, index), 6, 0.3))


@pytest.mark.parametrize("features", [1, 2, 7, 64, 129])
def test_more_features_do_not_change_the_first(features: int) -> None:
    assert torch.equal(mask(positions=5, features=features), mask(positions=5, features=200)[..., :features])


@pytest.mark.parametrize("features", [1, 2, 7, 64])
def test_features_from_another_than_the_first(features: int) -> None:
    keys = DropoutKey(5, 2, torch.arange(3)).rows(4, torch.arange(6).unsqueeze(1)).t()  # strided too
    whole = keep_mask(keys, 100, 0.3)
    first = torch.tensor([[0], [1], [34]])
    part = keep_mask(keys, features, 0.3, first)
    for row, start in zip(range(3), first.flatten().tolist(), strict=True):
        assert torch.equal(part[row], whole[row, :, start : start + features])


@pytest.mark.parametrize("first", [0, 1, 2, 7, 34])
@pytest.mark.parametrize("features", [1, 2, 7, 64])
def test_a_slice_of_the_features(features: int, first: int) -> None:
    """As a tensor rank has one: the same number for all rows."""
    keys = DropoutKey(5, 2, torch.arange(3)).rows(4, torch.arange(6).unsqueeze(1))
    whole = keep_mask(keys, 100, 0.3)
    part = keep_mask(keys, features, 0.3, first)
    assert part.shape == (6, 3, features)
    assert torch.equal(part, whole[..., first : first + features])
    assert torch.equal(part, keep_mask(keys, features, 0.3, torch.tensor(first)))
    x = torch.randn(6, 3, 100, generator=torch.Generator().manual_seed(0))
    sliced = slice(first, first + features)
    assert torch.equal(dropout(x[..., sliced], 0.3, keys, first), dropout(x, 0.3, keys)[..., sliced])


def test_no_two_keys_are_equal() -> None:
    heads = torch.arange(4).view(-1, 1, 1) * (1 << 32)
    keys = torch.cat(
        [
            DropoutKey(seed, step, torch.arange(8)).rows(stream(layer, place), heads + torch.arange(16).unsqueeze(1))
            for seed, step, layer, place in itertools.product((0, 1), range(4), (-1, 0, 1, 2), (0, 1, 2))
        ]
    )
    assert keys.unique().numel() == keys.numel()


def test_streams() -> None:
    numbers = [stream(layer, place) for layer in range(-1, 5) for place in range(16)]
    assert len(set(numbers)) == len(numbers)
    for place in (-1, 16):
        with pytest.raises(ValueError, match=f"dropout place {place} is outside 0..15"):
            stream(0, place)


# Probability and independence.  Seeds are fixed: nothing here is left to chance, and 4.5 deviations are far.

AXES = ("steps", "layers", "samples", "positions", "features")


def deviation(statistic: float, mean: float, variance: float) -> float:
    return (statistic - mean) / math.sqrt(variance)


@pytest.mark.parametrize("p", [0.1, 0.5, 1 / 65536 * 999, 0.9])
def test_probability_along_every_axis(p: float) -> None:
    kept = mask(steps=16, layers=8, samples=16, positions=64, features=64, p=p).double()
    drop = threshold(p) / 65536
    n, variance = kept.numel(), drop * (1 - drop)
    assert abs(deviation(kept.sum().item(), n * (1 - drop), n * variance)) < 4.5
    for axis, name in enumerate(AXES):
        others = [i for i in range(5) if i != axis]
        counts, each = kept.sum(others), n // kept.shape[axis]
        chi2 = ((counts - each * (1 - drop)).square() / (each * variance)).sum().item()
        degrees = len(counts)
        assert abs(deviation(chi2, degrees, 2 * degrees)) < 4.5, f"kept along {name}: chi-square {chi2} of {degrees}"


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("distance", [1, 2, 3, 8])
def test_neighbours_are_not_correlated(p: float, distance: int) -> None:
    kept = mask(steps=16, layers=16, samples=16, positions=32, features=64, p=p).float()
    drop = threshold(p) / 65536
    centred = (kept - (1 - drop)) / math.sqrt(drop * (1 - drop))
    for axis, name in enumerate(AXES):
        size = centred.shape[axis] - distance
        products = centred.narrow(axis, 0, size) * centred.narrow(axis, distance, size)
        z = products.double().sum().item() / math.sqrt(products.numel())
        assert abs(z) < 4.5, f"{distance} apart along {name}: {z} deviations"


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_two_features_of_one_hash_are_independent(p: float) -> None:
    kept = mask(steps=4, layers=4, samples=32, positions=64, features=128, p=p).view(-1, 2).long()
    drop = threshold(p) / 65536
    counts = (kept[:, 0] * 2 + kept[:, 1]).bincount(minlength=4).double()
    expected = len(kept) * torch.tensor([drop * drop, drop * (1 - drop), drop * (1 - drop), (1 - drop) ** 2])
    chi2 = ((counts - expected).square() / expected).sum().item()
    assert chi2 < 25, chi2  # 3 degrees of freedom: exceeded once in 65,000 times


def test_seeds_give_unrelated_masks() -> None:
    masks = [mask(seed=seed, samples=8, positions=64, features=64, p=0.5).flatten().double() - 0.5 for seed in range(6)]
    for a, b in itertools.combinations(masks, 2):
        assert abs((a * b).sum().item() * 4 / math.sqrt(a.numel())) < 4.5


# The operation.


@pytest.mark.parametrize("p", [0.1, 0.25, 0.3, 0.9, 1e-4])
@pytest.mark.parametrize("features", [1, 5, 64])
def test_values_scale_and_gradient(p: float, features: int) -> None:
    keys = DropoutKey(3, 4, torch.arange(6)).rows(2, torch.arange(9).unsqueeze(1))
    x = torch.randn(9, 6, features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    y = dropout(x, p, keys)
    scale = 1 / (1 - round(p * 65536) / 65536)  # the inverse of what is kept, not of 1 - p
    factor = keep_mask(keys, features, p).double() * scale
    torch.testing.assert_close(y, x * factor, rtol=1e-14, atol=0)
    upstream = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y.backward(upstream)
    torch.testing.assert_close(x.grad, upstream * factor, rtol=1e-14, atol=0)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_expectation_is_kept(p: float) -> None:
    keys = DropoutKey(3, 4, torch.arange(64)).rows(2, torch.arange(256).unsqueeze(1))
    y = dropout(torch.ones(256, 64, 64, dtype=torch.float64), p, keys)
    assert abs(deviation(y.mean().item(), 1.0, p / (1 - p) / y.numel())) < 4.5


def test_nan_and_infinity_are_dropped_too() -> None:
    keys = DropoutKey(3, 4, torch.arange(4)).rows(2, torch.arange(8).unsqueeze(1))
    y = dropout(torch.full((8, 4, 16), torch.inf), 0.5, keys)
    assert torch.equal(y == 0, ~keep_mask(keys, 16, 0.5))


def test_nothing_is_done_without_probability_or_keys() -> None:
    x = torch.randn(3, 2, 5)
    keys = DropoutKey(3, 4, torch.arange(2)).rows(2, torch.arange(3).unsqueeze(1))
    assert dropout(x, 0.0, keys) is x
    assert dropout(x, 0.5, None) is x
    assert torch.equal(dropout(x, 1e-6, keys), x)  # less than half of 2^-16
    residual = torch.randn(3, 2, 5)
    assert torch.equal(dropout_add(x, residual, 0.5, keys), residual + dropout(x, 0.5, keys))


def test_thresholds() -> None:
    assert [threshold(p) for p in (0.0, 1 / 65536, 0.1, 0.5, 0.75)] == [0, 1, 6554, 32768, 49152]
    for p in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match=rf"dropout probability {p} is outside \[0, 1\)"):
            threshold(p)


def test_keys_are_the_same_in_bfloat16_and_float32() -> None:
    keys = DropoutKey(3, 4, torch.arange(4)).rows(2, torch.arange(8).unsqueeze(1))
    low, high = (dropout(torch.ones(8, 4, 16, dtype=dtype), 0.25, keys) for dtype in (torch.bfloat16, torch.float32))
    assert low.dtype == torch.bfloat16
    assert torch.equal(low != 0, high != 0)


def test_something_is_kept_whatever_the_probability() -> None:
    assert threshold(1 - 2**-20) == 65535
    y = dropout(torch.ones(64, 4096), 1 - 2**-20, torch.arange(64))
    assert y.isfinite().all() and 0 < (y > 0).sum() < 32
