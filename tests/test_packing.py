"""The same documents packed into full rows, one a row with padding, and joined without it: the same loss and gradients;
and what a document gives does not depend on what lies beside it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from comparison import assert_all_close, assert_close
from models import Description, counts_of, fill
from torch import Tensor

from farspan.parallel.mesh import Mesh
from farspan.pretrain.batch import Batch, microbatches
from farspan.pretrain.losses import Counts, LossFunction
from farspan.pretrain.models import ARCHITECTURES
from farspan.pretrain.models.base import LanguageModel, Stage

LENGTH = 24
# Of the documents in each packed row; the fourth has padding.
LENGTHS = [[24], [1, 23], [10, 9, 5], [7, 8], [24], [13, 10, 1]]
# Where a block or a segment is more than a token, rows are longer by so much.
LONGER = {"mra": 9, "nystromformer": 2}
POSITIONS = {"max_position_embeddings": LENGTH + 2}
MANY_POSITIONS = {"max_position_embeddings": LENGTH * max(LONGER.values())}
BERT = {
    "plain": POSITIONS,
    "causal": POSITIONS | {"is_decoder": True, "tie_word_embeddings": False},
    "relative": POSITIONS | {"position_embedding_type": "relative_key_query"},
}
CAUSAL = {"is_decoder": True, "bidirectional": False, "tie_word_embeddings": False}
MEGA = {
    "plain": {},
    "chunked": {"use_chunking": True, "chunk_size": 4, "attention_activation": "laplace", "truncation": 3},
    "relu2, after": {"attention_activation": "relu2", "normalize_before_mega": False, "normalize_before_ffn": False},
    "causal": CAUSAL | {"attention_activation": "laplace", "relative_positional_bias": "simple"},
    "causal, chunked": CAUSAL | {"attention_activation": "relu2", "use_chunking": True, "chunk_size": 7},
    "causal, softmax, truncated": CAUSAL | {"use_chunking": True, "chunk_size": 8, "truncation": 5},
}
MRA = {
    "full": MANY_POSITIONS | {"block_per_row": 2},
    "sparse, priors": MANY_POSITIONS
    | {
        "block_per_row": 1,
        "approx_mode": "sparse",
        "initial_prior_first_n_blocks": 1,
        "initial_prior_diagonal_n_blocks": 2,
    },
}
NYSTROMFORMER = {
    "plain": MANY_POSITIONS | {"num_landmarks": 6, "conv_kernel_size": 5},
    "exact": MANY_POSITIONS | {"num_landmarks": 6, "segment_means_seq_len": 6, "conv_kernel_size": None},
}
CASES = {
    (model_type, name): Description(model_type, fields, dtype)
    for model_type, variants, dtype in (
        ("megatron-bert", BERT, torch.float32),
        ("roberta-prelayernorm", BERT, torch.float32),
        ("mega", MEGA, torch.float64),  # gradients of its small parameters are sums that cancel
        ("mra", MRA, torch.float32),
        ("nystromformer", NYSTROMFORMER, torch.float32),
    )
    for name, fields in variants.items()
}


def test_every_architecture_is_here() -> None:
    assert {model_type for model_type, _ in CASES} == set(ARCHITECTURES)


@dataclasses.dataclass(frozen=True)
class Document:
    """Tokens, and which of them are predicted as what (masked models)."""

    ids: Tensor
    predicted: Tensor
    labels: Tensor


def documents(described: Description) -> list[list[Document]]:
    generator, vocab_size, times = torch.Generator().manual_seed(4), described.config.vocab_size, longer(described)
    generator = torch.Generator().manual_seed(4)

    def document(length: int) -> Document:
        ids = torch.randint(3, vocab_size, (length,), generator=generator)
        # From none (single tokens) to nearly half: uneven on every row.
        predicted = torch.randperm(length, generator=generator)[: length * (length % 4) // 8].sort().values
        return Document(ids, predicted, torch.randint(3, vocab_size, (len(predicted),), generator=generator))

    return [[document(length * times) for length in row] for row in LENGTHS]


def longer(described: Description) -> int:
    return LONGER.get(described.model_type, 1)


def batch_of(rows: list[list[Document]], described: Description, attention) -> Batch:
    """Rows of documents end to end, padding after them."""
    config, s = described.config, LENGTH * longer(described)
    b, p = len(rows), max(sum(len(d.predicted) for d in row) for row in rows)
    zeros = torch.zeros(b, s, dtype=torch.int64)
    ids, numbers, positions = zeros + (config.pad_token_id or 0), zeros.clone(), zeros.clone()
    places, labels = torch.zeros(b, p, dtype=torch.int64), torch.zeros(b, p, dtype=torch.int64)
    weights = torch.zeros(b, p)
    causal_labels, causal_weights = zeros.clone(), torch.zeros(b, s)
    for r, row in enumerate(rows):
        start = used = 0
        for number, d in enumerate(row, 1):
            stop, more = start + len(d.ids), used + len(d.predicted)
            ids[r, start:stop], numbers[r, start:stop], positions[r, start:stop] = (
                d.ids,
                number,
                torch.arange(len(d.ids)),
            )
            places[r, used:more], labels[r, used:more], weights[r, used:more] = start + d.predicted, d.labels, 1
            causal_labels[r, start : stop - 1], causal_weights[r, start : stop - 1] = d.ids[1:], 1
            start, used = stop, more
    batch = Batch(ids, numbers, positions, zeros, torch.arange(b), attention, labels, weights, places)
    if config.is_decoder:
        batch = dataclasses.replace(batch, labels=causal_labels, label_weights=causal_weights, label_positions=None)
    return batch


def in_rows_of_one(rows: list[list[Document]]) -> list[list[Document]]:
    return [[document] for row in rows for document in row]


def model_of(described: Description) -> LanguageModel:
    config = described.config
    model = ARCHITECTURES[described.model_type](config, Mesh.solo(), stage=Stage.whole(config), heads=("lm",))
    fill(model, Mesh.solo().tensor)
    return model.to(described.dtype)


def loss_and_gradients(model: LanguageModel, parts: list[Batch], counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
    """Microbatch by microbatch, as a step of training does."""
    model.zero_grad()
    total = torch.zeros(())
    for part in parts:
        loss, _ = LossFunction(("lm",))(model(part), part, counts)
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("described", CASES.values(), ids=map(" ".join, CASES))
def test_packed_padded_and_joined_are_one(described):
    model, rows = model_of(described), documents(described)
    packed = batch_of(rows, described, "document")
    padded = batch_of(in_rows_of_one(rows), described, "padding")
    counts = counts_of(packed)
    assert (counts.predictions, counts.tokens) == (counts_of(padded).predictions, counts_of(padded).tokens)
    wanted = loss_and_gradients(model, [packed], counts)
    cases = {
        "packed, microbatches of 2": packed.split(len(LENGTHS) // 2),
        "padded": [padded],
        "padded, microbatches of 1": padded.split(padded.rows),
        "joined": microbatches(padded, 1, multiple=8, equal=False)[0],
        "joined, 6 microbatches of one length": microbatches(padded, 6, multiple=8, equal=True)[0],
        "packed, some rows repeated": microbatches(packed, 4, multiple=8, equal=True)[0],
        "packed, more microbatches than rows": microbatches(packed, 8, multiple=8, equal=False)[0],
        "joined, more microbatches than rows": microbatches(padded, padded.rows + 1, multiple=8, equal=True)[0],
    }
    for name, parts in cases.items():
        loss, gradients = loss_and_gradients(model, parts, counts)
        assert_close(loss, wanted[0], f"{name}: loss")
        # A key's bias has no gradient but for rounding: its row of q, k, v gives the scale.
        assert_all_close(gradients, wanted[1], f"{name}: gradient of")


@pytest.mark.parametrize("described", CASES.values(), ids=map(" ".join, CASES))
def test_neighbours_do_not_matter(described):
    model, rows = model_of(described), documents(described)
    batch = batch_of(rows, described, "document")
    row, number = 2, 2  # the document in the middle of three
    own = batch.document_ids[row] == number
    changed_ids = torch.where(own, batch.input_ids[row], batch.input_ids[row].flip(0))
    changed = dataclasses.replace(
        batch, input_ids=batch.input_ids.index_copy(0, torch.tensor([row]), changed_ids[None])
    )
    with torch.no_grad():
        before, after = (model(b, output="logits")["logits"][row] for b in (batch, changed))
    assert_close(after[own], before[own], "logits")
    assert (after[~own] - before[~own]).abs().max() > 0.1, "the neighbours themselves changed"
    real = (batch.document_ids > 0).long()
    mixed = dataclasses.replace(batch, document_ids=real, positions=(real.cumsum(1) - 1) * real)
    with torch.no_grad():
        assert (model(mixed, output="logits")["logits"][row][own] - before[own]).abs().max() > 1e-3
