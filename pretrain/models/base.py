"""What all architectures share: embeddings, the stack of layers, heads, and stage splitting.

An architecture (one file beside this one) subclasses ``LanguageModel`` and says only what differs: its configuration's
defaults, its layer, its embeddings' norm and positions, its Hugging Face keys, its FLOPs.

Shapes: b rows, s positions, p predictions a row, h hidden, v vocabulary.  Hidden states are [s, b, h], the one tensor
that flows between pipeline stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...kernels.documents import Documents
from ...kernels.dropout import DropoutKey, stream
from ...parallel.layers import VocabParallelEmbedding
from ...parallel.mappings import gather_sequence, sequence_part
from ...parallel.mesh import Mesh
from ..batch import Batch
from .config import ModelConfig
from .heads import LanguageModelHead, SentenceHead
from .huggingface_keys import HuggingFaceKeys
from .own_code import OwnCode

Recompute = Literal["none", "selective", "full"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Which part of the model a pipeline rank holds: chunks of consecutive layers (one, but for the interleaved
    schedule), the embeddings before the first rank's first chunk, the heads after the last rank's last."""

    chunks: tuple[range, ...]
    first: bool
    last: bool

    @staticmethod
    def whole(config: ModelConfig) -> Stage:
        return Stage((range(config.num_hidden_layers),), first=True, last=True)

    @staticmethod
    def of(config: ModelConfig, rank: int, size: int, virtual_stages: int = 1) -> Stage:
        """Layers are shared as evenly as they divide: earlier chunks get the smaller share (the last has the head, but
        the first has the embedding and the deepest queue of activations).  Chunk v of rank r is the
        (v · ranks + r)-th of the model (arXiv 2104.04473, section 2.2)."""
        count = size * virtual_stages
        if count > config.num_hidden_layers:
            raise ValueError(
                f"{size} pipeline ranks × {virtual_stages} virtual stages cannot share num_hidden_layers "
                f"{config.num_hidden_layers}: set parallel.pipeline × parallel.virtual_stages to at most that"
            )
        bounds = [config.num_hidden_layers * i // count for i in range(count + 1)]
        places = range(rank, count, size)
        chunks = tuple(range(bounds[i], bounds[i + 1]) for i in places)
        return Stage(chunks, first=rank == 0, last=rank == size - 1)

    def begins(self, chunk: int) -> bool:
        """Whether the model begins with this chunk."""
        return self.first and chunk == 0

    def ends(self, chunk: int) -> bool:
        """Whether the model ends with this chunk."""
        return self.last and chunk == len(self.chunks) - 1


@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of a microbatch needs beside the hidden states.

    ``documents``: which tokens belong together.  ``attended``: which see one another: the same or, where attention
    stays within chunks, those of a chunk.  ``dropout``: the keys of this microbatch's masks; None in evaluation.
    ``part``: the positions whose hidden states this tensor rank has between products (without sequence parallelism,
    all).
    """

    documents: Documents
    attended: Documents
    positions: Tensor  # [s, 1] int64, index in the row: what dropout is keyed by
    starts: Tensor  # [s, b] int64, index in the row of the first token of each token's document
    dropout: DropoutKey | None
    part: slice
    recompute: Recompute
    encoder: Encoder | None = None
    cache: Cache | None = None

    @staticmethod
    def of(
        batch: Batch,
        mesh: Mesh,
        *,
        causal: bool,
        dropout: DropoutKey | None,
        recompute: Recompute = "none",
        attention_chunk: int | None = None,
        encoder: Encoder | None = None,
        cache: Cache | None = None,
    ) -> Context:
        indices = batch.indices
        documents = Documents.of(batch.document_ids, indices, batch.attention, causal=causal)
        attended = documents if attention_chunk is None else documents.chunks(attention_chunk, batch.positions)
        starts = (indices - batch.positions).t()
        part = sequence_part(indices.shape[1], mesh)
        return Context(
            documents, attended, indices[:1].t(), starts, dropout, part, recompute, encoder=encoder, cache=cache
        )

    @property
    def training(self) -> bool:
        return self.dropout is not None

    def keys(self, layer: int, place: int, *, whole: bool = False, by_feature: bool = False) -> Tensor | None:
        """Row keys [s, b] of one use of dropout on hidden states, of this rank's part of the sequence or the ``whole``.

        ``by_feature``: the same at all positions of a document, so that whole features are dropped.
        """
        if self.dropout is None:
            return None
        rows = self.dropout.rows(stream(layer, place), self.starts if by_feature else self.positions)
        return rows if whole else rows[self.part]

    def run(self, kind: Recompute, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """``function(*arguments)``, its activations kept, or computed again in the backward pass where the run says so
        for this kind: "full" a whole layer, "selective" what is large and quick to compute, such as the weights of
        attention (arXiv 2205.05198, section 5).  Dropout is keyed, so nothing but the arguments need be kept."""
        if kind != self.recompute or not torch.is_grad_enabled():
            return function(*arguments)
        # ZeRO 3 frees a weight after use: what is saved first and what is computed again differ in shape until then.
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, determinism_check="none")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What the decoder of an encoder–decoder model attends to."""

    hidden: Tensor  # [source, b, h]
    real: Tensor | None  # [b, source] bool; None: all


@dataclasses.dataclass(frozen=True)
class Cache:
    """What a causal model carries from the tokens it has seen to the next: ``seen``, how many of each row; by layer,
    whatever the architecture keeps.  A layer reads ``before`` and writes ``after``."""

    seen: int = 0
    before: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    after: dict[int, Any] = dataclasses.field(default_factory=dict)

    def next(self, tokens: int) -> Cache:
        """For the tokens that follow these."""
        return Cache(self.seen + tokens, self.after)


class LanguageModel(nn.Module):
    """One pipeline stage of a model (the whole, where there is one stage)."""

    name: ClassVar[str]
    config_class: ClassVar[type[ModelConfig]]
    own_code: ClassVar[OwnCode | None] = None  # files that an export carries
    heads_allowed: ClassVar[tuple[str, ...]] = ("lm",)
    unapplied_fields: ClassVar[tuple[str, ...]] = ()  # of stock configurations, which no released code applies
    has_cache: ClassVar[bool] = False  # whether tokens can be given a few at a time (see Cache)
    # Those of kernels/forms.py that it runs: a run builds them ahead, and says in which form.
    operations: ClassVar[tuple[str, ...]] = ("dropout", "layer_norm", "activation", "lm_head")
    embeddings: Embeddings  # on the first stage
    lm_head: LanguageModelHead  # on the last, where the heads include it

    def __init__(self, config: ModelConfig, mesh: Mesh, *, stage: Stage, heads: tuple[str, ...]) -> None:
        super().__init__()
        self.config, self.mesh, self.stage, self.heads = config, mesh, stage, heads
        if stage.first:
            self.embeddings = self.make_embeddings()
        self.layers = nn.ModuleDict({str(i): self.make_layer(i) for chunk in stage.chunks for i in chunk})
        if stage.last:
            self.final_norm = self.make_final_norm()
            if "lm" in heads:
                self.lm_head = self.make_head()
            if "nsp" in heads:
                self.sentence_head = SentenceHead(config)

    # What an architecture says.

    def make_layer(self, index: int) -> nn.Module:
        """The layer of this index: forward(hidden [s, b, h], Context) → [s, b, h]."""
        raise NotImplementedError

    def make_embeddings(self) -> Embeddings:
        raise NotImplementedError

    def embed(self, batch: Batch, context: Context) -> Tensor:
        """The first hidden states of this rank's positions."""
        return self.embeddings(batch, context)

    def make_final_norm(self) -> nn.Module | None:
        """What follows the last layer, if anything."""
        return None

    def make_head(self) -> LanguageModelHead:
        return LanguageModelHead(self.config, self.mesh, holds_embedding=self.stage.first)

    @classmethod
    def huggingface_keys(cls, config: ModelConfig, heads: tuple[str, ...]) -> HuggingFaceKeys:
        """The Hugging Face tensors that each logical tensor is."""
        raise NotImplementedError

    @classmethod
    def huggingface_aliases(cls, config: ModelConfig, heads: tuple[str, ...]) -> dict[str, str]:
        """Second names under which Hugging Face files may carry a tensor: alias → the name it repeats."""
        return {}

    @classmethod
    def huggingface_constants(cls, config: ModelConfig, heads: tuple[str, ...]) -> dict[str, Tensor]:
        """Tensors of Hugging Face files that say nothing: written to an export, not read from one."""
        return {}

    @classmethod
    def huggingface_class(cls, heads: tuple[str, ...], config: ModelConfig) -> str:
        """The ``architectures`` entry of an exported config.json."""
        raise NotImplementedError

    @classmethod
    def stock_difference(cls, config: ModelConfig) -> str | None:
        """Why the stock classes of transformers give other logits, if they do."""
        return None

    @classmethod
    def stock_note(cls, config: ModelConfig) -> str | None:
        """What someone who loads an export in stock classes must know, if anything."""
        return config.export_note

    @classmethod
    def stock_fields(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """What configuration fields are where a stock config.json has these: what it means without saying it, or says
        without meaning it."""
        return {}

    @classmethod
    def import_note(cls, fields: Mapping[str, Any]) -> str | None:
        """What is peculiar in a config.json with these fields, if anything."""
        return None

    @classmethod
    def huggingface_batch(cls, config: ModelConfig, batch: Batch) -> Batch:
        """Adjust a batch made from plain input_ids and attention_mask to what the Hugging Face class would do."""
        return batch

    @classmethod
    def flops_per_row(cls, config: ModelConfig, length: float, predictions: float) -> float:
        """Floating-point operations of a training step (forward and backward, nothing recomputed) for one row."""
        raise NotImplementedError

    # What follows from it.

    def forward(
        self,
        batch: Batch,
        hidden: Tensor | None = None,
        *,
        chunk: int = 0,
        dropout: DropoutKey | None = None,
        output: Literal["loss", "logits"] = "loss",
        recompute: Recompute = "none",
        count_correct: bool = False,
        encoder: Encoder | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Run one chunk of this stage.

        ``hidden``: [s, b, h] from the chunk before (under sequence parallelism a part of the positions); None for the
        first.  ``recompute``: which activations the backward pass computes again.  ``encoder``: see ``Encoder``.
        ``cache``: of the tokens before these (``has_cache``); its ``after`` is filled.  Returns [s, b, h], and
        for the model's last chunk a dict: for "loss" ``lm_losses`` and ``lm_correct`` [b, p] (``sentence_losses``,
        ``sentence_correct`` [b] with the nsp head), in nats; for "logits" ``logits`` [b, s, v], ``last_hidden_state``
        [b, s, h] (and ``seq_relationship_logits`` [b, 2]).
        """
        context = Context.of(
            batch, self.mesh, causal=self.config.is_decoder, dropout=dropout, recompute=recompute,
            attention_chunk=self.config.attention_chunk, encoder=encoder, cache=cache,
        )  # fmt: skip
        if self.stage.begins(chunk):
            hidden = self.embed(batch, context)
        assert hidden is not None, "a later chunk needs the hidden states of the one before"
        for index in self.stage.chunks[chunk]:
            hidden = context.run("full", self.layers[str(index)], hidden, context)
        if not self.stage.ends(chunk):
            return hidden
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        hidden = gather_sequence(hidden, self.mesh)
        return self._logits(hidden) if output == "logits" else self._losses(hidden, batch, count_correct)

    def _losses(self, hidden: Tensor, batch: Batch, count_correct: bool) -> dict[str, Tensor]:
        results: dict[str, Tensor] = {}
        if "lm" in self.heads:
            b, p = batch.labels.shape
            predicted = hidden if batch.label_positions is None else batch.at(hidden, batch.label_positions)
            features, labels = predicted.flatten(0, 1), batch.labels.t().flatten()  # [p, b, h], the rows innermost
            losses, correct = self.lm_head.loss(features, self._word_weight(), labels, count_correct=count_correct)
            results["lm_losses"], results["lm_correct"] = losses.view(p, b).t(), correct.view(p, b).t()
        if "nsp" in self.heads:
            assert batch.sentence_labels is not None, "the nsp head needs sentence labels: use an objective with pairs"
            results |= self.sentence_head.loss(batch.at(hidden, batch.first_positions)[0], batch.sentence_labels)
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
    """The words' embeddings; an architecture subclasses and adds what else it has, and ``forward``."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        h, std, padding = config.hidden_size, config.initializer_range, config.pad_token_id
        self.words = VocabParallelEmbedding(mesh, config.vocab_size, h, std=std, padding_index=padding)
