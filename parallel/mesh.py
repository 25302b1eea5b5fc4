"""The mesh: tensor, pipeline and data sizes, this rank's place on each axis, and the process groups.

Ranks are ordered as megatron-core orders them (tensor fastest, then data, then pipeline).  The mesh is built once and
passed explicitly; nothing but this module writes megatron-core's global state, and nothing but megatron-core reads it.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .memory import keep_freed_memory

T = TypeVar("T")


class SoloGroup:
    """Stands for a process group of one where torch.distributed is not initialised."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def even_share(count: int, index: int, parts: int) -> range:
    """Stretch ``index`` of ``parts`` of ``count`` things: where they do not divide, the first are one longer."""
    size, longer = divmod(count, parts)
    first = index * size + min(index, longer)
    return range(first, first + size + (index < longer))


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of the mesh: this rank's index on it, its length, and the ranks along it."""

    rank: int
    size: int
    group: Any  # a torch.distributed process group, or a SoloGroup

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def last(self) -> bool:
        return self.rank == self.size - 1

    def all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """In place over the ranks of the axis; nothing to do for one."""
        if self.size > 1:
            dist.all_reduce(x, op=op, group=self.group)
        return x


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Where this rank stands.  ``embedding`` holds the first and last pipeline stages (they share the tied embedding);
    ``model`` is the tensor × pipeline group of one data rank."""

    tensor: Axis
    pipeline: Axis
    data: Axis
    model: Axis
    embedding: Any
    device: torch.device
    sequence_parallel: bool = False  # between tensor-parallel products each tensor rank has a part of the sequence
    virtual_stages: int = 1  # chunks of layers a pipeline rank holds (interleaved schedule)

    @property
    def rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def size(self) -> int:
        return self.tensor.size * self.pipeline.size * self.data.size

    @property
    def is_writer(self) -> bool:
        """True on the one rank that writes console, metrics and manifests."""
        return self.rank == 0

    def first_problem(self, problem: str | None) -> str | None:
        """The first rank's problem, in words, for all of them; None where no rank has one.  Collective."""
        return self._first(None if problem is None else f"rank {self.rank}: {problem}" if self.size > 1 else problem)

    def alike(self, action: Callable[[], T]) -> T:
        """What ``action`` returns on this rank, where it goes well on all; a ValueError or OSError of one is raised on
        all of them, so that none waits for it.  ``action`` is not collective, this is."""
        result: T | None = None
        error: Exception | None = None
        try:
            result = action()
        except (ValueError, OSError) as raised:
            error = raised
        if (first := self._first(error)) is not None:
            raise first
        return result  # type: ignore[return-value]

    def _first(self, said: T | None) -> T | None:
        """What the first rank has to say of those that have."""
        if not dist.is_initialized():
            return said
        found = torch.tensor(float(said is not None), device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)  # nearly always nothing: no words of a thousand ranks then
        if not found.item():
            return None
        everywhere: list[T | None] = [None] * self.size
        dist.all_gather_object(everywhere, said)
        return next((one for one in everywhere if one is not None), None)

    def tell(self, find: Callable[[], T]) -> T:
        """What ``find`` returns on the writer, on all ranks; a ValueError or OSError of its own is raised on all of
        them.  A file system may show other nodes what was there before.  Collective."""
        told: list[Any] = [None, None]
        if self.is_writer:
            try:
                told[0] = find()
            except (ValueError, OSError) as error:
                told[1] = error
        if self.size > 1:
            dist.broadcast_object_list(told, src=0, device=self.device)
        if told[1] is not None:
            raise told[1]
        return told[0]  # type: ignore[no-any-return]

    def describe(self) -> str:
        sequence = " with sequence parallelism" if self.sequence_parallel else ""
        chunks = f" in {self.virtual_stages} chunks" if self.virtual_stages > 1 else ""
        return f"tensor {self.tensor.size}{sequence} × pipeline {self.pipeline.size}{chunks} × data {self.data.size}"

    @staticmethod
    def solo(device: torch.device | str = "cpu") -> Mesh:
        """One process, no process groups: what ``farspan.load`` and conversion use."""
        axis = Axis(0, 1, SoloGroup())
        return Mesh(axis, axis, axis, axis, axis.group, torch.device(device))

    @staticmethod
    def create(
        tensor: int,
        pipeline: int,
        *,
        device: torch.device,
        sequence_parallel: bool = False,
        virtual_stages: int = 1,
        timeout_seconds: float = 1800.0,
    ) -> Mesh:
        """Start torch.distributed from the environment (env://) and build the groups; collective over all ranks.

        Raises ValueError where tensor × pipeline does not divide the number of ranks, or an option has no axis.
        """
        from .megatron import parallel_state

        if sequence_parallel and tensor == 1:
            raise ValueError("sequence parallelism splits over the tensor ranks: set parallel.tensor to 2 or more")
        if virtual_stages > 1 and pipeline == 1:
            raise ValueError("virtual stages interleave over the pipeline ranks: set parallel.pipeline to 2 or more")
        if not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            else:
                keep_freed_memory()
            timeout = datetime.timedelta(seconds=timeout_seconds)
            store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=dist.PrefixStore(start_name(), store),
                rank=rank,
                world_size=size,
                timeout=timeout,
            )
        world = dist.get_world_size()
        if world % (tensor * pipeline):
            raise ValueError(
                f"{world} ranks do not divide by tensor {tensor} × pipeline {pipeline}: "
                "set parallel.tensor and parallel.pipeline, or start another number of ranks"
            )
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=virtual_stages if virtual_stages > 1 else None,
            distributed_timeout_minutes=timeout_seconds / 60,  # groups do not inherit it
            create_gloo_process_groups=False,  # beside NCCL's, for checkpoints of megatron-core's own
        )
        mesh = Mesh(
            tensor=_axis(parallel_state.get_tensor_model_parallel_group()),
            pipeline=_axis(parallel_state.get_pipeline_model_parallel_group()),
            data=_axis(parallel_state.get_data_parallel_group()),
            model=_axis(parallel_state.get_model_parallel_group()),
            embedding=parallel_state.get_embedding_group(check_initialized=False),
            device=device,
            sequence_parallel=sequence_parallel,
            virtual_stages=virtual_stages,
        )
        expected = mesh.tensor.rank + tensor * (mesh.data.rank + mesh.data.size * mesh.pipeline.rank)
        assert dist.get_rank() == expected, "megatron-core orders ranks as tensor, data, pipeline"
        return mesh

    def destroy(self) -> None:
        """Leave the process groups; nothing collective may follow."""
        from .megatron import parallel_state

        if dist.is_initialized():
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def start_name(environ: Mapping[str, str] = os.environ) -> str:
    """A name for this start of the ranks.

    Torchrun's agent may start ranks again with its own store, which still has the addresses of those before them, at
    which gloo would wait for nobody, until its timeout.  Where each start has a store of its own, agents' counts say
    nothing: each counts its restarts, and not those for a node that came or went.
    """
    shared = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return f"farspan-{environ.get('TORCHELASTIC_RESTART_COUNT', 0) if shared else 0}-{environ.get('WORLD_SIZE')}"


def _axis(group: Any) -> Axis:
    return Axis(dist.get_rank(group), dist.get_world_size(group), group)


def local_device(local_rank: int) -> torch.device:
    """The GPU of this local rank where there is one, else the CPU.  A launcher may show each rank its own GPU alone."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if count == 1:
            return torch.device("cuda", 0)
        if local_rank >= count:
            raise ValueError(f"local rank {local_rank} has no GPU of its own: this node has {count}; start fewer ranks")
        return torch.device("cuda", local_rank)
    return torch.device("cpu")
