"""What all architectures share: embeddings, the stack of layers, heads, and stage splitting.

An architecture (one file beside this one) subclasses ``LanguageModel`` and says only what differs: its configuration's
defaults, its layer, its embeddings' norm and positions, its Hugging Face keys, its FLOPs.

Shapes: b rows, s positions, p predictions a row, h hidden, v vocabulary.  Hidden states are [s, b, h], the one tensor
that flows between pipeline stages.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...kernels.dropout import DropoutKey, dropout, stream
from ...parallel.layers import Embedding, LayerNorm, VocabParallelEmbedding
from ...parallel.mesh import Mesh
from ..batch import Batch
from .config import ModelConfig
from .heads import LanguageModelHead, SentenceHead

EMBEDDING_DROPOUT = 0  # the only place of dropout of layer -1
HuggingFaceKeys = dict[str, tuple[str, ...]]


def layer_keys(logical: str, *huggingface: str) -> HuggingFaceKeys:
    """The weight and the bias of one layer (several: stacked along a new first dimension)."""
    return {f"{logical}.{kind}": tuple(f"{name}.{kind}" for name in huggingface) for kind in ("weight", "bias")}


@dataclasses.dataclass(frozen=True)
class Stage:
    """Which part of the model a pipeline rank holds."""

    layers: range
    first: bool
    last: bool

    @staticmethod
    def whole(config: ModelConfig) -> Stage:
        return Stage(range(config.num_hidden_layers), first=True, last=True)

    @staticmethod
    def of(config: ModelConfig, rank: int, size: int) -> Stage:
        """Consecutive layers, as evenly as they divide: earlier stages get the smaller share (the last has the head,
        but the first has the embedding and the deepest queue of activations)."""
        if size > config.num_hidden_layers:
            raise ValueError(
                f"{size} pipeline stages cannot share num_hidden_layers {config.num_hidden_layers}: "
                "set parallel.pipeline to at most the number of layers"
            )
        bounds = [config.num_hidden_layers * i // size for i in range(size + 1)]
        return Stage(range(bounds[rank], bounds[rank + 1]), first=rank == 0, last=rank == size - 1)


@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of a microbatch needs beside the hidden states.

    ``mask``: bool, broadcasts with [b, heads, s, s], True where a query sees a key; None: no restriction, or causal
    alone.  ``causal``: a query sees its own and earlier positions (already part of ``mask`` where there is one).
    ``dropout``: the keys of this microbatch's masks; None in evaluation.
    """

    mask: Tensor | None
    causal: bool
    positions: Tensor  # [s, 1] int64, index in the row: what dropout is keyed by
    dropout: DropoutKey | None

    @staticmethod
    def of(batch: Batch, *, causal: bool, dropout: DropoutKey | None) -> Context:
        documents = batch.document_ids
        length = documents.shape[1]
        index = torch.arange(length, device=documents.device)
        mask: Tensor | None = None
        if batch.attention == "document":
            mask = (documents.unsqueeze(2) == documents.unsqueeze(1)).unsqueeze(1)
        elif batch.attention == "padding":
            real = documents > 0
            mask = (real | ~real.any(1, keepdim=True))[:, None, None, :]  # a row without tokens must not divide by 0
        if causal and mask is not None:
            # A padded query before the first token sees itself, so that no row of the softmax is empty.
            before, same = index.unsqueeze(1) > index, index.unsqueeze(1) == index
            mask = (mask & before) | same
        return Context(mask, causal, index.unsqueeze(1), dropout)

    def keys(self, layer: int, place: int) -> Tensor | None:
        """Row keys [s, b] of one use of dropout on hidden states."""
        return None if self.dropout is None else self.dropout.rows(stream(layer, place), self.positions)


