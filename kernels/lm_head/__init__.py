"""The language-model head: cross-entropy of a linear layer over the vocabulary, never with all logits at once.

The logits of n predictions over a vocabulary of 50,265 are by far the largest tensor of a step.  Here they exist a tile
at a time (``tiles``): one pass folds them into each row's loss, another turns them into gradients.

``lm_head_loss`` is the whole operation.  Where the vocabulary is split, each shard has ``shard_statistics``; whoever
knows the other shards combines them into those of the whole vocabulary, from which come ``losses_of`` and each shard's
``shard_gradients``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import gradients_op, loss_op, losses_of, statistics_op
from .pointwise import Statistics

__all__ = ["Statistics", "keeps", "lm_head_loss", "losses_of", "shard_gradients", "shard_statistics"]


def lm_head_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    size: int | None = None,
    count_correct: bool = True,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of x Wᵀ + b in nats, and 1 where the label has the largest logit, the first of equals (else, and
    without ``count_correct``, 0).

    x: [n, h]; weight: [v, h]; bias: [v] of the same dtype; labels: [n] int64 in [0, size); rows of the weight from
    ``size`` on (v by default) are padding and take no part.  Returns two [n] tensors, float32 at least; the first is
    differentiable in x, weight and bias.  ValueError: shapes that do not fit, and on a CPU labels outside.
    """
    size = weight.shape[0] if size is None else size
    _check(x, weight, bias, labels)
    losses, best, *_ = loss_op(x, weight, bias, labels, size, keeps(x, weight, bias))
    correct = (best == labels).to(losses.dtype) if count_correct else torch.zeros_like(losses)
    return losses, correct


def keeps(*tensors: Tensor | None) -> bool:
    """Whether there will be a backward pass that may want the logits."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def shard_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, first: int, size: int, keep: bool
) -> tuple[Statistics, Tensor]:
    """Statistics of every row over a shard: rows 0, 1, ... of ``weight`` are entries ``first``, first + 1, ... of a
    vocabulary of ``size``; rows beyond that are padding.  Labels are of the whole vocabulary.

    Second, an opaque tensor for ``shard_gradients``: the logits, with ``keep`` and where they are few.
    Not differentiable by itself.
    """
    _check(x, weight, bias, labels)
    *found, kept = statistics_op(x, weight, bias, labels, first, size, keep)
    return Statistics(*found), kept


def shard_gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    first: int,
    size: int,
    maximum: Tensor,
    total: Tensor,
    upstream: Tensor,
    kept: Tensor,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """This shard's gradients of x, weight and bias, each where it is ``needed``; x's is to be summed over the shards.

    ``maximum``, ``total``: [n], of the whole vocabulary; ``upstream``: [n], the gradients of the losses.
    """
    gradients = gradients_op(x, weight, bias, labels, first, size, maximum, total, upstream, kept, *needed)
    of_x, of_weight, of_bias = (g if need else None for g, need in zip(gradients, needed, strict=True))
    return of_x, of_weight, of_bias


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or labels.shape != x.shape[:1]:
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and labels {tuple(labels.shape)} must be "
            "[rows, features], [entries, features] and [rows]"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}, must be torch.int64")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"the bias {tuple(bias.shape)} must have a number for each of {weight.shape[0]} entries")
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(
            f"x, weight and bias must have one dtype, not {x.dtype}, {weight.dtype}"
            + (f", {bias.dtype}" if bias is not None else "")
        )
