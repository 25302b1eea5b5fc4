"""MEGA's configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ....kernels.activation import ACTIVATIONS
from ....kernels.attention import Weights
from ..config import ModelConfig

NormKind = Literal["scalenorm", "layernorm", "rmsnorm", "batchnorm", "syncbatchnorm"]


class MegaConfig(ModelConfig):
    """Fields and defaults of Hugging Face's MegaConfig (transformers 4.37)."""

    split_over_tensor = ("hidden_size", "intermediate_size", "nffn_hidden_size")
    length_field = "max_positions"

    model_type: str = ModelConfig.with_default("model_type", "mega")
    hidden_size: int = ModelConfig.with_default("hidden_size", 128)
    num_hidden_layers: int = ModelConfig.with_default("num_hidden_layers", 4)
    intermediate_size: int = Field(256, gt=0, description="features of the values that attention averages")
    shared_representation_size: int = Field(
        64, gt=0, description="features of the shared representation, of queries and of keys"
    )
    nffn_hidden_size: int = Field(256, gt=0, description="inner features of the normalised feed-forward")
    use_normalized_ffn: bool = Field(True, description="a feed-forward after each attention")
    ema_projection_size: int = Field(16, gt=0, description="hidden dimensions of the moving average of a feature")
    bidirectional: bool = Field(True, description="average over later positions too; false for a decoder")
    truncation: int | None = Field(
        None, gt=0, description="positions that the moving average looks back, its own included; not set: all"
    )
    use_chunking: bool = Field(False, description="attend within chunks, so that the cost is linear in the length")
    chunk_size: int = Field(-1, ge=-1, description="tokens of a chunk; -1 without chunks")
    attention_activation: Weights = Field("softmax", description="what makes weights of the scores of attention")
    activation: str = Field("silu", description="activation of values, outputs and the feed-forward")
    relative_positional_bias: Literal["rotary", "simple"] = Field(
        "rotary", description="what a score gets by distance: of two rotated vectors (any length), or from a table"
    )
    max_positions: int = Field(2048, gt=0, description="longest distance in the table of a simple bias, plus 1")
    normalization_type: NormKind = Field("scalenorm", description="the norm of each branch")
    norm_affine: bool = Field(True, description="whether norms have weights")
    normalize_before_mega: bool = Field(True, description="norm before the attention (true) or after its residual")
    normalize_before_ffn: bool = Field(True, description="norm before the feed-forward (true) or after its residual")
    dropout_prob: float = Field(0.1, ge=0.0, lt=1.0, description="dropout of moving averages and of branches' outputs")
    hidden_dropout_prob: float = Field(0.1, ge=0.0, lt=1.0, description="dropout of values")
    attention_probs_dropout_prob: float = Field(0.1, ge=0.0, lt=1.0, description="dropout of the attention weights")
    nffn_activation_dropout_prob: float = Field(
        0.1, ge=0.0, lt=1.0, description="dropout of the feed-forward's inner features"
    )
    use_feature_dropout: bool = Field(
        False, description="all dropout but the attention weights' drops features of a whole document"
    )
    add_token_type_embeddings: bool = Field(False, description="embed token types")
    add_lm_hidden_dense_layer: bool = Field(True, description="dense and tanh before the output weight")
    add_cross_attention: bool = Field(False, description="attend to an encoder's hidden states (not for pretraining)")
    ema_delta_alpha_range: float = Field(0.2, gt=0.0, description="standard deviation of damping and decay at first")
    ema_beta_range: float = Field(0.02, gt=0.0, description="of the expansion of the moving average, around ±1")
    ema_gamma_omega_range: float = Field(1.0, gt=0.0, description="of its projection and residual weight")
    pad_token_id: int | None = ModelConfig.with_default("pad_token_id", 1)
    bos_token_id: int | None = ModelConfig.with_default("bos_token_id", 0)
    eos_token_id: int | None = ModelConfig.with_default("eos_token_id", 2)

    @model_validator(mode="after")
    def _check_mega(self) -> MegaConfig:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is unknown: choose one of {', '.join(ACTIVATIONS)}")
        if self.is_decoder and self.bidirectional:
            raise ValueError("is_decoder true does not go with bidirectional true, which sees what follows: set false")
        if self.add_cross_attention and not self.is_decoder:
            raise ValueError("add_cross_attention true needs is_decoder true: a decoder attends to an encoder")
        if self.chunk_size == 0 or (self.use_chunking and self.chunk_size < 0):
            raise ValueError(f"chunk_size {self.chunk_size} is no size of a chunk: set 1 or more, or -1 without chunks")
        if self.relative_positional_bias == "rotary" and self.shared_representation_size % 2:
            raise ValueError(
                f"shared_representation_size {self.shared_representation_size} is odd, and relative_positional_bias "
                "rotary turns pairs of features: make it even, or the bias simple"
            )
        if self.relative_positional_bias == "simple" and self.chunk_size > self.max_positions:
            raise ValueError(
                f"chunk_size {self.chunk_size} exceeds max_positions {self.max_positions}, the table of a simple bias: "
                "raise max_positions"
            )
        return self

    @property
    def attention_chunk(self) -> int | None:
        return self.chunk_size if self.use_chunking else None

    @property
    def bias_positions(self) -> int:
        """Where the middle of a simple bias's table is: a chunk size counts even where it is not used."""
        return self.chunk_size if self.chunk_size > 0 else self.max_positions

    @property
    def longest_sequence(self) -> int | None:
        return None if self.use_chunking or self.relative_positional_bias == "rotary" else self.bias_positions

    @property
    def export_note(self) -> str | None:
        """For the stock classes."""
        notes = []
        if self.use_chunking:
            notes.append(
                f"take rows of a multiple of chunk_size {self.chunk_size} tokens only and generate without cache"
            )
        if self.is_decoder and self.attention_activation != "softmax":
            notes.append(f"divide {self.attention_activation} scores by 1 in generate() unless use_cache is false")
        if self.use_feature_dropout:
            notes.append("drop whole chunks of values in training (use_feature_dropout)")
        return f"the stock classes of transformers 4.37 {'; '.join(notes)}" if notes else None

    @property
    def needs_encoder(self) -> bool:
        return self.add_cross_attention

    @property
    def has_running_statistics(self) -> bool:
        return self.normalization_type in ("batchnorm", "syncbatchnorm")
