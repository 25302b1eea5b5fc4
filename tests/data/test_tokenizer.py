from __future__ import annotations

import builtins
import json
import random

import pytest
from transformers import AutoTokenizer, BertTokenizer

from farspan.pretrain.data.tokenizer import Encoder, Vocabulary, copy_tokenizer, train_tokenizer

WORDS = "the state of our union is strong and people work for peace with freedom economy nations".split()  # noqa: SIM905
KINDS = ["bpe", "wordpiece", "unigram"]


def texts():
    chooser = random.Random(0)
    return [" ".join(chooser.choices(WORDS, k=12)).capitalize() + ", isn't it? Café!" for _ in range(300)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        train_tokenizer(kind, texts(), root / kind, vocab_size=400 if kind == "bpe" else 120, progress=False)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_trained_folder_in_transformers(folders, kind):
    theirs = AutoTokenizer.from_pretrained(folders / kind)
    ours = Vocabulary.from_folder(folders / kind)
    if kind == "wordpiece":
        order = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        assert (ours.pad_id, ours.unk_id, ours.cls_id, ours.sep_id, ours.mask_id) == (0, 1, 2, 3, 4)
    else:
        order = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        assert (ours.cls_id, ours.pad_id, ours.sep_id, ours.unk_id, ours.mask_id) == (0, 1, 2, 3, 4)
        assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 2)
    assert theirs.convert_ids_to_tokens(range(5)) == order
    assert (theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id) == (ours.cls_id, ours.sep_id, ours.mask_id)
    assert (theirs.pad_token_id, theirs.unk_token_id) == (ours.pad_id, ours.unk_id)
    assert sorted(theirs.all_special_ids) == list(ours.special_ids) == [0, 1, 2, 3, 4]
    assert len(theirs) == ours.size and not ours.unused_ids
    assert ours.ordinary_ids().tolist() == list(range(5, ours.size))

    text = "The state of our economy is strong, isn't it?"
    ids = [array.tolist() for array in Encoder(folders / kind).encode([text, "peace"])]
    assert theirs(text)["input_ids"] == [ours.cls_id, *ids[0], ours.sep_id]
    pair = theirs(text, "peace", return_token_type_ids=True)
    assert pair["input_ids"] == [ours.cls_id, *ids[0], ours.sep_id, *ids[1], ours.sep_id]
    assert pair["token_type_ids"] == [0] * (len(ids[0]) + 2) + [1] * (len(ids[1]) + 1)
    assert ("token_type_ids" in theirs(text)) == (kind == "wordpiece")
    decoded = theirs.decode(ids[0])
    assert decoded == text if kind != "wordpiece" else decoded.replace(" ' ", "'") == text


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_mask_stands_for_a_word_and_its_space(folders, kind):
    theirs = AutoTokenizer.from_pretrained(folders / kind)
    whole = theirs("The state of peace")["input_ids"]
    at = next(place for place, token in enumerate(theirs.convert_ids_to_tokens(whole)) if token.endswith("of"))
    for text in ("The state <mask> peace", "The state<mask> peace"):
        assert theirs(text)["input_ids"] == [*whole[:at], theirs.mask_token_id, *whole[at + 1 :]]


def test_training_bpe_is_reproducible(folders, tmp_path):
    train_tokenizer("bpe", texts(), tmp_path, vocab_size=400, progress=False)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (folders / "bpe" / file.name).read_bytes()


def test_lowercase(tmp_path):
    for kind in KINDS:
        train_tokenizer(kind, texts(), tmp_path / kind, vocab_size=300, lowercase=True, progress=False)
        upper, lower = Encoder(tmp_path / kind).encode(["THE STATE", "the state"])
        assert upper.tolist() == lower.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_the_text_are_text(folders, kind):
    special = set(Vocabulary.from_folder(folders / kind).special_ids)
    unknown = Vocabulary.from_folder(folders / kind).unk_id
    text = "a <mask> b </s> <s> [MASK] [SEP]"
    ids = Encoder(folders / kind).encode([text])[0]
    assert len(ids) and not set(ids.tolist()) & (special - {unknown})
    if kind == "bpe":
        assert AutoTokenizer.from_pretrained(folders / kind).decode(ids) == text


