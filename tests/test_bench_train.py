"""``farspan bench train``: figures from made-up steps, the models and their batches, the command from end to end."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from farspan.launch.cli import main
from farspan.pretrain.bench import train_measure
from farspan.pretrain.bench.train_measure import OURS, THEIRS, figures, too_much
from farspan.pretrain.bench.train_models import SIZES, Dropout, Setup
from farspan.pretrain.bench.train_page import gate_verdict, lines_of
from farspan.pretrain.bench.train_sides import TransformersSide, Unable
from farspan.pretrain.models import ARCHITECTURES

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_found(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The references: nothing is compiled here."""
    monkeypatch.setenv("FARSPAN_KERNELS", "reference")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bench(*arguments: object) -> int:
    return main(["bench", "train", "--threads", "1", *map(str, arguments)])


# Numbers.


def test_figures_from_made_up_steps() -> None:
    found = figures([0.3, 0.1, 0.2], rows=8, length=512, flops_a_row=1e12, peak=100e12)
    assert found["step_seconds"] == 0.2
    assert found["tokens_per_second"] == pytest.approx(8 * 512 / 0.2)
    assert found["flops_per_second"] == pytest.approx(40e12)
    assert found["model_flops_utilization"] == pytest.approx(0.4)
    assert figures([1.0], 1, 1, 1.0, None)["model_flops_utilization"] is None


def test_flops_of_a_dense_model_by_hand() -> None:
    """Six times the weights in products for every token, attention, and the head at masked positions (arXiv 2104.04473,
    appendix)."""
    setup = Setup("megatron-bert", "large", 512)
    h, layers, words, masked = 1024, 24, 29056, round(0.15 * 512)
    attention = 2 * 2 * 512 * 512 * h
    expected = 3 * (layers * (2 * 512 * 12 * h * h + attention) + 2 * masked * (h * h + h * words))
    config = setup.config(rows=1, dtype=torch.float32, dropout=Dropout())
    assert setup.flops(config, 1) == pytest.approx(expected)
    assert setup.flops(config, 4) == pytest.approx(4 * expected)


@pytest.mark.parametrize("length", [512, 4096, 32768])
@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_model_can_be_configured(architecture: str, size: str, length: int) -> None:
    config = Setup(architecture, size, length).config(rows=2, dtype=torch.bfloat16, dropout=Dropout())
    assert (config.model.num_hidden_layers, config.model.hidden_size) == (SIZES[size].layers, SIZES[size].hidden)
    assert config.training.dtype == "bfloat16" and config.training.global_batch_size == 2


def test_batches() -> None:
    batch = Setup("mra", "tiny", 64).batch(3, seed=1)
    assert batch.label_positions is not None
    assert batch.input_ids.shape == (3, 64) and batch.labels.shape == (3, round(0.15 * 64))
    masked = batch.input_ids == 4
    assert torch.equal(masked, torch.zeros(3, 64, dtype=torch.bool).scatter(1, batch.label_positions, True))
    assert (batch.labels >= 5).all() and (batch.labels < SIZES["tiny"].words).all()
    assert torch.equal(batch.label_positions, batch.label_positions.sort(1).values)


def test_what_a_cpu_is_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_measure, "_available", lambda: 20 * 2**30)
    assert too_much(Setup("roberta-prelayernorm", "base", 512), OURS, 2) is None
    for side in (OURS, THEIRS):
        assert "minutes" in str(too_much(Setup("roberta-prelayernorm", "large", 32768), side, 1))
    eager = too_much(Setup("megatron-bert", "base", 4096), THEIRS, 1)
    assert eager is not None and "GiB of memory" in eager
    assert too_much(Setup("megatron-bert", "base", 4096), OURS, 1) is None


# Sides.


def test_rows_are_halved_until_they_fit() -> None:
    class Stub:
        attention = "none"
        tried: list[int]

        def __init__(self, most: int) -> None:
            self.most, self.tried = most, []

        def load(self, rows: int) -> None:
            self.tried.append(rows)

        def step(self) -> float:
            if self.tried[-1] > self.most:
                raise torch.OutOfMemoryError("no")
            return 1.5

    stub = Stub(3)
    assert train_measure._fitting(stub, 16) == (1.5, 2)
    assert stub.tried == [16, 8, 4, 2]
    with pytest.raises(Unable, match="one row does not fit"):
        train_measure._fitting(Stub(0), 4)


def test_a_loss_that_is_no_number_is_no_result() -> None:
    class Stub:
        attention = "none"

        def load(self, rows: int) -> None: ...

        def step(self) -> float:
            return math.nan

    with pytest.raises(Unable, match="the loss is nan"):
        train_measure._timed(Stub())


def test_transformers_takes_its_best_attention_or_says_why_not() -> None:
    def side(name: str) -> TransformersSide:
        return TransformersSide(Setup(name, "tiny", 64), CPU, torch.float32, Dropout())

    assert side("roberta-prelayernorm").attention == "sdpa"
    assert side("megatron-bert").attention == "eager"
    with pytest.raises(Unable, match="has no mega"):
        side("mega")
    with pytest.raises(Unable, match="needs a CUDA kernel"):
        side("mra")


