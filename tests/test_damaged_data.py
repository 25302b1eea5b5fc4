"""Data that change under a run end it in one line before anything is trained on them; mended, it is the same run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from comparison import assert_identical
from runs import Run, settings, train_here

from farspan.pretrain.data import rows

STEPS = 8
COMMON = {"checkpoint.interval": 2, "data.prefetch_steps": 1}


def train_while(values: dict[str, Any], what: str | None) -> tuple[str | None, list[str]]:
    """Train; at row 40, of step 6, something happens to the first shard.  The error's line, and what was said."""
    from farspan.pretrain.metrics import MetricsWriter

    shard = Path(values["data"]["folder"]) / "train/00000.bin"
    make, message, said = rows.Rows.rows, MetricsWriter.message, []

    def harmed(self, indices):
        if what == "cut" and 40 in indices:
            os.truncate(shard, 100)
        return make(self, indices)

    def heard(self, text):
        said.append(text)
        message(self, text)

    def broken(*_: int) -> bytes:
        raise OSError(5, os.strerror(5))

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        return broken() if 40 in reading else read(descriptor, length, offset)

    reading: set[int] = set()
    read = os.pread

    def noted(self, indices):
        reading.clear()
        reading.update(indices.tolist())
        return harmed(self, indices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows.Rows, "rows", noted)
        patch.setattr(MetricsWriter, "message", heard)
        if what == "unreadable":
            patch.setattr(os, "pread", pread)
        return train_here(values), said


@pytest.fixture
def data(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "data"))


def test_a_byte_that_changed(ranks, data, tmp_path):
    path = data / "train/00000.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    error, _ = ranks.run(train_while, settings(data, tmp_path / "run", STEPS, COMMON), None, count=1)[0]
    assert error is not None and "\n" not in error
    assert f"shard {path} is damaged (block 0, bytes 0 to {len(content)}, is not what was written)" in error
    assert Run(tmp_path / "run").steps() == []


@pytest.mark.parametrize(("what", "words"), [("cut", "has become shorter"), ("unreadable", "Input/output error")])
def test_a_shard_that_fails_while_it_is_read(ranks, data, tmp_path, what, words):
    assert ranks.run(train_while, settings(data, tmp_path / "whole", STEPS, COMMON), None, count=1)[0][0] is None
    path, values = data / "train/00000.bin", settings(data, tmp_path / "run", STEPS, COMMON)
    content = path.read_bytes()
    error, _ = ranks.run(train_while, values, what, count=1)[0]
    assert error is not None and f"shard {path} " in error and words in error and "block" in error
    assert "put a whole copy in its place" in error and "\n" not in error
    expected = Run(tmp_path / "whole")
    assert Run(tmp_path / "run").steps() == expected.steps()[:5]
    path.write_bytes(content)
    assert ranks.run(train_while, values, None, count=1)[0][0] is None
    assert Run(tmp_path / "run").steps() == expected.steps()
    assert_identical(Run(tmp_path / "run").weights(), expected.weights())


@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_one_rank_finds_at_the_start_ends_all(ranks, data, tmp_path, split):
    """Each looks at a share of the shards; nobody waits for the one that ends."""
    path = data / split / "00000.bin"
    path.write_bytes(b"1234")
    overrides = COMMON | {"parallel.data": 2, "evaluation.interval": 4}
    found = ranks.run(train_while, settings(data, tmp_path / "run", STEPS, overrides), None, count=2)
    errors = {error for error, _ in found}
    assert len(errors) == 1 and f"shard {path} has 4 bytes" in str(errors)
    path.unlink()
    found = ranks.run(train_while, settings(data, tmp_path / "run", STEPS, overrides), None, count=2)
    assert all(error is not None and f"shard {path} is missing" in error for error, _ in found)


def test_data_without_checksums_are_said_to_be_so(ranks, data, tmp_path):
    manifest = json.loads((data / "dataset.json").read_text())
    _, said = ranks.run(train_while, settings(data, tmp_path / "checked", 3, COMMON), None, count=1)[0]
    assert not any("without checksums" in line for line in said)
    for split in manifest["splits"].values():
        del split["index_checksums"]
        for shard in split["shards"]:
            del shard["checksums"]
    (data / "dataset.json").write_text(json.dumps(manifest))
    error, said = ranks.run(train_while, settings(data, tmp_path / "run", 3, COMMON), None, count=1)[0]
    assert error is None
    assert f"{data} was prepared without checksums: damage to its tokens goes unseen" in said
