from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.pretrain.data.hashing import hash64, permute
from farspan.pretrain.data.rows import NextSentenceRows, PackedRows, PaddedRows, SentenceOrderRows
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


def pairs_of(made, s):
    """(A, B, label) of each row, once its frame is found to be right."""
    for ids, real, types, label in zip(
        made.input_ids, made.document_ids, made.token_type_ids, made.sentence_labels, strict=True
    ):
        body = ids[: real.sum()].tolist()
        cut = body.index(VOCABULARY.sep_id)
        a, b = body[1:cut], body[cut + 1 : -1]
        assert a and b and body == [*framed(a), *b, VOCABULARY.sep_id]
        assert types.tolist() == [0] * (cut + 1) + [1] * (len(b) + 1) + [0] * (s - len(body))
        assert label in (0, 1)
        yield a, b, label


def pieces_for_pairs(documents, s):
    """Every document cut to fit, without pieces that are too short to be cut in two."""
    room = s - 3
    pieces = [d[i : i + room].tolist() for d in documents for i in range(0, len(d), room)]
    return [piece for piece in pieces if len(piece) > 1]


@pytest.mark.parametrize("kind", [NextSentenceRows, SentenceOrderRows])
@QUICK
@given(lengths=CORPORA, s=st.integers(5, 50), seed=st.integers(0, 1000), number=st.integers(0, 5))
def test_pairs_are_the_pieces_of_documents_cut_in_two(folder, kind, lengths, s, seed, number):
    store, documents = make_store(folder, lengths)
    pieces = pieces_for_pairs(documents, s)
    needs_two = kind is NextSentenceRows and len(documents) < 2
    if needs_two or not pieces:
        with pytest.raises(ValueError, match="need two or more" if needs_two else "no document of two or more tokens"):
            kind(store, VOCABULARY, s, seed)
        return
    rows = kind(store, VOCABULARY, s, seed)
    assert rows.rows_per_epoch == len(pieces)
    owner = {int(token): index for index, document in enumerate(documents) for token in document}
    starting = {piece[0]: piece for piece in pieces}
    for a, b, label in pairs_of(epoch(rows, number), s):
        if label and kind is SentenceOrderRows:
            a, b = b, a
        piece = starting.pop(a[0])  # each is used once
        if label and kind is NextSentenceRows:
            assert a == piece[: len(a)] and len(a) < len(piece)
            assert b == list(range(b[0], b[0] + len(b)))
            others = {owner[token] for token in b}
            assert len(others) == 1 and owner[a[0]] not in others
            assert len(b) == min(len(piece) - len(a), len(documents[others.pop()]))
        else:
            assert a + b == piece
    assert not starting


@pytest.mark.parametrize("kind", [NextSentenceRows, SentenceOrderRows])
def test_pairs_are_even_and_change_with_the_epoch(folder, kind):
    store, _ = make_store(folder, [[30] * 800])
    rows = kind(store, VOCABULARY, 128, 5)
    epochs = [epoch(rows, number) for number in range(5)]
    labels = np.concatenate([made.sentence_labels for made in epochs])
    assert abs(labels.mean() - 0.5) < 0.03
    lengths = np.concatenate([(made.token_type_ids == 1).sum(axis=1) for made in epochs])
    assert lengths.std() > 5
    # The length of a segment, which any model sees, does not tell the label.
    for some in (lengths % 2 == 0, lengths % 2 == 1, lengths < 10, lengths > 20):
        assert abs(labels[some].mean() - 0.5) < 0.06


@pytest.mark.parametrize("kind", [PackedRows, PaddedRows, NextSentenceRows, SentenceOrderRows])
def test_a_row_is_the_same_alone_in_a_batch_and_after_a_restart(folder, kind):
    s = 16
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
    for kind, s in ((PackedRows, 2), (PaddedRows, 2), (NextSentenceRows, 4), (SentenceOrderRows, 4)):
        with pytest.raises(ValueError, match=f"sequence_length {s}.*set it to"):
            kind(store, VOCABULARY, s, 0)
