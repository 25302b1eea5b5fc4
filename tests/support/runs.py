"""Tiny training runs on real text, through the path of ``farspan train``: data, configurations, what they log."""

from __future__ import annotations

import dataclasses
import itertools
import re
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from farspan.pretrain import checkpoint as ckpt
from farspan.pretrain.metrics import read_metrics

TEXT = Path(__file__).parents[2] / "launch/text/state-of-the-union-1934-1960.txt"

MODEL = {
    "model_type": "roberta-prelayernorm",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
MEGA = {
    "model_type": "mega",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 48,
    "nffn_hidden_size": 40,
    "shared_representation_size": 16,
    "ema_projection_size": 4,
}
MRA = {name: value for name, value in MODEL.items() if name != "max_position_embeddings"} | {
    "model_type": "mra",
    "max_position_embeddings": 160,
    "block_per_row": 1,
}
NYSTROMFORMER = MRA | {"model_type": "nystromformer", "num_landmarks": 4, "conv_kernel_size": 5}
del NYSTROMFORMER["block_per_row"]


def prepare_text(folder: Path) -> Path:
    """A dataset with a vocabulary of 300: each sentence of 100 kB of text is a document."""
    from farspan.pretrain.data.prepare import prepare

    text = folder / "text.txt"
    sentences = re.split(r"(?<=[.?!])\s+", TEXT.read_text(encoding="utf-8")[:100_000])
    text.write_text("\n\n".join(sentence for sentence in sentences if sentence), encoding="utf-8")
    prepare([text], folder / "data", vocab_size=300, validation_fraction=0.1, processes=1, progress=False)
    return folder / "data"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that has been started: where it lies."""

    folder: Path

    def steps(self) -> list[tuple[float, float]]:
        """(loss, gradient norm) of every step."""
        lines = [line for line in read_metrics(self.folder / "metrics.jsonl") if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return [(line["loss"], line["grad_norm"]) for line in lines]

    def weights(self) -> dict[str, Tensor]:
        """The logical tensors of the last checkpoint."""
        reader = ckpt.Reader(ckpt.find(self.folder))
        return {name: reader.tensor(name) for name in reader.names()}

    def layout(self) -> dict[str, int]:
        """What the last checkpoint was saved under."""
        return ckpt.Reader(ckpt.find(self.folder)).manifest.layout

    def validations(self) -> list[tuple[float, float]]:
        """(loss, accuracy) of every evaluation."""
        lines = [line for line in read_metrics(self.folder / "metrics.jsonl") if "validation_loss" in line]
        return [(line["validation_loss"], line["validation_masked_accuracy"]) for line in lines]


def settings(data: Path, run_dir: Path, steps: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """A configuration as YAML would give it; ``overrides`` are section.key → value, or "model" → another model."""
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": dict(overrides.get("model", MODEL)),
        "data": {"folder": str(data), "sequence_length": 32},
        "training": {"steps": steps, "global_batch_size": 8, "micro_batch_size": 2},
        "optimizer": {"lr": 1e-3},
        "schedule": {"name": "constant", "warmup_steps": 3},
        "logging": {"interval": 1000, "tensorboard": False},
        "health": {"straggler_factor": 0},  # a busy machine makes some, and lines in metrics.jsonl
    }
    for key, value in overrides.items():
        if key == "model":
            continue
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value
    return values


def ranks_of(values: dict[str, Any]) -> int:
    parallel = values.get("parallel", {})
    return int(parallel.get("tensor", 1) * parallel.get("pipeline", 1) * parallel.get("data", 1))


def train_here(values: dict[str, Any], **options: Any) -> str | None:
    """On one rank: what ``farspan train`` does there; ``options`` are those of ``train``.  Returns the one line of an
    error of the user's, or None."""
    warnings.simplefilter("ignore")
    from farspan.pretrain.config_file import parse_config
    from farspan.pretrain.train import train

    try:
        train(parse_config(values, "a test"), **options)
    except (ValueError, OSError) as error:
        if "\n" in str(error):
            raise
        return str(error)
    return None


class Trainer:
    """Runs configurations on the shared ranks, each in a folder of its own."""

    def __init__(self, ranks: Any, data: Path, root: Path) -> None:
        self.ranks, self.data, self.root = ranks, data, root
        self.numbers = itertools.count()

    def __call__(
        self, steps: int, overrides: dict[str, Any], function: Any = train_here, run: Run | None = None, **options: Any
    ) -> Run:
        """``run``: one to go on with; ``options`` are those of ``train``."""
        run = run or Run(self.root / str(next(self.numbers)))
        values = settings(self.data, run.folder, steps, overrides)
        errors = self.ranks.run(function, values, count=ranks_of(values), seconds=200, **options)
        assert not any(errors), errors
        return run
