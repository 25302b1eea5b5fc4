"""The two sides of `farspan bench train`: Farspan's training step, and transformers' model in a plain loop."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import socket
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from ...parallel.mesh import Mesh
from .. import run
from ..losses import Counts, LossFunction
from ..resume import Start
from .train_models import Dropout, Setup

RATE, CLIP, SEED = 1e-4, 1.0, 1234
CLASSES = {
    "mega": "Mega",
    "megatron-bert": "MegatronBert",
    "mra": "Mra",
    "nystromformer": "Nystromformer",
    "roberta-prelayernorm": "RobertaPreLayerNorm",
}


class Unable(Exception):
    """A side cannot run this model here; says why in a few words."""


class Side(Protocol):
    attention: str

    def load(self, rows: int) -> None:
        """Make the batch that steps are done on."""

    def step(self) -> float:
        """One optimizer step, done when this returns; the loss."""


@contextlib.contextmanager
def one_rank(device: torch.device) -> Iterator[Mesh]:
    """The mesh of a single process, in process groups as in training, for as long as the block lasts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    before = {name: os.environ.get(name) for name in alone}
    os.environ.update(alone)
    try:
        mesh = Mesh.create(1, 1, device=device)
        try:
            yield mesh
        finally:
            mesh.destroy()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class FarspanSide:
    """What ``farspan train`` does in a step, but for reading data and writing metrics."""

    attention = "its own"

    def __init__(self, setup: Setup, mesh: Mesh, dtype: torch.dtype, dropout: Dropout) -> None:
        self.setup, self.mesh, self.dtype, self.dropout = setup, mesh, dtype, dropout
        self.config = setup.config(rows=1, dtype=dtype, dropout=dropout)
        self.loss = LossFunction(self.config.heads)
        self.engine = run.build_engine(self.config, mesh, Start(0, None, False), self.loss)
        self.steps = 0

    def load(self, rows: int) -> None:
        self.config = self.setup.config(rows=rows, dtype=self.dtype, dropout=self.dropout)
        batch = self.setup.batch(rows, SEED)
        self.batch = batch.pin_memory() if self.mesh.device.type == "cuda" else batch
        self.counts = Counts.of(batch, self.mesh)

    def step(self) -> float:
        result = self.engine.train_batch(
            *run.microbatches_of(self.config, self.mesh, self.batch, self.batch.rows),
            run.stage_runner(self.mesh, dropout=(SEED, self.steps)),
            functools.partial(self.loss, counts=self.counts),
            learning_rate=RATE,
        )
        self.steps += 1
        return self.loss.means(result.statistics, self.counts).loss


class TransformersSide:
    """transformers' model with its own loss in the same dtype, fused AdamW and clipping."""

    def __init__(self, setup: Setup, device: torch.device, dtype: torch.dtype, dropout: Dropout) -> None:
        self.setup, self.device = setup, device
        model, self.attention = _best(setup, device, dtype, dropout)
        self.model = model.to(device=device, dtype=dtype).train()
        _require_attention(setup.architecture)
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def load(self, rows: int) -> None:
        batch = self.setup.batch(rows, SEED)
        assert batch.label_positions is not None
        labels = torch.full_like(batch.input_ids, -100).scatter(1, batch.label_positions, batch.labels)
        self.batch = {"input_ids": batch.input_ids.to(self.device), "labels": labels.to(self.device)}

    def step(self) -> float:
        loss = self.model(**self.batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def _best(setup: Setup, device: torch.device, dtype: torch.dtype, dropout: Dropout) -> tuple[Any, str]:
    """The model with the fastest attention that its class has here, and that attention's name."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise Unable("not installed") from None
    name = CLASSES[setup.architecture]
    config_class, model_class = (getattr(transformers, f"{name}{kind}", None) for kind in ("Config", "ForMaskedLM"))
    if config_class is None or model_class is None:
        raise Unable(f"transformers {transformers.__version__} has no {setup.architecture}")
    fields = {key: value for key, value in setup.fields(dropout).items() if key != "model_type"}
    names = ["sdpa", "eager"]
    if device.type == "cuda" and dtype != torch.float32 and importlib.util.find_spec("flash_attn"):
        names.insert(0, "flash_attention_2")
    for attention in names:
        try:
            return model_class._from_config(config_class(**fields), attn_implementation=attention), attention
        except (ImportError, ValueError, TypeError):  # not in this class, not installed, or no such choice at all
            continue
    return model_class(config_class(**fields)), "its own"


def _require_attention(name: str) -> None:
    """transformers' MRA computes zeros where its kernel was not built."""
    if name != "mra":
        return
    module = importlib.import_module("transformers.models.mra.modeling_mra")
    if getattr(module, "mra_cuda_kernel", None) is None and getattr(module, "cuda_kernel", None) is None:
        raise Unable("its attention needs a CUDA kernel, which is not there")
