from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Description
from safetensors.torch import load_file
from torch import Tensor

from farspan.parallel.layers import padded_vocabulary
from farspan.parallel.mesh import Axis, Mesh
from farspan.parallel.sharding import Logical, logical_of
from farspan.pretrain import checkpoint as ckpt
from farspan.pretrain.checkpoint import Manifest, Reader

MESH = Mesh.solo()
DESCRIPTION = Description("megatron-bert", {"num_hidden_layers": 1})


MODEL = DESCRIPTION.filled(MESH)
PARAMETERS = [(name, p, p.detach()) for name, p in MODEL.named_parameters()]
WHOLE = {name: logical_of(p).merge([value]) for name, p, value in PARAMETERS}


def save(root: Path, step: int, *, keep_last: int = 0, tokenizer: Path | None = None) -> Path:
    """A checkpoint of the tiny model, whose optimizer's state is the step."""
    weights, entries = ckpt.local_slices(PARAMETERS, MESH.tensor, ckpt.weights_file(MESH))
    manifest = Manifest(step, DESCRIPTION.config.model_dump(), DESCRIPTION.heads, {}, layout={"tensor": 1})
    return ckpt.save(
        root,
        manifest,
        MESH,
        weights=weights,
        entries=entries,
        optimizer={"0.step": torch.tensor(float(step))},
        tokenizer=tokenizer,
        keep_last=keep_last,
    )


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoints", 100)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# What is written is what is read.


def test_what_is_saved_is_read(one: Path) -> None:
    reader = Reader(one)
    assert one.name == "step-00000100"
    assert reader.manifest.step == 100
    assert (reader.manifest.model, reader.manifest.heads) == (DESCRIPTION.config.model_dump(), ("lm", "nsp"))
    assert set(reader.names()) == set(WHOLE)
    for name, value in WHOLE.items():
        assert torch.equal(reader.tensor(name), value), name
    assert reader.optimizer(0)["0.step"].item() == 100
    words = load_file(one / "weights-t00-p00.safetensors")["embeddings.words.weight"]
    assert words.shape == (129, 32)  # without padding


def test_the_tokenizer_goes_with_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    folder = save(tmp_path / "checkpoints", 1, tokenizer=tmp_path / "tokenizer")
    assert (folder / "tokenizer" / "tokenizer.json").read_text() == "{}"


def split(folder: Path, tensors: dict[str, tuple[Tensor, Logical]], size: int) -> Path:
    """Write tensors as ``size`` tensor ranks would."""
    folder.mkdir(parents=True)
    parts = []
    for rank in range(size):
        axis = Axis(rank, size, None)
        parameters = []
        for name, (value, logical) in tensors.items():
            parameter = torch.nn.Parameter(logical.slice(value, axis, logical.local_shape(axis)))
            parameter.logical = logical  # type: ignore[attr-defined]
            parameters.append((name, parameter, parameter.detach()))
        file = f"weights-t{rank:02d}-p00.safetensors"
        weights, entries = ckpt.local_slices(parameters, axis, file)
        ckpt.write_tensors(folder / file, weights)
        parts.append(entries)
    Manifest(1, {}, ("lm",), ckpt.merge_entries(parts)).write(folder)
    return folder


def logicals(vocabulary: int, size: int) -> dict[str, Logical]:
    """One of each kind of parameter, as it is on ``size`` tensor ranks."""
    padded = padded_vocabulary(vocabulary, size)
    return {
        "words": Logical((vocabulary, 8), dim=0, padded=padded),
        "bias": Logical((vocabulary,), dim=0, padded=padded),
        "qkv": Logical((3, 8, 16), dim=1),
        "down": Logical((16, 8), dim=1),
        "norm": Logical((16,)),
    }


