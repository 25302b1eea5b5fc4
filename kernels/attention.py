"""Attention within documents, in the form that suits their lengths (see ``documents``)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .documents import Documents, Group
from .dropout import dropout

# Weights (n · h · l · l) that a CPU computes at once: larger tensors leave the cache, and each takes fresh pages from
# the system (measured: 25 million at once take up to 1.8 times the time).
CPU_WEIGHTS = 1 << 22


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
) -> Tensor:
    """softmax(q kᵀ / √d) v within each document (arXiv 1706.03762, equation 1).

    q, k, v: [s, b, h, d] → [s, b, h, d].  Padding gets finite values, and zeros unless the form is dense.
    p, keys: dropout of the weights; keys [h, s, b] int64 are one a query (``DropoutKey.rows``), the features are the
    indices of the tokens that the weights are for.
    distances: [2 · longest - 1, d], adds q · E[i - j + longest - 1] to the scores of query i and key j before they are
    scaled (arXiv 1803.02155, equation 5); distance_keys: and k · E[i - j + longest - 1] (arXiv 2009.13658, method 4).
    """
    shape, terms = q.shape, Terms(documents.causal, p, distances, distance_keys)
    keys = keys if p > 0 else None
    form = documents.form(q, explicit=keys is not None or distances is not None)
    if form == "dense":
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        keys = None if keys is None else keys.permute(2, 0, 1)
        return _attend(q, k, v, documents.dense, keys, terms).permute(2, 0, 1, 3)
    if form == "varlen":
        slots, bounds, longest = documents.packed
        q, k, v = (slots.gather(x.flatten(0, 1)) for x in (q, k, v))
        y = _varlen(q, k, v, bounds, longest, documents.causal)
    else:
        slots, groups = documents.grouped(q.shape[-2] * q.shape[-1])
        q, k, v = (slots.gather(x.flatten(0, 1)) for x in (q, k, v))
        keys = None if keys is None else keys.flatten(1).index_select(1, slots.tokens)
        y = _by_groups(q, k, v, groups, keys, terms)
    return slots.scatter(y).view(shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Terms:
    """What all groups have in common."""

    causal: bool
    p: float
    distances: Tensor | None
    distance_keys: bool


def _by_groups(q: Tensor, k: Tensor, v: Tensor, groups: list[Group], keys: Tensor | None, terms: Terms) -> Tensor:
    """q, k, v: [slots, h, d]; keys: [h, slots] → [slots, h, d]"""
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
    """q, k, v: [n, h, l, d]; keys: [n, h, l] → [n, h, l, d]"""
    if keys is None and terms.distances is None:
        causal = terms.causal and group.mask is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask, is_causal=causal)
    inputs = (q, k, v, group.mask, group.first, keys)
    together = max(1, CPU_WEIGHTS // (q.shape[1] * group.l**2)) if q.device.type == "cpu" else group.n
    if together >= group.n:
        return _explicit(terms, *inputs)
    parts: list[Any] = [itertools.repeat(None) if x is None else x.split(together) for x in inputs]
    return torch.cat([_explicit(terms, *part) for part in zip(*parts, strict=False)])


def _explicit(
    terms: Terms, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, first: Tensor | None, keys: Tensor | None
) -> Tensor:
    """With the weights in memory: what a fused kernel has no terms for."""
    scores = q @ k.transpose(-1, -2)
    if terms.distances is not None:
        scores += _distance_scores(q, k, terms.distances, with_keys=terms.distance_keys)
    scores /= math.sqrt(q.shape[-1])
    if terms.causal and mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    if keys is not None:
        weights = dropout(weights, terms.p, keys, None if first is None else first.view(-1, 1, 1))
    return weights @ v


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
