"""Encoders with BERT's layout for Hugging Face transformers: all but their attention, and the heads on top.

This file travels with the weights, beside the two files of the architecture that uses it, and needs only torch and
transformers (4.37 and later, 5 included). Tensor names are those of the architecture's classes in transformers.

Shapes: B rows, L tokens, D features, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

POSITION_OFFSET = 2  # a row's first token has this position: the table's first two rows are unused


class EncoderConfig(PretrainedConfig):  # type: ignore[misc]
    """What the architectures' configs share; names are those of transformers' own.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: as everywhere.
        hidden_act: of the feed-forward, the language modelling head and the classification head: a name that
            transformers knows.
        hidden_dropout_prob: dropout of embeddings, of both halves of a layer, and in heads.
        attention_probs_dropout_prob: kept for the record; attention has no dropout, as in transformers' classes.
        max_position_embeddings: the most tokens of a row. Positions count places in the row, padding included.
        type_vocab_size: token types.
        initializer_range: standard deviation of initial values.
        layer_norm_eps: added to the variance in norms.
        padding_counts: whether attention sees padding as transformers' classes let it (each architecture's attention
            says how). If not, a row's result does not depend on its padding.
        tie_word_embeddings: the language modelling head uses the word embeddings' matrix.
        model_type: the architecture's name with "farspan_" before it (the default) or as transformers has it.

    A value that no model can have is a ValueError of one line.
    """

    _auto_class = "AutoConfig"
    model_type = "farspan_encoder"
    flags = ["padding_counts"]  # fields that are true or false  # noqa: RUF012
    least = {"max_position_embeddings": 1}  # fields that are whole numbers, and the least each may be  # noqa: RUF012

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        max_position_embeddings: int,
        type_vocab_size: int,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        padding_counts: bool = False,
        pad_token_id: int | None = 1,
        bos_token_id: int | None = 0,
        eos_token_id: int | None = 2,
        tie_word_embeddings: bool = True,
        position_embedding_type: str = "absolute",
        model_type: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        self.model_type = model_type or type(self).model_type
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.padding_counts = padding_counts
        self.position_embedding_type = position_embedding_type

    @classmethod
    def model_types(cls) -> tuple[str, str]:
        """What `model_type` may be: transformers' own name, and this folder's, which no other class takes for its."""
        own = cls.model_type
        return own.removeprefix("farspan_"), own

    def check(self) -> None:
        """Refuses, in one line, what no model can be. Models ask again: the fields may have been set since."""
        if self.model_type not in (types := self.model_types()):
            raise ValueError(f"model_type is {self.model_type!r}: it must be one of {', '.join(types)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size} and num_attention_heads {self.num_attention_heads}: heads are "
                "equally wide, so it must be a multiple"
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act is {self.hidden_act!r}: it must be one of {', '.join(ACT2FN)}")
        if self.position_embedding_type != "absolute":
            raise ValueError(
                f"position_embedding_type is {self.position_embedding_type!r}: this architecture has absolute "
                "positions only; set 'absolute'"
            )
        for name in self.flags:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be true or false")
        for name, least in self.least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}: it must be a whole number, at least {least}")

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What config.json holds, and the arguments left over, as in transformers.

        Its `model_type` is either of two names and stays what it is. transformers compares it with the class's own
        name and warns where the two differ; it finds nothing to compare when the name comes under another key.
        """
        config, rest = super().get_config_dict(*args, **kwargs)
        if config.get("model_type") in cls.model_types():
            config["given_model_type"] = config.pop("model_type")
        return config, rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A config from what config.json holds; `kwargs` change single fields."""
        config_dict = dict(config_dict)
        if "given_model_type" in config_dict:
            config_dict["model_type"] = config_dict.pop("given_model_type")
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All fields, for config.json: with the model type that this folder has, not the class's."""
        return {**super().to_dict(), "model_type": self.model_type}


# The encoder.


