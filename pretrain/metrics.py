"""What a run reports: values that are already global go once to the console, metrics.jsonl and TensorBoard.

Nothing here talks to other ranks.  Steps are numbered as checkpoints are: step k is the k-th update, counted from 1,
and the checkpoint ``step-k`` contains it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from .appended import Appended
from .files import DISK_FULL, sync


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """One update.  Losses, counts and rates are those of all ranks together; times are the writing rank's."""

    step: int  # counted from 1
    loss: float  # nats per predicted token (plus the sentence loss where there is one)
    grad_norm: float  # before clipping
    lr: float
    tokens: int  # real tokens of this update (padding not counted), all ranks
    tokens_per_second: float  # real tokens, all ranks
    step_seconds: float
    data_wait_seconds: float  # part of step_seconds spent waiting for the next batch
    model_flops_utilization: float | None = None
    peak_memory_bytes: int | None = None  # of the device, the largest over the ranks
    loss_scale: float | None = None  # float16: what the loss was multiplied by
    skipped_steps: int = 0  # so far in the run: steps whose loss or gradient was not finite
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of the loss: lm_loss, sentence_loss


@dataclasses.dataclass(frozen=True)
class ValidationMetrics:
    """One evaluation after update ``step``, over all ranks."""

    step: int
    loss: float  # nats per predicted token
    masked_accuracy: float | None = None  # share of predicted tokens whose largest logit is right
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


@dataclasses.dataclass(frozen=True)
class SpikeMetrics:
    """A step to look at: what is wrong with it, and the samples whose loss was largest (or not finite)."""

    step: int
    reason: str
    loss: float
    grad_norm: float
    samples: range  # indices of the rows of this step, over the whole run
    worst: Mapping[int, float]  # sample → mean loss of its predictions in nats, the largest first


@dataclasses.dataclass(frozen=True)
class SaveMetrics:
    """How a save ended: of the checkpoint of update ``step``, known some steps later where it was asynchronous."""

    step: int
    bytes: int  # of all ranks' files
    seconds: float  # from its beginning until it was on the disk
    stall_seconds: float  # in which there was no training because of it
    failed_saves: int  # so far, since this process began
    problem: str | None = None  # why there is no checkpoint


@dataclasses.dataclass(frozen=True)
class Straggler:
    """A rank that is slow: the median of the seconds that it is busy in a step, and that of the others of its stage."""

    rank: int
    host: str
    ratio: float
    busy_seconds: float
    others_seconds: float


@dataclasses.dataclass(frozen=True)
class HealthMetrics:
    """How the ranks compare over the last ``window`` steps; ``begun``, ``ended``: who is a straggler from now on, and
    who was until now."""

    step: int
    slowest_rank: int
    slowest_busy_ratio: float  # busy so many times as long as the others of its pipeline stage
    window: int
    begun: tuple[Straggler, ...] = ()
    ended: tuple[Straggler, ...] = ()


