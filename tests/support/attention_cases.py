"""Rows of documents, and attention over them one query at a time: what every form is compared with."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch
from comparison import difference
from torch import Tensor

from farspan.kernels.attention import Weights
from farspan.kernels.documents import Documents, Form
from farspan.kernels.dropout import DropoutKey, keep_mask, stream

EXACT = 1e-12
HEADS, LONGEST, P = 3, 32, 0.3
# Rows as lists of (document, tokens); 0 is padding.
ROWS: dict[str, list[list[tuple[int, int]]]] = {
    "uneven documents": [[(1, 5), (2, 1), (3, 6)], [(1, 12)], [(1, 1), (2, 1), (3, 10)], [(4, 7), (9, 5)]],
    "padding at the end": [[(1, 5), (2, 3), (0, 4)], [(1, 12)], [(1, 1), (0, 11)]],
    "padding at the start and between": [[(0, 2), (1, 5), (0, 3), (2, 2)], [(0, 7), (1, 5)], [(0, 1), (3, 11)]],
    "a row of padding": [[(0, 12)], [(1, 3), (2, 8), (0, 1)]],
    "single tokens": [[(i, 1) for i in range(1, 8)], [(1, 7)]],
    "full rows": [[(1, 9)], [(1, 9)]],
    "one token": [[(1, 1)]],
    "many rows": [[(1, 1 + i % 5), (2, 2 + i % 3), (0, 8 - i % 5 - i % 3)] for i in range(9)],
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of documents with everything that attention reads."""

    document_ids: Tensor  # [b, s]
    indices: Tensor  # [b, s]
    q: Tensor  # [s, b, h, d], as k
    k: Tensor
    v: Tensor  # [s, b, h, e]
    upstream: Tensor  # gradient of the result, zero for padding
    keys: Tensor  # [h, s, b]
    table: Tensor
    bias: Tensor

    def options(
        self, dropping: bool, distances: int, *, biased: bool = False, weights: Weights = "softmax"
    ) -> dict[str, Any]:
        """``distances``: 0 none, 1 met by the query, 2 by the key too."""
        options: dict[str, Any] = {"p": P, "keys": self.keys} if dropping else {}
        options |= {"distances": self.table, "distance_keys": distances == 2} if distances else {}
        return options | ({"bias": self.bias} if biased else {}) | {"weights": weights}

    def documents(self, kind: Any, causal: bool, form: Form | None) -> Documents:
        return Documents.of(self.document_ids, self.indices, kind, causal=causal, form=form)

    def to(self, **where: Any) -> Case:
        """On another device, or the same numbers in another type."""
        values = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value.is_floating_point():
                value = value.detach().to(**where).requires_grad_(value.requires_grad)
            elif "device" in where:
                value = value.to(where["device"])
            values[field.name] = value
        return Case(**values)


