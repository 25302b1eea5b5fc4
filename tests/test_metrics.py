from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farspan.pretrain.hardware import model_flops_utilization, peak_flops_per_second
from farspan.pretrain.metrics import (
    MetricsWriter,
    StepMetrics,
    ValidationMetrics,
    json_line,
    read_metrics,
)


def step_metrics(step: int, **changes: Any) -> StepMetrics:
    values: dict[str, Any] = {
        "step": step,
        "loss": 7.0 / step,
        "grad_norm": 0.1 * step,
        "lr": 1e-4,
        "tokens": 1000 * step,
        "tokens_per_second": 12345.678,
        "step_seconds": 0.25,
        "data_wait_seconds": 0.0,
    }
    return StepMetrics(**values | changes)


def writer(folder: Path, **settings: Any) -> MetricsWriter:
    defaults: dict[str, Any] = {"is_writer": True, "total_steps": 100, "tensorboard": False, "stream": io.StringIO()}
    return MetricsWriter(folder, **defaults | settings)


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder / "metrics.jsonl")]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_comes_back_with_the_same_bits(value: float) -> None:
    read = json.loads(json_line({"loss": value}))["loss"]
    assert read.hex() == value.hex()


def refuse_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_null_and_named(value: float) -> None:
    line = json.loads(json_line({"step": 7, "loss": value, "lr": 0.5}), parse_constant=refuse_constant)
    assert line == {"step": 7, "loss": None, "lr": 0.5, "non_finite": {"loss": str(value)}}


