"""Nyströmformer: softmax attention through landmarks (arXiv 2102.03902)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...kernels.nystrom import largest_column_sum, nystrom_attention, position_convolution
from ...parallel.feature_layers import FeatureParameter
from ...parallel.mappings import max_over
from ...parallel.mesh import Mesh
from .approximate import ApproximateAttention, ApproximateConfig, ApproximateModel, encoder_code
from .bert import BertConfig
from .config import ModelConfig
from .huggingface_keys import HuggingFaceKeys, Source
from .transformer import transformer_flops_per_row

PINV_PRODUCTS = 6 * 4  # of matrices of landmarks × landmarks
# What a stock config.json that leaves a field out stands for, where that is not the default here.
RELEASED: dict[str, Any] = {
    "num_landmarks": 64, "segment_means_seq_len": 64, "conv_kernel_size": 65, "inv_coeff_init_option": False,
    "max_position_embeddings": 510, "hidden_act": "gelu_new", "type_vocab_size": 2,
}  # fmt: skip


class NystromformerConfig(ApproximateConfig):
    """Fields of Hugging Face's NystromformerConfig."""

    model_type: str = ModelConfig.with_default("model_type", "nystromformer")
    hidden_act: str = BertConfig.with_default("hidden_act", "gelu_new")
    num_landmarks: int = Field(64, gt=0, description="landmarks of a document; up to so many tokens: exact softmax")
    segment_means_seq_len: int = Field(
        512,
        gt=0,
        description="the row length that stock classes take (any will do here); equal to num_landmarks: exact softmax "
        "at any length",
    )
    conv_kernel_size: int | None = Field(
        65, gt=0, description="positions, an odd number, of the convolution of values that is added; null: none"
    )
    inv_coeff_init_option: bool = Field(
        True,
        description="start of the pseudo-inverse: true each matrix by itself; false as released, divided by a maximum "
        "over the whole microbatch and all heads, so that a row's result depends on its neighbours",
    )

    @model_validator(mode="after")
    def _check_landmarks(self) -> NystromformerConfig:
        if _swapped(self.num_landmarks, self.segment_means_seq_len):
            raise ValueError(
                f"num_landmarks {self.num_landmarks} is above segment_means_seq_len {self.segment_means_seq_len}, as "
                "in published files that swap the two: swap them back"
            )
        if self.conv_kernel_size is not None and self.conv_kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size {self.conv_kernel_size} is even: set an odd number, or null for none")
        return self

    @property
    def exact(self) -> bool:
        """Whether attention is the softmax itself."""
        return self.num_landmarks == self.segment_means_seq_len

    @property
    def mixes_rows(self) -> bool:
        return not (self.inv_coeff_init_option or self.exact)


class NystromAttention(ApproximateAttention):
    """Attention through landmarks, and a convolution of the values over positions, one kernel a head (section 3.4)."""

    def __init__(self, config: NystromformerConfig, mesh: Mesh, index: int) -> None:
        super().__init__(config, mesh, index)
        self.config, self.multiple = config, config.num_landmarks
        self.convolution: FeatureParameter | None = None
        if (size := config.conv_kernel_size) is not None:
            heads = config.num_attention_heads
            self.convolution = FeatureParameter(mesh, heads, size, dim=0, std=config.initializer_range, decay=True)

    def attend_parts(self, parts: list[tuple[Tensor, Tensor, Tensor, Tensor | None]]) -> list[Tensor]:
        c, start = self.config, self._shared_start(parts)
        results = []
        for q, k, v, mask in parts:
            y = nystrom_attention(
                q, k, v, mask=mask, landmarks=c.num_landmarks, padding_counts=c.padding_counts, exact=c.exact,
                start=start,
            )  # fmt: skip
            if self.convolution is not None:
                y = y + position_convolution(v, self.convolution.weight, None if c.padding_counts else mask)
            results.append(y)
        return results

    def _shared_start(self, parts: list[tuple[Tensor, Tensor, Tensor, Tensor | None]]) -> Tensor | None:
        """What the pseudo-inverse of every document and head begins with, as released."""
        c = self.config
        if not c.mixes_rows:
            return None
        largest = [
            largest_column_sum(q, k, mask=mask, landmarks=c.num_landmarks, padding_counts=c.padding_counts)
            for q, k, _, mask in parts
        ]
        return max_over(torch.stack(largest).amax(), self.axis)


