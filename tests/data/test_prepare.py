from __future__ import annotations

import argparse
import json
import random
import shutil

import numpy as np
import pytest
from transformers import AutoTokenizer

from farspan.pretrain.data import prepare as preparing
from farspan.pretrain.data.prepare import add_arguments, prepare, run
from farspan.pretrain.data.sources import Reading
from farspan.pretrain.data.store import TokenStore

WORDS = "the state of our union is strong and people work for peace with freedom economy nations".split()  # noqa: SIM905
DOCUMENTS = 600


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    chooser = random.Random(0)
    documents = [
        f"{number} " + " ".join(chooser.choices(WORDS, k=chooser.randint(1, 40))) for number in range(DOCUMENTS)
    ]
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("\n\n\n".join(documents))
    return path, documents


OPTIONS = {"vocab_size": 300, "validation_fraction": 0.1, "shard_bytes": 10_000, "progress": False}


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """Prepared without interruption, in this process."""
    out = tmp_path_factory.mktemp("whole") / "data"
    prepare([text[0]], out, processes=1, **OPTIONS)
    return out


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_document_is_in_one_split(text, whole):
    theirs = AutoTokenizer.from_pretrained(whole / "tokenizer")
    splits = [TokenStore(whole, split) for split in ("train", "validation")]
    found = [[theirs.decode(store.document(index)) for index in range(store.documents)] for store in splits]
    assert sorted(found[0] + found[1]) == sorted(text[1])
    assert abs(len(found[1]) / DOCUMENTS - 0.1) < 0.04
    # Out of order within a shard.
    order = np.array([int(document.split()[0]) for document in found[0]])[:50]
    assert abs(np.corrcoef(order, np.arange(50))[0, 1]) < 0.5
    manifest = json.loads((whole / "dataset.json").read_text())
    assert len(manifest["splits"]["train"]["shards"]) > 3
    assert manifest["vocabulary_size"] == 300 and manifest["dtype"] == "<u2"
    assert sum(shard["tokens"] for shard in manifest["splits"]["train"]["shards"]) == splits[0].tokens
    assert {p.name for p in whole.iterdir()} == {"dataset.json", "tokenizer", "train", "validation"}


def test_the_tokenizer_does_not_learn_from_validation(text, whole, tmp_path, monkeypatch):
    seen = []

    def learn(kind, texts, out, **options):
        seen.extend(texts)
        shutil.copytree(whole / "tokenizer", out)

    monkeypatch.setattr(preparing, "train_tokenizer", learn)
    prepare([text[0]], tmp_path / "data", processes=1, **OPTIONS)
    theirs, store = AutoTokenizer.from_pretrained(whole / "tokenizer"), TokenStore(whole)
    assert sorted(seen) == sorted(theirs.decode(store.document(index)) for index in range(store.documents))


def test_processes_do_not_change_the_result(text, whole, tmp_path):
    prepare([text[0]], tmp_path / "data", processes=2, **OPTIONS)
    assert files(tmp_path / "data") == files(whole)


