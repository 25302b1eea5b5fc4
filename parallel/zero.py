"""The optimizer step with ZeRO 1, 2 and 3 (arXiv 1910.02054), by DeepSpeed.  The only file that knows DeepSpeed.

What DeepSpeed's plain engine needs to work under megatron-core's schedules:

- its own ``gradient_accumulation_steps`` stays 1, or every stage would divide the gradient again;
- the accumulation boundary is set by hand: for ZeRO 1 gradients stay where autograd puts them until the last
  microbatch is done; for ZeRO 2 and 3 they are reduced as they come, so the boundary is set before the last microbatch;
- its ``mpu`` answers for the model group with megatron-core's tensor × pipeline group.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .lamb import Contents, Lamb
from .mesh import Mesh
from .replicated import MakeOptimizer, parameter_groups
from .state import Held, Updated

_linear = nn.functional.linear


class _ModelParallelUnit:
    """The mesh, as DeepSpeed asks for it."""

    def __init__(self, mesh: Mesh) -> None:
        for name, axis in (
            ("data_parallel", mesh.data),
            ("tensor_model_parallel", mesh.tensor),
            ("pipeline_model_parallel", mesh.pipeline),
            ("model_parallel", mesh.model),
        ):
            setattr(self, f"get_{name}_rank", lambda axis=axis: axis.rank)
            setattr(self, f"get_{name}_world_size", lambda axis=axis: axis.size)
            setattr(self, f"get_{name}_group", lambda axis=axis: axis.group)


def import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it searches, and warns that it found none
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls names that newer torch releases rename.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if not torch.cuda.is_available():
        # A shared-memory op for inference, built with a compiler at the first start: nothing here uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # It asks for float16 instructions; torch computes float16 without them too, only slower.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    return deepspeed


class ZeroOptimizer:
    """Optimizer state (1), gradients (2) and weights (3) partitioned over the data group."""

    averages_gradients = True
    partitioned = True

    def __init__(
        self,
        module: nn.Module,
        mesh: Mesh,
        make_optimizer: MakeOptimizer,
        *,
        stage: int,
        clip: float,
        offload: bool = False,
    ) -> None:
        """``offload``: the optimizer's state and masters stay in host memory, where DeepSpeed's CPU Adam updates them;
        ``make_optimizer`` must make that one."""
        deepspeed = import_deepspeed()
        # ZeRO 3 puts its own there for as long as the process lives.  ZeRO 2 reduces gradients as they come, unnamed:
        # where ranks had different ones, they would come in another order, and one be added to another.
        nn.functional.linear = _linear
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        groups = parameter_groups(module.parameters())
        parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self.module, self.stage, self.mesh, self.offload = module, stage, mesh, offload
        self.dtype = parameters[0].dtype
        self.accumulated: dict[nn.Parameter, Tensor] = {}
        optimizer = make_optimizer(groups)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # of no consequence: the schedule makes the microbatches
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": stage, "overlap_comm": False},
            "gradient_clipping": clip,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**62,
        }
        if offload:
            pinned = mesh.device.type == "cuda"
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
        if self.dtype == torch.float16:
            config["fp16"] = {"enabled": True, "loss_scale": 1.0}  # step() sets ours
        elif self.dtype == torch.bfloat16:
            config["bf16"] = {"enabled": True}
        if self.dtype != torch.float32:
            if stage >= 2:
                config["data_types"] = {"grad_accum_dtype": "fp32"}
            else:
                self._accumulate_in_float32(parameters)
        if mesh.device.type == "cuda":  # a rank that is shown its own GPU alone has number 0, whatever its LOCAL_RANK
            os.environ["LOCAL_RANK"] = str(mesh.device.index)
            if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
                os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = os.environ["LOCAL_RANK"]
        other = [(p, p.detach().clone()) for p in module.parameters() if p.dtype != self.dtype]  # running statistics
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, mpu=_ModelParallelUnit(mesh), dist_init_required=False, config=config
        )
        for parameter, value in other:  # DeepSpeed has cast all that is floating point
            parameter.data = value
        assert torch.distributed.get_process_group_ranks(mesh.data.group) == torch.distributed.get_process_group_ranks(
            self.engine.data_parallel_group
        ), "DeepSpeed and megatron-core disagree on the data group"
        if isinstance(optimizer, Lamb):
            optimizer.describe(self._contents(), mesh.tensor, mesh.data)

    def _accumulate_in_float32(self, parameters: list[nn.Parameter]) -> None:
        """ZeRO 1 leaves the sum over microbatches to autograd, in the weights' precision: keep it in float32 instead
        and round once, when DeepSpeed takes it."""

        def hook(parameter: nn.Parameter) -> None:
            assert parameter.grad is not None
            self.accumulated[parameter].add_(parameter.grad)
            parameter.grad = None

        for parameter in parameters:
            self.accumulated[parameter] = torch.zeros(parameter.shape, device=self.mesh.device)
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[arg-type]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def begin_step(self) -> None:
        self.engine.set_gradient_accumulation_boundary(False)
        for gradient in self.accumulated.values():
            gradient.zero_()

    def before_microbatch(self, *, last: bool) -> None:
        if self.stage >= 2:
            self.engine.set_gradient_accumulation_boundary(last)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Where the accumulated gradient of a parameter lies after the last microbatch (ZeRO 1)."""
        return self.accumulated.get(parameter, parameter.grad)

    def step(self, learning_rate: float, scale: float) -> float:
        """Reduce, divide by the loss's ``scale``, clip, update.  Returns the global gradient norm before clipping;
        where it is not finite nothing is updated."""
        self.engine.optimizer.loss_scale = scale
        for group in self.engine.basic_optimizer.param_groups:
            group["lr"] = learning_rate
        if self.stage == 1:
            for parameter, gradient in self.accumulated.items():
                parameter.grad = gradient.to(parameter.dtype)
            self.engine.set_gradient_accumulation_boundary(True)
            self.engine.allreduce_gradients()
        self.engine.step()
        return math.inf if self.engine.optimizer.overflow else float(self.engine.get_global_grad_norm())

    def weights(self) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
        """This rank's values of every parameter: (parameter, number of the first of them, values)."""
        for parameter in self.module.parameters():
            if self.stage < 3:
                yield parameter, 0, parameter.detach()
                continue
            shard, begin = parameter.ds_tensor.detach().view(-1), self.mesh.data.rank * parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
            held = max(0, min(shard.numel(), parameter.ds_numel - begin))  # type: ignore[attr-defined]
            yield parameter, begin, shard[:held]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What updates the partitions."""
        return self.engine.optimizer.optimizer  # type: ignore[no-any-return]

    @property
    def updated(self) -> Updated:
        """The tensors that the optimizer updates, and what they are made of."""
        zero = self.engine.optimizer
        groups = zero.fp16_groups if self.stage == 3 else zero.round_robin_bit16_groups
        contents = self._contents()
        return [
            (tensor, [Held(group[s.parameter], s.start, s.stop, s.begin) for s in contents[tensor].segments])
            for tensor, group in zip(self._partitions(), groups, strict=True)
        ]

    def restored(self) -> None:
        """Take note of state that was put in place."""
        if self.offload:  # DeepSpeed's CPU Adam counts its steps with an int
            for values in self.optimizer.state.values():
                values["step"] = int(values["step"])

    def _partitions(self) -> list[Tensor]:
        """The float32 masters that this rank updates, flat."""
        optimizer = self.engine.optimizer
        return optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups

    def _contents(self) -> dict[Tensor, Contents]:
        """Which parameters the partitions are made of."""
        optimizer, partitions, data = self.engine.optimizer, self._partitions(), self.mesh.data
        if self.stage == 3:
            sizes = ([p.ds_numel for p in group] for group in optimizer.fp16_groups)
            return {x: Contents.of_shards(data, n) for x, n in zip(partitions, sizes, strict=True)}
        groups = zip(partitions, optimizer.round_robin_bit16_offsets, optimizer.round_robin_bit16_groups, strict=True)
        return {
            x: Contents.of_slice(data.rank * len(x), (data.rank + 1) * len(x), offsets, [p.numel() for p in group])
            for x, offsets, group in groups
        }


def cpu_adam(groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> Any:
    """DeepSpeed's AdamW for state in host memory (arXiv 2101.06840), compiled at the first use; ValueError where it
    cannot be."""
    import_deepspeed()
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    class CpuAdam(DeepSpeedCPUAdam):
        """Its powers of the betas come from multiplying on step by step, in a process that resumes from ``pow``, which
        rounds otherwise: sent back to step 0, it takes ``pow`` at every step."""

        def step(self, closure: Any = None) -> Any:
            nothing = [torch.zeros(1) for _ in range(4)]
            self.ds_opt_adam.adam_update(self.opt_id, 0, 0.0, *betas, eps, 0.0, False, *nothing)
            return super().step(closure)

    try:
        return CpuAdam(groups, lr=lr, betas=betas, eps=eps, adamw_mode=True)
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"DeepSpeed's CPU Adam cannot be compiled here ({reason}): install ninja and a C++ compiler, or set "
            "parallel.offload_optimizer to false"
        ) from None
