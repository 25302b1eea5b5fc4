"""From Megatron-LM's BERT checkpoints: parts of any tensor and pipeline layout, merged one tensor at a time.

Read are the files ``model_optim_rng.pt`` of all versions since 2019 (github.com/NVIDIA/Megatron-LM, megatron/
checkpointing.py, now megatron/training/checkpointing.py), of the classes that began as megatron/model/bert_model.py
and of megatron-core's BertModel.  How a tensor is split over the tensor ranks is the same there as here; only queries,
keys and values are interleaved, in an order that changed twice.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ...parallel.sharding import logical_of
from ..models.megatron_bert import MegatronBert, MegatronBertConfig
from ..validation import one_line
from .imported import Imported, build
from .megatron_lm_files import Parts
from .tokens import Tokens

_WORDS, _TYPES, _OUTPUT = "embeddings.words.weight", "embeddings.types.weight", "lm_head.decoder.weight"
_QKV = re.compile(r"layers\.\d+\.attention\.qkv\.(weight|bias)")
# Megatron's names and ours: of the first classes, of their later versions, of megatron-core.
_MODEL = r"(?:language_model\.)?"
_NAMES = {
    _MODEL + r"embedding\.word_embeddings": "embeddings.words",
    _MODEL + r"embedding\.position_embeddings": "embeddings.positions",
    _MODEL + r"embedding\.tokentype_embeddings": "embeddings.types",
    _MODEL + r"(?:transformer|encoder)\.final_(?:layer)?norm": "final_norm",
    _MODEL + r"pooler\.dense": "sentence_head.pooler",
    r"binary_head": "sentence_head.classifier",
    r"lm_head\.dense": "lm_head.dense",
    r"lm_head\.(?:layernorm|layer_norm|norm)": "lm_head.norm",
    r"lm_head|output_layer|word_embeddings_for_head": "lm_head.decoder",
}
_LAYER = re.compile(_MODEL + r"(?:transformer|encoder)\.layers\.(\d+)\.(.+)")
_NAMES_IN_LAYER = {
    r"input_(?:layer)?norm\.|self_attention\.linear_qkv\.layer_norm_": "attention_norm",
    r"(?:self_)?attention\.(?:query_key_value|linear_qkv)\.": "attention.qkv",
    r"(?:self_)?attention\.(?:dense|linear_proj)\.": "attention.output",
    r"(?:post_attention_(?:layer)?norm|pre_mlp_layernorm)\.|mlp\.linear_fc1\.layer_norm_": "feed_forward_norm",
    r"mlp\.(?:dense_h_to_4h|linear_fc1)\.": "feed_forward.up",
    r"mlp\.(?:dense_4h_to_h|linear_fc2)\.": "feed_forward.down",
}
# What Megatron-LM can be told and this architecture cannot: the option's name, and the values that it may have.
_ONLY: dict[str, tuple[Any, ...]] = {
    "apply_residual_connection_post_layernorm": (False, None),
    "apply_layernorm_1p": (False, None),
    "normalization": ("LayerNorm", None),
    "add_bias_linear": (True, None),
    "position_embedding_type": ("learned_absolute", "absolute", None),
    "use_rotary_position_embeddings": (False, None),
    "add_position_embedding": (True, None),
    "swiglu": (False, None),
    "squared_relu": (False, None),
    "quick_geglu": (False, None),
    "glu_activation": (None,),
    "group_query_attention": (False, None),
    "multi_latent_attention": (False, None),
    "qk_layernorm": (False, None),
    "num_experts": (None, 0, 1, [1]),
}
# Their options and our fields, where both mean the same.
_FIELDS = {
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "init_method_std": "initializer_range",
}
_SIZES = {  # the same for sizes that the tensors have too
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
}
_EPSILON = 1e-5  # Megatron-LM's default since its first version


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the parts of a tensor lie: the pipeline stage, the chunk of its model, the name there."""

    pipeline: int
    chunk: str
    key: str


