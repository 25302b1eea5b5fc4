"""Reading: any part, from any layout, no more than is needed; what is missing or of another kind is said."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from checkpoints import edit, held, logicals, randoms, refused, taken, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from farspan.parallel.mesh import Axis
from farspan.parallel.parts import Part
from farspan.parallel.sharding import Logical
from farspan.pretrain import checksums
from farspan.pretrain.checkpoint import reader as reader_module
from farspan.pretrain.checkpoint import tensor_file
from farspan.pretrain.checkpoint.reader import Reader, load_weights
from farspan.pretrain.checkpoint.tensor_file import TensorFile

LAYOUTS = [*itertools.product((1, 2, 4), (1, 2, 3))]  # tensor ranks, partitions of each one's slice


def written(folder, vocabulary, tensor, data, dtype=torch.float32):
    """The checkpoint of a layout, and what is in it."""
    logical = logicals(vocabulary, tensor)
    values = {"weight": randoms(logical, dtype), "exp_avg": randoms(logical, seed=1)}
    return write_checkpoint(folder, values, lambda name: held(logical[name], tensor, data)), values


def model_of(parameters, values=torch.nan):
    """A module with these parameters, given as name → (logical tensor, shape)."""
    module = nn.Module()
    for name, (logical, shape) in parameters.items():
        parameter = nn.Parameter(torch.full(tuple(shape), values))
        parameter.logical = logical
        module.register_parameter(name, parameter)
    return module


def filled(reader, name, logical, axis, shape):
    """A rank's parameter as ``load_weights`` fills it."""
    shape = torch.empty(logical.local_shape(axis)).reshape(shape).shape
    module = model_of({name: (logical, shape)})
    load_weights(module, reader, axis)
    return module.get_parameter(name).detach()


@pytest.fixture(scope="module", params=[97, 5])
def everywhere(request, tmp_path_factory):
    """A checkpoint of every layout.  Of 5 words some ranks have none."""
    root = tmp_path_factory.mktemp("layouts")
    return request.param, [written(root / f"{t}x{d}", request.param, t, d) for t, d in LAYOUTS]


