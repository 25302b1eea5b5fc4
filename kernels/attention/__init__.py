"""Attention within documents, in the form that suits their lengths (see ``documents``).

Shapes: s positions, b rows, h heads, d features of queries and keys, e of values; a group is n stretches of l tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..documents import Documents, Group
from ..dropout import dropout
from .fused import computes, fused

# Weights (n · h · l · l) that a CPU computes at once: larger tensors leave the cache, and each takes fresh pages from
# the system (measured: 25 million at once take up to 1.8 times the time).
CPU_WEIGHTS = 1 << 22

# How scores become weights: softmax, or each by itself.
Weights = Literal["softmax", "relu2", "laplace"]
# √½ and √(1 / 4π), with the digits that the released code and its models have.
LAPLACE_MEAN, LAPLACE_DEVIATION = 0.707107, 0.282095


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    *,
    p: float = 0.0,
    keys: Tensor | None = None,
    distances: Tensor | None = None,
    distance_keys: bool = False,
    bias: Tensor | None = None,
    weights: Weights = "softmax",
) -> Tensor:
    """softmax(q kᵀ / √d) v within each document (arXiv 1706.03762, equation 1).

    With dropout and nothing else that has the weights in memory, by CUDA kernels (see ``fused``) where they can.

    q, k: [s, b, h, d]; v: [s, b, h, e] → [s, b, h, e].  Padding gets finite values, and zeros unless the form is dense.
    p, keys: dropout of the weights; keys [h, s, b] int64 are one a query (``DropoutKey.rows``), the features are the
    indices of the tokens that the weights are for.
    distances: [2 · longest - 1, d], adds q · E[i - j + longest - 1] to the scores of query i and key j before they are
    scaled (arXiv 1803.02155, equation 5); distance_keys: and k · E[i - j + longest - 1] (arXiv 2009.13658, method 4).
    bias: [2 · longest - 1], adds bias[j - i + longest - 1] to the scaled scores.
    weights: "relu2" or "laplace" (arXiv 2209.10655, section 3.3) take q kᵀ / n + bias instead, n the keys that the
    query has: all real ones of its stretch or, in causal attention, those up to its own place.
    """
    terms = Terms(documents.causal, p, distances, distance_keys, bias, weights)
    keys = keys if p > 0 else None
    if keys is not None and not terms.explicit and documents.apart and computes(q, k, v):
        return fused(q, k, v, documents, p, keys)
    form = documents.form(q, explicit=keys is not None or terms.explicit)
    if form == "dense":
        keys = None if keys is None else documents.rows(keys.permute(1, 2, 0))
        q, k, v = (documents.rows(x) for x in (q, k, v))
        return documents.from_rows(_attend(q, k, v, documents.dense, keys, terms))
    if form == "varlen":
        slots, bounds, longest = documents.packed
        q, k, v = (slots.gather(x.flatten(0, 1)) for x in (q, k, v))
        y = _varlen(q, k, v, bounds, longest, documents.causal)
    else:
        slots, groups = documents.grouped(q.shape[-2] * q.shape[-1])
        q, k, v = (slots.gather(x.flatten(0, 1)) for x in (q, k, v))
        keys = None if keys is None else keys.flatten(1).index_select(1, slots.tokens)
        y = _by_groups(q, k, v, groups, keys, terms)
    return slots.scatter(y).view(*documents.shape, *y.shape[1:])


def attention_to(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    real: Tensor | None = None,
    causal: bool = False,
    offset: int = 0,
    p: float = 0.0,
    keys: Tensor | None = None,
    bias: Tensor | None = None,
    weights: Weights = "softmax",
) -> Tensor:
    """The same with keys of their own: a decoder's to an encoder, or of new tokens to those before and themselves.

    q: [s, b, h, d]; k: [t, b, h, d]; v: [t, b, h, e] → [s, b, h, e]; real: [b, t] bool, the keys that are no padding.
    offset: the place of the first query among the keys, what ``causal`` and ``bias`` go by.
    """
    terms = Terms(causal, p, None, False, bias, weights, offset)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    mask = None if real is None else (real | ~real.any(1, keepdim=True))[:, None, None, :]
    if causal and mask is not None:
        before = _before(q.shape[2], k.shape[2], offset, q.device)
        mask = (mask & before) | before.logical_and(~_before(q.shape[2], k.shape[2], offset - 1, q.device))
    keys = None if keys is None or p == 0 else keys.permute(2, 0, 1)
    return _explicit(terms, q, k, v, mask, None, keys).permute(2, 0, 1, 3)


@dataclasses.dataclass(frozen=True, eq=False)
class Terms:
    """What all groups have in common."""

    causal: bool
    p: float
    distances: Tensor | None
    distance_keys: bool
    bias: Tensor | None
    weights: Weights
    offset: int = 0

    @property
    def explicit(self) -> bool:
        """Whether something needs the weights in memory."""
        return self.distances is not None or self.bias is not None or self.weights != "softmax"


def _by_groups(q: Tensor, k: Tensor, v: Tensor, groups: list[Group], keys: Tensor | None, terms: Terms) -> Tensor:
    """q, k: [slots, h, d]; v: [slots, h, e]; keys: [h, slots] → [slots, h, e]"""
    sizes = [group.n * group.l for group in groups]
    parts = zip(groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    keys_of = [None] * len(groups) if keys is None else keys.split(sizes, 1)
    results = []
    for (group, *qkv), part_keys in zip(parts, keys_of, strict=True):
        shape = (group.n, group.l)
        q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in qkv)
        keys = None if part_keys is None else part_keys.unflatten(1, shape).transpose(0, 1)
        results.append(_attend(q, k, v, group, keys, terms).transpose(1, 2).flatten(0, 1))
    return torch.cat(results)


def _attend(q: Tensor, k: Tensor, v: Tensor, group: Group, keys: Tensor | None, terms: Terms) -> Tensor:
    """q, k: [n, h, l, d]; v: [n, h, l, e]; keys: [n, h, l] → [n, h, l, e]"""
    if keys is None and not terms.explicit:
        causal = terms.causal and group.mask is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask, is_causal=causal)
    inputs = (q, k, v, group.mask, group.first, keys, group.places)
    together = max(1, CPU_WEIGHTS // (q.shape[1] * group.l**2)) if q.device.type == "cpu" else group.n
    if together >= group.n:
        return _explicit(terms, *inputs)
    parts: list[Any] = [itertools.repeat(None) if x is None else x.split(together) for x in inputs]
    return torch.cat([_explicit(terms, *part) for part in zip(*parts, strict=False)])


def _explicit(
    terms: Terms,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    first: Tensor | None,
    keys: Tensor | None,
    places: Tensor | None = None,
) -> Tensor:
    """With the weights in memory: what a fused kernel has no terms for."""
    scores = q @ k.transpose(-1, -2)
    l, t = scores.shape[-2:]
    if terms.weights != "softmax":
        scores = scores / _key_counts(terms, mask, places, l, t, q.device)
    else:
        if terms.distances is not None:
            scores += _distance_scores(q, k, terms.distances, with_keys=terms.distance_keys)
        scores /= math.sqrt(q.shape[-1])
    if terms.bias is not None:
        scores = scores + _bias_scores(terms.bias, l, t, terms.offset)
    if terms.causal and mask is None:
        mask = _before(l, t, terms.offset, q.device)
    if mask is not None:
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = (
        scores.softmax(-1, dtype=wide) if terms.weights == "softmax" else _activate(scores.to(wide), terms.weights)
    )
    weights = weights.to(v.dtype)
    if keys is not None:
        weights = dropout(weights, terms.p, keys, 0 if first is None else first.view(-1, 1, 1))
    return weights @ v


def _before(l: int, t: int, offset: int, device: torch.device) -> Tensor:
    """[l, t] bool: the keys up to each query's own place."""
    return torch.ones(l, t, dtype=torch.bool, device=device).tril(offset)


