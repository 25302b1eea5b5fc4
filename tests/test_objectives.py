from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from farspan.pretrain.data.store import TokenStore, write_dataset
from farspan.pretrain.data.tokenizer import Vocabulary
from farspan.pretrain.objectives import OBJECTIVES, make_objective

VOCABULARY = Vocabulary(
    200, pad_id=1, cls_id=0, sep_id=2, mask_id=4, unk_id=3, special_ids=(0, 1, 2, 3, 4, 150), unused_ids=(10, 11)
)
ORDINARY = set(range(200)) - {0, 1, 2, 3, 4, 150, 10, 11}
S = 64


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    random = np.random.default_rng(0)
    usable = np.array(sorted(ORDINARY | {3, 150}))  # unknown tokens and another special one occur in the text
    lengths = np.r_[1, 2, 3, random.integers(1, 200, 400)]
    folder = tmp_path_factory.mktemp("store")
    write_dataset(folder, {"train": [[random.choice(usable, n) for n in lengths]]}, 200)
    return TokenStore(folder)


def build(store, name="mlm", **options):
    return make_objective(name, store=store, vocabulary=VOCABULARY, sequence_length=S, **options)


def test_ordinary_ids_leave_out_specials_and_gaps():
    ids = VOCABULARY.ordinary_ids()
    assert ids.dtype == np.int64
    assert set(ids.tolist()) == ORDINARY


@pytest.mark.parametrize("mode", ["packed", "padded"])
@pytest.mark.parametrize("probability", [0.15, 0.4, 1.0])
def test_masked_positions(store, mode, probability):
    objective = build(store, row_mode=mode, probability=probability)
    indices = np.arange(500, 900)
    batch = objective.batch(indices)
    original = torch.from_numpy(objective.rows.rows(indices).input_ids)
    p = objective.predictions_per_row
    assert p == round(probability * S)
    assert batch.labels.shape == batch.label_weights.shape == batch.label_positions.shape == (400, p)
    used = batch.label_weights == 1
    assert set(batch.label_weights.unique().tolist()) <= {0.0, 1.0}
    for row in range(400):
        candidates = [i for i in range(S) if int(original[row, i]) in ORDINARY and batch.document_ids[row, i] > 0]
        expected = min(max(round(probability * len(candidates)), min(1, len(candidates))), p)
        chosen = batch.label_positions[row][used[row]].tolist()
        assert len(chosen) == expected == used[row].sum()
        assert chosen == sorted(set(chosen)) and set(chosen) <= set(candidates)
        assert used[row][:expected].all()
        assert (batch.label_positions[row][expected:] == 0).all()
        torch.testing.assert_close(batch.labels[row][used[row]], original[row, chosen])
        kept = [i for i in range(S) if i not in chosen]
        torch.testing.assert_close(batch.input_ids[row, kept], original[row, kept])