class EncoderEmbeddings(nn.Module):
    """Words, positions and token types, added up and normalised."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.most_tokens = config.max_position_embeddings
        positions = config.max_position_embeddings + POSITION_OFFSET
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(positions, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, words: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        length = words.shape[1]
        if position_ids is None:
            if length > self.most_tokens:
                raise ValueError(
                    f"rows of {length} tokens: the table of positions has room for {self.most_tokens} "
                    "(max_position_embeddings); cut the rows"
                )
            position_ids = torch.arange(POSITION_OFFSET, POSITION_OFFSET + length, device=words.device)
        if token_type_ids is None:
            token_type_ids = torch.zeros(words.shape[:2], dtype=torch.long, device=words.device)
        x = words + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(x))


class EncoderSelfAttention(nn.Module):
    """Queries, keys and values in heads; how they attend, each architecture says in `attend`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.padding_counts = config.padding_counts
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """x: [B, L, D]; real: [B, L], False at padding → [B, L, D]. Inside, everything is in float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k, v = (layer(x).to(wide).unflatten(-1, (self.heads, -1)) for layer in (self.query, self.key, self.value))
        with torch.autocast(x.device.type, enabled=False):
            return self.attend(q, k, v, real).flatten(2).to(x.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        """q, k, v: [B, L, H, D / H]; real: [B, L] → [B, L, H, D / H]."""
        raise NotImplementedError


class EncoderAddNorm(nn.Module):
    """The end of half a layer: a dense layer, dropout, what went in added, the norm."""

    def __init__(self, config: EncoderConfig, features: int) -> None:
        super().__init__()
        self.dense = nn.Linear(features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class EncoderAttention(nn.Module):
    def __init__(self, config: EncoderConfig, attention: type[EncoderSelfAttention]) -> None:
        super().__init__()
        self.self = attention(config)
        self.output = EncoderAddNorm(config, config.hidden_size)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        return self.output(self.self(x, real), x)


class EncoderIntermediate(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(x))


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each followed by its norm."""

    def __init__(self, config: EncoderConfig, attention: type[EncoderSelfAttention]) -> None:
        super().__init__()
        self.attention = EncoderAttention(config, attention)
        self.intermediate = EncoderIntermediate(config)
        self.output = EncoderAddNorm(config, config.intermediate_size)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        x = self.attention(x, real)
        return self.output(self.intermediate(x), x)