class LanguageModel(nn.Module):
    """One pipeline stage of a model (the whole, where there is one stage)."""

    name: ClassVar[str]
    config_class: ClassVar[type[ModelConfig]]
    heads_allowed: ClassVar[tuple[str, ...]] = ("lm",)
    embedding_norm: ClassVar[bool] = False
    embeddings: Embeddings  # on the first stage
    lm_head: LanguageModelHead  # on the last, where the heads include it

    def __init__(self, config: ModelConfig, mesh: Mesh, *, stage: Stage, heads: tuple[str, ...]) -> None:
        super().__init__()
        self.config, self.mesh, self.stage, self.heads = config, mesh, stage, heads
        if stage.first:
            self.embeddings = self.make_embeddings()
        self.layers = nn.ModuleDict({str(i): self.make_layer(i) for i in stage.layers})
        if stage.last:
            self.final_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
            if "lm" in heads:
                self.lm_head = LanguageModelHead(config, mesh, self.head_activation(), holds_embedding=stage.first)
            if "nsp" in heads:
                self.sentence_head = SentenceHead(config)

    # What an architecture says.

    def make_layer(self, index: int) -> nn.Module:
        """The layer of this index: forward(hidden [s, b, h], Context) → [s, b, h]."""
        raise NotImplementedError

    def make_embeddings(self) -> Embeddings:
        return Embeddings(self.config, self.mesh, norm=self.embedding_norm, positions=self.uses_position_table())

    def uses_position_table(self) -> bool:
        return True

    def position_ids(self, batch: Batch) -> Tensor:
        """Rows of the position table, [b, s]."""
        return batch.positions

    def head_activation(self) -> str:
        return self.config.hidden_act

    @classmethod
    def huggingface_keys(cls, config: ModelConfig, heads: tuple[str, ...]) -> HuggingFaceKeys:
        """Logical name → the Hugging Face tensors that it is (several: stacked along a new first dimension)."""
        raise NotImplementedError

    @classmethod
    def huggingface_aliases(cls, config: ModelConfig, heads: tuple[str, ...]) -> dict[str, str]:
        """Second names under which Hugging Face files may carry a tensor: alias → the name it repeats."""
        return {}

    @classmethod
    def huggingface_class(cls, heads: tuple[str, ...], config: ModelConfig) -> str:
        """The ``architectures`` entry of an exported config.json."""
        raise NotImplementedError

    @classmethod
    def huggingface_batch(cls, config: ModelConfig, batch: Batch) -> Batch:
        """Adjust a batch made from plain input_ids and attention_mask to what the Hugging Face class would do."""
        return batch

    @classmethod
    def flops_per_row(cls, config: ModelConfig, length: int, predictions: int) -> float:
        """Floating-point operations of a training step (forward and backward, nothing recomputed) for one row."""
        raise NotImplementedError

    # What follows from it.

    def forward(
        self,
        batch: Batch,
        hidden: Tensor | None = None,
        *,
        dropout: DropoutKey | None = None,
        output: Literal["loss", "logits"] = "loss",
        count_correct: bool = False,
    ) -> Any:
        """Run this stage.

        ``hidden``: [s, b, h] from the stage before; None on the first.  Returns [s, b, h], and on the last stage a
        dict: for "loss" ``lm_losses`` and ``lm_correct`` [b, p] (``sentence_losses``, ``sentence_correct`` [b] with the
        nsp head), in nats; for "logits" ``logits`` [b, s, v], ``last_hidden_state`` [b, s, h] (and
        ``seq_relationship_logits`` [b, 2]).
        """
        context = Context.of(batch, causal=self.config.is_decoder, dropout=dropout)
        if self.stage.first:
            hidden = self.embeddings(batch, self.position_ids(batch), context)
        assert hidden is not None, "a later stage needs the hidden states of the one before"
        for layer in self.layers.values():
            hidden = layer(hidden, context)
        if not self.stage.last:
            return hidden
        hidden = self.final_norm(hidden)
        return self._logits(hidden) if output == "logits" else self._losses(hidden, batch, count_correct)

    def _losses(self, hidden: Tensor, batch: Batch, count_correct: bool) -> dict[str, Tensor]:
        results: dict[str, Tensor] = {}
        if "lm" in self.heads:
            b, p = batch.labels.shape
            if batch.label_positions is None:
                features = hidden.flatten(0, 1)  # row i*b + j is position i of row j
                labels = batch.labels.t().flatten()
            else:
                features = hidden[batch.label_positions.t(), torch.arange(b, device=hidden.device)].flatten(0, 1)
                labels = batch.labels.t().flatten()
            losses, correct = self.lm_head.loss(features, self._word_weight(), labels, count_correct=count_correct)
            results["lm_losses"], results["lm_correct"] = losses.view(p, b).t(), correct.view(p, b).t()
        if "nsp" in self.heads:
            assert batch.sentence_labels is not None, "the nsp head needs sentence labels: use an objective with pairs"
            results |= self.sentence_head.loss(hidden[0], batch.sentence_labels)
        return results

    def _logits(self, hidden: Tensor) -> dict[str, Tensor]:
        results = {"last_hidden_state": hidden.transpose(0, 1)}
        if "lm" in self.heads:
            results["logits"] = self.lm_head.logits(hidden, self._word_weight()).transpose(0, 1)
        if "nsp" in self.heads:
            results["seq_relationship_logits"] = self.sentence_head(hidden[0])
        return results

    def _word_weight(self) -> Tensor:
        if self.config.tie_word_embeddings and self.stage.first:
            return self.embeddings.words.weight
        weight = self.lm_head.decoder.weight
        assert weight is not None, "an untied head, or one without the embedding beside it, owns its weight"
        return weight

    def tied_word_parameter(self) -> nn.Parameter | None:
        """The copy of the word embedding that this stage shares with another one, if it does."""
        if not self.config.tie_word_embeddings or (self.stage.first and self.stage.last) or "lm" not in self.heads:
            return None
        if self.stage.first:
            return self.embeddings.words.weight
        return self.lm_head.decoder.weight if self.stage.last else None


class Embeddings(nn.Module):
    """Words + token types + positions, then (in some architectures) a norm, then dropout.  → [s, b, h]"""

    def __init__(self, config: ModelConfig, mesh: Mesh, *, norm: bool, positions: bool) -> None:
        super().__init__()
        h, std = config.hidden_size, config.initializer_range
        self.p = config.hidden_dropout_prob
        self.words = VocabParallelEmbedding(mesh, config.vocab_size, h, std=std, padding_index=config.pad_token_id)
        self.types = Embedding(config.type_vocab_size, h, std=std)
        # Hugging Face keeps the table in its files for relative positions too, where nothing reads it.
        rows, padding = config.max_position_embeddings, config.position_padding_index
        self.positions = Embedding(rows, h, std=std, padding_index=padding)
        self.positions.weight.requires_grad_(positions)
        self.norm = LayerNorm(h, config.layer_norm_eps) if norm else None

    def forward(self, batch: Batch, position_ids: Tensor, context: Context) -> Tensor:
        x = self.words(batch.input_ids.t()) + self.types(batch.token_type_ids.t())
        if self.positions.weight.requires_grad:
            x = x + self.positions(position_ids.t())
        if self.norm is not None:
            x = self.norm(x)
        return dropout(x, self.p, context.keys(-1, EMBEDDING_DROPOUT))
