"""The reference cases of MEGA (arXiv 2209.10655)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from golden_case import Case, Part, make_ids, make_labels, uniform
from transformers import PreTrainedModel
from transformers.modeling_utils import no_init_weights
from transformers.models.mega.modeling_mega import MegaMultiDimensionDampedEma, MegaRMSNorm

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "intermediate_size": 20,
    "shared_representation_size": 8,
    "nffn_hidden_size": 12,
    "ema_projection_size": 4,
    "vocab_size": 97,
    "max_positions": 32,
    "dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "nffn_activation_dropout_prob": 0.0,
}
CHUNK = 8

# Where rows are padded, as (row, first position, position after the last or None for the end). Row 0 is always full.
Padding = tuple[tuple[int, int, int | None], ...]
NONE: Padding = ()
RIGHT: Padding = ((1, 17, None), (2, 7, None))  # row 2: the last two chunks of 8 are padding throughout
LEFT: Padding = ((1, 0, 5), (2, 0, 13))  # row 2: so is its first chunk
INTERIOR: Padding = ((1, 6, 9), (1, 13, 14), (2, 4, 5), (2, 8, 18), (2, 21, None))  # row 2: its second, whole
# Causal softmax needs a key that is not padding at or before every position of a chunk that has any, and finds none
# (NaN) where a chunk starts with padding and goes on with words. These holes start no such chunk.
HOLES: Padding = ((1, 3, 6), (1, 12, 14), (2, 5, 16), (2, 20, 23))


def _normalise(self: MegaRMSNorm, input: torch.Tensor) -> torch.Tensor:
    mean_square = input.square().mean(dim=-1, keepdim=True)
    weighted = input if self.weight is None else input * self.weight
    return weighted * torch.rsqrt(mean_square + self.eps)


# The release computes this product and returns the input times the weight instead.
MegaRMSNorm.forward = _normalise  # type: ignore[method-assign]


def _draw(name: str, shape: torch.Size, config: Any) -> torch.Tensor:
    """Values of a parameter that keep every term of the model of order one and away from special points."""
    noise = torch.randn(shape)
    if "norm.norm" in name and name.endswith(("weight", "scalar")):
        return 1 + 0.25 * noise
    if name.endswith("ema_expansion_matrix"):
        return 1 + 0.4 * noise  # before its signs, see _draw_ema
    if name.endswith(("kernel_projection_matrix", "residual_weight")):
        return noise
    softmax = config.attention_activation == "softmax"
    if name.endswith("qk_weight"):
        # Elementwise attention divides the products by the number of keys: they need to be larger to matter.
        return noise * (1.2 if softmax else 1.6)
    if name.endswith("qk_bias"):
        # Query bias times key bias is the same everywhere: softmax does not see it, relu2 could be zero throughout.
        return noise * (1.0 if softmax else 0.4)
    if name.endswith("rel_pos_bias.rel_pos_bias"):
        return 0.3 + 0.4 * noise
    if name.endswith(("alpha", "b_param")):
        return 0.4 + 0.3 * noise  # off zero: relu2 of a bias that is negative throughout would hide the products
    if name.endswith("word_embeddings.weight"):
        return 0.7 * noise
    if name.endswith("bias"):
        return 0.3 * noise
    return noise * (1.2 / math.sqrt(shape[-1]))


def _draw_ema(ema: MegaMultiDimensionDampedEma) -> None:
    """Decays q = 1 - sigmoid(delta) sigmoid(alpha) from 0.3 to 0.995, each split unevenly between the two factors."""
    shape = ema.damping_factor.shape
    rest = torch.exp(math.log(0.005) + torch.rand(shape) * math.log(0.7 / 0.005))  # 1 - q
    share = 0.2 + 0.6 * torch.rand(shape)
    ema.damping_factor.copy_(torch.logit(rest**share))
    ema.decay_factor.copy_(torch.logit(rest ** (1 - share)))
    ema.ema_expansion_matrix[:, 1::2].neg_()


def _slices(name: str, config: Any) -> list[tuple[str, int, int]]:
    """The pieces of a tensor along its first dimension that do different work, as (name, first, after the last)."""
    hidden, shared, values = config.hidden_size, config.shared_representation_size, config.intermediate_size
    if name.endswith(("qk_weight", "qk_bias")):
        sizes = {"query": 1, "key": 1}
    elif ".mx_proj." in name:
        sizes = {"update": hidden, "query and key": shared, "gate": values, "candidate": hidden}
    elif ".q_proj." in name:
        sizes = {"update": hidden, "gate": hidden, "query": shared}
    elif ".ema_gate." in name and config.bidirectional and not name.endswith("residual_weight"):
        sizes = {"forward": hidden, "backward": hidden}
    else:
        return []
    stops = torch.tensor(list(sizes.values())).cumsum(0).tolist()
    return [(piece, stop - size, stop) for (piece, size), stop in zip(sizes.items(), stops, strict=True)]


@dataclass(frozen=True)
class MegaCase(Case):
    """A case of MEGA: where its rows are padded, their length, and in cross-attention the encoder's rows."""

    padding: Padding = RIGHT
    length: int = 24
    batch: int = 3
    token_types: bool = False
    encoder_length: int = 0  # 0: no cross-attention
    encoder_padding: Padding = NONE

    def make_model(self, seed: int) -> PreTrainedModel:
        added = {"bidirectional": not self.causal, "add_cross_attention": self.encoder_length > 0}
        config = self.make_config({**SMALL, **added})
        # Nothing of the release's own initialisation remains, which fails for a LayerNorm without weights.
        with no_init_weights():
            model = getattr(transformers, self.model_class)(config)
        model.tie_weights()
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(_draw(name, parameter.shape, config))
            for module in model.modules():
                if isinstance(module, MegaMultiDimensionDampedEma):
                    _draw_ema(module)
                elif isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.running_mean.copy_(0.3 * torch.randn(config.hidden_size))
                    module.running_var.copy_(0.4 + 1.5 * torch.rand(config.hidden_size))
                    module.num_batches_tracked.fill_(7)
        return model.eval()

    def make_inputs(self, config: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
        attention_mask = self._mask(self.length, self.padding)
        real = attention_mask.bool()
        ids = make_ids(config, real, generator)
        labels = make_labels(config, ids, real, generator)
        inputs = {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}
        if self.token_types:
            inputs["token_type_ids"] = uniform(config.type_vocab_size, ids.shape, generator)
        if self.encoder_length:
            shape = (self.batch, self.encoder_length, config.hidden_size)
            inputs["encoder_hidden_states"] = torch.randn(shape, generator=generator)
            inputs["encoder_attention_mask"] = self._mask(self.encoder_length, self.encoder_padding)
        return inputs

    def _mask(self, length: int, padding: Padding) -> torch.Tensor:
        mask = torch.ones(self.batch, length, dtype=torch.int64)
        for row, start, stop in padding:
            mask[row, start:stop] = 0
        return mask

    def parts(self, model: PreTrainedModel) -> Iterator[Part]:
        # Softmax does not see what is the same for all keys.
        unseen = {"qk_bias: key", "cross_attn.k_proj.bias"} if model.config.attention_activation == "softmax" else set()
        for name, parameter in model.named_parameters():
            for piece, start, stop in _slices(name, model.config) or [("all", 0, len(parameter))]:
                label = name if piece == "all" else f"{name}: {piece}"
                yield Part(label, parameter.data[start:stop], shows=not label.endswith(tuple(unseen)))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                yield Part(name, buffer)
            elif name.endswith("running_var"):
                yield Part(name, buffer, neutral=1.0)

    def forget(self, model: PreTrainedModel) -> None:
        """In evaluation mode the release keeps each EMA's kernel, and its graph, whatever becomes of the parameters."""
        for module in model.modules():
            if isinstance(module, MegaMultiDimensionDampedEma):
                module._kernel = module._coeffs = None

    def notes(self) -> dict[str, str]:
        if self.config.get("normalization_type") != "rmsnorm":
            return {}
        return {"patched": "MegaRMSNorm.forward returns x * weight * rsqrt(mean(x^2) + eps), not x * weight"}


def _words(model_class: str) -> Callable[..., Case]:
    def make(padding: Padding = RIGHT, length: int = 24, batch: int = 3, draw: int = 0, **config: Any) -> Case:
        return MegaCase(model_class, config, padding, length, batch, "type_vocab_size" in config, draw=draw)

    return make


_mlm, _clm = _words("MegaForMaskedLM"), _words("MegaForCausalLM")


def _cross(length: int, encoder_padding: Padding, padding: Padding = RIGHT, draw: int = 0, **config: Any) -> Case:
    encoder = {"encoder_length": length, "encoder_padding": encoder_padding}
    return MegaCase("MegaForCausalLM", config, padding, **encoder, draw=draw)


def _chunks(size: int = CHUNK, **config: Any) -> dict[str, Any]:
    return {"use_chunking": True, "chunk_size": size, **config}


def _both_after(**config: Any) -> dict[str, Any]:
    return {"normalize_before_mega": False, "normalize_before_ffn": False, **config}


SIMPLE, ROTARY = {"relative_positional_bias": "simple"}, {"relative_positional_bias": "rotary"}
SOFTMAX, RELU2, LAPLACE = ({"attention_activation": name} for name in ("softmax", "relu2", "laplace"))
LAYER, SCALE, RMS, BATCH, SYNC = (
    {"normalization_type": name} for name in ("layernorm", "scalenorm", "rmsnorm", "batchnorm", "syncbatchnorm")
)
PLAIN = {"norm_affine": False}
UNTIED = {"tie_word_embeddings": False}
NO_DENSE = {"add_lm_hidden_dense_layer": False}
NO_FFN = {"use_normalized_ffn": False}
FORWARD_ONLY = {"bidirectional": False}
TYPES = {"add_token_type_embeddings": True, "type_vocab_size": 3}

CASES: dict[str, Case] = {
    # Encoders, softmax.
    "mega-mlm-post-norm": _mlm(
        INTERIOR, draw=2, **SOFTMAX, **SIMPLE, **LAYER, **_both_after(), activation="gelu", num_hidden_layers=2
    ),
    "mega-mlm-chunked": _mlm(RIGHT, draw=5, **SOFTMAX, **ROTARY, **SCALE, **_chunks(), num_hidden_layers=2),
    "mega-mlm-chunked-interior": _mlm(
        INTERIOR, **SOFTMAX, **SIMPLE, **RMS, **_chunks(), **UNTIED, activation="relu", pad_token_id=5
    ),
    "mega-mlm-chunked-left": _mlm(
        LEFT, draw=1, **SOFTMAX, **ROTARY, **BATCH, **_chunks(), normalize_before_ffn=False, vocab_size=129
    ),
    # Rows shorter than a chunk: the simple table's centre is still chunk_size - 1.
    "mega-mlm-shorter-than-chunk": _mlm(
        RIGHT, **SOFTMAX, **SIMPLE, **LAYER, **_chunks(28), normalize_before_ffn=False, max_positions=40
    ),
    # Longer than max_positions, which rotary allows.
    "mega-mlm-no-ffn": _mlm(
        ((1, 30, None),), 48, 2, **SOFTMAX, **ROTARY, **NO_FFN, **UNTIED, **NO_DENSE, num_hidden_layers=2
    ),
    "mega-mlm-truncated": _mlm(
        INTERIOR, draw=2, **SOFTMAX, **ROTARY, **LAYER, activation="tanh", truncation=6, num_hidden_layers=2
    ),
    "mega-mlm-forward-only": _mlm(
        RIGHT, **SOFTMAX, **SIMPLE, **RMS, **PLAIN, **_chunks(), **FORWARD_ONLY, ema_projection_size=3
    ),
    # Token types in the model, none given: all are of the first type.
    "mega-mlm-plain-layernorm": _mlm(
        NONE, **SOFTMAX, **ROTARY, **LAYER, **PLAIN, add_token_type_embeddings=True, activation="linear"
    ),
    # Encoders, elementwise attention.
    "mega-mlm-relu2": _mlm(RIGHT, **RELU2, **SIMPLE, **LAYER, activation="gelu_accurate", shared_representation_size=7),
    "mega-mlm-relu2-chunked": _mlm(
        INTERIOR, draw=1, **RELU2, **ROTARY, **SCALE, **_chunks(), **TYPES, normalize_before_mega=False
    ),
    "mega-mlm-unused-chunk-size": _mlm(
        LEFT, **RELU2, **SIMPLE, **SCALE, **PLAIN, use_chunking=False, chunk_size=28, max_positions=40
    ),
    "mega-mlm-laplace": _mlm(
        LEFT, draw=1, **LAPLACE, **ROTARY, **RMS, **NO_DENSE, normalize_before_ffn=False, num_hidden_layers=2
    ),
    "mega-mlm-laplace-chunked": _mlm(
        INTERIOR, **LAPLACE, **SIMPLE, **SYNC, **_chunks(), **TYPES, ema_projection_size=1
    ),
    "mega-mlm-laplace-shorter-than-chunk": _mlm(
        INTERIOR, **LAPLACE, **ROTARY, **SYNC, **PLAIN, **_chunks(40), activation="relu"
    ),
    "mega-mlm-forward-only-truncated": _mlm(
        LEFT, **LAPLACE, **SIMPLE, **BATCH, **_both_after(), **FORWARD_ONLY, truncation=5, num_hidden_layers=2
    ),
    # Decoders, softmax.
    "mega-clm": _clm(RIGHT, **SOFTMAX, **ROTARY, **RMS, activation="gelu", num_hidden_layers=2),
    "mega-clm-post-norm": _clm(
        INTERIOR, draw=1, **SOFTMAX, **SIMPLE, **LAYER, **_both_after(), **UNTIED, pad_token_id=3, vocab_size=129
    ),
    "mega-clm-chunked": _clm(RIGHT, **SOFTMAX, **ROTARY, **BATCH, **_chunks(), activation="relu"),
    "mega-clm-chunked-holes": _clm(
        HOLES, **SOFTMAX, **SIMPLE, **SCALE, **_chunks(), normalize_before_ffn=False, num_hidden_layers=2
    ),
    "mega-clm-truncated": _clm(RIGHT, draw=1, **SOFTMAX, **ROTARY, **LAYER, truncation=5, num_hidden_layers=2),
    "mega-clm-unused-chunk-size": _clm(
        RIGHT, draw=1, **SOFTMAX, **SIMPLE, **NO_FFN, **NO_DENSE, chunk_size=28, max_positions=40, num_hidden_layers=3
    ),
    # Decoders, elementwise attention.
    "mega-clm-relu2": _clm(LEFT, **RELU2, **SIMPLE, **LAYER, **NO_DENSE, activation="gelu_accurate"),
    "mega-clm-relu2-chunked": _clm(
        INTERIOR, **RELU2, **ROTARY, **SYNC, **_chunks(), **TYPES, normalize_before_mega=False
    ),
    "mega-clm-laplace": _clm(LEFT, **LAPLACE, **ROTARY, **RMS, **_both_after(), activation="relu"),
    "mega-clm-laplace-chunked-left": _clm(
        LEFT, **LAPLACE, **SIMPLE, **SCALE, **_chunks(), ema_projection_size=1, shared_representation_size=5
    ),
    "mega-clm-truncated-chunked": _clm(
        INTERIOR, **LAPLACE, **SIMPLE, **BATCH, **PLAIN, **_chunks(), **UNTIED, truncation=7, pad_token_id=0
    ),
    # Decoders with cross-attention to encoder rows that are longer or shorter than the decoder's.
    "mega-clm-cross-softmax": _cross(31, HOLES, **SOFTMAX, **ROTARY, **SCALE),
    "mega-clm-cross-softmax-chunked": _cross(
        13, LEFT[:1], HOLES, draw=1, **SOFTMAX, **ROTARY, **LAYER, **_chunks(), **_both_after()
    ),
    "mega-clm-cross-laplace": _cross(15, ((1, 9, None), (2, 0, 4)), **LAPLACE, **SIMPLE, **RMS, activation="gelu"),
    "mega-clm-cross-laplace-longer": _cross(
        30, INTERIOR, LEFT, **LAPLACE, **SIMPLE, **LAYER, normalize_before_mega=False
    ),
    # The encoder rows are longer than max_positions.
    "mega-clm-cross-relu2-chunked": _cross(37, RIGHT, INTERIOR, **RELU2, **ROTARY, **BATCH, **_chunks(), **NO_FFN),
}