@pytest.mark.parametrize("trusted", [False, True])
def test_every_layout_reads_every_other(trusted, everywhere):
    vocabulary, saved = everywhere
    for folder, values in saved:
        reader = Reader(folder)
        reader.verify()
        if trusted:
            reader.trust()
        assert set(reader.names()) == set(values["weight"])
        for name, full in values["weight"].items():
            assert torch.equal(reader.tensor(name), full) and reader.shape(name) == full.shape
            assert torch.equal(reader.tensor(name, tuple(full.shape), "exp_avg"), values["exp_avg"][name])
            assert set(reader.kinds(name)) == {"weight", "exp_avg"} and reader.step(name) == 3.0
        for tensor, data in LAYOUTS:
            for name, logical in logicals(vocabulary, tensor).items():
                full = values["weight"][name]
                for rank in range(tensor):
                    axis = Axis(rank, tensor, None)
                    shape = (-1, logical.shape[-1]) if name == "qkv" else logical.local_shape(axis)
                    local = filled(reader, name, logical, axis, shape)
                    expected = logical.slice(full, axis, logical.local_shape(axis)).reshape(shape)
                    assert torch.equal(local, expected), (folder.name, name, tensor, rank)
                for part in held(logical, tensor, data):
                    into = torch.full((part.values,), torch.nan)
                    reader.read("exp_avg", name, part, into)
                    assert torch.equal(into, taken(values["exp_avg"][name], part)), (folder.name, name, part)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_part_of_any_slice(data, tmp_path, monkeypatch):
    """Runs, cut anywhere, of rows that are short or long, in portions that are small, verified or not."""
    monkeypatch.setattr(reader_module, "_PORTION", data.draw(st.sampled_from([1, 7, 64])))
    monkeypatch.setattr(reader_module, "_LONG_RUN", data.draw(st.sampled_from([1, 4096])))
    for module in (tensor_file, checksums):
        monkeypatch.setattr(module, "BLOCK", 64)
    shape = (data.draw(st.integers(1, 5)), 12, data.draw(st.integers(1, 5)))
    logical = Logical(shape, dim=data.draw(st.sampled_from([0, 1])), padded=None)
    full = {"x": torch.arange(float(shape[0] * 12 * shape[2])).view(shape)}
    size = data.draw(st.sampled_from([1, 2, 4] if logical.dim else [1]))
    parts = held(logical, size, data.draw(st.integers(1, 4)))
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    reader = Reader(write_checkpoint(tmp_path / "c", {"weight": full}, lambda name: parts))
    if data.draw(st.booleans()):
        reader.trust()
    start = data.draw(st.integers(0, 11))
    part = Part.of_slice(shape, 1, start, data.draw(st.integers(start + 1, 12)))
    if logical.dim == 0:
        part = Part.of_slice(shape, 0, 0, shape[0])
    begin = data.draw(st.integers(0, part.values))
    part = part.run(begin, data.draw(st.integers(begin, part.values)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    memory = torch.full((part.values + 4,), -1.0, dtype=dtype)
    reader.read("weight", "x", part, memory[2:-2])
    assert torch.equal(memory[2:-2], taken(full["x"], part).to(dtype))
    assert (memory[[0, 1, -2, -1]] == -1).all(), "values beside it are somebody else's"


# No more than is needed.


def header_of(folder, file):
    reader = Reader(folder)
    with TensorFile(folder / file, reader.manifest.files[file], trusted=True) as opened:
        return opened.bytes_read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_bytes_that_are_needed_are_read(dtype, tmp_path):
    """Of a trusted checkpoint: values and headers of the files that have some.  Rows that are short are read with what
    lies between them."""
    rows, width = 50, 8192
    full = {"x": torch.arange(rows * width, dtype=torch.float32).view(rows, width).to(dtype)}
    logical = Logical((rows, width), dim=1)
    folder = write_checkpoint(tmp_path / "c", {"weight": full}, lambda name: held(logical, 2, 3))
    header = header_of(folder, "weights-00000.safetensors")

    def needed(part, files, into=torch.float32):
        reader = Reader(folder)
        reader.trust()
        values = torch.empty(part.values, dtype=into)
        reader.read("weight", "x", part, values)
        assert torch.equal(values, taken(full["x"], part).to(into))
        return reader.bytes_read - files * header

    for into in (dtype, torch.float64):  # straight into place, or not
        for part, files in (
            (Part.of_rank(logical, Axis(1, 2, None)), 3), (Part.of_slice((rows, width), 1, 0, width // 2).run(5, 6), 1),
            (Part.of_slice((rows, width), 1, 2048, 6144), 6), (Part.whole((rows, width)).run(width, 3 * width), 2),
        ):  # fmt: skip
            assert needed(part, files, into) == part.values * dtype.itemsize
    narrow = Part.of_slice((rows, width), 1, 0, 2)
    assert needed(narrow, 3) <= rows * width // 2 * dtype.itemsize


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(reader_module, "_OPEN_FILES", 3)
    full = {"x": torch.arange(40.0), "y": torch.arange(40.0)}
    parts = [Part.whole((40,)).run(n, n + 5) for n in range(0, 40, 5)]
    folder = write_checkpoint(tmp_path / "c", {"weight": full}, lambda name: parts)
    header = header_of(folder, "weights-00000.safetensors")
    reader = Reader(folder)
    for name in full:
        assert torch.equal(reader.tensor(name), full[name]) and len(reader._files) == 3
    reader.trust()
    before = reader.bytes_read
    for name in full:
        into = torch.empty(40)
        reader.read("weight", name, Part.whole((40,)), into)
        assert torch.equal(into, full[name]) and len(reader._files) <= 3
    assert reader.bytes_read - before == 2 * 160 + 16 * header


def test_of_weights_in_many_files_each_is_opened_once(tmp_path, monkeypatch):
    """As ZeRO 3 leaves them: a part of each tensor in every file."""
    monkeypatch.setattr(reader_module, "_OPEN_FILES", 3)
    full = {name: torch.randn(8, 5) for name in ("x", "y", "z")}
    parts = [Part.whole((8, 5)).run(n, n + 5) for n in range(0, 40, 5)]
    folder = write_checkpoint(tmp_path / "c", {"weight": full}, lambda name: parts)
    opened = []

    def noted(path, *about, **options):
        opened.append(path)
        return TensorFile(path, *about, **options)

    monkeypatch.setattr(reader_module, "TensorFile", noted)
    reader = Reader(folder)
    reader.trust()
    module = model_of({name: (Logical((8, 5)), (8, 5)) for name in full})
    load_weights(module, reader, Axis(0, 1, None))
    assert all(torch.equal(module.get_parameter(name), values) for name, values in full.items())
    assert sorted(opened) == sorted(set(opened)) and len(opened) == len(parts)


# Dtypes.


def test_values_are_converted_as_they_are_copied(tmp_path):
    folder, values = written(tmp_path / "c", 10, 2, 2, torch.bfloat16)
    for trusted in (False, True):
        reader = Reader(folder)
        if trusted:
            reader.trust()
        assert reader.dtype("down") == torch.bfloat16 and reader.dtype("down", "exp_avg") == torch.float32
        for name, full in values["weight"].items():
            into = torch.empty(full.numel())
            reader.read("weight", name, Part.whole(tuple(full.shape)), into)
            assert torch.equal(into, full.flatten().float())
            assert reader.tensor(name).dtype == torch.bfloat16


# What is not there.


@pytest.fixture
def one(tmp_path):
    return written(tmp_path / "c", 10, 2, 1)[0]


def test_another_model_or_optimizer(one):
    reader = Reader(one)
    refused(lambda: reader.tensor("what"), f"{one} has no tensor what: the checkpoint is of another model")
    refused(lambda: reader.step("what"), "has no tensor what")
    refused(lambda: reader.kinds("what"), "has no tensor what")
    refused(lambda: reader.tensor("norm", kind="master"), f"{one} has no master of norm: it was saved with another")
    message = f"norm in {one} has shape (15,), the model needs (16,): the checkpoint is of another model configuration"
    refused(lambda: reader.tensor("norm", (16,)), message)
    refused(lambda: filled(reader, "norm", Logical((16,)), Axis(0, 1, None), (16,)), message)
    refused(lambda: reader.read("weight", "norm", Part.whole((16,)), torch.empty(16)), message)


@pytest.mark.parametrize("trusted", [False, True])
def test_a_file_that_is_missing_or_has_something_else(trusted, one):
    reader = Reader(one)
    first, second = (one / f"weights-{n:05d}.safetensors" for n in range(2))
    shutil.copyfile(first, second)
    refused(reader.verify, f"{second} is damaged")
    edit(one, lambda m: m["files"].update({second.name: m["files"][first.name]}))
    reader = Reader(one)
    reader.verify()
    if trusted:
        reader.trust()
    refused(lambda: reader.tensor("words"), f"{second} has 48 values of torch.float32 under words where manifest.json")
    second.unlink()
    refused(lambda: Reader(one).tensor("words"), f"{second} is missing: the checkpoint is not whole")
    refused(Reader(one).verify, f"{second} is missing: the checkpoint is not whole")


def test_another_dtype_or_no_tensor(one):
    edit(one, lambda m: m["tensors"]["bias"].update(dtypes={"weight": "bfloat16", "exp_avg": "float32"}))
    refused(lambda: Reader(one).tensor("bias"), "has 6 values of torch.float32 under bias where manifest.json says 6")
    edit(one, lambda m: m["tensors"].update(other=m["tensors"]["bias"]))
    refused(lambda: Reader(one).tensor("other"), "has nothing under other where manifest.json says 6 values of")


def test_a_tensor_larger_than_its_files(one):
    """Nobody asks for memory that no file could fill."""
    huge = {
        "shape": [2**50],
        "step": None,
        "dtypes": {"weight": "float64"},
        "shards": {"weight": [[0, 0, 0, 2**50, 0, 2**50]]},
    }
    edit(one, lambda m: m["tensors"].update(words=huge))
    refused(lambda: Reader(one).tensor("words"), "has 48 values of torch.float32 under words where manifest.json says")


def test_verification_is_shared(one, tmp_path):
    """Every file by one of so many readers."""
    files = sorted(path for path in one.iterdir() if path.suffix == ".safetensors")
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        for parts in (1, 2, 3, 7):
            said = 0
            for part in range(parts):
                try:
                    Reader(one).verify(part, parts)
                except ValueError as error:
                    said += 1
                    assert str(path) in str(error)
            assert said == 1
        path.write_bytes(whole)


# Into a model.


class Net(nn.Module):
    def __init__(self, size, rank, dtype=torch.float32):
        super().__init__()
        for name, logical in logicals(10, size).items():
            parameter = nn.Parameter(torch.full(logical.local_shape(Axis(rank, size, None)), torch.nan, dtype=dtype))
            if name == "qkv":
                parameter = nn.Parameter(parameter.detach().view(-1, 16))
            parameter.logical = logical
            self.register_parameter(name, parameter)
        self.copy = nn.Parameter(torch.zeros(15))
        self.copy.logical = Logical((15,), tied_to="norm")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_weights_of_a_model(size, tmp_path):
    folder, values = written(tmp_path / "c", 10, 2, 3, torch.bfloat16)
    for rank in range(size):
        net, axis = Net(size, rank), Axis(rank, size, None)
        load_weights(net, Reader(folder), axis)
        for name, logical in logicals(10, size).items():
            expected = logical.slice(values["weight"][name].float(), axis, logical.local_shape(axis))
            assert torch.equal(getattr(net, name).detach().flatten(), expected.flatten())
        assert torch.equal(net.copy.detach(), values["weight"]["norm"].float())
