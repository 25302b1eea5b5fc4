"""A network with a parameter of every kind, of odd sizes: partitions cut through parameters, and are padded."""

from __future__ import annotations

import torch.nn.functional as F
from models import fill
from torch import Tensor, nn

from farspan.parallel.layers import ColumnParallelLinear, Linear, RowParallelLinear, VocabParallelEmbedding
from farspan.parallel.mesh import Mesh
from farspan.parallel.normalization import LayerNorm

WORDS, H, INNER, OUT = 97, 9, 12, 3


class SmallNet(nn.Module):
    """Split by rows with padding, by columns, by rows; whole with and without decay."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.words = VocabParallelEmbedding(mesh, WORDS, H, std=1.0, padding_index=1)
        self.up = ColumnParallelLinear(mesh, H, INNER, std=1.0)
        self.down = RowParallelLinear(mesh, INNER, H, std=1.0)
        self.norm = LayerNorm(mesh, H, 1e-5)
        self.out = Linear(None, H, OUT, std=1.0)
        fill(self, mesh.tensor, std=0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        return self.out(self.norm(x + self.down(F.gelu(self.up(x)))))  # type: ignore[no-any-return]
