from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.pretrain.data.hashing import hash64, permute
from farspan.pretrain.data.rows import PackedRows, PaddedRows, PairRows
from farspan.pretrain.data.store import TokenStore, write_dataset
from farspan.pretrain.data.tokenizer import Vocabulary

VOCABULARY = Vocabulary(1000, pad_id=1, cls_id=0, sep_id=2, mask_id=4, unk_id=3, special_ids=(0, 1, 2, 3, 4))
CORPORA = st.lists(st.lists(st.integers(1, 40), max_size=6), min_size=1, max_size=4).filter(any)
QUICK = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


def make_store(folder, shard_lengths):
    """A store whose tokens count up, so that every token tells where it comes from."""
    path = folder / f"{abs(hash(str(shard_lengths)))}"
    counter = iter(range(5, 1 << 16))
    documents = [[[next(counter) for _ in range(length)] for length in shard] for shard in shard_lengths]
    if not path.exists():
        write_dataset(path, {"train": documents}, 1 << 16)
    return TokenStore(path), [np.array(document) for shard in documents for document in shard]


def epoch(rows, number):
    return rows.rows(np.arange(rows.rows_per_epoch) + number * rows.rows_per_epoch)


def fields(arrays):
    return {name: value for name, value in vars(arrays).items() if value is not None}


def framed(document):
    return [VOCABULARY.cls_id, *document, VOCABULARY.sep_id]


@QUICK
@given(size=st.integers(1, 300), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10**9))
def test_permutation_is_a_bijection(size, seed, epoch):
    assert sorted(permute(np.arange(size), size, seed, epoch)) == list(range(size))


def test_permutations_of_epochs_differ_and_look_random():
    orders = np.stack([permute(np.arange(1000), 1000, 7, epoch) for epoch in range(20)])
    assert len(np.unique(orders, axis=0)) == 20
    assert np.abs(np.corrcoef(np.vstack([orders, np.arange(1000)])) - np.eye(21)).max() < 0.15
    # Neighbours do not stay neighbours: a random permutation has about two such places in a thousand.
    assert (np.abs(np.diff(orders, axis=1)) == 1).mean() < 0.01
    assert permute(np.array([10**12 - 1]), 10**12, 3)[0] < 10**12