def _key_counts(
    terms: Terms, mask: Tensor | None, places: Tensor | None, l: int, t: int, device: torch.device
) -> Tensor | int:
    """How many keys each query has, [..., l or 1, 1]."""
    if places is not None:
        return places
    if terms.causal:
        return torch.arange(terms.offset + 1, terms.offset + l + 1, device=device).unsqueeze(-1)
    return t if mask is None else mask.sum(-1, keepdim=True)


def _activate(scores: Tensor, weights: Weights) -> Tensor:
    """max(x, 0)², or ½(1 + erf((x − μ) / (σ√2))) (arXiv 2209.10655, section 3.3)."""
    if weights == "relu2":
        return scores.relu().square()
    return 0.5 * (1 + torch.erf((scores - LAPLACE_MEAN) / (LAPLACE_DEVIATION * math.sqrt(2))))


def _bias_scores(bias: Tensor, l: int, t: int, offset: int) -> Tensor:
    """[l, t]: bias[j - i] of query i (from ``offset`` on) and key j, counted from the middle of the table."""
    first = len(bias) // 2 - (l - 1 + offset)
    if first < 0 or len(bias) // 2 + t > len(bias):
        raise ValueError(f"a bias for {len(bias) // 2 + 1} positions was given for {max(l + offset, t)}")
    # Every diagonal has one value: windows of the table, the last query's first.
    return bias[first : first + l + t - 1].unfold(0, t, 1).flip(0)


def _distance_scores(q: Tensor, k: Tensor, table: Tensor, *, with_keys: bool) -> Tensor:
    """[n, h, l, l]: what the difference of their indices adds to the score of a query and a key."""
    index = torch.arange(q.shape[2], device=q.device)
    e_lrd = F.embedding(index.unsqueeze(1) - index + table.shape[0] // 2, table)
    scores = torch.einsum("nhld,lrd->nhlr", q, e_lrd)
    if with_keys:
        scores += torch.einsum("nhrd,lrd->nhlr", k, e_lrd)
    return scores


def _varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, causal: bool) -> Tensor:
    """q, k, v: [tokens, h, d], documents one after another → [tokens, h, d]"""
    from torch.nn.attention.varlen import varlen_attn

    window = (-1, 0 if causal else -1)  # how far a query sees to the left and to the right; -1: without end
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=window)  # type: ignore[return-value]