def json_line(values: Mapping[str, Any]) -> str:
    """One line of valid JSON.  A finite float is written so that reading it gives the same 64 bits.

    JSON has no word for nan and infinity: such a value becomes null, and ``non_finite`` names what it was, as in
    ``{"step": 7, "loss": null, "non_finite": {"loss": "nan"}}``.
    """
    non_finite = {k: str(v) for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    line = {k: None if k in non_finite else v for k, v in values.items()}
    if non_finite:
        line["non_finite"] = non_finite
    return json.dumps(line, allow_nan=False) + "\n"


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl, as dictionaries."""
    with Path(path).open("rb") as file:
        return [values for _, values in complete_lines(file)]


def complete_lines(lines: Iterable[bytes]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line that was written to its end, and its values; a machine that fails may leave others."""
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(values, dict) and isinstance(values.get("step"), int):
            yield line, values


def _drop_after(path: Path, step: int) -> None:
    """Keep the complete lines up to ``step``: an earlier process may have gone past the checkpoint and been killed."""
    if not path.exists():
        return
    beside = path.with_name(path.name + ".new")
    with path.open("rb") as old, beside.open("wb") as new:
        for line, values in complete_lines(old):
            if values["step"] <= step:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    beside.replace(path)
    sync(path.parent)


class MetricsWriter:
    """Sends each value once to the console, ``run_dir/metrics.jsonl`` and ``run_dir/tensorboard``.

    Only the rank with ``is_writer`` writes; on the others every method does nothing.  ``resumed_step`` is the number
    of updates in the checkpoint that the run continues (0: none): whatever an earlier process wrote past it is
    dropped from metrics.jsonl and purged in TensorBoard, so that each step appears once.

    A disk that takes nothing is said, and what was to be written waits for it; only ``sync`` and ``close`` raise.

    On a terminal the console shows a progress bar, elsewhere a plain line every ``console_interval`` steps.
    ``config_text`` is the resolved configuration, shown in TensorBoard as text.
    """

    def __init__(
        self,
        run_dir: Path | str,
        *,
        is_writer: bool,
        total_steps: int,
        resumed_step: int = 0,
        tensorboard: bool = True,
        config_text: str | None = None,
        console_interval: int = 10,
        stream: TextIO | None = None,
    ) -> None:
        if console_interval < 1:
            raise ValueError(f"the console interval must be at least 1 step, not {console_interval}")
        self._is_writer, self._files = is_writer, ()  # type: bool, tuple[Appended, ...]
        if not is_writer:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._lines, self._spikes = Appended(run_dir / "metrics.jsonl"), Appended(run_dir / "spikes.jsonl")
        for file in (self._lines, self._spikes):
            _drop_after(file.path, resumed_step)
        self._lines.flush()  # it is there, and can be written
        self._last_step = resumed_step
        self._console = _Console(stream or sys.stdout, total_steps, resumed_step, console_interval)
        self._tensorboard: Any = None
        if tensorboard:
            from .event_file import EventFile  # here: it takes a while

            self._tensorboard = EventFile(run_dir / "tensorboard", purge_step=resumed_step + 1)
            if config_text is not None:
                # Markdown shows text that is indented by four spaces as it stands.
                words = "    " + config_text.replace("\n", "\n    ")
                self._warn(self._tensorboard.text(resumed_step, "config", words))
        others = () if self._tensorboard is None else (self._tensorboard,)
        self._files = (self._lines, self._spikes, *others)

    def train(self, metrics: StepMetrics) -> None:
        """Report one update.  Steps come in order, each once."""
        if not self._is_writer:
            return
        assert metrics.step > self._last_step, f"step {metrics.step} after step {self._last_step}"
        self._last_step = metrics.step
        values = dataclasses.asdict(metrics)
        parts = values.pop("parts")
        for name in ("model_flops_utilization", "peak_memory_bytes", "loss_scale"):
            if values[name] is None:
                del values[name]
        self._write(values | parts)
        learning = {k: values[k] for k in ("loss", "grad_norm", "lr", "loss_scale", "skipped_steps") if k in values}
        self._scalars(metrics.step, "train", learning | parts)
        self._scalars(metrics.step, "throughput", {k: values[k] for k in values if k != "step" and k not in learning})
        self._console.step(metrics)

    def spike(self, metrics: SpikeMetrics) -> None:
        """Report a step that was skipped, or whose gradient stands out: in spikes.jsonl and on the console."""
        if not self._is_writer:
            return
        values: dict[str, Any] = {"step": metrics.step, "reason": metrics.reason}
        values |= {"loss": metrics.loss, "grad_norm": metrics.grad_norm}
        values |= {"first_sample": metrics.samples.start, "samples": len(metrics.samples)}
        # As text, because JSON has no word for nan.
        values["worst_samples"] = [{"sample": sample, "loss": str(loss)} for sample, loss in metrics.worst.items()]
        self._warn(self._spikes.append(json_line(values).encode()))
        worst = ", ".join(f"{sample} ({loss:.2f})" for sample, loss in list(metrics.worst.items())[:3])
        self._console.message(f"step {metrics.step}: {metrics.reason}; samples with the largest loss: {worst}")

    def rollbacks(self, count: int, words: str) -> None:
        """Mark in TensorBoard where the run goes on, and how often it has gone back so far."""
        if self._is_writer and self._tensorboard is not None:
            self._scalars(self._last_step, "spikes", {"rollbacks": count})
            self._warn(self._tensorboard.text(self._last_step, "rollbacks", words))

    def validation(self, metrics: ValidationMetrics) -> None:
        """Report an evaluation after the update of that step (0: before the first)."""
        if not self._is_writer:
            return
        values: dict[str, Any] = {"loss": metrics.loss, "perplexity": metrics.perplexity}
        if metrics.masked_accuracy is not None:
            values["masked_accuracy"] = metrics.masked_accuracy
        values |= metrics.parts
        self._write({"step": metrics.step} | {f"validation_{k}": v for k, v in values.items()})
        self._scalars(metrics.step, "validation", values)
        self._console.message(
            f"step {metrics.step}: " + ", ".join(f"validation {k.replace('_', ' ')} {v:.4f}" for k, v in values.items())
        )

    def saved(self, metrics: SaveMetrics) -> None:
        """Report how a save has ended."""
        if not self._is_writer:
            return
        values: dict[str, Any] = {"failed_saves": metrics.failed_saves}
        if metrics.problem is None:
            values |= {"save_bytes": metrics.bytes, "save_seconds": metrics.seconds}
            values |= {"save_stall_seconds": metrics.stall_seconds}
        self._scalars(metrics.step, "checkpoint", values)
        if metrics.problem is not None:
            values["save_problem"] = metrics.problem
        self._write({"step": metrics.step} | values)

    def health(self, metrics: HealthMetrics | None) -> None:
        """Report how the ranks compare: curves, and a line for each that is a straggler, or is one no more; None:
        there is nothing to compare yet."""
        if metrics is None or not self._is_writer:
            return
        ratio = {"slowest_rank": metrics.slowest_rank, "slowest_busy_ratio": metrics.slowest_busy_ratio}
        self._scalars(metrics.step, "health", ratio)
        for one in metrics.begun:
            values = dataclasses.asdict(one)
            self._write({"step": metrics.step, "straggler": values.pop("rank")} | values)
            self._console.message(
                f"step {metrics.step}: rank {one.rank} ({one.host}) is slow: busy for {one.busy_seconds:.3g} s a step, "
                f"{one.ratio:.1f} times as long as the other ranks of its pipeline stage ({one.others_seconds:.3g} s; "
                f"medians of {metrics.window} steps)"
            )
        for one in metrics.ended:
            self._write({"step": metrics.step, "straggler_ended": one.rank, "host": one.host})
            self._console.message(f"step {metrics.step}: rank {one.rank} ({one.host}) is as fast as the others again")

    def message(self, text: str) -> None:
        """A line for people (a checkpoint was written, ...), above the bar where there is one."""
        if self._is_writer:
            self._console.message(text)

    def sync(self) -> None:
        """Bring all that was reported to the disk: call it before a checkpoint that counts on it.  OSError where that
        fails."""
        for file in self._files:
            file.sync()

    def close(self) -> None:
        """``sync``, and nothing is reported any more."""
        if not self._is_writer:
            return
        try:
            self.sync()
        finally:
            for file in self._files:
                file.close()
            self._files = ()
            self._console.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except OSError:
            if kind is None:  # what ends the run says more than that its last lines could not be written
                raise

    def _write(self, values: Mapping[str, Any]) -> None:
        self._warn(self._lines.append(json_line(values).encode()))

    def _scalars(self, step: int, group: str, values: Mapping[str, float]) -> None:
        if self._tensorboard is not None:
            self._warn(self._tensorboard.scalars(step, {f"{group}/{name}": value for name, value in values.items()}))

    def _warn(self, problem: str | None) -> None:
        if problem is not None:
            self.message(f"{problem}: what is reported there waits, training goes on")


class _Console:
    """A progress bar on a terminal; plain lines, at intervals, where the output goes to a file."""

    def __init__(self, stream: TextIO, total_steps: int, resumed_step: int, interval: int) -> None:
        self._stream, self._total, self._interval = stream, total_steps, interval
        self._start: tuple[float, int] | None = None  # time and step at the end of this process's first step
        self._bar: Any = None
        if stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=resumed_step, unit="step", file=stream, dynamic_ncols=True)

    def step(self, metrics: StepMetrics) -> None:
        now = time.monotonic()
        first = self._start is None
        self._start = self._start or (now, metrics.step)
        if self._bar is not None:
            text = f"loss {metrics.loss:.4f}, {_short(metrics.tokens_per_second)} tokens/s"
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(metrics.step - self._bar.n)
        elif first or metrics.step % self._interval == 0 or metrics.step == self._total:
            self.message(
                f"step {metrics.step}/{self._total}: loss {metrics.loss:.4f}, lr {metrics.lr:.3g}, "
                f"grad norm {metrics.grad_norm:.3f}, {_short(metrics.tokens_per_second)} tokens/s, "
                f"ETA {self._remaining(now, metrics.step)}"
            )

    def message(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
            return
        try:
            print(text, file=self._stream, flush=True)
        except OSError as error:
            if error.errno not in DISK_FULL:  # a log may lie on the disk that is full: it does not end the run
                raise

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _remaining(self, now: float, step: int) -> str:
        # The first step, which compiles and warms up, says nothing about the others.
        assert self._start is not None
        start, first_step = self._start
        if step == first_step and step < self._total:
            return "unknown"
        seconds = round((now - start) / max(step - first_step, 1) * (self._total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _short(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.1f}"
