"""What is reported while a disk is full is not lost, and ends nothing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from small_disk import no_file_larger_than

from farspan.pretrain.appended import Appended
from farspan.pretrain.metrics import MetricsWriter, StepMetrics, read_metrics


def test_what_the_disk_does_not_take_is_written_later(tmp_path: Path) -> None:
    file = Appended(tmp_path / "file")
    assert file.append(b"one ") is None
    with no_file_larger_than(10):
        said = file.append(b"two three ")
        assert said is not None and said.startswith(f"{tmp_path / 'file'}: File too large")
        assert file.append(b"four ") is None  # said before
        assert (tmp_path / "file").read_bytes() == b"one two th"
        for flush in (file.flush, file.sync):
            with pytest.raises(OSError, match="File too large") as raised:
                flush()
            assert raised.value.filename == str(tmp_path / "file")
    assert file.append(b"five") is None
    assert (tmp_path / "file").read_bytes() == b"one two three four five"
    with no_file_larger_than(10):
        assert file.append(b"six") is not None  # anew
    file.sync()
    file.close()
    assert (tmp_path / "file").read_bytes() == b"one two three four fivesix"


def test_a_file_is_made_when_there_is_something_to_write(tmp_path: Path) -> None:
    file = Appended(tmp_path / "file")
    file.sync()
    file.close()
    assert not (tmp_path / "file").exists()


def metrics(step: int) -> StepMetrics:
    return StepMetrics(step, 1.0, 1.0, 1e-3, 10, 1.0, 1.0, 0.0)


class FullLog(io.StringIO):
    def flush(self) -> None:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stream", [io.StringIO, FullLog])
def test_reports_survive_a_full_disk(tmp_path: Path, stream: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = stream()
    with MetricsWriter(tmp_path, is_writer=True, total_steps=9, console_interval=100, stream=log) as writer:
        writer.train(metrics(1))
        with no_file_larger_than(400):
            for step in range(2, 8):
                writer.train(metrics(step))
            with pytest.raises(OSError, match="File too large"):
                writer.sync()
        writer.train(metrics(8))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 9))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    said = [line for line in log.getvalue().splitlines() if "what is reported there waits" in line]
    assert len(said) == 2 and any(f"{tmp_path / 'metrics.jsonl'}: File too large" in line for line in said)


def test_what_ends_a_run_is_said_and_not_that_its_last_lines_are_lost(tmp_path: Path) -> None:
    def run(error: str | None) -> None:
        with MetricsWriter(tmp_path, is_writer=True, total_steps=9, tensorboard=False, stream=io.StringIO()) as writer:
            writer.train(metrics(1))
            if error is not None:
                raise ValueError(error)

    with no_file_larger_than(10):
        with pytest.raises(ValueError, match="the reason"):
            run("the reason")
        with pytest.raises(OSError, match="File too large"):
            run(None)