def test_hash_bits_are_even():
    words = hash64(1, np.arange(10_000))
    bits = (words[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.03
    assert hash64(-1)[0] == hash64(2**64 - 1)[0] != hash64(np.int64(1))[0]


@QUICK
@given(lengths=CORPORA, s=st.integers(3, 50), seed=st.integers(0, 1000), number=st.integers(0, 5))
def test_packed_rows_equal_the_framed_stream_cut_up(folder, lengths, s, seed, number):
    store, documents = make_store(folder, lengths)
    stream = np.array([token for document in documents for token in framed(document)])
    owner = np.array([index for index, document in enumerate(documents) for _ in framed(document)])
    if len(stream) < s:
        with pytest.raises(ValueError, match="fewer than one row"):
            PackedRows(store, VOCABULARY, s, seed)
        return
    rows = PackedRows(store, VOCABULARY, s, seed)
    assert rows.rows_per_epoch == len(stream) // s
    turn = rows.rotation(np.array([number]))[0]
    stream, owner = np.roll(stream, -turn), np.roll(owner, -turn)
    starts_document = np.roll(np.r_[True, np.diff(np.roll(owner, turn)) > 0], -turn)
    made = epoch(rows, number)
    places = permute(np.arange(rows.rows_per_epoch), rows.rows_per_epoch, seed, 0, number)
    for row, place in enumerate(places):
        cut = slice(place * s, (place + 1) * s)
        np.testing.assert_array_equal(made.input_ids[row], stream[cut])
        document, position, expected = 0, 0, []
        for first, begins in enumerate(starts_document[cut]):
            if first == 0 or begins:
                document, position = document + 1, 0
            expected.append((document, position))
            position += 1
        np.testing.assert_array_equal(np.stack([made.document_ids[row], made.positions[row]], axis=1), expected)


@QUICK
@given(lengths=CORPORA, s=st.integers(3, 50), seed=st.integers(0, 1000), number=st.integers(0, 5))
def test_an_epoch_of_packed_rows_has_every_token_once(folder, lengths, s, seed, number):
    store, documents = make_store(folder, lengths)
    total = sum(map(len, documents)) + 2 * len(documents)
    if total < s:
        return
    made = epoch(PackedRows(store, VOCABULARY, s, seed), number).input_ids
    ordinary = made[made >= 5]
    assert len(np.unique(ordinary)) == len(ordinary)
    assert total - made.size == total % s
    assert (made == VOCABULARY.cls_id).sum() <= len(documents)


@QUICK
@given(lengths=CORPORA, s=st.integers(3, 50), seed=st.integers(0, 1000), number=st.integers(0, 5))
def test_padded_rows_are_the_documents_cut_to_fit(folder, lengths, s, seed, number):
    store, documents = make_store(folder, lengths)
    rows = PaddedRows(store, VOCABULARY, s, seed)
    room = s - 2
    expected = [framed(d[i : i + room]) for d in documents for i in range(0, len(d), room)]
    made = epoch(rows, number)
    got = []
    for row in range(rows.rows_per_epoch):
        real = made.document_ids[row] == 1
        size = real.sum()
        assert real[:size].all()
        assert (made.input_ids[row][size:] == VOCABULARY.pad_id).all()
        np.testing.assert_array_equal(made.positions[row], np.where(real, np.arange(s), 0))
        got.append(made.input_ids[row][:size].tolist())
    assert sorted(got) == sorted([list(map(int, row)) for row in expected])


@QUICK
@given(lengths=CORPORA, s=st.integers(5, 50), seed=st.integers(0, 1000), number=st.integers(0, 5))
def test_pairs_are_two_pieces_in_order_or_of_two_documents(folder, lengths, s, seed, number):
    store, documents = make_store(folder, lengths)
    if len(documents) < 2:
        with pytest.raises(ValueError, match="two or more"):
            PairRows(store, VOCABULARY, s, seed)
        return
    owner = {int(token): index for index, document in enumerate(documents) for token in document}
    rows = PairRows(store, VOCABULARY, s, seed)
    made = epoch(rows, number)
    for ids, real, types, label in zip(
        made.input_ids, made.document_ids, made.token_type_ids, made.sentence_labels, strict=True
    ):
        body = ids[: real.sum()].tolist()
        cut = body.index(VOCABULARY.sep_id)
        a, b = body[1:cut], body[cut + 1 : -1]
        assert a and b and body == [*framed(a), *b, VOCABULARY.sep_id]
        assert types.tolist() == [0] * (cut + 1) + [1] * (len(b) + 1) + [0] * (s - len(body))
        for segment in (a, b):
            assert segment == list(range(segment[0], segment[0] + len(segment)))
            assert len({owner[token] for token in segment}) == 1
        assert label == (owner[a[0]] != owner[b[0]])
        if label == 0:
            assert b[0] == a[-1] + 1


def test_pairs_are_even_and_change_with_the_epoch(folder):
    store, _ = make_store(folder, [[30] * 800])
    rows = PairRows(store, VOCABULARY, 128, 5)
    labels = np.concatenate([epoch(rows, number).sentence_labels for number in range(5)])
    assert abs(labels.mean() - 0.5) < 0.03
    lengths = (epoch(rows, 0).token_type_ids == 1).sum(axis=1)
    assert lengths.std() > 5


@pytest.mark.parametrize(("kind", "s"), [(PackedRows, 16), (PaddedRows, 16), (PairRows, 16)])
def test_a_row_is_the_same_alone_in_a_batch_and_after_a_restart(folder, kind, s):
    lengths = [[1, 2, 50, 7], [33] * 100, [5]]
    store, _ = make_store(folder, lengths)
    indices = np.array([1_000_000, 3, 1_000_001, 17, 999_999, 3])
    together = fields(kind(store, VOCABULARY, s, 11).rows(indices))
    for place, index in enumerate(indices):
        alone = fields(kind(make_store(folder, lengths)[0], VOCABULARY, s, 11).rows(np.array([index])))
        for name, value in alone.items():
            np.testing.assert_array_equal(value[0], together[name][place], err_msg=name)
    # Different seeds and different epochs give other rows.
    other = fields(kind(store, VOCABULARY, s, 12).rows(indices))
    assert not np.array_equal(other["input_ids"], together["input_ids"])
    rows = kind(store, VOCABULARY, s, 11)
    assert not np.array_equal(epoch(rows, 0).input_ids, epoch(rows, 1).input_ids)
    assert rows.epoch_of(np.array([0, rows.rows_per_epoch - 1, rows.rows_per_epoch])).tolist() == [0, 0, 1]


def test_packed_rows_are_cut_elsewhere_in_each_epoch(folder):
    store, _ = make_store(folder, [[100] * 20])
    rows = PackedRows(store, VOCABULARY, 64, 0)
    turns = rows.rotation(np.arange(50))
    assert turns.min() >= 0 and turns.max() < rows.framed_tokens
    assert len(np.unique(turns % 64)) > 20 and turns.max() - turns.min() > rows.framed_tokens / 2


def test_padded_rows_over_many_blocks(folder):
    lengths = np.random.default_rng(0).integers(1, 20, 1000).tolist()
    store, documents = make_store(folder, [lengths])
    rows = PaddedRows(store, VOCABULARY, 9, 0)
    assert rows.rows_per_epoch == sum(-(-length // 7) for length in lengths)
    made = epoch(rows, 2).input_ids
    assert sorted(made[made >= 5]) == list(np.concatenate(documents))


def test_rows_too_short(folder):
    store, _ = make_store(folder, [[9, 9]])
    for kind, s in ((PackedRows, 2), (PaddedRows, 2), (PairRows, 4)):
        with pytest.raises(ValueError, match=f"sequence_length {s}.*set it to"):
            kind(store, VOCABULARY, s, 0)