# The page.


def section(**ours: Any) -> dict[str, Any]:
    side = {
        "attention": "its own", "rows": 4, "step_seconds": 0.5, "tokens_per_second": 4096.0, "flops_per_second": 2e12,
        "model_flops_utilization": 0.5, "peak_memory_bytes": 3 * 2**30,
    }  # fmt: skip
    row = {"architecture": "megatron-bert", "size": "large", "length": 512, OURS: side | ours}
    return {"about": {"GPU": "made up"}, "rows": [row | {THEIRS: side | {"tokens_per_second": 1024.0}}]}


def test_the_gate() -> None:
    assert gate_verdict(0.45, 0.45) == "met"
    assert gate_verdict(0.4, 0.45) == "missed by 5.0 points"
    lines = lines_of({"cuda": section()})
    assert "| megatron-bert large 512 | ≥ 45% | 50.0% | met |" in lines
    assert "| roberta-prelayernorm large 512 | ≥ 45% | not measured | not measured |" in lines
    assert "| megatron-bert large, 512 | farspan | its own | 4 | 500 ms | 4,096 | 2 | 50.0% | 3.0 GiB | – |" in lines
    assert any(line.endswith("| 1,024 | 2 | 50.0% | 3.0 GiB | 4.00× |") for line in lines)
    assert "Not measured." in lines  # the CPU


def test_what_could_not_be_measured_says_why() -> None:
    results = section()
    results["rows"][0][THEIRS] = {"why": "one row does not fit in memory"}
    (line,) = (line for line in lines_of({"cuda": results}) if "does not fit" in line)
    assert line.count("–") == 7


def test_the_page_in_the_repository_is_what_the_command_writes() -> None:
    folder = Path(__file__).parents[1] / "benchmarks"
    results = json.loads((folder / "train.json").read_text())
    assert (folder / "train.md").read_text() == "\n".join(lines_of(results)) + "\n"


# The command.


COMMANDS = """
import shutil, sys
from farspan.launch.cli import main
bench = ["bench", "train", "--threads", "1", "--device", "cpu", "--quick", "--out", sys.argv[1]]
if main([*bench, "--profile", "--architectures", "mra,roberta-prelayernorm"]):
    sys.exit(1)
shutil.copytree(sys.argv[1], sys.argv[2])
sys.exit(main([*bench, "--alone", "--architectures", "mra,nystromformer", "--keep"]))
"""


def test_the_command(tmp_path: Path) -> None:
    """Twice, in a process of its own: megatron-core is told there what a GPU is."""
    out, more = tmp_path / "first", tmp_path / "bench"
    names = ["mra", "roberta-prelayernorm"]
    command = [sys.executable, "-P", "-c", COMMANDS, str(more), str(out)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    results = json.loads((out / "train.json").read_text())
    assert set(results) == {"cpu"}
    rows = results["cpu"]["rows"]
    assert [row["architecture"] for row in rows] == names
    for row in rows:
        ours = row[OURS]
        assert ours["tokens_per_second"] > 0 and ours["peak_memory_bytes"] >= 0 and len(ours["seconds"]) == 1
        assert ours["first_loss"] == pytest.approx(math.log(512), abs=0.5)
        assert 0 < sum(line["share"] for line in ours["profile"]) <= 1
    assert rows[1][THEIRS]["first_loss"] == pytest.approx(math.log(512), abs=0.5)
    assert rows[1][THEIRS]["rows"] == rows[1][OURS]["rows"] == 16
    assert "CUDA kernel" in rows[0][THEIRS]["why"]
    traces = sorted(path.name.partition(".")[0] for path in (out / "traces").iterdir())
    assert traces == ["mra_tiny_64", "roberta-prelayernorm_tiny_64"]
    assert (out / "train.md").read_text() in ended.stdout
    # Another model is added, what is there stays.
    kept = json.loads((more / "train.json").read_text())["cpu"]["rows"]
    assert [row["architecture"] for row in kept] == ["mra", "nystromformer", "roberta-prelayernorm"]
    assert kept[0] == rows[0] and THEIRS not in kept[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--architectures", "bert"], "--architectures bert: choose from mega, megatron-bert"),
        (["--sizes", "huge"], "--sizes huge: choose from tiny, base, large"),
        (["--lengths", "512,x"], "--lengths 512,x: give numbers"),
        (["--attention-dropout", "1"], "--attention-dropout 1: set 0 or more"),
        (["--rows", "0"], "--rows 0: set 1 or more"),
        (["--device", "cuda"], "torch sees no GPU"),
    ],
)
def test_bad_input(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--quick", *arguments, "--out", tmp_path / "bench") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "bench").exists()


def test_what_is_not_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("deepspeed", "megatron") else found(name)
    )
    assert bench("--quick", "--out", tmp_path / "bench") == 2
    assert "pip install deepspeed megatron-core" in capsys.readouterr().err


def test_results_are_not_replaced_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.md").write_text("mine")
    assert bench("--quick", "--out", tmp_path) == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "train.md").read_text() == "mine"
