"""MEGA's attention: to the own sequence, with a moving average before it, and to an encoder's.

Between the norm before a layer and the residual after it every tensor rank has its own features at all positions
(``parallel.feature_layers``): of the moving average, the values, the gates and the output.  The shared representation,
which queries and keys are made of, is small; every rank has all of it.

Shapes: b rows, s positions, h hidden, z shared representation, v values; /t: split over the tensor group.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....kernels.activation import ACTIVATIONS
from ....kernels.attention import attention, attention_to
from ....kernels.dropout import dropout, stream
from ....kernels.ema import EmaState, ema
from ....parallel.feature_layers import (
    FeatureLinear,
    FeatureParameter,
    FeatureReduceLinear,
    SharedLinear,
    SharedParameter,
)
from ....parallel.mappings import copy_to_tensor_region, from_features, gather_features, gather_for_shares, to_features
from ....parallel.mesh import Mesh
from ....parallel.normalization import BatchNorm, Norm, norm_of
from ..base import Context
from .config import MegaConfig

NORM_EPS = 1e-5
ROTARY_BASE = 10000.0
# Places of dropout within a layer (see kernels.dropout.stream).
EMA_OUTPUT, VALUES, WEIGHTS, OUTPUT = 0, 1, 2, 3
CROSS_VALUES, CROSS_WEIGHTS, CROSS_OUTPUT = 4, 5, 6
FEED_FORWARD_INNER, FEED_FORWARD_OUTPUT = 7, 8


class DampedEma(nn.Module):
    """SiLU(EMA(x) + ω x) of this rank's features (arXiv 2209.10655, section 3.1; as released)."""

    def __init__(self, config: MegaConfig, mesh: Mesh) -> None:
        super().__init__()
        shape = (2 if config.bidirectional else 1, config.hidden_size, config.ema_projection_size)
        near, wide = config.ema_delta_alpha_range, config.ema_gamma_omega_range
        self.truncation = config.truncation
        self.damping = FeatureParameter(mesh, *shape, dim=1, std=near)
        self.decay = FeatureParameter(mesh, *shape, dim=1, std=near)
        self.expansion = FeatureParameter(mesh, *shape, dim=1, std=config.ema_beta_range, means=(1.0, -1.0))
        self.projection = FeatureParameter(mesh, *shape, dim=1, std=wide)
        self.residual = FeatureParameter(mesh, config.hidden_size, dim=0, std=wide)

    def forward(self, x: Tensor, context: Context, state: EmaState | None) -> tuple[Tensor, EmaState | None]:
        """x: [s, b, h/t] → the same, and the state after the last position where the context carries one."""
        y, state = ema(
            x, self.damping(), self.decay(), self.expansion(), self.projection(), documents=context.documents,
            state=state, carry=context.cache is not None, truncation=self.truncation,
        )  # fmt: skip
        return F.silu(torch.addcmul(y, x, self.residual())), state


class SimpleBias(nn.Module):
    """A number for each distance (the relative bias of arXiv 1910.10683, without buckets)."""

    def __init__(self, config: MegaConfig, mesh: Mesh) -> None:
        super().__init__()
        self.middle = config.bias_positions - 1
        self.table = SharedParameter(mesh, 2 * config.max_positions - 1, std=config.initializer_range)

    def forward(self, length: int) -> Tensor:
        """For distances 1 - length to length - 1 of a key from its query, [2 · length - 1]."""
        table = self.table()
        first, last = self.middle - (length - 1), self.middle + length
        if first < 0 or last > len(table):
            raise ValueError(f"{length} positions: the table of the simple bias has {self.middle + 1}")
        return table[first:last]


class RotaryBias(nn.Module):
    """The product of two vectors, turned by the places of query and key: it depends on their distance alone."""

    def __init__(self, config: MegaConfig, mesh: Mesh) -> None:
        super().__init__()
        z, std = config.shared_representation_size, config.initializer_range
        self.alpha, self.beta = SharedParameter(mesh, z, std=std), SharedParameter(mesh, z, std=std)

    def forward(self, length: int) -> Tensor:
        """For distances 1 - length to length - 1 of a key from its query, [2 · length - 1]."""
        alpha, beta = self.alpha(), self.beta()
        wide = torch.promote_types(alpha.dtype, torch.float32)
        (a, b), (c, d) = alpha.to(wide).chunk(2), beta.to(wide).chunk(2)
        frequencies = ROTARY_BASE ** (torch.arange(len(a), dtype=wide, device=a.device) / -len(a))
        angles = torch.arange(1 - length, length, dtype=wide, device=a.device).unsqueeze(1) * frequencies
        return (angles.cos() @ (a * c + b * d) + angles.sin() @ (b * c - a * d)).to(alpha.dtype)


