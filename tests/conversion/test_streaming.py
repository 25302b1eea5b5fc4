"""Conversion from the files of any layout, a tensor at a time, into files of a largest size, and all the way round."""

from __future__ import annotations

import dataclasses
import json
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import held, write_checkpoint
from comparison import assert_identical
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from farspan.launch.cli import main
from farspan.parallel.mesh import Axis, Mesh, SoloGroup
from farspan.parallel.sharding import Logical, logical_of
from farspan.pretrain import checkpoint as ckpt
from farspan.pretrain.conversion import to_huggingface as export
from farspan.pretrain.conversion.from_huggingface import from_huggingface, read_model
from farspan.pretrain.conversion.model import model_of
from farspan.pretrain.conversion.read_ahead import ReadAhead
from farspan.pretrain.conversion.renaming import public_tensors
from farspan.pretrain.conversion.to_huggingface import to_huggingface
from farspan.pretrain.models.base import Stage

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/model.safetensors"))
BERT = GOLDEN / "megatron-bert-pretraining"


def logical_tensors(folder: Path) -> dict[str, Tensor]:
    reader = ckpt.Reader(folder)
    return {name: reader.tensor(name) for name in reader.names()}


# All the way round.


@pytest.mark.parametrize("case", CASES)
def test_ours_to_hugging_face_to_ours(case: str, tmp_path: Path) -> None:
    """As it was imported, and as if it had been trained here; the export of the latter in several files."""
    from_huggingface(GOLDEN / case, tmp_path / "imported")
    to_huggingface(tmp_path / "imported", tmp_path / "first")
    assert_identical(load_file(tmp_path / "first/model.safetensors"), load_file(GOLDEN / case / "model.safetensors"))
    from_huggingface(tmp_path / "first", tmp_path / "again")
    imported, again = (ckpt.Manifest.read(tmp_path / name) for name in ("imported", "again"))
    assert (again.model, again.heads) == (imported.model, imported.heads)
    assert {key: again.huggingface[key] for key in ("aliases", "constants")} == {
        key: imported.huggingface[key] for key in ("aliases", "constants")
    }
    wanted = logical_tensors(tmp_path / "imported")
    assert_identical(logical_tensors(tmp_path / "again"), wanted)
    dataclasses.replace(imported, huggingface={}).write(tmp_path / "imported")
    to_huggingface(tmp_path / "imported", tmp_path / "second", max_shard_size="8KB")
    assert len(list((tmp_path / "second").glob("model-*-of-*.safetensors"))) > 1
    from_huggingface(tmp_path / "second", tmp_path / "third")
    third = ckpt.Manifest.read(tmp_path / "third")
    assert (third.model, third.heads) == (imported.model, imported.heads)
    assert_identical(logical_tensors(tmp_path / "third"), wanted)


def logicals_of(manifest: ckpt.Manifest, size: int) -> dict[str, Logical]:
    """As parameters lie on so many tensor ranks."""
    cls, config, heads = model_of(manifest)
    axis, one = Axis(0, size, SoloGroup()), Axis(0, 1, SoloGroup())
    mesh = Mesh(axis, one, one, axis, one.group, torch.device("meta"))
    with torch.device("meta"):
        model = cls(config, mesh, stage=Stage.whole(config), heads=heads)
    return {name: logical_of(parameter) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("tensor", "data"), [(1, 1), (4, 1), (1, 3), (2, 5)])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_every_layout_gives_the_same_bytes(tensor: int, data: int, dtype: str | None, tmp_path: Path) -> None:
    """Slices of tensor ranks, and runs of their values as ZeRO 3 has them."""
    from_huggingface(BERT, tmp_path / "whole")
    manifest, values = ckpt.Manifest.read(tmp_path / "whole"), logical_tensors(tmp_path / "whole")
    logicals = logicals_of(manifest, tensor)
    sharded = write_checkpoint(
        tmp_path / "sharded", {"weight": values}, lambda name: held(logicals[name], tensor, data)
    )
    found = ckpt.Manifest.read(sharded)
    dataclasses.replace(manifest, tensors=found.tensors, files=found.files).write(sharded)
    assert sum(path.suffix == ".safetensors" for path in sharded.iterdir()) == tensor * data
    for source in ("whole", "sharded"):
        to_huggingface(tmp_path / source, tmp_path / f"{source}-hf", dtype)
    one, other = ((tmp_path / f"{source}-hf/model.safetensors").read_bytes() for source in ("whole", "sharded"))
    assert one == other


