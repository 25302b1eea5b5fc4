"""Tensor files: what is written is what the library reads, and nothing damaged or hostile passes for whole."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import resource
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from checkpoints import opened, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from farspan.pretrain import checksums
from farspan.pretrain.checkpoint import tensor_file
from farspan.pretrain.checkpoint.tensor_file import CheckedFile, TensorFile, copy_checked, write_stream, write_tensors

DTYPES = [*tensor_file._DTYPES.values()]
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def random(dtype, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (math.prod(shape), dtype.itemsize), generator=generator)
    return bits.to(torch.uint8).view(-1).view(dtype).view(shape)


def equal(a, b):
    """Bit by bit: nan is nan."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b)))


@pytest.fixture
def small_blocks(monkeypatch):
    for module in (tensor_file, checksums):
        monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(tensor_file, "_AT_ONCE", 128)


# What is written is what is read.


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice on files")
def test_what_is_written_goes_to_the_disk_meanwhile(tmp_path, small_blocks, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, begin, end, advice: asked.append((begin, end, advice)))
    monkeypatch.setattr(tensor_file, "_BEHIND", 1000)
    tensors = {"long": random(torch.float32, 2000), **{str(n): random(torch.float32, 10 + n, seed=n) for n in range(9)}}
    about = write_tensors(tmp_path / "file", tensors)
    ends = [end for _, end, _ in asked]
    assert {(begin, advice) for begin, _, advice in asked} == {(0, os.POSIX_FADV_DONTNEED)}
    assert all(1000 <= later - sooner < 1064 for sooner, later in zip([0, *ends], ends, strict=False))
    assert 0 <= about["bytes"] - ends[-1] < 1064
    assert all(equal(found, tensors[name]) for name, found in load_file(tmp_path / "file").items())


def test_the_library_reads_what_is_written(tmp_path):
    tensors = {f"{number} {dtype}": random(dtype, 3, number, seed=number) for number, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, dtype=torch.bfloat16), "none": torch.empty(4, 0)}
    tensors |= {
        "odd": random(torch.uint8, 7),
        "odd too": random(torch.bfloat16, 3),
        "turned": random(torch.float32, 5, 3).t(),
    }
    about = write_tensors(tmp_path / "file", tensors, {"format": "pt"})
    assert about["bytes"] == (tmp_path / "file").stat().st_size
    found = load_file(tmp_path / "file")
    assert set(found) == set(tensors)
    with TensorFile(tmp_path / "file", about) as ours, TensorFile(tmp_path / "file", about, trusted=True) as trusted:
        ours.verify()
        assert set(ours.tensors) == set(tensors)
        for name, tensor in tensors.items():
            assert equal(found[name], tensor.contiguous()), name
            for file in (ours, trusted):
                assert file.dtype(name) == tensor.dtype
                assert equal(file.read(name, 0, tensor.numel()), tensor.reshape(-1)), name
                into = torch.empty(tensor.shape, dtype=tensor.dtype)
                file.read_into(name, 0, into)
                assert equal(into, tensor.contiguous()), name


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(max_size=6).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=5,
    ),
    st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
)  # fmt: skip
def test_any_names_shapes_and_dtypes(tmp_path, described, metadata):
    tensors = {name: random(dtype, *shape) for name, (dtype, shape) in described.items()}
    about = write_tensors(tmp_path / "any", tensors, metadata)
    found = load_file(tmp_path / "any")
    assert set(found) == set(tensors)
    with TensorFile(tmp_path / "any", about) as file:
        file.verify()
        for name, tensor in tensors.items():
            assert equal(found[name], tensor)
            assert equal(file.read(name, 0, tensor.numel()).view(tensor.shape), tensor)


