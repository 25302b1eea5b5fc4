"""A run that is asked to stop: all ranks after the same step, saved; started again it goes on as if undisturbed."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from runs import Run, ranks_of, settings, train_here

from farspan.launch import exit_codes
from farspan.launch.progress import progress
from farspan.pretrain.config_file import parse_config
from farspan.pretrain.stop import StopRequests, end_time
from farspan.pretrain.train import train

STEPS = 12
TINY = {"model.num_hidden_layers": 2, "model.hidden_dropout_prob": 0.1, "checkpoint.keep_last": 0}
LAYOUTS: dict[str, dict[str, Any]] = {
    "1 rank": {},
    "TP2": {"parallel.tensor": 2},
    "DP2": {"parallel.data": 2, "parallel.zero_stage": 1},
    "PP2": {"parallel.pipeline": 2},
}


# One process.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_remembered_and_ends_nothing(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequests(0.0, {}) as stop:
        assert stop.code == 0
        os.kill(os.getpid(), number)
        assert stop.code == number
        os.kill(os.getpid(), signal.SIGTERM)  # the scheduler insists: the first reason stays
        assert stop.agreed([[float(stop.code), 7.0]]) == number.name
    assert signal.getsignal(number) is before


def test_the_end_of_the_time_comes_by_the_margin_sooner() -> None:
    ends = {"SLURM_JOB_END_TIME": str(time.time() + 1000)}
    assert StopRequests(900.0, ends).code == 0
    late = StopRequests(1001.0, ends).code
    assert StopRequests.agreed([[0.0], [float(late)]]) == "the end of the job's time"
    assert end_time(ends | {"FARSPAN_JOB_END_TIME": "12.5"}) == 12.5
    assert end_time({}) == float("inf")
    with pytest.raises(ValueError, match=r"^SLURM_JOB_END_TIME='soon' is no time in Unix seconds: set it to one"):
        end_time({"SLURM_JOB_END_TIME": "soon"})


def test_nobody_asked() -> None:
    assert StopRequests.agreed(None) is None
    assert StopRequests.agreed([[0.0], [0.0]]) is None


def test_elsewhere_than_in_the_main_thread_it_hears_no_signal() -> None:
    heard: list[int] = []
    before = signal.getsignal(signal.SIGTERM)

    def listen() -> None:
        with StopRequests(0.0, {}) as stop:
            heard.append(stop.code)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert heard == [0]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("agent", [True, False])
def test_only_the_first_rank_says_that_it_stopped(rank: int, agent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exit_codes, "_LAST_OUT_SECONDS", 0.0)
    environ = {"TORCHELASTIC_RUN_ID": "a"} if agent else {}
    expected = exit_codes.STOPPED if rank == 0 and not agent else exit_codes.DONE
    assert exit_codes.of_stop(rank, environ) == expected


def test_what_the_system_refuses_may_pass() -> None:
    import errno

    assert exit_codes.of_system(OSError(errno.ENOSPC, "full")) == exit_codes.IO_ERROR
    assert exit_codes.of_system(OSError("10 requested and 3 written")) == exit_codes.IO_ERROR
    assert exit_codes.of_system(OSError(errno.EACCES, "no")) == exit_codes.USER_ERROR


# Real runs.


def train_and_signal(values: dict[str, Any], at: int | None, rank: int, number: int) -> str | None:
    """Train; the rank gets the signal while it makes the update ``at`` (counted from 1).  What ``train`` returns."""
    from farspan.pretrain.data.loader import Loader

    batch = Loader.batch

    def signalled(self: Loader, step: int) -> Any:
        if step + 1 == at and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), number)
        return batch(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "batch", signalled)
        return train(parse_config(values, "a test"))


def weights_equal(one: Run, other: Run) -> bool:
    ours, theirs = one.weights(), other.weights()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_stops_everywhere_after_the_same_step_and_goes_on(
    layout: str, ranks: Ranks, prepared: Path, tmp_path: Path
) -> None:
    overrides = TINY | LAYOUTS[layout]
    count = ranks_of(settings(prepared, tmp_path, STEPS, overrides))
    for name, at in (("undisturbed", None), ("stopped", 5)):
        values = settings(prepared, tmp_path / name, STEPS, overrides)
        said = ranks.run(train_and_signal, values, at, count - 1, signal.SIGUSR1, count=count)
        assert said == [None if at is None else "SIGUSR1"] * count
    stopped, undisturbed = Run(tmp_path / "stopped"), Run(tmp_path / "undisturbed")
    assert len(stopped.steps()) == 6  # what a rank says after a step all know after the next
    config = parse_config(values, "a test")
    assert progress(config).step == len(stopped.steps()) and not progress(config).done
    assert ranks.run(train_and_signal, values, None, 0, 0, count=count) == [None] * count
    assert progress(config).done
    assert stopped.steps() == undisturbed.steps()
    assert weights_equal(stopped, undisturbed)


def test_a_run_at_its_end_was_not_stopped(ranks: Ranks, prepared: Path, tmp_path: Path) -> None:
    values = settings(prepared, tmp_path / "run", STEPS, TINY)
    assert ranks.run(train_and_signal, values, STEPS, 0, signal.SIGTERM, count=1) == [None]
    assert len(Run(tmp_path / "run").steps()) == STEPS


def train_with_little_time(values: dict[str, Any]) -> str | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_JOB_END_TIME", str(time.time() + 50))
        return train(parse_config(values, "a test"))


def test_with_no_time_left_it_still_makes_some_steps(ranks: Ranks, prepared: Path, tmp_path: Path) -> None:
    """A job that is too short comes to its end all the same."""
    values = settings(prepared, tmp_path / "run", 5, TINY)
    said = [ranks.run(train_with_little_time, values, count=1)[0] for _ in range(3)]
    assert said == ["the end of the job's time", "the end of the job's time", None]


def test_a_run_folder_is_let_by_the_one_and_kept_from_the_other(prepared: Path, tmp_path: Path, ranks: Ranks) -> None:
    """While a run is in its folder, another is refused in one line and changes nothing there."""
    from farspan.pretrain.lease import Lease

    values = settings(prepared, tmp_path / "run", 4, TINY)
    (tmp_path / "run").mkdir()
    lease = Lease.take(tmp_path / "run")
    try:
        before = sorted(path.name for path in (tmp_path / "run").iterdir())
        [said] = ranks.run(train_here, values, count=1)
        assert said is not None and said.startswith(f"{tmp_path / 'run'} is in use by process {os.getpid()} on ")
        assert said.endswith(": wait for its end, or set another run_dir")
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before == ["lease.json"]
    finally:
        lease.release()
    assert ranks.run(train_here, values, count=1) == [None]
    assert not (tmp_path / "run" / "lease.json").exists()
