"""Attention in every form against each document computed alone, in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from attention_cases import (
    EXACT,
    ROWS,
    VARIANTS,
    assert_same,
    by_hand,
    flattened,
    make_case,
    outputs_and_gradients,
)
from comparison import assert_differs, difference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from farspan.kernels import documents as module
from farspan.kernels.attention import attention
from farspan.kernels.documents import Documents, Form

FORMS: tuple[Form, ...] = ("dense", "grouped")
ONE_A_ROW = {"padding": [[(1, n), (0, 9 - n)] for n in (9, 4, 1, 5)], "left": [[(0, 3), (1, 6)], [(1, 9)], [(0, 9)]]}


@pytest.fixture(params=[0.0, math.inf], ids=["a group a length", "one group"])
def launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups without padding, and as much padding as there can be."""
    monkeypatch.setitem(module.LAUNCH, "cpu", request.param)


@pytest.mark.usefixtures("launch")
@pytest.mark.parametrize("rows", ROWS)
def test_each_document_alone(rows: str) -> None:
    case = make_case(ROWS[rows])
    for variant in VARIANTS:
        expected = outputs_and_gradients(case, by_hand(case, *variant))
        for form in FORMS:
            y = attention(
                case.q, case.k, case.v, case.documents("document", variant[0], form), **case.options(*variant[1:])
            )
            assert y.shape == case.q.shape
            assert y.isfinite().all()
            assert_same(outputs_and_gradients(case, y), expected)


@pytest.mark.usefixtures("launch")
@pytest.mark.parametrize("rows", ONE_A_ROW)
def test_rows_of_one_document_and_padding(rows: str) -> None:
    case = make_case(ONE_A_ROW[rows])
    for variant in VARIANTS:
        expected = outputs_and_gradients(case, by_hand(case, *variant))
        for form in FORMS:
            y = attention(
                case.q, case.k, case.v, case.documents("padding", variant[0], form), **case.options(*variant[1:])
            )
            assert y.isfinite().all()
            assert_same(outputs_and_gradients(case, y), expected)


def test_padding_reads_the_ids_as_real_or_not() -> None:
    case = make_case([[(2, 3), (7, 4), (0, 2)], [(1, 9)]])
    expected = outputs_and_gradients(case, by_hand(case, False, True, 0, whole_rows=True))
    for form in FORMS:
        y = attention(case.q, case.k, case.v, case.documents("padding", False, form), **case.options(True, 0))
        assert_same(outputs_and_gradients(case, y), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_full_rows_read_no_ids(causal: bool) -> None:
    case = make_case([[(1, 9)], [(1, 9)]])
    other = dataclasses.replace(case, document_ids=torch.randint(0, 3, (2, 9)))
    for dropping, distances in itertools.product((False, True), (0, 2)):
        expected = outputs_and_gradients(case, by_hand(case, causal, dropping, distances))
        documents = other.documents("full", causal, None)
        assert documents.form(case.q, explicit=dropping) == "dense"
        y = attention(case.q, case.k, case.v, documents, **case.options(dropping, distances))
        assert_same(outputs_and_gradients(case, y), expected)


@pytest.mark.usefixtures("launch")
@pytest.mark.parametrize("rows", [name for name in ROWS if name != "one token"])
def test_rows_joined_to_one_keep_their_masks(rows: str) -> None:
    case = make_case(ROWS[rows])
    one, tokens = flattened(case)
    for causal, dropping, distances in VARIANTS:
        documents = one.documents("document", causal, None)
        y = attention(one.q, one.k, one.v, documents, **one.options(dropping, distances))
        found = outputs_and_gradients(one, y)
        assert_same(found, outputs_and_gradients(one, by_hand(one, causal, dropping, distances)))
        before = outputs_and_gradients(case, by_hand(case, causal, dropping, distances))
        for name in ("q", "k", "v"):
            assert difference(found[name].squeeze(1), before[name].flatten(0, 1)[tokens], scale=1.0) < EXACT


@pytest.mark.parametrize("start", [1, 2])
def test_rows_that_start_at_another_index(start: int) -> None:
    """One document filling its row, joined from a row that began with padding; and several."""
    for rows in ([[(1, 9)]], [[(1, 9)], [(1, 9)]], [[(1, 5), (2, 4)]]):
        case = make_case(rows)
        case = dataclasses.replace(case, indices=case.indices + start)
        for form in (None, *FORMS):
            y = attention(case.q, case.k, case.v, case.documents("document", False, form), **case.options(True, 2))
            assert_same(outputs_and_gradients(case, y), outputs_and_gradients(case, by_hand(case, False, True, 2)))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.tuples(st.booleans(), st.integers(1, 5)), min_size=1, max_size=5), min_size=1, max_size=4
    ),
    variant=st.sampled_from(VARIANTS),
    launch=st.sampled_from([0.0, 1e4, 1e6]),
    seed=st.integers(0, 1000),
)
def test_any_rows(rows: list[Any], variant: tuple[bool, bool, int], launch: float, seed: int) -> None:
    s = max(sum(n for _, n in row) for row in rows)
    numbered = [[(number * real, n) for number, (real, n) in enumerate(row, 1)] for row in rows]
    filled = [[*row, (0, s - sum(n for _, n in row))] for row in numbered]
    case = make_case(filled, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.LAUNCH, "cpu", launch)
        patch.setattr("farspan.kernels.attention.CPU_WEIGHTS", 4 * seed)
        expected = (
            outputs_and_gradients(case, by_hand(case, *variant)) if any(r for row in rows for r, _ in row) else None
        )
        for form in FORMS if expected else ("dense",):
            y = attention(
                case.q, case.k, case.v, case.documents("document", variant[0], form), **case.options(*variant[1:])
            )
            assert y.isfinite().all()
            if expected:
                assert_same(outputs_and_gradients(case, y), expected)


