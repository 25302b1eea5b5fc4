"""FNet (arXiv 2105.03824): a Fourier transform in place of attention.  The example of docs/add-an-architecture.md.

Shapes: b rows, s positions, h hidden.
"""

from __future__ import annotations

import math

import torch
from pydantic import model_validator
from torch import Tensor, nn

from farspan.parallel.layers import Linear
from farspan.parallel.mappings import gather_sequence, scatter_sequence
from farspan.parallel.mesh import Mesh
from farspan.parallel.normalization import LayerNorm
from farspan.pretrain.batch import Batch
from farspan.pretrain.models.base import Context
from farspan.pretrain.models.bert import BertConfig, BertEmbeddings, BertModel, embedding_keys, head_aliases, head_keys
from farspan.pretrain.models.config import ModelConfig
from farspan.pretrain.models.feed_forward import FeedForward
from farspan.pretrain.models.huggingface_keys import HuggingFaceKeys, layer_keys

FEED_FORWARD_OUTPUT = 0  # the only place of dropout in a layer


class FNetConfig(BertConfig):
    """Fields and defaults of Hugging Face's FNetConfig."""

    model_type: str = ModelConfig.with_default("model_type", "fnet")
    hidden_act: str = BertConfig.with_default("hidden_act", "gelu_new")
    type_vocab_size: int = ModelConfig.with_default("type_vocab_size", 4)
    pad_token_id: int | None = ModelConfig.with_default("pad_token_id", 3)
    bos_token_id: int | None = ModelConfig.with_default("bos_token_id", 1)
    eos_token_id: int | None = ModelConfig.with_default("eos_token_id", 2)

    @model_validator(mode="after")
    def _check_direction(self) -> FNetConfig:
        if self.is_decoder:
            raise ValueError("is_decoder true does not go with fnet, which mixes all positions: set it to false")
        return self

    @property
    def export_note(self) -> str:
        return "transformers' FNet mixes padding into every token: give it rows without padding"


def fourier_mixing(x: Tensor, documents: Tensor) -> Tensor:
    """Re(F_n x F_h) (section 3.2, equation 3) of each document of n tokens by itself, computed in float32.

    F_n is the n-point discrete Fourier transform over a document's positions, F_h that over the features.  A document's
    result depends on no other in the row; padding is one more document, which no real token sees.
    x: [s, b, h]; documents: [b, s] int64 → [s, b, h].
    """
    features = torch.fft.fft(x.transpose(0, 1).float())  # x F_h, [b, s, h] complex
    same = documents.unsqueeze(2) == documents.unsqueeze(1)  # [b, s, s]
    place, length = same.tril(-1).sum(2), same.sum(2)  # [b, s]: index in the document, tokens of the document
    turns = place.unsqueeze(2) * place.unsqueeze(1) % length.unsqueeze(2)  # of 2π / n; whole numbers, so exact
    angle = turns * (2 * math.pi / length.unsqueeze(2))
    mixed = (angle.cos() * same) @ features.real + (angle.sin() * same) @ features.imag
    return mixed.transpose(0, 1).to(x.dtype)


class FNetLayer(nn.Module):
    """norm(x + mixing(x)), then norm(x + feed-forward(x)): figure 1, the norms after the branches."""

    def __init__(self, config: FNetConfig, mesh: Mesh, index: int) -> None:
        super().__init__()
        self.index, self.mesh, self.p = index, mesh, config.hidden_dropout_prob
        self.mixing_norm = LayerNorm(mesh, config.hidden_size, config.layer_norm_eps)
        h, inner = config.hidden_size, config.intermediate_size
        self.feed_forward = FeedForward(mesh, h, inner, activation=config.hidden_act, std=config.initializer_range)
        self.feed_forward_norm = LayerNorm(mesh, config.hidden_size, config.layer_norm_eps)

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        # Mixing needs all positions and features, so every tensor rank does all of it.
        whole = gather_sequence(hidden, self.mesh)
        mixed = context.run("selective", fourier_mixing, whole, context.documents.document_ids)
        x = self.mixing_norm(hidden + scatter_sequence(mixed, self.mesh))
        keys = context.keys(self.index, FEED_FORWARD_OUTPUT)
        return self.feed_forward_norm.after_dropout_add(self.feed_forward(x), x, self.p, keys)[1]


class FNetEmbeddings(BertEmbeddings):
    """The usual three tables and a norm, then a projection (of h to h features, as released)."""

    def __init__(self, config: FNetConfig, mesh: Mesh) -> None:
        super().__init__(config, mesh, norm=True, positions=True)
        self.projection = Linear(mesh, config.hidden_size, config.hidden_size, std=config.initializer_range)

    def embed(self, batch: Batch, position_ids: Tensor, context: Context) -> Tensor:
        return self.projection(super().embed(batch, position_ids, context))


class FNet(BertModel):
    name = "fnet"
    config_class = FNetConfig
    heads_allowed = ("lm", "nsp")
    config: FNetConfig

    def make_layer(self, index: int) -> FNetLayer:
        return FNetLayer(self.config, self.mesh, index)

    def make_embeddings(self) -> FNetEmbeddings:
        return FNetEmbeddings(self.config, self.mesh)

    def make_final_norm(self) -> None:
        return None  # every layer ends in one

    @classmethod
    def huggingface_keys(cls, config: ModelConfig, heads: tuple[str, ...]) -> HuggingFaceKeys:
        prefix = "fnet." if heads else ""
        keys = embedding_keys(prefix)
        keys |= layer_keys("embeddings.norm", f"{prefix}embeddings.LayerNorm")
        keys |= layer_keys("embeddings.projection", f"{prefix}embeddings.projection")
        for i in range(config.num_hidden_layers):
            ours, layer = f"layers.{i}", f"{prefix}encoder.layer.{i}"
            keys |= layer_keys(f"{ours}.mixing_norm", f"{layer}.fourier.output.LayerNorm")
            keys |= layer_keys(f"{ours}.feed_forward.up", f"{layer}.intermediate.dense")
            keys |= layer_keys(f"{ours}.feed_forward.down", f"{layer}.output.dense")
            keys |= layer_keys(f"{ours}.feed_forward_norm", f"{layer}.output.LayerNorm")
        return keys | head_keys(config, heads, prefix)

    @classmethod
    def huggingface_aliases(cls, config: ModelConfig, heads: tuple[str, ...]) -> dict[str, str]:
        return head_aliases(config, heads, "fnet.")

    @classmethod
    def huggingface_class(cls, heads: tuple[str, ...], config: ModelConfig) -> str:
        names = {(): "FNetModel", ("lm",): "FNetForMaskedLM", ("nsp",): "FNetForNextSentencePrediction"}
        return names.get(heads, "FNetForPreTraining")

    @classmethod
    def flops_per_row(cls, config: ModelConfig, length: float, predictions: float) -> float:
        """Three times the forward products, but for mixing, which has no weights: twice (the transform over features,
        of the order h log h a position, is not counted)."""
        h, i, v = config.hidden_size, config.intermediate_size, config.vocab_size
        feed_forward, mixing = 4 * length * h * i, 4 * length * length * h
        ends = 2 * length * h * h + 2 * predictions * (h * h + h * v)
        return config.num_hidden_layers * (3.0 * feed_forward + 2.0 * mixing) + 3.0 * ends
