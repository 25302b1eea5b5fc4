"""``farspan bench approximation``: errors against brute force, the command from end to end, trained models."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Description, save_weights
from torch import Tensor

import farspan
from farspan.launch.cli import main
from farspan.parallel.mesh import Mesh
from farspan.pretrain import checkpoint as ckpt
from farspan.pretrain.approximation.captured import TrainedModel
from farspan.pretrain.approximation.methods import AUTHORS, Method, fixed_share, methods, relative_errors
from farspan.pretrain.approximation.synthetic import synthetic_qkv
from farspan.pretrain.conversion.to_huggingface import to_huggingface
from farspan.pretrain.data.tokenizer import train_tokenizer

TEXT = "the cat sat on the mat, and the dog lay beside it while rain fell on the roof. " * 40
POSITIONS = 96


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", list(sys.path))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bench(*arguments: object) -> int:
    return main(["bench", "approximation", "--threads", "1", *map(str, arguments)])


def results_in(folder: Path) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = json.loads((folder / "approximation.json").read_text())["points"]
    return points


# Errors.


def test_the_error_by_brute_force() -> None:
    q, k, v = synthetic_qkv(2, 3, 70, 8)
    half = Method("Nyström", 35)
    y = half(q, k, v)
    found = relative_errors(y, Method("exact")(q, k, v))
    assert found.shape == (2, 3)
    for n, h in itertools.product(range(2), range(3)):
        difference = norm = 0.0
        for t in range(70):
            weights = [math.exp(sum((q[n, h, t] * k[n, h, u]).tolist()) / math.sqrt(8)) for u in range(70)]
            for e in range(8):
                exact = sum(w * x for w, x in zip(weights, v[n, h, :, e].tolist(), strict=True)) / sum(weights)
                difference += (y[n, h, t, e].item() - exact) ** 2
                norm += exact**2
        assert found[n, h].item() == pytest.approx(math.sqrt(difference / norm), rel=1e-4)


def mean_error(method: Method, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    return relative_errors(method(*inputs), Method("exact")(*inputs)).mean().item()


def test_the_synthetic_model_comes_near_the_authors_profile() -> None:
    inputs = synthetic_qkv(1, 12, 512, 64)
    for (kind, _, budget), theirs in AUTHORS.items():
        assert mean_error(Method(kind, budget), inputs) == pytest.approx(theirs, rel=0.1), (kind, budget)


def test_by_length_mra_is_flat_at_a_share_of_blocks_and_nystrom_rises() -> None:
    mra, nystrom = [], []
    for length in (256, 512, 1024):
        inputs = synthetic_qkv(2, 12, length, 64)
        mra.append(mean_error(Method("MRA-2", fixed_share(length, 1 / 8)), inputs))
        nystrom.append(mean_error(Method("Nyström", 64), inputs))
    assert max(mra) < 1.4 * min(mra)
    assert nystrom == sorted(nystrom)
    assert nystrom[-1] > 1.1 * nystrom[0]


def test_synthetic_inputs() -> None:
    short, long, other = synthetic_qkv(1, 2, 50, 8), synthetic_qkv(1, 2, 90, 8), synthetic_qkv(1, 2, 50, 8, seed=1)
    assert all(torch.equal(a, b[:, :, :50]) for a, b in zip(short, long, strict=True))
    assert not any(torch.allclose(a, b) for a, b in zip(short, other, strict=True))
    assert len({x.data_ptr() for x in short}) == 3


def test_which_methods() -> None:
    names = [method.name for method in methods(128, [1, 2, 4, 8], [1, 64, 256], 0.75)]
    of_mra = ["1 block a row", "2 blocks a row", "3 blocks a row", "4 blocks a row"]
    expected = [f"{kind}, {budget}" for kind in ("MRA-2", "MRA-2-s") for budget in of_mra]
    assert names == ["exact", *expected, "Nyström, 1 landmark", "Nyström, 64 landmarks"]
    assert [fixed_share(length, 1 / 8) for length in (20, 256, 512, 4096)] == [1, 1, 2, 16]
    assert Method("MRA-2", 2).share(128) == 0.5
    assert Method("Nyström", 32).share(128) == 0.25


# The command.


def test_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "results"
    options = ("--lengths", "512,128,64", "--blocks", "1,4", "--landmarks", "16,8", "--rows", "1", "--rounds", "1")
    assert bench(*options, "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == [f"approximation.{kind}" for kind in ("json", "md", "png")]
    printed, page = capsys.readouterr().out, (out / "approximation.md").read_text()
    assert page.startswith(printed) and "(approximation.png)" in page
    assert (out / "approximation.png").read_bytes().startswith(b"\x89PNG")
    points = results_in(out)
    for kind in ("MRA-2", "MRA-2-s", "Nyström"):
        errors = [p["error"] for p in points if (p["length"], p["method"]) == (128, kind)]
        assert len(errors) == 2 and errors == sorted(errors, reverse=True), kind
        assert kind == "Nyström" or errors[-1] < 1e-5  # every block
        amount = "8 landmarks | 6.2%" if kind == "Nyström" else "1 block a row | 25.0%"
        assert f"| 128 | {kind} | {amount} | {errors[0]:.3f} |" in page
    for p in points:
        assert p["forward_and_backward_seconds"] > 0 and p["forward_seconds"] > 0
        if p["length"] == 512:  # at least the output and three gradients; less may find room that was free
            assert p["peak_memory_bytes"] > 0.5 * 4 * 12 * p["length"] * 64 * 4
    assert [p["length"] for p in points if p["method"] == "exact"] == [64, 128, 512]


def test_the_authors_figures_stand_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--lengths", 512, "--blocks", 8, "--landmarks", 32, "--rows", 1, "--rounds", 0)
    assert bench(*options, "--out", tmp_path) == 0
    page = capsys.readouterr().out
    (ours,) = (p["error"] for p in results_in(tmp_path) if (p["method"], p["budget"]) == ("MRA-2", 8))
    assert f"| 512 | MRA-2 | 8 blocks a row | 50.0% | {ours:.3f} | 0.153 | – | – | – |" in page
    assert "| 0.695 |" in page and "arXiv 2207.10284" in page


def test_long_attention_on_a_cpu(tmp_path: Path) -> None:
    script = Path(farspan.__file__).parent / "benchmarks" / "long_attention_cpu.py"
    command = [sys.executable, "-P", str(script), "--quick", "--out", str(tmp_path / "page")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    rows = json.loads((tmp_path / "page.json").read_text())["lengths"]
    assert [row["length"] for row in rows] == [64, 256]
    for row in rows:
        assert set(row["memory"]) == set(row["seconds"]) == {"exact", "MRA-2", "Nyström", "Nyström, convolution"}
        assert min(row["memory"].values()) > 0 and min(map(min, row["seconds"].values())) > 0
    assert "(page.png)" in (tmp_path / "page.md").read_text()
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


SMALL = ("--lengths", 64, "--blocks", 1, "--landmarks", 8, "--rows", 1, "--rounds", 0)


def test_results_are_not_replaced_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "approximation.json").write_text("mine")
    assert bench(*SMALL, "--out", tmp_path) == 2
    assert "is there already: give another folder with --out, or --replace\n" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    assert bench(*SMALL, "--out", tmp_path, "--replace") == 0
    assert len(results_in(tmp_path)) == 4


def test_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert bench(*SMALL, "--out", tmp_path) == 0
    assert capsys.readouterr().err.endswith("; no plot: pip install matplotlib\n")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md"]
    assert ".png" not in (tmp_path / "approximation.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["model"], "a model is measured on text: name files with --input"),
        (["--input", "text"], "--input is text for a model: name the model, or leave --input out"),
        (["--share", "0"], "--share 0 of all blocks: set it above 0 and at most 1"),
        (["--rows", "0"], "--rows 0: set 1 or more"),
        (["--rounds", "-1"], "--rounds -1: set 1 or more, or 0 for errors alone"),
        (["none", "--input", "text"], "none is not a folder: give a checkpoint, a run or a Hugging Face model folder"),
    ],
)
def test_bad_arguments(arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*arguments, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err == f"farspan: {line}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["512,", "0", "x", "1.5", "-1"])
def test_bad_lists(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench(f"--lengths={text}")
    assert f"{text!r} is not a list of numbers from 1 up, such as 512,1024\n" in capsys.readouterr().err


# Trained models.


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def checkpoint(folder: Path, name: str, **fields: Any) -> Path:
    positions = {"mega": {}, "roberta-prelayernorm": {"max_position_embeddings": POSITIONS + 2}}
    fields |= positions.get(name, {"max_position_embeddings": POSITIONS})
    described = Description(name, {"vocab_size": 300, **fields})
    mesh = Mesh.solo()
    train_tokenizer("bpe", [TEXT], folder / "tokenizer", vocab_size=300, progress=False)
    manifest = ckpt.Manifest(1, described.config.model_dump(), described.heads)
    step = save_weights(described.filled(mesh), mesh, folder / "run" / "checkpoints", manifest)
    (folder / "tokenizer").rename(step / "tokenizer")
    return folder / "run"


@pytest.mark.parametrize("name", ["megatron-bert", "roberta-prelayernorm", "mra", "nystromformer"])
def test_of_a_model(name: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = checkpoint(tmp_path, name)
    options = ("--blocks", "1,2,3", "--landmarks", "8,48", "--rows", 2, "--rounds", 0)
    assert bench(run, "--input", text, *options, "--out", tmp_path / "a") == 0
    points = results_in(tmp_path / "a")
    assert {p["length"] for p in points} == {POSITIONS}  # as far as it goes
    assert f"{name} of 3 layers with 4 heads" in (tmp_path / "a" / "approximation.md").read_text()
    for kind in ("MRA-2", "Nyström"):
        errors = [p["error"] for p in points if p["method"] == kind]
        assert errors == sorted(errors, reverse=True) and errors[0] > 1e-4
    assert [p["error"] < 1e-5 for p in points if p["method"] == "MRA-2"] == [False, False, True]
    to_huggingface(run, tmp_path / "hf")
    assert bench(tmp_path / "hf", "--input", text, *options, "--out", tmp_path / "b") == 0
    assert results_in(tmp_path / "b") == points


def test_what_is_read_is_what_the_layers_attend_with(text: Path, tmp_path: Path) -> None:
    model = TrainedModel(checkpoint(tmp_path, "roberta-prelayernorm"))
    (ids,) = model.rows([str(text)], 40, 1)
    attended: list[Tensor] = []
    hooks = [a.register_forward_hook(lambda m, i, y: attended.append(y)) for a in model.attentions]
    layers = model.layers(ids)
    for hook in hooks:
        hook.remove()
    assert len(layers) == len(attended) == 3
    for attention, (q, k, v), y in zip(model.attentions, layers, attended, strict=True):
        with torch.no_grad():
            expected = attention.output(F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).flatten(2))
        torch.testing.assert_close(y, expected)


def test_rows_of_a_text(text: Path, tmp_path: Path) -> None:
    model = TrainedModel(checkpoint(tmp_path, "mra"))
    rows = model.rows([str(text)], 20, 3)
    assert rows.shape == (3, 20)
    assert (rows[:, 0] == 0).all() and (rows[:, 1:] > 2).all()
    assert torch.equal(rows[:2], model.rows([str(text)], 20, 2))
    with pytest.raises(ValueError, match="tokens, too few for a row of 9000: give more, or --lengths"):
        model.rows([str(text)], 9000, 1)


def test_models_that_cannot_be_measured(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(run: Path, *options: object) -> str:
        assert bench(run, "--input", text, "--out", tmp_path / "out", *options) == 2
        return capsys.readouterr().err

    assert "is a mega model, whose attention is no softmax in heads: give one of" in refused(
        checkpoint(tmp_path / "a", "mega")
    )
    assert "is a decoder, and the approximations have no causal form: give an encoder" in refused(
        checkpoint(tmp_path / "b", "roberta-prelayernorm", is_decoder=True)
    )
    run = checkpoint(tmp_path / "c", "mra")
    assert f"--lengths 97: this model has positions for {POSITIONS}" in refused(run, "--lengths", 97)


def test_a_file_in_the_place_of_the_folder_is_told_first(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["bench", "approximation", "--lengths", "64", "--out", str(tmp_path / "file")]) == 2
    assert f"{tmp_path / 'file'} is a file: give a folder with --out" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