def slow_varlen(q: Tensor, k: Tensor, v: Tensor, *bounds: Any, window_size: tuple[int, int]) -> Tensor:
    """torch's variable-length kernel, by its documentation."""
    assert bounds[0] is bounds[1] and bounds[0].dtype == torch.int32
    lengths = bounds[0].diff().tolist()
    assert sum(lengths) == len(q) and bounds[2:] == (max(lengths), max(lengths))
    parts = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True)
    causal = {(-1, 0): True, (-1, -1): False}[window_size]
    ys = [torch.nn.functional.scaled_dot_product_attention(*part, is_causal=causal) for part in parts]
    return torch.cat(ys, 1).transpose(0, 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_what_the_variable_length_kernel_is_given(rows: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself needs a GPU (tests/gpu): a stand-in shows that documents go in and come back."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", slow_varlen)
    case = make_case(ROWS[rows])
    for some in (case, flattened(case)[0]):
        y = attention(some.q, some.k, some.v, some.documents("document", causal, "varlen"))
        assert_same(outputs_and_gradients(some, y), outputs_and_gradients(some, by_hand(some, causal, False, 0)))


# What can go wrong unseen.


@pytest.mark.usefixtures("launch")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dropping", [False, True])
def test_a_document_does_not_see_its_neighbours(form: Form, dropping: bool) -> None:
    case = make_case([[(1, 5), (2, 4), (3, 3)], [(1, 12)]])
    inside = torch.zeros(12, 2, dtype=torch.bool)
    inside[5:9, 0] = True
    noise = torch.randn(case.q.shape, dtype=torch.float64) * ~inside[..., None, None]
    changed = dataclasses.replace(case, q=case.q + noise, k=case.k + noise, v=case.v + noise)
    results = []
    for some in (case, changed):
        y = attention(some.q, some.k, some.v, case.documents("document", False, form), **case.options(dropping, 0))
        results.append(y.detach()[inside])
    assert torch.equal(*results)
    results = []
    for some in (case, changed):  # were there no boundaries
        y = attention(some.q, some.k, some.v, case.documents("padding", False, "dense"), **case.options(dropping, 0))
        results.append(y.detach()[inside])
    assert_differs(*results, "neighbours in one document")


def test_no_gradient_comes_from_padding() -> None:
    """Whatever is asked of a padded query, real tokens do not hear of it in the grouped form."""
    case = make_case(ROWS["padding at the start and between"])
    y = attention(case.q, case.k, case.v, case.documents("document", False, "grouped"))
    padding = (case.document_ids == 0).t()
    assert not y[padding].any()
    gradients = torch.autograd.grad(y, (case.q, case.k, case.v), torch.randn_like(y) * padding[..., None, None])
    assert not any(g.any() for g in gradients)


def test_the_comparison_sees_a_key_of_another_index() -> None:
    case = make_case(ROWS["uneven documents"])
    one, _ = flattened(case)
    shifted = dataclasses.replace(one, indices=one.indices + 1)
    ys = [attention(c.q, c.k, c.v, c.documents("document", False, None), **c.options(True, 0)) for c in (one, shifted)]
    assert_differs(ys[1].detach(), ys[0].detach(), "masks of other keys")


@pytest.mark.parametrize("causal", [False, True])
def test_every_query_sees_a_key(causal: bool) -> None:
    """Padding too: what a kernel makes of a query that sees none is its own affair, nan with some."""
    for kind, rows in [("document", rows) for rows in ROWS.values()] + [
        ("padding", rows) for rows in ONE_A_ROW.values()
    ]:
        case = make_case(rows)
        mask = case.documents(kind, causal, None).dense.mask
        assert mask is None or mask.expand(-1, 1, case.q.shape[0], -1).any(-1).all()


def test_no_tokens_at_all() -> None:
    case = make_case([[(0, 5)], [(0, 5)]])
    for kind, causal in itertools.product(("padding", "document"), (False, True)):
        y = attention(case.q, case.k, case.v, case.documents(kind, causal, None), **case.options(True, 2))
        assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types(dtype: torch.dtype) -> None:
    case = make_case(ROWS["uneven documents"]).to(dtype=dtype)
    exact = case.to(dtype=torch.float64)
    for variant, form in itertools.product(VARIANTS, FORMS):
        y = attention(
            case.q, case.k, case.v, case.documents("document", variant[0], form), **case.options(*variant[1:])
        )
        assert y.dtype == dtype
        expected = outputs_and_gradients(exact, by_hand(exact, *variant))
        assert_same(outputs_and_gradients(case, y), expected, 16 * torch.finfo(dtype).eps)


def test_the_same_again() -> None:
    case = make_case(ROWS["many rows"]).to(dtype=torch.float32)
    documents = case.documents("document", False, "grouped")
    found = []
    for _ in range(2):
        y = attention(case.q, case.k, case.v, documents, **case.options(True, 1))
        found.append(outputs_and_gradients(case, y))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# The choice of form.


def ids_of(lengths: list[int], s: int, b: int) -> Tensor:
    """Rows of documents of these lengths in turn."""
    row = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(itertools.islice(itertools.cycle(lengths), s))])[:s]
    return row.expand(b, s)


