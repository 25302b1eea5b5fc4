"""``farspan convert`` as it is called: every direction, from real folders to real folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from farspan import load
from farspan.launch.cli import main
from farspan.pretrain.checkpoint import Reader

GOLDEN = Path(__file__).parents[1] / "golden"
ROBERTA = GOLDEN / "roberta-prelayernorm-mlm"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    assert main(["convert", "from-hf", str(ROBERTA), str(tmp_path / "checkpoint")]) == 0
    return tmp_path / "checkpoint"


def test_there_and_back(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "to-hf", str(checkpoint), str(tmp_path / "hf")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'hf'}\n"
    ours, theirs = load_file(tmp_path / "hf/model.safetensors"), load_file(ROBERTA / "model.safetensors")
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert main(["convert", "to-hf", str(checkpoint), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert {value.dtype for value in load_file(tmp_path / "half/model.safetensors").values()} == {torch.bfloat16}


def test_other_sizes_at_the_import_and_after_it(checkpoint: Path, tmp_path: Path) -> None:
    sizes = ["--vocab-size", "150", "--positions", "40", "--position-method", "tile", "--seed", "5"]
    assert main(["convert", "from-hf", str(ROBERTA), str(tmp_path / "at"), *sizes]) == 0
    assert main(["convert", "resize", str(checkpoint), str(tmp_path / "after"), *sizes]) == 0
    at, after, before = (Reader(folder) for folder in (tmp_path / "at", tmp_path / "after", checkpoint))
    assert at.manifest.model["vocab_size"] == 150 > before.manifest.model["vocab_size"]
    for name in at.names():
        assert torch.equal(at.tensor(name), after.tensor(name)), name
    words = "embeddings.words.weight"
    assert torch.equal(at.tensor(words)[: before.shape(words)[0]], before.tensor(words))
    assert load(tmp_path / "at")(torch.ones(1, 40, dtype=torch.int64)).logits.shape == (1, 40, 150)


def test_a_tokenizer_that_was_imported_is_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(shutil.copytree(ROBERTA, tmp_path / "source"))
    (source / "vocab.txt").write_text("a\nb\n")
    assert main(["convert", "from-hf", str(source), str(tmp_path / "out")]) == 0
    assert main(["checkpoint", "verify", str(tmp_path / "out")]) == 0
    (tmp_path / "out/tokenizer/vocab.txt").write_text("a\nc\n")
    assert main(["checkpoint", "verify", str(tmp_path / "out")]) == 1
    assert "vocab.txt is damaged" in capsys.readouterr().out


def test_nothing_to_resize(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "resize", str(checkpoint), str(tmp_path / "out")]) == 2
    assert "give --vocab-size, --tokenizer or --positions" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_note_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = GOLDEN / "megatron-bert-mlm-relative-key"
    assert main(["convert", "from-hf", str(case), str(tmp_path / "checkpoint")]) == 0
    capsys.readouterr()
    assert main(["convert", "to-hf", str(tmp_path / "checkpoint"), str(tmp_path / "hf")]) == 0
    assert "farspan: note: " in capsys.readouterr().err


def test_from_megatron(tmp_path: Path) -> None:
    case = GOLDEN / "megatron-lm-23.04"
    assert main(["convert", "from-megatron", str(case), str(tmp_path / "checkpoint")]) == 0
    manifest = json.loads((tmp_path / "checkpoint/manifest.json").read_text())
    assert manifest["model"]["model_type"] == "megatron-bert"


@pytest.mark.parametrize("command", ["from-megatron", "from-tensorflow", "from-hf", "to-hf"])
def test_what_is_none_is_said_in_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", command, str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("farspan: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
