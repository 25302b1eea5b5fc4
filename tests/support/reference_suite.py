"""What every architecture of the product passes: ``ArchitectureSuite``, and the cases of tests/golden whose config.json
has its model_type."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_suite import ArchitectureSuite
from comparison import assert_all_close, assert_close, assert_differs, assert_identical, difference
from models import save_weights
from safetensors.torch import load_file
from torch import Tensor

from farspan import load
from farspan.parallel.mesh import Mesh
from farspan.pretrain import checkpoint as ckpt
from farspan.pretrain.conversion.from_huggingface import from_huggingface
from farspan.pretrain.conversion.model import model_of
from farspan.pretrain.conversion.to_huggingface import to_huggingface
from farspan.pretrain.models.base import Stage

GOLDEN = Path(__file__).parents[1] / "golden"


# A key bias has no gradient but for rounding (see golden/README.md): a neighbour gives the scale.
NEIGHBOURS = {".key.bias": ".query.bias", "k_proj.bias": "k_proj.weight"}


def golden_folders(model_type: str) -> list[Path]:
    found = [path.parent for path in GOLDEN.glob("*/config.json")]
    return sorted(path for path in found if json.loads((path / "config.json").read_text())["model_type"] == model_type)


def _numbers_together(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Single numbers in one tensor: each is a sum that may nearly cancel, so they give one another's scale."""
    numbers = [name for name, gradient in gradients.items() if gradient.numel() == 1]
    others = {name: gradient for name, gradient in gradients.items() if name not in numbers}
    if numbers:
        others[" ".join(sorted(numbers))] = torch.cat([gradients[name].flatten() for name in sorted(numbers)])
    return others


def rewrite_in_shards(mesh: Mesh, source: Path, root: Path) -> None:
    """Read a checkpoint of weights into a model on this mesh, and save it as a training run of that layout would."""
    reader = ckpt.Reader(source)
    cls, config, heads = model_of(reader.manifest)
    stage = Stage.of(config, mesh.pipeline.rank, mesh.pipeline.size)
    model = cls(config, mesh, stage=stage, heads=heads)
    ckpt.load_weights(model, reader, mesh.tensor)
    save_weights(model, mesh, root, dataclasses.replace(reader.manifest, step=1, tensors={}))


class ReferenceSuite(ArchitectureSuite):
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        super().pytest_generate_tests(metafunc)
        if "golden" in metafunc.fixturenames:
            folders = golden_folders(self.model_type)
            metafunc.parametrize("golden", folders, ids=[folder.name for folder in folders])

    def test_there_are_reference_cases(self) -> None:
        assert len(golden_folders(self.model_type)) >= 2

    def test_golden_outputs_and_gradients(self, golden: Path) -> None:
        inputs, expected = load_file(golden / "inputs.safetensors"), load_file(golden / "outputs.safetensors")
        model = load(golden)
        if (encoder := inputs.get("encoder_hidden_states")) is not None:
            encoder.requires_grad_()
        output = model(**inputs)
        output.loss.backward()
        if encoder is not None:
            assert_close(encoder.grad, expected["grad_input.encoder_hidden_states"], "gradient of the encoder's states")
        real = inputs["attention_mask"] == 1
        assert_close(output.logits[real], expected["logits"][real], "logits")
        assert_close(output.loss, expected["loss"], "loss")
        if "seq_relationship_logits" in expected:
            assert_close(output.seq_relationship_logits, expected["seq_relationship_logits"], "sentence logits")
        aliases = model.network.huggingface_aliases(model.config, model.network.heads)
        gradients = {name.removeprefix("grad."): g for name, g in expected.items() if name.startswith("grad.")}
        gradients = {aliases.get(name, name): g for name, g in gradients.items()}
        scale = lambda name: next((name.replace(a, b) for a, b in NEIGHBOURS.items() if a in name), name)  # noqa: E731
        assert_all_close(*map(_numbers_together, (model.huggingface_gradients(), gradients)), "gradient of", scale)
        for name, gradient in gradients.items():
            if not name.endswith((".key.bias", "k_proj.bias")) and gradient.numel() > 1:
                assert_differs(model.huggingface_gradients()[name].flatten().roll(1), gradient.flatten(), name)

    def test_golden_needs_every_parameter(self, golden: Path) -> None:
        """The comparison above sees a change of any parameter that the model reads: in the logits, or where attention
        hardly depends on it, in its own gradient."""
        inputs, expected = load_file(golden / "inputs.safetensors"), load_file(golden / "outputs.safetensors")
        real = inputs["attention_mask"] == 1
        model = load(golden)
        model(**inputs).loss.backward()
        for name, parameter in model.network.named_parameters():
            if not parameter.requires_grad:
                continue
            kept = parameter.detach().clone()
            with torch.no_grad():
                parameter.mul_(1.1)
                output = model(**inputs)
                parameter.copy_(kept)
            found = difference(output.logits[real], expected["logits"][real])
            if output.seq_relationship_logits is not None:
                theirs = expected["seq_relationship_logits"]
                found = max(found, difference(output.seq_relationship_logits, theirs))
            assert found > 1e-4 or parameter.grad.abs().max() > 0, f"{name} does not matter ({found:.1e})"

    # Conversion there and back.

    def test_conversion_there_and_back(self, golden: Path, tmp_path: Path) -> None:
        from_huggingface(golden, tmp_path / "checkpoint")
        self._assert_exports(tmp_path / "checkpoint", golden, tmp_path / "hf")

    def test_conversion_through_shards(self, ranks: Any, golden: Path, tmp_path: Path) -> None:
        from_huggingface(golden, tmp_path / "checkpoint")
        config = json.loads((golden / "config.json").read_text())
        layouts = [] if config.get("num_attention_heads", 2) % 2 else [{"tensor": 2}]
        if config["num_hidden_layers"] > 1:
            layouts.append({"pipeline": 2})
        for layout in layouts:
            root = tmp_path / next(iter(layout))
            ranks.on_mesh(rewrite_in_shards, tmp_path / "checkpoint", root, **layout)
            files = sorted(path.name for path in ckpt.find(root).glob("weights-*"))
            assert len(files) == 2, files
            for name, entry in ckpt.Reader(ckpt.find(root)).manifest.tensors.items():
                kept = sum(shard.part.values for shard in entry.shards["weight"])
                assert kept == math.prod(entry.shape), f"{name}: padding was saved"
            self._assert_exports(root, golden, root / "hf")

    def huggingface_config(self, folder: Path) -> dict[str, Any]:
        """A folder's config as transformers reads it."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(folder).to_dict()

    def _assert_exports(self, checkpoint: Path, source: Path, out: Path) -> None:
        to_huggingface(checkpoint, out)
        assert_identical(load_file(out / "model.safetensors"), load_file(source / "model.safetensors"))
        ours, theirs = (self.huggingface_config(folder) for folder in (out, source))
        assert {k: v for k, v in ours.items() if k != "_name_or_path"} == {
            k: v for k, v in theirs.items() if k != "_name_or_path"
        }
