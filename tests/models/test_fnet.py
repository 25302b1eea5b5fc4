"""The example of docs/add-an-architecture.md: short, right, trains in every layout, and no part of the product."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from architecture_suite import ArchitectureSuite
from comparison import FLOPS, RELATIVE, assert_close, assert_differs, assert_identical, difference
from models import Description, loss_of, make_batch
from runs import Run, ranks_of, settings, train_here
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import farspan
from farspan.parallel.mesh import Mesh
from farspan.pretrain.config_file import parse_config
from farspan.pretrain.conversion.from_huggingface import from_huggingface
from farspan.pretrain.conversion.to_huggingface import to_huggingface
from farspan.pretrain.models import ARCHITECTURES

EXAMPLE = Path(__file__).parents[2] / "docs/examples/fnet.py"
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False, "pad_token_id": None},
    "gelu": {"hidden_act": "gelu", "type_vocab_size": 1},
    "even-vocabulary": {"vocab_size": 256},
}
MODEL = {
    "model_type": "fnet",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.1,
}
LAYOUTS = {
    "TP2": {"parallel.tensor": 2},
    "TP2 with sequence parallelism": {"parallel.tensor": 2, "parallel.sequence": True},
    "PP2": {"parallel.pipeline": 2},
    "DP2, ZeRO 1": {"parallel.data": 2, "parallel.zero_stage": 1},
    "full recomputation": {"training.recompute": "full"},
    "selective recomputation": {"training.recompute": "selective"},
}


def example() -> ModuleType:
    if "fnet_example" not in sys.modules:
        spec = importlib.util.spec_from_file_location("fnet_example", EXAMPLE)
        assert spec is not None and spec.loader is not None
        sys.modules["fnet_example"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["fnet_example"]


def register() -> None:
    """The line that the table of architectures would have: on a rank, for as long as it runs."""
    ARCHITECTURES["fnet"] = example().FNet


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch, ranks: Any) -> Iterator[None]:
    """The same here, for one test, and on the ranks that the test may use."""
    monkeypatch.setitem(ARCHITECTURES, "fnet", example().FNet)
    ranks.run(register, count=2)
    yield


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 150


class TestFNet(ArchitectureSuite):
    model_type = "fnet"
    variants = VARIANTS
    compared_rows = "full"


# Mixing.


def test_a_row_of_one_document_is_the_transform_of_the_row() -> None:
    x = torch.randn(7, 3, 10, dtype=torch.float32, generator=torch.Generator().manual_seed(1))
    expected = torch.fft.fft2(x.transpose(0, 1).double()).real.transpose(0, 1)
    assert_close(example().fourier_mixing(x, torch.ones(3, 7, dtype=torch.int64)), expected, "mixing")


def test_a_document_is_mixed_by_itself() -> None:
    x = torch.randn(12, 2, 10, generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[1] * 5 + [2] * 4 + [3] * 3, [1] * 1 + [2] * 8 + [0] * 3])
    mixed = example().fourier_mixing(x, documents)
    for row in range(2):
        for document in documents[row].unique():
            here = documents[row] == document
            expected = torch.fft.fft2(x[here, row].double()).real
            assert_close(mixed[here, row], expected, f"row {row}, document {document}")


def test_a_documents_logits_do_not_depend_on_its_neighbours() -> None:
    described = Description("fnet", {})
    model, batch = described.filled(Mesh.solo()), make_batch(described.config, "document")
    logits = model(batch, output="logits")["logits"]
    for row in range(batch.rows):
        for document in batch.document_ids[row].unique():
            here = batch.document_ids[row] == document
            of = lambda t, here=here, row=row: t[row : row + 1, here]  # noqa: E731
            alone = dataclasses.replace(
                batch, input_ids=of(batch.input_ids), document_ids=of(batch.document_ids),
                positions=of(batch.positions), token_type_ids=of(batch.token_type_ids), attention="full",
            )  # fmt: skip
            assert_close(of(logits), model(alone, output="logits")["logits"], f"row {row}, document {document}")
    merged = dataclasses.replace(batch, document_ids=torch.ones_like(batch.document_ids))
    assert_differs(model(merged, output="logits")["logits"], logits, "one document")


def test_flops_of_a_long_row() -> None:
    """Where mixing is a large part: the suite's rows are short."""
    described = Description("fnet", {"max_position_embeddings": 256})
    model, batch = described.filled(Mesh.solo()), make_batch(described.config, "full", rows=1, length=256)
    with FlopCounterMode(display=False) as counter:
        loss_of(model, model(batch), batch).backward()
    formula = model.flops_per_row(described.config, 256, batch.labels.shape[1])
    assert abs(formula / counter.get_total_flops() - 1) < FLOPS


# A run.


def train_fnet(values: dict[str, Any]) -> str | None:
    register()
    return train_here(values)


@pytest.fixture
def train(ranks: Any, prepared: Path, tmp_path: Path) -> Any:
    def call(name: str, overrides: dict[str, Any]) -> Run:
        run = Run(tmp_path / name)
        values = settings(prepared, run.folder, 8, overrides) | {"model": MODEL}
        errors = ranks.run(train_fnet, values, count=ranks_of(values), seconds=120)
        assert not any(errors), errors
        return run

    return call


def test_every_layout_trains_alike_and_exports(train: Any, tmp_path: Path) -> None:
    import transformers

    single = train("single", {})
    steps = single.steps()
    assert steps[-1][0] < steps[0][0] - 0.1, "it must have learned something"
    runs = {name: train(name, overrides) for name, overrides in LAYOUTS.items()}
    for name, run in runs.items():
        assert difference(run.steps(), steps) <= RELATIVE, name
    for name, run in (("single", single), ("PP2", runs["PP2"]), ("TP2", runs["TP2"])):
        to_huggingface(run.folder, tmp_path / "hf" / name)
        theirs, told = transformers.AutoModelForMaskedLM.from_pretrained(
            tmp_path / "hf" / name, output_loading_info=True
        )
        assert type(theirs).__name__ == "FNetForMaskedLM"
        told["missing_keys"] -= {f"fnet.pooler.dense.{kind}" for kind in ("weight", "bias")}  # which no logit reads
        assert not any(told.values()), told
        ids = torch.randint(5, 300, (3, 32), generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            expected = theirs.eval()(ids).logits
            for path in (run.folder, tmp_path / "hf" / name):
                assert_close(farspan.load(path)(ids).logits, expected, f"{name}: logits")


def test_export_there_and_back(train: Any, tmp_path: Path) -> None:
    run = train("run", {})
    assert "padding" in str(to_huggingface(run.folder, tmp_path / "hf"))
    from_huggingface(tmp_path / "hf", tmp_path / "checkpoint")
    to_huggingface(tmp_path / "checkpoint", tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert_identical(second, first)


def test_a_decoder_is_refused(prepared: Path, tmp_path: Path) -> None:
    values = settings(prepared, tmp_path, 1, {"objective.name": "clm"}) | {"model": MODEL | {"is_decoder": True}}
    with pytest.raises(ValueError, match="is_decoder true does not go with fnet, which mixes all positions"):
        parse_config(values, "a test")


def test_the_product_does_not_have_it(monkeypatch: pytest.MonkeyPatch, prepared: Path, tmp_path: Path) -> None:
    monkeypatch.delitem(ARCHITECTURES, "fnet")
    with pytest.raises(ValueError, match="model_type 'fnet' is unknown"):
        parse_config(settings(prepared, tmp_path, 1, {}) | {"model": MODEL}, "a test")