def test_vocabulary_of_added_tokens_and_gaps(folders, tmp_path):
    theirs = AutoTokenizer.from_pretrained(folders / "bpe")
    size = len(theirs)
    theirs.add_tokens(["plain-addition"])
    theirs.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    theirs.save_pretrained(tmp_path)
    ours = Vocabulary.from_folder(tmp_path)
    assert ours.size == len(theirs) == size + 2
    assert ours.special_ids == (0, 1, 2, 3, 4, size + 1)
    assert ours.ordinary_ids().tolist() == list(range(5, size + 1))


def test_vocabulary_with_gaps(folders, tmp_path):
    copy_tokenizer(folders / "wordpiece", tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    size = len(vocabulary)
    vocabulary[max(vocabulary, key=vocabulary.get)] = size + 1
    path.write_text(json.dumps(content))
    ours = Vocabulary.from_folder(tmp_path)
    assert ours.size == size + 2 and ours.unused_ids == (size - 1, size)
    assert ours.ordinary_ids().tolist() == [*range(5, size - 1), size + 1]


def test_a_tokenizer_of_bos_and_eos_only(folders, tmp_path):
    theirs = AutoTokenizer.from_pretrained(folders / "bpe")
    content = json.loads(theirs.backend_tokenizer.to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    ours = Vocabulary.from_folder(tmp_path)
    assert (ours.cls_id, ours.sep_id, ours.pad_id, ours.mask_id, ours.unk_id) == (2, 2, 2, None, None)


def test_a_folder_without_tokenizer_json_goes_through_transformers(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "peace", "##ful", "work"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_type": "bert"}')
    copy_tokenizer(tmp_path, tmp_path / "out")
    ours = Vocabulary.from_folder(tmp_path / "out")
    assert (ours.size, ours.cls_id, ours.mask_id) == (8, 2, 4)
    theirs = BertTokenizer.from_pretrained(tmp_path)
    assert Encoder(tmp_path / "out").encode(["Peaceful work"])[0].tolist() == [5, 6, 7]
    assert theirs("Peaceful work", add_special_tokens=False)["input_ids"] == [5, 6, 7]


def test_copying_keeps_every_file_and_nothing_else(folders, tmp_path):
    source = tmp_path / "in"
    copy_tokenizer(folders / "bpe", source)
    (source / "model.safetensors").write_bytes(b"large")
    copy_tokenizer(source, tmp_path / "out")
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == {
        f.name: f.read_bytes() for f in (folders / "bpe").iterdir()
    }


def test_errors_are_one_clear_line(tmp_path, folders, monkeypatch):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.json").write_bytes((folders / "bpe" / "tokenizer.json").read_bytes())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")

    def without_transformers(name, *args, **kwargs):
        if name == "transformers":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    cases = [
        (lambda: Vocabulary.from_folder(tmp_path), "no tokenizer.json"),
        (lambda: Vocabulary.from_folder(tmp_path / "bare"), "names no cls, sep, bos or eos"),
        (lambda: Vocabulary.from_folder(tmp_path / "broken"), "cannot be read as a tokenizer"),
        (lambda: copy_tokenizer(tmp_path, tmp_path / "out"), "cannot be loaded by transformers"),
        (lambda: train_tokenizer("bpe", [], tmp_path, vocab_size=260), "set it to 261 or more"),
        (lambda: train_tokenizer("char", [], tmp_path, vocab_size=260), "choose one of bpe, wordpiece, unigram"),
    ]
    for call, match in cases:
        with pytest.raises(ValueError, match=match) as error:
            call()
        assert "\n" not in str(error.value)
    real_import = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without_transformers)
    with pytest.raises(ValueError, match="pip install transformers"):
        copy_tokenizer(tmp_path, tmp_path / "out")
