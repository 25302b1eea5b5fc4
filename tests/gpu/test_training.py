"""``farspan train`` on GPUs: the losses that a CPU gives, in every layout that the GPUs of this machine make."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("megatron.core", reason="needs megatron-core: models stand on it, kernels do not")
pytest.importorskip("deepspeed", reason="needs DeepSpeed: the engine stands on it")

from runs import MEGA, MODEL, MRA, NYSTROMFORMER, Run, settings

from farspan.launch.local import COMMAND

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="needs an NVIDIA GPU: torch sees none")]
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
MODELS = {
    "roberta-prelayernorm": MODEL | DROPOUT,
    "megatron-bert": MODEL | DROPOUT | {"model_type": "megatron-bert"},
    "mega": MEGA | DROPOUT,
    "mra": MRA | DROPOUT,
    "nystromformer": NYSTROMFORMER | DROPOUT,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ZeRO 1": {"parallel.zero_stage": 1},
    "ZeRO 3": {"parallel.zero_stage": 3},
    "offload": {"parallel.zero_stage": 1, "parallel.offload_optimizer": True},
    "data 2, ZeRO 2": {"parallel.data": 2, "parallel.zero_stage": 2},
    "tensor 2": {"parallel.tensor": 2},
    "tensor 2, sequence": {"parallel.tensor": 2, "parallel.sequence": True},
    "pipeline 2": {"parallel.pipeline": 2},
    "pipeline 2, interleaved": {"parallel.pipeline": 2, "parallel.virtual_stages": 2},
    "tensor 2, pipeline 2, data 2": {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.data": 2},
}
STEPS = 6


def train(data: Path, folder: Path, overrides: dict[str, Any], *, gpu: bool = True, stop_after: int = STEPS) -> Run:
    """A run on GPUs, or on CPUs; given again it goes on."""
    values = settings(data, folder / "run", STEPS, {"checkpoint.interval": 3, "evaluation.interval": 3} | overrides)
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    environment = dict(os.environ) if gpu else os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    ranks = ranks_of(overrides)
    words = ["train", str(folder / "run.yaml"), "--ranks", str(ranks), "--stop-after", str(stop_after)]
    ended = subprocess.run(
        [*COMMAND, *words], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert ended.returncode == 0, ended.stderr[-6000:]
    return Run(folder / "run")


def ranks_of(overrides: dict[str, Any]) -> int:
    sizes = [overrides.get(f"parallel.{axis}", 1) for axis in ("tensor", "pipeline", "data")]
    return int(sizes[0] * sizes[1] * sizes[2])


def close(one: Run, other: Run, tolerance: float) -> None:
    for found, expected in ((one.steps(), other.steps()), (one.validations(), other.validations())):
        assert found and found == [pytest.approx(values, rel=tolerance) for values in expected]


@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_gives_the_losses_of_a_cpu(prepared: Path, tmp_path: Path, name: str) -> None:
    """Dropout too: its masks are a function of the step."""
    overrides = {"model": MODELS[name]}
    close(train(prepared, tmp_path / "gpu", overrides), train(prepared, tmp_path / "cpu", overrides, gpu=False), 1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(prepared: Path, tmp_path: Path, dtype: str) -> None:
    found = train(prepared, tmp_path / "16", {"model": MODELS["megatron-bert"], "training.dtype": dtype})
    close(found, train(prepared, tmp_path / "32", {"model": MODELS["megatron-bert"]}), 3e-2)


@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_run_is_the_same_run(prepared: Path, tmp_path: Path, name: str) -> None:
    overrides = {"model": MODELS[name], "training.dtype": "bfloat16"}
    whole = train(prepared, tmp_path / "whole", overrides)
    train(prepared, tmp_path / "parts", overrides, stop_after=3)
    parts = train(prepared, tmp_path / "parts", overrides)
    assert parts.steps() == whole.steps()
    assert all(torch.equal(parts.weights()[key], value) for key, value in whole.weights().items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_does_not_matter(prepared: Path, tmp_path: Path, layout: str) -> None:
    """Asynchronous saves into pinned memory, NCCL's collectives and messages, DeepSpeed's partitions."""
    if (needed := ranks_of(LAYOUTS[layout])) > GPUS:
        pytest.skip(f"needs {needed} GPUs: this machine has {GPUS}")
    alone = train(prepared, tmp_path / "alone", {"model": MODELS["roberta-prelayernorm"]})
    close(
        train(prepared, tmp_path / "layout", {"model": MODELS["roberta-prelayernorm"]} | LAYOUTS[layout]), alone, 1e-4
    )
