"""``farspan.load``: a ready model in one process, from a checkpoint or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parallel.sharding import logical_of
from . import checkpoint as ckpt
from .batch import Batch
from .conversion.from_huggingface import read_model
from .conversion.imported import build
from .conversion.model import model_of
from .conversion.renaming import rename
from .generate import generate
from .models.base import Cache, Encoder, LanguageModel
from .models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Output:
    """What a loaded model returns.  ``loss`` only where labels were given: the sum of the heads' means over labels that
    are not -100, as Hugging Face's classes compute it (causal models shift the labels by one).  ``cache`` only where it
    was asked for."""

    logits: Tensor | None  # [batch, sequence, vocabulary]
    last_hidden_state: Tensor  # [batch, sequence, hidden]
    seq_relationship_logits: Tensor | None = None  # [batch, 2]
    loss: Tensor | None = None
    cache: Cache | None = None


class LoadedModel(nn.Module):
    """A whole model in one process, in evaluation mode.

    ``model.config`` is its configuration; ``model.network`` the module it runs.
    """

    def __init__(self, network: LanguageModel) -> None:
        super().__init__()
        self.network = network
        self.eval()

    @property
    def config(self) -> ModelConfig:
        return self.network.config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool = False,
        cache: Cache | None = None,
    ) -> Output:
        """input_ids, attention_mask (1 real, 0 padding), token_type_ids, labels: [batch, sequence] int64;
        next_sentence_label: [batch] int64; encoder_hidden_states: [batch, source, hidden], encoder_attention_mask:
        [batch, source], of a model with cross-attention.

        use_cache: return what the next tokens need of these; cache: that of the tokens before these, so that a sequence
        may be given in pieces of any length (mask and all else of the piece alone).
        ValueError: a sequence longer than the model's positions, or a cache where the model has none.
        """
        if (use_cache or cache is not None) and not (self.network.has_cache and self.config.is_decoder):
            raise ValueError(f"this {self.config.model_type} model has no cache: it takes whole sequences only")
        if use_cache and cache is None:
            cache = Cache()
        seen = 0 if cache is None else cache.seen
        encoder: Encoder | None = None
        if encoder_hidden_states is not None:
            real = None if encoder_attention_mask is None else encoder_attention_mask != 0
            encoder = Encoder(encoder_hidden_states, real)
        batch = self._batch(input_ids, attention_mask, token_type_ids, seen)
        if cache is not None:
            cache = dataclasses.replace(cache, after={})  # a cache may be used again, for another continuation
        results = self.network(batch, output="logits", encoder=encoder, cache=cache)
        logits, sentence = results.get("logits"), results.get("seq_relationship_logits")
        loss = self._loss(logits, sentence, labels, next_sentence_label)
        following = None if cache is None else cache.next(input_ids.shape[1])
        return Output(logits, results["last_hidden_state"], sentence, loss, following)

    def generate(self, input_ids: Tensor, new_tokens: int, **options: Any) -> Tensor:
        """Continue [batch, sequence] int64 by ``new_tokens``; see ``generate.generate`` for the options."""
        return generate(self, input_ids, new_tokens, **options)

    def huggingface_state(self) -> dict[str, Tensor]:
        """The parameters under Hugging Face's names."""
        return self._renamed({name: p.detach() for name, p in self.network.named_parameters()})

    def huggingface_gradients(self) -> dict[str, Tensor]:
        """The gradients of a backward pass under Hugging Face's names; parameters without one are left out."""
        return self._renamed({name: p.grad for name, p in self.network.named_parameters() if p.grad is not None})

    def _renamed(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        logical = {name: logical_of(p) for name, p in self.network.named_parameters()}
        keys = self.network.huggingface_keys(self.config, self.network.heads)
        return rename({name: logical[name].merge([value]) for name, value in values.items()}, keys)

    def _batch(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None, seen: int
    ) -> Batch:
        b, s = input_ids.shape
        longest = self.config.longest_sequence
        if longest is not None and seen + s > longest:
            raise ValueError(f"{seen + s} tokens a row: this model has positions for {longest}")
        documents = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
        batch = Batch(
            input_ids=input_ids,
            document_ids=documents,
            positions=torch.arange(seen, seen + s, device=input_ids.device).expand(b, s),
            token_type_ids=torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids,
            sample_ids=torch.zeros(b, dtype=torch.int64, device=input_ids.device),
            attention="full" if attention_mask is None or bool(attention_mask.all()) else "padding",
            labels=input_ids[:, :0],
            label_weights=torch.zeros(b, 0, device=input_ids.device),
        )
        return self.network.huggingface_batch(self.config, batch)

    def _loss(
        self, logits: Tensor | None, sentence: Tensor | None, labels: Tensor | None, next_sentence: Tensor | None
    ) -> Tensor | None:
        loss: Tensor | None = None
        if labels is not None and logits is not None:
            if self.config.is_decoder:
                logits, labels = logits[:, :-1], labels[:, 1:]
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        if next_sentence is not None and sentence is not None:
            extra = F.cross_entropy(sentence, next_sentence)
            loss = extra if loss is None else loss + extra
        return loss


def load(path: str | Path, *, device: torch.device | str = "cpu") -> LoadedModel:
    """A ready single-process model from a Farspan checkpoint (or run folder: its latest) or a Hugging Face folder.

    ``model(input_ids, attention_mask=None, token_type_ids=None)`` returns an ``Output`` with ``.logits`` [batch,
    sequence, vocabulary] (and ``.seq_relationship_logits`` [batch, 2] where there is such a head).  float32, evaluation
    mode, parameters require gradients.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give a checkpoint, a run or a Hugging Face model folder")
    if (folder / "config.json").is_file():
        model = read_model(folder)
        if model.note:
            warnings.warn(f"{folder}: {model.note}", stacklevel=2)
        network = build(model.cls, model.config, model.heads)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(logical_of(parameter).slice(model.read(name), network.mesh.tensor, parameter.shape))
    else:
        reader = ckpt.Reader(ckpt.find(folder))
        network = build(*model_of(reader.manifest, reader.folder))
        ckpt.load_weights(network, reader, network.mesh.tensor)
    return LoadedModel(network.to(device))
