"""MEGA (moving average equipped gated attention, arXiv 2209.10655) for Hugging Face transformers.

This file, `layers_mega.py` and `configuration_mega.py` beside it travel with the weights and need only torch and
transformers (4.37 and later, 5 included). Tensor names are those of the MEGA classes that transformers 4.37 has and 5
no longer has. What differs from those classes:

- the RMS norm normalises;
- rows have any length: the last chunk of attention may be shorter, and time and memory grow linearly in the length
  when attention is chunked (the moving average is computed in tiles, not by Fourier transform);
- a query that sees no key gives zero, not NaN: padding on the left, or a chunk of padding alone;
- truncation holds in generation as well, and generation carries its state over chunks and with cross-attention;
- feature dropout drops features of a row, never chunks; batch norm takes its statistics from real tokens only;
- attention weights are not returned.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from .configuration_mega import MegaConfig
from .layers_mega import (
    MegaBlock,
    MegaEmbeddings,
    MegaMovingAverageGatedAttention,
    MegaMultiDimensionDampedEma,
    MegaRMSNorm,
    MegaRotaryRelativePositionalBias,
    MegaSimpleRelativePositionalBias,
)

WORD_EMBEDDINGS = "mega.embedding_layer.word_embeddings.weight"


def tied(head: str) -> Any:
    """What `_tied_weights_keys` must be: names up to transformers 4, from 5 on what each is tied to."""
    return {head: WORD_EMBEDDINGS} if int(transformers.__version__.split(".")[0]) >= 5 else [head]


class MegaState:
    """What a causal model carries from one call to the next: `past_key_values` in its output and its arguments.

    Each layer has a dict of tensors with rows first: the keys, values and mask of the unfinished chunk (of everything,
    without chunking), the moving average's state [B, D, N] (with truncation instead the last inputs), and the encoder's
    keys, values and mask where there is cross-attention. A call leaves the state it was given as it was.
    """

    is_compileable = False  # asked by transformers' generate()
    is_croppable = False

    def __init__(self, layers: list[dict[str, Tensor]], seen: int) -> None:
        self.layers = layers
        self.seen = seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.layers = [{k: v.index_select(0, beam_idx.to(v.device)) for k, v in x.items()} for x in self.layers]


class MegaPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """Loading, saving and initial values.

    `_auto_class` in each model makes `save_pretrained` put these files beside the weights. Loading through an Auto
    class would set it too, but not where transformers has a class of the same name (4.38 to 4.57).
    """

    config_class = MegaConfig
    base_model_prefix = "mega"
    supports_gradient_checkpointing = False
    _no_split_modules = ["MegaBlock"]  # noqa: RUF012 (transformers wants a list)
    _is_stateful = True  # generate(): the state cannot be taken back by some tokens

    def __init__(self, config: MegaConfig, *args: Any, **kwargs: Any) -> None:
        config.check()
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial values of one module's own parameters: what a checkpoint brought is left alone by transformers."""
        config = self.config
        normal, zeros, ones = nn.init.normal_, nn.init.zeros_, nn.init.ones_
        if isinstance(module, MegaMultiDimensionDampedEma):
            for parameter in (module.damping_factor, module.decay_factor):
                normal(parameter, std=config.ema_delta_alpha_range)
            beta = module.ema_expansion_matrix
            if not getattr(beta, "_is_hf_initialized", False):
                normal(beta, std=config.ema_beta_range)
                beta[:, 0::2] += 1.0  # 1, -1, 1, -1, ... along the N dimensions
                beta[:, 1::2] -= 1.0
            for parameter in (module.kernel_projection_matrix, module.residual_weight):
                normal(parameter, std=config.ema_gamma_omega_range)
        elif isinstance(module, MegaSimpleRelativePositionalBias):
            normal(module.rel_pos_bias, std=config.initializer_range)
        elif isinstance(module, MegaRotaryRelativePositionalBias):
            normal(module.alpha, std=config.initializer_range)
            normal(module.b_param, std=config.initializer_range)
            zeros(module._float_tensor)
        elif isinstance(module, MegaMovingAverageGatedAttention):
            normal(module.qk_weight, std=config.initializer_range)
            zeros(module.qk_bias)
        elif isinstance(module, nn.Linear):
            normal(module.weight, std=config.initializer_range)
            zeros(module.bias)
        elif isinstance(module, nn.Embedding):
            if not getattr(module.weight, "_is_hf_initialized", False):
                normal(module.weight, std=config.initializer_range)
                if module.padding_idx is not None:
                    module.weight[module.padding_idx] = 0.0
        elif isinstance(module, (nn.LayerNorm, nn.modules.batchnorm._BatchNorm, MegaRMSNorm)):
            for name, parameter in module.named_parameters(recurse=False):
                (zeros if name == "bias" else ones)(parameter)
            for name, buffer in module.named_buffers(recurse=False):
                (ones if name == "running_var" else zeros)(buffer)

    def _output(self, output: Any, return_dict: bool | None) -> Any:
        """The output, as a tuple where that is asked for."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class MegaPooler(nn.Module):
    """The first token through a dense layer and tanh."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x[:, 0]))


