"""Attention with a bias by distance, with weights other than softmax's, and to keys of its own: against every query
computed alone, in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from attention_cases import (
    EXACT,
    HEADS,
    LONGEST,
    ROWS,
    Case,
    P,
    assert_same,
    by_hand,
    make_case,
    one_query,
    outputs_and_gradients,
)
from comparison import assert_differs, difference
from torch import Tensor

from farspan.kernels import documents as module
from farspan.kernels.attention import Weights, attention, attention_to
from farspan.kernels.documents import Form

VALUES = 6  # features of a value; queries and keys have 4
KINDS: list[tuple[bool, Weights]] = [(True, "softmax"), (False, "relu2"), (True, "laplace")]
# causal, dropping, biased, weights
VARIANTS = [(*two, *kind) for two in itertools.product((False, True), repeat=2) for kind in KINDS]
PACKED = ["uneven documents", "padding at the start and between", "a row of padding", "single tokens"]
ONE_A_ROW = {
    "padding at the end": [[(1, n), (0, 9 - n)] for n in (9, 4, 1)],
    "padding at the start": [[(0, 3), (1, 6)], [(1, 9)], [(0, 8), (1, 1)], [(0, 9)]],
    "padding everywhere": [[(0, 1), (1, 3), (0, 2), (1, 2), (0, 1)], [(1, 9)]],
    "full rows": [[(1, 9)], [(1, 9)]],
}


def compare(case: Case, kind: Any, forms: list[Form], monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """In every form, with a group for each length and with one for all."""
    for causal, dropping, biased, weights in VARIANTS:
        terms: dict[str, Any] = {"biased": biased, "weights": weights}
        expected = outputs_and_gradients(case, by_hand(case, causal, dropping, 0, **terms, **options))
        assert ("bias" in expected) == biased
        for form, launch in itertools.product(forms, (0.0, math.inf)):
            if form == "dense" and launch:
                continue
            monkeypatch.setitem(module.LAUNCH, "cpu", launch)
            documents = case.documents(kind, causal, form)
            y = attention(case.q, case.k, case.v, documents, **case.options(dropping, 0, **terms))
            assert y.shape == case.v.shape and y.isfinite().all()
            assert_same(outputs_and_gradients(case, y), expected)


@pytest.mark.parametrize("rows", PACKED)
def test_documents_of_packed_rows(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A causal query divides by its place in its document, whichever form is chosen."""
    compare(make_case(ROWS[rows], values=VALUES), "document", ["dense", "grouped"], monkeypatch)