class Gated(nn.Module):
    """What attention to the own sequence and to an encoder's have in common: the norm, the bias by distance, dropout of
    this rank's features, and the gated residual."""

    def __init__(self, config: MegaConfig, mesh: Mesh, index: int) -> None:
        super().__init__()
        self.config, self.mesh, self.index = config, mesh, index
        self.norm = norm_of(config.normalization_type, mesh, config.hidden_size, NORM_EPS, affine=config.norm_affine)
        self.prenorm = config.normalize_before_mega
        self.activation = ACTIVATIONS[config.activation]
        kinds = {"simple": SimpleBias, "rotary": RotaryBias}
        self.bias = kinds[config.relative_positional_bias](config, mesh)

    def _drop(self, x: Tensor, p: float, place: int, context: Context) -> Tensor:
        """x: [s, b, features/t]"""
        keys = context.keys(self.index, place, whole=True, by_feature=self.config.use_feature_dropout)
        return dropout(x, p, keys, self.mesh.tensor.rank * x.shape[-1])

    def _weight_keys(self, place: int, context: Context) -> Tensor | None:
        keys = context.keys(self.index, place, whole=True)
        return None if keys is None else keys.unsqueeze(0)

    def _finish(self, x: Tensor, gate: Tensor, y: Tensor, place: int, context: Context) -> Tensor:
        """The residual x, between products, moved towards dropout(activation(y)) by the gate."""
        y = self._drop(self.activation(y), self.config.dropout_prob, place, context)
        residual = to_features(x, self.mesh)
        x = from_features(torch.addcmul(residual, gate, y - residual), self.mesh)
        return x if self.prenorm else normalise(self.norm, x, context)


def normalise(norm: Norm, x: Tensor, context: Context) -> Tensor:
    """x: between products."""
    if not isinstance(norm, BatchNorm):
        return norm(x)
    real = context.documents.document_ids.t()[context.part] > 0
    return norm(x, real, training=context.training)


class GatedAttention(Gated):
    """Moving average equipped gated attention (arXiv 2209.10655, section 3.2)."""

    def __init__(self, config: MegaConfig, mesh: Mesh, index: int) -> None:
        super().__init__(config, mesh, index)
        h, z, v, std = (
            config.hidden_size, config.shared_representation_size, config.intermediate_size, config.initializer_range
        )  # fmt: skip
        self.ema = DampedEma(config, mesh)
        self.values = FeatureLinear(mesh, h, v, std=std)
        self.residual_gate = FeatureLinear(mesh, h, h, std=std)
        self.shared = SharedLinear(mesh, h, z, std=std)
        self.attention_gate = FeatureLinear(mesh, h, v, std=std)
        self.candidate = FeatureLinear(mesh, h, h, std=std)
        self.query_key_scale = SharedParameter(mesh, 2, z, std=std)
        self.query_key_offset = SharedParameter(mesh, 2, z)
        self.output = FeatureReduceLinear(mesh, v, h, std=std)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x: [s, b, h] → [s, b, h], under sequence parallelism [s/t, b, h] → the same."""
        normed = normalise(self.norm, x, context) if self.prenorm else x
        whole = gather_for_shares(normed, self.mesh)  # all positions and features
        values = self._drop(self.activation(self.values(whole)), self.config.hidden_dropout_prob, VALUES, context)
        own = whole.shape[-1] // self.mesh.tensor.size
        cache: LayerCache | None = None
        if context.cache is not None:
            cache = context.cache.before.get(self.index, LayerCache())
        averaged, state = self.ema(
            whole.narrow(-1, self.mesh.tensor.rank * own, own), context, None if cache is None else cache.ema
        )
        averaged = self._drop(averaged, self.config.dropout_prob, EMA_OUTPUT, context)
        averaged = gather_features(averaged, self.mesh.tensor)

        shared = F.silu(self.shared(averaged)).unsqueeze(2)
        query, key = (shared * self.query_key_scale() + self.query_key_offset()).split(1, 2)  # [s, b, 1, z] each
        values = values.unsqueeze(2)  # one head
        if cache is None:
            attended = context.run("selective", self._attend, query, key, values, context)
        else:
            attended, kept = self._attend_on(query, key, values, context, cache.kept)
            assert context.cache is not None
            context.cache.after[self.index] = dataclasses.replace(cache, ema=state, kept=kept)
        gated = attended.squeeze(2) * F.silu(self.attention_gate(averaged))
        y = self.candidate(averaged) + self.output(gated)
        return self._finish(x, torch.sigmoid(self.residual_gate(averaged)), y, OUTPUT, context)

    def _attend(self, query: Tensor, key: Tensor, values: Tensor, context: Context) -> Tensor:
        """[s, b, 1, z] and [s, b, 1, v/t] → [s, b, 1, v/t]"""
        longest = min(self.config.attention_chunk or self.config.longest_sequence or len(query), len(query))
        return attention(
            query, key, values, context.attended, p=self.config.attention_probs_dropout_prob,
            keys=self._weight_keys(WEIGHTS, context), bias=self.bias(longest),
            weights=self.config.attention_activation,
        )  # fmt: skip

    def _attend_on(
        self, query: Tensor, key: Tensor, values: Tensor, context: Context, kept: Kept | None
    ) -> tuple[Tensor, Kept]:
        """The same for tokens that follow others, of which those of the last chunk are kept."""
        assert context.cache is not None
        real, length = context.documents.document_ids.t() > 0, len(query)
        kept = kept or Kept(key[:0], values[:0], real[:0])
        size = self.config.attention_chunk or context.cache.seen + length
        parts, start = [], 0
        while start < length:
            offset = len(kept.keys)
            new = slice(start, start + size - offset)
            kept = kept.extended(key[new], values[new], real[new])
            part = attention_to(
                query[new], kept.keys, kept.values, real=kept.real.t(), causal=True, offset=offset,
                bias=self.bias(len(kept.keys)), weights=self.config.attention_activation,
            )  # fmt: skip
            parts.append(part)
            start = new.stop
            if self.config.attention_chunk and len(kept.keys) == size:
                kept = Kept(key[:0], values[:0], real[:0])
        return torch.cat(parts), kept


@dataclasses.dataclass(frozen=True)
class Kept:
    """Keys and values of the last chunk (without chunks, of all), and which of them are real."""

    keys: Tensor  # [r, b, 1, z]
    values: Tensor  # [r, b, 1, v/t]
    real: Tensor  # [r, b] bool

    def extended(self, keys: Tensor, values: Tensor, real: Tensor) -> Kept:
        return Kept(torch.cat((self.keys, keys)), torch.cat((self.values, values)), torch.cat((self.real, real)))


@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What a layer carries from the tokens seen."""

    ema: EmaState | None = None
    kept: Kept | None = None
    encoder: tuple[Tensor, Tensor] | None = None  # keys and values of the encoder


