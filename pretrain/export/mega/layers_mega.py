"""The layers of MEGA (moving average equipped gated attention, arXiv 2209.10655), for `modeling_mega.py` beside it.

Shapes: B rows, L tokens, D hidden features, Z features of queries and keys, V of values, N dimensions of the average.
Of a row's L tokens those count that `real` [B, L] says are no padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration_mega import MegaConfig

TILE = 64  # tokens that the moving average treats with one matrix product
NORM_EPS = 1e-5


def damped_average(
    inputs: Tensor, log_decay: Tensor, expansion: Tensor, projection: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y[t] = sum over n of c[n] h[t, n], where h[t, n] = q[n] h[t-1, n] + u[n] x[t]; one average a feature.

    Within a tile of C tokens that is a product with a C x C Toeplitz matrix a feature; N numbers a feature go over
    from tile to tile.

    Args:
        inputs: x, [B, L, D].
        log_decay: log q, [D, N]; `expansion`: u, [D, N]; `projection`: c, [D, N].
        state: h before the first token, [B, D, N], or None for zero.

    Returns:
        y [B, L, D], and h after the last token [B, D, N].
    """
    rows, length, features = inputs.shape
    size = min(TILE, length)
    tiles = -(-length // size)
    lags = torch.arange(size + 1, device=inputs.device, dtype=inputs.dtype)
    powers = torch.exp(lags * log_decay.unsqueeze(-1))  # q^0 ... q^C, [D, N, C+1]
    kernel = torch.einsum("dnl,dn->dl", powers[..., :-1], expansion * projection)
    # Row i of the Toeplitz matrix is k[i], ..., k[0], 0, ...: a window of the reversed kernel and C-1 zeros.
    toeplitz = F.pad(kernel.flip(-1), (0, size - 1)).unfold(-1, size, 1).flip(1)
    into = expansion.unsqueeze(-1) * powers[..., :-1].flip(-1)  # [D, N, C]: a tile's tokens to the state at its end
    out_of = (projection.unsqueeze(-1) * powers[..., 1:]).transpose(1, 2)  # [D, C, N]

    x = F.pad(inputs, (0, 0, 0, tiles * size - length)).reshape(rows, tiles, size, features)
    x = x.permute(3, 2, 1, 0).reshape(features, size, tiles * rows)
    gains = torch.bmm(into, x).reshape(features, -1, tiles, rows).unbind(2)
    decay = powers[..., -1:]
    at_start = [torch.zeros_like(gains[0]) if state is None else state.to(x.dtype).permute(1, 2, 0)]
    for gain in gains[:-1]:
        at_start.append(decay * at_start[-1] + gain)
    carried = torch.stack(at_start, dim=2).reshape(features, -1, tiles * rows)
    y = torch.bmm(toeplitz, x) + torch.bmm(out_of, carried)
    y = y.reshape(features, size, tiles, rows).permute(3, 2, 1, 0).reshape(rows, tiles * size, features)

    last = length - (tiles - 1) * size  # real tokens of the last tile
    x_last = x.reshape(features, size, tiles, rows)[:, :last, -1]
    state = powers[..., last : last + 1] * at_start[-1] + torch.bmm(into[..., size - last :], x_last)
    return y[:, :length], state.permute(2, 0, 1)


class MegaMultiDimensionDampedEma(nn.Module):
    """Multi-dimension damped moving average (the paper's equations 2 and 3), with residual weight and SiLU."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.bidirectional = config.bidirectional
        self.truncation = config.truncation
        directions = 2 if config.bidirectional else 1
        features, size = directions * config.hidden_size, config.ema_projection_size
        self.scale = size**-0.5
        self.damping_factor = nn.Parameter(torch.empty(features, size, 1))
        self.decay_factor = nn.Parameter(torch.empty(features, size, 1))
        self.ema_expansion_matrix = nn.Parameter(torch.empty(features, size, 1))
        self.kernel_projection_matrix = nn.Parameter(torch.empty(features, size))
        self.residual_weight = nn.Parameter(torch.empty(config.hidden_size))

    def coefficients(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """log q, u and c of `damped_average`, each [D or 2 D, N]."""
        damping = torch.sigmoid(self.damping_factor.squeeze(-1).to(dtype))
        decay = torch.sigmoid(self.decay_factor.squeeze(-1).to(dtype))
        # The bound, 1e-26 in q, keeps 0 * log 0 out of q^0 where both sigmoids round to 1.
        log_decay = torch.log1p(-damping * decay).clamp(min=-60.0)
        expansion = damping * self.ema_expansion_matrix.squeeze(-1).to(dtype)
        return log_decay, expansion, self.kernel_projection_matrix.to(dtype) * self.scale

    def average(self, x: Tensor, coefficients: Sequence[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        """One direction. With truncation, a delayed second average takes out what lies too far back."""
        log_decay, expansion, projection = coefficients
        y, end = damped_average(x, log_decay, expansion, projection, state)
        reach = self.truncation
        if reach is not None and reach < x.shape[1]:
            too_far = expansion * torch.exp(reach * log_decay)
            y = y - F.pad(damped_average(x[:, :-reach], log_decay, too_far, projection, None)[0], (0, 0, reach, 0))
        return y, end

    def forward(self, inputs: Tensor, real: Tensor, past: dict[str, Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, L, D] of which `real` [B, L] tokens count -> [B, L, D], and what the next call needs."""
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        with torch.autocast(inputs.device.type, enabled=False):
            coefficients = self.coefficients(dtype)
            x = (inputs * real.unsqueeze(-1).to(inputs.dtype)).to(dtype)
            if self.bidirectional:
                halves = [c.chunk(2) for c in coefficients]
                forwards = self.average(x, [half[0] for half in halves], None)[0]
                backwards = self.average(x.flip(1), [half[1] for half in halves], None)[0]
                y = forwards + backwards.flip(1)
                carried = {}
            elif self.truncation is None:
                y, end = self.average(x, coefficients, None if past is None else past["ema"])
                carried = {"ema": end}
            else:
                x = x if past is None else torch.cat([past["ema_inputs"].to(dtype), x], dim=1)
                y = self.average(x, coefficients, None)[0][:, -inputs.shape[1] :]
                carried = {"ema_inputs": x[:, max(0, x.shape[1] - self.truncation + 1) :]}
        return F.silu(y.to(inputs.dtype) + inputs * self.residual_weight), carried


class MegaRelativeBias(nn.Module):
    """A bias for each distance between a key and a query."""

    def distances(self, first: int, last: int) -> Tensor:
        """The biases [last - first + 1] of keys that are `first` to `last` positions behind the query."""
        raise NotImplementedError

    def forward(self, start: int, queries: int, keys: int) -> Tensor:
        """[queries, keys]: the queries are at `start`, `start` + 1, ..., the keys at 0, 1, ..."""
        biases = self.distances(1 - start - queries, keys - 1 - start)
        return biases.unfold(0, keys, 1).flip(0)


class MegaSimpleRelativePositionalBias(MegaRelativeBias):
    """A learned number for each distance."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.limit = config.max_positions if config.chunk_size < 0 else config.chunk_size
        self.rel_pos_bias = nn.Parameter(torch.empty(2 * config.max_positions - 1))

    def distances(self, first: int, last: int) -> Tensor:
        if first <= -self.limit or last >= self.limit:
            raise ValueError(
                f"{max(1 - first, last + 1)} positions: the simple relative bias has {self.limit} (chunk_size, or "
                "max_positions without it); give shorter rows, or train with chunks or the rotary bias"
            )
        return self.rel_pos_bias[self.limit - 1 + first : self.limit + last]


class MegaRotaryRelativePositionalBias(MegaRelativeBias):
    """The product of two learned vectors, each turned by its position: it depends on the distance alone."""

    _float_tensor: Tensor  # unused; part of the public tensor names

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        size = config.shared_representation_size
        self.alpha = nn.Parameter(torch.empty(1, size))
        self.b_param = nn.Parameter(torch.empty(1, size))
        self.register_buffer("_float_tensor", torch.zeros(1))

    def distances(self, first: int, last: int) -> Tensor:
        dtype = torch.promote_types(self.alpha.dtype, torch.float32)
        (a1, a2), (b1, b2) = (x.to(dtype).squeeze(0).chunk(2) for x in (self.alpha, self.b_param))
        pairs = len(a1)
        frequencies = torch.exp(torch.arange(pairs, device=a1.device, dtype=dtype) * (-math.log(10000) / pairs))
        angles = torch.arange(first, last + 1, device=a1.device, dtype=dtype).unsqueeze(1) * frequencies
        return torch.cos(angles) @ (a1 * b1 + a2 * b2) + torch.sin(angles) @ (a2 * b1 - a1 * b2)


def relative_bias(config: MegaConfig) -> MegaRelativeBias:
    simple = config.relative_positional_bias == "simple"
    return MegaSimpleRelativePositionalBias(config) if simple else MegaRotaryRelativePositionalBias(config)


def activation(config: MegaConfig) -> Any:
    if config.activation not in ACT2FN:
        raise ValueError(f"activation is {config.activation!r}: it must be one of {', '.join(sorted(ACT2FN))}")
    return ACT2FN[config.activation]


class MegaDropout(nn.Module):
    """Dropout of elements, or of whole features of a row: over all its positions at once. [B, L, features]."""

    def __init__(self, probability: float, of_features: bool) -> None:
        super().__init__()
        self.probability = probability
        self.of_features = of_features

    def forward(self, x: Tensor) -> Tensor:
        if not self.of_features:
            return F.dropout(x, self.probability, self.training)
        return x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[-1]), self.probability, self.training)


class MegaRMSNorm(nn.Module):
    """x w / sqrt(mean(x^2) + eps) with a weight w a feature; MegaScaleNorm has one for all."""

    def __init__(self, name: str, size: int, affine: bool) -> None:
        super().__init__()
        self.name = name
        self.register_parameter(name, nn.Parameter(torch.ones(size)) if affine else None)

    def forward(self, x: Tensor) -> Tensor:
        weight = getattr(self, self.name)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = x * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS).to(x.dtype)
        return y if weight is None else y * weight


class MegaSequenceNorm(nn.Module):
    """One of the five norms, under the public tensor names. [B, L, D] of which `real` [B, L] tokens count."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        kind, size, affine = config.normalization_type, config.hidden_size, config.norm_affine
        self.norm: nn.Module
        if kind == "layernorm":
            self.norm = nn.LayerNorm(size, NORM_EPS, elementwise_affine=affine)
        elif kind == "scalenorm":
            self.norm = MegaRMSNorm("scalar", 1, affine)
        elif kind == "rmsnorm":
            self.norm = MegaRMSNorm("weight", size, affine)
        elif kind == "batchnorm":
            self.norm = nn.BatchNorm1d(size, NORM_EPS, affine=affine)
        else:
            self.norm = nn.SyncBatchNorm(size, NORM_EPS, affine=affine)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        if not isinstance(self.norm, nn.modules.batchnorm._BatchNorm):
            return self.norm(x)
        if not self.training:
            return self.norm(x.flatten(0, 1)).view_as(x)
        normed = self.norm(x[real])
        return torch.zeros_like(x, dtype=normed.dtype).masked_scatter(real.unsqueeze(-1), normed)


def attend(
    kind: str, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, visible: Tensor, lengths: Tensor, dropout: Any
) -> Tensor:
    """Attention with one head, by chunks. A query that sees no key gives zero.

    Args:
        kind: softmax, relu2 or laplace.
        query: [B, chunks, S, Z]; `key`: [B, chunks, T, Z]; `value`: [B, chunks, T, V].
        bias: [S, T], added to the scores.
        visible: which keys a query sees, broadcast to [B, chunks, S, T].
        lengths: what relu2 and laplace divide the scores by, broadcast likewise.

    Returns:
        [B, chunks, S, V].
    """
    scores = query @ key.transpose(-1, -2)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if kind == "softmax":
        wide = wide * query.shape[-1] ** -0.5 + bias
        weights = torch.softmax(wide.masked_fill(~visible, torch.finfo(wide.dtype).min), dim=-1)
    elif kind == "relu2":
        weights = F.relu(wide / lengths + bias).square()
    else:
        # The normal distribution's cumulative function around sqrt(1/2) with deviation sqrt(1/(4 pi)).
        weights = 0.5 * (1.0 + torch.erf((wide / lengths + bias - 0.707107) / (0.282095 * math.sqrt(2.0))))
    weights = dropout(weights.masked_fill(~visible, 0.0))
    return weights.to(value.dtype) @ value


class MegaMovingAverageGatedAttention(nn.Module):
    """The first half of a layer: moving average, then gated attention on it (the paper's equations 5 to 12)."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.config = config
        hidden, values, shared = config.hidden_size, config.intermediate_size, config.shared_representation_size
        self.splits = [hidden, shared, values, hidden]
        self.activation = activation(config)
        self.dropout = MegaDropout(config.dropout_prob, config.use_feature_dropout)
        self.hidden_dropout = MegaDropout(config.hidden_dropout_prob, config.use_feature_dropout)
        self.attention_dropout = MegaDropout(config.attention_probs_dropout_prob, False)
        self.norm = MegaSequenceNorm(config)
        self.ema_gate = MegaMultiDimensionDampedEma(config)
        self.v_proj = nn.Linear(hidden, values)
        self.mx_proj = nn.Linear(hidden, sum(self.splits))
        self.h_proj = nn.Linear(values, hidden)
        self.qk_weight = nn.Parameter(torch.empty(2, shared))
        self.qk_bias = nn.Parameter(torch.empty(2, shared))
        self.rel_pos_bias = relative_bias(config)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, real: Tensor) -> Tensor:
        """One kind of chunk: [B, chunks, S, Z] queries, the last S of the T positions of the keys [B, chunks, T, Z]."""
        queries, keys = query.shape[2], key.shape[2]
        start = keys - queries
        visible = real.unsqueeze(2)
        if self.config.is_decoder:
            at = torch.arange(keys, device=query.device)
            visible = visible & (at <= at[start:].unsqueeze(1))
            lengths = at[start:].unsqueeze(1) + 1
        else:
            lengths = real.sum(-1).clamp(min=1)[..., None, None]
        bias = self.rel_pos_bias(start, queries, keys)
        kind, dropout = self.config.attention_activation, self.attention_dropout
        return attend(kind, query, key, value, bias, visible, lengths, dropout)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, real: Tensor) -> Tensor:
        """Attention within chunks: [B, S, Z] queries, the last S of the T positions of the keys [B, T, Z] -> [B, S, V].

        The T positions begin at a chunk's start; those before the queries belong to one chunk, not yet finished.
        """
        length, past = query.shape[1], key.shape[1] - query.shape[1]
        chunk = self.config.chunk_size if self.config.use_chunking else key.shape[1]
        outputs = []
        in_first = min(length, chunk - past) if past else 0
        if in_first:
            end = past + in_first
            parts = (query[:, :in_first], key[:, :end], value[:, :end], real[:, :end])
            outputs.append(self.attend(*(x.unsqueeze(1) for x in parts)).squeeze(1))
        if rest := length - in_first:
            chunk = min(chunk, rest)
            chunks = -(-rest // chunk)
            spread = [F.pad(x[:, -rest:], (0, 0, 0, chunks * chunk - rest)) for x in (query, key, value)]
            spread.append(F.pad(real[:, -rest:], (0, chunks * chunk - rest)))
            attended = self.attend(*(x.reshape(x.shape[0], chunks, chunk, *x.shape[2:]) for x in spread))
            outputs.append(attended.flatten(1, 2)[:, :rest])
        return torch.cat(outputs, dim=1)

    def forward(self, x: Tensor, real: Tensor, past: dict[str, Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, L, D] -> [B, L, D], and what the next call needs."""
        residual = x
        if self.config.normalize_before_mega:
            x = self.norm(x, real)
        value = self.activation(self.v_proj(x))
        averaged, carried = self.ema_gate(x, real, past)
        mixed = self.mx_proj(self.dropout(averaged))
        update, shared, gate, candidate = mixed.split(self.splits, dim=-1)
        query, key = (F.silu(shared).unsqueeze(-2) * self.qk_weight + self.qk_bias).unbind(-2)
        keys_real = real
        if past is not None:
            key = torch.cat([past["key"], key], dim=1)
            value = torch.cat([past["value"], value], dim=1)
            keys_real = torch.cat([past["real"], real], dim=1)
        attended = self.attention(query, key, self.hidden_dropout(value), keys_real)
        done = key.shape[1] // self.config.chunk_size * self.config.chunk_size if self.config.use_chunking else 0
        carried.update(key=key[:, done:], value=value[:, done:], real=keys_real[:, done:])

        x = self.dropout(self.activation(candidate + self.h_proj(attended * F.silu(gate))))
        x = torch.lerp(residual, x, torch.sigmoid(update))
        return (x if self.config.normalize_before_mega else self.norm(x, real)), carried


class MegaGatedCrossAttention(nn.Module):
    """Gated attention to an encoder's output. Positions count from the start of both rows."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.config = config
        hidden, shared = config.hidden_size, config.shared_representation_size
        self.splits = [hidden, hidden, shared]
        self.activation = activation(config)
        self.dropout = MegaDropout(config.dropout_prob, config.use_feature_dropout)
        self.hidden_dropout = MegaDropout(config.hidden_dropout_prob, config.use_feature_dropout)
        self.attention_dropout = MegaDropout(config.attention_probs_dropout_prob, False)
        self.norm = MegaSequenceNorm(config)
        self.k_proj = nn.Linear(hidden, shared)
        self.v_proj = nn.Linear(hidden, hidden)
        self.q_proj = nn.Linear(hidden, sum(self.splits))
        self.h_proj = nn.Linear(hidden, hidden)
        self.rel_pos_bias = relative_bias(config)

    def project(self, encoder: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Keys and values of the encoder's output [B, T, D] and its mask [B, T], for this and all later calls."""
        states, real = encoder
        value = self.activation(self.v_proj(states))
        return {"cross_key": self.k_proj(states), "cross_value": value, "cross_real": real}

    def forward(self, x: Tensor, real: Tensor, encoder: dict[str, Tensor], start: int) -> Tensor:
        """[B, L, D], of which the first is at position `start` of its row -> [B, L, D]."""
        residual = x
        if self.config.normalize_before_mega:
            x = self.norm(x, real)
        update, gate, query = self.q_proj(x).split(self.splits, dim=-1)
        key, visible = encoder["cross_key"], encoder["cross_real"][:, None, None]
        attended = attend(
            self.config.attention_activation,
            query.unsqueeze(1),
            key.unsqueeze(1),
            self.hidden_dropout(encoder["cross_value"]).unsqueeze(1),
            self.rel_pos_bias(start, query.shape[1], key.shape[1]),
            visible,
            visible.sum(-1, keepdim=True).clamp(min=1),
            self.attention_dropout,
        ).squeeze(1)
        x = self.dropout(self.activation(self.h_proj(attended * F.silu(gate))))
        x = torch.lerp(residual, x, torch.sigmoid(update))
        return x if self.config.normalize_before_mega else self.norm(x, real)


class MegaNormalizedFeedForwardNetwork(nn.Module):
    """The second half of a layer."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.prenorm = config.normalize_before_ffn
        self.activation = activation(config)
        self.dropout = MegaDropout(config.dropout_prob, config.use_feature_dropout)
        self.hidden_dropout = MegaDropout(config.nffn_activation_dropout_prob, config.use_feature_dropout)
        self.norm = MegaSequenceNorm(config)
        self.fc1 = nn.Linear(config.hidden_size, config.nffn_hidden_size)
        self.fc2 = nn.Linear(config.nffn_hidden_size, config.hidden_size)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        hidden = self.activation(self.fc1(self.norm(x, real) if self.prenorm else x))
        x = x + self.dropout(self.fc2(self.hidden_dropout(hidden)))
        return x if self.prenorm else self.norm(x, real)


class MegaBlock(nn.Module):
    """One layer: gated attention on the moving average, cross-attention if any, feed-forward if any."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.mega_layer = MegaMovingAverageGatedAttention(config)
        self.cross_attn = MegaGatedCrossAttention(config) if config.add_cross_attention else None
        self.nffn = MegaNormalizedFeedForwardNetwork(config) if config.use_normalized_ffn else None

    def forward(
        self,
        x: Tensor,
        real: Tensor,
        encoder: tuple[Tensor, Tensor] | None,
        past: dict[str, Tensor] | None,
        start: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x, carried = self.mega_layer(x, real, past)
        if self.cross_attn is not None:
            names = ("cross_key", "cross_value", "cross_real")
            if past is not None:
                carried.update({name: past[name] for name in names})
            elif encoder is not None:
                carried.update(self.cross_attn.project(encoder))
            else:
                raise ValueError("encoder_hidden_states is missing: this model has cross-attention")
            x = self.cross_attn(x, real, carried, start)
        return (x if self.nffn is None else self.nffn(x, real)), carried


class MegaEmbeddings(nn.Module):
    """Word embeddings and, where the config asks for them, token types."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        if config.add_token_type_embeddings:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)

    def forward(self, embedded: Tensor, token_type_ids: Tensor | None) -> Tensor:
        if not hasattr(self, "token_type_embeddings"):
            return embedded
        if token_type_ids is None:
            token_type_ids = torch.zeros(embedded.shape[:2], dtype=torch.long, device=embedded.device)
        return embedded + self.token_type_embeddings(token_type_ids)
