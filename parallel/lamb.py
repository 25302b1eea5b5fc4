"""LAMB (arXiv 1904.00962, algorithm 2), with the trust ratio of the logical tensor in every layout.

The trust ratio of a parameter is a ratio of norms over all its values.  The tensor group may share these, and under
ZeRO the data group: DeepSpeed then updates slices of flattened groups of parameters, and a parameter may lie across
ranks.  So squares are added up over the ranks; ``Contents`` says which values of a tensor are of which parameter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .mesh import Axis
from .norms import sums_of_squares


@dataclasses.dataclass(frozen=True)
class Segment:
    """Values [start, stop) of a flattened tensor are of one parameter, by its number in ``Contents``: those of its own
    values that ``begin`` is the first of."""

    start: int
    stop: int
    parameter: int
    begin: int = 0


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a tensor that the optimizer updates is made of.

    ``parameters``: how many have values in it, here or on another rank; all ranks number them alike.  ``segments``: the
    values on this rank, at most one segment of each parameter; what no segment covers is padding.
    """

    parameters: int
    segments: tuple[Segment, ...]

    @staticmethod
    def whole(size: int) -> Contents:
        """One parameter, or one tensor rank's part of it, of ``size`` values."""
        return Contents(1, (Segment(0, size, 0),))

    @staticmethod
    def of_slice(start: int, stop: int, offsets: Sequence[int], sizes: Sequence[int]) -> Contents:
        """Values [start, stop) of parameters in one flat buffer, at ``offsets`` in it (ZeRO 1 and 2)."""
        segments = []
        for number, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            begin, end = max(offset, start), min(offset + size, stop)
            if begin < end:
                segments.append(Segment(begin - start, end - start, number, begin - offset))
        return Contents(len(sizes), tuple(segments))

    @staticmethod
    def of_shards(axis: Axis, sizes: Sequence[int]) -> Contents:
        """This rank's shard of every parameter, end to end (ZeRO 3): all shards of a parameter are equally long, the
        last ones padded."""
        segments, begin = [], 0
        for number, size in enumerate(sizes):
            shard = -(-size // axis.size)
            held = min(size - axis.rank * shard, shard)
            if held > 0:
                segments.append(Segment(begin, begin + held, number, axis.rank * shard))
            begin += shard
        return Contents(len(sizes), tuple(segments))


class Lamb(torch.optim.Optimizer):
    """Adam's update with bias correction and decoupled weight decay, scaled for each parameter by its trust ratio
    ‖weights‖ / ‖update‖ (1 where either is 0).

    Args:
        groups: of float32 tensors.  ``weight_decay`` (default 0) and ``decayed`` (default True): False for biases and
            norms, whose trust ratio is 1, as in the authors' recipe for BERT.
        lr: learning rate.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.

    Until ``describe`` is called every tensor is taken for one whole parameter of a single process.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "decayed": True})
        self._contents: dict[Tensor, Contents] | None = None
        self._axes: tuple[Axis, ...] = ()

    def describe(self, contents: Mapping[Tensor, Contents], *axes: Axis) -> None:
        """How the parameters lie over the ranks; from now on ``step`` is collective over ``axes``.

        ``contents``: of every updated tensor.  ``axes``: those over which parameters are split, the tensor axis and
        under ZeRO the data axis; a parameter that the ranks of one have copies of does no harm.
        """
        self._contents, self._axes = dict(contents), axes

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the tensors that have a gradient (on all ranks that share them, or on none)."""
        for group in self.param_groups:
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            if not tensors:
                continue
            updates = self._updates(group, tensors)
            if group["decayed"]:
                self._scale(updates, tensors)
            torch._foreach_add_(tensors, updates, alpha=-group["lr"])

    def _updates(self, group: dict[str, Any], tensors: list[Tensor]) -> list[Tensor]:
        """Of each tensor r + λ x, in the letters of the paper; the moments move on."""
        beta1, beta2 = group["betas"]
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        states = [self._advanced_state(tensor) for tensor in tensors]
        means, squares = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        steps = [state["step"].item() for state in states]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        # m / (1 - β₁ᵗ) / (√(v / (1 - β₂ᵗ)) + ε), in place of a single copy.
        updates = list(torch._foreach_sqrt(squares))
        torch._foreach_div_(updates, [math.sqrt(1 - beta2**t) for t in steps])
        torch._foreach_add_(updates, group["eps"])
        torch._foreach_mul_(updates, [1 - beta1**t for t in steps])
        torch._foreach_reciprocal_(updates)
        torch._foreach_mul_(updates, means)
        if group["weight_decay"]:
            torch._foreach_add_(updates, tensors, alpha=group["weight_decay"])
        return updates

    def _advanced_state(self, tensor: Tensor) -> dict[str, Any]:
        """A tensor's state, its step counted; keys as torch's AdamW has them."""
        state = self.state[tensor]
        if not state:
            moments = {key: torch.zeros_like(tensor) for key in ("exp_avg", "exp_avg_sq")}
            state.update(step=torch.zeros(()), **moments)
        state["step"] = state["step"].cpu() + 1  # restored state is on the tensor's device
        return state

    def _scale(self, updates: list[Tensor], tensors: list[Tensor]) -> None:
        """Multiply each parameter's update by its trust ratio."""
        parameters = 0  # of all tensors, those of the first one first
        held: list[int] = []  # numbers among them of those that this rank has values of
        weight_parts, update_parts = [], []
        for tensor, update in zip(tensors, updates, strict=True):
            contents = Contents.whole(tensor.numel()) if self._contents is None else self._contents[tensor]
            for segment in contents.segments:
                held.append(parameters + segment.parameter)
                weight_parts.append(tensor.view(-1)[segment.start : segment.stop])
                update_parts.append(update.view(-1)[segment.start : segment.stop])
            parameters += contents.parameters
        squares = torch.zeros(parameters, 2, dtype=torch.float64, device=tensors[0].device)  # of weights, of updates
        if held:
            squares[held] = torch.stack((sums_of_squares(weight_parts), sums_of_squares(update_parts)), dim=1)
        for axis in self._axes:
            axis.all_reduce(squares)
        # What several ranks hold copies of is counted as often in both norms.
        weights_sum, updates_sum = squares.unbind(dim=1)
        ratios = torch.where((weights_sum > 0) & (updates_sum > 0), (weights_sum / updates_sum).sqrt(), 1.0).tolist()
        if held:
            torch._foreach_mul_(update_parts, [ratios[number] for number in held])