def chosen(ids: Tensor, kind: Any, **options: Any) -> Form:
    indices = options.pop("indices", torch.arange(ids.shape[1]).expand(ids.shape))
    return Documents.of(ids, indices, kind, causal=False, **options).form(torch.zeros(12, 64), explicit=False)


def test_the_form_follows_the_lengths() -> None:
    assert chosen(ids_of([20, 30], 512, 8), "document") == "grouped"
    assert chosen(ids_of([512], 512, 8), "document") == "dense"  # one document a row: no mask at all
    assert chosen(ids_of([512], 512, 8), "padding") == "dense"
    assert chosen(ids_of([20, 30], 512, 8), "full") == "dense"
    assert chosen(ids_of([508, 4], 512, 8), "document") == "dense"  # nothing to win
    assert chosen((torch.arange(512) < 60).long().expand(8, 512), "padding") == "grouped"
    assert chosen((torch.arange(512) < 508).long().expand(8, 512), "padding") == "dense"
    assert chosen(torch.zeros(2, 9, dtype=torch.int64), "padding") == "dense"
    assert chosen(ids_of([20, 30], 512, 8), "document", form="dense") == "dense"


def test_threads_share_the_work_but_not_the_launches() -> None:
    documents = Documents.of(ids_of([20, 30], 128, 8), torch.arange(128).expand(8, 128), "document", causal=False)
    alone = documents.costs(768)
    torch.set_num_threads(2)
    shared = Documents.of(documents.document_ids, torch.arange(128).expand(8, 128), "document", causal=False).costs(768)
    assert shared[0] - alone[0] == pytest.approx(module.LAUNCH["cpu"] / 768)
    assert shared[1] > alone[1]


def test_full_rows_need_no_mask() -> None:
    for kind in ("document", "padding"):
        ids = torch.ones(3, 8, dtype=torch.int64)
        assert Documents.of(ids, torch.arange(8).expand(3, 8), kind, causal=True).dense.mask is None


def test_groups_weigh_padding_against_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = torch.randint(1, 200, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)]).unsqueeze(0)
    found = []
    for launch in (0.0, 1e5, 1e6, 1e7, math.inf):
        monkeypatch.setitem(module.LAUNCH, "cpu", launch)
        documents = Documents.of(ids, torch.arange(ids.shape[1]).unsqueeze(0), "document", causal=False)
        slots, groups = documents.grouped(64)
        assert sum(group.n for group in groups) == 300
        assert all(a.l > b.l for a, b in itertools.pairwise(groups))
        assert len(slots.tokens) == sum(group.n * group.l for group in groups)
        found.append((len(groups), len(slots.tokens)))
    (most, least), *_, (one, padded) = found
    assert (most, least) == (len(set(lengths)), sum(lengths))
    assert (one, padded) == (1, 300 * max(lengths))
    assert all(a[0] > b[0] and a[1] < b[1] for a, b in itertools.pairwise(found))


def test_pieces_of_a_document() -> None:
    """A mask with holes, as a user may give to a loaded model: rows as they are, or an error."""
    case = make_case([[(1, 2), (0, 1), (1, 3)], [(1, 6)]])
    documents = case.documents("padding", False, None)
    assert documents.form(case.q, explicit=True) == "dense"
    y = attention(case.q, case.k, case.v, documents, **case.options(True, 2))
    assert_same(outputs_and_gradients(case, y), outputs_and_gradients(case, by_hand(case, False, True, 2)))
    restarting = torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(2, 6)
    jumping = torch.tensor([[0, 1, 2, 3, 5, 6]]).expand(2, 6)
    for ids, indices in ((case.document_ids, restarting), (torch.ones(2, 6, dtype=torch.int64), jumping)):
        with pytest.raises(
            ValueError, match="a document lies in pieces in a row whose indices restart: give every doc"
        ):
            Documents.of(ids, indices, "document", causal=False)