def test_a_damaged_file_is_not_exported(tmp_path: Path) -> None:
    from_huggingface(BERT, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint/weights-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights-00000\.safetensors is damaged"):
        to_huggingface(tmp_path / "checkpoint", tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


# Files of a largest size.


def test_large_models_come_in_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    from_huggingface(BERT, tmp_path / "checkpoint")
    out, limit = tmp_path / "hf", 10_000
    assert main(["convert", "to-hf", str(tmp_path / "checkpoint"), str(out), "--max-shard-size", "10KB"]) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert [p.name for p in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    tensors: dict[str, Tensor] = {}
    for path in files:
        of_file = load_file(path)
        assert len(of_file) == 1 or sum(x.nbytes for x in of_file.values()) <= limit
        assert all(index["weight_map"][name] == path.name for name in of_file)
        tensors |= of_file
    assert_identical(tensors, load_file(BERT / "model.safetensors"))
    assert index["metadata"] == {"total_size": sum(x.nbytes for x in tensors.values())}
    assert not (out / "model.safetensors").exists()
    _, told = transformers.AutoModelForPreTraining.from_pretrained(out, output_loading_info=True)
    assert not any(told.values()), told


@pytest.mark.parametrize(
    ("size", "bytes"), [("5GB", 5 * 10**9), ("200 mb", 2 * 10**8), (17, 17), ("3KiB", 3072), ("1GiB", 2**30)]
)
def test_sizes(size: int | str, bytes: int) -> None:
    assert export._bytes(size) == bytes


@pytest.mark.parametrize("size", ["", "GB", "5 TB", "-1", "0", "1.5GB", 0])
def test_sizes_that_are_none(size: int | str, tmp_path: Path) -> None:
    from_huggingface(BERT, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="is no size of a file: give bytes, or a number and KB, MB or GB"):
        to_huggingface(tmp_path / "checkpoint", tmp_path / "hf", max_shard_size=size)


@given(st.lists(st.integers(0, 12), min_size=1), st.integers(1, 20))
def test_shards_are_filled_in_order(sizes: list[int], largest: int) -> None:
    named = {str(number): size for number, size in enumerate(sizes)}
    shards = export._shards(named, largest)
    assert [name for names in shards for name in names] == list(named)
    totals = [sum(named[name] for name in names) for names in shards]
    assert all(
        total <= largest or len([n for n in names if named[n]]) == 1
        for total, names in zip(totals, shards, strict=True)
    )
    for total, following in zip(totals, shards[1:], strict=False):
        assert total + named[following[0]] > largest  # else it belonged to the file before


# What is in memory.


class Memory:
    """Bytes of tensors that are alive, and the most that there were."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        tensor = torch.empty(size, dtype=torch.uint8)
        self._add(size)
        weakref.finalize(tensor, self._add, -size)
        return tensor

    def _add(self, size: int) -> None:
        with self._lock:
            self.now += size
            self.most = max(self.most, self.now)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 9))
@settings(deadline=None)
def test_no_more_is_read_ahead_than_there_is_room_for(sizes: list[int], more: int) -> None:
    named, memory, room = {str(i): size for i, size in enumerate(sizes)}, Memory(), max(sizes) + more
    threads = torch.get_num_threads()
    with ReadAhead(lambda name: memory.take(named[name]), named, room) as read:
        for name, size in named.items():
            assert len(read(name)) == size
            ahead = sum(size for _, size, _ in read._reading)
            assert size + ahead <= room
            following = list(named.values())[int(name) + 1 + len(read._reading) :]
            assert not following or size + ahead + following[0] > room  # as many as there is room for
    assert memory.most <= room + max(sizes) and memory.now == 0  # the one before is let go when the next is taken
    assert torch.get_num_threads() == threads


def test_what_reading_raises_is_raised() -> None:
    def read(name: str) -> Tensor:
        if name == "b":
            raise ValueError("damaged")
        return torch.zeros(1)

    with ReadAhead(read, {"a": 1, "b": 1, "c": 1}, 9) as ahead:
        ahead("a")
        with pytest.raises(ValueError, match="damaged"):
            ahead("b")


def test_an_export_reads_a_tensor_when_its_turn_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that were read have together no more bytes than the largest one, and the one that was just written."""
    from_huggingface(BERT, tmp_path / "checkpoint")
    memory, right = Memory(), export._Tensors._read

    def read(self: Any, name: str) -> Tensor:
        value = right(self, name)
        memory._add(value.nbytes)
        weakref.finalize(value, memory._add, -value.nbytes)
        return value

    monkeypatch.setattr(export._Tensors, "_read", read)
    to_huggingface(tmp_path / "checkpoint", tmp_path / "hf")
    sizes = [x.nbytes for x in load_file(tmp_path / "hf/model.safetensors").values()]
    assert memory.now == 0 and max(sizes) <= memory.most <= 2 * max(sizes) < sum(sizes) / 3


def test_an_import_reads_a_tensor_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from farspan.pretrain.conversion.huggingface_folder import HuggingFaceFolder

    asked, right = [], HuggingFaceFolder.tensor
    monkeypatch.setattr(HuggingFaceFolder, "tensor", lambda self, key: asked.append(key) or right(self, key))
    model = read_model(BERT)
    assert asked == []
    assert model.read("layers.1.attention.qkv.weight").shape == (3, 32, 32)
    assert [name.split(".")[-2] for name in asked] == ["query", "key", "value"]


def test_public_tensors_are_runs_of_logical_ones() -> None:
    model = read_model(GOLDEN / "mega-mlm")
    keys = model.cls.huggingface_keys(model.config, model.heads)
    theirs = load_file(GOLDEN / "mega-mlm/model.safetensors")
    found = public_tensors(keys, model.shapes())
    joined = [name for name, public in found.items() if len(public.runs) > 1]
    assert joined and all("mx_proj" in name for name in joined)
    for name, public in found.items():
        assert public.shape == tuple(theirs[name].shape)
        runs = [model.read(logical).reshape(-1)[begin:end] for logical, begin, end in public.runs]
        assert torch.equal(torch.cat(runs).view(public.shape), theirs[name])
