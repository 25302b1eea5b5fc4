"""Megatron-BERT (arXiv 1909.08053, section 5.3): BERT with norms before the branches and none on the embeddings."""

from __future__ import annotations

from pydantic import Field, model_validator

from ...kernels.activation import ACTIVATIONS
from .bert import BertModel, embedding_keys, head_aliases, head_keys
from .config import ModelConfig
from .dense_attention import DenseAttention, DenseAttentionConfig, dense_flops_per_row, dense_keys
from .huggingface_keys import HuggingFaceKeys, layer_keys
from .transformer import PreNormLayer, TransformerConfig


class MegatronBertConfig(DenseAttentionConfig):
    """Fields and defaults of Hugging Face's MegatronBertConfig."""

    model_type: str = ModelConfig.with_default("model_type", "megatron-bert")
    hidden_size: int = ModelConfig.with_default("hidden_size", 1024)
    num_hidden_layers: int = ModelConfig.with_default("num_hidden_layers", 24)
    num_attention_heads: int = TransformerConfig.with_default("num_attention_heads", 16)
    intermediate_size: int = ModelConfig.with_default("intermediate_size", 4096)
    pad_token_id: int | None = ModelConfig.with_default("pad_token_id", 0)
    head_act: str | None = Field(
        None, description="activation of the head's dense layer; null: hidden_act (Megatron-LM's fused gelu is the "
        "tanh approximation in its layers alone)",
    )  # fmt: skip

    @model_validator(mode="after")
    def _check_head_activation(self) -> MegatronBertConfig:
        if self.head_act is not None and self.head_act not in ACTIVATIONS:
            raise ValueError(f"head_act {self.head_act!r} is unknown: choose one of {', '.join(ACTIVATIONS)}")
        return self

    @property
    def export_note(self) -> str | None:
        notes = [super().export_note]
        if self.head_act not in (None, self.hidden_act):
            notes.append(
                f"transformers has no head_act: its head computes {self.hidden_act} where this model has "
                f"{self.head_act}, and its logits differ a little"
            )
        return "; ".join(note for note in notes if note) or None


class MegatronBert(BertModel):
    name = "megatron-bert"
    config_class = MegatronBertConfig
    operations = (*BertModel.operations, "attention")
    heads_allowed = ("lm", "nsp")
    config: MegatronBertConfig

    def make_layer(self, index: int) -> PreNormLayer:
        return PreNormLayer(self.config, self.mesh, index, DenseAttention(self.config, self.mesh, index))

    def head_activation(self) -> str:
        return self.config.head_act or self.config.hidden_act

    def uses_position_table(self) -> bool:
        return self.config.position_embedding_type == "absolute"

    @classmethod
    def huggingface_keys(cls, config: MegatronBertConfig, heads: tuple[str, ...]) -> HuggingFaceKeys:  # type: ignore[override]
        prefix = "bert." if heads else ""
        keys = embedding_keys(prefix)
        for i in range(config.num_hidden_layers):
            keys |= dense_keys(config, i, f"{prefix}encoder.layer.{i}", norms=("attention.ln", "ln"))
        keys |= layer_keys("final_norm", f"{prefix}encoder.ln")
        return keys | head_keys(config, heads, prefix)

    @classmethod
    def huggingface_aliases(cls, config: ModelConfig, heads: tuple[str, ...]) -> dict[str, str]:
        return head_aliases(config, heads, "bert.")

    @classmethod
    def huggingface_class(cls, heads: tuple[str, ...], config: ModelConfig) -> str:
        if heads == ("lm",):
            return "MegatronBertForCausalLM" if config.is_decoder else "MegatronBertForMaskedLM"
        names = {(): "MegatronBertModel", ("nsp",): "MegatronBertForNextSentencePrediction"}
        return names.get(heads, "MegatronBertForPreTraining")

    @classmethod
    def flops_per_row(cls, config: ModelConfig, length: float, predictions: float) -> float:
        assert isinstance(config, DenseAttentionConfig)
        return dense_flops_per_row(config, length, predictions)