@pytest.mark.parametrize("vocabulary", [97, 129, 128, 1000])
@pytest.mark.parametrize("saved", [1, 2, 4])
@pytest.mark.parametrize("read", [1, 2, 4])
def test_every_layout_reads_every_other(vocabulary: int, saved: int, read: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    values = {name: torch.randn(x.shape, generator=generator) for name, x in logicals(vocabulary, 1).items()}
    written = {name: (values[name], logical) for name, logical in logicals(vocabulary, saved).items()}
    reader = Reader(split(tmp_path / "c", written, saved))
    for name, value in values.items():
        assert torch.equal(reader.tensor(name), value), name
    for name, logical in logicals(vocabulary, read).items():
        parts = []
        for rank in range(read):
            axis = Axis(rank, read, None)
            shape = (-1, logical.shape[-1]) if name == "qkv" else logical.local_shape(axis)
            local = reader.local(name, logical, axis, shape)
            expected = logical.slice(values[name], axis, logical.local_shape(axis))
            assert torch.equal(local, expected.reshape(shape)), (name, rank)
            parts.append(local)
        assert torch.equal(logical.merge(parts), values[name]), name


def test_copies_are_written_once(tmp_path: Path) -> None:
    logical = Logical((4,))
    shared = {"norm": (torch.ones(4), logical), "copy": (torch.ones(4), Logical((4,), tied_to="norm"))}
    folder = split(tmp_path / "c", shared, 2)
    assert list(load_file(folder / "weights-t00-p00.safetensors")) == ["norm"]
    assert load_file(folder / "weights-t01-p00.safetensors") == {}


# What is not whole.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="other"), "manifest.json is 'other' version 1; this Farspan reads "
         "'farspan-checkpoint' version 1"),
        (lambda m: m.update(version=2), "manifest.json is 'farspan-checkpoint' version 2; this Farspan reads"),
        (dict.clear, "manifest.json is None version None; this Farspan reads"),
        (lambda m: m.pop("heads"), "manifest.json is damaged: it says nothing of heads"),
        (lambda m: m.pop("tensors"), "manifest.json is damaged: it says nothing of tensors"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_another(change: Callable[[dict[str, Any]], Any], message: str, one: Path) -> None:
    edit(one, change)
    refused(lambda: Reader(one), message)


def refused(action: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        action()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_cannot_be_read(one: Path) -> None:
    manifest = one / "manifest.json"
    content = manifest.read_text()
    for broken in (content[: len(content) // 2], "[]", ""):
        manifest.write_text(broken)
        refused(lambda: Reader(one), "manifest.json is ")
    manifest.unlink()
    refused(lambda: Reader(one), "manifest.json is missing: ")


def test_a_file_that_is_missing_or_cut(one: Path) -> None:
    weights = one / "weights-t00-p00.safetensors"
    content = weights.read_bytes()
    for length in (len(content) - 1, len(content) // 2, 9, 4, 0):
        weights.write_bytes(content[:length])
        refused(lambda: Reader(one).tensor("final_norm.weight"), "weights-t00-p00.safetensors is damaged (")
    weights.unlink()
    refused(lambda: Reader(one).tensor("final_norm.weight"), f"{weights} is missing: the checkpoint is not whole")
    refused(lambda: Reader(one).optimizer(1), "optimizer-00001.safetensors is missing: the checkpoint is not whole")


def test_a_tensor_that_is_missing(one: Path) -> None:
    weights = one / "weights-t00-p00.safetensors"
    tensors = load_file(weights)
    for name in ("final_norm.weight", "embeddings.words.weight"):
        ckpt.write_tensors(weights, {key: value for key, value in tensors.items() if key != name})
        refused(lambda name=name: Reader(one).tensor(name), f"{weights} lacks {name}: the checkpoint is not whole")  # type: ignore[misc]
    refused(lambda: Reader(one).tensor("what"), f"{one} has no tensor what: the checkpoint is of another model")


def test_a_slice_that_is_missing(tmp_path: Path) -> None:
    logical = Logical((10, 2), dim=0)
    folder = split(tmp_path / "c", {"x": (torch.randn(10, 2), logical)}, 2)
    edit(folder, lambda m: m["tensors"]["x"]["shards"].pop())
    refused(lambda: Reader(folder).tensor("x"), f"x in {folder} lacks entries 0..10 along dimension 0")
    assert Reader(folder).local("x", logical, Axis(0, 2, None), (5, 2)).shape == (5, 2)


def test_another_model(one: Path) -> None:
    message = f"final_norm.weight in {one} has shape (32,), the model needs (64,): the checkpoint is of another model"
    refused(lambda: Reader(one).local("final_norm.weight", Logical((64,)), MESH.tensor, (64,)), message)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/tmp/secret.safetensors", "a/b.safetensors", "..", "."])
def test_no_file_outside_is_read(file: str, one: Path) -> None:
    shutil.copyfile(one / "weights-t00-p00.safetensors", one.parent / "secret.safetensors")
    edit(one, lambda m: m["tensors"]["final_norm.weight"]["shards"][0].update(file=file))
    refused(lambda: Reader(one).tensor("final_norm.weight"), "the checkpoint is not whole")


# Which one is meant.


def test_a_run_its_checkpoints_or_one_of_them(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    first, second = save(root, 5), save(root, 10)
    assert (root / "latest").read_text() == "step-00000010\n"
    assert ckpt.find(tmp_path) == ckpt.find(root) == ckpt.find(second) == second
    assert ckpt.find(first) == first
    (root / "latest").write_text("step-00000005\n")
    assert ckpt.find(tmp_path) == first
    refused(lambda: ckpt.find(tmp_path / "none"), f"{tmp_path / 'none'} has no checkpoint: give a run folder")


@pytest.mark.parametrize(
    "pointer", [None, b"step-00000099\n", b"", b"\xff\xfe", b"..\n", b"../elsewhere/step-00000001"]
)
def test_latest_that_is_stale_or_missing(pointer: bytes | None, tmp_path: Path) -> None:
    save(tmp_path / "elsewhere", 1)
    root = tmp_path / "checkpoints"
    save(root, 99_999_999), save(root, 5)
    newest = save(root, 123_456_789)  # beyond eight digits
    (root / "latest").unlink()
    if pointer is not None:
        (root / "latest").write_bytes(pointer)
    assert ckpt.latest(root) == newest


def test_what_is_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    whole_one = save(root, 5)
    shutil.copytree(whole_one, root / ".step-00000010.tmp")
    shutil.copytree(whole_one, root / "step-00000011")
    (root / "step-00000011" / "manifest.json").unlink()
    (root / "latest").write_text("step-00000011\n")
    assert ckpt.steps(root) == [whole_one]
    assert ckpt.latest(root) == whole_one
    save(root, 12)
    assert names(root) == ["latest", "step-00000005", "step-00000011", "step-00000012"]


def test_how_many_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["latest", "step-00000004", "step-00000006"]
    save(tmp_path, 8, keep_last=0)
    assert names(tmp_path) == ["latest", "step-00000004", "step-00000006", "step-00000008"]
    save(tmp_path, 10, keep_last=1)
    assert names(tmp_path) == ["latest", "step-00000010"]


# Failures while saving.

OPERATIONS = {
    "os.fsync": (os, "fsync"),
    "os.rename": (os, "rename"),
    "os.replace": (os, "replace"),
    "os.mkdir": (os, "mkdir"),
    "os.unlink": (os, "unlink"),
    "os.rmdir": (os, "rmdir"),
    "shutil.copytree": (shutil, "copytree"),
    "shutil.rmtree": (shutil, "rmtree"),
    "Path.mkdir": (Path, "mkdir"),
    "Path.replace": (Path, "replace"),
    "Path.open": (Path, "open"),
    "save_file": (ckpt, "save_file"),
}


class Stop(BaseException):
    """The process ends here: nothing that handles errors runs to the end."""


class Fault:
    """Counts the calls of all operations that touch the disk, and fails at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, error: type[BaseException]) -> None:
        self.at, self.error, self.calls, self.where = at, error, 0, ""
        for name, (owner, attribute) in OPERATIONS.items():
            monkeypatch.setattr(owner, attribute, self.failing(name, getattr(owner, attribute)))

    def failing(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                self.where = f"{name}({args})"
                raise self.error("injected")
            return operation(*args, **kwargs)

        return call


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def faults(tmp_path: Path, error: type[BaseException], step: int, keep_last: int) -> Iterator[tuple[Path, str, Any]]:
    """One folder with the checkpoints of steps 5 and 10 for each operation at which saving ``step`` is made to fail."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    before = tmp_path / "before"
    save(before, 5)
    save(before, 10)
    for at in range(1, 200):
        root = Path(shutil.copytree(before, tmp_path / str(at)))
        with pytest.MonkeyPatch.context() as monkeypatch:
            fault = Fault(monkeypatch, at, error)
            try:
                save(root, step, keep_last=keep_last, tokenizer=tokenizer)
                outcome: Any = None
            except (OSError, Stop) as problem:
                outcome = problem
        if not fault.where:
            assert at > 10, "the operations are not the ones that saving uses"
            return
        yield root, fault.where, outcome
        shutil.rmtree(root)
    raise AssertionError("saving does not end")


@pytest.mark.parametrize("step", [10, 15])
def test_a_failure_leaves_the_older_ones_whole(step: int, tmp_path: Path) -> None:
    for root, where, outcome in faults(tmp_path, OSError, step, keep_last=0):
        assert isinstance(outcome, OSError), where
        assert "injected" in str(outcome)
        assert "\n" not in str(outcome)
        before = tmp_path / "before"
        assert content(root / "step-00000005") == content(before / "step-00000005"), where
        found = ckpt.latest(root)
        assert found is not None
        if step == 15 or "tokenizer/tokenizer.json" not in content(root / "step-00000010"):
            assert content(root / "step-00000010") == content(before / "step-00000010"), where
        for folder in ckpt.steps(root):  # what passes for a checkpoint can be read
            Reader(folder).tensor("final_norm.weight"), Reader(folder).optimizer(0)
        save(root, 20, keep_last=1)  # and the next save works, and clears up
        assert names(root) == ["latest", "step-00000020"], where


@pytest.mark.parametrize("keep_last", [0, 1])
def test_a_process_that_dies_leaves_whole_checkpoints(keep_last: int, tmp_path: Path) -> None:
    for root, where, outcome in faults(tmp_path, Stop, 15, keep_last):
        assert isinstance(outcome, Stop), where
        found = ckpt.latest(root)
        assert found is not None
        assert found.name in ("step-00000010", "step-00000015"), where
        for folder in ckpt.steps(root):
            Reader(folder).tensor("final_norm.weight"), Reader(folder).optimizer(0)
        save(root, 20, keep_last=1)
        assert names(root) == ["latest", "step-00000020"], where


def test_a_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device", "weights")

    monkeypatch.setattr(ckpt, "save_file", full)
    message = r"the checkpoint of step 6 was not saved \(rank 0: .*No space left.*\); older ones are untouched"
    with pytest.raises(OSError, match=message):
        save(tmp_path, 6)
