"""Chunks of rows and of documents, each by itself in float64; rows as attention takes them."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from attention_cases import ROWS, Case, assert_same, by_hand, flattened, make_case, outputs_and_gradients
from comparison import assert_differs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from farspan.kernels.attention import attention
from farspan.kernels.documents import Documents

# Of 12 positions: one, what divides them, what does not, all, more.
SIZES = (1, 4, 5, 12, 20)
FULL = [[(1, 12)], [(1, 12)]]
PADDED = {
    "padding at the end": [[(1, n), (0, 12 - n)] for n in (12, 5, 1)],
    "padding at the start": [[(0, n), (1, 12 - n)] for n in (3, 6, 11)],
    "holes": [[(1, 1), (0, 2), (1, 3), (0, 5), (1, 1)], [(0, 1), (1, 9), (0, 1), (1, 1)]],
    "a row of padding": [[(0, 12)], [(1, 12)]],
}
# causal, dropping, distances, bias, weights
VARIANTS: list[tuple[bool, bool, int, dict[str, Any]]] = [
    (False, True, 2, {}),
    (True, False, 0, {}),
    (False, False, 0, {"biased": True, "weights": "relu2"}),
    (True, True, 0, {"biased": True, "weights": "laplace"}),
]


def places(document_ids: Tensor) -> Tensor:
    """[b, s] of every token in its document, where documents lie in one stretch."""
    b, s = document_ids.shape
    result = torch.zeros(b, s, dtype=torch.int64)
    for row, i in itertools.product(range(b), range(1, s)):
        result[row, i] = result[row, i - 1] + 1 if document_ids[row, i] == document_ids[row, i - 1] else 0
    return result


def compare(case: Case, kind: Any, size: int, positions: Tensor, **options: Any) -> None:
    for causal, dropping, distances, terms in VARIANTS:
        documents = case.documents(kind, causal, None).chunks(size, positions)
        y = attention(case.q, case.k, case.v, documents, **case.options(dropping, distances, **terms))
        assert y.shape == case.v.shape and y.isfinite().all()
        expected = by_hand(case, causal, dropping, distances, chunk=size, **terms, **options)
        assert_same(outputs_and_gradients(case, y), outputs_and_gradients(case, expected))


@pytest.mark.parametrize("size", SIZES)
def test_chunks_of_full_rows(size: int) -> None:
    case = make_case(FULL, values=6)
    compare(case, "full", size, case.indices)
    compare(case, "padding", size, case.indices, whole_rows=True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", PADDED)
def test_chunks_of_rows_with_padding(rows: str, size: int) -> None:
    """Counted from the start of the row; some chunks are all padding."""
    case = make_case(PADDED[rows], values=6)
    compare(case, "padding", size, case.indices, whole_rows=True)


@pytest.mark.parametrize("size", [1, 5, 20])
@pytest.mark.parametrize("rows", [name for name in ROWS if name != "one token"])
def test_chunks_of_packed_rows(rows: str, size: int) -> None:
    """Counted from the start of each document; what is dropped goes by the indices in the row."""
    case = make_case(ROWS[rows], values=6)
    compare(case, "document", size, places(case.document_ids))


@pytest.mark.parametrize("size", [4, 5])
def test_chunks_of_rows_joined_to_one(size: int) -> None:
    case, _ = flattened(make_case(ROWS["uneven documents"], values=6))
    compare(case, "document", size, places(case.document_ids))


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6)), min_size=1, max_size=4), st.integers(1, 9))
def test_chunks_of_any_packed_row(row: list[tuple[bool, int]], size: int) -> None:
    case = make_case([[(number * real, n) for number, (real, n) in enumerate(row, 1)]])
    if case.document_ids.any():
        compare(case, "document", size, places(case.document_ids))


def test_chunks_of_a_document_in_pieces_are_those_of_its_row() -> None:
    case = make_case([[(1, 3), (0, 1), (1, 5), (0, 1), (1, 2)], [(1, 12)]])
    for causal, dropping in itertools.product((False, True), repeat=2):
        documents = case.documents("document", causal, None).chunks(5, case.indices)
        y = attention(case.q, case.k, case.v, documents, **case.options(dropping, 0))
        expected = by_hand(case, causal, dropping, 0, chunk=5, whole_rows=True)
        assert_same(outputs_and_gradients(case, y), outputs_and_gradients(case, expected))


def test_chunks_of_nothing() -> None:
    case = make_case([[(0, 5)], [(0, 5)]])
    for kind, size in itertools.product(("padding", "document"), (2, 9)):
        for causal, dropping, distances, terms in VARIANTS:
            documents = case.documents(kind, causal, None).chunks(size, case.indices)
            y = attention(case.q, case.k, case.v, documents, **case.options(dropping, distances, **terms))
            assert y.isfinite().all()


@pytest.mark.parametrize("kind", ["full", "padding", "document"])
def test_chunks_do_not_see_one_another(kind: Any) -> None:
    case = make_case(FULL)
    outside = torch.ones(12, 1, 1, 1, dtype=torch.float64)
    outside[5:10] = 0
    changed = dataclasses.replace(case, q=case.q + outside, k=case.k + outside, v=case.v + outside)
    documents = case.documents(kind, False, None)
    for chunked in (documents.chunks(5, case.indices), documents):
        before, after = (attention(c.q, c.k, c.v, chunked).detach()[5:10] for c in (case, changed))
        if chunked is documents:
            assert_differs(after, before, "without chunks")
        else:
            assert torch.equal(after, before)


# Rows.


@pytest.mark.parametrize("size", [None, *SIZES])
def test_rows_and_back(size: int | None) -> None:
    s, b = 12, 3
    ids, indices = torch.ones(b, s, dtype=torch.int64), torch.arange(s).expand(b, s)
    documents = Documents.of(ids, indices, "full", causal=False)
    documents = documents if size is None else documents.chunks(size, indices)
    l = min(size or s, s)
    for shape in ((s, b, 2), (s, b, 2, 5)):
        x = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape).requires_grad_()
        rows = documents.rows(x)
        chunks = -(-s // l)
        assert rows.shape == (b * chunks, 2, l, *shape[3:])
        for row, number in itertools.product(range(b), range(chunks)):
            part = x[number * l : (number + 1) * l, row].transpose(0, 1)
            found = rows[row * chunks + number]
            assert torch.equal(found[:, : part.shape[1]], part) and not found[:, part.shape[1] :].any()
        back = documents.from_rows(rows)
        assert torch.equal(back, x)
        upstream = torch.randn(shape)
        assert torch.equal(torch.autograd.grad(back, x, upstream)[0], upstream)


# Documents by themselves.


@pytest.mark.parametrize("kind", ["document", "padding", "full"])
@pytest.mark.parametrize("multiple", [1, 4, 7])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_pieces_are_the_documents(kind: Any, multiple: int, data: st.DataObject) -> None:
    """Every document's tokens in order, filled up with zeros, those of one length together; and back."""
    b, s = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 20))
    numbers = data.draw(st.lists(st.integers(0, 3), min_size=b * s, max_size=b * s))
    ids = torch.tensor(numbers).view(b, s)  # in pieces, too
    if kind == "full":
        ids = torch.ones_like(ids)
    documents = Documents.of(ids, torch.arange(s).expand(b, s), kind, causal=False)
    x = torch.arange(1.0, s * b * 6 + 1).view(s, b, 2, 3).requires_grad_()
    pieces = documents.pieces(multiple)
    parts = pieces.split(x)
    assert [(part.shape[0], part.shape[2]) for part in parts] == pieces.sizes
    found = []
    for part, mask in zip(parts, pieces.masks, strict=True):
        for i in range(len(part)):
            real = torch.ones(part.shape[2], dtype=torch.bool) if mask is None else mask[i]
            assert not real.diff().any() or (int(real.long().diff().abs().sum()) == 1 and bool(real[0]))
            if pieces.slots is not None:
                assert part.shape[2] % multiple == 0 and part.shape[2] - int(real.sum()) < multiple
                assert not part[i][:, ~real].any()
            found.append(part[i][:, real].transpose(0, 1))
    whole = (ids > 0).long() if kind != "document" else ids
    expected = [x[whole[r] == n, r] for r in range(b) for n in whole[r].unique().tolist() if n > 0]
    key = lambda t: (len(t), t.flatten().tolist())  # noqa: E731
    if expected:
        for ours, theirs in zip(sorted(found, key=key), sorted(expected, key=key), strict=True):
            assert torch.equal(ours, theirs)
    else:
        assert not any(mask.any() for mask in pieces.masks if mask is not None)
    real = (ids.t() > 0)[..., None, None]
    back = pieces.join(parts)
    assert torch.equal(back * real, x * real)
    (gradient,) = torch.autograd.grad((back * real).sum(), x)
    assert torch.equal(gradient, real.expand_as(x).float())


def test_rows_with_padding_that_counts_stay_as_they_are() -> None:
    ids = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]])
    documents = Documents.of(ids, torch.arange(4).expand(2, 4), "padding", causal=False)
    x = torch.randn(4, 2, 1, 3)
    pieces = documents.pieces(2, keep_padding=True)
    (part,), (mask,) = pieces.split(x), pieces.masks
    assert torch.equal(part, x.permute(1, 2, 0, 3)) and torch.equal(mask, ids > 0)
    assert torch.equal(pieces.join([part]), x)
    assert len(documents.pieces(2).sizes) == 2  # without keep_padding: one document of 4 tokens, one of 2
