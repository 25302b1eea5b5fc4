"""Comparing checkpoints, against numpy on tensors that are put together from files and manifest by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import held, logicals, randoms, refused, write_checkpoint
from safetensors import safe_open

from farspan.pretrain.checkpoint import Reader, diff

KINDS = ("weight", "exp_avg", "exp_avg_sq")
LAYOUTS = {"one rank": (1, 1), "tensor": (4, 1), "data": (1, 3), "both": (2, 4)}  # tensor ranks, partitions
VOCABULARY = 130


def some_values(**dtypes):
    return {kind: randoms(logicals(VOCABULARY, 1), seed=number) for number, kind in enumerate(KINDS)}


def write(folder, values, layout="one rank"):
    tensor, data = LAYOUTS[layout]
    logical = logicals(VOCABULARY, tensor)
    return Reader(write_checkpoint(folder, values, lambda name: held(logical[name], tensor, data)))


def changed(values, kind, name, at, value):
    """The same, but for values of one tensor."""
    copy = {of: dict(tensors) for of, tensors in values.items()}
    tensor = copy[kind][name].clone()
    tensor.view(-1)[torch.tensor(at)] = torch.as_tensor(value, dtype=tensor.dtype)
    copy[kind][name] = tensor
    return copy


def by_hand(folder: Path, kind: str, name: str) -> np.ndarray:
    """A logical tensor, by nothing but json, safetensors and numpy."""
    manifest = json.loads((folder / "manifest.json").read_text())
    entry, files = manifest["tensors"][name], list(manifest["files"])
    whole = np.full(entry["shape"], np.nan)
    numbers = np.arange(whole.size).reshape(whole.shape)
    for file, dim, start, stop, begin, end in entry["shards"][kind]:
        with safe_open(folder / files[file], "pt") as opened:
            stored = opened.get_tensor(name if kind == "weight" else f"{kind}:{name}")
        places = np.take(numbers, np.arange(start, stop), axis=dim).reshape(-1)[begin:end]
        whole.reshape(-1)[places] = stored.double().numpy().reshape(-1)
    return whole


@pytest.fixture(params=[5, 64, 2**22])
def portion(request, monkeypatch):
    monkeypatch.setattr(diff, "PORTION", request.param)
    return request.param


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", ["one rank", "both"])
def test_the_same_state_under_two_layouts_is_bit_equal(first, second, tmp_path):
    a, b = write(tmp_path / "a", some_values(), first), write(tmp_path / "b", some_values(), second)
    pairs = diff.pairs(a, b)
    assert sorted(pairs.common) == sorted((kind, name) for kind in KINDS for name in logicals(VOCABULARY, 1))
    assert (pairs.first_only, pairs.second_only, pairs.shapes) == ([], [], {})
    for kind, name in pairs.common:
        found = diff.difference(a, b, kind, name)
        assert (found.bit_equal, found.unequal, found.absolute, found.relative) == (True, 0, 0.0, 0.0)
        assert found.values == by_hand(a.folder, kind, name).size
        assert found.scale == np.abs(by_hand(b.folder, kind, name)).max()


def test_differences_are_those_of_numpy(portion, tmp_path):
    generator, values = torch.Generator().manual_seed(1), some_values()
    a = write(tmp_path / "a", values, "both")
    for number, (kind, name) in enumerate((kind, name) for kind in KINDS for name in values["weight"]):
        noise = torch.randn(values[kind][name].shape, generator=generator) * 10.0 ** -(number % 5)
        noise[torch.rand(noise.shape, generator=generator) < 0.5] = 0
        values[kind][name] = values[kind][name] + noise
    b = write(tmp_path / "b", values, "tensor")
    for kind, name in diff.pairs(a, b).common:
        one, other = by_hand(a.folder, kind, name), by_hand(b.folder, kind, name)
        found = diff.difference(a, b, kind, name)
        assert found.unequal == (one != other).sum() > 0
        assert found.absolute == np.abs(one - other).max()
        assert found.relative == np.abs(one - other).max() / max(np.abs(one).max(), np.abs(other).max())
        assert not found.bit_equal and not found.within(None)
        assert found.within(found.relative) and not found.within(found.relative * 0.999)


@pytest.mark.parametrize(
    ("one", "other", "unequal", "absolute"),
    [
        ([float("nan")], [float("nan")], 0, 0.0),
        ([float("nan")], [1.0], 1, float("inf")),
        ([1.0], [float("nan")], 1, float("inf")),
        ([float("inf")], [float("inf")], 0, 0.0),
        ([float("inf")], [float("-inf")], 1, float("inf")),
        ([float("inf")], [2.0], 1, float("inf")),
        ([0.0], [-0.0], 1, 0.0),
        ([3.0, 3.0], [3.5, 2.0], 2, 1.0),
    ],
)
def test_values_that_are_no_usual_numbers(one, other, unequal, absolute, portion, tmp_path):
    values, at = some_values(), list(range(70, 70 + len(one)))
    a = write(tmp_path / "a", changed(values, "weight", "words", at, one))
    b = write(tmp_path / "b", changed(values, "weight", "words", at, other), "both")
    found = diff.difference(a, b, "weight", "words")
    assert (found.unequal, found.absolute, found.bit_equal) == (unequal, absolute, unequal == 0)
    assert found.within(0.0) == (absolute == 0.0)
    assert np.isfinite(found.scale)
    assert np.isinf(found.relative) if np.isinf(absolute) else found.relative == absolute / found.scale


def test_a_nan_of_other_bits_is_another_value(tmp_path):
    values = some_values()
    quiet, other = (torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (0x7FC00000, 0x7FC00001))
    a = write(tmp_path / "a", changed(values, "weight", "norm", [3], quiet))
    b = write(tmp_path / "b", changed(values, "weight", "norm", [3], other))
    assert diff.difference(a, b, "weight", "norm").unequal == 1
    assert diff.difference(a, b, "weight", "norm").absolute == float("inf")


def test_all_zeros(tmp_path):
    zeros = {"weight": {name: torch.zeros_like(value) for name, value in some_values()["weight"].items()}}
    a, b = write(tmp_path / "a", zeros), write(tmp_path / "b", changed(zeros, "weight", "norm", [0], -0.0))
    found = diff.difference(a, b, "weight", "norm")
    assert (found.unequal, found.relative) == (1, 0.0)


def test_two_dtypes_are_compared_as_numbers(portion, tmp_path):
    values = some_values()
    rounded = {"weight": {name: value.bfloat16() for name, value in values["weight"].items()}}
    exact = {"weight": {name: value.bfloat16().float() for name, value in values["weight"].items()}}
    b = write(tmp_path / "b", rounded, "data")
    for folder, given in (("a", values), ("c", exact)):
        a = write(tmp_path / folder, given)
        one, other = by_hand(a.folder, "weight", "down"), by_hand(b.folder, "weight", "down")
        found = diff.difference(a, b, "weight", "down")
        assert (found.unequal, found.absolute) == ((one != other).sum(), np.abs(one - other).max())
        assert found.dtypes == (torch.float32, torch.bfloat16)
        assert not found.bit_equal and found.within(0.0) == (folder == "c")


def test_what_one_alone_has(tmp_path):
    values = some_values()
    a = write(tmp_path / "a", {kind: values[kind] for kind in ("weight", "exp_avg")})
    shorter = {name: value for name, value in values["weight"].items() if name != "norm"}
    b = write(tmp_path / "b", {"weight": shorter, "exp_avg_sq": shorter})
    pairs = diff.pairs(a, b)
    assert sorted(pairs.common) == sorted(("weight", name) for name in shorter)
    assert sorted(pairs.first_only) == sorted([("exp_avg", name) for name in values["weight"]] + [("weight", "norm")])
    assert sorted(pairs.second_only) == sorted(("exp_avg_sq", name) for name in shorter)
    pairs = diff.pairs(a, b, weights_only=True)
    assert (pairs.first_only, pairs.second_only) == ([("weight", "norm")], [])


def test_kinds_come_in_order(tmp_path):
    values = some_values()
    a = write(tmp_path / "a", values | {"master": values["weight"]})
    assert list(dict.fromkeys(kind for kind, _ in diff.pairs(a, a).common)) == ["weight", "master", *KINDS[1:]]


def test_other_shapes_are_not_compared(tmp_path):
    a = write(tmp_path / "a", some_values())
    wide = some_values()
    wide["weight"]["norm"], wide["exp_avg"]["norm"], wide["exp_avg_sq"]["norm"] = (torch.zeros(16),) * 3
    logical = logicals(VOCABULARY, 1)
    b = Reader(write_checkpoint(tmp_path / "b", wide, lambda name: held(logical[name], 1, 1)[:1] if name != "norm" else
                                [diff.Part.whole((16,))]))  # fmt: skip
    pairs = diff.pairs(a, b)
    assert pairs.shapes == {"norm": ((15,), (16,))}
    assert "norm" not in {name for _, name in pairs.common} and len(pairs.common) == 12


def test_no_more_than_a_portion_is_asked_for(portion, tmp_path, monkeypatch):
    a, b = write(tmp_path / "a", some_values(), "tensor"), write(tmp_path / "b", some_values(), "data")
    asked, read = [], Reader.read

    def counting(self, kind, name, part, into):
        asked.append(part.values)
        read(self, kind, name, part, into)

    monkeypatch.setattr(Reader, "read", counting)
    assert diff.difference(a, b, "weight", "words").bit_equal
    assert max(asked) == min(portion, VOCABULARY * 8) and sum(asked) == 2 * VOCABULARY * 8


def test_damage_is_said(tmp_path):
    a, b = write(tmp_path / "a", some_values(), "both"), write(tmp_path / "b", some_values())
    file = a.folder / "weights-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    a = Reader(a.folder)
    assert "weights-00001.safetensors is damaged (bytes 0 to " in refused(
        lambda: [diff.difference(a, b, "weight", name) for name in a.names()]
    )


def test_changed_values():
    first = {"step": 3, "model": {"size": 4, "deep": {"x": None, "same": [1, 2]}}, "gone": {"a": 1}}
    second = {"step": 3, "model": {"size": 5, "deep": {"x": [1], "same": [1, 2]}}, "new": False}
    assert diff.changed_values(first, second) == {
        "model.size": (4, 5),
        "model.deep.x": (None, [1]),
        "gone.a": (1, None),
        "new": (None, False),
    }
    assert diff.changed_values(first, first) == {}
