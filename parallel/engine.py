"""The engine: one step of training or evaluation in any layout, and the state that a checkpoint keeps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .loss_scale import LossScale
from .mesh import Mesh, even_share
from .normalization import BatchNorm
from .parts import Piece
from .pipeline import Loss, Schedule
from .replicated import MakeOptimizer, ReplicatedOptimizer
from .state import Local, SavedState, optimizer_pieces, optimizer_steps, restore_optimizer, share
from .zero import ZeroOptimizer

# (module, microbatch, received hidden states, chunk) → the chunk's output
RunStage = Callable[[Callable[..., Any], Any, Tensor | None, int], Any]


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step reports, the same on every rank.

    ``statistics``: sums over all rows of the global batch.  ``gradient_norm``: before clipping; where it is not finite
    nothing was updated.  ``loss_scale``: what the step used.  ``rows``: what the loss function reported of each of this
    data rank's rows, on the last stage (``Engine.gather_rows`` brings them together).
    """

    statistics: list[float]
    gradient_norm: float
    loss_scale: float
    rows: Tensor


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
        offload_optimizer: bool,
        dtype: torch.dtype,
        clip: float,
        hidden_size: int,
        statistics: int,
        loss_scale: LossScale,
    ) -> None:
        self.mesh, self.module, self.tied = mesh, module.to(device=mesh.device, dtype=dtype), tied
        self.mixed = dtype != torch.float32
        self.statistics, self.loss_scale = statistics, loss_scale
        if tied is not None:
            # The last stage's copy: left out of the norm by DeepSpeed and by ours.
            tied.ds_pipe_replicated = not mesh.pipeline.first  # type: ignore[attr-defined]
        self.optimizer: ReplicatedOptimizer | ZeroOptimizer
        if zero_stage == 0 or (mesh.data.size == 1 and not offload_optimizer):  # one replica: nothing to partition
            self.optimizer = ReplicatedOptimizer(self.module, mesh, make_optimizer, clip=clip)
        else:
            self.optimizer = ZeroOptimizer(
                self.module, mesh, make_optimizer, stage=zero_stage, offload=offload_optimizer, clip=clip
            )
        self.local = Local.of(self.module, mesh.tensor)
        self._weights_are_copies = not (self.optimizer.partitioned and zero_stage == 3)
        self.stepping = [m for m in self.module.modules() if isinstance(m, BatchNorm)]
        self.schedule = Schedule(mesh, hidden_size=hidden_size, dtype=dtype)

    def train_batch(
        self,
        microbatches: Sequence[Any],
        shape: tuple[int, int],
        run_stage: RunStage,
        loss: Loss,
        *,
        learning_rate: float,
    ) -> StepResult:
        """One optimizer step; collective over the mesh.

        ``shape``: (rows, tokens a row) of every microbatch.  ``loss(output, microbatch)`` returns this microbatch's
        share of the global loss (summed over microbatches and replicas it is the loss), and in one float64 vector its
        statistics followed by a value for each row.
        """
        optimizer, scale = self.optimizer, self.loss_scale.value
        factor = scale * (self.mesh.data.size if optimizer.averages_gradients else 1)
        optimizer.begin_step()
        seen = 0

        def forward(microbatch: Any, received: Tensor | None, chunk: int) -> Any:
            nonlocal seen
            seen += 1
            optimizer.before_microbatch(last=seen == len(microbatches))
            return run_stage(optimizer, microbatch, received, chunk)

        def scaled(output: Any, microbatch: Any) -> tuple[Tensor, Tensor]:
            value, statistics = loss(output, microbatch)
            # A loss can be infinite with finite gradients: make them nan, so that the norm tells of both.
            finite = torch.where(value.detach().isfinite(), factor, math.nan)
            return value * finite, statistics

        results = self.schedule.run(microbatches, shape, forward, scaled)
        self._reduce_tied()
        norm = optimizer.step(learning_rate, scale)
        self.loss_scale.update(math.isfinite(norm))
        for module in self.stepping:
            module.end_step(keep=math.isfinite(norm))
        rows = torch.cat([result[self.statistics :] for result in results]) if results else torch.empty(0)
        return StepResult(self._total(results), norm, scale, rows)

    def eval_batch(
        self, microbatches: Sequence[Any], shape: tuple[int, int], run_stage: RunStage, loss: Loss
    ) -> list[float]:
        """The statistics of a batch, summed over all rows, the same on every rank; collective over the mesh."""
        forward = lambda microbatch, received, chunk: run_stage(self.optimizer, microbatch, received, chunk)  # noqa: E731
        return self._total(self.schedule.run(microbatches, shape, forward, loss, forward_only=True))

    def gather_rows(self, result: StepResult, rows: int) -> list[float]:
        """What the loss reported of each of a step's ``rows`` (of all replicas), in order; collective over the mesh."""
        every, data = torch.zeros(rows, dtype=torch.float64, device=self.mesh.device), self.mesh.data
        if len(result.rows):  # on the last stage
            mine = even_share(rows, data.rank, data.size)
            every[mine.start : mine.stop] = result.rows
        return self._sum_over_ranks(every).tolist()

    def _reduce_tied(self) -> None:
        if self.tied is not None:
            gradient = self.optimizer.gradient(self.tied)
            assert gradient is not None, "the tied embedding has no gradient"
            dist.all_reduce(gradient, group=self.mesh.embedding)

    def _total(self, results: list[Tensor]) -> list[float]:
        total = torch.zeros(self.statistics, dtype=torch.float64, device=self.mesh.device)
        for result in results:  # empty but on the last stage
            total += result[: self.statistics]
        return self._sum_over_ranks(total).tolist()

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        """Over replicas and stages; the ranks of a tensor group have the same."""
        return self.mesh.pipeline.all_reduce(self.mesh.data.all_reduce(values))

    # State.

    def pieces(self) -> list[Piece]:
        """What a checkpoint keeps of this rank: its values of every logical tensor, and of the optimizer's tensors and
        the masters for it, as they lie in memory now.  Of what all replicas hold each has its share."""
        pieces = [
            piece
            for parameter, begin, values in self.optimizer.weights()
            for piece in self.local.pieces("weight", parameter, begin, values, self._weights_are_copies)
        ]
        pieces += optimizer_pieces(
            self.optimizer.optimizer, self.optimizer.updated, self.local,
            masters=self.mixed, copies=not self.optimizer.partitioned,
        )  # fmt: skip
        return share(pieces, self.mesh.data)

    def optimizer_steps(self) -> dict[str, float]:
        """How often each logical tensor of this rank has been updated."""
        return optimizer_steps(self.optimizer.optimizer, self.optimizer.updated, self.local)

    def load_optimizer(self, saved: SavedState) -> None:
        """Restore what ``pieces`` and ``optimizer_steps`` gave of the optimizer under any layout."""
        restore_optimizer(self.optimizer.optimizer, self.optimizer.updated, self.local, saved, masters=self.mixed)
        self.optimizer.restored()