@pytest.mark.parametrize(("mask", "random"), [(0.8, 0.1), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_masked_input(store, mask, random):
    objective = build(store, mask_fraction=mask, random_fraction=random)
    batch = objective.batch(np.arange(3000))
    used = batch.label_weights == 1
    seen = torch.gather(batch.input_ids, 1, batch.label_positions)[used]
    labels = batch.labels[used]
    masked, same = seen == VOCABULARY.mask_id, seen == labels
    other = ~masked & ~same
    share_same = 1 - mask - random + random / len(ORDINARY)  # a random token may be the one that was there
    for got, expected in ((masked, mask), (same, share_same), (other, 1 - mask - share_same)):
        assert abs(got.float().mean().item() - expected) < 0.01
    drawn = seen[other]
    assert set(drawn.tolist()) <= ORDINARY
    if random:
        counts = torch.bincount(drawn, minlength=200)[sorted(ORDINARY)].float()
        chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum().item()
        assert chi_square < len(ORDINARY) + 6 * (2 * len(ORDINARY)) ** 0.5


def test_every_position_is_chosen_as_often(store):
    objective = build(store)
    indices = np.arange(4000)
    batch = objective.batch(indices)
    candidates = np.isin(objective.rows.rows(indices).input_ids, list(ORDINARY)).sum(axis=0)
    chosen = torch.bincount(batch.label_positions[batch.label_weights == 1], minlength=S).numpy()
    assert np.abs(chosen / candidates - 0.15).max() < 0.03


def test_rows_without_ordinary_tokens_have_no_predictions(tmp_path):
    write_dataset(tmp_path, {"train": [[[3], [3, 3], [7]]]}, 200)
    objective = build(TokenStore(tmp_path), row_mode="padded")
    batch = objective.batch(np.arange(3))
    assert sorted(batch.label_weights.sum(dim=1).tolist()) == [0, 0, 1]


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_causal_labels_are_the_next_token_of_the_document(store, mode):
    objective = build(store, "clm", row_mode=mode)
    assert objective.causal and objective.heads == ("lm",)
    batch = objective.batch(np.arange(50))
    assert batch.label_positions is None and batch.labels.shape == batch.input_ids.shape
    for row in range(50):
        for i in range(S):
            document = batch.document_ids[row, i]
            if i + 1 < S and document > 0 and batch.document_ids[row, i + 1] == document:
                assert batch.label_weights[row, i] == 1 and batch.labels[row, i] == batch.input_ids[row, i + 1]
            else:
                assert batch.label_weights[row, i] == 0 and 0 <= batch.labels[row, i] < 200


@pytest.mark.parametrize(("name", "mode"), [(n, m) for n, kind in OBJECTIVES.items() for m in kind.row_modes])
def test_a_sample_does_not_depend_on_its_batch(store, name, mode):
    objective = build(store, name, row_mode=mode, seed=3)
    indices = np.array([7, 123_456_789, 0, 31])
    together = objective.batch(indices)
    assert together.sample_ids.tolist() == indices.tolist()
    for place, index in enumerate(indices):
        alone = build(store, name, row_mode=mode, seed=3).batch(np.array([index]))
        for field in dataclasses.fields(alone):
            value = getattr(alone, field.name)
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value[0], getattr(together, field.name)[place], rtol=0, atol=0)
    assert together.attention == ("document" if mode == "packed" else "padding")
    tensors = [getattr(together, f.name) for f in dataclasses.fields(together)]
    assert all(
        t.dtype == torch.int64 for t in tensors if isinstance(t, torch.Tensor) and t is not together.label_weights
    )
    assert together.label_weights.dtype == torch.float32
    other = build(store, name, row_mode=mode, seed=4).batch(indices)
    assert not torch.equal(other.input_ids, together.input_ids)


def test_the_same_row_is_masked_differently_in_another_epoch(store):
    objective = build(store, row_mode="padded")
    per_epoch = objective.rows.rows_per_epoch
    epochs = [objective.batch(np.arange(per_epoch) + per_epoch * n) for n in range(2)]
    masks = [(e.input_ids == VOCABULARY.mask_id).sum(dim=0) for e in epochs]
    assert not torch.equal(*masks)


@pytest.mark.parametrize("name", ["mlm+nsp", "mlm+sop"])
def test_pairs_have_two_heads(store, name):
    objective = build(store, name)
    assert objective.heads == ("lm", "nsp") and not objective.causal
    batch = objective.batch(np.arange(200))
    assert batch.sentence_labels.shape == (200,) and set(batch.sentence_labels.tolist()) == {0, 1}
    assert build(store, name, row_mode="pairs").rows.rows_per_epoch == objective.rows.rows_per_epoch


def test_the_two_kinds_of_pairs_differ_in_the_rows_of_label_1_alone(store):
    following, ordered = (build(store, name, seed=5).rows.rows(np.arange(300)) for name in ("mlm+nsp", "mlm+sop"))
    np.testing.assert_array_equal(following.sentence_labels, ordered.sentence_labels)
    same = [np.array_equal(*ids) for ids in zip(following.input_ids, ordered.input_ids, strict=True)]
    np.testing.assert_array_equal(same, following.sentence_labels == 0)


def test_errors_are_one_clear_line(store):
    no_mask = dataclasses.replace(VOCABULARY, mask_id=None)
    cases = [
        ({"name": "electra"}, "choose one of mlm, clm, mlm\\+nsp, mlm\\+sop"),
        ({"name": "mlm", "row_mode": "pairs"}, "packed or padded"),
        ({"name": "mlm+nsp", "row_mode": "packed"}, "pairs"),
        ({"name": "mlm+sop", "row_mode": "padded"}, "'padded' rows: choose pairs"),
        ({"name": "mlm+nsp", "sequence_length": 4}, "set it to 5"),
        ({"name": "mlm", "vocabulary": no_mask}, "mask token"),
        ({"name": "mlm", "probability": 0.0}, "above 0"),
        ({"name": "mlm", "mask_fraction": 0.9, "random_fraction": 0.2}, "must not exceed 1"),
    ]
    for options, match in cases:
        arguments = {"store": store, "vocabulary": VOCABULARY, "sequence_length": S, **options}
        with pytest.raises(ValueError, match=match) as error:
            make_objective(arguments.pop("name"), **arguments)
        assert "\n" not in str(error.value)
    make_objective("clm", store=store, vocabulary=no_mask, sequence_length=S)
