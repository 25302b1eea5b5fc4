"""The model card of an export says what the checkpoint knows, and how to load the folder."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from farspan.pretrain import checkpoint as ckpt
from farspan.pretrain.config import Config
from farspan.pretrain.conversion.from_huggingface import from_huggingface
from farspan.pretrain.conversion.imported import Imported, logical_shapes, write_imported
from farspan.pretrain.conversion.to_huggingface import to_huggingface
from farspan.pretrain.data.prepare import prepare
from farspan.pretrain.models import architecture
from farspan.pretrain.resume import data_fingerprint

GOLDEN = Path(__file__).parents[1] / "golden"
MODEL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    (folder / "speeches.txt").write_text("\n\n".join(Path(__file__).read_text().split("\n") * 3))
    prepare([folder / "speeches.txt"], folder / "data", vocab_size=300, validation_fraction=0.2, processes=1)
    return folder / "data"


def a_run(out: Path, folder: Path, step: int = 30, objective: str = "mlm", **sections: Any) -> Path:
    """A checkpoint as a run of this configuration saves it."""
    causal = objective == "clm"
    fields = MODEL | {"model_type": "megatron-bert", "vocab_size": 300, "pad_token_id": 3, "is_decoder": causal}
    sections = {name: dict(values) for name, values in sections.items()}
    sections.setdefault("training", {}).setdefault("steps", 50)
    sections.setdefault("data", {}).update(folder=str(folder), sequence_length=32)
    config = Config.model_validate(
        {"run_dir": "runs/mine", "model": fields, "objective": {"name": objective}, **sections}
    )
    cls = architecture("megatron-bert")
    shapes = logical_shapes(cls, config.model, config.heads)
    torch.manual_seed(0)
    dtypes = dict.fromkeys(shapes, torch.float32)
    read = lambda name: torch.randn(shapes[name])  # noqa: E731
    write_imported(Imported(cls, config.model, config.heads, read, dtypes, folder / "tokenizer"), out)
    manifest = ckpt.Manifest.read(out)
    dataclasses.replace(
        manifest, step=step, config=config.model_dump(), metrics={"loss": 2.5, "validation_loss": math.pi},
        trainer={"data": data_fingerprint(config)}, written_by={"version": "9.8.7", "commit": "abcdef0"},
        layout={"tensor": 4, "pipeline": 2, "virtual_stages": 1, "data": 1, "zero_stage": 0},
    ).write(out)  # fmt: skip
    return out


def card_of(checkpoint: Path, out: Path, **options: Any) -> tuple[dict[str, Any], dict[str, str], str]:
    """Metadata, the rows of its tables, and all of it."""
    to_huggingface(checkpoint, out, **options)
    text = (out / "README.md").read_text(encoding="utf-8")
    _, metadata, body = text.split("---\n", 2)
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]*) \|$", body, re.MULTILINE))
    return yaml.safe_load(metadata), rows, body


def run_snippet(body: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the card's code prints."""
    (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    assert '"PATH"' in code
    exec(compile(code.replace("PATH", str(folder)), "snippet", "exec"), {})
    return capsys.readouterr().out


def test_of_a_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = a_run(tmp_path / "checkpoint", data, training={"global_batch_size": 24, "micro_batch_size": 8})
    metadata, rows, body = card_of(checkpoint, tmp_path / "hf", dtype="bfloat16")
    tags = ["farspan", "megatron-bert"]
    assert metadata == {"library_name": "transformers", "pipeline_tag": "fill-mask", "tags": tags}  # no license
    assert "Pretrained with Farspan 9.8.7 (commit abcdef0), up to step 30 of 50." in body
    parameters = sum(math.prod(entry.shape) for entry in ckpt.Manifest.read(checkpoint).tensors.values())
    wanted = {
        "class": "MegatronBertForMaskedLM", "parameters": f"{parameters:,}", "hidden_size": "16", "vocab_size": "300",
        "longest sequence": "512", "weights": "bfloat16", "objective": "masked language modelling", "data": "`data`",
        "source": "speeches.txt", "rows": "packed, 32 tokens", "updates": "30", "rows seen": "720",
        "tokens seen": "23,040", "layout": "tensor 4, pipeline 2", "loss of the step": "2.5000",
        "validation loss": "3.1416",
    }  # fmt: skip
    assert {name: rows[name] for name in wanted} == wanted
    settings = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", body, re.DOTALL)[0])
    assert settings["optimizer"]["lr"] == 1e-4 and settings["training"]["global_batch_size"] == 24
    assert str(data) not in body and "runs/mine" not in body  # paths are nobody's business
    assert "score" in run_snippet(body, tmp_path / "hf", capsys)


def test_rows_that_are_not_full_are_not_counted_as_tokens(data: Path, tmp_path: Path) -> None:
    ramp = {"start": 8, "increment": 8, "samples": 48}
    checkpoint = a_run(
        tmp_path / "checkpoint", data, data={"rows": "padded"},
        training={"global_batch_size": 24, "micro_batch_size": 8, "batch_ramp": ramp},
    )  # fmt: skip
    _, rows, _ = card_of(checkpoint, tmp_path / "hf")
    assert rows["rows"] == "padded, at most 32 tokens" and "tokens seen" not in rows
    assert rows["rows seen"] == f"{3 * 8 + 2 * 16 + 25 * 24:,}"


def test_data_that_has_changed_is_not_described(data: Path, tmp_path: Path) -> None:
    checkpoint = a_run(tmp_path / "checkpoint", data)
    manifest = ckpt.Manifest.read(checkpoint)
    dataclasses.replace(manifest, trainer={"data": "another"}).write(checkpoint)
    _, rows, _ = card_of(checkpoint, tmp_path / "hf")
    assert rows["data"] == "`data`" and "source" not in rows and "tokens to train on" not in rows


def test_a_decoder_generates(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata, rows, body = card_of(a_run(tmp_path / "checkpoint", data, objective="clm"), tmp_path / "hf")
    assert metadata["pipeline_tag"] == "text-generation" and rows["objective"] == "causal language modelling"
    assert "generated_text" in run_snippet(body, tmp_path / "hf", capsys)


@pytest.mark.parametrize(
    ("case", "auto", "trusted"),
    [
        ("megatron-bert-pretraining", "AutoModelForPreTraining", False),
        ("mega-clm", "AutoModelForCausalLM", True),
        ("nystromformer-mlm", "AutoModelForMaskedLM", True),
    ],
)
def test_what_was_taken_over_has_no_training(
    case: str, auto: str, trusted: bool, tmp_path: Path, remote_code: None, capsys: pytest.CaptureFixture[str]
) -> None:
    from_huggingface(GOLDEN / case, tmp_path / "checkpoint")
    _, rows, body = card_of(tmp_path / "checkpoint", tmp_path / "hf")
    assert re.search(
        r"Taken over from a Hugging Face folder by Farspan \S+ \(commit \S+\), and not trained since\.", body
    )
    assert not {"updates", "objective", "data", "loss of the step"} & set(rows)
    assert "## Training" not in body and "## Metrics" not in body and "```yaml" not in body
    assert f"{auto}.from_pretrained" in body and ("trust_remote_code=True)" in body) == trusted
    assert run_snippet(body, tmp_path / "hf", capsys) == ""


def test_what_is_known_of_the_stock_classes_is_said(tmp_path: Path) -> None:
    from_huggingface(GOLDEN / "megatron-bert-mlm-relative-key", tmp_path / "checkpoint")
    _, _, body = card_of(tmp_path / "checkpoint", tmp_path / "hf")
    assert re.search(r"^Note: .*load it in transformers 4", body, re.MULTILINE)


def test_a_configuration_of_another_farspan_does_not_hinder_an_export(data: Path, tmp_path: Path) -> None:
    checkpoint = a_run(tmp_path / "checkpoint", data)
    manifest = ckpt.Manifest.read(checkpoint)
    dataclasses.replace(manifest, config={**manifest.config, "new_section": {}}).write(checkpoint)
    _, rows, body = card_of(checkpoint, tmp_path / "hf")
    assert "up to step 30." in body and "objective" not in rows and rows["validation loss"] == "3.1416"
