"""What is read of a shard was written, or the error names it: never trained on."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farspan.pretrain import checksums
from farspan.pretrain.data import shard, store
from farspan.pretrain.data.shard import OpenFiles
from farspan.pretrain.data.store import TokenStore, write_dataset

BLOCK = 64  # bytes, of which a token has 2
SIZES = (500, 0, 33, 32, 300)  # tokens of the shards: ends within a block, at the end of one
TOKENS = np.random.default_rng(5).integers(0, 900, sum(SIZES))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for module in (checksums, shard):
        monkeypatch.setattr(module, "BLOCK", BLOCK)


def make(folder: Path) -> Path:
    ends = np.cumsum(SIZES)
    shards = [[TOKENS[end - size : end]] if size else [] for end, size in zip(ends, SIZES, strict=True)]
    write_dataset(folder, {"train": shards}, 1000)
    return folder


def read(store: TokenStore, start: int, length: int) -> list[int]:
    return store.read(np.array([start]), np.array([length])).tolist()


def expected(start: int, length: int) -> list[int]:
    return [int(TOKENS[(start + i) % len(TOKENS)]) for i in range(length)]


def test_the_manifest_has_the_checksums_of_every_block(tmp_path):
    described = json.loads((make(tmp_path) / "dataset.json").read_text())["splits"]["train"]
    for one in [*described["shards"], {"file": "train/index.npy", "checksums": described["index_checksums"]}]:
        content = (tmp_path / one["file"]).read_bytes()
        blocks = [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)]
        assert one["checksums"] == "".join(xxhash.xxh3_64(block).hexdigest() for block in blocks), one["file"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_block_is_never_read(data, tmp_path_factory):
    """A changed byte: every range that touches its block is refused, all others are as they were, in any order."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    make(folder)
    number = data.draw(st.sampled_from([n for n, size in enumerate(SIZES) if size]))
    place = data.draw(st.integers(0, 2 * SIZES[number] - 1))
    path = folder / f"train/{number:05d}.bin"
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    block = place // BLOCK
    first = sum(SIZES[:number]) + block * BLOCK // 2
    bad = set(range(first, first + min(BLOCK // 2, SIZES[number] - block * BLOCK // 2)))
    store = TokenStore(folder)
    ranges = st.tuples(st.integers(0, len(TOKENS) - 1), st.integers(1, 600))
    for start, length in data.draw(st.lists(ranges, min_size=1, max_size=8)):
        if bad & {(start + i) % len(TOKENS) for i in range(length)}:
            with pytest.raises(ValueError) as caught:
                read(store, start, length)
            assert f"{path} is damaged (block {block}, bytes {block * BLOCK} to " in str(caught.value)
            assert "prepare the data again" in str(caught.value) and "\n" not in str(caught.value)
        else:
            assert read(store, start, length) == expected(start, length)


def test_a_block_is_verified_once(tmp_path, monkeypatch):
    seen, real = [], shard.checksum
    monkeypatch.setattr(shard, "checksum", lambda content: (seen.append(len(content)), real(content))[1])
    store = TokenStore(make(tmp_path))
    assert seen == []
    assert read(store, 10, 5) == expected(10, 5) and seen == [BLOCK]
    assert read(store, 20, 20) == expected(20, 20) and seen == [BLOCK] * 2
    for _ in range(2):
        assert read(store, 0, len(TOKENS)) == expected(0, len(TOKENS))
    assert sum(seen) == 2 * len(TOKENS)


@pytest.mark.parametrize("touched", [False, True], ids=["new blocks", "blocks that were verified"])
def test_a_file_that_is_cut_while_it_is_read(tmp_path, touched):
    """Of a file that is mapped this would end the process."""
    store = TokenStore(make(tmp_path))
    if touched:
        read(store, 0, len(TOKENS))
    os.truncate(tmp_path / "train/00000.bin", 10 * BLOCK + 6)
    assert read(store, 0, 5) == expected(0, 5)
    with pytest.raises(ValueError, match=r"00000\.bin has become shorter \(block 12 of 16 is not all there\)"):
        read(store, 400, 5)


@pytest.mark.parametrize("touched", [False, True])
def test_a_disk_that_cannot_be_read(tmp_path, monkeypatch, touched):
    store = TokenStore(make(tmp_path))
    if touched:
        read(store, 0, len(TOKENS))

    def broken(descriptor: int, length: int, offset: int) -> bytes:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(
        OSError, match=r"00000\.bin cannot be read \(block 1, .*Input/output error\): put a whole"
    ) as caught:
        read(store, 40, 5)
    assert caught.value.errno == 5


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_more_shards_than_files_may_be_open(tmp_path):
    store, files = TokenStore(make(tmp_path)), OpenFiles(2)
    for one in store._shards:
        one._files = files
    before = open_files()
    for _ in range(3):
        assert read(store, 0, len(TOKENS)) == expected(0, len(TOKENS))
        assert open_files() <= before + 2
    del store, one, files
    assert open_files() <= before


@pytest.mark.parametrize(("allowed", "each"), [(1024, 128), (65536, 8192), (64, 16), (resource.RLIM_INFINITY, 8192)])
def test_the_files_of_two_splits_leave_room(monkeypatch, allowed, each):
    """Text of a GiB has a thousand shards and more in either split."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (allowed, allowed))
    assert OpenFiles()._limit == each


def test_a_damaged_index(tmp_path):
    path = make(tmp_path) / "train/index.npy"
    offsets = np.load(path)
    offsets[1] += 1  # ascending still, and of the same end
    np.save(path, offsets)
    with pytest.raises(ValueError, match=r"index .* is damaged \(it is not what was written\)"):
        TokenStore(tmp_path)


@pytest.mark.parametrize("mapped", [True, False])
def test_an_index_that_is_mapped_or_not(tmp_path, monkeypatch, mapped):
    monkeypatch.setattr(store, "_MAPPED", 0 if mapped else 1 << 30)
    assert read(TokenStore(make(tmp_path)), 3, 999) == expected(3, 999)


def without_checksums(manifest: dict) -> None:
    del manifest["splits"]["train"]["index_checksums"]
    for one in manifest["splits"]["train"]["shards"]:
        del one["checksums"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m["splits"]["train"]["shards"][0].update(checksums="00"), "checksums of another size"),
        (lambda m: m["splits"]["train"]["shards"][0].update(checksums=7), "checksums of another size"),
        (lambda m: m["splits"]["train"].update(index_checksums=[]), "no checksums of its index"),
    ],
)
def test_checksums_that_are_none(tmp_path, change, match):
    path = make(tmp_path) / "dataset.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=match):
        TokenStore(tmp_path)


def test_a_dataset_without_checksums_is_read(tmp_path):
    path = make(tmp_path) / "dataset.json"
    assert TokenStore(tmp_path).checked
    manifest = json.loads(path.read_text())
    without_checksums(manifest)
    path.write_text(json.dumps(manifest))
    store = TokenStore(tmp_path)
    assert not store.checked
    assert read(store, 3, 999) == expected(3, 999)
