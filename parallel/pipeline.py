"""The schedule: megatron-core's forward-backward functions (no pipelining, 1F1B, interleaved 1F1B) over one stage.

Every layout takes this path.  A stage is anything callable as ``forward(microbatch, received, chunk)``: it gets the
hidden states of the chunk before (None for the model's first) and returns its own, or for the last what ``loss`` needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import cpu
from .megatron import ModelType, TransformerConfig, get_forward_backward_func
from .mesh import Mesh

Forward = Callable[[Any, Tensor | None, int], Any]
Loss = Callable[[Any, Any], tuple[Tensor, Tensor]]


class _StageView(nn.Module):
    """One chunk of a stage as megatron-core sees it: a config, a place to put the received tensor, a call."""

    def __init__(self, config: TransformerConfig, forward: Forward, chunk: int) -> None:
        super().__init__()
        self.config, self.model_type, self.vp_stage = config, ModelType.encoder_or_decoder, chunk
        self._forward, self._received = forward, None

    def set_input_tensor(self, tensor: Any) -> None:
        self._received = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, microbatch: Any) -> Any:
        return self._forward(microbatch, self._received, self.vp_stage)


class Schedule:
    """Runs the microbatches of a step through the pipeline.

    ``hidden_size`` and ``dtype`` describe the [sequence, batch, hidden] tensor that flows between stages.
    """

    def __init__(self, mesh: Mesh, *, hidden_size: int, dtype: torch.dtype) -> None:
        cpu.patch()
        self.mesh, interleaved = mesh, mesh.virtual_stages > 1
        self.config = TransformerConfig(
            num_layers=mesh.pipeline.size * mesh.virtual_stages,  # the layers are the stage's own business
            num_attention_heads=mesh.tensor.size,
            hidden_size=hidden_size,
            tensor_model_parallel_size=mesh.tensor.size,
            pipeline_model_parallel_size=mesh.pipeline.size,
            virtual_pipeline_model_parallel_size=mesh.virtual_stages if interleaved else None,
            sequence_parallel=mesh.sequence_parallel,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            use_cpu_initialization=True,
            # A send may still be under way when the next microbatch starts: with gloo, and interleaved with NCCL too
            # (NVIDIA/Megatron-LM pull request 4047).
            deallocate_pipeline_outputs=False,
            # Interleaved: in a batch, gloo frees buffers that are still in flight.
            batch_p2p_comm=not interleaved,
            overlap_p2p_comm=interleaved,
        )

    def run(
        self,
        microbatches: Sequence[Any],
        shape: tuple[int, int],
        forward: Forward,
        loss: Loss,
        *,
        forward_only: bool = False,
    ) -> list[Tensor]:
        """Forward (and backward) of every microbatch; collective over the mesh.

        ``shape``: (rows, tokens a row) of every microbatch.  ``loss(output, microbatch)`` returns a scalar whose sum
        over the microbatches is differentiated, and a vector of statistics; the list of those vectors, in order, is
        returned on the last stage, an empty list elsewhere.
        """
        count, chunks = len(microbatches), range(self.mesh.virtual_stages)
        views = [_StageView(self.config, forward, chunk) for chunk in chunks]
        iterators = [iter(microbatches) for _ in chunks]

        def forward_step(
            iterator: Iterator[Any], view: _StageView
        ) -> tuple[Any, Callable[[Any], tuple[Tensor, Tensor]]]:
            microbatch = next(iterator)

            def scaled_loss(output: Any) -> tuple[Tensor, Tensor]:
                value, statistics = loss(output, microbatch)
                return value * count, statistics  # megatron-core divides by the number of microbatches

            with _plain_torch(self.mesh):
                output = view(microbatch)
            # What flows to the next stage is sent as it lies in memory.
            return output.contiguous() if isinstance(output, Tensor) else output, scaled_loss

        gradients = torch.no_grad() if forward_only else contextlib.nullcontext()
        with cpu.cuda_means_cpu(), gradients:
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if len(views) > 1 else iterators[0],
                model=views if len(views) > 1 else views[0],
                num_microbatches=count,
                micro_batch_size=shape[0],
                seq_length=shape[1],
                forward_only=forward_only,
            )


def _plain_torch(mesh: Mesh) -> contextlib.AbstractContextManager[None]:
    """Inside the model nothing names a device: spare every operation the detour through ``cuda_means_cpu``."""
    if mesh.device.type == "cuda":
        return contextlib.nullcontext()
    return torch._C.DisableTorchFunction()
