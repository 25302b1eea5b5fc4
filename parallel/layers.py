"""The layers models are made of, split over the tensor group by megatron-core.

Activations are [sequence, batch, features].  Every parameter carries a ``Logical`` (``sharding``); values are filled in
by ``sharding.initialize`` once the model stands.  With a tensor group of one the products are plain ``linear``s, so a
model on ``Mesh.solo()`` needs no process group.

With sequence parallelism (arXiv 2205.05198, section 4.2.2) each tensor rank has a part of the sequence between the
products: a column-parallel product gathers it, a row-parallel one scatters it again, and the gradients of what is used
in between (norms, biases, small tables) are summed over the group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.lm_head import keeps, lm_head_loss, losses_of, shard_gradients, shard_statistics
from .mappings import copy_to_tensor_region, on_sequence_part, sequence_part
from .megatron import ModelParallelConfig, tensor_parallel
from .mesh import Axis, Mesh
from .sharding import Logical, describe

PADDING_LOGIT = -1e30  # exp() of it is 0; -inf in fp16, which does as well
VOCABULARY_MULTIPLE = 128  # per tensor rank: keeps every shard's matrix product aligned


def _core_config(mesh: Mesh) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=mesh.tensor.size,
        use_cpu_initialization=True,  # allocated on the CPU, filled by sharding.initialize, then moved
        perform_initialization=False,
        params_dtype=torch.float32,
        sequence_parallel=mesh.sequence_parallel,
    )


def require_divisible(what: str, value: int, by: int) -> None:
    if value % by:
        raise ValueError(
            f"{what} ({value}) does not divide by the tensor size ({by}): set parallel.tensor to a divisor"
        )


class ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """y = x Wᵀ + b with the output features split over the tensor group (arXiv 1909.08053, section 3).

    ``parts``: how many equally shaped projections are stacked in it (3 for query, key and value): each is split by
    itself, and the logical tensor is [parts, out/parts, in].  x: [s, b, in] → [s, b, out/tensor], with sequence
    parallelism [s/tensor, b, in] → [s, b, out/tensor].
    """

    def __init__(self, mesh: Mesh, inputs: int, outputs: int, *, std: float, parts: int = 1) -> None:
        require_divisible("output features", outputs // parts, mesh.tensor.size)
        super().__init__(
            inputs, outputs, config=_core_config(mesh), init_method=None, bias=True, gather_output=False,
            tp_group=None if mesh.tensor.size == 1 else mesh.tensor.group,
        )  # fmt: skip
        self.tensor_size = mesh.tensor.size
        head = (outputs,) if parts == 1 else (parts, outputs // parts)
        describe(self.weight, Logical((*head, inputs), dim=len(head) - 1, std=std), split=True)
        describe(self.bias, Logical(head, dim=len(head) - 1, decay=False), split=True)

    def forward(self, x: Tensor, *, add_bias: bool = True) -> Tensor:  # type: ignore[override]
        """Without ``add_bias``, x Wᵀ alone: for an activation that adds the bias itself."""
        if self.tensor_size == 1:
            return F.linear(x, self.weight, self.bias if add_bias else None)
        self.skip_bias_add = not add_bias
        return super().forward(x)[0]


class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """y = x Wᵀ + b with the input features split over the tensor group.

    x: [s, b, in/tensor] → [s, b, out], with sequence parallelism [s/tensor, b, out].
    """

    def __init__(self, mesh: Mesh, inputs: int, outputs: int, *, std: float) -> None:
        require_divisible("input features", inputs, mesh.tensor.size)
        super().__init__(
            inputs, outputs, config=_core_config(mesh), init_method=None, bias=True, input_is_parallel=True,
            skip_bias_add=True, tp_group=None if mesh.tensor.size == 1 else mesh.tensor.group,
        )  # fmt: skip
        self.tensor_size, self.mesh = mesh.tensor.size, mesh
        describe(self.weight, Logical((outputs, inputs), dim=1, std=std), split=True)
        describe(self.bias, Logical((outputs,), decay=False), split=False)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if self.tensor_size == 1:
            return F.linear(x, self.weight, self.bias)
        y, bias = super().forward(x)
        return y + on_sequence_part(bias, self.mesh)


class Linear(nn.Linear):
    """A linear layer that every tensor rank holds whole.  ``mesh``: as for norms (``normalization``)."""

    def __init__(self, mesh: Mesh | None, inputs: int, outputs: int, *, std: float) -> None:
        super().__init__(inputs, outputs)
        self.mesh = mesh
        self.weight: nn.Parameter
        describe(self.weight, Logical((outputs, inputs), std=std), split=False)
        describe(self.bias, Logical((outputs,), decay=False), split=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.mesh is None:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, on_sequence_part(self.weight, self.mesh), on_sequence_part(self.bias, self.mesh))

    def reset_parameters(self) -> None:
        pass  # sharding.initialize fills it


class Embedding(nn.Module):
    """A table that every tensor rank holds whole.  A look-up of ``padding_index`` sends no gradient to its row.

    ids: [...] int64 → [..., features]; under sequence parallelism the ids of this rank's part of the sequence.
    """

    def __init__(self, mesh: Mesh, rows: int, features: int, *, std: float, padding_index: int | None = None) -> None:
        super().__init__()
        self.mesh, self.padding_index = mesh, padding_index
        self.weight = nn.Parameter(torch.empty(rows, features))
        describe(self.weight, Logical((rows, features), std=std, zero_row=padding_index), split=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, on_sequence_part(self.weight, self.mesh), padding_idx=self.padding_index)


class VocabParallelEmbedding(tensor_parallel.VocabParallelEmbedding):
    """The word embedding with its rows split over the tensor group; padded to ``VOCABULARY_MULTIPLE`` a rank.

    ids: [s, b] int64 → [s, b, features], under sequence parallelism this rank's part [s/tensor, b, features].  A
    look-up of ``padding_index`` sends no gradient to its row.
    """

    def __init__(self, mesh: Mesh, rows: int, features: int, *, std: float, padding_index: int | None) -> None:
        super().__init__(
            padded_vocabulary(rows, mesh.tensor.size), features, init_method=None, config=_core_config(mesh),
            reduce_scatter_embeddings=mesh.sequence_parallel,
            tp_group=None if mesh.tensor.size == 1 else mesh.tensor.group,
        )  # fmt: skip
        self.mesh, self.padding_index = mesh, padding_index
        describe(self.weight, word_table(mesh, rows, features, std=std, padding_index=padding_index), split=True)

    def forward(self, ids: Tensor) -> Tensor:
        if self.mesh.tensor.size == 1:
            return F.embedding(ids, self.weight, padding_idx=self.padding_index)
        # megatron-core's form for sequence parallelism transposes what it is given.
        x = super().forward(ids.t() if self.mesh.sequence_parallel else ids)
        if self.padding_index is None:
            return x
        padding = ids[sequence_part(len(ids), self.mesh)] == self.padding_index
        # torch.where lays its result out in memory as its first operand: ids may be a transposed batch.
        return torch.where(padding.contiguous().unsqueeze(-1), x.detach(), x)


def word_table(
    mesh: Mesh, rows: int, features: int, *, std: float, padding_index: int | None, tied_to: str | None = None
) -> Logical:
    """What a table of words looks like, as input embedding and as output weight."""
    padded = padded_vocabulary(rows, mesh.tensor.size)
    return Logical((rows, features), dim=0, padded=padded, std=std, zero_row=padding_index, tied_to=tied_to)


def padded_vocabulary(size: int, tensor: int) -> int:
    multiple = VOCABULARY_MULTIPLE * tensor
    return (size + multiple - 1) // multiple * multiple


class VocabParallelHead(nn.Module):
    """Logits over a vocabulary split over the tensor group, and the cross-entropy of them.

    The weight [padded/tensor, features] is passed in with each call: the word embedding's, or the one owned here, which
    ``weight`` describes (None: none is).  The bias is its own.  Padding entries of the vocabulary take no part.
    """

    padding_bias: Tensor

    def __init__(self, mesh: Mesh, size: int, features: int, *, weight: Logical | None) -> None:
        super().__init__()
        self.axis, self.size = mesh.tensor, size
        padded = padded_vocabulary(size, mesh.tensor.size)
        self.part = padded // mesh.tensor.size
        self.bias = nn.Parameter(torch.empty(self.part))
        real = max(0, min(self.part, size - mesh.tensor.rank * self.part))  # entries here that are no padding
        # Added to the bias rather than written into the logits: that would copy their gradient.
        padding_bias = torch.zeros(self.part)
        padding_bias[real:] = PADDING_LOGIT
        self.register_buffer("padding_bias", padding_bias, persistent=False)
        describe(self.bias, Logical((size,), dim=0, padded=padded, decay=False), split=True)
        self.weight: nn.Parameter | None = None
        if weight is not None:
            self.weight = nn.Parameter(torch.empty(self.part, features))
            describe(self.weight, weight, split=True)

    def local_logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """x: [..., features] → this rank's logits [..., padded/tensor], padding at PADDING_LOGIT."""
        x = copy_to_tensor_region(x, self.axis)
        return F.linear(x, weight, self.bias + self.padding_bias)

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """x: [..., features] → the logits of the whole vocabulary, [..., size]."""
        logits = self.local_logits(x, weight)
        if self.axis.size > 1:
            logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits, group=self.axis.group)
        return logits[..., : self.size]

    def loss(self, x: Tensor, weight: Tensor, labels: Tensor, *, count_correct: bool) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every row in nats, and whether the label has the largest logit (else zeros).

        x: [n, features]; labels: [n] int64 in the vocabulary.  Returns two [n] tensors, float32 at least.
        """
        if self.axis.size == 1:
            return lm_head_loss(x, weight, self.bias, labels, size=self.size, count_correct=count_correct)
        x, keep = copy_to_tensor_region(x, self.axis), keeps(x, weight, self.bias)
        return _SplitLoss.apply(x, weight, self.bias, labels, self.axis, self.size, keep, count_correct)  # type: ignore[no-any-return]


class _SplitLoss(torch.autograd.Function):
    """``lm_head_loss`` with the vocabulary split over an axis: two all-reduces of two numbers a row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, axis: Axis, size: int, keep: bool,
        count_correct: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.shard = {"first": axis.rank * len(weight), "size": size}
        here, kept = shard_statistics(x, weight, bias, labels, **ctx.shard, keep=keep)
        maximum, label_logit = axis.all_reduce(torch.stack((here.maximum, here.label_logit)), dist.ReduceOp.MAX)
        sums = [here.total * (here.maximum - maximum).exp()]
        if count_correct:
            # One for the label, less one for every rank before the label's that has as large a logit.
            owner, found = labels // len(weight), here.maximum == maximum
            votes = (found & (here.best == labels)).to(maximum.dtype)
            sums.append(torch.where(found & (axis.rank < owner), -1.0, votes))
        total, *voted = axis.all_reduce(torch.stack(sums))
        correct = (voted[0] > 0).to(maximum.dtype) if count_correct else torch.zeros_like(total)
        ctx.save_for_backward(x, weight, bias, labels, maximum, total, kept)
        ctx.mark_non_differentiable(correct)
        return losses_of(maximum, total, label_logit), correct

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, labels, maximum, total, kept = ctx.saved_tensors
        gradients = shard_gradients(
            x, weight, bias, labels, **ctx.shard, maximum=maximum, total=total, upstream=upstream, kept=kept,
            needed=ctx.needs_input_grad[:3],
        )  # fmt: skip
        return *gradients, None, None, None, None, None
