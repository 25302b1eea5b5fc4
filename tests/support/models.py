"""Tiny models with noise in every parameter, and batches for them: what the tests of models and layouts run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farspan.kernels.documents import AttentionKind
from farspan.kernels.dropout import DropoutKey
from farspan.parallel.mesh import Axis, Mesh
from farspan.parallel.sharding import initial_value, logical_name, logical_of
from farspan.parallel.state import Local, share
from farspan.pretrain import checkpoint as ckpt
from farspan.pretrain.batch import Batch
from farspan.pretrain.losses import Counts, LossFunction
from farspan.pretrain.models import architecture
from farspan.pretrain.models.base import LanguageModel, Stage
from farspan.pretrain.models.config import ModelConfig

TINY = {
    "vocab_size": 129,  # no tensor size divides it
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "shared_representation_size": 16,
    "nffn_hidden_size": 40,
    "ema_projection_size": 4,
    "max_positions": 24,
}
LENGTH = 16


@dataclasses.dataclass(frozen=True)
class Description:
    """A model, in terms that can be sent to another process."""

    model_type: str
    fields: dict[str, Any]
    dtype: torch.dtype = torch.float32
    length: int = LENGTH  # of the rows of its batches

    @property
    def config(self) -> ModelConfig:
        kind = architecture(self.model_type).config_class
        tiny = {name: value for name, value in TINY.items() if name in kind.model_fields}
        if (weights := "attention_probs_dropout_prob") in tiny and kind.model_fields[weights].default == 0:
            del tiny[weights]  # an architecture that has none
        return kind(**tiny | self.fields)

    @property
    def heads(self) -> tuple[str, ...]:
        return ("lm",) if self.config.is_decoder else architecture(self.model_type).heads_allowed

    def build(self, mesh: Mesh, stage: Stage | None = None) -> LanguageModel:
        config = self.config
        return architecture(self.model_type)(config, mesh, stage=stage or Stage.whole(config), heads=self.heads)

    def filled(self, mesh: Mesh, stage: Stage | None = None) -> LanguageModel:
        model = self.build(mesh, stage)
        fill(model, mesh.tensor)
        return model.to(self.dtype)

    def batch(self, attention: AttentionKind) -> Batch:
        return make_batch(self.config, attention, length=self.length)


@torch.no_grad()
def fill(module: nn.Module, axis: Axis, std: float = 0.1) -> None:
    """Noise keyed by name, biases and norms included: nothing can be left out or counted twice unseen."""
    for name, parameter in module.named_parameters():
        logical = logical_of(parameter)
        noisy = dataclasses.replace(logical, std=std)
        whole = initial_value(logical_name(name, parameter), noisy, seed=5) + logical.fill
        parameter.copy_(logical.slice(whole, axis, parameter.shape))


def make_batch(config: ModelConfig, attention: AttentionKind, *, rows: int = 4, length: int = LENGTH) -> Batch:
    """Random rows of one document, of one document and padding, or of several documents."""
    generator = torch.Generator().manual_seed(3)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    ids = integers(3, config.vocab_size, rows, length)
    documents = torch.ones(rows, length, dtype=torch.int64)
    index = torch.arange(length).expand(rows, length)
    positions = index.clone()
    if attention == "padding":
        lengths = torch.linspace(length // 3, length, rows).long().unsqueeze(1)
        documents = (index < lengths).long()
    elif attention == "document":
        starts = torch.zeros(rows, length, dtype=torch.bool)
        for row in range(rows):
            starts[row, torch.tensor([0, 3 + row, 9 + row]) * length // 16] = True
        documents = starts.long().cumsum(1)
        positions = index - torch.where(starts, index, 0).cummax(1).values
    if config.pad_token_id is not None:
        ids[documents == 0] = config.pad_token_id
    if config.is_decoder:
        label_positions, labels = None, integers(3, config.vocab_size, rows, length)
        weights = (documents > 0).float()
        weights[:, -1] = 0
    else:
        chosen = torch.stack([torch.randperm(length // 3, generator=generator)[:4].sort().values for _ in range(rows)])
        label_positions, labels = chosen, integers(3, config.vocab_size, rows, 4)
        weights = torch.ones(rows, 4)
        weights[0, 2:] = 0
        label_positions[0, 2:] = 0
    return Batch(
        input_ids=ids,
        document_ids=documents,
        positions=positions * (documents > 0),
        token_type_ids=integers(0, config.type_vocab_size, rows, length),
        sample_ids=torch.arange(70, 70 + rows),
        attention=attention,
        labels=labels,
        label_weights=weights,
        label_positions=label_positions,
        sentence_labels=integers(0, 2, rows),
    )


def dropout_key(batch: Batch, step: int = 11) -> DropoutKey:
    return DropoutKey(9, step, batch.sample_ids)


def loss_of(model: LanguageModel, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
    """The loss of a training step on this batch alone."""
    return LossFunction(model.heads)(outputs, batch, counts_of(batch))[0]


def counts_of(batch: Batch) -> Counts:
    """As if this were the whole global batch."""
    return Counts(batch.label_weights.sum().item(), batch.rows, (batch.document_ids > 0).sum().item())


@dataclasses.dataclass(frozen=True)
class Result:
    """What a training pass gives on one rank: numbers that all ranks have, and (Logical, local gradient) by name."""

    outputs: dict[str, Tensor]
    gradients: dict[str, tuple[Any, Tensor]]


def training_pass(model: LanguageModel, batch: Batch, dropout: DropoutKey | None) -> Result:
    """Losses, logits and gradients."""
    model.zero_grad()
    outputs = model(batch, dropout=dropout, count_correct=True)
    loss = loss_of(model, outputs, batch)
    loss.backward()
    with torch.no_grad():
        outputs = outputs | model(batch, output="logits")
    return Result(
        {"loss": loss.detach(), **{name: value.detach() for name, value in outputs.items()}},
        {n: (logical_of(p), p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None},
    )


def save_weights(model: LanguageModel, mesh: Mesh, root: Path, manifest: ckpt.Manifest, *, factor: float = 1.0) -> Path:
    """As a training run saves them, times a factor; collective.  Returns the folder."""
    local = Local.of(model, mesh.tensor)
    pieces = [
        piece
        for parameter in model.parameters()
        for piece in local.pieces("weight", parameter, 0, (parameter.detach() * factor).to(parameter.dtype), True)
    ]
    (saved,) = ckpt.Saver(root, mesh, ckpt.Retention()).save(manifest, share(pieces, mesh.data), {})
    assert saved.problem is None
    return saved.folder
