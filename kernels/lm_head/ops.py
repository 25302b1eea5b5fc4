"""The registered operations: opaque to torch.compile, and each with what it gives for tensors without numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import chunked
from .pointwise import Statistics
from .tiles import kept_numbers


def entries_here(weight: Tensor, first: int, size: int) -> int:
    """How many rows of a shard's weight are entries of the vocabulary; the others are padding."""
    return max(0, min(len(weight), size - first))


def _check_labels(labels: Tensor, size: int) -> None:
    """Where they can be looked at without waiting for a device."""
    if labels.device.type == "cpu" and len(labels):
        lowest, highest = (int(bound) for bound in labels.aminmax())
        if lowest < 0 or highest >= size:
            raise ValueError(f"labels are {lowest} to {highest}: must be from 0 to {size - 1}, the vocabulary")


@torch.library.custom_op("farspan::lm_head_statistics", mutates_args=())
def statistics_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, first: int, size: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """maximum, total, label_logit, best (``Statistics``) over a shard, and the logits kept for the backward pass."""
    found, kept = _statistics(x, weight, bias, labels, first, size, keep)
    return found.maximum, found.total, found.label_logit, found.best, kept


def _statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, first: int, size: int, keep: bool
) -> tuple[Statistics, Tensor]:
    _check_labels(labels, size)
    x, weight, bias, labels = x.contiguous(), weight.contiguous(), _contiguous(bias), labels.contiguous()
    return chunked.forward(x, weight, bias, labels, first, entries_here(weight, first, size), keep=keep)


@statistics_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, first: int, size: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, wide = x.shape[0], torch.promote_types(x.dtype, torch.float32)
    kept = kept_numbers(n, entries_here(weight, first, size), x.dtype, x.device) if keep else 0
    rows = [x.new_empty(n, dtype=dtype) for dtype in (wide, wide, wide, torch.int64)]
    return rows[0], rows[1], rows[2], rows[3], x.new_empty(kept)


@torch.library.custom_op("farspan::lm_head_gradients", mutates_args=())
def gradients_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, first: int, size: int, maximum: Tensor,
    total: Tensor, upstream: Tensor, kept: Tensor, need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight and bias over a shard; ``maximum``, ``total``: over the whole vocabulary.  [0] where none
    is needed."""
    statistics = Statistics(maximum.contiguous(), total.contiguous(), maximum, labels)
    return chunked.backward(
        x.contiguous(), weight.contiguous(), _contiguous(bias), labels.contiguous(), first,
        entries_here(weight, first, size), statistics, upstream.to(maximum.dtype).contiguous(), kept,
        (need_x, need_weight, need_bias),
    )  # fmt: skip


@gradients_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, first: int, size: int, maximum: Tensor,
    total: Tensor, upstream: Tensor, kept: Tensor, need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    none = x.new_empty(0)
    of_bias = none if bias is None or not need_bias else bias.new_empty(bias.shape)
    return (
        x.new_empty(x.shape) if need_x else none,
        weight.new_empty(weight.shape) if need_weight else x.new_empty(0),
        of_bias if need_bias else x.new_empty(0),
    )


@torch.library.custom_op("farspan::lm_head_loss", mutates_args=())
def loss_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, size: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, best guesses, and what the backward pass wants: maximum, total and kept logits.  One shard."""
    found, kept = _statistics(x, weight, bias, labels, 0, size, keep)
    losses = losses_of(found.maximum, found.total, found.label_logit)
    return losses, found.best, found.maximum, found.total, kept


def losses_of(maximum: Tensor, total: Tensor, label_logit: Tensor) -> Tensor:
    """-log softmax of the label, from statistics over the whole vocabulary."""
    return total.log() - (label_logit - maximum)


@loss_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, size: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    maximum, total, losses, best, kept = statistics_op(x, weight, bias, labels, 0, size, keep)
    return losses, best, maximum, total, kept


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, labels, size, _ = inputs
    _, best, maximum, total, kept = output
    ctx.size = size
    ctx.save_for_backward(x, weight, bias, labels, maximum, total, kept)
    ctx.mark_non_differentiable(best, maximum, total, kept)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, labels, maximum, total, kept = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    if upstream is None:
        return (None,) * 6
    gradients = gradients_op(x, weight, bias, labels, 0, ctx.size, maximum, total, upstream, kept, *needed)
    found = [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]
    return *found, None, None, None


loss_op.register_autograd(_backward, setup_context=_setup)


Shape = tuple[int, ...]


@register_flop_formula(torch.ops.farspan.lm_head_loss)
def _loss_flops(x: Shape, weight: Shape, bias: Shape | None, labels: Shape, size: int, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * min(weight[0], size)


@register_flop_formula(torch.ops.farspan.lm_head_statistics)
def _statistics_flops(
    x: Shape, weight: Shape, bias: Shape | None, labels: Shape, first: int, size: int, *_: Any, **__: Any
) -> int:
    return 2 * x[0] * x[1] * max(0, min(weight[0], size - first))


@register_flop_formula(torch.ops.farspan.lm_head_gradients)
def _gradients_flops(
    x: Shape, weight: Shape, bias: Shape | None, labels: Shape, first: int, size: int, maximum: Shape, total: Shape,
    upstream: Shape, kept: Shape, need_x: bool, need_weight: bool, need_bias: bool, **_: Any,
) -> int:  # fmt: skip
    products = need_x + need_weight + (kept[0] == 0)  # the last: of the logits again
    return products * _statistics_flops(x, weight, bias, labels, first, size)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