def make_case(rows: list[list[tuple[int, int]]], *, size: int = 4, values: int | None = None, seed: int = 0) -> Case:
    """float64; ``size``: features of a head; ``values``: of its values, if they are others."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[document for document, n in row for _ in range(n)] for row in rows])
    b, s = ids.shape
    qkv = torch.randn(s, b, 3, HEADS, size, dtype=torch.float64, generator=generator)
    upstream = torch.randn(s, b, HEADS, size, dtype=torch.float64, generator=generator)
    index = torch.arange(s).unsqueeze(1)
    positions = torch.arange(HEADS).view(-1, 1, 1) * (1 << 32) + index
    keys = DropoutKey(5, 2, torch.arange(40, 40 + b)).rows(stream(1, 2), positions)
    table = torch.randn(2 * LONGEST - 1, size, dtype=torch.float64, generator=generator)
    bias = torch.randn(2 * LONGEST - 1, dtype=torch.float64, generator=generator)
    q, k, v = (x.requires_grad_() for x in qkv.unbind(2))  # views of one product
    if values is not None:
        v, upstream = torch.randn(2, s, b, HEADS, values, dtype=torch.float64, generator=generator)
        v.requires_grad_()
    real = (ids > 0).t()[..., None, None]
    index = index.t().expand(b, s)
    return Case(ids, index, q, k, v, upstream * real, keys, table.requires_grad_(), bias.requires_grad_())


def flattened(case: Case) -> tuple[Case, Tensor]:
    """The same documents in one row, padding left out; and the token of each, as position · b + row."""
    b = len(case.document_ids)
    row, position = (case.document_ids > 0).nonzero().unbind(1)
    tokens = position * b + row
    one_row = lambda x: x.flatten(0, 1)[tokens].unsqueeze(1)  # noqa: E731
    numbers = (case.document_ids + 100 * torch.arange(b).unsqueeze(1))[row, position]
    q, k, v = (one_row(x.detach()).requires_grad_() for x in (case.q, case.k, case.v))
    keys = case.keys.flatten(1)[:, tokens].unsqueeze(2)
    index = case.indices[row, position].unsqueeze(0)
    one = Case(numbers.unsqueeze(0), index, q, k, v, one_row(case.upstream), keys, case.table, case.bias)
    return one, tokens


def by_hand(
    case: Case,
    causal: bool,
    dropping: bool,
    distances: int,
    *,
    whole_rows: bool = False,
    biased: bool = False,
    weights: Weights = "softmax",
    chunk: int | None = None,
) -> Tensor:
    """Every query of every document by itself; zeros for padding.

    ``whole_rows``: the ids only say what is real; places, which chunks and divisors go by, are those in the row.
    """
    b, s = case.document_ids.shape
    result = torch.zeros_like(case.v)
    for row, i in itertools.product(range(b), range(s)):
        ids = case.document_ids[row].tolist()
        if whole_rows:
            ids = [int(number > 0) for number in ids]
        if not ids[i]:
            continue
        start = 0 if whole_rows else ids.index(ids[i])
        start, end = (start, s) if chunk is None else (i - (i - start) % chunk, i - (i - start) % chunk + chunk)
        seen = [j for j in range(start, min(end, s)) if ids[j] == ids[i] and (j <= i or not causal)]
        result[i, row] = one_query(
            case, row, i, seen, distances=distances, dropping=dropping, biased=biased, weights=weights,
            divisor=i - start + 1 if causal else len(seen),
        )  # fmt: skip
    return result


def one_query(
    case: Case,
    row: int,
    i: int,
    seen: list[int],
    *,
    dropping: bool,
    divisor: int,
    distances: int = 0,
    biased: bool = False,
    weights: Weights = "softmax",
) -> Tensor:
    """What query i of a row gets from the keys that it sees, [h, e]; ``divisor``: of the scores but for softmax."""
    index = case.indices[row, seen]
    away = index - case.indices[row, i]
    q_hd, k_nhd, v_nhe = case.q[i, row], case.k[seen, row], case.v[seen, row]
    scores = torch.einsum("hd,nhd->nh", q_hd, k_nhd)
    if distances:
        e_nd = case.table[LONGEST - 1 - away]
        scores = scores + e_nd @ q_hd.t()
        if distances == 2:
            scores = scores + (e_nd.unsqueeze(1) * k_nhd).sum(2)
    scores = scores / (math.sqrt(case.q.shape[-1]) if weights == "softmax" else divisor)
    if biased:
        scores = scores + case.bias[LONGEST - 1 + away].unsqueeze(1)
    shares = {
        "softmax": lambda x: x.softmax(0),
        "relu2": lambda x: x.clamp(min=0) ** 2,
        # The cumulative normal distribution of this mean and deviation (arXiv 2209.10655, section 3.3).
        "laplace": lambda x: torch.special.ndtr((x - 0.707107) / 0.282095),
    }[weights](scores)
    if dropping:
        keep = keep_mask(case.keys[:, i, row], int(index.max()) + 1, P)[:, index].double()
        shares = shares * keep.t() / (1 - round(P * 65536) / 65536)
    return (shares.unsqueeze(2) * v_nhe).sum(0)


def outputs_and_gradients(case: Case, y: Tensor) -> dict[str, Tensor]:
    real = (case.document_ids > 0).t()
    inputs = {"q": case.q, "k": case.k, "v": case.v, "distances": case.table, "bias": case.bias}
    gradients = torch.autograd.grad(y, list(inputs.values()), case.upstream, allow_unused=True)
    found = {name: g for name, g in zip(inputs, gradients, strict=True) if g is not None}
    return {"output": y.detach()[real], **found}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], allowed: float = EXACT) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        # Where the truth is zero (a document of one token has weight 1, whatever its q), rounding is all there is.
        off = difference(found[name], value, scale=max(1.0, value.abs().max().item()))
        assert off < allowed, f"{name}: {off:.1e}"


VARIANTS = [
    (causal, dropping, distances) for causal in (False, True) for dropping in (False, True) for distances in (0, 2)
]
VARIANTS += [(False, False, 1), (True, True, 1)]
