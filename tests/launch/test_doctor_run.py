"""``farspan doctor CONFIG``: whether a run's data, layout, memory and checkpoints fit the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import Ranks
from runs import MEGA, settings, train_here

from farspan.launch.cli import main
from farspan.launch.doctor import run_checks, sizes
from farspan.launch.doctor.report import Section, examine
from farspan.launch.doctor.run_checks import Ranks as Wanted
from farspan.pretrain.config import Config
from farspan.pretrain.config_file import parse_config


def config(data: Path, folder: Path, **overrides: Any) -> Config:
    """Keys with _ for the dot."""
    named = {key.replace("__", "."): value for key, value in overrides.items()}
    return parse_config(settings(data, folder, 4, named), "a test")


def resolved(data: Path, folder: Path, **overrides: Any) -> Config:
    return run_checks.look_at_data(Section("data"), config(data, folder, **overrides), quick=True)


def words(section: Section) -> str:
    return "\n".join([*section.lines, *(f"{f.severity}: {f.what}; {f.mend}" for f in section.findings)])


def layout(given: Config, world: int, local: int | None = None, memory: int = 1 << 40, gpus: int = 0) -> str:
    ranks = Wanted(world, world if local is None else local)
    return words(examine("layout", lambda it: run_checks.look_at_layout(it, given, ranks, memory=memory, gpus=gpus)))


# Sizes, against what a run writes.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [None, MEGA], ids=["dense", "mega"])
def test_a_checkpoint_is_as_large_as_said(
    model: dict[str, Any] | None, dtype: str, prepared: Path, tmp_path: Path, ranks: Ranks
) -> None:
    overrides = {"training.dtype": dtype} | ({"model": model} if model else {})
    values = settings(prepared, tmp_path / "run", 1, overrides | {"schedule.warmup_steps": 0})
    assert ranks.run(train_here, values, count=1) == [None]
    files = (tmp_path / "run/checkpoints/step-00000001").glob("*.safetensors")
    found = sum(file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    said = sizes.checkpoint_bytes(run_checks.look_at_data(Section("data"), parse_config(values, "x"), quick=True))
    assert said == pytest.approx(found, rel=0.005)  # MEGA's fixed tensors are saved too


def test_what_is_kept(prepared: Path, tmp_path: Path) -> None:
    def kept(**overrides: Any) -> tuple[int, int]:
        given = resolved(prepared, tmp_path, **overrides)
        one = sizes.checkpoint_bytes(given)
        least, end = sizes.kept_bytes(given)
        assert least % one == 0 and end % one == 0
        return least // one, end // one

    assert kept() == (1, 1)  # saved at the end alone
    assert kept(checkpoint__interval=1) == (3, 3)  # keep_last 2, and the one that is being written
    assert kept(checkpoint__interval=1, checkpoint__keep_last=0) == (2, 4)
    assert kept(checkpoint__interval=1, checkpoint__keep_last=1, checkpoint__keep_every=2) == (2, 4)
    given = resolved(prepared, tmp_path, checkpoint__interval=1)
    assert sizes.kept_bytes(given, already=2)[0] == sizes.checkpoint_bytes(given)


def test_what_a_rank_takes(prepared: Path, tmp_path: Path) -> None:
    """By the arithmetic of arXiv 1910.02054, section 3.1: 2 + 2 + 12 bytes a parameter in 16 bits, here with gradients
    in float32."""

    def of(data: int, **overrides: Any) -> sizes.RankBytes:
        return sizes.rank_bytes(resolved(prepared, tmp_path, training__dtype="bfloat16", **overrides), data)

    n = of(1).weights // 2
    whole = sizes.parameters(resolved(prepared, tmp_path))
    assert whole <= n < 1.1 * whole  # tables of words are padded
    assert (of(1).gradients, of(1).optimizer) == (4 * n, 12 * n)
    one, two, three = (of(4, parallel__zero_stage=stage) for stage in (1, 2, 3))
    assert (one.weights, one.gradients, one.optimizer) == (2 * n, 4 * n, 3 * n)
    assert (two.weights, two.gradients, two.optimizer) == (2 * n, n, 3 * n)
    assert (three.weights, three.gradients, three.optimizer) == (n // 2, n, 3 * n)
    offloaded = of(1, parallel__offload_optimizer=True)
    assert offloaded.optimizer == 0 and offloaded.offloaded == 12 * n and offloaded.state == 6 * n
    half = of(1, parallel__tensor=2)
    assert n < half.weights < 1.2 * n  # matrices are shared, norms are not
    stages = of(1, parallel__pipeline=2)
    assert n < stages.weights < 1.6 * n  # both stages have the table of words


def test_recomputing_and_smaller_microbatches_save_activations(prepared: Path, tmp_path: Path) -> None:
    of = lambda **overrides: sizes.activation_bytes(resolved(prepared, tmp_path, **overrides), 1)  # noqa: E731
    # arXiv 2205.05198, table 2: 34 s b h bytes a layer in 16 bits, twice that in 32
    tokens, hidden, layers = 32 * 2, 32, 4
    logits = int(4 * tokens * 0.15 * 300)
    assert of() == 68 * tokens * hidden * layers + logits
    assert of(training__recompute="full") == 4 * tokens * hidden * layers + logits
    assert of(training__micro_batch_size=1) < of() / 1.9


# Data and layout.


def test_data_that_is_there(prepared: Path, tmp_path: Path) -> None:
    section = Section("data")
    found = run_checks.look_at_data(section, config(prepared, tmp_path, evaluation__interval=2), quick=False)
    assert found.model.vocab_size == 300 and not section.findings
    manifest = json.loads((prepared / "dataset.json").read_text())
    for split in ("train", "validation"):
        assert section.facts["splits"][split]["tokens"] == manifest["splits"][split]["tokens"]
    rows = section.facts["splits"]["train"]["rows"]
    assert section.facts["epochs"] == pytest.approx(4 * 8 / rows) and "its tokenizer has 300 tokens" in section.lines


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize(
    ("harm", "line"),
    [
        ("cut", "has 100 bytes, dataset.json says"),
        ("gone", "No such file or directory"),
        ("none", "is not a prepared dataset (it has no dataset.json)"),
    ],
)
def test_data_that_is_not_whole(harm: str, line: str, quick: bool, prepared: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "data"
    shutil.copytree(prepared, copy)
    shard = copy / "train/00000.bin"
    if harm == "cut":
        shard.write_bytes(shard.read_bytes()[:100])
    else:
        (shard if harm == "gone" else copy / "dataset.json").unlink()
    section = Section("data")
    run_checks.look_at_data(section, config(copy, tmp_path), quick=quick)
    assert line in words(section) and section.findings[0].severity == "fault"


def test_another_vocabulary_than_the_datas(prepared: Path, tmp_path: Path) -> None:
    values = settings(prepared, tmp_path, 4, {})
    values["model"]["vocab_size"] = 100
    section = Section("data")
    run_checks.look_at_data(section, parse_config(values, "a test"), quick=True)
    assert "fault: model.vocab_size 100 is smaller than the tokenizer's 300" in words(section)


def test_ranks_that_make_the_layout_or_do_not(prepared: Path, tmp_path: Path) -> None:
    given = resolved(prepared, tmp_path, parallel__tensor=2, parallel__pipeline=2)
    said = layout(given, 8, 4)
    assert "8 ranks (4 on a node): tensor 2 × pipeline 2 × data 2, ZeRO 1, float32" in said and "fault" not in said
    assert "fault: 6 ranks do not make parallel.tensor 2 × pipeline 2: start a multiple of 4 ranks" in layout(given, 6)
    assert "data 3, ZeRO 1" in layout(given, 12)  # rows that do not divide by the replicas are spread all the same


def test_memory_that_does_not_suffice(prepared: Path, tmp_path: Path) -> None:
    given = resolved(prepared, tmp_path)
    needed = sizes.rank_bytes(given, 2)
    state, total = 2 * needed.state, 2 * needed.total
    assert "fault" not in layout(given, 2, memory=total) and "warning" not in layout(given, 2, memory=total)
    said = layout(given, 2, memory=total - 1)
    assert "warning: this node, for 2 ranks, has" in said and "lower training.micro_batch_size" in said
    said = layout(given, 2, memory=state - 1)
    assert "fault: this node, for 2 ranks, has" in said and "raise parallel.tensor, pipeline or zero_stage" in said
    assert "fault" not in layout(given, 2, 1, memory=total - 1)  # the other rank is on another node


def test_a_gpu_that_is_too_small(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    memory = [1 << 40]
    card = lambda i: types.SimpleNamespace(total_memory=memory[0])  # noqa: E731
    monkeypatch.setattr(run_checks.torch.cuda, "get_device_properties", card)
    given = resolved(prepared, tmp_path)
    assert "fault" not in layout(given, 2, gpus=2)
    assert "fault: 2 ranks are to run on this node and it shows 1 GPUs" in layout(given, 2, gpus=1)
    memory[0] = sizes.rank_bytes(given, 2).state - 1
    assert "fault: a GPU has" in layout(given, 2, gpus=2)


# The command.


def test_the_page_of_a_run(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings(prepared, tmp_path / "run", 4, {})))
    arguments = ["doctor", "--quick", "--world", "4", "--local", "2", str(file)]
    assert main([*arguments, "parallel.tensor=2"]) == 0
    out = capsys.readouterr().out
    assert "4 ranks (2 on a node): tensor 2 × pipeline 1 × data 2" in out and f"{prepared}, train: " in out
    assert f"{tmp_path / 'run/checkpoints'} (to be made in {tmp_path})" in out and not (tmp_path / "run").exists()
    assert main([*arguments, "parallel.tensor=2", "parallel.data=3", "training.global_batch_size=12"]) == 1
    assert "  fault: 4 ranks do not make parallel.tensor 2 × pipeline 1 × data 3" in capsys.readouterr().out
    assert main([*arguments, "parallel.tenser=2"]) == 2
    assert "unknown key parallel.tenser" in capsys.readouterr().err
