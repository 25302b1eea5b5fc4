"""The Hugging Face names of what architectures share; many model classes use those of BERT."""

from __future__ import annotations

from .config import ModelConfig

# Logical name → the Hugging Face tensors that it is (several: stacked along a new first dimension).
HuggingFaceKeys = dict[str, tuple[str, ...]]


def layer_keys(logical: str, *huggingface: str) -> HuggingFaceKeys:
    """The weight and the bias of one layer (several: stacked along a new first dimension)."""
    return {f"{logical}.{kind}": tuple(f"{name}.{kind}" for name in huggingface) for kind in ("weight", "bias")}


def embedding_keys(prefix: str) -> HuggingFaceKeys:
    """The three tables under Hugging Face's BERT names."""
    tables = {"words": "word", "types": "token_type", "positions": "position"}
    return {f"embeddings.{ours}.weight": (f"{prefix}embeddings.{hf}_embeddings.weight",) for ours, hf in tables.items()}


def head_keys(config: ModelConfig, heads: tuple[str, ...], prefix: str) -> HuggingFaceKeys:
    """The heads under Hugging Face's BERT names; ``prefix``: what stands before the model's own tensors."""
    keys: HuggingFaceKeys = {}
    if "lm" in heads:
        keys |= layer_keys("lm_head.dense", "cls.predictions.transform.dense")
        keys |= layer_keys("lm_head.norm", "cls.predictions.transform.LayerNorm")
        keys["lm_head.decoder.bias"] = ("cls.predictions.bias",)
        if not config.tie_word_embeddings:
            keys["lm_head.decoder.weight"] = ("cls.predictions.decoder.weight",)
    if "nsp" in heads:
        keys |= layer_keys("sentence_head.pooler", f"{prefix}pooler.dense")
        keys |= layer_keys("sentence_head.classifier", "cls.seq_relationship")
    return keys


def head_aliases(config: ModelConfig, heads: tuple[str, ...], prefix: str) -> dict[str, str]:
    """The second names of the tensors of ``head_keys``."""
    if "lm" not in heads:
        return {}
    aliases = {"cls.predictions.decoder.bias": "cls.predictions.bias"}
    if config.tie_word_embeddings:
        aliases["cls.predictions.decoder.weight"] = f"{prefix}embeddings.word_embeddings.weight"
    return aliases
