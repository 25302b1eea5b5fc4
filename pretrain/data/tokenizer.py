"""Tokenizers as Hugging Face folders: trained with ``tokenizers``, or loaded from any folder there is."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from ..files import read_mapping, write_json
from .hashing import Int64

TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILES = ("special_tokens_map.json", "tokenizer_config.json")
# What may lie beside a tokenizer.json in a Hugging Face folder and belongs to the tokenizer.
_COMPANIONS = (
    *_CONFIG_FILES,
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "chat_template.jinja",
)
_ROLES = ("bos_token", "eos_token", "cls_token", "sep_token", "pad_token", "unk_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What the objectives need to know of a tokenizer.

    ``size`` is the highest id plus one, added tokens counted; ``unused_ids`` are ids below it that name no token.
    ``cls_id`` and ``sep_id`` frame every document: cls and sep, else bos and eos.
    """

    size: int
    pad_id: int
    cls_id: int
    sep_id: int
    mask_id: int | None
    unk_id: int | None
    special_ids: tuple[int, ...]
    unused_ids: tuple[int, ...] = ()

    def ordinary_ids(self) -> Int64:
        """Every id that names a token which is not special, ascending: what random replacements are drawn from."""
        return np.setdiff1d(np.arange(self.size), np.array(self.special_ids + self.unused_ids, np.int64))

    @classmethod
    def from_folder(cls, folder: str | Path) -> Vocabulary:
        """Read a tokenizer folder that has a ``tokenizer.json``.

        Raises:
            ValueError: no tokenizer.json, a damaged file, or no token to frame documents with.
        """
        folder = Path(folder)
        tokenizer = _read_tokenizer(folder)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        roles = {role: vocabulary.get(token) for role, token in _role_tokens(folder).items()}
        special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        special.update(id for id in roles.values() if id is not None)

        def first(*names: str) -> int | None:
            return next((roles[name] for name in names if roles.get(name) is not None), None)

        cls_id = first("cls_token", "bos_token", "eos_token")
        sep_id = first("sep_token", "eos_token", "bos_token")
        if cls_id is None or sep_id is None:
            raise ValueError(
                f"tokenizer {folder} names no cls, sep, bos or eos token to mark where documents begin and end: "
                "set cls_token and sep_token in its tokenizer_config.json"
            )
        pad_id = first("pad_token")
        used = set(vocabulary.values())
        size = max(used) + 1
        return cls(
            size=size,
            # Padding is never seen nor predicted, so any token may stand there.
            pad_id=sep_id if pad_id is None else pad_id,
            cls_id=cls_id,
            sep_id=sep_id,
            mask_id=first("mask_token"),
            unk_id=first("unk_token"),
            special_ids=tuple(sorted(special)),
            unused_ids=tuple(sorted(set(range(size)) - used)),
        )


def _read_tokenizer(folder: Path) -> Tokenizer:
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {TOKENIZER_FILE}: give a Hugging Face tokenizer folder")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise ValueError(f"{path} cannot be read as a tokenizer ({error}): give one that is whole") from None


def _role_tokens(folder: Path) -> dict[str, str]:
    """Which token plays which role, by the folder's config files (the later one wins, as in transformers)."""
    roles = {}
    for name in _CONFIG_FILES:
        path = folder / name
        described = read_mapping(path, "a Hugging Face tokenizer folder") if path.is_file() else {}
        for role in _ROLES:
            token = described.get(role)
            content = token.get("content") if isinstance(token, dict) else token
            if content is not None:
                roles[role] = str(content)
    return roles