class EncoderLayers(nn.Module):
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, config: EncoderConfig, attention: type[EncoderSelfAttention]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(EncoderLayer(config, attention) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False  # set by transformers, as is the function

    def forward(self, x: Tensor, real: Tensor) -> list[Tensor]:
        """What goes into the first layer and what comes out of each."""
        states = [x]
        for layer in self.layer:
            again = self.gradient_checkpointing and self.training
            given = states[-1], real
            states.append(self._gradient_checkpointing_func(layer.__call__, *given) if again else layer(*given))
        return states


class EncoderPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """Loading, saving and initial values. An architecture adds `config_class`, `base_model_prefix` and its attention.

    `_auto_class` in each model makes `save_pretrained` put these files beside the weights. Loading through an Auto
    class would set it too, but not where transformers has a class of the same name.
    """

    attention_class: type[EncoderSelfAttention]
    supports_gradient_checkpointing = True
    _no_split_modules = ["EncoderLayer"]  # noqa: RUF012 (transformers wants lists)
    # What older files hold beside the parameters: a constant, and another name of predictions.bias.
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.position_ids", r"predictions\.decoder\.bias"]  # noqa: RUF012

    def __init__(self, config: EncoderConfig, *args: Any, **kwargs: Any) -> None:
        config.check()
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial values of one module's own parameters: what a checkpoint brought is left alone by transformers."""
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            if not getattr(module.weight, "_is_hf_initialized", False):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                if module.padding_idx is not None:
                    module.weight[module.padding_idx] = 0.0
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, EncoderPredictions):
            nn.init.zeros_(module.bias)

    def _output(self, output: Any, return_dict: bool | None) -> Any:
        """The output, as a tuple where that is asked for."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class EncoderModel(EncoderPreTrainedModel):
    """The encoder without a head."""

    _auto_class = "AutoModel"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.embeddings = EncoderEmbeddings(config)
        self.encoder = EncoderLayers(config, self.attention_class)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None, output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:  # fmt: skip
        """Hidden states of rows of any length up to `max_position_embeddings`.

        Args:
            input_ids: [B, L], or instead `inputs_embeds`: [B, L, D].
            attention_mask: [B, L], 1 for tokens and 0 for padding, which may be anywhere.
            token_type_ids: [B, L]; zeros if not given.
            position_ids: [B, L], rows of the table of positions; place in the row + 2 if not given.

        Raises:
            ValueError: arguments that do not go together, or rows that are too long, in one line.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions or (output_attentions is None and getattr(self.config, "output_attentions", False)):
            raise ValueError("output_attentions: this model does not return attention weights")
        words = self.embeddings.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is None:
            attention_mask = torch.ones(words.shape[:2], dtype=torch.bool, device=words.device)
        if attention_mask.shape != words.shape[:2]:
            given, wanted = list(attention_mask.shape), list(words.shape[:2])
            raise ValueError(f"attention_mask is {given}: it must be {wanted} (rows, tokens)")
        states = self.encoder(self.embeddings(words, token_type_ids, position_ids), attention_mask.bool())
        every = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states = tuple(states) if every else None
        return self._output(BaseModelOutput(last_hidden_state=states[-1], hidden_states=hidden_states), return_dict)


# The heads. An architecture's class names its encoder, the masked language model also what is tied.


def tied(prefix: str) -> Any:
    """What `_tied_weights_keys` must be: names up to transformers 4, from 5 on what each is tied to."""
    head, words = "cls.predictions.decoder.weight", f"{prefix}.embeddings.word_embeddings.weight"
    return {head: words} if int(transformers.__version__.split(".")[0]) >= 5 else [head]


class EncoderWithHead(EncoderPreTrainedModel):
    """An encoder under a head: hidden states → `scores` → `loss`."""

    body_class: type[EncoderModel]
    output_class: type[Any]

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.body_class(config))
        self.add_head(config)
        self.post_init()

    def add_head(self, config: EncoderConfig) -> None:
        """Makes the head's layers."""
        raise NotImplementedError

    def scores(self, x: Tensor) -> Tensor:
        """x: [B, L, D] → the head's logits."""
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None, output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:  # fmt: skip
        """As the encoder's; `labels` as the class says."""
        given = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        body = self.base_model(*given, output_attentions, output_hidden_states, return_dict=True)
        logits = self.scores(body.last_hidden_state)
        loss = None if labels is None else self.loss(logits, labels)
        output = self.output_class(loss=loss, logits=logits, hidden_states=body.hidden_states)
        return self._output(output, return_dict)


