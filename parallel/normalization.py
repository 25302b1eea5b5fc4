"""Norms over the features of hidden states, their weights held whole by every tensor rank.

``mesh``: given where x is [s, b, features] between products, a part of the sequence under sequence parallelism; None
where every tensor rank has the same x.  Statistics are float32 at least.  ``affine`` false: no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.layer_norm import dropout_add_layer_norm, layer_norm
from .mappings import on_sequence_part, sum_over
from .mesh import Axis, Mesh
from .sharding import Logical, describe

MOMENTUM = 0.1  # of batch norm's running statistics: what a step's share in them is, as torch has it


def _weight(features: int, fill: float, affine: bool) -> nn.Parameter | None:
    if not affine:
        return None
    weight = nn.Parameter(torch.empty(features))
    describe(weight, Logical((features,), fill=fill, decay=False), split=False)
    return weight


class Norm(nn.Module):
    """What the norms share."""

    def __init__(self, mesh: Mesh | None, eps: float) -> None:
        super().__init__()
        self.eps, self.mesh = eps, mesh

    def _used(self, weight: Tensor | None) -> Tensor | None:
        return weight if weight is None or self.mesh is None else on_sequence_part(weight, self.mesh)


class LayerNorm(Norm):
    """Layer normalisation (arXiv 1607.06450)."""

    def __init__(self, mesh: Mesh | None, features: int, eps: float, *, affine: bool = True) -> None:
        super().__init__(mesh, eps)
        self.weight, self.bias = _weight(features, 1.0, affine), _weight(features, 0.0, affine)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self._used(self.weight), self._used(self.bias), self.eps)

    def after_dropout_add(self, x: Tensor, residual: Tensor, p: float, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """(residual + dropout(x), its normalised form)."""
        return dropout_add_layer_norm(x, residual, self._used(self.weight), self._used(self.bias), self.eps, p, keys)


class RMSNorm(Norm):
    """x g / √(mean(x²) + eps) (arXiv 1910.07467, equation 4)."""

    def __init__(self, mesh: Mesh | None, features: int, eps: float, *, affine: bool = True) -> None:
        super().__init__(mesh, eps)
        self.weight = _weight(features, 1.0, affine)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        weight = self._used(self.weight)
        return (y if weight is None else y * weight).to(x.dtype)


class ScaleNorm(RMSNorm):
    """The same with one number for g (arXiv 1910.05895, equation 5, divided by the root of the features as in MEGA)."""

    def __init__(self, mesh: Mesh | None, features: int, eps: float, *, affine: bool = True) -> None:
        super().__init__(mesh, 1, eps, affine=affine)


class BatchNorm(Norm):
    """Batch normalisation (arXiv 1502.03167) over the real tokens of a microbatch.

    In training the statistics are those of the microbatch, of all replicas' with ``replicas``; in evaluation the
    running ones.  These move once a step, towards the mean over the step's microbatches (``end_step``), so that they do
    not depend on how many there are or where.
    """

    def __init__(self, mesh: Mesh, features: int, eps: float, *, affine: bool = True, replicas: bool = False) -> None:
        super().__init__(mesh, eps)
        self.weight, self.bias = _weight(features, 1.0, affine), _weight(features, 0.0, affine)
        self.axes: list[Axis] = [mesh.tensor] if mesh.sequence_parallel else []
        if replicas:
            self.axes.append(mesh.data)
        # Not trained, but saved, loaded and converted like what is.
        self.running_mean = nn.Parameter(torch.empty(features), requires_grad=False)
        self.running_var = nn.Parameter(torch.empty(features), requires_grad=False)
        # One entry: DeepSpeed cannot broadcast a number without dimensions.
        self.num_batches_tracked = nn.Parameter(torch.empty(1, dtype=torch.int64), requires_grad=False)
        describe(self.running_mean, Logical((features,), decay=False), split=False)
        describe(self.running_var, Logical((features,), fill=1.0, decay=False), split=False)
        describe(self.num_batches_tracked, Logical((), decay=False), split=False)
        self.seen: list[Tensor] = []  # of each microbatch of the step: [mean, variance], [2, features]

    def forward(self, x: Tensor, real: Tensor, *, training: bool) -> Tensor:
        """x: [s, b, features]; real: [s, b] bool."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if training:
            mean, variance = self._statistics(wide, real.unsqueeze(-1))
        else:
            mean, variance = self.running_mean, self.running_var
        y = (wide - mean) * torch.rsqrt(variance + self.eps)
        weight, bias = self._used(self.weight), self._used(self.bias)
        return (y if weight is None or bias is None else y * weight + bias).to(x.dtype)

    def _statistics(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        count = self._sum(real.to(x.dtype)).clamp(min=1)
        mean = self._sum(x * real) / count
        variance = self._sum((x - mean).square() * real) / count
        with torch.no_grad():
            unbiased = variance * count / (count - 1).clamp(min=1)  # as torch keeps it
            self.seen.append(torch.stack((mean, unbiased)).detach())
        return mean, variance

    def _sum(self, x: Tensor) -> Tensor:
        """Over all positions and rows, of all ranks that have a part of them."""
        total = x.sum((0, 1))
        for axis in self.axes:
            total = sum_over(total, axis)
        return total

    @torch.no_grad()
    def end_step(self, *, keep: bool) -> None:
        """Move the running statistics, unless the step is to leave no trace; collective over the replicas."""
        seen, self.seen = self.seen, []
        assert self.mesh is not None
        if not seen or not keep:
            return
        mean = self.mesh.data.all_reduce(torch.stack(seen).mean(0).to(self.running_mean)) / self.mesh.data.size
        self.running_mean.lerp_(mean[0], MOMENTUM)
        self.running_var.lerp_(mean[1], MOMENTUM)
        self.num_batches_tracked.add_(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Running statistics stay in float32 when a model is cast: a step's share in them is small."""
        kept = self.running_mean.detach().float(), self.running_var.detach().float()
        super()._apply(fn, recurse)
        for parameter, value in zip((self.running_mean, self.running_var), kept, strict=True):
            parameter.data = value.to(parameter.device)
        return self


def norm_of(kind: str, mesh: Mesh, features: int, eps: float, *, affine: bool) -> Norm:
    """A norm by the name that Hugging Face's MegaConfig gives it."""
    if kind in ("batchnorm", "syncbatchnorm"):
        return BatchNorm(mesh, features, eps, affine=affine, replicas=kind == "syncbatchnorm")
    kinds = {"layernorm": LayerNorm, "rmsnorm": RMSNorm, "scalenorm": ScaleNorm}
    return kinds[kind](mesh, features, eps, affine=affine)
