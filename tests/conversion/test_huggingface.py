from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_close, assert_identical
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from farspan import load
from farspan.pretrain import checkpoint as ckpt
from farspan.pretrain.conversion import to_huggingface as export
from farspan.pretrain.conversion.from_huggingface import from_huggingface
from farspan.pretrain.conversion.huggingface_folder import HuggingFaceFolder
from farspan.pretrain.conversion.imported import TOKENIZER_FILES
from farspan.pretrain.conversion.to_huggingface import to_huggingface

GOLDEN = Path(__file__).parents[1] / "golden"
WORDS = "roberta_prelayernorm.embeddings.word_embeddings.weight"
NORM = "roberta_prelayernorm.LayerNorm.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "roberta-prelayernorm-mlm", tmp_path / "source"))


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def there_and_back(source: Path, **options: Any) -> Path:
    from_huggingface(source, source.parent / "checkpoint")
    to_huggingface(source.parent / "checkpoint", source.parent / "out", **options)
    return source.parent / "out"


def refused(action: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        action()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# What is carried.


@pytest.mark.parametrize("name", ["roberta-prelayernorm-mlm", "megatron-bert-pretraining", "megatron-bert-clm"])
def test_everything_comes_back(name: str, tmp_path: Path) -> None:
    from_huggingface(GOLDEN / name, tmp_path / "checkpoint")
    to_huggingface(tmp_path / "checkpoint", tmp_path / "out")
    assert_identical(tensors(tmp_path / "out"), tensors(GOLDEN / name))
    config, original = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", GOLDEN / name))
    assert {key: config[key] for key in original} == original
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks for it


def test_fields_that_nothing_here_reads_are_carried(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    theirs = {"architectures": ["Mine"], "id2label": {"0": "a"}, "classifier_dropout": 0.3, "pad_token_id": 1}
    (source / "config.json").write_text(json.dumps({**config, **theirs, "dtype": "float32"}))
    config = json.loads((there_and_back(source) / "config.json").read_text())
    assert {key: config[key] for key in theirs} == theirs
    assert config["torch_dtype"] == "float32"
    assert "dtype" not in config


def test_tokenizer_files_are_carried(source: Path) -> None:
    for name in TOKENIZER_FILES:
        (source / name).write_text(f"this is {name}")
    (source / "training_args.bin").write_text("not a tokenizer's")
    out = there_and_back(source)
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ("config.json", "model.safetensors", "README.md", *TOKENIZER_FILES)
    )
    for name in TOKENIZER_FILES:
        assert (out / name).read_text() == f"this is {name}"


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_dtype(name: str, source: Path) -> None:
    out = there_and_back(source, dtype=name)
    dtype = getattr(torch, name)
    assert_identical(tensors(out), {key: value.to(dtype) for key, value in tensors(source).items()})
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_stays_unless_asked(dtype: torch.dtype, source: Path) -> None:
    save_file({key: value.to(dtype) for key, value in tensors(source).items()}, source / "model.safetensors")
    out = there_and_back(source)
    assert_identical(tensors(out), tensors(source))
    assert f"torch.{json.loads((out / 'config.json').read_text())['torch_dtype']}" == str(dtype)


def test_an_unknown_dtype(source: Path) -> None:
    refused(
        lambda: there_and_back(source, dtype="int8"),
        "dtype 'int8' is unknown: choose one of float32, bfloat16, float16",
    )
    assert not (source.parent / "out").exists()


# Forms in which weights come.


def shard(folder: Path) -> None:
    """Cut model.safetensors into three files and an index, as save_pretrained does with large models."""
    values = tensors(folder)
    weight_map = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(sorted(values))}
    for file in set(weight_map.values()):
        save_file({n: values[n] for n, f in weight_map.items() if f == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_sharded_safetensors(source: Path) -> None:
    expected = tensors(source)
    shard(source)
    assert_identical(tensors(there_and_back(source)), expected)


def test_a_shard_that_is_missing(source: Path) -> None:
    shard(source)
    (source / "model-00002-of-00003.safetensors").unlink()
    refused(lambda: HuggingFaceFolder(source), f"{source} has no weights: model-00001-of-00003.safetensors, ")


@pytest.mark.parametrize(
    "value",
    [[], {}, {"weight_map": {}}, {"weight_map": {"a": "../model.safetensors"}}, {"weight_map": {"a": "/etc/x"}}],
)
def test_an_index_that_is_damaged(value: Any, source: Path) -> None:
    (source / "model.safetensors.index.json").write_text(json.dumps(value))
    refused(lambda: HuggingFaceFolder(source), "its weight_map should name files of")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pytorch_state_dict(zipped: bool, source: Path) -> None:
    """Files older than torch 1.6 are no zip archives; Megatron-BERT's released ones are of that age."""
    expected = tensors(source)
    torch.save(expected, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (source / "model.safetensors").unlink()
    assert_identical(tensors(there_and_back(source)), expected)


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["FARSPAN_TEST_FOLDER"],)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_state_dict_is_executed(zipped: bool, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = source.parent / "made"
    monkeypatch.setenv("FARSPAN_TEST_FOLDER", str(made))
    torch.save({WORDS: Malicious()}, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (source / "model.safetensors").unlink()
    refused(lambda: HuggingFaceFolder(source), "pytorch_model.bin cannot be read as tensors alone (")
    assert not made.exists()
    pickle.loads(pickle.dumps(Malicious()))  # an ordinary reader would have
    assert made.exists()


def test_a_state_dict_that_is_cut(source: Path) -> None:
    torch.save(tensors(source), source / "pytorch_model.bin")
    content = (source / "pytorch_model.bin").read_bytes()
    (source / "model.safetensors").unlink()
    for length in (0, 100, len(content) // 2):
        (source / "pytorch_model.bin").write_bytes(content[:length])
        refused(lambda: HuggingFaceFolder(source), "pytorch_model.bin cannot be read as tensors alone (")


# What is refused.


def test_a_file_that_is_cut(source: Path) -> None:
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[:-1])
    refused(lambda: HuggingFaceFolder(source), "model.safetensors is damaged (")


def test_no_weights(source: Path) -> None:
    (source / "model.safetensors").unlink()
    message = f"{source} has no weights: model.safetensors or pytorch_model.bin is needed"
    refused(lambda: HuggingFaceFolder(source), message)


def test_an_unknown_tensor(source: Path) -> None:
    extra = {"roberta_prelayernorm.adapter.weight": torch.zeros(2), "a": torch.zeros(1)}
    save_file({**tensors(source), **extra}, source / "model.safetensors")
    message = f"{source} has 2 tensors that this config.json does not account for, such as a: importing would drop them"
    refused(lambda: from_huggingface(source, source.parent / "out"), message)
    assert not (source.parent / "out").exists()


def test_buffers_of_older_files_are_left_out(source: Path) -> None:
    expected = tensors(source)
    old = {
        "roberta_prelayernorm.embeddings.position_ids": torch.arange(8).unsqueeze(0),
        "roberta_prelayernorm.embeddings.token_type_ids": torch.zeros(1, 8, dtype=torch.int64),
        "roberta_prelayernorm.pooler.dense.weight": torch.zeros(2, 2),
        "roberta_prelayernorm.pooler.dense.bias": torch.zeros(2),
    }
    save_file({**expected, **old}, source / "model.safetensors")
    assert_identical(tensors(there_and_back(source)), expected)


def test_a_missing_tensor(source: Path) -> None:
    kept = tensors(source)
    del kept[NORM]
    save_file(kept, source / "model.safetensors")
    message = f"{source} lacks tensors of a roberta-prelayernorm model of this config.json, such as {NORM}"
    refused(lambda: from_huggingface(source, source.parent / "out"), message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "bert"},
            "model_type 'bert' is unknown: choose one of mega, megatron-bert, mra, nystromformer, roberta-prelayernorm",
        ),
        ({"model_type": None}, "model_type 'None' is unknown: choose one of mega, megatron-bert, mra, "),
        (
            {"add_cross_attention": True},
            "config.json sets add_cross_attention, which no pretraining objective here uses",
        ),
        ({"pruned_heads": {"0": [1]}}, "config.json sets pruned_heads, which no pretraining objective here uses"),
        ({"hidden_act": "snake"}, "config.json: hidden_act 'snake' is unknown: choose one of gelu, "),
        ({"hidden_size": 1}, "config.json: hidden_size 1 does not divide by num_attention_heads"),
        ({"pad_token_id": None}, "config.json: pad_token_id = None: must be a valid integer"),
    ],
)
def test_a_config_that_is_not_understood(fields: dict[str, Any], message: str, source: Path) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    refused(lambda: from_huggingface(source, source.parent / "out"), message)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    refused(
        lambda: from_huggingface(tmp_path, tmp_path / "out"),
        f"{tmp_path / 'config.json'} is missing: {tmp_path} is not a Hugging Face model folder",
    )
    for broken in ("[]", "{"):
        (tmp_path / "config.json").write_text(broken)
        refused(lambda: from_huggingface(tmp_path, tmp_path / "out"), f"{tmp_path / 'config.json'} is ")


def test_nothing_is_overwritten(source: Path, tmp_path: Path) -> None:
    from_huggingface(source, tmp_path / "checkpoint")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "full"):
        message = f"{target} exists and is not empty: give a new folder, nothing is overwritten"
        refused(lambda target=target: to_huggingface(tmp_path / "checkpoint", target), message)  # type: ignore[misc]
        refused(lambda target=target: from_huggingface(source, target), message)  # type: ignore[misc]
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "mine").read_text() == "mine"
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine"]
    assert not list(tmp_path.glob(".*"))