@pytest.mark.parametrize("stop_at", [0, 2])
def test_interrupted_and_resumed_equals_uninterrupted(text, whole, tmp_path, monkeypatch, stop_at):
    out = tmp_path / "data"
    made = []
    make_shard, finish = preparing._make_shard, preparing._finish

    def interrupted(job, vocabulary_size):
        if job.number == stop_at and len(made) == stop_at:
            # As a kill would leave it: half a shard under another name, a shard without its lengths.
            (out / "train").mkdir(exist_ok=True)
            (out / "train" / "00004.bin.123.tmp").write_bytes(b"half")
            (out / "train" / "00005.bin").write_bytes(b"whole")
            raise KeyboardInterrupt
        made.append(job.number)
        return make_shard(job, vocabulary_size)

    monkeypatch.setattr(preparing, "_make_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare([text[0]], out, processes=1, **OPTIONS)
    with pytest.raises(ValueError, match="run it again if it was interrupted"):
        TokenStore(out)
    assert made == list(range(stop_at))
    made.append(-1)
    # The second time it stops before the manifest.
    monkeypatch.setattr(preparing, "_finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare([text[0]], out, processes=1, **OPTIONS)
    monkeypatch.setattr(preparing, "_finish", finish)
    prepare([text[0]], out, processes=1, **OPTIONS)
    made.remove(-1)
    assert sorted(made) == sorted(set(made))
    assert files(out) == files(whole)
    # Nothing is left to do.
    monkeypatch.setattr(preparing, "_tokenize", None)
    assert prepare([text[0]], out, processes=1, **OPTIONS)["splits"]["train"]["documents"] > 400


def test_shards_that_were_finished_without_checksums_get_theirs(text, whole, tmp_path, monkeypatch):
    """As an older Farspan leaves them that was interrupted before the manifest."""
    out, finish = tmp_path / "data", preparing._finish
    monkeypatch.setattr(preparing, "_finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare([text[0]], out, processes=1, **OPTIONS)
    for number, path in enumerate(sorted((out / ".partial").glob("*.npz"))):
        if number % 2:
            with np.load(path) as stored:
                lengths = {split: stored[split] for split in ("train", "validation")}
            np.savez(path, **lengths)
    monkeypatch.setattr(preparing, "_finish", finish)
    prepare([text[0]], out, processes=1, **OPTIONS)
    assert files(out) == files(whole)


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(text, tmp_path, monkeypatch, finished):
    out = tmp_path / "data"
    if not finished:
        monkeypatch.setattr(preparing, "_make_shard", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare([text[0]], out, processes=1, **OPTIONS)
    else:
        prepare([text[0]], out, processes=1, **OPTIONS)
    changes = [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"validation_fraction": 0.2}, "validation_fraction was 0.1, now 0.2"),
        ({"vocab_size": 310}, "vocab_size 300.* now .*vocab_size 310"),
        ({"train_kind": "unigram"}, "kind unigram"),
        ({"reading": Reading(document_separator="line")}, "document_separator line"),
    ]
    for change, match in changes:
        with pytest.raises(ValueError, match=match) as error:
            prepare([text[0]], out, processes=1, **{**OPTIONS, **change})
        assert "\n" not in str(error.value)
    other = tmp_path / "b.txt"
    other.write_text("other")
    with pytest.raises(ValueError, match="1 inputs of 5 bytes"):
        prepare([other], out, processes=1, **OPTIONS)


def test_a_tokenizer_folder_is_taken_as_it_is(text, whole, tmp_path):
    options = {**OPTIONS, "vocab_size": 7}  # not read
    prepare([text[0]], tmp_path / "data", tokenizer=whole / "tokenizer", processes=1, **options)
    again, first = files(tmp_path / "data"), files(whole)
    assert {name: again[name] for name in again if name != "dataset.json"} == {
        name: first[name] for name in first if name != "dataset.json"
    }


def test_seeds_change_the_split_and_the_order(text, whole, tmp_path):
    tokenizer = whole / "tokenizer"
    prepare([text[0]], tmp_path / "data", tokenizer=tokenizer, processes=1, **{**OPTIONS, "seed": 1})
    again, first = files(tmp_path / "data"), files(whole)
    assert again["train/00000.bin"] != first["train/00000.bin"]


def test_errors_are_one_clear_line(text, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    (tmp_path / "empty.txt").write_text("\n\n \n")
    path = text[0]
    cases = [
        ([path], "taken", {}, "choose another folder"),
        ([path], "a", {"validation_fraction": 1.0}, "below 1"),
        ([path], "a", {"tokenizer": "x", "train_kind": "bpe"}, "drop --tokenizer"),
        ([path], "a", {"processes": 0}, "1 or more"),
        ([path], "a", {"train_kind": "char"}, "choose one of bpe"),
        ([tmp_path / "empty.txt"], "b", {}, "has no text"),
    ]
    for inputs, out, options, match in cases:
        with pytest.raises(ValueError, match=match) as error:
            prepare(inputs, tmp_path / out, **{**OPTIONS, **options})
        assert "\n" not in str(error.value)
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"


def test_command_line(text, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    line = [str(tmp_path / "data"), "--input", str(text[0]), "--train-tokenizer", "wordpiece", "--vocab-size", "200"]
    arguments = parser.parse_args([*line, "--lowercase", "--validation-fraction", "0.1", "--processes", "1"])
    assert run(arguments) == 0
    assert "train: 5" in capsys.readouterr().out
    assert TokenStore(tmp_path / "data", "validation").documents > 30