def test_lines_hold_what_was_measured_and_no_unknown(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        metrics.train(step_metrics(1))
        metrics.train(step_metrics(2, model_flops_utilization=0.4, peak_memory_bytes=3, parts={"sentence_loss": 0.7}))
        metrics.validation(ValidationMetrics(2, loss=2.0, masked_accuracy=0.5))
    first, second, validation = read_metrics(tmp_path / "metrics.jsonl")
    plain = {"loss", "grad_norm", "lr", "tokens", "tokens_per_second", "step_seconds", "data_wait_seconds"}
    assert set(first) == plain | {"step", "skipped_steps"}
    assert second["model_flops_utilization"] == 0.4
    assert second["peak_memory_bytes"] == 3
    assert second["sentence_loss"] == 0.7
    assert validation == {
        "step": 2,
        "validation_loss": 2.0,
        "validation_perplexity": math.exp(2.0),
        "validation_masked_accuracy": 0.5,
    }


def test_perplexity_of_a_diverged_run_is_infinite_not_an_error() -> None:
    assert ValidationMetrics(1, loss=1e4).perplexity == math.inf


def test_resuming_drops_what_is_past_the_checkpoint_and_a_broken_line(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        for step in range(1, 8):
            metrics.train(step_metrics(step))
            if step % 2 == 0:
                metrics.validation(ValidationMetrics(step, loss=1.0))
    path = tmp_path / "metrics.jsonl"
    kept = path.read_bytes().splitlines(keepends=True)[:6]  # updates 1 to 4, evaluations 2 and 4
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lo')  # killed in the middle of a line
    with writer(tmp_path, resumed_step=4) as metrics:
        metrics.train(step_metrics(5))
    assert path.read_bytes().splitlines(keepends=True)[:6] == kept
    assert steps(tmp_path) == [1, 2, 2, 3, 4, 4, 5]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_half_written_number_is_not_a_shorter_number(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\x00\x00\x00\n{"step": 2}')  # complete JSON, no newline
    with writer(tmp_path, resumed_step=2) as metrics:
        metrics.train(step_metrics(3))
    assert steps(tmp_path) == [1, 3]


def test_starting_anew_keeps_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        with writer(tmp_path) as metrics:
            metrics.train(step_metrics(1))
    assert steps(tmp_path) == [1]


def test_a_step_cannot_come_twice(tmp_path: Path) -> None:
    with writer(tmp_path, resumed_step=4) as metrics, pytest.raises(AssertionError, match="step 4 after step 4"):
        metrics.train(step_metrics(4))


def test_lines_are_in_the_file_before_close(tmp_path: Path) -> None:
    metrics = writer(tmp_path)
    metrics.train(step_metrics(1))
    assert steps(tmp_path) == [1]
    metrics.close()
    metrics.close()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    stream = io.StringIO()
    with writer(tmp_path / "run", is_writer=False, tensorboard=True, stream=stream) as metrics:
        metrics.train(step_metrics(1))
        metrics.validation(ValidationMetrics(1, loss=1.0))
        metrics.message("hello")
        metrics.sync()
    assert not (tmp_path / "run").exists()
    assert stream.getvalue() == ""


def test_a_log_file_gets_plain_lines_at_intervals(tmp_path: Path) -> None:
    stream = io.StringIO()
    with writer(tmp_path, total_steps=25, stream=stream) as metrics:
        for step in range(1, 26):
            metrics.train(step_metrics(step))
        metrics.validation(ValidationMetrics(25, loss=1.5))
    lines = stream.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 1/25", "step 10/25", "step 20/25", "step 25/25", "step 25"]
    assert "loss 7.0000" in lines[0]
    assert "12.35k tokens/s, ETA unknown" in lines[0]
    assert lines[3].endswith("ETA 0:00:00")
    assert "validation loss 1.5000" in lines[4]
    assert "\r" not in stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_that_starts_where_the_run_resumes(tmp_path: Path) -> None:
    stream = Terminal()
    with writer(tmp_path, total_steps=10, resumed_step=8, stream=stream) as metrics:
        metrics.train(step_metrics(9))
        metrics.train(step_metrics(10))
        metrics.message("saved")
    first, last = stream.getvalue().split("\r")[1], stream.getvalue().split("\r")[-1]
    assert "8/10" in first
    assert "10/10" in last
    assert "loss 0.7000" in last
    assert "12.35k tokens/s" in last
    assert "saved\n" in stream.getvalue()


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with writer(tmp_path, tensorboard=True, config_text="model:\n  hidden_size: 8") as metrics:
        for step in (1, 2, 3):
            metrics.train(step_metrics(step, loss=100.0))
    with writer(tmp_path, tensorboard=True, resumed_step=2, config_text="model: {}") as metrics:
        metrics.train(step_metrics(3, loss=0.5, peak_memory_bytes=7))
        metrics.validation(ValidationMetrics(3, loss=0.25))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/lr", "throughput/tokens_per_second", "validation/loss"} <= set(tags["scalars"])
    assert "throughput/loss" not in tags["scalars"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 100.0), (2, 100.0), (3, 0.5)]
    assert [e.value for e in events.Scalars("throughput/peak_memory_bytes")] == [7.0]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    model:\n      hidden_size: 8" in text


def test_tensorboard_marks_where_a_run_has_gone_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with writer(tmp_path, tensorboard=True) as metrics:
        for step in (1, 2, 3):
            metrics.train(step_metrics(step))
    with writer(tmp_path, tensorboard=True, resumed_step=1) as metrics:
        metrics.rollbacks(1, "| rollback |")
        metrics.train(step_metrics(2))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("spikes/rollbacks")] == [(1, 1.0)]
    text = events.Tensors("rollbacks/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "| rollback |"
    with writer(tmp_path, is_writer=False, tensorboard=True) as metrics:
        metrics.rollbacks(1, "")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA GH200 480GB", 989.5e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("Tesla V100-SXM2-32GB", None),
        ("NVIDIA A10G", None),
        (None, None),
    ],
)
def test_peaks(name: str | None, peak: float | None) -> None:
    assert peak_flops_per_second(name) == peak
    assert model_flops_utilization(3e14, peak) == (None if peak is None else 3e14 / peak)
