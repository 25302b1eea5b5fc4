"""The configuration fields that all architectures have."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ModelConfig(BaseModel):
    """The fields that all architectures have, named as in Hugging Face's config.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
    split_over_tensor: ClassVar[tuple[str, ...]] = ("intermediate_size",)  # fields that parallel.tensor must divide
    length_field: ClassVar[str] = "max_position_embeddings"  # the field to raise for longer rows

    model_type: str = Field(..., description="the architecture")
    vocab_size: int = Field(0, ge=0, description="0: taken from the prepared data's tokenizer")
    hidden_size: int = Field(768, gt=0, description="features of a hidden state")
    num_hidden_layers: int = Field(12, gt=0, description="layers")
    intermediate_size: int = Field(3072, gt=0, description="inner features of the feed-forward")
    hidden_dropout_prob: float = Field(
        0.1, ge=0.0, lt=1.0, description="dropout of the embeddings and of every branch before it is added"
    )
    type_vocab_size: int = Field(2, gt=0, description="rows of the token-type table")
    initializer_range: float = Field(
        0.02, gt=0.0, description="standard deviation of initial weights and embeddings (biases start at 0, norms at 1)"
    )
    pad_token_id: int | None = Field(None, ge=0, description="taken from the prepared data's tokenizer where not set")
    bos_token_id: int | None = Field(None, description="taken from the prepared data's tokenizer where not set")
    eos_token_id: int | None = Field(None, description="taken from the prepared data's tokenizer where not set")
    is_decoder: bool = Field(False, description="attend to earlier positions only (the clm objective)")
    tie_word_embeddings: bool = Field(True, description="the output weight is the word embedding")

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.vocab_size and self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} is not below vocab_size {self.vocab_size}: lower it")
        return self

    @classmethod
    def with_default(cls, name: str, default: Any) -> Any:
        """The field of this name for a subclass to declare anew: another default, the same constraints and words."""
        field = copy.copy(cls.model_fields[name])
        field.default = default
        return field

    @property
    def export_note(self) -> str | None:
        """What someone who loads an export of such a model must know, if anything."""
        return None

    @property
    def longest_sequence(self) -> int | None:
        """The most tokens a row may have; None: any number."""
        return None

    @property
    def attention_chunk(self) -> int | None:
        """Tokens of the chunks that attention stays within; None: none."""
        return None

    @property
    def needs_encoder(self) -> bool:
        """Whether layers attend to the hidden states of an encoder."""
        return False

    @property
    def mixes_rows(self) -> bool:
        """Whether what a row gives depends on the other rows of its microbatch."""
        return self.has_running_statistics

    @property
    def has_running_statistics(self) -> bool:
        """Whether a norm keeps running statistics of the training data."""
        return False
