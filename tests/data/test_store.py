from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.pretrain.data.store import TokenStore, token_dtype, write_dataset

SHARDS = [[[5, 6, 7], [8]], [], [[9, 9], [10, 11, 12, 13]], []]
STREAM = [5, 6, 7, 8, 9, 9, 10, 11, 12, 13]


def make(folder, size=100):
    write_dataset(folder, {"train": SHARDS, "validation": [[]]}, size)
    return folder


@pytest.mark.parametrize(("size", "dtype"), [(100, "<u2"), (1 << 16, "<u2"), ((1 << 16) + 1, "<u4")])
def test_documents(tmp_path, size, dtype):
    store = TokenStore(make(tmp_path, size))
    assert token_dtype(size) == dtype
    assert (store.documents, store.tokens) == (4, 10)
    documents = [document for shard in SHARDS for document in shard]
    for index, document in enumerate(documents):
        got = store.document(index)
        assert got.tolist() == document and got.dtype == np.dtype(dtype)
        assert not got.flags.writeable
    with pytest.raises(IndexError):
        store.document(4)


def test_highest_id_survives(tmp_path):
    for number, top in enumerate(((1 << 16) - 1, (1 << 16) + 5)):
        write_dataset(tmp_path / str(number), {"train": [[[top]]]}, top + 1)
        assert TokenStore(tmp_path / str(number)).document(0).tolist() == [top]


@settings(max_examples=100, deadline=None)
@given(ranges=st.lists(st.tuples(st.integers(0, 10), st.integers(0, 25)), max_size=5))
def test_ranges_read_across_shards_and_round_the_end(tmp_path_factory, ranges):
    folder = tmp_path_factory.getbasetemp() / "ranges"
    store = TokenStore(folder if folder.exists() else make(folder))
    starts, lengths = (np.array([r[i] for r in ranges], np.int64) for i in range(2))
    expected = [STREAM[(start + i) % 10] for start, length in ranges for i in range(length)]
    got = store.read(starts, lengths)
    assert got.dtype == np.int64 and got.tolist() == expected


def test_unigram_entropy(tmp_path):
    counts = np.unique(STREAM, return_counts=True)[1] / 10
    assert math.isclose(TokenStore(make(tmp_path)).unigram_entropy(), -sum(c * math.log(c) for c in counts))


def edit_manifest(folder, **changes):
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_errors_are_one_clear_line(tmp_path):
    def damaged(name, damage):
        folder = make(tmp_path / name)
        damage(folder)
        return folder

    cases = [
        (damaged("a", lambda f: (f / "dataset.json").unlink()), "train", "run `farspan prepare`"),
        (damaged("b", lambda f: edit_manifest(f, version=2)), "train", "version 2, this Farspan reads"),
        (damaged("c", lambda f: edit_manifest(f, format="x")), "train", "format 'x'"),
        (
            damaged("d", lambda f: (f / "train/00002.bin").write_bytes(b"1234")),
            "train",
            "00002.bin has 4 bytes.*12 bytes",
        ),
        (damaged("e", lambda f: (f / "train/00000.bin").unlink()), "train", "00000.bin is missing"),
        (damaged("f", lambda f: (f / "train/index.npy").write_bytes(b"")), "train", "index.npy cannot be read"),
        (damaged("g", lambda f: np.save(f / "train/index.npy", np.arange(5))), "train", "does not agree"),
        (damaged("h", lambda f: None), "test", "has no split 'test': it has train, validation"),
        (damaged("i", lambda f: None), "validation", "has no documents"),
    ]
    for folder, split, match in cases:
        with pytest.raises(ValueError, match=match) as error:
            TokenStore(folder, split)
        assert "\n" not in str(error.value)


def test_ranks_look_at_a_share_of_the_shards_each(tmp_path):
    """What one of the others has to find is said where it is read."""
    folder = make(tmp_path)
    (folder / "train/00000.bin").unlink()
    with pytest.raises(ValueError, match=r"00000\.bin is missing"):
        TokenStore(folder, share=(0, 2))
    store = TokenStore(folder, share=(1, 2))
    with pytest.raises(OSError, match=r"00000\.bin cannot be read .*No such file or directory"):
        store.document(0)
