"""The models that `farspan bench train` measures, and their batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..batch import Batch
from ..config import Config
from ..config_file import parse_config
from ..models import architecture

MASKED = 0.15
PAD, FIRST_WORD = 1, 5  # of the synthetic vocabulary: special tokens come first
CHUNK = 512  # of MEGA


@dataclasses.dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    heads: int
    representation: int  # MEGA's shared one
    words: int = 50265


SIZES = {"tiny": Size(2, 64, 2, 16, 512), "base": Size(12, 768, 12, 128), "large": Size(24, 1024, 16, 256)}
# Megatron-BERT of the large size is the model of 345 million parameters, with BERT's cased vocabulary.
WORDS = {"megatron-bert": 29056}


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Of hidden states, and of the weights of attention where the architecture has such."""

    hidden: float = 0.1
    weights: float = 0.0

    def __str__(self) -> str:
        return f"{self.hidden:g}, of the weights of attention {self.weights:g}"


@dataclasses.dataclass(frozen=True)
class Setup:
    """One line of the table."""

    architecture: str
    size: str
    length: int

    @property
    def name(self) -> str:
        return f"{self.architecture} {self.size} {self.length}"

    def fields(self, dropout: Dropout) -> dict[str, Any]:
        """The model section of a configuration, in Hugging Face's names."""
        size = SIZES[self.size]
        h, words = size.hidden, min(WORDS.get(self.architecture, size.words), size.words)
        fields: dict[str, Any] = {
            "model_type": self.architecture, "vocab_size": words, "hidden_size": h, "num_hidden_layers": size.layers,
            "pad_token_id": PAD, "hidden_dropout_prob": dropout.hidden, "attention_probs_dropout_prob": dropout.weights,
        }  # fmt: skip
        if self.architecture == "mega":
            return fields | {
                "intermediate_size": 2 * h, "nffn_hidden_size": 2 * h,
                "shared_representation_size": size.representation, "ema_projection_size": 16,
                "use_chunking": True, "chunk_size": min(CHUNK, self.length),
                "normalization_type": "layernorm", "dropout_prob": dropout.hidden, "nffn_activation_dropout_prob": 0.0,
            }  # fmt: skip
        positions = self.length + (PAD + 1 if self.architecture == "roberta-prelayernorm" else 0)
        fields |= {
            "num_attention_heads": size.heads, "intermediate_size": 4 * h, "max_position_embeddings": positions,
        }  # fmt: skip
        if self.architecture in ("mra", "nystromformer"):
            fields["attention_probs_dropout_prob"] = 0.0  # they have no such weights
        if self.architecture == "mra":
            fields["block_per_row"] = 4 if self.length <= 512 else 8 if self.length <= 4096 else 16
        if self.architecture == "nystromformer":
            landmarks = min(64, self.length // 4)
            fields |= {"num_landmarks": landmarks, "segment_means_seq_len": self.length, "conv_kernel_size": 65}
        return fields

    def config(self, *, rows: int, dtype: torch.dtype, dropout: Dropout) -> Config:
        """A run of this model with steps of ``rows`` rows.  Nothing is read from its folders."""
        return parse_config(
            {
                "run_dir": "bench",
                "model": self.fields(dropout),
                "data": {"folder": "bench", "sequence_length": self.length},
                "objective": {"probability": MASKED},
                "training": {
                    "global_batch_size": rows, "micro_batch_size": rows, "gradient_clipping": 1.0,
                    "dtype": str(dtype).split(".")[1],
                },
            },
            "bench",
        )  # fmt: skip

    def flops(self, config: Config, rows: int) -> float:
        """The model's own floating-point operations in a step of ``rows`` rows."""
        return rows * architecture(self.architecture).flops_per_row(config.model, self.length, self.predictions)

    @property
    def predictions(self) -> int:
        return max(round(MASKED * self.length), 1)

    def batch(self, rows: int, seed: int) -> Batch:
        """Full rows of random words, each one document, with masked words to predict."""
        numbers = torch.Generator().manual_seed(seed)
        words = self.fields(Dropout())["vocab_size"]
        ids = torch.randint(FIRST_WORD, words, (rows, self.length), generator=numbers)
        chosen = torch.rand(rows, self.length, generator=numbers).argsort(1)[:, : self.predictions].sort(1).values
        labels = ids.gather(1, chosen)
        return Batch(
            input_ids=ids.scatter(1, chosen, FIRST_WORD - 1),
            document_ids=torch.ones_like(ids),
            positions=torch.arange(self.length).repeat(rows, 1),
            token_type_ids=torch.zeros_like(ids),
            sample_ids=torch.arange(rows),
            attention="document",
            labels=labels,
            label_weights=torch.ones(rows, self.predictions),
            label_positions=chosen,
        )