class Encoder:
    """Text to token ids without special tokens: those that occur in the text are read as text.

    Unigram models match them all the same, as pieces of their vocabulary: such ids are left out.
    """

    def __init__(self, folder: str | Path) -> None:
        self._tokenizer = _read_tokenizer(Path(folder))
        vocabulary = Vocabulary.from_folder(folder)
        self._kept = np.ones(vocabulary.size, bool)
        self._kept[[id for id in vocabulary.special_ids if id != vocabulary.unk_id]] = False
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, texts: Sequence[str]) -> list[Int64]:
        """Token ids of each text."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        arrays = (np.array(encoding.ids, np.int64) for encoding in encodings)
        return [ids[self._kept[ids]] for ids in arrays]


def copy_tokenizer(source: str | Path, out: Path) -> None:
    """Make ``out`` a tokenizer folder with a ``tokenizer.json``, from a folder, or a name that transformers knows.

    Raises:
        ValueError: there is no tokenizer.json and transformers is not installed, or cannot make one.
    """
    folder = Path(source)
    if not folder.is_dir() and (folder.is_absolute() or len(folder.parts) > 2 or str(source).startswith(".")):
        raise ValueError(f"tokenizer {source} is no folder: give one with a {TOKENIZER_FILE}, or a name on the hub")
    if (folder / TOKENIZER_FILE).is_file():
        out.mkdir(parents=True, exist_ok=True)
        for name in (TOKENIZER_FILE, *_COMPANIONS):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, out / name)
        return
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ValueError(
            f"tokenizer {source} has no {TOKENIZER_FILE}, and transformers, which could make one, is not installed: "
            "pip install transformers, or give a folder with a tokenizer.json"
        ) from None
    try:
        AutoTokenizer.from_pretrained(str(source)).save_pretrained(str(out))
    except Exception as error:
        lacks = f"has no {TOKENIZER_FILE}, and" if folder.is_dir() else "is no folder, and"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"tokenizer {source} {lacks} cannot be loaded by transformers either: {reason[:300]}"
        ) from None
    if not (out / TOKENIZER_FILE).is_file():
        raise ValueError(
            f"tokenizer {source} exists only in Python, it has no fast form that tokenizer.json could hold"
        )


@dataclasses.dataclass(frozen=True)
class _Style:
    """The special tokens of a kind of tokenizer, in the order of their ids, and which of them play the roles."""

    specials: tuple[str, ...]
    roles: dict[str, str]
    model_inputs: tuple[str, ...]


_ROBERTA = _Style(
    specials=("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
    roles={
        "bos_token": "<s>",
        "eos_token": "</s>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    },
    model_inputs=("input_ids", "attention_mask"),
)
_BERT = _Style(
    specials=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    roles={
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
    },
    model_inputs=("input_ids", "token_type_ids", "attention_mask"),
)
TOKENIZER_KINDS = ("bpe", "wordpiece", "unigram")


def train_tokenizer(
    kind: str, texts: Iterable[str], out: str | Path, *, vocab_size: int, lowercase: bool = False, progress: bool = True
) -> None:
    """Train a tokenizer and save it as a Hugging Face folder.

    Args:
        kind: "bpe" (byte-level, as RoBERTa), "wordpiece" (as BERT) or "unigram" (as SentencePiece).
        texts: what to learn from.
        out: folder for tokenizer.json, tokenizer_config.json, special_tokens_map.json.
        vocab_size: ids to fill, special tokens included; short texts fill fewer.
        lowercase: fold case (and, for wordpiece, strip accents) before anything else.
        progress: show the library's progress bar.
    """
    if kind not in TOKENIZER_KINDS:
        raise ValueError(f"unknown tokenizer kind {kind!r}: choose one of {', '.join(TOKENIZER_KINDS)}")
    style = _BERT if kind == "wordpiece" else _ROBERTA
    least = len(style.specials) + (256 if kind == "bpe" else 1)
    if vocab_size < least:
        raise ValueError(f"vocab_size {vocab_size} is too small for a {kind} tokenizer: set it to {least} or more")
    # Only byte-level BPE keeps spaces as part of words at decoding; in Unigram the word mark does.  There the mask eats
    # the space before it, so that a masked word is one token.
    mask = AddedToken(style.roles["mask_token"], lstrip=kind != "wordpiece", normalized=False, special=True)
    specials = [AddedToken(token, normalized=False, special=True) for token in style.specials[:-1]] + [mask]
    tokenizer, trainer = _untrained(kind, vocab_size, specials, lowercase, progress)
    tokenizer.train_from_iterator(texts, trainer)
    cls_token, sep_token = style.roles["cls_token"], style.roles["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls_token} $A {sep_token}",
        pair=f"{cls_token} $A {sep_token} $B:1 {sep_token}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls_token, sep_token)],
    )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    saved = json.loads(tokenizer.to_str())
    # Two fields in the form that older versions of `tokenizers` (transformers below 4.45) read too.
    if kind == "bpe":
        saved["model"]["merges"] = [" ".join(pair) for pair in saved["model"]["merges"]]
    if kind == "unigram":
        saved["pre_tokenizer"]["add_prefix_space"] = saved["decoder"]["add_prefix_space"] = True
    write_json(out / TOKENIZER_FILE, saved)
    roles: dict[str, Any] = dict(style.roles)
    roles["mask_token"] = {**_flags(mask), "content": mask.content}
    write_json(out / "special_tokens_map.json", roles)
    write_json(
        out / "tokenizer_config.json",
        {
            "added_tokens_decoder": {
                str(id): {**_flags(token), "content": token.content, "special": True}
                for id, token in enumerate(specials)
            },
            **style.roles,
            "clean_up_tokenization_spaces": False,
            "model_input_names": list(style.model_inputs),
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def _flags(token: AddedToken) -> dict[str, bool]:
    return {name: getattr(token, name) for name in ("lstrip", "rstrip", "normalized", "single_word")}


def _untrained(
    kind: str, vocab_size: int, specials: list[AddedToken], lowercase: bool, progress: bool
) -> tuple[Tokenizer, Any]:
    common: dict[str, Any] = {"vocab_size": vocab_size, "special_tokens": specials, "show_progress": progress}
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Lowercase() if lowercase else None
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        return tokenizer, trainers.BpeTrainer(initial_alphabet=sorted(alphabet), min_frequency=2, **common)
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(prefix="##")
        return tokenizer, trainers.WordPieceTrainer(continuing_subword_prefix="##", **common)
    tokenizer = Tokenizer(models.Unigram())
    folded = [normalizers.Lowercase()] if lowercase else []
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), *folded])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(unk_token="<unk>", **common)
