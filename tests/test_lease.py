"""One run at a time on a folder: the lease of the run folder."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from farspan.pretrain import lease as module
from farspan.pretrain.lease import LEASE, Lease, LeaseLost

ELSEWHERE = {"host": "n7", "pid": 1, "job": "SLURM job 12", "since": "yesterday", "machine": "another boot"}


def held(folder: Path, about: dict[str, Any], age: float = 0.0) -> Path:
    """A lease as another process would have left it, last renewed ``age`` seconds ago."""
    path = folder / LEASE
    path.write_text(json.dumps({"token": "theirs", **about}), encoding="utf-8")
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.05)


def test_it_is_taken_renewed_and_released(tmp_path: Path) -> None:
    lease = Lease.take(tmp_path)
    about = json.loads((tmp_path / LEASE).read_text())
    assert (about["pid"], about["token"]) == (os.getpid(), lease.token)
    os.utime(tmp_path / LEASE, (0, 0))
    time.sleep(0.3)
    assert time.time() - (tmp_path / LEASE).stat().st_mtime < 5
    lease.confirm()
    lease.release()
    assert list(tmp_path.iterdir()) == []


def test_who_holds_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    lease = Lease.take(tmp_path)
    with pytest.raises(ValueError) as refused:
        Lease.take(tmp_path)
    who = rf"process {os.getpid()} on \S+, SLURM job 77, since 20\S+"
    line = rf"{re.escape(str(tmp_path))} is in use by {who}: wait for its end, or set another run_dir"
    assert re.fullmatch(line, str(refused.value))
    assert [path.name for path in tmp_path.iterdir()] == [LEASE]  # nothing of the one that was refused
    lease.release()


def test_of_a_process_that_was_killed_here_it_is_taken_at_once(tmp_path: Path) -> None:
    code = (
        f"import os, pathlib; from farspan.pretrain.lease import Lease; Lease.take(pathlib.Path({str(tmp_path)!r})); "
    )
    subprocess.run([sys.executable, "-P", "-c", code + "os.kill(os.getpid(), 9)"], timeout=60)
    assert (tmp_path / LEASE).exists()
    began = time.monotonic()
    Lease.take(tmp_path).release()
    assert time.monotonic() - began < 2


def test_a_process_number_used_again_is_no_holder(tmp_path: Path) -> None:
    held(tmp_path, {**ELSEWHERE, "machine": module._machine(), "pid": os.getpid(), "started": "1"})
    Lease.take(tmp_path).release()


def test_of_another_host_it_is_taken_when_it_is_old(tmp_path: Path) -> None:
    held(tmp_path, ELSEWHERE, age=100)
    began = time.monotonic()
    Lease.take(tmp_path).release()
    assert time.monotonic() - began < 2


def test_of_another_host_it_is_waited_for(tmp_path: Path) -> None:
    held(tmp_path, ELSEWHERE)
    began = time.monotonic()
    Lease.take(tmp_path, stale_seconds=1.0).release()
    assert 0.5 < time.monotonic() - began < 5


def test_another_host_whose_clock_is_wrong_is_waited_for_no_longer(tmp_path: Path) -> None:
    """A time in the future says nothing: that it does not change does."""
    held(tmp_path, ELSEWHERE, age=-1000)
    Lease.take(tmp_path, stale_seconds=0.5).release()


def test_another_host_that_renews_it_is_left_alone(tmp_path: Path) -> None:
    path = held(tmp_path, ELSEWHERE)
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(ValueError, match="in use by process 1 on n7, SLURM job 12, since yesterday: wait"):
            Lease.take(tmp_path, stale_seconds=3.0)
    finally:
        stop.set()
        thread.join()


def test_who_lost_it_notices(tmp_path: Path) -> None:
    lease = Lease.take(tmp_path)
    held(tmp_path, ELSEWHERE)
    with pytest.raises(LeaseLost, match="was taken over by another process while this one did not answer"):
        lease.confirm()
    lease.release()
    assert json.loads((tmp_path / LEASE).read_text())["token"] == "theirs"  # not ours to remove


def test_the_thread_notices_by_itself(tmp_path: Path) -> None:
    lease = Lease.take(tmp_path)
    (tmp_path / LEASE).unlink()
    time.sleep(0.3)
    with pytest.raises(LeaseLost):
        lease.check()
    lease.release()


def test_what_somebody_wrote_into_it_goes_when_it_is_old(tmp_path: Path) -> None:
    (tmp_path / LEASE).write_text("{")
    Lease.take(tmp_path, stale_seconds=0.3).release()
    (tmp_path / LEASE).write_text("[1]")
    Lease.take(tmp_path, stale_seconds=0.3).release()


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    lease = Lease.take(tmp_path)
    with pytest.raises(ValueError, match="is in use by"):
        Lease.take(tmp_path)
    lease.release()
    assert list(tmp_path.iterdir()) == []


def test_an_error_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError) as refused:
        Lease.take(tmp_path / "none")
    assert refused.value.filename == str(tmp_path / "none")


def compete(folder: str, turns: int, failures: Any) -> None:
    """Take the lease again and again; no other may be inside meanwhile.  Every third time it is left to the others as a
    killed process leaves it."""
    inside = Path(folder) / "inside"
    for turn in range(turns):
        while True:
            try:
                lease = Lease.take(Path(folder), stale_seconds=0.2)
                break
            except ValueError:
                time.sleep(0.001)
        try:
            inside.touch(exist_ok=False)
        except FileExistsError:
            failures.value += 1
        time.sleep(0.002)
        inside.unlink(missing_ok=True)
        if turn % 3 == 0:
            lease._released.set()  # no longer renewed
            about = json.loads(lease.path.read_text()) | {"started": "0"}
            lease.path.write_text(json.dumps(about))
        else:
            lease.release()


def test_of_many_one_has_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    failures = context.Value("i", 0)
    processes = [context.Process(target=compete, args=(str(tmp_path), 20, failures)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert failures.value == 0


def test_the_lease_of_who_was_quicker_is_put_back(tmp_path: Path) -> None:
    """Between seeing that a holder is gone and removing its lease, another process has taken it."""
    path = held(tmp_path, ELSEWHERE, age=100)
    gone = module._Holder.of(path)
    assert gone is not None
    held(tmp_path, {**ELSEWHERE, "token": "of another"})
    module._put_aside(path, gone, tmp_path / "aside")
    assert json.loads(path.read_text())["token"] == "of another"
    assert [found.name for found in tmp_path.iterdir()] == [LEASE]


def test_what_was_cleared_away_of_one_that_stood_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between writing who it is and giving that its name another process has taken the lease, and released it."""
    put, cleared = module._put, []

    def late(mine: Path, path: Path) -> bool:
        if not cleared:
            mine.unlink()
            cleared.append(mine)
        return put(mine, path)

    monkeypatch.setattr(module, "_put", late)
    lease = Lease.take(tmp_path)
    assert json.loads(lease.path.read_text())["token"] == lease.token and cleared
    lease.release()
    assert list(tmp_path.iterdir()) == []


def test_what_killed_processes_left_goes(tmp_path: Path) -> None:
    """Killed while they took it, before or after they wrote who they are; that of one at work stays."""
    here = {**ELSEWHERE, "machine": module._machine()}
    files = {
        "gone": (json.dumps({"token": "a", **here, "pid": os.getpid(), "started": "1"}), 0),
        "empty": ("", 10),
        "old": (json.dumps({"token": "b", **ELSEWHERE}), 100),
        "at work here": (json.dumps({"token": "c", **here, "pid": 1, "started": module._start_time(1)}), 100),
        "at work elsewhere": (json.dumps({"token": "d", **ELSEWHERE}), 9),
    }
    for name, (text, age) in files.items():
        path = tmp_path / f".{LEASE}.{name}"
        path.write_text(text)
        os.utime(path, (time.time() - age,) * 2)
    lease = Lease.take(tmp_path)
    left = {path.name.removeprefix(f".{LEASE}.") for path in tmp_path.glob(f".{LEASE}.*")}
    assert left == {"at work here", "at work elsewhere"}
    lease.release()