def test_a_tensor_is_read_when_its_turn_comes_and_let_go(tmp_path):
    """Of what is streamed one tensor is in memory."""
    shapes = {str(number): (torch.float32, (number + 1, 1000)) for number in range(6)}
    alive: list[weakref.ref] = []

    def read(name):
        assert not any(tensor() is not None for tensor in alive), "the one before is still there"
        tensor = torch.full(shapes[name][1], float(name))
        alive.append(weakref.ref(tensor))
        return tensor

    write_stream(tmp_path / "file", shapes, read)
    assert len(alive) == 6
    assert {name: x.mean().item() for name, x in load_file(tmp_path / "file").items()} == {str(n): n for n in range(6)}


@pytest.mark.parametrize("given", [torch.zeros(3), torch.zeros(2, dtype=torch.float64)])
def test_another_tensor_than_was_described(given, tmp_path):
    with pytest.raises(AssertionError, match=r"x: torch\.float"):
        write_stream(tmp_path / "file", {"x": (torch.float32, (2,))}, lambda name: given)


# Ranges.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_every_range_over_the_edges_of_blocks(dtype, tmp_path, small_blocks):
    tensors = {"first": random(dtype, 5), "x": random(dtype, 301 // dtype.itemsize), "last": random(dtype, 3)}
    about = write_tensors(tmp_path / "file", tensors)
    header = about["bytes"] - sum(x.nbytes for x in tensors.values())
    values = len(tensors["x"])
    with TensorFile(tmp_path / "file", about) as file, TensorFile(tmp_path / "file", about, trusted=True) as trusted:
        assert trusted.bytes_read == header
        file.verify()
        for begin in range(0, values, 3):
            for end in range(begin, values + 1, 5):
                expected = tensors["x"][begin:end]
                before, trusted_before = file.bytes_read, trusted.bytes_read
                assert equal(file.read("x", begin, end), expected)
                assert equal(trusted.read("x", begin, end), expected)
                # What is asked for; else the blocks of 64 bytes that it lies in, but for the last, which is shorter.
                offset = header + tensors["first"].nbytes
                first, last = offset + begin * dtype.itemsize, offset + end * dtype.itemsize
                touched = min(-(-last // 64) * 64, about["bytes"]) - first // 64 * 64
                assert trusted.bytes_read - trusted_before == expected.nbytes
                assert file.bytes_read - before == touched
                for reader in (trusted, file):
                    before = reader.bytes_read
                    into = torch.zeros(len(expected) + 2, dtype=dtype)
                    reader.read_into("x", begin, into[1:-1])
                    assert equal(into[1:-1], expected) and not into[0] and not into[-1]
                    assert reader.bytes_read - before == (expected.nbytes if reader is trusted else touched)


def test_more_than_there_is(tmp_path):
    about = write_tensors(tmp_path / "file", {"x": torch.arange(5), "y": torch.arange(5)})
    for trusted in (False, True):
        with TensorFile(tmp_path / "file", about, trusted=trusted) as file:
            for begin, end in ((0, 6), (-1, 2), (3, 2), (5, 7)):
                refused(lambda: file.read("x", begin, end), f"x has 5 values, {begin} to {end} are needed")  # noqa: B023


# Damage.


@pytest.fixture
def small(tmp_path, small_blocks):
    """A file of a few blocks, its content and what a manifest says of it."""
    tensors = {"a": random(torch.float32, 9), "b": random(torch.bfloat16, 21)}
    path = tmp_path / "small"
    about = write_tensors(path, tensors)
    assert len(about["checksums"]) == 16 * 4
    return path, path.read_bytes(), about, tensors


def read_all(path, about, *, trusted=False):
    with TensorFile(path, about, trusted=trusted) as file:
        return {name: file.read(name, 0, file.tensors[name][1]) for name in file.tensors}


def verify(path, about):
    with TensorFile(path, about) as file:
        file.verify()


def test_every_byte_that_is_not_what_was_written(small):
    path, content, about, tensors = small
    verify(path, about)
    for at in range(len(content)):
        for flip in (0x01, 0x80, content[at] ^ ord(" ") or 0xFF):
            path.write_bytes(content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :])
            said = refused(lambda: verify(path, about), f"{path} is damaged (bytes ")
            begin, end = (int(word) for word in said.split("bytes ")[1].split(" are")[0].split(" to "))
            assert begin <= at < end <= begin + 64
            refused(lambda: read_all(path, about), f"{path} is damaged (bytes ")
    # A block that is not needed is not looked at: a tensor that lies in others is there.
    path.write_bytes(content[:-1] + b"?")
    with TensorFile(path, about) as file:
        assert equal(file.read("a", 0, 9), tensors["a"])
        refused(lambda: file.read("b", 20, 21), "is damaged")


def test_every_byte_where_blocks_are_verified_in_place(tmp_path, small_blocks):
    path = tmp_path / "long"
    about = write_tensors(path, {"before": random(torch.float32, 37), "x": random(torch.float32, 100)})
    content = path.read_bytes()

    def read():
        with TensorFile(path, about) as file:
            file.read_into("x", 0, torch.empty(100))

    for at in range(len(content) - 400, len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        refused(read, f"{path} is damaged (bytes ")
    path.write_bytes(content)
    read()


def test_every_length_that_is_not_what_was_written(small):
    path, content, about, _ = small
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refused(lambda: verify(path, about), f"{path} is damaged (it has {length} bytes, {len(content)} were written)")
    for more in (b"\0", b"x" * 63, content):
        path.write_bytes(content + more)
        refused(lambda: verify(path, about), f"{path} is damaged (it has {len(content + more)} bytes")


def test_a_file_that_becomes_shorter_while_it_is_read(small):
    path, content, about, _ = small
    for trusted in (False, True):
        path.write_bytes(content)
        with TensorFile(path, about, trusted=trusted) as file:
            os.truncate(path, len(content) - 1)
            refused(lambda: file.read("b", 0, 21), "it has become shorter")


@pytest.mark.parametrize(
    "change",
    [
        {"checksums": ""}, {"checksums": "0" * 64}, {"checksums": "é" * 64}, {"bytes": 0}, {"bytes": 1},
        {"bytes": 2**62}, {"bytes": 2**62, "checksums": ""},
    ],
)  # fmt: skip
def test_a_manifest_that_says_something_else_of_it(change, small):
    path, _, about, _ = small
    refused(lambda: verify(path, about | change), f"{path} is damaged")


def test_a_file_that_cannot_be_opened(small, tmp_path):
    path, _, about, _ = small
    refused(lambda: verify(tmp_path / "none", about), f"{tmp_path / 'none'} is missing: the checkpoint is not whole")
    refused(lambda: verify(path / "below", about), "is missing: the checkpoint is not whole")


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link to a device"])
def test_what_is_no_file_is_not_opened(kind, small, tmp_path):
    """A pipe would be waited for, a device never ends."""
    _, _, about, _ = small
    path = tmp_path / "strange"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.symlink_to("/dev/zero")
    with opened() as files:
        refused(lambda: verify(path, about), f"{path} is no file: the checkpoint is not whole, take another")
    assert not files


def test_a_link_to_a_file_is_as_good_as_it(small, tmp_path):
    """Checkpoints are moved to larger disks, and caches are made of links; what is read is verified all the same."""
    path, content, about, _ = small
    (tmp_path / "link").symlink_to(path)
    verify(tmp_path / "link", about)
    path.write_bytes(content[:-1] + b"?")
    refused(lambda: verify(tmp_path / "link", about), f"{tmp_path / 'link'} is damaged")


def test_an_error_of_the_disk_names_the_file(small, monkeypatch):
    path, _, about, _ = small

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with TensorFile(path, about) as file:
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(OSError, match=r"Input/output error") as caught:
            file.read("a", 0, 1)
    assert caught.value.filename == str(path)


# Files of strangers, with checksums that are right.


def foreign(path: Path, header: bytes | Any, data: bytes, *, length: int | None = None) -> dict[str, Any]:
    """Write a file as it stands; what its manifest would say."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    content = (len(text) if length is None else length).to_bytes(8, "little") + text + data
    path.write_bytes(content)
    blocks = [content[at : at + tensor_file.BLOCK] for at in range(0, len(content), tensor_file.BLOCK)]
    return {"bytes": len(content), "checksums": "".join(xxhash.xxh3_64_hexdigest(block) for block in blocks)}


@contextmanager
def little_memory() -> Iterator[None]:
    """No more than half a gibibyte can be asked for: who believes what a file says fails."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def entry(shape=(2,), offsets=(0, 8), dtype="F32", **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


HOSTILE = {
    "no object": [],
    "a number": 5,
    "null": None,
    "not JSON": b"{]......",
    "no header": b"",
    "not UTF-8": b'{"\xff\xfe":1}',
    "UTF-16": json.dumps({"x": entry()}).encode("utf-16"),
    "deep": b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number of many digits": b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,' + b"8" * 5000 + b"]}}",
    "a name twice": b'{"x":' + json.dumps(entry()).encode() + b',"x":' + json.dumps(entry()).encode() + b"}",
    "a key twice": b'{"x":{"dtype":"F32","shape":[9],"shape":[2],"data_offsets":[0,8]}}',
    "an entry that is none": {"x": 3},
    "an entry without a shape": {"x": {"dtype": "F32", "data_offsets": [0, 8]}},
    "an entry without offsets": {"x": {"dtype": "F32", "shape": [2]}},
    "an unknown dtype": {"x": entry(dtype="F7")},
    "a dtype that is a list": {"x": entry(dtype=["F32"])},
    "a shape that is a number": {"x": entry(shape=2)},
    "a shape that is text": {"x": entry(shape="2")},
    "a shape of text": {"x": entry(shape=["2"])},
    "a shape of null": {"x": entry(shape=[None, 2])},
    "a shape of floats": {"x": entry(shape=[2.0])},
    "a shape of bools": {"x": entry(shape=[True, 2])},
    "a negative shape": {"x": entry(shape=[-1, -2])},
    "a huge shape": {"x": entry(shape=[2**40, 2**40])},
    "another size": {"x": entry(shape=[3])},
    "offsets that are floats": {"x": entry(offsets=[0.0, 8.0])},
    "offsets that are bools": {"x": entry(shape=[1], offsets=[False, True], dtype="U8"), "y": entry([7], [1, 8], "U8")},
    "offsets that are text": {"x": entry(offsets="08")},
    "three offsets": {"x": entry(offsets=[0, 8, 8])},
    "one offset": {"x": entry(offsets=[0])},
    "offsets in an object": {"x": entry(offsets={"0": 0, "8": 8})},
    "negative offsets": {"x": entry(offsets=[-8, 0])},
    "offsets that run back": {"x": entry(offsets=[8, 0])},
    "offsets behind the end": {"x": entry(offsets=[8, 16])},
    "huge offsets": {"x": entry(offsets=[2**63, 2**63 + 8])},
    "infinite offsets": b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}',
    "tensors over each other": {"x": entry(), "y": entry()},
    "tensors that overlap": {"x": entry(shape=[1], offsets=[0, 4]), "y": entry(shape=[3], offsets=[2, 8], dtype="F16")},
    "a hole": {"x": entry(shape=[1], offsets=[0, 4])},
    "a hole at the beginning": {"x": entry(shape=[1], offsets=[4, 8])},
    "nothing but data": {},
    "values that are not aligned": {
        "x": entry([1], [0, 1], "U8"), "y": entry([1], [1, 5]), "z": entry([3], [5, 8], "U8"),
    },
}  # fmt: skip


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
def test_a_header_that_is_none(header, trusted, tmp_path):
    about = foreign(tmp_path / "file", header, bytes(range(8)))
    with little_memory():
        refused(lambda: read_all(tmp_path / "file", about, trusted=trusted), "is damaged (its header is none of")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 99_999_999, 100_000_001, 1000])
