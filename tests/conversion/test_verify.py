"""An export is verified by transformers in a process of its own, and is not kept where it computes something else."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from farspan.launch.cli import main
from farspan.pretrain.conversion import verify
from farspan.pretrain.conversion.from_huggingface import from_huggingface
from farspan.pretrain.conversion.to_huggingface import to_huggingface
from farspan.pretrain.conversion.verify import TOLERANCE, Verification, make_batches
from farspan.pretrain.data.prepare import prepare
from farspan.pretrain.models.megatron_bert import MegatronBert

GOLDEN = Path(__file__).parents[1] / "golden"
BERT = "megatron-bert-pretraining"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    from_huggingface(GOLDEN / BERT, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """transformers runs in this process, which has it imported; the commands that would have been run."""
    from farspan.pretrain.conversion import load_export

    commands: list[list[str]] = []

    def run(self: Verification, command: list[str], scratch: Path) -> dict[str, Any]:
        commands.append(command)
        load_export.main(*command[3:])
        return {"transformers": "here"}

    monkeypatch.setattr(Verification, "_run", run)
    return commands


def refused(action: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        action()
    assert message in str(caught.value), caught.value
    assert "\n" not in str(caught.value)


def test_an_export_is_verified_in_a_process_of_its_own(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "to-hf", str(checkpoint), str(tmp_path / "hf"), "--verify", "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("verified: logits and seq_relationship_logits in transformers ")
    assert "tokens of ids from all over the vocabulary)\nwrote " in said
    assert (tmp_path / "hf" / "model.safetensors").is_file()


def test_the_process_knows_nothing_of_farspan() -> None:
    source = Path(verify._CHILD).read_text()
    assert "farspan." not in source and "from ." not in source


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("layers.0.attention.qkv.bias", "layers.1.attention.qkv.bias"),
        ("layers.0.feed_forward_norm.weight", "layers.0.feed_forward_norm.bias"),
        ("lm_head.norm.bias", "lm_head.dense.bias"),
    ],
)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_key_table_with_two_tensors_swapped_is_seen(
    first: str, second: str, dtype: str | None, checkpoint: Path, tmp_path: Path, here: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    right = MegatronBert.huggingface_keys.__func__

    def wrong(cls: Any, config: Any, heads: Any) -> Any:
        keys = right(cls, config, heads)
        keys[first], keys[second] = keys[second], keys[first]
        return keys

    check = Verification(checkpoint, dtype)
    monkeypatch.setattr(MegatronBert, "huggingface_keys", classmethod(wrong))
    refused(
        lambda: to_huggingface(checkpoint, tmp_path / "hf", dtype, check=check),
        "the export is not what was trained: its logits in transformers here differ by ",
    )
    assert check.result is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]


@pytest.mark.parametrize("name", ["bert.embeddings.position_embeddings.weight", "cls.seq_relationship.bias"])
def test_a_changed_value_is_seen(name: str, checkpoint: Path, tmp_path: Path, here: Any) -> None:
    """One value of any tensor of the export, among them one of a position that only the longest row has."""
    check = Verification(checkpoint)
    to_huggingface(checkpoint, tmp_path / "hf", check=check)
    assert check.result is not None and check.result.difference < 1e-12 < TOLERANCE
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors[name].view(-1)[-1] += 0.01
    save_file(tensors, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    refused(lambda: check(tmp_path / "hf"), "the export is not what was trained: its ")


@pytest.mark.parametrize(
    "case", ["mega-clm-cross-laplace", "mra-mlm-sparse", "nystromformer-mlm-holes", "roberta-prelayernorm-clm"]
)
def test_every_architecture(case: str, tmp_path: Path, here: list[list[str]], remote_code: None) -> None:
    from_huggingface(GOLDEN / case, tmp_path / "checkpoint")
    check = Verification(tmp_path / "checkpoint", "float16")
    to_huggingface(tmp_path / "checkpoint", tmp_path / "hf", "float16", check=check)
    assert check.result is not None and check.result.difference < 1e-7
    assert here[0][-1] == ("untrusted" if case.startswith("roberta") else "trusted")


def test_rows() -> None:
    config = MegatronBert.config_class(max_position_embeddings=40, vocab_size=99)
    (one,), rows = (batch["input_ids"] for batch in make_batches(torch.arange(60), config, types=True))
    first, second = make_batches(torch.arange(60), config, types=True)
    assert one.tolist() == [*range(1, 41)]  # 0 is padding
    assert second["attention_mask"].sum(1).tolist() == [30, 13, 5]
    assert ((rows != 0) == second["attention_mask"].bool()).all()
    assert first["attention_mask"].all() and second["token_type_ids"].unique().tolist() == [0, 1]


# Texts.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    text = Path(__file__).read_text()
    (folder / "a.txt").write_text("\n\n".join(text.split("\n") * 20))
    prepare([folder / "a.txt"], folder / "data", vocab_size=300, validation_fraction=0.5, processes=1)
    return folder


def test_where_the_text_comes_from(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    from_small = ckpt_with(checkpoint, tmp_path / "run", data / "data", vocabulary=300)
    assert Verification(from_small).text == "validation data"
    shutil.copytree(data / "data", tmp_path / "gone")
    run = ckpt_with(checkpoint, tmp_path / "run2", tmp_path / "gone", vocabulary=300)
    shutil.rmtree(tmp_path / "gone")
    assert Verification(run).text == "text"
    found = Verification(run, text=data / "a.txt")
    assert found.text == str(data / "a.txt") and len(found.ids) > 1000
    refused(lambda: Verification(checkpoint, text=data / "a.txt"), "has no tokenizer.json to read --text with")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfa")
    refused(lambda: Verification(run, text=tmp_path / "bytes"), "bytes is no text in UTF-8: give another --text")
    small = ckpt_with(checkpoint, tmp_path / "run3", data / "data", vocabulary=20)
    refused(lambda: Verification(small), ", the model has 20: give another --text")


def ckpt_with(checkpoint: Path, out: Path, data: Path, vocabulary: int) -> Path:
    """The checkpoint as if it were of a run on this data (its model is not read)."""
    from farspan.pretrain import checkpoint as ckpt

    shutil.copytree(checkpoint, out)
    manifest = ckpt.Manifest.read(out)
    model = {**manifest.model, "vocab_size": vocabulary}
    dataclasses.replace(manifest, model=model, config={"data": {"folder": str(data)}}).write(out)
    shutil.copytree(data / "tokenizer", out / "tokenizer")
    return out


# What goes wrong.


def test_an_interpreter_without_transformers(checkpoint: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\necho 'Traceback' >&2\necho \"ModuleNotFoundError: No module named 'transformers'\" >&2\nexit 1\n"
    )
    python.chmod(0o755)
    check = Verification(checkpoint, python=python)
    refused(lambda: to_huggingface(checkpoint, tmp_path / "hf", check=check), f"{python} has no transformers to verify")
    check = Verification(checkpoint, python=tmp_path / "none")
    refused(
        lambda: to_huggingface(checkpoint, tmp_path / "hf", check=check), "none cannot be started (No such file or "
    )
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob(".*"))


def test_a_process_that_fails(checkpoint: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'KeyError: what' >&2\nexit 3\n")
    python.chmod(0o755)
    check = Verification(checkpoint, python=python)
    message = "transformers cannot load or run the export, which was not kept: KeyError: what"
    refused(lambda: to_huggingface(checkpoint, tmp_path / "hf", check=check), message)


def test_options_of_a_verification_need_one(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["convert", "to-hf", str(checkpoint), str(tmp_path / "hf"), "--text", "a"]) == 2
    assert "give --verify with them" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