@pytest.mark.parametrize("rows", ONE_A_ROW)
def test_rows_with_padding(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A causal query divides by its place in its row, padding before it included."""
    forms: list[Form] = ["dense"] if rows == "padding everywhere" else ["dense", "grouped"]
    compare(make_case(ONE_A_ROW[rows], values=VALUES), "padding", forms, monkeypatch, whole_rows=True)


def test_full_rows_read_no_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    compare(make_case([[(1, 9)], [(1, 9)]], values=VALUES), "full", ["dense"], monkeypatch)


def test_values_of_another_size_in_fused_kernels() -> None:
    for rows in PACKED:
        case = make_case(ROWS[rows], values=VALUES)
        for causal, form in itertools.product((False, True), ("dense", "grouped")):
            y = attention(case.q, case.k, case.v, case.documents("document", causal, form))
            assert_same(outputs_and_gradients(case, y), outputs_and_gradients(case, by_hand(case, causal, False, 0)))


def test_a_cpu_takes_few_weights_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divisors, masks and keys are split with the rows."""
    monkeypatch.setattr("farspan.kernels.attention.CPU_WEIGHTS", 1)
    compare(make_case(ROWS["many rows"], values=VALUES), "document", ["dense", "grouped"], monkeypatch)


@pytest.mark.parametrize("weights", ["relu2", "laplace"])
def test_other_weights_see_no_neighbours(weights: Weights) -> None:
    """Weights that do not add up to one must be zero where a query does not see a key."""
    case = make_case([[(1, 5), (2, 4), (0, 3)], [(1, 12)]])
    outside = torch.ones(12, 2, 1, 1, dtype=torch.float64)
    outside[5:9, 0] = 0
    changed = dataclasses.replace(case, k=case.k + 5 * outside, v=case.v + 5 * outside)
    for form in ("dense", "grouped"):
        both = [
            attention(c.q, c.k, c.v, case.documents("document", False, form), weights=weights).detach()
            for c in (case, changed)
        ]
        assert torch.equal(*(y[5:9, 0] for y in both))
        assert_differs(both[1][:5, 0], both[0][:5, 0], "the documents that were changed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types(dtype: torch.dtype) -> None:
    case = make_case(ROWS["uneven documents"], values=VALUES).to(dtype=dtype)
    exact = case.to(dtype=torch.float64)
    for (biased, weights), form in itertools.product(KINDS, ("dense", "grouped")):
        terms: dict[str, Any] = {"biased": biased, "weights": weights}
        y = attention(case.q, case.k, case.v, case.documents("document", True, form), **case.options(True, 0, **terms))
        assert y.dtype == dtype
        expected = outputs_and_gradients(exact, by_hand(exact, True, True, 0, **terms))
        assert_same(outputs_and_gradients(case, y), expected, 16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("weights", ["relu2", "laplace"])
def test_bfloat16_weights_are_rounded_once(weights: Weights) -> None:
    """One key for each query, whose score is q and whose value is one."""
    q = torch.linspace(0, 2, 400).view(1, 400, 1, 1).bfloat16()
    y = attention_to(q, torch.ones_like(q), torch.ones_like(q), weights=weights)
    exact = {"relu2": q.double().clamp(min=0) ** 2, "laplace": torch.special.ndtr((q.double() - 0.707107) / 0.282095)}
    assert (y == exact[weights].bfloat16()).double().mean() > 0.95


def test_a_bias_for_the_longest_and_no_more() -> None:
    case = make_case([[(1, 9)], [(1, 5), (0, 4)]])
    middle = LONGEST - 1
    fitting, short = (case.bias[middle - n + 1 : middle + n] for n in (9, 8))
    documents = case.documents("padding", False, "dense")
    whole, trimmed = (attention(case.q, case.k, case.v, documents, bias=bias) for bias in (case.bias, fitting))
    assert torch.equal(whole, trimmed)
    with pytest.raises(ValueError, match="a bias for 8 positions was given for 9"):
        attention(case.q, case.k, case.v, documents, bias=short)
    query, message = case.q[:2], "a bias for 8 positions was given for 9"
    with pytest.raises(ValueError, match=message):
        attention_to(query, case.k, case.v, bias=short)
    with pytest.raises(ValueError, match=message):
        attention_to(query, case.k[:3], case.v[:3], offset=7, bias=short)
    attention_to(query, case.k[:8], case.v[:8], offset=6, bias=short)


# Keys of their own.


@pytest.mark.parametrize("rows", ONE_A_ROW)
@pytest.mark.parametrize(("offset", "length"), [(0, 9), (0, 4), (5, 4), (3, 1)])
def test_some_queries_of_a_row(rows: str, offset: int, length: int) -> None:
    """New tokens and those before them: what attention over all of them gives."""
    case = make_case(ONE_A_ROW[rows], values=VALUES)
    real = None if rows == "full rows" else case.document_ids > 0
    new = slice(offset, offset + length)
    part = dataclasses.replace(case, upstream=torch.zeros_like(case.upstream))
    part.upstream[new] = case.upstream[new]
    for causal, dropping, biased, weights in VARIANTS:
        whole = by_hand(case, causal, dropping, 0, whole_rows=True, biased=biased, weights=weights)
        expected = outputs_and_gradients(part, whole)
        options = case.options(dropping, 0, biased=biased, weights=weights)
        options |= {"keys": case.keys[:, new]} if dropping else {}
        # Keys after the last query are there, too, unless they are of tokens yet to come.
        last = new.stop if causal and length < 4 else 9
        y = attention_to(
            case.q[new], case.k[:last], case.v[:last], real=None if real is None else real[:, :last],
            causal=causal, offset=offset, **options,
        )  # fmt: skip
        assert y.shape == (length, *case.v.shape[1:]) and y.isfinite().all()
        row, position = (case.document_ids[:, new] > 0).nonzero().unbind(1)
        assert difference(y[position, row], whole[position + offset, row].detach(), scale=1.0) < EXACT
        inputs = [case.q, case.k, case.v, case.bias]
        found = torch.autograd.grad(y, inputs, part.upstream[new], allow_unused=True)
        for name, gradient in zip(("q", "k", "v", "bias"), found, strict=True):
            assert (gradient is None) == (name not in expected)
            if gradient is not None:
                assert difference(gradient, expected[name], scale=max(1.0, expected[name].abs().max().item())) < EXACT


@pytest.mark.parametrize(("queries", "sources"), [(4, 9), (9, 4)])
def test_to_an_encoder(queries: int, sources: int) -> None:
    """All queries see the real keys of their row, before and after their own place."""
    case = make_case([[(1, 9)]] * 4, values=VALUES)
    real = torch.ones(4, sources, dtype=torch.bool)
    real[1, :2], real[2, -1:], real[3] = False, False, False
    for dropping, (biased, weights) in itertools.product((False, True), KINDS):
        terms: dict[str, Any] = {"biased": biased, "weights": weights}
        options = case.options(dropping, 0, **terms) | ({"keys": case.keys[:, :queries]} if dropping else {})
        expected = torch.zeros(queries, 4, HEADS, VALUES, dtype=torch.float64)
        for i, row in itertools.product(range(queries), range(3)):
            seen = real[row].nonzero().flatten().tolist()
            expected[i, row] = one_query(case, row, i, seen, dropping=dropping, divisor=len(seen), **terms)
        y = attention_to(case.q[:queries], case.k[:sources], case.v[:sources], real=real, **options)
        assert y.isfinite().all()
        upstream = torch.zeros(queries, 4, HEADS, VALUES, dtype=torch.float64)
        upstream[:, :3] = case.upstream[:queries, :3]
        inputs = [case.q, case.k, case.v] + [case.bias] * biased
        found, truth = (torch.autograd.grad(x, inputs, upstream) for x in (y, expected))
        both: list[tuple[Tensor, Tensor]] = [(y[:, :3].detach(), expected[:, :3].detach())]
        for ours, theirs in both + list(zip(found, truth, strict=True)):
            assert difference(ours, theirs, scale=max(1.0, theirs.abs().max().item())) < EXACT


def test_dropout_of_keys_by_their_place() -> None:
    case = make_case([[(1, 9)], [(1, 9)]])
    options = {"p": P, "weights": "relu2", "offset": 5, "causal": True}
    y = attention_to(case.q[5:], case.k, case.v, keys=case.keys[:, 5:], **options)
    other = attention_to(case.q[5:], case.k, case.v, keys=case.keys[:, :4], **options)
    assert_differs(other.detach(), y.detach(), "masks of other queries")
    assert torch.equal(
        attention_to(case.q, case.k, case.v, p=0.0, keys=case.keys), attention_to(case.q, case.k, case.v)
    )
