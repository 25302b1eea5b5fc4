from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.pretrain.data.sources import Reading, find_sources, plan_shards, read_documents

LINES = st.lists(
    st.sampled_from(["", "", " ", "\t", "word", "two words", "é" * 9, "x" * 40, "\r", "end \r"]), max_size=30
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sources")


def read_all(inputs, shard_bytes=None, **options):
    """The documents of each shard."""
    reading = Reading(**options)
    shards = plan_shards(find_sources(inputs, reading), reading, shard_bytes)
    return [[text for piece in shard for text in read_documents(piece, reading) if text] for shard in shards]


def flat(shards):
    return [text for shard in shards for text in shard]


def write_lines(path, lines, mark, last):
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + "\n".join(lines).encode() + (b"\n" if last else b""))
    return "\n".join(lines).replace("\r\n", "\n")


@settings(max_examples=200, deadline=None)
@given(
    files=st.lists(LINES, min_size=1, max_size=3),
    shard_bytes=st.integers(1, 200),
    mark=st.booleans(),
    last=st.booleans(),
)
def test_shards_hold_every_document_once(folder, files, shard_bytes, mark, last):
    paths = [folder / f"{number}.txt" for number in range(len(files))]
    texts = [write_lines(path, lines, mark, last) for path, lines in zip(paths, files, strict=True)]
    blank = [p.strip() for text in texts for p in re.split(r"\n(?:\s*\n)+|^\s*\n", text) if p.strip()]
    line = [p.strip() for text in texts for p in text.split("\n") if p.strip()]
    for separator, expected in (
        ("blank-line", blank),
        ("line", line),
        ("file", [t.strip() for t in texts if t.strip()]),
    ):
        assert flat(read_all(paths, shard_bytes, document_separator=separator)) == expected


def test_large_input_is_cut_evenly(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some words of text\n\n" * 5000)
    shards = read_all([path], 10_000)
    assert len(shards) == 10
    assert all(len(shard) == 500 for shard in shards)
    assert len(read_all([path])) == 1


def test_a_line_longer_than_a_block(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a " * 100_000 + "\nb\n\n" + "c" * 200_000 + "\n")
    expected = [("a " * 100_000).strip() + " \nb", "c" * 200_000]
    assert flat(read_all([path], 7000)) == expected


@pytest.mark.parametrize("shard_bytes", [None, 50, 1])
def test_json_lines_parquet_and_datasets_give_the_same(tmp_path, shard_bytes):
    import datasets
    import pyarrow
    import pyarrow.parquet

    texts = [f"document {number} \n\n with a gap" for number in range(40)]
    texts[3] = ""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text, "n": 1}) + "\n" for text in texts[:20]))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"body": text}) + "\n" for text in texts[20:]))
    table = pyarrow.table({"n": range(40), "body": [text or None for text in texts]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    dataset = datasets.Dataset.from_dict({"body": texts})
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "dict")
    (tmp_path / "folder").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "folder" / "train-0.parquet")
    expected = [text for text in texts if text]
    for given_inputs in ([tmp_path / "*.jsonl"], [tmp_path / "a.parquet"], [tmp_path / "one"], [tmp_path / "dict"]):
        assert flat(read_all(given_inputs, shard_bytes, text_field="body")) == expected
    assert flat(read_all([tmp_path / "dict"], text_field="body", dataset_split="test")) == texts[:1]
    assert flat(read_all([tmp_path / "folder"], text_field="body")) == expected


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    assert flat(read_all([tmp_path / "a.jsonl"])) == ["a?b"]


def test_errors_are_one_clear_line(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"good\n\ncaf\xe9\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "field.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "number.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "a.txt.gz").write_bytes(b"")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    cases = [
        ([], {}, "no input"),
        (["latin.txt"], {}, "latin.txt is not UTF-8 text at byte 9"),
        (["bad.jsonl"], {}, "bad.jsonl at byte 14 is not a line of JSON"),
        (["field.jsonl"], {}, "has the fields body: name .* --text-field"),
        (["number.jsonl"], {}, "holds int, not text"),
        (["a.txt.gz"], {}, "compressed"),
        (["bad.parquet"], {}, "cannot be read as parquet"),
        (["*.csv"], {}, "matches no file"),
        (["absent.txt"], {}, "no file or folder"),
        (["absent"], {"format": "dataset"}, "datasets cannot load it"),
        (["latin.txt"], {"format": "xml"}, "choose one of text, jsonl"),
        (["latin.txt"], {"document_separator": "page"}, "choose one of blank-line"),
        ([""], {"format": "text"}, "is a folder: name its files"),
    ]
    for names, options, match in cases:
        with pytest.raises(ValueError, match=match) as error:
            read_all([f"{tmp_path}/{name}" for name in names], **options)
        assert "\n" not in str(error.value)
