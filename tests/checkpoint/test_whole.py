"""What a checkpoint must hold beside bytes that are those of the checksums."""

from __future__ import annotations

import pytest
import torch
from checkpoints import edit, held, logicals, randoms, refused, write_checkpoint

from farspan.pretrain.checkpoint import Manifest, write_tensors
from farspan.pretrain.checkpoint.tensor_file import TensorFile
from farspan.pretrain.checkpoint.whole import check_contents, expected_in_files, strangers, tensor_problems

SHAPES = {name: logical.shape for name, logical in logicals(130, 1).items()}


def write(folder, kinds=("weight", "exp_avg", "exp_avg_sq"), tensor=2, data=3):
    values = {kind: randoms(logicals(130, 1), seed=number) for number, kind in enumerate(kinds)}
    logical = logicals(130, tensor)
    return write_checkpoint(folder, values, lambda name: held(logical[name], tensor, data))


def without(entry, *kinds):
    for kind in kinds:
        del entry["shards"][kind], entry["dtypes"][kind]


def problems(folder, shapes=SHAPES):
    return list(tensor_problems(Manifest.read(folder), shapes))


@pytest.mark.parametrize("kinds", [("weight",), ("weight", "master", "exp_avg", "exp_avg_sq")])
def test_a_whole_checkpoint_has_no_problems(kinds, tmp_path):
    folder = write(tmp_path / "c", kinds)
    if kinds == ("weight",):
        edit(folder, lambda m: [entry.update(step=None) for entry in m["tensors"].values()])
    manifest = Manifest.read(folder)
    assert problems(folder) == [] and strangers(folder, manifest) == []
    for name, contents in expected_in_files(manifest).items():
        with TensorFile(folder / name, manifest.files[name]) as file:
            check_contents(file, contents)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("norm"), "norm is missing"),
        (lambda t: t.update(more=t["norm"]), "more is no tensor of the model"),
        (lambda t: without(t["norm"], "weight"), "norm has no weight"),
        (lambda t: without(t["norm"], "exp_avg_sq"), "norm has no exp_avg_sq, others have"),
        (lambda t: t["norm"].update(step=None), "norm has moments and was never updated"),
        (lambda t: without(t["norm"], "exp_avg", "exp_avg_sq"), "norm was updated and has no moments"),
        (lambda t: t["norm"]["shards"].update(master=t["norm"]["shards"]["exp_avg"]) or
         t["norm"]["dtypes"].update(master="float32"), "words has no master, others have"),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_said(change, said, tmp_path):
    folder = write(tmp_path / "c")
    edit(folder, lambda manifest: change(manifest["tensors"]) and None)
    assert said in problems(folder)[0], problems(folder)


def test_a_tensor_of_another_shape(tmp_path):
    folder = write(tmp_path / "c")
    assert problems(folder, SHAPES | {"norm": (16,)}) == ["norm has shape (15,), the model needs (16,)"]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a": torch.ones(3)}, "has nothing under b where manifest.json says 2 values of int64"),
        ({"a": torch.ones(4), "b": torch.ones(2, dtype=torch.int64)}, "has 4 values of float32 under a where"),
        ({"a": torch.ones(3).half(), "b": torch.ones(2, dtype=torch.int64)}, "has 3 values of float16 under a where"),
        ({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.int64), "c": torch.ones(1)},
         "has 1 values of float32 under c where manifest.json says nothing"),
    ],
)  # fmt: skip
def test_a_file_with_other_tensors(tensors, said, tmp_path):
    about = write_tensors(tmp_path / "file", tensors)
    expected = {"a": (torch.float32, 3), "b": (torch.int64, 2)}
    with TensorFile(tmp_path / "file", about) as file:
        refused(lambda: check_contents(file, expected), said)


def test_strangers(tmp_path):
    folder = write(tmp_path / "c")
    (folder / "notes.txt").write_text("mine")
    (folder / "tokenizer").mkdir()
    assert strangers(folder, Manifest.read(folder)) == ["notes.txt", "tokenizer"]
    (folder / "tokenizer/a.json").write_text("{}")
    (folder / "tokenizer/b.json").write_text("{}")
    edit(folder, lambda m: m["tokenizer"].update({"a.json": {"bytes": 2, "checksums": "0" * 16}}))
    assert strangers(folder, Manifest.read(folder)) == ["notes.txt", "tokenizer/b.json"]