def test_a_header_that_is_longer_than_the_file(length, tmp_path):
    about = foreign(tmp_path / "file", {"x": entry()}, bytes(8), length=length)
    for trusted in (False, True):
        with little_memory():
            refused(lambda: read_all(tmp_path / "file", about, trusted=trusted), "its header is longer than the file")  # noqa: B023


@pytest.mark.parametrize("size", range(9))
def test_a_file_that_is_too_short_for_a_header(size, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    about = {"bytes": size, "checksums": xxhash.xxh3_64_hexdigest(bytes(size)) if size else ""}
    for trusted in (False, True):
        refused(lambda: read_all(path, about, trusted=trusted), f"{path} is damaged (its header is")  # noqa: B023


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 20) | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_header_is_refused_or_read(data, tmp_path):
    """One value of a good header is another: an error in one line, or as many values as the file has room for."""
    header: Any = {"x": entry([2], [0, 8]), "y": entry([2, 2], [8, 16], "BF16"), "__metadata__": {"a": "b"}}
    header = copy.deepcopy(header)
    name = data.draw(st.sampled_from(sorted(header)))
    path = [name] if name == "__metadata__" else [name, data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))]
    where = header
    for key in path[:-1]:
        where = where[key]
    if isinstance(where[path[-1]], list) and data.draw(st.booleans()):
        where, path = where[path[-1]], [data.draw(st.integers(0, len(where[path[-1]]) - 1))]
    where[path[-1]] = data.draw(JSON)
    about = foreign(tmp_path / "any", header, bytes(range(16)))
    for trusted in (False, True):
        try:
            found = read_all(tmp_path / "any", about, trusted=trusted)
        except ValueError as error:
            assert "\n" not in str(error) and str(tmp_path / "any") in str(error)
        else:
            assert sum(x.nbytes for x in found.values()) == 16


