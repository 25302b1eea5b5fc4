"""Nyströmformer (arXiv 2102.03902) for Hugging Face transformers.

This file, `modeling_encoder.py` and `configuration_nystromformer.py` beside it travel with the weights and need only
torch and transformers (4.37 and later, 5 included). Tensor names are those of transformers' Nyströmformer classes.
What differs from them:

- rows have any length, not `segment_means_seq_len` only;
- with `inv_coeff_init_option` a row's result does not depend on the rows beside it;
- without `padding_counts` a row's result does not depend on its padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_nystromformer import NystromformerConfig
from .modeling_encoder import (
    EncoderForMaskedLM,
    EncoderForMultipleChoice,
    EncoderForQuestionAnswering,
    EncoderForSequenceClassification,
    EncoderForTokenClassification,
    EncoderModel,
    EncoderPreTrainedModel,
    EncoderSelfAttention,
    tied,
)

STEPS = 6  # of the pseudo-inverse's iteration


def masked_softmax(scores: Tensor, seen: Tensor) -> Tensor:
    """softmax over the last dimension's elements where `seen`, which broadcasts; zeros where there is none."""
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) * seen


class NystromformerSelfAttention(EncoderSelfAttention):
    """softmax(q k̃ᵀ) · pinv(softmax(q̃ k̃ᵀ)) · softmax(q̃ kᵀ) v, with q̃ and k̃ the means of segments (the landmarks), plus
    a convolution of v over places in the row.
    """

    def __init__(self, config: NystromformerConfig) -> None:
        super().__init__(config)
        self.landmarks = config.num_landmarks
        self.exact = config.num_landmarks == config.segment_means_seq_len
        self.per_matrix = config.inv_coeff_init_option
        self.conv = None
        if config.conv_kernel_size is not None:
            size = (config.conv_kernel_size, 1)
            middle = (config.conv_kernel_size // 2, 0)
            self.conv = nn.Conv2d(self.heads, self.heads, size, padding=middle, groups=self.heads, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        """Zeros at padding, unless it counts."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, d]
        if self.padding_counts:
            return self._attend(q, k, v, torch.ones_like(real), real).transpose(1, 2)
        # The real tokens of each row moved to its front, and the result moved back.
        order = (~real).int().sort(dim=1, stable=True).indices[:, None, :, None].expand_as(v)
        front = torch.arange(v.shape[2], device=v.device) < real.sum(1, keepdim=True)
        y = self._attend(q.gather(2, order), k.gather(2, order), v.gather(2, order), front, front)
        return torch.zeros_like(y).scatter(2, order, y).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, inside: Tensor, seen: Tensor) -> Tensor:
        """q, k, v: [B, H, L, d]; inside: [B, L], tokens that there are, the first of each row; seen: [B, L], those of
        them that are keys → [B, H, L, d].
        """
        q, k = (x * x.shape[-1] ** -0.25 for x in (q, k))
        if self.exact:
            y = masked_softmax(q @ k.mT, seen[:, None, None]) @ v
        else:
            y = self._nystrom(q, k, v, inside, seen)
        inside = inside[:, None, :, None]
        if self.conv is not None:
            weight, padding = self.conv.weight.to(v.dtype), self.conv.padding
            y = y + F.conv2d(v * inside, weight, padding=padding, groups=self.heads)
        return y * inside

    def _nystrom(self, q: Tensor, k: Tensor, v: Tensor, inside: Tensor, seen: Tensor) -> Tensor:
        length, m = inside.shape[1], self.landmarks
        count = inside.sum(1, keepdim=True)  # [B, 1]
        size = (count + m - 1) // m  # of a segment; the last one may be shorter, and further ones are empty
        segment = torch.arange(length, device=q.device) // size.clamp(min=1)  # [B, L]
        members = (segment[:, None] == torch.arange(m, device=q.device)[:, None]) & inside[:, None]  # [B, m, L]
        there = members.any(2)[:, None]  # [B, 1, m]
        average = members[:, None].to(q.dtype)
        average = average / average.sum(3, keepdim=True).clamp(min=1)
        q_mean, k_mean = average @ q, average @ k  # [B, H, m, d]

        # Empty segments are no landmarks: their rows and columns are zero, in the inverse as well.
        to_landmarks = masked_softmax(q @ k_mean.mT, there[:, :, None])  # [B, H, L, m]
        between = masked_softmax(q_mean @ k_mean.mT, there[:, :, None]) * there[..., None]  # [B, H, m, m]
        found = masked_softmax(q_mean @ k.mT, seen[:, None, None]) @ v  # [B, H, m, d]
        short = count <= m  # [B, 1]: every token is a landmark of its own, and `found` is exact attention
        y = to_landmarks @ (self._inverse(between, short) @ found)
        found = F.pad(found, (0, 0, 0, length - m))  # or cut
        return torch.where(short[:, None, None], found, y)

    def _inverse(self, a: Tensor, short: Tensor) -> Tensor:
        """The pseudo-inverse, by iteration, of matrices [B, H, m, m] whose rows add up to 1 or are zero.

        It starts from the transpose over the largest column sum, which is at least 1 in a matrix that is not zero.
        """
        largest = a.sum(2).amax(2)  # [B, H]
        if not self.per_matrix:
            largest = largest.masked_fill(short, 0.0).amax()
        z = a.mT / largest[..., None, None].clamp(min=0.5)
        one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        for _ in range(STEPS):
            az = a @ z
            z = 0.25 * z @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
        return z


class NystromformerPreTrainedModel(EncoderPreTrainedModel):
    """Loading, saving and initial values."""

    config_class = NystromformerConfig
    base_model_prefix = "nystromformer"
    attention_class = NystromformerSelfAttention


class NystromformerModel(NystromformerPreTrainedModel, EncoderModel):
    """Nyströmformer without a head."""


class NystromformerForMaskedLM(NystromformerPreTrainedModel, EncoderForMaskedLM):
    """Nyströmformer with a masked language modelling head."""

    body_class = NystromformerModel
    _tied_weights_keys = tied("nystromformer")


class NystromformerForSequenceClassification(NystromformerPreTrainedModel, EncoderForSequenceClassification):
    """Nyströmformer with a classification or regression head on the first token."""

    body_class = NystromformerModel


class NystromformerForTokenClassification(NystromformerPreTrainedModel, EncoderForTokenClassification):
    """Nyströmformer with a classification head on each token."""

    body_class = NystromformerModel


class NystromformerForMultipleChoice(NystromformerPreTrainedModel, EncoderForMultipleChoice):
    """Nyströmformer with a score for each of several rows, the choices."""

    body_class = NystromformerModel


class NystromformerForQuestionAnswering(NystromformerPreTrainedModel, EncoderForQuestionAnswering):
    """Nyströmformer with a head for the start and the end of an answer in the row."""

    body_class = NystromformerModel
