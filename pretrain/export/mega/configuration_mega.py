"""Configuration of MEGA (moving average equipped gated attention, arXiv 2209.10655) for Hugging Face transformers.

This file, `layers_mega.py` and `modeling_mega.py` beside it travel with the weights and need only torch and
transformers (4.37 and later, 5 included). Load the folder with
`AutoModel….from_pretrained(folder, trust_remote_code=True)`.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

# "mega": the stock classes of transformers 4.37 compute the same. "farspan_mega": they do not, and must not try.
MODEL_TYPES = ("mega", "farspan_mega")
CHOICES = {
    "attention_activation": ("softmax", "relu2", "laplace"),
    "normalization_type": ("layernorm", "scalenorm", "rmsnorm", "batchnorm", "syncbatchnorm"),
    "relative_positional_bias": ("rotary", "simple"),
}


class MegaConfig(PretrainedConfig):  # type: ignore[misc]
    """Shape and options of a MEGA model; names and defaults are those of transformers 4.37's `MegaConfig`.

    Args:
        vocab_size, hidden_size, num_hidden_layers: as everywhere. `hidden_size` is the paper's d.
        intermediate_size: features of the attention's values (v).
        shared_representation_size: features of queries and keys (z).
        ema_projection_size: dimensions of each feature's moving average (h, here N).
        bidirectional: a second moving average runs backwards. Not for a decoder: it would see the future.
        use_chunking, chunk_size: attend within chunks of this length, counted from the row's start. Rows may have any
            length; the last chunk may be shorter.
        truncation: the moving average reaches back over this many tokens, itself included; None: without end.
        normalize_before_mega, normalize_before_ffn: pre-norm (True) or post-norm of the two halves of a layer.
        normalization_type: layernorm, scalenorm, rmsnorm, batchnorm or syncbatchnorm.
        norm_affine: whether norms have weights.
        activation: of values, outputs and the feed-forward: silu, relu, linear, gelu, gelu_accurate, or any other
            name that transformers knows.
        attention_activation: softmax, relu2 or laplace.
        dropout_prob, hidden_dropout_prob, attention_probs_dropout_prob, nffn_activation_dropout_prob: probabilities
            of dropout after the moving average and at the outputs; on values; on attention weights; inside the
            feed-forward.
        use_feature_dropout: drop whole features of a row (all positions at once) instead of single elements;
            attention weights keep ordinary dropout.
        use_normalized_ffn, nffn_hidden_size: whether layers have a feed-forward half, and its width.
        max_positions: most tokens of a row (of a chunk: `chunk_size`) with the "simple" bias; "rotary" has no limit.
        add_token_type_embeddings, type_vocab_size: token types.
        relative_positional_bias: rotary or simple.
        initializer_range, ema_delta_alpha_range, ema_beta_range, ema_gamma_omega_range: standard deviations of
            initial values.
        classifier_dropout: dropout of classification heads; None: `hidden_dropout_prob`.
        add_lm_hidden_dense_layer: a dense layer with tanh before the language modelling head.
        is_decoder: causal attention; needed by `MegaForCausalLM`.
        add_cross_attention: layers also attend to `encoder_hidden_states`; only in a decoder.
        use_cache: whether causal models return the state that later calls go on from.
        tie_word_embeddings: the language modelling head uses the word embeddings' matrix.

    Raises:
        ValueError: a value that no model can have, in one line.
    """

    model_type = "mega"
    _auto_class = "AutoConfig"

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        intermediate_size: int = 256,
        ema_projection_size: int = 16,
        bidirectional: bool = True,
        shared_representation_size: int = 64,
        use_chunking: bool = False,
        chunk_size: int = -1,
        truncation: int | None = None,
        normalize_before_mega: bool = True,
        normalization_type: str = "scalenorm",
        norm_affine: bool = True,
        activation: str = "silu",
        attention_activation: str = "softmax",
        dropout_prob: float = 0.1,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        use_feature_dropout: bool = False,
        use_normalized_ffn: bool = True,
        nffn_hidden_size: int = 256,
        normalize_before_ffn: bool = True,
        nffn_activation_dropout_prob: float = 0.1,
        max_positions: int = 2048,
        add_token_type_embeddings: bool = False,
        type_vocab_size: int = 2,
        initializer_range: float = 0.02,
        ema_delta_alpha_range: float = 0.2,
        ema_beta_range: float = 0.02,
        ema_gamma_omega_range: float = 1.0,
        pad_token_id: int | None = 1,
        bos_token_id: int | None = 0,
        eos_token_id: int | None = 2,
        relative_positional_bias: str = "rotary",
        classifier_dropout: float | None = None,
        use_cache: bool = True,
        add_lm_hidden_dense_layer: bool = True,
        is_decoder: bool = False,
        add_cross_attention: bool = False,
        tie_word_embeddings: bool = True,
        model_type: str = "mega",
        **kwargs: Any,
    ) -> None:
        kwargs.pop("num_attention_heads", None)
        # transformers 4 takes the rest of these in its base class, 5 leaves them to the model's own.
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            is_decoder=is_decoder,
            add_cross_attention=add_cross_attention,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        self.model_type = model_type
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = 1  # what transformers asks every config for
        self.intermediate_size = intermediate_size
        self.ema_projection_size = ema_projection_size
        self.bidirectional = bidirectional
        self.shared_representation_size = shared_representation_size
        self.use_chunking = use_chunking
        self.chunk_size = chunk_size
        self.truncation = truncation
        self.normalize_before_mega = normalize_before_mega
        self.normalization_type = normalization_type
        self.norm_affine = norm_affine
        self.activation = activation
        self.attention_activation = attention_activation
        self.dropout_prob = dropout_prob
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.use_feature_dropout = use_feature_dropout
        self.use_normalized_ffn = use_normalized_ffn
        self.nffn_hidden_size = nffn_hidden_size
        self.normalize_before_ffn = normalize_before_ffn
        self.nffn_activation_dropout_prob = nffn_activation_dropout_prob
        self.max_positions = max_positions
        self.add_token_type_embeddings = add_token_type_embeddings
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.ema_delta_alpha_range = ema_delta_alpha_range
        self.ema_beta_range = ema_beta_range
        self.ema_gamma_omega_range = ema_gamma_omega_range
        self.relative_positional_bias = relative_positional_bias
        self.classifier_dropout = classifier_dropout
        self.use_cache = use_cache
        self.add_lm_hidden_dense_layer = add_lm_hidden_dense_layer
        self.check()

    def check(self) -> None:
        """Refuses, in one line, what no model can be. Models ask again: the fields may have been set since."""
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be one of {', '.join(allowed)}")
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"model_type is {self.model_type!r}: it must be one of {', '.join(MODEL_TYPES)}")
        if self.is_decoder and self.bidirectional:
            raise ValueError(
                "is_decoder and bidirectional are both true: a moving average that runs backwards sees the tokens "
                "to be predicted; set bidirectional=False"
            )
        if self.add_cross_attention and not self.is_decoder:
            raise ValueError("add_cross_attention is true and is_decoder is not: only a decoder has cross-attention")
        if self.chunk_size < 1 and (self.use_chunking or self.chunk_size != -1):
            raise ValueError(f"chunk_size is {self.chunk_size}: it must be at least 1, or -1 with use_chunking=False")
        if self.truncation is not None and self.truncation < 1:
            raise ValueError(f"truncation is {self.truncation}: it must be at least 1, or None for no truncation")
        if self.relative_positional_bias == "simple" and self.chunk_size > self.max_positions:
            raise ValueError(
                f"chunk_size is {self.chunk_size} and max_positions {self.max_positions}: the simple relative bias "
                "has no entry for chunks longer than max_positions"
            )
        if self.relative_positional_bias == "rotary" and self.shared_representation_size % 2:
            raise ValueError(
                f"shared_representation_size is {self.shared_representation_size}: the rotary relative bias turns "
                "pairs of features, so it must be even"
            )

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What config.json holds, and the arguments left over, as in transformers.

        Its `model_type` is either of two names and stays what it is. transformers compares it with the class's own
        name and warns where the two differ; it finds nothing to compare when the name comes under another key.
        """
        config, rest = super().get_config_dict(*args, **kwargs)
        if config.get("model_type") in MODEL_TYPES:
            config["mega_model_type"] = config.pop("model_type")
        return config, rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A config from what config.json holds; `kwargs` change single fields."""
        config_dict = dict(config_dict)
        if "mega_model_type" in config_dict:
            config_dict["model_type"] = config_dict.pop("mega_model_type")
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All fields, for config.json: with the model type that this folder has, not the class's."""
        return {**super().to_dict(), "model_type": self.model_type}
