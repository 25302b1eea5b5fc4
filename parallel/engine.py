"""The engine: one step of training or evaluation in any layout, and the state that a checkpoint keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .mesh import Mesh
from .pipeline import Loss, Schedule
from .replicated import MakeOptimizer, ReplicatedOptimizer
from .zero import ZeroOptimizer

# (module, microbatch, received hidden states) → this stage's output
RunStage = Callable[[Callable[..., Any], Any, Tensor | None], Any]


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step reports: sums over all rows of the global batch, the same on every rank."""

    statistics: list[float]
    gradient_norm: float


class Engine:
    """Drives one stage of a model.

    ``module``: the stage, its parameters filled, in float32 on the CPU; it is moved and cast.  ``tied``: the copy of a
    parameter that the first and the last stage share, where this stage has one.  ``make_optimizer``: from parameter
    groups [with weight decay, without].  ``statistics``: how many numbers the loss function reports.
    """

    def __init__(
        self,
        module: nn.Module,
        mesh: Mesh,
        make_optimizer: MakeOptimizer,
        *,
        tied: nn.Parameter | None,
        zero_stage: int,
        dtype: torch.dtype,
        clip: float,
        hidden_size: int,
        rows: int,
        length: int,
        statistics: int,
    ) -> None:
        self.mesh, self.module, self.tied = mesh, module.to(device=mesh.device, dtype=dtype), tied
        self.shape, self.statistics = (rows, length), statistics
        if tied is not None:
            # The last stage's copy: left out of the norm by DeepSpeed and by ours.
            tied.ds_pipe_replicated = not mesh.pipeline.first  # type: ignore[attr-defined]
        self.optimizer: ReplicatedOptimizer | ZeroOptimizer
        if zero_stage == 0 or mesh.data.size == 1:  # with one replica there is nothing to partition
            self.optimizer = ReplicatedOptimizer(self.module, mesh, make_optimizer, clip=clip)
        else:
            self.optimizer = ZeroOptimizer(self.module, mesh, make_optimizer, stage=zero_stage, clip=clip, rows=rows)
        self.schedule = Schedule(mesh, hidden_size=hidden_size, dtype=dtype)

    def train_batch(
        self, microbatches: Sequence[Any], run_stage: RunStage, loss: Loss, *, learning_rate: float
    ) -> StepResult:
        """One optimizer step; collective over the mesh.

        ``loss(output, microbatch)`` returns this microbatch's share of the global loss (summed over microbatches and
        replicas it is the loss) and its statistics.
        """
        optimizer, replicas = self.optimizer, self.mesh.data.size if self.optimizer.averages_gradients else 1
        optimizer.begin_step()
        seen = 0

        def forward(microbatch: Any, received: Tensor | None) -> Any:
            nonlocal seen
            seen += 1
            optimizer.before_microbatch(last=seen == len(microbatches))
            return run_stage(optimizer, microbatch, received)

        def scaled(output: Any, microbatch: Any) -> tuple[Tensor, Tensor]:
            value, statistics = loss(output, microbatch)
            return value * replicas, statistics

        results = self.schedule.run(microbatches, self.shape, forward, scaled)
        self._reduce_tied()
        norm = optimizer.step(learning_rate)
        return StepResult(self._total(results), norm)

    def eval_batch(self, microbatches: Sequence[Any], run_stage: RunStage, loss: Loss) -> list[float]:
        """The statistics of a batch, summed over all rows, the same on every rank; collective over the mesh."""
        forward = lambda microbatch, received: run_stage(self.optimizer, microbatch, received)  # noqa: E731
        return self._total(self.schedule.run(microbatches, self.shape, forward, loss, forward_only=True))

    def _reduce_tied(self) -> None:
        if self.tied is not None:
            gradient = self.optimizer.gradient(self.tied)
            assert gradient is not None, "the tied embedding has no gradient"
            dist.all_reduce(gradient, group=self.mesh.embedding)

    def _total(self, results: list[Tensor]) -> list[float]:
        total = torch.zeros(self.statistics, dtype=torch.float64, device=self.mesh.device)
        for result in results:  # empty but on the last stage
            total += result.double()
        for axis in (self.mesh.data, self.mesh.pipeline):
            if axis.size > 1:
                dist.all_reduce(total, group=axis.group)
        return total.tolist()

    # State.

    def whole_parameters(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """(name, parameter, its whole local value) one at a time; collective over the data group under ZeRO 3.
        Each value is valid until the next is taken."""
        for name, parameter in self.module.named_parameters():
            with self.optimizer.whole([parameter]):
                yield name, parameter, parameter.detach()

    def optimizer_state(self) -> dict[str, Tensor]:
        """This rank's own part of the optimizer's state."""
        return self.optimizer.state()

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Restore what ``optimizer_state`` gave on this rank in the same layout."""
        self.optimizer.load_state(state)