class MegaModel(MegaPreTrainedModel):
    """MEGA without a head: an encoder, or with `is_decoder` a decoder."""

    _auto_class = "AutoModel"

    def __init__(self, config: MegaConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embedding_layer = MegaEmbeddings(config)
        self.layers = nn.ModuleList(MegaBlock(config) for _ in range(config.num_hidden_layers))
        self.pooler = MegaPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding_layer.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding_layer.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: MegaState | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Hidden states of rows of any length.

        Args:
            input_ids: [B, L], or instead `inputs_embeds`: [B, L, D].
            attention_mask: [B, L], 1 for tokens and 0 for padding, which may be anywhere; with `past_key_values`
                [B, tokens seen + L] does as well.
            token_type_ids: [B, L]; zeros if not given.
            encoder_hidden_states: [B, T, D] and `encoder_attention_mask`: [B, T], for cross-attention. Not needed
                again once `past_key_values` has them.
            past_key_values: what an earlier call returned; the L tokens follow those that it saw.
            use_cache: whether to return that for the next call; the config's `use_cache` if not given.

        Raises:
            ValueError: arguments that do not go together, in one line.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions or (output_attentions is None and getattr(self.config, "output_attentions", False)):
            raise ValueError("output_attentions: this model does not return attention weights")
        if not self.config.is_decoder and (use_cache or past_key_values is not None):
            raise ValueError("use_cache and past_key_values need a decoder: is_decoder is false in this config")
        if past_key_values is not None and not isinstance(past_key_values, MegaState):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}: it must be what an earlier call returned"
            )
        x = self.embedding_layer.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        rows, length = x.shape[:2]
        seen = 0 if past_key_values is None else past_key_values.seen
        real = self._mask("attention_mask", attention_mask, rows, length, seen, x.device)
        encoder = None
        if encoder_hidden_states is not None:
            source = encoder_hidden_states.shape[1]
            encoder_real = self._mask("encoder_attention_mask", encoder_attention_mask, rows, source, 0, x.device)
            encoder = (encoder_hidden_states, encoder_real)

        x = self.embedding_layer(x, token_type_ids)
        all_states = [x]
        carried = []
        for index, layer in enumerate(self.layers):
            past = None if past_key_values is None else past_key_values.layers[index]
            x, state = layer(x, real, encoder, past, seen)
            all_states.append(x)
            carried.append(state)
        if use_cache is None:
            use_cache = self.config.use_cache
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=x,
            pooler_output=None if self.pooler is None else self.pooler(x),
            past_key_values=MegaState(carried, seen + length) if self.config.is_decoder and use_cache else None,
            hidden_states=tuple(all_states) if output_hidden_states else None,
        )
        return self._output(output, return_dict)

    @staticmethod
    def _mask(name: str, mask: Tensor | None, rows: int, length: int, seen: int, device: torch.device) -> Tensor:
        """Which of the last `length` tokens are real, [B, length] of bool."""
        if mask is None:
            return torch.ones(rows, length, dtype=torch.bool, device=device)
        if mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] not in (length, seen + length):
            raise ValueError(f"{name} is {list(mask.shape)}: it must be {[rows, seen + length]} (rows, tokens)")
        return mask[:, -length:].bool()


