"""The reference cases of Nyströmformer (arXiv 2102.03902)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from golden_case import HOLES, LEFT, NONE, RIGHT, Case, PaddedCase, Padding, Part
from transformers import PreTrainedModel

# Attention far from uniform, and landmarks that differ: the pseudo-inverse has something to invert.
MATRIX_NOISE = 0.2
TABLE_NOISE = 0.5
CONVOLUTION_NOISE = 0.3
VECTOR_NOISE = 0.2
# The positions of a landmark have an offset in common, so that the landmarks, means of neighbours, differ.
SEGMENT_NOISE = 0.5

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 36,
    "vocab_size": 97,
    "type_vocab_size": 2,
    "conv_kernel_size": 9,
    "inv_coeff_init_option": False,  # True fails in the release
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@dataclass(frozen=True)
class NystromformerCase(PaddedCase):
    """A case of Nyströmformer."""

    def make_model(self, seed: int) -> PreTrainedModel:
        lengths = {"segment_means_seq_len": self.length, "max_position_embeddings": self.length}
        config = self.make_config({**SMALL, **lengths})
        torch.manual_seed(seed)
        model = getattr(transformers, self.model_class)(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = MATRIX_NOISE if parameter.dim() > 1 else VECTOR_NOISE
                if "embeddings.weight" in name:
                    noise = TABLE_NOISE
                elif "conv" in name:
                    noise = CONVOLUTION_NOISE
                parameter.add_(noise * torch.randn(parameter.shape))
            positions = model.nystromformer.embeddings.position_embeddings.weight
            offsets = SEGMENT_NOISE * torch.randn(config.num_landmarks, config.hidden_size)
            positions[2:].add_(offsets.repeat_interleave(config.max_position_embeddings // config.num_landmarks, dim=0))
        return model.eval()

    def parts(self, model: PreTrainedModel) -> Iterator[Part]:
        for name, parameter in model.named_parameters():
            # Each of the three softmaxes is over keys or their means, and a key bias is the same in all of them.
            yield Part(name, parameter.data, shows=not name.endswith("key.bias"))


def _mlm(
    length: int, padding: Padding = RIGHT, batch: int = 2, types: bool = False, draw: int = 0, **config: Any
) -> Case:
    return NystromformerCase("NystromformerForMaskedLM", config, length, padding, batch, types, draw=draw)


UNTIED = {"tie_word_embeddings": False}

CASES: dict[str, Case] = {
    "nystromformer-mlm": _mlm(32, NONE, 3, draw=4, num_landmarks=8),
    "nystromformer-mlm-right": _mlm(48, RIGHT, 3, num_landmarks=8, num_attention_heads=4, hidden_act="relu"),
    "nystromformer-mlm-left": _mlm(
        64, LEFT, 3, True, draw=5, num_landmarks=16, conv_kernel_size=33, hidden_act="gelu_new", vocab_size=129
    ),
    "nystromformer-mlm-holes": _mlm(48, HOLES, 3, draw=9, num_landmarks=4, num_hidden_layers=2, conv_kernel_size=3),
    "nystromformer-mlm-no-convolution": _mlm(64, RIGHT, draw=1, conv_kernel_size=None, num_landmarks=8),
    "nystromformer-mlm-no-convolution-holes": _mlm(
        48, HOLES, 3, conv_kernel_size=None, num_landmarks=16, num_attention_heads=3, hidden_size=24, type_vocab_size=1
    ),
    "nystromformer-mlm-one-row": _mlm(64, NONE, 1, draw=4, num_landmarks=16, num_hidden_layers=3, hidden_act="silu"),
    "nystromformer-mlm-untied": _mlm(
        32, HOLES, 3, True, draw=7, num_landmarks=4, pad_token_id=5, layer_norm_eps=1e-12, **UNTIED
    ),
    "nystromformer-mlm-128": _mlm(128, RIGHT, draw=5, num_landmarks=16, num_attention_heads=1, type_vocab_size=1),
    "nystromformer-mlm-512": _mlm(
        512, ((0, 0.8, 1),), 1, draw=3, hidden_size=16, num_landmarks=8, conv_kernel_size=33, type_vocab_size=1
    ),
    # As many landmarks as positions: plain softmax.
    "nystromformer-mlm-exact": _mlm(32, RIGHT, 3, draw=2, num_landmarks=32, num_hidden_layers=2),
    "nystromformer-mlm-exact-left": _mlm(
        48, LEFT, 3, True, num_landmarks=48, conv_kernel_size=3, num_attention_heads=4, hidden_act="gelu_new"
    ),
    "nystromformer-mlm-exact-no-convolution": _mlm(
        32, HOLES, 3, num_landmarks=32, conv_kernel_size=None, pad_token_id=0, hidden_act="relu", **UNTIED
    ),
    # Then rows of any length work, and the table of positions may be longer.
    "nystromformer-mlm-exact-shorter": _mlm(
        40, RIGHT, segment_means_seq_len=64, max_position_embeddings=64, num_landmarks=64, conv_kernel_size=5
    ),
}