def read_model(
    path: Path,
    *,
    vocab_size: int | None = None,
    tokenizer: Path | None = None,
    num_attention_heads: int | None = None,
    hidden_act: str | None = None,
) -> Imported:
    """A Megatron-LM BERT checkpoint as a Megatron-BERT model.

    ``path``: a file ``model_optim_rng.pt`` of an unsplit model; a folder ``iter_…`` or ``release`` with the parts
    ``mp_rank_TT`` or ``mp_rank_TT_PPP``; a folder with ``latest_checkpointed_iteration.txt``; a zip of released
    weights.  ``vocab_size``: tokens without the rows that pad the embedding, by default those of the ``tokenizer`` (a
    folder, see ``Tokens.read``), else what the checkpoint says, else all rows.  ``num_attention_heads`` and
    ``hidden_act``: for old checkpoints, which do not hold the arguments of their training.
    ValueError: damaged or missing parts, an architecture that Megatron-BERT is not, tensors that would be dropped.
    """
    source = _Source(path)
    notes: list[str] = []
    config = source.config(num_attention_heads, hidden_act, notes)
    tokens = None if tokenizer is None else Tokens.read(tokenizer)
    config["vocab_size"] = source.vocabulary(vocab_size, None if tokens is None else tokens.size, notes)
    if tokens is not None and "pad" in tokens.roles:
        config["pad_token_id"] = tokens.roles["pad"]
    try:
        parsed = MegatronBertConfig.model_validate(config)
    except ValidationError as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    dtypes = source.check(parsed)
    notes += source.copies_that_differ()
    return Imported(
        cls=MegatronBert,
        config=parsed,
        heads=source.heads,
        read=lambda name: source.read(name, parsed),
        dtypes=dtypes,
        tokenizer=tokenizer,
        note="; ".join(notes) or None,
    )


