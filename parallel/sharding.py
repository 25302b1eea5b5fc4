"""How a local parameter lies in its logical tensor, and the initial values that follow from that.

A logical tensor has a name and a shape that do not depend on the layout.  A rank holds all of it, or one slice of one
dimension (after padding that dimension, for vocabularies), reshaped.  Initial values, checkpoints and conversion are
all written against logical tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .mesh import Axis


@dataclasses.dataclass(frozen=True)
class Logical:
    """Describes one parameter, attached to it as ``parameter.logical``.

    ``shape``: of the logical tensor, without padding.  ``dim``: the dimension split over the tensor group, or None.
    ``padded``: length of that dimension with padding (a multiple of the group), None if there is none.
    ``std``: standard deviation of normal initial values; None: filled with ``fill``.  ``means``: of normal ones,
    repeated along the last dimension (none: 0).  ``zero_row``: a row of zeros (the padding token's).  ``decay``:
    whether weight decay applies.  ``tied_to``: the logical name of the tensor that this one is a second copy of.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    padded: int | None = None
    std: float | None = None
    fill: float = 0.0
    means: tuple[float, ...] = ()
    zero_row: int | None = None
    decay: bool = True
    tied_to: str | None = None

    def slice(self, full: Tensor, axis: Axis, local_shape: Sequence[int]) -> Tensor:
        """This rank's part of a logical tensor, in the parameter's own shape."""
        if tuple(full.shape) != self.shape:
            raise ValueError(f"a tensor of shape {tuple(full.shape)} was given where {self.shape} is needed")
        if self.dim is None or (axis.size == 1 and self.padded in (None, self.shape[self.dim or 0])):
            return full.reshape(tuple(local_shape))
        start, stop = self.bounds(axis)
        return self.pad(full.narrow(self.dim, start, stop - start), axis).reshape(tuple(local_shape))

    def bounds(self, axis: Axis) -> tuple[int, int]:
        """Which entries of the split dimension a rank holds, [start, stop); padding is not counted."""
        assert self.dim is not None, "a tensor that is not split has no bounds"
        total, part = self.shape[self.dim], self.local_shape(axis)[self.dim]
        start = min(axis.rank * part, total)
        return start, min(start + part, total)

    def pad(self, local: Tensor, axis: Axis) -> Tensor:
        """A rank's real entries, with zeros in the place of padding."""
        assert self.dim is not None, "a tensor that is not split has no padding"
        missing = list(local.shape)
        missing[self.dim] = self.local_shape(axis)[self.dim] - local.shape[self.dim]
        return torch.cat((local, local.new_zeros(missing)), self.dim) if missing[self.dim] else local

    def local_shape(self, axis: Axis) -> tuple[int, ...]:
        """Shape of one rank's slice as cut from the logical tensor (before the parameter's own reshape)."""
        if self.dim is None:
            return self.shape
        shape = list(self.shape)
        shape[self.dim] = (self.padded or self.shape[self.dim]) // axis.size
        return tuple(shape)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """The logical tensor from the parameters of every tensor rank, in order; padding is cut away."""
        if self.dim is None:
            return parts[0].reshape(self.shape)
        axis = Axis(0, len(parts), None)
        shape = self.local_shape(axis)
        full = torch.cat([part.reshape(shape) for part in parts], self.dim)
        return full.narrow(self.dim, 0, self.shape[self.dim])


def describe(parameter: nn.Parameter, logical: Logical, *, split: bool) -> None:
    """Attach what a layer knows of its parameter; ``split``: each tensor rank has its own part of it."""
    parameter.logical = logical  # type: ignore[attr-defined]
    # DeepSpeed counts a parameter on every tensor rank in the gradient norm only if it says that it is split.
    parameter.tensor_model_parallel = split  # type: ignore[attr-defined]


def logical_of(parameter: nn.Parameter) -> Logical:
    logical = getattr(parameter, "logical", None)
    if logical is None:
        raise TypeError(f"a parameter of shape {tuple(parameter.shape)} was not made by farspan.parallel.layers")
    return logical


def initial_value(name: str, logical: Logical, seed: int) -> Tensor:
    """The whole logical tensor's initial value, float32 on the CPU: a pure function of (seed, name)."""
    if logical.std is None:
        return torch.full(logical.shape, logical.fill)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    value = torch.empty(logical.shape).normal_(0.0, logical.std, generator=generator)
    if logical.means:
        value += torch.tensor(logical.means).repeat(logical.shape[-1])[: logical.shape[-1]]
    if logical.zero_row is not None:
        value[logical.zero_row] = 0.0
    return value


def logical_name(name: str, parameter: nn.Parameter) -> str:
    """The logical name of a parameter found under ``name``: its own, or that of the tensor it is tied to."""
    return logical_of(parameter).tied_to or name


@torch.no_grad()
def initialize(module: nn.Module, seed: int, axis: Axis) -> None:
    """Fill every parameter with its slice of the keyed initial value; no communication."""
    for name, parameter in module.named_parameters():
        logical = logical_of(parameter)
        full = initial_value(logical_name(name, parameter), logical, seed)
        parameter.copy_(logical.slice(full, axis, parameter.shape))
