"""Other vocabularies and other lengths: a model whose tables are made to fit, for continued pretraining.

Words (the embedding, an untied output weight, the output bias): rows that a token of the new vocabulary takes over keep
their bits; the others are those that a new model of that size and seed begins with.

Positions added to embeddings: rows that serve no position (RoBERTa's up to its padding row, the first two of MRA and
Nyströmformer) stay in front; the table of the P old positions becomes one of N > P in one of two ways:

    linear  position i gets the vector at i (P - 1) / (N - 1) of the old table, interpolated between its two neighbours
            feature by feature, so that the first and the last keep theirs: what arXiv 2010.11929, section 3.2, does to
            the two dimensions of an image's positions
    tile    position i gets the vector of i mod P: arXiv 2004.05150, section 5

For N < P the first N remain.

Tables of distances (``relative_key``, ``relative_key_query``, MEGA's simple bias) are not stretched, so that a distance
means what it meant: those beyond the old table get its outermost row on their side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from ...parallel.sharding import Logical, initial_value, logical_of
from .. import checkpoint as ckpt
from ..data.tokenizer import TOKENIZER_FILE, Vocabulary
from ..models.base import LanguageModel
from ..models.bert import BertConfig
from ..models.config import ModelConfig
from ..models.dense_attention import DenseAttentionConfig
from ..models.mega.config import MegaConfig
from ..validation import one_line
from .imported import Imported, build
from .model import model_of
from .tokens import NEW, Tokens, first_other_token, has_tokenizer, match

PositionMethod = Literal["linear", "tile"]
METHODS: tuple[PositionMethod, ...] = ("linear", "tile")

_WORDS = ("embeddings.words.weight", "lm_head.decoder.weight", "lm_head.decoder.bias")
_POSITIONS = "embeddings.positions.weight"
_DISTANCES = ".attention.distances.weight"  # relative_key's
_BIAS = ".bias.table.weight"  # MEGA's simple one

Change = Callable[[Tensor], Tensor]  # of one logical tensor


def from_checkpoint(path: Path) -> Imported:
    """The weights of a Farspan checkpoint: a checkpoint folder, or a run (its latest).  What is read is verified.

    ValueError in one line where there is none, or it is damaged.
    """
    reader = ckpt.Reader(ckpt.find(path))
    cls, config, heads = model_of(reader.manifest, reader.folder)
    tokenizer = reader.folder / "tokenizer"
    model = Imported(
        cls, config, heads, reader.tensor, {}, tokenizer if tokenizer.is_dir() else None, reader.manifest.huggingface
    )
    shapes = model.shapes()
    return dataclasses.replace(
        model,
        read=lambda name: reader.tensor(name, shapes[name]),
        dtypes={name: reader.dtype(name) for name in shapes},
    )


def resized(
    model: Imported,
    *,
    vocab_size: int | None = None,
    tokenizer: Path | None = None,
    positions: int | None = None,
    method: str = "linear",
    seed: int = 1234,
) -> Imported:
    """The model with another vocabulary, or for rows of another length; its tensors are made as they are read.

    Args:
        model: what is taken over; its bits and dtypes are kept wherever nothing changes.
        vocab_size: rows of the word table.  More: the others are new.  Fewer: only where no token has the rows cut.
        tokenizer: folder of another tokenizer, with a tokenizer.json.  Tokens of the same role or text keep their rows
            under their new ids, padding, begin and end of the configuration follow, and its files go along.  Without
            ``vocab_size``, the table has a row for each of its ids.  A model without tokenizer files is taken to be of
            this tokenizer: all ids stay.
        positions: the longest row in tokens.
        method: of positions added to embeddings, "linear" or "tile", see above.
        seed: of new rows.

    ``note`` of what is returned says what was done, and which fields a configuration must now have.  ValueError in one
    line: a vocabulary that loses tokens, sizes or a method that do not exist, a damaged tokenizer.
    """
    for name, value in (("vocab_size", vocab_size), ("positions", positions)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: set it to 1 or more")
    if method not in METHODS:
        raise ValueError(f"position method {method!r} is unknown: choose one of {', '.join(METHODS)}")
    roles = {} if tokenizer is None else _roles(Vocabulary.from_folder(tokenizer))
    rows, notes = _vocabulary(model, vocab_size, tokenizer)
    changed: dict[str, Any] = {"vocab_size": len(rows)}
    changed |= {name: roles[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id") if name in roles}
    changed |= _lengths(model.config, changed, positions)
    try:
        config = model.cls.config_class.model_validate(model.config.model_dump() | changed)
    except ValidationError as error:
        raise ValueError(f"the model cannot have these sizes: {one_line(error)}") from None
    changes = _changes(model, config, rows, method, seed)
    notes += _length_notes(model.config, config, method)

    def read(name: str) -> Tensor:
        value = model.read(name)
        return changes[name](value) if name in changes else value

    return dataclasses.replace(
        model,
        config=config,
        read=read,
        tokenizer=model.tokenizer if tokenizer is None else tokenizer,
        huggingface=_huggingface(model, config, roles),
        note="; ".join(([model.note] if model.note else []) + notes) or None,
    )


def misfit(checkpoint: Path, theirs: ModelConfig, ours: ModelConfig, tokenizer: Path) -> str | None:
    """Why a run of the configuration ``ours``, on data of that ``tokenizer``, cannot start from the weights of this
    checkpoint of the same architecture, in one line that says what to do; None where vocabulary and length fit."""
    convert = f"farspan convert resize {checkpoint} OUT"
    other = _other_vocabulary(checkpoint, theirs, ours, tokenizer)
    if other is not None:
        return f"{other}: start from what `{convert} --tokenizer {tokenizer}` makes of it"
    if theirs.vocab_size != ours.vocab_size:
        return (
            f"{checkpoint} has vocab_size {theirs.vocab_size}, model.vocab_size is {ours.vocab_size}: set it to "
            f"{theirs.vocab_size}, or start from what `{convert} --tokenizer {tokenizer} --vocab-size "
            f"{ours.vocab_size}` makes of it"
        )
    if isinstance(ours, MegaConfig) and ours.relative_positional_bias == "rotary":
        return None  # it has no table
    field = ours.length_field
    then, now = getattr(theirs, field), getattr(ours, field)
    if then != now:
        return (
            f"{checkpoint} has {field} {then}, model.{field} is {now}: set it to {then}, or start from what "
            f"`{convert} --positions {ours.longest_sequence or now}` makes of it"
        )
    if isinstance(theirs, MegaConfig) and isinstance(ours, MegaConfig) and theirs.bias_positions != ours.bias_positions:
        return (
            f"{checkpoint} has chunk_size {theirs.chunk_size}, model.chunk_size is {ours.chunk_size}, and the table of "
            f"a simple bias is read from there: set it to {theirs.chunk_size}"
        )
    return None


def _other_vocabulary(checkpoint: Path, theirs: ModelConfig, ours: ModelConfig, tokenizer: Path) -> str | None:
    if (checkpoint / "tokenizer" / TOKENIZER_FILE).is_file():
        other = first_other_token(Tokens.read(checkpoint / "tokenizer"), Tokens.read(tokenizer))
        if other is not None:
            return f"{checkpoint} has {other[1]!r} as token {other[0]}, the data's tokenizer has {other[2]!r}"
    if theirs.pad_token_id not in (None, ours.pad_token_id):
        return f"{checkpoint} has pad_token_id {theirs.pad_token_id}, the data's tokenizer {ours.pad_token_id}"
    return None


# The vocabulary.


def _vocabulary(model: Imported, vocab_size: int | None, tokenizer: Path | None) -> tuple[Tensor, list[str]]:
    """The old row of each new one, or ``NEW``, and what to say of it."""
    old_size = model.config.vocab_size
    if tokenizer is not None:
        new = Tokens.read(tokenizer)
        size = new.size if vocab_size is None else vocab_size
        if size < new.size:
            raise ValueError(
                f"vocab_size {vocab_size} is smaller than the {new.size} ids of tokenizer {tokenizer}: leave it out, "
                f"or set it to {new.size} or more"
            )
        if has_tokenizer(model.tokenizer):
            assert model.tokenizer is not None
            found = match(Tokens.read(model.tokenizer), new, old_size, size)
            return found.rows, [
                f"{found.carried} of the {found.tokens} tokens of {tokenizer} are carried over, "
                f"{found.tokens - found.carried} are new, {found.dropped} of the old ones are dropped"
            ]
        note = f"there are no tokenizer files beside the model: {tokenizer} is taken for its own, so that all ids stay"
        return _same_ids(old_size, size), [note, *_size_note(old_size, size)]
    size = old_size if vocab_size is None else vocab_size
    if size < old_size:
        _refuse_loss(model, size)
    return _same_ids(old_size, size), _size_note(old_size, size)


def _refuse_loss(model: Imported, size: int) -> None:
    old_size = model.config.vocab_size
    if not has_tokenizer(model.tokenizer):
        raise ValueError(
            f"vocab_size {size} cuts rows off the {old_size} of the model, which has no tokenizer files to say that no "
            "token has them: give its tokenizer with --tokenizer too"
        )
    assert model.tokenizer is not None
    if (needed := Tokens.read(model.tokenizer).size) > size:
        raise ValueError(
            f"vocab_size {size} cuts rows off that are tokens of {model.tokenizer}, which has {needed} ids: set it to "
            f"{needed} or more, or give a smaller tokenizer with --tokenizer"
        )


def _same_ids(old_size: int, size: int) -> Tensor:
    rows = torch.arange(size)
    return torch.where(rows < old_size, rows, NEW)


def _size_note(old_size: int, size: int) -> list[str]:
    if size == old_size:
        return []
    what = f"{size - old_size} rows are new" if size > old_size else f"{old_size - size} rows that no token has are cut"
    return [f"vocab_size is {size} instead of {old_size}: {what}"]


def _roles(vocabulary: Vocabulary) -> dict[str, int]:
    """The ids that a config.json can name."""
    v = vocabulary
    ids = {"pad": v.pad_id, "bos": v.cls_id, "eos": v.sep_id, "cls": v.cls_id, "sep": v.sep_id}
    ids |= {name: id for name, id in (("mask", v.mask_id), ("unk", v.unk_id)) if id is not None}
    return {f"{name}_token_id": id for name, id in ids.items()}


def _huggingface(model: Imported, config: ModelConfig, roles: Mapping[str, int]) -> Mapping[str, Any]:
    """What an export says over again, with what is no longer so; what it left out for a default is said."""
    if not model.huggingface.get("config"):
        return model.huggingface
    fields = dict(model.huggingface["config"])
    before = model.config.model_dump()
    fields |= {name: value for name, value in config.model_dump().items() if value != before[name]}
    fields |= {name: id for name, id in roles.items() if name in fields}
    if roles:
        fields.pop("tokenizer_class", None)  # the other tokenizer's files say it
    return {**model.huggingface, "config": fields}


# Lengths.


def _lengths(config: ModelConfig, changed: Mapping[str, Any], positions: int | None) -> dict[str, Any]:
    """The fields from which a model takes rows of this length (None: as before), whatever else has ``changed``."""
    field, now = config.length_field, config.model_copy(update=dict(changed))
    wanted = config.longest_sequence if positions is None else positions
    if now.longest_sequence is None:
        return {} if positions is None else {field: positions}
    if wanted in (None, now.longest_sequence):
        return {}
    assert wanted is not None
    if isinstance(now, MegaConfig):  # a chunk size that is not used counts for the table all the same: see its config
        return {field: wanted, "chunk_size": -1}
    return {field: getattr(now, field) + wanted - now.longest_sequence}


def _length_notes(old: ModelConfig, new: ModelConfig, method: str) -> list[str]:
    fields = [name for name in (new.length_field, "chunk_size") if getattr(old, name, 0) != getattr(new, name, 0)]
    if not fields:
        return []
    said = ", ".join(f"model.{name} is {getattr(new, name)} instead of {getattr(old, name)}" for name in fields)
    before, after = old.longest_sequence, new.longest_sequence
    if before is None or after is None:
        return [f"{said}: the model took rows of any length before, and does"]
    if after == before:
        return [f"{said}: positions are counted from the id of the padding token"]
    if after < before:
        return [f"{said}: the first {after} of {before} positions are kept"]
    how = f"method {method}" if _has_position_table(new) else "distances never seen get the outermost row"
    return [f"{said}: rows may have {after} tokens instead of {before} ({how})"]


def _has_position_table(config: ModelConfig) -> bool:
    """Whether a table of positions is added to embeddings (files keep one where nothing reads it)."""
    relative = isinstance(config, DenseAttentionConfig) and config.position_embedding_type != "absolute"
    return isinstance(config, BertConfig) and not relative


# Tensors.


def _changes(model: Imported, new: ModelConfig, rows: Tensor, method: str, seed: int) -> dict[str, Change]:
    """What becomes of each tensor that changes."""
    old, shapes = model.config, model.shapes()
    changes: dict[str, Change] = {}
    words_stay = torch.equal(rows, torch.arange(old.vocab_size))
    for name, logical in _logical(model.cls, new, model.heads).items():
        fresh = partial(initial_value, name, logical, seed)
        if name in _WORDS:
            if not words_stay:
                changes[name] = partial(_words, rows=rows, fresh=fresh)
        elif name == _POSITIONS and isinstance(old, BertConfig) and isinstance(new, BertConfig):
            if (old.position_rows, _front(old)) != (new.position_rows, _front(new)):
                changes[name] = partial(_positions, old=old, new=new, method=method, fresh=fresh)
        elif (middles := _middles(name, old, new)) is not None:
            if shapes[name] != logical.shape or middles[0] != middles[1]:
                changes[name] = partial(_distances, middles=middles, rows=logical.shape[0])
        elif shapes[name] != logical.shape:
            raise ValueError(
                f"{name} would change from {shapes[name]} to {logical.shape}, and there is no rule for its values: add "
                "one to pretrain/conversion/resize.py, or keep vocabulary and positions as they are"
            )
    return changes


def _logical(cls: type[LanguageModel], config: ModelConfig, heads: tuple[str, ...]) -> dict[str, Logical]:
    with torch.device("meta"):
        return {name: logical_of(p) for name, p in build(cls, config, heads).named_parameters()}


def _words(value: Tensor, *, rows: Tensor, fresh: Callable[[], Tensor]) -> Tensor:
    result = fresh().to(value.dtype)
    known = rows != NEW
    result[known] = value[rows[known]]
    return result


def _front(config: BertConfig) -> int:
    """Rows at the beginning of the table that serve no position."""
    return config.position_rows - config.longest_sequence if _has_position_table(config) else 0


def _positions(value: Tensor, *, old: BertConfig, new: BertConfig, method: str, fresh: Callable[[], Tensor]) -> Tensor:
    result = fresh().to(value.dtype)
    if not _has_position_table(new):
        kept = min(len(value), len(result))
        result[:kept] = value[:kept]
        return result
    before, after = _front(old), _front(new)
    if before == after:
        result[:after] = value[:before]
    elif old.position_padding_index is not None and new.position_padding_index is not None:
        result[new.position_padding_index] = value[old.position_padding_index]
    result[after:] = _stretched(value[before:], len(result) - after, method)
    return result


def _stretched(table: Tensor, rows: int, method: str) -> Tensor:
    """[P, features] → [rows, features]"""
    old = len(table)
    if rows <= old:
        return table[:rows]
    if method == "tile":
        return table[torch.arange(rows) % old]
    places = torch.arange(rows, dtype=torch.float64) * (old - 1) / (rows - 1)
    below = places.floor().long()
    above, share = (below + 1).clamp(max=old - 1), (places - below).unsqueeze(1)
    wide = table.double()
    return torch.lerp(wide[below], wide[above], share).to(table.dtype)


def _middles(name: str, old: ModelConfig, new: ModelConfig) -> tuple[int, int] | None:
    """The rows of distance 0, where the tensor is a table of distances."""
    if name.endswith(_DISTANCES) and isinstance(old, BertConfig) and isinstance(new, BertConfig):
        return old.max_position_embeddings - 1, new.max_position_embeddings - 1
    if name.endswith(_BIAS) and isinstance(old, MegaConfig) and isinstance(new, MegaConfig):
        return old.bias_positions - 1, new.bias_positions - 1
    return None


def _distances(value: Tensor, *, middles: tuple[int, int], rows: int) -> Tensor:
    before, after = middles
    distances = torch.arange(rows) - after
    return value[before + distances.clamp(-before, before)]
