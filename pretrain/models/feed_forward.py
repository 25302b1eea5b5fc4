"""The feed-forward of a layer, split over the tensor group."""

from __future__ import annotations

from torch import Tensor, nn

from ...kernels.activation import ACTIVATIONS
from ...parallel.layers import ColumnParallelLinear, RowParallelLinear, require_divisible
from ...parallel.mesh import Mesh
from .config import ModelConfig


class FeedForward(nn.Module):
    """Two products with an activation between, the inner features split over the tensor group."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        h, i, std = config.hidden_size, config.intermediate_size, config.initializer_range
        require_divisible("intermediate_size", i, mesh.tensor.size)
        self.up = ColumnParallelLinear(mesh, h, i, std=std)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.down = RowParallelLinear(mesh, i, h, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """x: [s, b, h] → [s, b, h]"""
        return self.down(self.activation(self.up(x)))
