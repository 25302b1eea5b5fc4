"""The recipes in configs/ are whole: each loads, is named after what it trains, and fits on its ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from farspan.pretrain.config import check_world
from farspan.pretrain.config_file import load_config
from farspan.pretrain.models import ARCHITECTURES

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
NAMES = [path.stem for path in CONFIGS]


def test_there_is_a_recipe_for_every_architecture() -> None:
    assert {name for name in ARCHITECTURES if any(recipe.startswith(f"{name}-") for recipe in NAMES)} == set(
        ARCHITECTURES
    )


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_recipe_loads_and_is_named_after_its_architecture(path: Path) -> None:
    config = load_config(path)
    assert path.stem.startswith(f"{config.model.model_type}-")
    assert config.run_dir == f"runs/{path.stem}" or path.stem.endswith("-quickstart")


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_recipe_runs_on_one_replica_and_on_eight(path: Path) -> None:
    config = load_config(path)
    model = config.parallel.tensor * config.parallel.pipeline
    largest = 1 if config.training.global_batch_size < 64 else 8
    for replicas in {1, largest}:
        assert check_world(config, model * replicas, torch.device("cpu")) == replicas
