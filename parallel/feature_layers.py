"""Layers between which every tensor rank has its own features at all positions, [s, b, features/tensor].

An operation that mixes positions and keeps features apart (a moving average) lies between ``to_features`` and
``from_features`` (``mappings``).  Products there take features that ``gather_features`` has brought together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import require_divisible
from .mappings import copy_to_tensor_region, scatter_features
from .mesh import Mesh
from .sharding import Logical, describe


class FeatureParameter(nn.Module):
    """A parameter of which each tensor rank has its own features, along ``dim``."""

    def __init__(
        self, mesh: Mesh, *shape: int, dim: int, std: float, means: tuple[float, ...] = (), decay: bool = False
    ) -> None:
        super().__init__()
        logical = Logical(shape, dim=dim, std=std, means=means, decay=decay)
        self.weight = nn.Parameter(torch.empty(logical.local_shape(mesh.tensor)))
        describe(self.weight, logical, split=True)

    def forward(self) -> Tensor:
        return self.weight


class SharedParameter(nn.Module):
    """A parameter that every tensor rank has, and uses for its own part of the work: its gradient is a sum."""

    def __init__(
        self, mesh: Mesh, *shape: int, std: float | None = None, fill: float = 0.0, decay: bool = False
    ) -> None:
        super().__init__()
        self.axis = mesh.tensor
        self.weight = nn.Parameter(torch.empty(shape))
        describe(self.weight, Logical(shape, std=std, fill=fill, decay=decay), split=False)

    def forward(self) -> Tensor:
        return copy_to_tensor_region(self.weight, self.axis)


class FeatureLinear(nn.Module):
    """y = x Wᵀ + b, each tensor rank its own output features: gathered x [s, b, in] → [s, b, out/tensor].

    The gradient of x is this rank's share of it (``gather_features`` sums the shares).
    """

    def __init__(self, mesh: Mesh, inputs: int, outputs: int, *, std: float) -> None:
        super().__init__()
        require_divisible("output features", outputs, mesh.tensor.size)
        self.weight = nn.Parameter(torch.empty(outputs // mesh.tensor.size, inputs))
        self.bias = nn.Parameter(torch.empty(outputs // mesh.tensor.size))
        describe(self.weight, Logical((outputs, inputs), dim=0, std=std), split=True)
        describe(self.bias, Logical((outputs,), dim=0, decay=False), split=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class SharedLinear(nn.Module):
    """y = x Wᵀ + b on every tensor rank, for its own part of what follows: gathered x [s, b, in] → [s, b, out].

    All gradients are this rank's share; those of W and b are summed.
    """

    def __init__(self, mesh: Mesh, inputs: int, outputs: int, *, std: float) -> None:
        super().__init__()
        self.axis = mesh.tensor
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        describe(self.weight, Logical((outputs, inputs), std=std), split=False)
        describe(self.bias, Logical((outputs,), decay=False), split=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, copy_to_tensor_region(self.weight, self.axis), copy_to_tensor_region(self.bias, self.axis))


class FeatureReduceLinear(nn.Module):
    """y = x Wᵀ + b, input and output features split over the tensor group: [s, b, in/tensor] → [s, b, out/tensor]."""

    def __init__(self, mesh: Mesh, inputs: int, outputs: int, *, std: float) -> None:
        super().__init__()
        require_divisible("input features", inputs, mesh.tensor.size)
        require_divisible("output features", outputs, mesh.tensor.size)
        self.axis = mesh.tensor
        self.weight = nn.Parameter(torch.empty(outputs, inputs // mesh.tensor.size))
        self.bias = nn.Parameter(torch.empty(outputs // mesh.tensor.size))
        describe(self.weight, Logical((outputs, inputs), dim=1, std=std), split=True)
        describe(self.bias, Logical((outputs,), dim=0, decay=False), split=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.axis.size == 1:
            return F.linear(x, self.weight, self.bias)
        return scatter_features(F.linear(x, self.weight), self.axis) + self.bias
