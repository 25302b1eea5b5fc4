"""What every architecture passes.  Its test module subclasses ``ArchitectureSuite`` and names what it has:

    class TestMegatronBert(ArchitectureSuite):
        model_type = "megatron-bert"
        variants = COMMON | RELATIVE_POSITIONS

One that the product has takes ``ReferenceSuite`` instead (``reference_suite``), which adds cases of tests/golden.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from comparison import FLOPS, assert_all_close, assert_close, assert_differs, assert_identical, merge
from models import LENGTH, Description, Result, counts_of, dropout_key, loss_of, save_weights, training_pass
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from farspan import load
from farspan.kernels import forms
from farspan.kernels.documents import AttentionKind
from farspan.kernels.dropout import DropoutKey
from farspan.parallel.mesh import Mesh
from farspan.parallel.sharding import initialize, logical_of
from farspan.pretrain import checkpoint as ckpt
from farspan.pretrain.batch import Batch, microbatches
from farspan.pretrain.conversion.to_huggingface import to_huggingface
from farspan.pretrain.losses import LossFunction
from farspan.pretrain.models.base import LanguageModel, Stage
from farspan.pretrain.models.config import ModelConfig

# Variants of the tiny model: fields of its configuration.
COMMON: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "gelu-new": {"hidden_act": "gelu_new", "type_vocab_size": 1},
    "causal": {"is_decoder": True, "vocab_size": 97},
    "causal-untied": {"is_decoder": True, "tie_word_embeddings": False, "hidden_act": "relu"},
    "even-vocabulary": {"vocab_size": 256, "hidden_act": "silu"},
}
RELATIVE_POSITIONS: dict[str, dict[str, Any]] = {
    "relative-key": {"position_embedding_type": "relative_key"},
    "relative-key-query": {"position_embedding_type": "relative_key_query", "max_position_embeddings": 16},
    "causal-relative-key": {"position_embedding_type": "relative_key", "is_decoder": True},
    "causal-relative-key-query": {"position_embedding_type": "relative_key_query", "is_decoder": True},
}
ATTENTION = ("full", "padding", "document")


# What runs on the ranks.


def tensor_passes(
    mesh: Mesh, described: Description, cases: list[tuple[str, bool]], *, sequence_parallel: bool = False
) -> tuple[Any, list[Result]]:
    """Initial values by name, and a training pass for each (attention, whether with dropout)."""
    torch.set_num_threads(1)
    mesh = dataclasses.replace(mesh, sequence_parallel=sequence_parallel)
    model = described.build(mesh)
    initialize(model, seed=8, axis=mesh.tensor)
    initial = {name: (logical_of(p), p.detach().clone()) for name, p in model.named_parameters()}
    model = described.filled(mesh)
    return initial, [run_case(model, described.batch(attention), dropping) for attention, dropping in cases]


def run_case(model: LanguageModel, batch: Batch, dropping: bool) -> Result:
    return training_pass(model, batch, dropout_key(batch) if dropping else None)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: more cost more than they bring
    yield
    torch.set_num_threads(threads)


class ArchitectureSuite:
    model_type: ClassVar[str]
    variants: ClassVar[dict[str, dict[str, Any]]]
    compared_rows: ClassVar[AttentionKind] = "padding"  # rows that transformers computes as Farspan does
    dtype: ClassVar[torch.dtype] = torch.float32  # float64 where gradients are sums that cancel
    length: ClassVar[int] = LENGTH  # of the rows

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "variant" in metafunc.fixturenames:
            metafunc.parametrize("variant", self.variants)

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> Iterator[None]:
        with one_thread():
            yield

    def described(self, variant: str, **fields: Any) -> Description:
        return Description(self.model_type, self.variants[variant] | fields, self.dtype, self.length)

    # Against the public model classes.

    def test_export_loads_in_transformers(self, variant: str, tmp_path: Path) -> None:
        described, mesh = dataclasses.replace(self.described(variant), dtype=torch.float32), Mesh.solo()
        ours = described.filled(mesh).eval()
        saved = save_weights(ours, mesh, tmp_path, ckpt.Manifest(1, described.config.model_dump(), described.heads))
        to_huggingface(saved, tmp_path / "hf")
        batch = described.batch(self.compared_rows)
        mask = (batch.document_ids > 0).long()
        inputs = {"input_ids": batch.input_ids, "attention_mask": mask, "token_type_ids": batch.token_type_ids}
        name = ours.huggingface_class(described.heads, described.config)
        assert json.loads((tmp_path / "hf/config.json").read_text())["architectures"] == [name]
        with torch.no_grad():
            outputs = [
                ours(batch, output="logits"),
                *(dataclasses.asdict(load(p)(**inputs)) for p in (saved, tmp_path / "hf")),
            ]
            if self.in_transformers(described.config):
                outputs.append(self._theirs(tmp_path / "hf", name, inputs))
        for output in outputs[1:]:
            assert_close(output["logits"][mask == 1], outputs[0]["logits"][mask == 1], "logits")
            if "nsp" in described.heads:
                wanted = outputs[0]["seq_relationship_logits"]
                assert_close(output["seq_relationship_logits"], wanted, "sentence logits")

    def in_transformers(self, config: ModelConfig) -> bool:
        """Whether the installed transformers computes this configuration: 5 has no relative positions in these."""
        return getattr(config, "position_embedding_type", "absolute") == "absolute"

    def _theirs(self, folder: Path, name: str, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        import transformers

        model, told = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
        assert not any(told.values()), told
        output = dict(model.eval()(**inputs))
        return {"logits": output.pop("prediction_logits", None), **output}

    # One model, however it is spread.

    @pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])
    def test_sharded_equals_whole(self, ranks: Any, variant: str, sequence_parallel: bool) -> None:
        described = self.described(variant)
        cases = [(attention, dropping) for attention in ATTENTION for dropping in (False, True)]
        whole_initial, whole = tensor_passes(Mesh.solo(), described, cases)
        (first_initial, first), (second_initial, second) = ranks.on_mesh(
            tensor_passes, described, cases, tensor=2, sequence_parallel=sequence_parallel
        )
        assert_identical(
            {name: merge([first_initial[name], second_initial[name]]) for name in first_initial},
            {name: merge([value]) for name, value in whole_initial.items()},
        )
        for (attention, dropping), expected, *parts in zip(cases, whole, first, second, strict=True):
            what = f"{attention} attention {'with' if dropping else 'without'} dropout:"
            for part in parts:
                assert_all_close(part.outputs, expected.outputs, what)
            self._assert_same_gradients(parts, expected, what)
            shifted = {name: (logical, value.roll(1)) for name, (logical, value) in parts[1].gradients.items()}
            with pytest.raises(AssertionError):
                self._assert_same_gradients([parts[0], dataclasses.replace(parts[1], gradients=shifted)], expected, "")
        for without, dropped in zip(whole[::2], whole[1::2], strict=True):
            assert_differs(dropped.outputs["lm_losses"], without.outputs["lm_losses"], "dropout must matter")

    def _assert_same_gradients(self, parts: list[Result], whole: Result, what: str) -> None:
        assert_all_close(
            {name: merge([part.gradients[name] for part in parts]) for name in parts[0].gradients},
            {name: merge([value]) for name, value in whole.gradients.items()},
            f"{what} gradient of",
        )

    def test_dropout_masks_are_keyed_by_step_and_sample(self, variant: str) -> None:
        described = self.described(variant)
        model = described.filled(Mesh.solo())
        batch = described.batch("full")
        losses = model(batch, dropout=dropout_key(batch))["lm_losses"]
        assert_differs(model(batch, dropout=dropout_key(batch, step=12))["lm_losses"], losses, "another step")
        moved = dataclasses.replace(batch, sample_ids=batch.sample_ids + 1)
        assert_differs(model(moved, dropout=dropout_key(moved))["lm_losses"], losses, "another sample")
        if described.config.mixes_rows:  # each microbatch has its own
            return
        halves = [model(half, dropout=dropout_key(half))["lm_losses"] for half in batch.split(2)]
        assert_close(torch.cat(halves), losses, "microbatches of another size")

    def test_no_two_dropout_masks_share_a_key(self, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Over all layers, places in a layer, heads, positions and samples of a step."""
        described = self.described(variant)
        model = described.filled(Mesh.solo())
        batch = described.batch("full")
        rows, used = DropoutKey.rows, []

        def recorded(self: DropoutKey, stream: int, positions: torch.Tensor) -> torch.Tensor:
            keys = rows(self, stream, positions)
            # Whole features are dropped by one key for all positions of a document.
            used.append(keys[:1] if len(positions.unique()) == 1 else keys)
            return keys

        monkeypatch.setattr(DropoutKey, "rows", recorded)
        model(batch, dropout=dropout_key(batch))
        keys = torch.cat([keys.flatten() for keys in used])
        assert len(used) > described.config.num_hidden_layers and len(keys.unique()) == len(keys)

    @pytest.mark.parametrize("dropping", [False, True])
    def test_unpadded_equals_padded(self, variant: str, dropping: bool) -> None:
        """All rows in one without padding: the same losses, gradients and dropout masks."""
        described = self.described(variant)
        batch = described.batch("padding")
        (joined,), shape = microbatches(batch, 1, multiple=8, equal=False)
        real = int((batch.document_ids > 0).sum())
        assert shape == (1, joined.input_ids.shape[1]) and 0 <= shape[1] - real < 8
        results = []
        for given in (batch, joined):
            key = DropoutKey(9, 11, given.token_samples.t()) if dropping else None
            model = described.filled(Mesh.solo())
            outputs = model(given, dropout=key, count_correct=True)
            loss, statistics = LossFunction(model.heads)(outputs, given, counts_of(batch))
            loss.backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            results.append((statistics, gradients))
        assert_close(results[1][0], results[0][0], "statistics")
        assert_all_close(results[1][1], results[0][1], "gradient of")

    def test_recomputation_changes_nothing(self, variant: str) -> None:
        """Whole layers or the core of attention computed again: the same gradients, from less that is kept."""
        described = self.described(variant)
        batch = described.batch("document")
        kept, gradients = {}, {}
        for kind in ("none", "selective", "full"):
            model, saved = described.filled(Mesh.solo()), []

            def pack(tensor: torch.Tensor, saved: list[torch.Tensor] = saved) -> torch.Tensor:
                saved.append(tensor)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                outputs = model(batch, dropout=dropout_key(batch), recompute=kind)
            loss_of(model, outputs, batch).backward()
            storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
            kept[kind] = sum(storages.values())
            gradients[kind] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert kept["full"] < kept["selective"] < kept["none"]
        for kind in ("selective", "full"):
            assert_identical(gradients[kind], gradients["none"])

    def test_stages_equal_whole(self, variant: str) -> None:
        described = self.described(variant)
        config, mesh = described.config, Mesh.solo()
        batch = described.batch("document")
        key = dropout_key(batch)
        whole = training_pass(described.filled(mesh), batch, key)
        stages = [described.filled(mesh, Stage.of(config, rank, 2)) for rank in range(2)]
        assert [[len(chunk) for chunk in model.stage.chunks] for model in stages] == [[1], [2]]
        hidden = stages[0](batch, dropout=key)
        outputs = stages[1](batch, hidden, dropout=key, count_correct=True)
        loss = loss_of(stages[1], outputs, batch)
        loss.backward()
        for name, value in ({"loss": loss} | outputs).items():
            assert_close(value.detach(), whole.outputs[name], name)
        gradients: dict[str, torch.Tensor] = {}
        for stage in stages:
            for name, parameter in stage.named_parameters():
                logical = logical_of(parameter)
                if parameter.grad is not None:
                    name = logical.tied_to or name
                    gradients[name] = gradients.get(name, 0) + logical.merge([parameter.grad])
        assert_all_close(gradients, {name: merge([value]) for name, value in whole.gradients.items()}, "gradient of")
        tied = [stage.tied_word_parameter() for stage in stages]
        assert (tied[0] is None, tied[1] is None) == (not config.tie_word_embeddings,) * 2

    # What it costs.

    def recomputed(self, config: ModelConfig) -> float:
        """What of a row is always computed again in the backward pass, which the formula leaves out."""
        return 0.0

    def test_flops_of_a_training_step(self, variant: str) -> None:
        described = self.described(variant, vocab_size=512, hidden_size=64, intermediate_size=192)
        model = described.filled(Mesh.solo())
        batch = described.batch("full")
        predictions = batch.labels.shape[1]
        # What a compiled form computes is not counted.
        with forms.mode("reference"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loss_of(model, model(batch), batch).backward()
        counted = counter.get_total_flops() / batch.rows
        formula = model.flops_per_row(described.config, batch.input_ids.shape[1], predictions)
        formula += self.recomputed(described.config)
        assert abs(formula / counted - 1) < FLOPS, f"formula {formula:.4g}, counted {counted:.4g}"
