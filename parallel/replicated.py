"""The optimizer step where nothing is partitioned (ZeRO 0, or one replica): float32 masters, one all-reduce."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .lamb import Contents, Lamb
from .mesh import Mesh
from .norms import sum_of_squares
from .sharding import logical_of
from .state import Held, Updated

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def parameter_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """One group of those that weight decay applies to (``decayed``), one of the others; without the untrainable."""
    trainable = [p for p in parameters if p.requires_grad]
    groups = [{"params": [p for p in trainable if logical_of(p).decay == on], "decayed": on} for on in (True, False)]
    return [group for group in groups if group["params"]]


def counted_in_norm(parameter: nn.Parameter, mesh: Mesh) -> bool:
    """Whether this rank counts a parameter in the global gradient norm: every value once over tensor × pipeline."""
    if getattr(parameter, "ds_pipe_replicated", False):
        return False
    return mesh.tensor.first or logical_of(parameter).dim is not None


class ReplicatedOptimizer:
    """Gradients are summed over the replicas, clipped by their global norm, and applied to float32 masters."""

    averages_gradients = False
    partitioned = False

    def __init__(self, module: nn.Module, mesh: Mesh, make_optimizer: MakeOptimizer, *, clip: float) -> None:
        self.module, self.mesh, self.clip = module, mesh, clip
        groups = parameter_groups(module.parameters())
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self.mixed = any(p.dtype != torch.float32 for p in self.parameters)
        masters = {p: p.detach().float() if p.dtype != torch.float32 else p for p in self.parameters}
        self.masters = list(masters.values())
        self.optimizer = make_optimizer([group | {"params": [masters[p] for p in group["params"]]} for group in groups])
        if isinstance(self.optimizer, Lamb):
            self.optimizer.describe({m: Contents.whole(m.numel()) for m in self.masters}, mesh.tensor)
        self.flat: Tensor | None = None
        if self.mixed or mesh.data.size > 1:
            self._share_gradients()

    def _share_gradients(self) -> None:
        """One float32 buffer that all gradients are views of: accumulated in float32, reduced in one piece."""
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters), device=self.mesh.device)
        self.gradients, start = [], 0
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            view = self.flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
            self.gradients.append(view)
            master.grad = view
            if parameter.dtype != torch.float32:
                parameter.register_post_accumulate_grad_hook(_accumulate_into(view))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def begin_step(self) -> None:
        if self.flat is not None:
            self.flat.zero_()
        else:
            for parameter in self.parameters:
                parameter.grad = None

    def before_microbatch(self, *, last: bool) -> None:
        pass

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Where the accumulated gradient of a parameter lies after the last microbatch."""
        if self.flat is None:
            return parameter.grad
        return self.gradients[next(i for i, p in enumerate(self.parameters) if p is parameter)]

    def step(self, learning_rate: float, scale: float) -> float:
        """Reduce, divide by the loss's ``scale``, clip, update.  Returns the global gradient norm before clipping;
        where it is not finite nothing is updated."""
        if self.flat is not None:
            self.mesh.data.all_reduce(self.flat)
        norm = self._norm() / scale
        if not math.isfinite(norm):
            return norm
        factor = min(self.clip / (norm + 1e-6), 1.0) if self.clip > 0 else 1.0
        if factor != scale:
            torch._foreach_mul_([m.grad for m in self.masters if m.grad is not None], factor / scale)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        if self.mixed:
            with torch.no_grad():
                torch._foreach_copy_([*self.parameters], self.masters)
        return norm

    def _norm(self) -> float:
        counted = [
            m.grad
            for p, m in zip(self.parameters, self.masters, strict=True)
            if m.grad is not None and counted_in_norm(p, self.mesh)
        ]
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for gradient in counted:
            total += sum_of_squares(gradient)
        return self.mesh.model.all_reduce(total).sqrt().item()

    def weights(self) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
        """This rank's values of every parameter: (parameter, number of the first of them, values)."""
        return ((parameter, 0, parameter.detach()) for parameter in self.module.parameters())

    @property
    def updated(self) -> Updated:
        """The tensors that the optimizer updates, and what they are made of."""
        pairs = zip(self.parameters, self.masters, strict=True)
        return [(master, [Held(parameter, 0, parameter.numel())]) for parameter, master in pairs]

    def restored(self) -> None:
        """Take note of state that was put in place."""


def _accumulate_into(view: Tensor) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        view.add_(parameter.grad)
        parameter.grad = None

    return hook
