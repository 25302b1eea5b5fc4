"""What is done to activations between the layers of a tensor group, and its transpose in the backward pass.

With sequence parallelism (arXiv 2205.05198, section 4.2.2) each tensor rank has a part of the sequence between the
tensor-parallel products.  On one tensor rank nothing does anything.

Some operations mix positions but not features (a moving average).  For those each rank takes its own features at all
positions: [s, b, h/tensor].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .megatron import tensor_parallel
from .mesh import Axis, Mesh


def sequence_part(length: int, mesh: Mesh) -> slice:
    """The positions whose hidden states this tensor rank has between products: all, without sequence parallelism."""
    if not mesh.sequence_parallel:
        return slice(0, length)
    if length % mesh.tensor.size:
        raise ValueError(
            f"rows of {length} tokens do not split over parallel.tensor {mesh.tensor.size}, as parallel.sequence "
            "needs: set data.sequence_length to a multiple"
        )
    part = length // mesh.tensor.size
    return slice(mesh.tensor.rank * part, (mesh.tensor.rank + 1) * part)


def on_sequence_part(parameter: Tensor, mesh: Mesh) -> Tensor:
    """A parameter that every tensor rank uses on its own part of the sequence: its gradient is the sum over them."""
    return copy_to_tensor_region(parameter, mesh.tensor) if mesh.sequence_parallel else parameter


def gather_sequence(x: Tensor, mesh: Mesh) -> Tensor:
    """[s/tensor, b, h] → [s, b, h] on every tensor rank, for what all of them go on to compute alike."""
    if not mesh.sequence_parallel:
        return x
    return tensor_parallel.gather_from_sequence_parallel_region(
        x, tensor_parallel_output_grad=False, group=mesh.tensor.group
    )


def scatter_sequence(x: Tensor, mesh: Mesh) -> Tensor:
    """[s, b, h], the same on every tensor rank → this rank's part [s/tensor, b, h]."""
    if not mesh.sequence_parallel:
        return x
    return tensor_parallel.scatter_to_sequence_parallel_region(x, group=mesh.tensor.group)


def copy_to_tensor_region(x: Tensor, axis: Axis) -> Tensor:
    """The identity, whose gradient is summed over the tensor group: for what each rank uses a part of."""
    if axis.size == 1:
        return x
    return tensor_parallel.copy_to_tensor_model_parallel_region(x, group=axis.group)


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the ranks of an axis, of which each goes on to use its own copy: the gradient is a sum as well."""
    if axis.size == 1:
        return x
    return copy_to_tensor_region(tensor_parallel.reduce_from_tensor_model_parallel_region(x.clone(), axis.group), axis)


def max_over(x: Tensor, axis: Axis) -> Tensor:
    """The maximum over the ranks of an axis, of which each goes on to use its own copy: the sum of their gradients goes
    to where it was found (in equal parts, where it was found twice)."""
    if axis.size == 1:
        return x
    return _MaxOver.apply(x, axis)  # type: ignore[no-any-return]


class _MaxOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        largest = x.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=axis.group)
        found = (x == largest).to(x.dtype)
        times = found.clone()
        dist.all_reduce(times, group=axis.group)
        ctx.axis, ctx.share = axis, found / times
        return largest

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.axis.group)
        return total * ctx.share, None


def gather_for_shares(x: Tensor, mesh: Mesh) -> Tensor:
    """What lies between products → all positions on every tensor rank, each of which uses it for its own part of the
    work: the gradients are summed.  What megatron-core's column-parallel product begins with."""
    if not mesh.sequence_parallel:
        return copy_to_tensor_region(x, mesh.tensor)
    return tensor_parallel.gather_from_sequence_parallel_region(
        x, tensor_parallel_output_grad=True, group=mesh.tensor.group
    )


def to_features(x: Tensor, mesh: Mesh) -> Tensor:
    """What lies between products (all features; under sequence parallelism a part of the positions) → this rank's
    features at all positions, [s, b, h/tensor]."""
    group = mesh.tensor.group
    if mesh.tensor.size == 1:
        return x
    if not mesh.sequence_parallel:
        return tensor_parallel.scatter_to_tensor_model_parallel_region(x, group=group)
    return tensor_parallel.all_to_all_sp2hp(x, group=group).view(-1, x.shape[1], x.shape[2] // mesh.tensor.size)


def from_features(x: Tensor, mesh: Mesh) -> Tensor:
    """The reverse: [s, b, h/tensor] → [s, b, h], under sequence parallelism [s/tensor, b, h]."""
    group = mesh.tensor.group
    if mesh.tensor.size == 1:
        return x
    if not mesh.sequence_parallel:
        return tensor_parallel.gather_from_tensor_model_parallel_region(x, group=group)
    return tensor_parallel.all_to_all_hp2sp(x, group=group).view(-1, x.shape[1], x.shape[2] * mesh.tensor.size)


def gather_features(x: Tensor, axis: Axis) -> Tensor:
    """[s, b, h/tensor] → [s, b, h] for products of which each rank computes a part: the gradients are summed."""
    if axis.size == 1:
        return x
    return tensor_parallel.all_gather_last_dim_from_tensor_parallel_region(x, group=axis.group)


def scatter_features(x: Tensor, axis: Axis) -> Tensor:
    """Each rank's share of a sum, [s, b, h] → this rank's features of the sum, [s, b, h/tensor]."""
    if axis.size == 1:
        return x
    return tensor_parallel.reduce_scatter_last_dim_to_tensor_parallel_region(x, group=axis.group)