class Nystromformer(ApproximateModel):
    name = "nystromformer"
    config_class = NystromformerConfig
    own_code = encoder_code("nystromformer")
    operations = (*ApproximateModel.operations, "pinv")
    config: NystromformerConfig

    def make_attention(self, index: int) -> NystromAttention:
        return NystromAttention(self.config, self.mesh, index)

    @classmethod
    def stock_fields(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        found = {name: fields.get(name, value) for name, value in RELEASED.items()}
        if _swapped(found["num_landmarks"], found["segment_means_seq_len"]):
            swapped = found["segment_means_seq_len"], found["num_landmarks"]
            found["num_landmarks"], found["segment_means_seq_len"] = swapped
        # Only the released start has released checkpoints: the other crashes there.
        found["padding_counts"] = fields.get("padding_counts", not found["inv_coeff_init_option"])
        return super().stock_fields(fields) | found

    @classmethod
    def import_note(cls, fields: Mapping[str, Any]) -> str | None:
        landmarks, length = ((RELEASED | dict(fields))[name] for name in ("num_landmarks", "segment_means_seq_len"))
        if not _swapped(landmarks, length):
            return None
        return (
            f"num_landmarks {landmarks} and segment_means_seq_len {length} are swapped in its config.json: read as "
            f"{length} landmarks of rows of {landmarks} tokens"
        )

    @classmethod
    def stock_difference(cls, config: ModelConfig) -> str | None:
        assert isinstance(config, NystromformerConfig)
        if config.inv_coeff_init_option:
            return "with inv_coeff_init_option true they crash, with false a row's result depends on its neighbours"
        if not config.padding_counts and not (config.exact and config.conv_kernel_size is None):
            return "they average and convolve padding with the tokens beside it"
        return None

    @classmethod
    def stock_note(cls, config: ModelConfig) -> str | None:
        assert isinstance(config, NystromformerConfig)
        limits = []
        if not config.exact:
            limits.append(f"take rows of {config.segment_means_seq_len} tokens only, in transformers 5 without padding")
        if config.conv_kernel_size is None:
            limits.append("of transformers 5 do not take a conv_kernel_size of null")
        return f"the stock nystromformer classes {' and '.join(limits)}" if limits else None

    @classmethod
    def huggingface_keys(cls, config: ModelConfig, heads: tuple[str, ...]) -> HuggingFaceKeys:
        assert isinstance(config, NystromformerConfig)
        keys = super().huggingface_keys(config, heads)
        if (size := config.conv_kernel_size) is not None:
            shape, prefix = (config.num_attention_heads, 1, size, 1), f"{cls.name}." if heads else ""
            for i in range(config.num_hidden_layers):
                tensor = f"{prefix}encoder.layer.{i}.attention.self.conv.weight"
                keys[f"layers.{i}.attention.convolution.weight"] = (Source(tensor, shape=shape),)
        return keys

    @classmethod
    def flops_per_row(cls, config: ModelConfig, length: float, predictions: float) -> float:
        assert isinstance(config, NystromformerConfig)
        h, m = config.hidden_size, float(config.num_landmarks)
        if config.exact or length <= m:
            attention = 4 * length * length * h
        else:
            m = -(-length // -(-length // m))  # segments with a token
            inverse = PINV_PRODUCTS * 2 * m**3 * config.num_attention_heads
            attention = 8 * length * m * h + 4 * m * m * h + inverse
        attention += 2 * length * (config.conv_kernel_size or 0) * h
        return transformer_flops_per_row(config, length, predictions, attention=attention)


def _swapped(landmarks: Any, length: Any) -> bool:
    return isinstance(landmarks, int) and isinstance(length, int) and landmarks > length