class GatedCrossAttention(Gated):
    """Gated attention of a decoder to an encoder's hidden states, as released: no moving average, and gates from the
    decoder's own."""

    def __init__(self, config: MegaConfig, mesh: Mesh, index: int) -> None:
        super().__init__(config, mesh, index)
        h, z, std = config.hidden_size, config.shared_representation_size, config.initializer_range
        self.residual_gate = FeatureLinear(mesh, h, h, std=std)
        self.attention_gate = FeatureLinear(mesh, h, h, std=std)
        self.query = SharedLinear(mesh, h, z, std=std)
        self.key = SharedLinear(mesh, h, z, std=std)
        self.values = FeatureLinear(mesh, h, h, std=std)
        self.output = FeatureReduceLinear(mesh, h, h, std=std)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x: [s, b, h] → [s, b, h], under sequence parallelism [s/t, b, h] → the same."""
        if context.encoder is None:
            raise ValueError("this model attends to an encoder's hidden states: give encoder_hidden_states")
        whole = gather_for_shares(normalise(self.norm, x, context) if self.prenorm else x, self.mesh)
        key, values = self._of_encoder(context)
        values = self._drop_values(values, context)
        query = self.query(whole).unsqueeze(2)
        seen = 0 if context.cache is None else context.cache.seen
        attended = attention_to(
            query, key, values, real=context.encoder.real, offset=seen, p=self.config.attention_probs_dropout_prob,
            keys=self._weight_keys(CROSS_WEIGHTS, context), bias=self.bias(max(seen + len(query), len(key))),
            weights=self.config.attention_activation,
        )  # fmt: skip
        y = self.output(attended.squeeze(2) * F.silu(self.attention_gate(whole)))
        return self._finish(x, torch.sigmoid(self.residual_gate(whole)), y, CROSS_OUTPUT, context)

    def _of_encoder(self, context: Context) -> tuple[Tensor, Tensor]:
        """Keys [source, b, 1, z] and values [source, b, 1, h/t]."""
        cache = None if context.cache is None else context.cache.after[self.index]
        if cache is not None and cache.encoder is not None:
            return cache.encoder
        assert context.encoder is not None
        hidden = copy_to_tensor_region(context.encoder.hidden.transpose(0, 1), self.mesh.tensor)
        made = self.key(hidden).unsqueeze(2), self.activation(self.values(hidden)).unsqueeze(2)
        if cache is not None and context.cache is not None:
            context.cache.after[self.index] = dataclasses.replace(cache, encoder=made)
        return made

    def _drop_values(self, values: Tensor, context: Context) -> Tensor:
        """Keyed by the place in the encoder's sequence."""
        if context.dropout is None:
            return values
        place = torch.arange(len(values), device=values.device).unsqueeze(1)
        if self.config.use_feature_dropout:
            place = torch.zeros_like(place)
        keys = context.dropout.rows(stream(self.index, CROSS_VALUES), place)
        first = self.mesh.tensor.rank * values.shape[-1]
        return dropout(values, self.config.hidden_dropout_prob, keys.expand(values.shape[:2]).unsqueeze(2), first)
