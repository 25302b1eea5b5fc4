"""What is done to activations between the layers of a tensor group, and its transpose in the backward pass.

With sequence parallelism (arXiv 2205.05198, section 4.2.2) each tensor rank has a part of the sequence between the
tensor-parallel products.  Without it only ``copy_to_tensor_region`` does something; on one tensor rank nothing does.
"""

from __future__ import annotations

from megatron.core import tensor_parallel
from torch import Tensor

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