class EncoderTransform(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(self.activation(self.dense(x)))


class EncoderPredictions(nn.Module):
    """Dense, activation, norm, then a score for each word."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.transform = EncoderTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x)) + self.bias


class EncoderMaskedLMHead(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.predictions = EncoderPredictions(config)


class EncoderForMaskedLM(EncoderWithHead):
    """A masked language modelling head; `labels` [B, L] are token ids, -100 where there is nothing to predict."""

    _auto_class = "AutoModelForMaskedLM"
    output_class = MaskedLMOutput

    def add_head(self, config: EncoderConfig) -> None:
        self.cls = EncoderMaskedLMHead(config)

    def scores(self, x: Tensor) -> Tensor:
        return self.cls.predictions(x)

    def get_output_embeddings(self) -> nn.Module:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.cls.predictions.decoder = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; new words have a bias of zero."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        head = self.cls.predictions
        more = head.decoder.weight.shape[0] - head.bias.shape[0]
        head.bias = nn.Parameter(F.pad(head.bias.detach(), (0, more)))  # fewer words where `more` is negative
        return embeddings


class EncoderClassificationHead(nn.Module):
    """The first token through dropout, dense, activation, dropout, dense."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.dropout(self.activation(self.dense(self.dropout(x[:, 0])))))


class EncoderForSequenceClassification(EncoderWithHead):
    """A classification or regression head on the first token.

    `labels` by the config's `problem_type`, else by number and type: [B] numbers for a single label (mean squared
    error), [B] classes as integers (cross-entropy), else [B, labels] of 0.0 and 1.0 (binary cross-entropy).
    """

    _auto_class = "AutoModelForSequenceClassification"
    output_class = SequenceClassifierOutput

    def add_head(self, config: EncoderConfig) -> None:
        self.num_labels = config.num_labels
        self.classifier = EncoderClassificationHead(config)

    def scores(self, x: Tensor) -> Tensor:
        return self.classifier(x)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        kind = self.config.problem_type
        if kind is None and self.num_labels > 1:
            kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        if kind == "single_label_classification":
            return super().loss(logits, labels.long())
        if kind == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels)
        return F.mse_loss(logits, labels.view_as(logits).to(logits.dtype))


class EncoderForTokenClassification(EncoderWithHead):
    """A classification head on each token; `labels` [B, L] are classes, -100 where there is none."""

    _auto_class = "AutoModelForTokenClassification"
    output_class = TokenClassifierOutput

    def add_head(self, config: EncoderConfig) -> None:
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def scores(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(x))


class EncoderForMultipleChoice(EncoderWithHead):
    """A score for each of several rows, the choices: arguments have [B, choices, L] for [B, L].

    `labels` [B] say which choice is right.
    """

    _auto_class = "AutoModelForMultipleChoice"
    output_class = MultipleChoiceModelOutput

    def add_head(self, config: EncoderConfig) -> None:
        self.pre_classifier = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def scores(self, x: Tensor) -> Tensor:
        return self.classifier(F.relu(self.pre_classifier(x[:, 0])))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.view(labels.shape[0], -1), labels)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None, output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:  # fmt: skip
        """As the encoder's, with the choices as rows of their own."""
        ids, mask, types, positions, embeds = (
            None if x is None else x.flatten(0, 1)
            for x in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        output = super().forward(
            ids, mask, types, positions, embeds, labels, output_attentions, output_hidden_states, return_dict=True
        )
        rows = next(x.shape[0] for x in (input_ids, inputs_embeds) if x is not None)
        output.logits = output.logits.view(rows, -1)
        return self._output(output, return_dict)


class EncoderForQuestionAnswering(EncoderWithHead):
    """A head for the start and the end of an answer in the row."""

    _auto_class = "AutoModelForQuestionAnswering"
    output_class = QuestionAnsweringModelOutput

    def add_head(self, config: EncoderConfig) -> None:
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    def forward(  # type: ignore[override]
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None, end_positions: Tensor | None = None,
        output_attentions: bool | None = None, output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:  # fmt: skip
        """As the encoder's; `start_positions` and `end_positions` [B], of which those beyond the row do not count."""
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        body = self.base_model(*given, output_attentions, output_hidden_states, return_dict=True)
        starts, ends = self.qa_outputs(body.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            length = starts.shape[1]
            starts_loss, ends_loss = (
                F.cross_entropy(logits, at.flatten().clamp(0, length), ignore_index=length)
                for logits, at in ((starts, start_positions), (ends, end_positions))
            )
            loss = (starts_loss + ends_loss) / 2
        output = self.output_class(loss=loss, start_logits=starts, end_logits=ends, hidden_states=body.hidden_states)
        return self._output(output, return_dict)