def test_an_empty_folder_is_filled(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    from_huggingface(source, tmp_path / "empty")
    assert ckpt.Reader(tmp_path / "empty").manifest.step == 0
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    to_huggingface(tmp_path / "empty", ".")
    assert_identical(tensors(tmp_path / "here"), tensors(source))
    to_huggingface(tmp_path / "empty", tmp_path / "new" / "deep")
    assert_identical(tensors(tmp_path / "new" / "deep"), tensors(source))


def test_a_failure_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_huggingface(source, tmp_path / "checkpoint")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    for name, action in (
        ("copy_tokenizer", lambda: to_huggingface(tmp_path / "checkpoint", tmp_path / "out")),
        ("ckpt.write_stream", lambda: to_huggingface(tmp_path / "checkpoint", tmp_path / "out")),
        ("write_text", lambda: to_huggingface(tmp_path / "checkpoint", tmp_path / "out")),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(f"{export.__name__}.{name}", full)
            with pytest.raises(OSError, match="No space left"):
                action()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "source"]
    to_huggingface(tmp_path / "checkpoint", tmp_path / "out")


def test_a_model_trained_here_gets_the_class_that_fits(tmp_path: Path, source: Path) -> None:
    """Without a folder that it came from, the export's config.json is made from the configuration alone."""
    from_huggingface(source, tmp_path / "checkpoint")
    manifest = ckpt.Manifest.read(tmp_path / "checkpoint")
    dataclasses.replace(manifest, huggingface={}).write(tmp_path / "checkpoint")
    to_huggingface(tmp_path / "checkpoint", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["RobertaPreLayerNormForMaskedLM"]
    assert config["model_type"] == "roberta-prelayernorm"
    said = {key: value for key, value in manifest.model.items() if value is not None}
    assert {key: config[key] for key in said} == said


def test_an_export_that_transformers_5_reads_wrongly_says_so(tmp_path: Path) -> None:
    notes = {"megatron-bert-mlm-relative-key": "load it in transformers 4", "megatron-bert-clm": None}
    for case, note in notes.items():
        from_huggingface(GOLDEN / case, tmp_path / f"{case}-checkpoint")
        said = to_huggingface(tmp_path / f"{case}-checkpoint", tmp_path / case)
        assert said is None if note is None else note in str(said)


@pytest.mark.parametrize("case", ["megatron-bert-mlm-untied", "roberta-prelayernorm-mlm-untied", "mra-mlm-untied"])
def test_an_untied_bias_of_transformers_5_has_two_names(case: str, tmp_path: Path) -> None:
    """It computes with the second, and saves what it never touched under the first."""
    import transformers

    source, folder = GOLDEN / case, tmp_path / "two"
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    head = "lm_head" if case.startswith("roberta") else "cls.predictions"
    tensors[f"{head}.decoder.bias"] = tensors[f"{head}.bias"] + torch.arange(len(tensors[f"{head}.bias"]))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    inputs = load_file(source / "inputs.safetensors")
    with torch.no_grad():
        before, after = (load(path)(**inputs).logits for path in (source, folder))
    assert_close(after, before + torch.arange(before.shape[-1]), "logits")
    if not case.startswith("mra"):
        with torch.no_grad():
            theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder)(**inputs).logits
        real = inputs["attention_mask"] == 1
        assert_close(after[real], theirs[real], "logits in transformers")
