"""Text from a causal model, a token at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .load import LoadedModel


@torch.no_grad()
def generate(
    model: LoadedModel,
    input_ids: Tensor,
    new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    stop: int | None = None,
    use_cache: bool | None = None,
) -> Tensor:
    """The given tokens and ``new_tokens`` more, [batch, sequence + new_tokens] int64.

    input_ids, attention_mask (1 real, 0 padding, which belongs on the left): [batch, sequence] int64.
    temperature: 0 takes the likeliest token; otherwise one is drawn, scores divided by it, from the ``top_k`` likeliest
    (None: all), by a generator of this ``seed``.  stop: a token after which a row goes on with nothing but itself.
    use_cache: carry what was computed to the next token (None: where the architecture can).
    ValueError: a model that is not causal, one without a cache that is to use it, more tokens than it has positions.
    """
    config, length = model.config, input_ids.shape[1] + new_tokens
    if not config.is_decoder:
        raise ValueError("this model sees what follows (is_decoder false): text comes from models trained with clm")
    if new_tokens < 1 or temperature < 0 or (top_k is not None and top_k < 1) or not input_ids.shape[1]:
        raise ValueError(
            f"{input_ids.shape[1]} given and {new_tokens} new tokens, temperature {temperature}, top_k {top_k}: give "
            "tokens to begin with, at least 1 new token, temperature 0 or more, top_k 1 or more"
        )
    if config.longest_sequence is not None and length > config.longest_sequence:
        raise ValueError(f"{length} tokens a row: this model has positions for {config.longest_sequence}")
    cached = model.network.has_cache if use_cache is None else use_cache
    generator = torch.Generator(input_ids.device).manual_seed(seed)
    ids = given = input_ids
    real = torch.ones_like(ids) if attention_mask is None else attention_mask
    mask, cache = real, None
    for _ in range(new_tokens):
        output = model(given, mask, use_cache=cached, cache=cache)
        assert output.logits is not None
        token = _choose(output.logits[:, -1].float(), temperature, top_k, generator)
        if stop is not None:
            token = torch.where(ids[:, -1:] == stop, stop, token)
        ids = torch.cat((ids, token), 1)
        real = torch.cat((real, torch.ones_like(token)), 1)
        cache = output.cache
        given, mask = (token, real[:, -1:]) if cached else (ids, real)
    return ids


def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """logits [batch, vocabulary] → [batch, 1]"""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
