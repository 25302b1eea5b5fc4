"""The feed-forward of a layer, split over the tensor group."""

from __future__ import annotations

from torch import Tensor, nn

from ...kernels.activation import ACTIVATIONS, bias_gelu, gelu_tanh, takes_bias
from ...kernels.dropout import dropout
from ...parallel.layers import ColumnParallelLinear, RowParallelLinear
from ...parallel.mesh import Mesh


class FeedForward(nn.Module):
    """Two products with an activation between, the inner features split over the tensor group."""

    def __init__(self, mesh: Mesh, hidden: int, inner: int, *, activation: str, std: float, p: float = 0.0) -> None:
        """``p``: dropout of the inner features."""
        super().__init__()
        self.p, self.first = p, mesh.tensor.rank * (inner // mesh.tensor.size)
        self.up = ColumnParallelLinear(mesh, hidden, inner, std=std)
        self.activation = ACTIVATIONS[activation]
        self.down = RowParallelLinear(mesh, inner, hidden, std=std)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """x: [s, b, h] → [s, b, h]; keys: [s, b], of dropout, all positions also under sequence parallelism."""
        return self.down(dropout(self._inner(x), self.p, keys, self.first))

    def _inner(self, x: Tensor) -> Tensor:
        if takes_bias(self.activation, x, len(self.up.bias)):
            return bias_gelu(self.up(x, add_bias=False), self.up.bias, approximate=self.activation is gelu_tanh)
        return self.activation(self.up(x))
