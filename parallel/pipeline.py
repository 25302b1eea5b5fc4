"""The schedule: megatron-core's forward-backward functions (no pipelining, 1F1B) over one stage.

Every layout takes this path.  A stage is anything callable as ``forward(microbatch, received)``: it gets the hidden
states of the stage before (None on the first) and returns its own, or on the last stage what ``loss`` needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from . import cpu
from .mesh import Mesh

Forward = Callable[[Any, Tensor | None], Any]
Loss = Callable[[Any, Any], tuple[Tensor, Tensor]]


class _StageView(nn.Module):
    """One stage as megatron-core sees it: a config, a place to put the received tensor, a call."""

    def __init__(self, config: TransformerConfig, forward: Forward) -> None:
        super().__init__()
        self.config, self.model_type = config, ModelType.encoder_or_decoder
        self._forward, self._received = forward, None

    def set_input_tensor(self, tensor: Any) -> None:
        self._received = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, microbatch: Any) -> Any:
        return self._forward(microbatch, self._received)


class Schedule:
    """Runs the microbatches of a step through the pipeline.

    ``hidden_size`` and ``dtype`` describe the [sequence, batch, hidden] tensor that flows between stages.
    """

    def __init__(self, mesh: Mesh, *, hidden_size: int, dtype: torch.dtype) -> None:
        cpu.patch()
        self.mesh = mesh
        self.config = TransformerConfig(
            num_layers=mesh.pipeline.size,  # the layers are the stage's own business
            num_attention_heads=mesh.tensor.size,
            hidden_size=hidden_size,
            tensor_model_parallel_size=mesh.tensor.size,
            pipeline_model_parallel_size=mesh.pipeline.size,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            use_cpu_initialization=True,
            # With gloo a send may still be under way when the next microbatch starts.
            deallocate_pipeline_outputs=mesh.device.type == "cuda",
            batch_p2p_comm=True,
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
        count = len(microbatches)

        def forward_step(
            iterator: Iterator[Any], view: _StageView
        ) -> tuple[Any, Callable[[Any], tuple[Tensor, Tensor]]]:
            microbatch = next(iterator)

            def scaled_loss(output: Any) -> tuple[Tensor, Tensor]:
                value, statistics = loss(output, microbatch)
                return value * count, statistics  # megatron-core divides by the number of microbatches

            with _plain_torch(self.mesh):
                return view(microbatch), scaled_loss

        gradients = torch.no_grad() if forward_only else contextlib.nullcontext()
        with cpu.cuda_means_cpu(), gradients:
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(microbatches),
                model=_StageView(self.config, forward),
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