class MegaLanguageModel(MegaPreTrainedModel):
    """What the two language models share: the body, and before the head a dense layer where the config has one."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size) if config.add_lm_hidden_dense_layer else None

    def _before_head(self, x: Tensor) -> Tensor:
        return x if self.dense is None else torch.tanh(self.dense(x))


class MegaForMaskedLM(MegaLanguageModel):
    """MEGA with a masked language modelling head."""

    _auto_class = "AutoModelForMaskedLM"
    _tied_weights_keys = tied("mlm_head.weight")

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.mlm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.mlm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.mlm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """As `MegaModel`; `labels` [B, L] are token ids, -100 where there is nothing to predict."""
        body = self.mega(
            input_ids,
            attention_mask,
            token_type_ids,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.mlm_head(self._before_head(body.last_hidden_state))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return self._output(MaskedLMOutput(loss=loss, logits=logits, hidden_states=body.hidden_states), return_dict)


class MegaForCausalLM(MegaLanguageModel, GenerationMixin):  # type: ignore[misc]
    """MEGA with a causal language modelling head. `generate()` carries a `MegaState` from token to token."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = tied("lm_head.weight")

    def __init__(self, config: MegaConfig) -> None:
        if not config.is_decoder:
            raise ValueError("is_decoder is false: a causal language model needs is_decoder=True, bidirectional=False")
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: MegaState | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
    ) -> Any:
        """As `MegaModel`; `labels` [B, L] are the input ids, -100 where there is nothing to predict: they are shifted
        here. `logits_to_keep`: logits of the last so many tokens only, where there are no labels; 0: of all.
        """
        body = self.mega(
            input_ids,
            attention_mask,
            token_type_ids,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values,
            use_cache if labels is None else False,
            output_attentions,
            output_hidden_states,
            return_dict=True,
        )
        x = body.last_hidden_state if labels is not None else body.last_hidden_state[:, -logits_to_keep:]
        logits = self.lm_head(self._before_head(x))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        output = CausalLMOutputWithCrossAttentions(
            loss=loss, logits=logits, past_key_values=body.past_key_values, hidden_states=body.hidden_states
        )
        return self._output(output, return_dict)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Not transformers' own cache: the first call of `generate()` makes a `MegaState`."""
        return False

    def _reorder_cache(self, past_key_values: MegaState, beam_idx: Tensor) -> MegaState:
        past_key_values.reorder_cache(beam_idx)
        return past_key_values

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: MegaState | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next call: of the tokens, those that the state has not seen."""
        inputs: dict[str, Any] = {
            name: kwargs[name]
            for name in ("encoder_hidden_states", "encoder_attention_mask", "use_cache", "logits_to_keep")
            if name in kwargs
        }
        inputs.update(past_key_values=past_key_values, attention_mask=attention_mask)
        if past_key_values is None and inputs_embeds is not None:
            return {**inputs, "inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids}
        new = slice(0, None)
        if past_key_values is not None:
            # With a mask over all tokens its length says how many are new; the ids may or may not include the old.
            total = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
            new = slice(-max(1, total - past_key_values.seen), None)
        inputs["input_ids"] = input_ids[:, new]
        inputs["token_type_ids"] = None if token_type_ids is None else token_type_ids[:, new]
        return inputs


class MegaClassificationHead(nn.Module):
    """The first token through dropout, dense, tanh, dropout, dense."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(head_dropout(config))
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(x[:, 0])))))


def head_dropout(config: MegaConfig) -> float:
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


class MegaForSequenceClassification(MegaPreTrainedModel):
    """MEGA with a classification or regression head on the first token."""

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.classifier = MegaClassificationHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """As `MegaModel`; `labels` by the config's `problem_type`, else by number and type: [B] numbers for a single
        label (mean squared error), [B] classes as integers (cross-entropy), else [B, labels] of 0.0 and 1.0 (binary
        cross-entropy).
        """
        body = self.mega(
            input_ids,
            attention_mask,
            token_type_ids,
            inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier(body.last_hidden_state)
        loss = None if labels is None else self._loss(logits, labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=body.hidden_states)
        return self._output(output, return_dict)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        kind = self.config.problem_type
        if kind is None and self.num_labels > 1:
            classes = labels.dtype in (torch.int64, torch.int32)
            kind = "single_label_classification" if classes else "multi_label_classification"
        if kind == "single_label_classification":
            return F.cross_entropy(logits, labels.flatten().long())
        if kind == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels)
        return F.mse_loss(logits, labels.view_as(logits).to(logits.dtype))


class MegaForTokenClassification(MegaPreTrainedModel):
    """MEGA with a classification head on each token."""

    _auto_class = "AutoModelForTokenClassification"

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """As `MegaModel`; `labels` [B, L] are classes, -100 where there is none."""
        body = self.mega(
            input_ids,
            attention_mask,
            token_type_ids,
            inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier(self.dropout(body.last_hidden_state))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        output = TokenClassifierOutput(loss=loss, logits=logits, hidden_states=body.hidden_states)
        return self._output(output, return_dict)


class MegaForMultipleChoice(MegaPreTrainedModel):
    """MEGA with a score for each of several rows, the choices."""

    _auto_class = "AutoModelForMultipleChoice"

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.mega = MegaModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """As `MegaModel`, with [B, choices, L] for [B, L]; `labels` [B] say which choice is right."""
        given = [input_ids, attention_mask, token_type_ids, inputs_embeds]
        body = self.mega(
            *(None if x is None else x.flatten(0, 1) for x in given),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        choices = next(x.shape[1] for x in (input_ids, inputs_embeds) if x is not None)
        logits = self.classifier(self.dropout(body.pooler_output)).view(-1, choices)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        output = MultipleChoiceModelOutput(loss=loss, logits=logits, hidden_states=body.hidden_states)
        return self._output(output, return_dict)


class MegaForQuestionAnswering(MegaPreTrainedModel):
    """MEGA with a head for the start and the end of an answer in the row."""

    _auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """As `MegaModel`; `start_positions` and `end_positions` [B], of which those beyond the row do not count."""
        body = self.mega(
            input_ids,
            attention_mask,
            token_type_ids,
            inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        starts, ends = self.qa_outputs(body.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            length = starts.shape[1]
            losses = [
                F.cross_entropy(logits, at.flatten().clamp(0, length), ignore_index=length)
                for logits, at in ((starts, start_positions), (ends, end_positions))
            ]
            loss = sum(losses) / 2
        output = QuestionAnsweringModelOutput(
            loss=loss, start_logits=starts, end_logits=ends, hidden_states=body.hidden_states
        )
        return self._output(output, return_dict)