# Writing that fails.


def test_a_disk_that_takes_less_than_it_is_given(tmp_path, monkeypatch, small_blocks):
    """A raw file may, at every call."""
    real = Path.open

    class Slow:
        def __init__(self, file):
            self.file, self.fileno = file, file.fileno

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, part):
            return self.file.write(part[:7])

    tensors = {"a": random(torch.float32, 50), "b": random(torch.uint8, 33)}
    expected = write_tensors(tmp_path / "expected", tensors)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *args, **kwargs: Slow(real(self, *args, **kwargs)))
        about = write_tensors(tmp_path / "file", tensors)
    assert about == expected
    assert (tmp_path / "file").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize("limit", [0, 1, 8, 100, 700])
def test_a_disk_that_is_full(limit, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OSError, match="File too large") as caught:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            write_tensors(tmp_path / "file", {"x": torch.arange(100)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path / "file")
    assert (tmp_path / "file").stat().st_size == limit


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_tensors(tmp_path / "none" / "file", {"x": torch.arange(3)})
    assert caught.value.filename == str(tmp_path / "none" / "file")


# Files that are copied as they are.


def test_files_are_copied_with_checksums(tmp_path, small_blocks):
    source, target = tmp_path / "from", tmp_path / "to"
    source.mkdir()
    files = {"a.json": b"{}", "empty": b"", "ü 1": bytes(range(256)) * 3}
    for name, content in files.items():
        (source / name).write_bytes(content)
    copied = copy_checked(source.iterdir(), target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == files and set(copied) == set(files)
    for name, about in copied.items():
        with CheckedFile(target / name, about) as file:
            file.verify()
            assert file.bytes_read == len(files[name])
        (target / name).write_bytes(files[name][:-1] + b"?")
        refused(lambda: CheckedFile(target / name, about).verify(), "is damaged")  # noqa: B023
    with pytest.raises(FileExistsError):
        copy_checked(source.iterdir(), target)
