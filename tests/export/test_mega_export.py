"""``farspan convert to-hf`` of MEGA: with its own modelling files, or for the stock classes of transformers 4.37."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_close, assert_identical
from safetensors.torch import load_file

import farspan
from farspan.launch.cli import main
from farspan.pretrain.conversion.from_huggingface import from_huggingface
from farspan.pretrain.conversion.to_huggingface import to_huggingface

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = {"configuration_mega.py", "layers_mega.py", "modeling_mega.py"}
RMSNORM = next(
    path.parent.name
    for path in sorted(GOLDEN.glob("mega-*/config.json"))
    if json.loads(path.read_text())["normalization_type"] == "rmsnorm"
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Any:
    def make(name: str) -> Path:
        from_huggingface(GOLDEN / name, tmp_path / name)
        return tmp_path / name

    return make


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_an_export_brings_its_code(checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "to-hf", str(checkpoint("mega-mlm")), str(tmp_path / "hf")]) == 0
    said = capsys.readouterr().err
    assert said.startswith("farspan: note: load it with from_pretrained(folder, trust_remote_code=True): its modelling")
    assert {path.name for path in (tmp_path / "hf").iterdir()} == FILES | {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    auto = config_of(tmp_path / "hf")["auto_map"]
    assert config_of(tmp_path / "hf")["model_type"] == "mega"  # the stock classes compute the same
    for target in auto.values():
        module, name = target.split(".")
        assert f"\nclass {name}(" in (tmp_path / "hf" / f"{module}.py").read_text()


def test_a_stock_export_brings_none(checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = checkpoint("mega-clm-laplace-chunked")
    assert main(["convert", "to-hf", "--stock", str(made), str(tmp_path / "hf")]) == 0
    said = capsys.readouterr().err
    assert "the stock classes of transformers 4.37 take rows of a multiple of chunk_size 16 tokens only" in said
    assert "divide laplace scores by 1 in generate() unless use_cache is false" in said
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert config_of(tmp_path / "hf") == config_of(GOLDEN / "mega-clm-laplace-chunked")
    # Our own code does not stay in a stock export of what was imported with it.
    to_huggingface(made, tmp_path / "own")
    from_huggingface(tmp_path / "own", tmp_path / "again")
    to_huggingface(tmp_path / "again", tmp_path / "stock", stock=True)
    assert config_of(tmp_path / "stock") == config_of(GOLDEN / "mega-clm-laplace-chunked")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (RMSNORM, "their normalization_type rmsnorm computes the normalised value and throws it away"),
        ("mega-clm-truncated", "their decoder forgets truncation as soon as it keeps a cache"),
    ],
)
def test_where_the_stock_classes_are_wrong(name: str, reason: str, checkpoint: Any, tmp_path: Path) -> None:
    made = checkpoint(name)
    with pytest.raises(ValueError, match=reason) as caught:
        to_huggingface(made, tmp_path / "hf", stock=True)
    assert "\n" not in str(caught.value) and "export without --stock" in str(caught.value)
    assert not (tmp_path / "hf").exists()
    to_huggingface(made, tmp_path / "hf")
    assert config_of(tmp_path / "hf")["model_type"] == "farspan_mega"  # which they do not know
    inputs = load_file(GOLDEN / name / "inputs.safetensors")
    del inputs["labels"]
    real = inputs["attention_mask"] == 1
    expected = load_file(GOLDEN / name / "outputs.safetensors")["logits"]
    with torch.no_grad():
        assert_close(farspan.load(tmp_path / "hf")(**inputs).logits[real], expected[real], "logits")
    from_huggingface(tmp_path / "hf", tmp_path / "again")
    to_huggingface(tmp_path / "again", tmp_path / "twice")
    assert_identical(*(load_file(tmp_path / out / "model.safetensors") for out in ("twice", "hf")))
    assert config_of(tmp_path / "twice") == config_of(tmp_path / "hf")


def test_weights_in_sixteen_bits_keep_their_counters(checkpoint: Any, tmp_path: Path) -> None:
    name = next(p.parent.name for p in GOLDEN.glob("mega-*/config.json") if '"batchnorm"' in p.read_text())
    to_huggingface(checkpoint(name), tmp_path / "hf", dtype="bfloat16")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    kinds = {key.rpartition(".")[2]: tensor.dtype for key, tensor in tensors.items()}
    assert kinds["num_batches_tracked"] == torch.int64 and kinds["weight"] == torch.bfloat16


STOCK = """\
import sys, torch
from safetensors.torch import load_file
import transformers
folder, case, name = sys.argv[1:]
inputs = load_file(case + "/inputs.safetensors")
expected = load_file(case + "/outputs.safetensors")
model, told = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
assert not any(told.values()), told
real = inputs["attention_mask"].bool()
with torch.no_grad():
    logits = model.eval()(**inputs).logits
print((logits - expected["logits"])[real].abs().max().item())
"""


@pytest.mark.skipif(
    "FARSPAN_TEST_TRANSFORMERS4" not in os.environ,
    reason="FARSPAN_TEST_TRANSFORMERS4 is not set: the path of a python that has transformers 4.37",
)
@pytest.mark.parametrize("name", ["mega-mlm", "mega-clm-laplace-chunked", "mega-mlm-post-norm"])
def test_a_stock_export_loads_in_transformers_4(name: str, checkpoint: Any, tmp_path: Path) -> None:
    to_huggingface(checkpoint(name), tmp_path / "hf", stock=True)
    (tmp_path / "check.py").write_text(STOCK)
    command = [os.environ["FARSPAN_TEST_TRANSFORMERS4"], str(tmp_path / "check.py"), str(tmp_path / "hf")]
    case = [str(GOLDEN / name), config_of(GOLDEN / name)["architectures"][0]]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, *case], capture_output=True, text=True, env=clean, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) < 1e-6
    shutil.rmtree(tmp_path / "hf")
