from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import edit
from models import save_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

import farspan
from farspan.parallel.mesh import Mesh
from farspan.pretrain import checkpoint as ckpt
from farspan.pretrain.conversion.from_huggingface import from_huggingface
from farspan.pretrain.conversion.model import model_of
from farspan.pretrain.load import LoadedModel

GOLDEN = Path(__file__).parent / "golden" / "megatron-bert-pretraining"
INPUTS = load_file(GOLDEN / "inputs.safetensors")
IDS, MASK, TYPES = INPUTS["input_ids"], INPUTS["attention_mask"], INPUTS["token_type_ids"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the model in its second checkpoint, and another one in its first."""
    folder = tmp_path_factory.mktemp("load")
    from_huggingface(GOLDEN, folder / "imported")
    reader = ckpt.Reader(folder / "imported")
    _, config, heads = model_of(reader.manifest)
    model = farspan.load(GOLDEN).network
    for step, factor in ((1, 2.0), (2, 1.0)):
        manifest = ckpt.Manifest(step, config.model_dump(), heads)
        save_weights(model, Mesh.solo(), folder / "run" / "checkpoints", manifest, factor=factor)
    return folder / "run"


def outputs(model: LoadedModel) -> list[Tensor]:
    with torch.no_grad():
        output = model(IDS, MASK, TYPES)
    assert output.logits is not None
    assert output.seq_relationship_logits is not None
    return [output.logits, output.seq_relationship_logits, output.last_hidden_state]


def test_every_kind_of_folder_gives_the_same(run: Path) -> None:
    expected = outputs(farspan.load(GOLDEN))
    checkpoints = run / "checkpoints"
    for path in (run, checkpoints, checkpoints / "step-00000002", run.parent / "imported", str(run)):
        assert all(torch.equal(a, b) for a, b in zip(outputs(farspan.load(path)), expected, strict=True)), path
    other = outputs(farspan.load(checkpoints / "step-00000001"))
    assert not torch.equal(other[0], expected[0])


def test_what_is_returned(run: Path) -> None:
    model = farspan.load(run)
    output = model(IDS, MASK, TYPES)
    b, s = IDS.shape
    assert output.logits.shape == (b, s, model.config.vocab_size)
    assert output.last_hidden_state.shape == (b, s, model.config.hidden_size)
    assert output.seq_relationship_logits.shape == (b, 2)
    assert output.loss is None
    assert not model.training
    assert all(p.dtype == torch.float32 and p.is_leaf for p in model.parameters())
    theirs = load_file(GOLDEN / "model.safetensors")
    assert set(model.huggingface_state()) <= set(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in model.huggingface_state().items())


def test_what_is_left_out_means_all_real_and_of_the_first_type(run: Path) -> None:
    model = farspan.load(run)
    with torch.no_grad():
        short = model(IDS)
        long = model(IDS, torch.ones_like(IDS), torch.zeros_like(IDS))
        assert torch.equal(short.logits, long.logits)
        assert not torch.allclose(short.logits, model(IDS, MASK).logits)
        assert not torch.allclose(short.logits, model(IDS, None, TYPES).logits)


def test_loss_is_the_sum_of_the_heads_that_got_labels(run: Path) -> None:
    model = farspan.load(run)
    labels, following = INPUTS["labels"], INPUTS["next_sentence_label"]
    both = model(IDS, MASK, TYPES, labels=labels, next_sentence_label=following).loss
    one = model(IDS, MASK, TYPES, labels=labels).loss
    other = model(IDS, MASK, TYPES, next_sentence_label=following).loss
    torch.testing.assert_close(both, one + other)
    torch.testing.assert_close(both, load_file(GOLDEN / "outputs.safetensors")["loss"])


def test_weights_of_lower_precision_are_computed_with_in_float32(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "low"))
    low = {name: value.to(torch.bfloat16) for name, value in load_file(GOLDEN / "model.safetensors").items()}
    save_file(low, folder / "model.safetensors")
    model = farspan.load(folder)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(value, low[name].float()) for name, value in model.huggingface_state().items())


def test_device(run: Path) -> None:
    model = farspan.load(run, device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_what_cannot_be_loaded(run: Path, tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(ValueError) as caught:
            farspan.load(path)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "none", "none is not a folder: give a checkpoint, a run or a Hugging Face model folder")
    refused(tmp_path, f"{tmp_path} has no checkpoint: give a run folder, its checkpoints folder or one step-… folder")
    folder = Path(shutil.copytree(run / "checkpoints" / "step-00000002", tmp_path / "c"))
    manifest = json.loads((folder / "manifest.json").read_text())
    for change, message in (
        ({"model": {**manifest["model"], "model_type": "mega2"}}, "model_type 'mega2' is unknown: choose one of "),
        ({"model": {**manifest["model"], "hidden_act": "x"}}, "manifest.json: hidden_act 'x' is unknown"),
        ({"model": {**manifest["model"], "intermediate_size": 7}}, "(48, 32), the model needs (7, 32)"),
        ({"model": {**manifest["model"], "num_hidden_layers": 9}}, "has no tensor layers."),
        ({"version": 7}, "this Farspan reads 'farspan-checkpoint' version 2"),
    ):
        edit(folder, lambda said, change=change: said.update({"model": manifest["model"]} | change))
        refused(folder, message)


def test_a_sequence_that_is_too_long(run: Path) -> None:
    model = farspan.load(run)
    longest = model.config.max_position_embeddings
    model(torch.ones(1, longest, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"{longest + 1} tokens a row: this model has positions for {longest}"):
        model(torch.ones(1, longest + 1, dtype=torch.int64))


def test_output_is_plain() -> None:
    names = [field.name for field in dataclasses.fields(farspan.load(GOLDEN)(IDS[:1]))]
    assert names == ["logits", "last_hidden_state", "seq_relationship_logits", "loss", "cache"]
