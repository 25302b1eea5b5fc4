"""The reference cases of RoBERTa-PreLayerNorm and Megatron-BERT."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from golden_case import Case, Part, make_ids, make_labels, uniform
from transformers import PreTrainedModel

# Large enough that attention is far from uniform and that a term dropped from a score shows in the logits.
MATRIX_NOISE = 0.15
VECTOR_NOISE = 0.2
# With relative_key_query a key bias works through the distances alone: small ones drown its gradient in rounding.
DISTANCE_NOISE = 0.6

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 44,
    "vocab_size": 129,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BATCH, LENGTH = 3, 24


@dataclass(frozen=True)
class BertCase(Case):
    """A case of the two BERTs, and where its rows are padded."""

    padding: str = "right"  # right, left, interior or none
    token_types: bool = False

    def make_model(self, seed: int) -> PreTrainedModel:
        config = self.make_config(SMALL)
        if config.model_type == "roberta-prelayernorm" and "max_position_embeddings" not in self.config:
            # Positions are counted from the padding index on.
            config.max_position_embeddings += config.pad_token_id + 1
        torch.manual_seed(seed)
        model = getattr(transformers, self.model_class)(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = MATRIX_NOISE if parameter.dim() > 1 else VECTOR_NOISE
                if "distance_embedding" in name:
                    noise = DISTANCE_NOISE
                parameter.add_(noise * torch.randn(parameter.shape))
        return model.eval()

    def make_inputs(self, config: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
        attention_mask = make_attention_mask(self.padding)
        real = attention_mask.bool()
        ids = make_ids(config, real, generator)
        if self.padding == "interior":
            ids[1, 7] = 11  # masked out by the attention mask alone: it still counts as a RoBERTa position
        labels = make_labels(config, ids, real, generator)
        inputs = {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}
        if self.token_types:
            inputs["token_type_ids"] = uniform(config.type_vocab_size, ids.shape, generator)
        if self.model_class.endswith("PreTraining"):
            inputs["next_sentence_label"] = torch.tensor([0, 1, 1])
        return inputs

    def parts(self, model: PreTrainedModel) -> Iterator[Part]:
        relative = model.config.position_embedding_type
        for name, parameter in model.named_parameters():
            # Softmax does not see what is the same for all keys, and relative positions replace the absolute table.
            unseen = (name.endswith("key.bias") and relative != "relative_key_query") or (
                name.endswith(".position_embeddings.weight") and relative != "absolute"
            )
            yield Part(name, parameter.data, shows=not unseen)


def make_attention_mask(padding: str) -> torch.Tensor:
    """[BATCH, LENGTH] of 0 and 1: a full row, then rows padded in the given place (`interior`: holes, never at 0)."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    if padding == "right":
        mask[1, 17:], mask[2, 9:] = 0, 0
    elif padding == "left":
        mask[1, :5], mask[2, :13] = 0, 0
    elif padding == "interior":
        mask[1, 6:9], mask[2, 4], mask[2, 11:16], mask[2, 21:] = 0, 0, 0, 0
    return mask


def _relative(kind: str, **others: Any) -> dict[str, Any]:
    return {"position_embedding_type": kind, **others}


CASES: dict[str, Case] = {
    "roberta-prelayernorm-mlm-relative-key": BertCase(
        "RobertaPreLayerNormForMaskedLM",
        _relative("relative_key", hidden_act="gelu_new", num_hidden_layers=1),
    ),
    # As long as there are positions: every row of the distance table is used.
    "roberta-prelayernorm-mlm-relative-key-query": BertCase(
        "RobertaPreLayerNormForMaskedLM",
        _relative(
            "relative_key_query",
            hidden_act="relu",
            num_hidden_layers=3,
            type_vocab_size=1,
            max_position_embeddings=LENGTH,
        ),
        padding="left",
    ),
    "roberta-prelayernorm-mlm-untied": BertCase(
        "RobertaPreLayerNormForMaskedLM",
        {"tie_word_embeddings": False, "pad_token_id": 5, "intermediate_size": 60, "layer_norm_eps": 1e-5},
        padding="interior",
        token_types=True,
    ),
    "roberta-prelayernorm-clm-relative-key": BertCase(
        "RobertaPreLayerNormForCausalLM",
        _relative("relative_key", hidden_act="silu", pad_token_id=3, tie_word_embeddings=False),
        padding="left",
    ),
    "roberta-prelayernorm-clm-relative-key-query": BertCase(
        "RobertaPreLayerNormForCausalLM",
        _relative("relative_key_query", num_hidden_layers=1, vocab_size=97),
        padding="interior",
        token_types=True,
    ),
    "roberta-prelayernorm-clm-left-padded": BertCase(
        "RobertaPreLayerNormForCausalLM",
        {"hidden_act": "gelu_new", "num_hidden_layers": 3, "type_vocab_size": 1, "intermediate_size": 52},
        padding="left",
    ),
    "megatron-bert-mlm-relative-key": BertCase(
        "MegatronBertForMaskedLM",
        _relative("relative_key", hidden_act="relu", num_hidden_layers=1, layer_norm_eps=1e-5),
        padding="left",
        token_types=True,
    ),
    "megatron-bert-mlm-untied": BertCase(
        "MegatronBertForMaskedLM",
        {"tie_word_embeddings": False, "hidden_act": "gelu_new", "pad_token_id": 3, "intermediate_size": 60},
        padding="interior",
    ),
    "megatron-bert-pretraining-relative-key-query": BertCase(
        "MegatronBertForPreTraining",
        _relative(
            "relative_key_query", hidden_act="silu", num_hidden_layers=3, vocab_size=97, max_position_embeddings=LENGTH
        ),
        padding="interior",
        token_types=True,
    ),
    "megatron-bert-pretraining-untied": BertCase(
        "MegatronBertForPreTraining",
        {"tie_word_embeddings": False, "hidden_act": "gelu_new", "type_vocab_size": 1, "pad_token_id": 7},
    ),
    "megatron-bert-clm-relative-key": BertCase(
        "MegatronBertForCausalLM",
        _relative("relative_key", num_hidden_layers=1, tie_word_embeddings=False, intermediate_size=52),
        padding="left",
    ),
    "megatron-bert-clm-relative-key-query": BertCase(
        "MegatronBertForCausalLM",
        _relative("relative_key_query", hidden_act="relu", num_hidden_layers=3, type_vocab_size=1),
        padding="none",
        token_types=True,
    ),
}
