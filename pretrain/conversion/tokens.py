"""Tokens of two tokenizers that stand for the same: which row of an old vocabulary each id of a new one takes over."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders
from torch import Tensor

from ..data.tokenizer import TOKENIZER_FILE, Vocabulary, copy_tokenizer
from .imported import TOKENIZER_FILES

NEW = -1  # in place of a row: there is none
Style = Literal["byte-level", "space mark", "wordpiece", "plain"]
_SPACE_MARK = "▁"  # SentencePiece's
_BERT_ROLES = {"pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]", "cls": "[CLS]", "sep": "[SEP]"}


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of a tokenizer.

    ``ids``: token → id, added tokens included.  ``style``: how tokens are written.  ``special``: ids that stand for no
    text.  ``roles``: "pad", "unk", "mask", "cls", "sep" → id, of those that there are.
    """

    ids: Mapping[str, int]
    style: Style
    special: frozenset[int]
    roles: Mapping[str, int]

    @property
    def size(self) -> int:
        """The highest id plus one."""
        return max(self.ids.values()) + 1

    @staticmethod
    def read(folder: Path) -> Tokens:
        """Of a folder with a tokenizer.json, with BERT's vocab.txt, or with what transformers makes one of.
        ValueError where it has none of these, or a damaged one."""
        if not (folder / TOKENIZER_FILE).is_file():
            if (tokens := _of_vocab_txt(folder / "vocab.txt")) is not None:
                return tokens
            with tempfile.TemporaryDirectory() as made:
                copy_tokenizer(folder, Path(made))
                return Tokens.read(Path(made))
        vocabulary = Vocabulary.from_folder(folder)
        roles = {name: getattr(vocabulary, f"{name}_id") for name in ("unk", "mask", "cls", "sep")}
        if vocabulary.pad_id != vocabulary.sep_id:  # else it has no padding token
            roles["pad"] = vocabulary.pad_id
        ids = Tokenizer.from_file(str(folder / TOKENIZER_FILE)).get_vocab(with_added_tokens=True)
        found = {name: id for name, id in roles.items() if id is not None}
        return Tokens(ids, _style(folder / TOKENIZER_FILE), frozenset(vocabulary.special_ids), found)

    def by_text(self) -> dict[str, int]:
        """Id by the text that a token stands for: the beginning of a word is a space before it, however it is written.
        Special tokens, and tokens that are no text of their own, stay as they are written."""
        byte_level, texts = decoders.ByteLevel(), {}
        for token, id in self.ids.items():
            text = token
            if id in self.special:
                pass
            elif self.style == "byte-level":
                text = byte_level.decode([token])
                if "\ufffd" in text:  # a part of a character
                    text = f"\0{token}"
            elif self.style == "space mark":
                text = token.replace(_SPACE_MARK, " ")
            elif self.style == "wordpiece" and token[:1].isalnum():
                text = f" {token}"
            elif self.style == "wordpiece" and token.startswith("##"):
                # BERT cuts words at punctuation, so that punctuation that goes on with a word is never met.
                text = token[2:] if token[2:3].isalnum() else f"\0{token}"
            texts[text] = id
        return texts


@dataclasses.dataclass(frozen=True)
class Match:
    """``rows`` [new size] int64: the old row that each new one takes over, or ``NEW``.  Of the ``tokens`` of the new
    tokenizer ``carried`` have one; ``dropped`` of the old tokens are no longer there."""

    rows: Tensor
    tokens: int
    carried: int
    dropped: int


def match(old: Tokens, new: Tokens, old_size: int, new_size: int) -> Match:
    """Tokens with the same role, then with the same text, take over their row; of ids that name no token on either
    side, such as the padding of a vocabulary, the row of the same id.  Sizes: rows of the two tables."""
    same = old.style == new.style
    old_ids, new_ids = (old.ids, new.ids) if same else (old.by_text(), new.by_text())
    rows = torch.full((new_size,), NEW)
    for text, id in new_ids.items():
        rows[id] = old_ids.get(text, NEW)
    for role in ("pad", "unk", "mask", "cls", "sep"):
        if role in new.roles and role in old.roles:
            rows[new.roles[role]] = old.roles[role]
    rows[rows >= old_size] = NEW  # tokens that were added to a tokenizer without giving the model rows for them
    named = set(new.ids.values())
    carried = int((rows[sorted(named)] != NEW).sum())
    kept = set(rows.tolist())
    dropped = sum(id < old_size and id not in kept for id in set(old.ids.values()))
    for id in set(range(min(old_size, new_size))) - named - set(old.ids.values()):
        rows[id] = id
    return Match(rows, len(named), carried, dropped)


def first_other_token(one: Tokens, other: Tokens) -> tuple[int, str, str] | None:
    """The first id that names another token in ``other``, with both tokens; None: an id that both have is the same."""
    ours, theirs = ({id: token for token, id in tokens.ids.items()} for tokens in (one, other))
    different = (id for id in sorted(ours) if id in theirs and theirs[id] != ours[id])
    return next(((id, ours[id], theirs[id]) for id in different), None)


def has_tokenizer(folder: Path | None) -> bool:
    return folder is not None and any((folder / name).is_file() for name in TOKENIZER_FILES)


def _style(path: Path) -> Style:
    content = json.loads(path.read_text(encoding="utf-8"))
    if (content.get("model") or {}).get("type") == "WordPiece":
        return "wordpiece"
    parts = [content.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    said = json.dumps(parts, ensure_ascii=False)
    if '"ByteLevel"' in said:
        return "byte-level"
    return "space mark" if _SPACE_MARK in said else "plain"


def _of_vocab_txt(path: Path) -> Tokens | None:
    """Of BERT's file, a token a line; None where there is no such file."""
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # some tokens are line ends of other kinds
    ids = {token: id for id, token in enumerate(lines)}
    roles = {role: ids[token] for role, token in _BERT_ROLES.items() if token in ids}
    return Tokens(ids, "wordpiece", frozenset(roles.values()), roles) if "unk" in roles else None