class _Source:
    """The parts of one checkpoint, and where in them each of our tensors lies."""

    def __init__(self, path: Path) -> None:
        self.where, self.parts = str(path), Parts(path)
        first = self.parts.file(0, 0).content()
        self.args, self.version = first.args, first.version
        self._same_everywhere()
        self._all_parts()
        for name, allowed in _ONLY.items():
            if name in self.args and self.args[name] not in allowed:
                raise ValueError(
                    f"{path} was trained with {name} = {self.args[name]}, which Megatron-BERT here has not"
                )
        self.places: dict[str, _Place] = {}
        self.layers = 0
        self._find_places()
        self.heads = self._heads()
        self.tied = self._is_tied()

    def _same_everywhere(self) -> None:
        first = self.parts.file(0, 0)
        known = first.content()
        for file in self.parts.files()[1:]:
            content = file.content()
            for what in ("iteration", "version"):
                if getattr(content, what) != getattr(known, what):
                    raise ValueError(
                        f"{file.where} is of {what} {getattr(content, what)}, {first.where} of "
                        f"{getattr(known, what)}: give parts of one checkpoint"
                    )
            if list(content.chunks) != list(known.chunks):
                raise ValueError(f"{file.where} has not the parts {', '.join(known.chunks)} that {first.where} has")

    def _all_parts(self) -> None:
        for size, names in (
            (self.parts.tensor, ("tensor_model_parallel_size", "model_parallel_size")),
            (self.parts.pipeline, ("pipeline_model_parallel_size",)),
        ):
            said = next((number for name in names if (number := self._number(name)) is not None), size)
            if said != size:
                raise ValueError(
                    f"{self.where} has {size} of the {said} parts that its {names[0]} says: give the folder with all "
                    "of the mp_rank_… parts"
                )

    def _number(self, option: str) -> int | None:
        """What the training was told, if that is a whole number."""
        value = self.args.get(option)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def _find_places(self) -> None:
        """Fill ``places`` in the order of the layers: chunk after chunk, each over all stages (arXiv 2104.04473,
        section 2.2); every stage counts its layers from 0."""
        for chunk in self.parts.file(0, 0).content().chunks:
            for stage in range(self.parts.pipeline):
                tensors = self.parts.file(0, stage).content().chunks[chunk]
                for rank in range(1, self.parts.tensor):
                    other = self.parts.file(rank, stage)
                    if odd := sorted(other.content().chunks[chunk].keys() ^ tensors.keys()):
                        raise ValueError(f"{other.where}: {odd[0]} is not in every tensor rank's file; copy them again")
                last = -1
                for key in tensors:
                    name, layer = _translate(key, self.layers)
                    if name is None:
                        raise ValueError(
                            f"{self.parts.file(0, stage).where} has {key}, which no BERT model of Megatron-LM has: "
                            "importing would drop it"
                        )
                    if name in self.places:
                        raise ValueError(f"{self.where} has two tensors for {name}, such as {key}: one is too many")
                    self.places[name] = _Place(stage, chunk, key)
                    last = max(last, layer)
                self.layers += last + 1

    def _heads(self) -> tuple[str, ...]:
        heads = {"lm": "lm_head.", "nsp": "sentence_head."}
        found = tuple(head for head, prefix in heads.items() if any(name.startswith(prefix) for name in self.places))
        if not found:
            raise ValueError(f"{self.where} has neither lm_head nor binary_head: it is no BERT model of Megatron-LM")
        return found

    def _is_tied(self) -> bool:
        """Whether the output weight is the word embedding, or a copy of it on the last pipeline stage."""
        if _OUTPUT not in self.places or _WORDS not in self.places:
            return True
        if self.places[_OUTPUT].key.startswith("word_embeddings_for_head"):
            return True  # only megatron-core's classes have another weight there
        untied = self.args.get("untie_embeddings_and_output_weights")
        return not untied if isinstance(untied, bool) else self._equal(_OUTPUT, _WORDS)

    def _equal(self, name: str, other: str) -> bool:
        self._about_to_read(name, other)
        ranks = range(self.parts.tensor)
        return all(torch.equal(self._part(name, rank), self._part(other, rank)) for rank in ranks)

    def _about_to_read(self, *names: str) -> None:
        self.parts.about_to_read(sum(self._part(name, 0).nbytes * self.parts.tensor for name in names))

    def _part(self, name: str, rank: int) -> Tensor:
        place = self.places[name]
        return self.parts.tensor_of(rank, place.pipeline, place.chunk, place.key)

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.places:
            raise ValueError(f"{self.where} lacks {name}: copy it whole, with all of its parts")
        return tuple(self._part(name, 0).shape)

    def config(self, heads: int | None, activation: str | None, notes: list[str]) -> dict[str, Any]:
        """The configuration but for the vocabulary, from the tensors and the arguments of the training."""
        inner = self._shape("layers.0.feed_forward.up.bias")[0] * self.parts.tensor
        rows, hidden = self._shape("embeddings.positions.weight")
        config = {
            "hidden_size": hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": inner,
            "max_position_embeddings": rows,
            "tie_word_embeddings": self.tied,
            "layer_norm_eps": self.args.get("layernorm_epsilon", _EPSILON),
        }
        for option, field in _SIZES.items():
            said = self.args.get(option)
            if said is not None and said != config[field]:
                raise ValueError(f"{self.where} has tensors of {field} {config[field]}, its {option} says {said}")
        config |= {field: self.args[option] for option, field in _FIELDS.items() if self.args.get(option) is not None}
        if _TYPES in self.places:
            config["type_vocab_size"] = self._shape(_TYPES)[0]
        else:
            notes.append("it has no token types: their table is zero")
        config["num_attention_heads"] = self._head_count(heads, config)
        return config | self._activations(activation)

    def _head_count(self, given: int | None, config: Mapping[str, Any]) -> int:
        said = self._number("num_attention_heads")
        if said is None and given is None and (config["hidden_size"], config["num_hidden_layers"]) == (1024, 24):
            said = 16  # the released models of 345 million parameters, whose files do not say it
        if said is None and given is None:
            raise ValueError(f"{self.where} does not say how many attention heads it has: set num_attention_heads")
        if said is not None and given is not None and said != given:
            raise ValueError(f"{self.where} has {said} attention heads: num_attention_heads {given} does not fit")
        count = said if given is None else given
        if count is None or count < 1 or config["hidden_size"] % count or count % self.parts.tensor:
            raise ValueError(
                f"{self.where}: {count} attention heads do not divide hidden_size {config['hidden_size']}, or not by "
                f"its {self.parts.tensor} tensor ranks"
            )
        if self.args.get("kv_channels") not in (None, config["hidden_size"] // count):
            raise ValueError(f"{self.where} has heads of {self.args['kv_channels']} features, not hidden_size / heads")
        return count

    def _activations(self, given: str | None) -> dict[str, str]:
        """gelu, exact or by its tanh approximation: ``openai_gelu`` is the latter; so is what bias_gelu_fusion computes
        (megatron/model/fused_bias_gelu.py), the default since January 2021, in the layers alone; else it is exact."""
        if given is not None:
            return {"hidden_act": given}
        if self.args.get("openai_gelu"):
            return {"hidden_act": "gelu_new"}
        if self.args.get("bias_gelu_fusion") and not self.args.get("onnx_safe"):
            return {"hidden_act": "gelu_new", "head_act": "gelu"}
        return {"hidden_act": "gelu"}

    def vocabulary(self, given: int | None, of_tokenizer: int | None, notes: list[str]) -> int:
        """The number of tokens, without rows that pad."""
        padded = self._shape(_WORDS)[0] * self.parts.tensor
        said = self._number("padded_vocab_size")
        if said is not None and said != padded:
            raise ValueError(f"{self.where} has a word embedding of {padded} rows, its padded_vocab_size says {said}")
        known = [self._number(name) for name in ("orig_vocab_size", "true_vocab_size", "vocab_size")]
        of_args = next((size for size in known if size is not None and 0 < size <= padded), None)
        size = next((size for size in (given, of_tokenizer, of_args) if size is not None), padded)
        if not 0 < size <= padded:
            raise ValueError(f"{self.where} has a word embedding of {padded} rows: vocab_size {size} does not fit")
        if of_tokenizer is not None and of_tokenizer > size:
            raise ValueError(f"{self.where}: the tokenizer has {of_tokenizer} tokens, vocab_size {size} is too small")
        if given is None and of_tokenizer is None and of_args is None:
            notes.append(f"its {padded} rows of words are all kept, padding too: set vocab_size, or give the tokenizer")
        return size

    def check(self, config: MegatronBertConfig) -> dict[str, torch.dtype]:
        """The types of all tensors; ValueError where one is missing or its parts have not the shapes they should."""
        with torch.device("meta"):
            parameters = dict(build(MegatronBert, config, self.heads).named_parameters())
        self.logical = {name: logical_of(parameter) for name, parameter in parameters.items()}
        missing = sorted(self.logical.keys() - self.places.keys() - {_TYPES})
        if missing:
            raise ValueError(f"{self.where} lacks {len(missing)} tensors, such as {missing[0]}: copy it whole")
        surplus = sorted(self.places.keys() - self.logical.keys() - {_OUTPUT})
        if surplus:
            raise ValueError(f"{self.where} has {self.places[surplus[0]].key}: importing would drop it")
        padded = self._shape(_WORDS)[0]
        for name in self.places:
            logical = self.logical.get(name, self.logical[_WORDS])
            shape = list(logical.shape)
            if logical.dim is not None:
                shape[logical.dim] = padded if name.startswith(("embeddings.", "lm_head.")) else (
                    shape[logical.dim] // self.parts.tensor
                )  # fmt: skip
            if _QKV.fullmatch(name):
                shape[:2] = [shape[0] * shape[1]]
            dtype = self._part(name, 0).dtype
            for rank in range(self.parts.tensor):
                part, place = self._part(name, rank), self.places[name]
                if list(part.shape) != shape or part.dtype != dtype or not dtype.is_floating_point:
                    raise ValueError(
                        f"{self.parts.file(rank, place.pipeline).where}: {place.key} is {list(part.shape)} of "
                        f"{part.dtype}, where {shape} of one floating-point type is needed"
                    )
        return {name: self._part(name if name in self.places else _WORDS, 0).dtype for name in self.logical}

    def copies_that_differ(self) -> list[str]:
        """What should be the same on several ranks and is not, as a note: training has let it drift.  The first copy is
        taken, as Megatron-LM's own tools do."""
        whole = [name for name, logical in self.logical.items() if logical.dim is None and name in self.places]
        odd = [name for name in whole if not self._same_on_all_ranks(name)]
        if self.tied and _OUTPUT in self.places and not self._equal(_OUTPUT, _WORDS):
            odd.append(_WORDS)
        note = f"{len(odd)} tensors that several of its parts hold differ there, such as {odd[0]}" if odd else ""
        return [f"{note}: the first part's were taken"] if odd else []

    def _same_on_all_ranks(self, name: str) -> bool:
        self._about_to_read(name)
        return all(torch.equal(self._part(name, 0), self._part(name, rank)) for rank in range(1, self.parts.tensor))

    def read(self, name: str, config: MegatronBertConfig) -> Tensor:
        """The whole logical tensor."""
        logical = self.logical[name]
        if name not in self.places:
            return torch.zeros(logical.shape, dtype=self._part(_WORDS, 0).dtype)
        self._about_to_read(name)
        if logical.dim is None:
            return self._part(name, 0)
        missing, parts = logical.shape[logical.dim], []
        for rank in range(self.parts.tensor):
            part = self._part(name, rank)
            if _QKV.fullmatch(name):
                part = _in_order(part, self.version, config.num_attention_heads // self.parts.tensor)
            part = part.narrow(logical.dim, 0, min(missing, part.shape[logical.dim]))  # rows that pad are left out
            missing -= part.shape[logical.dim]
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts, logical.dim)


def _translate(key: str, layers_before: int) -> tuple[str | None, int]:
    """Our name of one of Megatron's tensors, None if it is not of a BERT model; the layer within its stage, or −1."""
    if layer := _LAYER.fullmatch(key):
        index, rest = int(layer[1]), layer[2]
        for pattern, name in _NAMES_IN_LAYER.items():
            if match := re.fullmatch(f"(?:{pattern})(weight|bias)", rest):
                return f"layers.{layers_before + index}.{name}.{match[1]}", index
    for pattern, name in _NAMES.items():
        if match := re.fullmatch(rf"(?:{pattern})\.(weight|bias)", key):
            return f"{name}.{match[1]}", -1
    return None, -1


def _in_order(part: Tensor, version: float, heads: int) -> Tensor:
    """One tensor rank's queries, keys and values, [3, heads · d, …].

    Megatron-LM wrote [3, heads, d] until its checkpoint version 1, [heads, d, 3] in that, [heads, 3, d] since
    (``fix_query_key_value_ordering`` there).
    """
    if version == 0:
        ordered = part.unflatten(0, (3, heads, -1))
    elif version == 1:
        ordered = part.unflatten(0, (heads, -1, 3)).movedim(2, 0)
    else:
        ordered = part.unflatten(0, (heads, 3, -1)).movedim(1, 0)
    return ordered.flatten(1, 2)
