from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from farspan.launch.local import free_port, run_ranks

PRELUDE = """
import os, pathlib, signal, subprocess, sys, time
rank, folder = int(os.environ["RANK"]), pathlib.Path(sys.argv[1])
def mark(name, text=""):
    (folder / f"{name}-{rank}.new").write_text(str(text))
    (folder / f"{name}-{rank}.new").rename(folder / f"{name}-{rank}")
def wait_for(*names):
    while not all((folder / name).exists() for name in names):
        time.sleep(0.005)
mark("pid", os.getpid())
"""

HANGS = "wait_for('never')"


def command(script: str) -> list[str]:
    return [sys.executable, "-S", "-c", PRELUDE + textwrap.dedent(script)]


def run(folder: Path, script: str, ranks: int = 3, grace_seconds: float = 5.0) -> int:
    return run_ranks([str(folder)], ranks, command=command(script), grace_seconds=grace_seconds)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def read(folder: Path, name: str, ranks: int = 3) -> list[str]:
    return [(folder / f"{name}-{rank}").read_text() for rank in range(ranks)]


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this should have happened by now"
        time.sleep(0.01)


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("pid*") if path.suffix != ".new"]


def assert_none_left(folder: Path) -> None:
    assert pids(folder)
    until(lambda: not any(alive(pid) for pid in pids(folder)), 5.0)


def test_every_rank_knows_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS"]
    script = f"""
        mark("place", " ".join(os.environ[name] for name in {names}))
        mark("port", os.environ["MASTER_PORT"])
    """
    assert run(tmp_path, script) == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 3)
    assert read(tmp_path, "place") == [f"{rank} {rank} 3 3 127.0.0.1 {threads}" for rank in range(3)]
    assert len(set(read(tmp_path, "port"))) == 1


def test_a_thread_count_that_is_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run(tmp_path, "mark('threads', os.environ['OMP_NUM_THREADS'])", ranks=1) == 0
    assert read(tmp_path, "threads", 1) == ["7"]


def test_a_rank_may_open_many_files() -> None:
    """Shells allow 1,024: shards and connections need more."""
    code = """
import resource
from farspan.launch.training import _allow_open_files
hard = min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
_allow_open_files()
print(resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard))
"""
    ended = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "True\n"


def test_only_rank_0_is_heard_while_all_goes_well(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "print('out', rank); print('err', rank, file=sys.stderr)") == 0
    output = capfd.readouterr()
    assert (output.out, output.err) == ("out 0\n", "err 0\n")


def test_a_rank_that_writes_much_is_not_held_up(tmp_path: Path) -> None:
    assert run(tmp_path, "print('x' * 1_000_000)", ranks=2) == 0


def test_one_rank_dying_ends_all_and_is_shown_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = f"""
        wait_for("pid-0", "pid-1", "pid-2")
        if rank == 1:
            for number in range(100):
                print("line", number)
            print("cannot go on", file=sys.stderr)
            sys.exit(7)
        {HANGS}
    """
    start = time.monotonic()
    assert run(tmp_path, script, grace_seconds=60.0) == 7
    assert time.monotonic() - start < 30  # SIGTERM was enough: no grace period was waited for
    error = capfd.readouterr().err
    assert error.startswith("farspan: rank 1 of 3 exited with code 7; its last lines:\n[rank 1] line 71\n")
    assert error.endswith("[rank 1] line 99\n[rank 1] cannot go on\n")
    assert_none_left(tmp_path)


NOTES = "pathlib.Path(os.environ['FARSPAN_FAILURE_FILE']).write_text(repr(time.time()))"


def test_the_cause_is_shown_even_if_others_end_before_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = f"""
        if rank == 1:
            {NOTES}
            print("the cause")
            mark("failed")
            time.sleep(0.3)  # connections are closed, the interpreter is taken down
            sys.exit(1)
        wait_for("failed-1")
        {NOTES}
        print("connection closed by peer", file=sys.stderr)
        sys.exit(4)
    """
    assert run(tmp_path, script) == 1
    error = capfd.readouterr().err
    assert error == (
        "connection closed by peer\nfarspan: rank 1 of 3 exited with code 1; its last lines:\n[rank 1] the cause\n"
    )


def test_a_cause_that_hangs_is_ended_and_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = f"""
        if rank == 1:
            {NOTES}
            print("the cause")
            mark("failed")
            {HANGS}
        wait_for("failed-1")
        {NOTES}
        sys.exit(4)
    """
    assert run(tmp_path, script) == 1
    assert capfd.readouterr().err == (
        "farspan: rank 1 of 3 failed and had to be ended; its last lines:\n[rank 1] the cause\n"
    )


def test_a_crash_is_the_cause_of_what_the_others_note(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = f"""
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)  # without a note
        wait_for("pid-1")
        stat = pathlib.Path("/proc", (folder / "pid-1").read_text(), "stat")
        while stat.exists() and ") Z " not in stat.read_text():
            time.sleep(0.001)
        {NOTES.replace("time.time()", "time.time() - 10")}  # as if the death were seen late
        sys.exit(1)
    """
    assert run(tmp_path, script) == 128 + signal.SIGKILL
    assert "rank 1 of 3 was ended by SIGKILL" in capfd.readouterr().err


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace_period(tmp_path: Path) -> None:
    script = f"""
        if rank == 1:
            wait_for("ready-0")
            sys.exit(3)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        mark("ready")
        {HANGS}
    """
    assert run(tmp_path, script, ranks=2, grace_seconds=0.3) == 3
    assert_none_left(tmp_path)


def test_a_killed_rank_is_named_with_its_signal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = f"""
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        {HANGS}
    """
    assert run(tmp_path, script) == 128 + signal.SIGKILL
    assert "rank 2 of 3 was ended by SIGKILL (the system may have run out of memory)" in capfd.readouterr().err


def test_an_error_that_all_ranks_find_is_said_by_rank_0_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = """
        if rank == 0:
            wait_for("said-1", "said-2")
            time.sleep(0.3)  # the others are seen to have failed first
        print("farspan: rank", rank, "does not like it", file=sys.stderr, flush=True)
        mark("said")
        sys.exit(2)
    """
    assert run(tmp_path, script) == 2
    assert capfd.readouterr().err == "farspan: rank 0 does not like it\n"


def test_an_error_that_rank_0_does_not_find_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = f"""
        if rank == 1:
            print("farspan: no such file", file=sys.stderr)
            sys.exit(2)
        {HANGS}
    """
    assert run(tmp_path, script, ranks=2) == 2
    error = capfd.readouterr().err
    assert error == "farspan: rank 1 of 2 exited with code 2; its last lines:\n[rank 1] farspan: no such file\n"


def test_what_the_ranks_do_when_told_to_end_is_not_a_cause(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = f"""
        if rank == 2:
            wait_for("ready-0", "ready-1")
            sys.exit(6)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
        mark("ready")
        {HANGS}
    """
    assert run(tmp_path, script) == 6
    assert "rank 2 of 3 exited with code 6" in capfd.readouterr().err


def test_helpers_of_a_rank_do_not_outlive_it(tmp_path: Path) -> None:
    script = """
        helper = subprocess.Popen(["sleep", "600"])
        mark("pid-helper", helper.pid)
    """
    assert run(tmp_path, script, ranks=2) == 0
    assert (tmp_path / "pid-helper-1").exists()
    assert_none_left(tmp_path)


def test_a_command_that_does_not_exist_leaves_nothing(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background
    with pytest.raises(FileNotFoundError):
        run_ranks([], 2, command=[str(tmp_path / "missing")])
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def start_driver(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Starts a process that calls run_ranks, as the command line does, and can be sent signals."""
    started: list[subprocess.Popen[bytes]] = []

    def start(script: str) -> subprocess.Popen[bytes]:
        code = f"""if True:
            import sys
            from farspan.launch.local import run_ranks
            sys.exit(run_ranks([{str(tmp_path)!r}], 3, command={command(script)!r}))
        """
        env = os.environ | {"TMPDIR": str(tmp_path)}
        started.append(subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, env=env))
        until(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in range(3)))
        return started[-1]

    yield start
    for driver in started:
        if driver.poll() is None:
            driver.kill()
    for pid in pids(tmp_path):  # where a test failed
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    for driver in started:
        driver.communicate()


SAVES_ON_SIGTERM = f"""
    def save(number, frame):
        time.sleep(0.2)
        mark("saved")
        sys.exit(0)
    signal.signal(signal.SIGTERM, save)
    mark("ready")
    {HANGS}
"""


def test_sigterm_is_passed_on_and_the_ranks_may_finish(tmp_path: Path, start_driver) -> None:  # type: ignore[no-untyped-def]
    driver = start_driver(SAVES_ON_SIGTERM)
    driver.send_signal(signal.SIGTERM)
    _, error = driver.communicate(timeout=20)
    assert driver.returncode == 0
    assert error == b""
    assert read(tmp_path, "saved") == ["", "", ""]
    assert_none_left(tmp_path)


def test_an_interrupt_is_passed_on_without_a_report(tmp_path: Path, start_driver) -> None:  # type: ignore[no-untyped-def]
    script = f"""
        mark("ready")
        try:
            {HANGS}
        except KeyboardInterrupt:
            mark("interrupted")
            sys.exit(130)
    """
    driver = start_driver(script)
    driver.send_signal(signal.SIGINT)
    _, error = driver.communicate(timeout=20)
    assert driver.returncode == 130
    assert error == b""
    assert read(tmp_path, "interrupted") == ["", "", ""]
    assert_none_left(tmp_path)


def test_a_rank_that_ends_first_does_not_cut_the_others_short(tmp_path: Path, start_driver) -> None:  # type: ignore[no-untyped-def]
    script = f"""
        mark("ready")
        try:
            {HANGS}
        except KeyboardInterrupt:
            if rank == 0:
                wait_for("interrupted-1", "interrupted-2")
                time.sleep(0.3)
            mark("interrupted")
            sys.exit(130)
    """
    driver = start_driver(script)
    driver.send_signal(signal.SIGINT)
    driver.communicate(timeout=20)
    assert driver.returncode == 130
    assert read(tmp_path, "interrupted") == ["", "", ""]


def test_a_second_interrupt_kills(tmp_path: Path, start_driver) -> None:  # type: ignore[no-untyped-def]
    script = f"""
        signal.signal(signal.SIGINT, lambda *_: mark("heard"))
        mark("ready")
        {HANGS}
    """
    driver = start_driver(script)
    driver.send_signal(signal.SIGINT)
    until(lambda: all((tmp_path / f"heard-{rank}").exists() for rank in range(3)))
    driver.send_signal(signal.SIGINT)
    driver.communicate(timeout=20)
    assert driver.returncode == 128 + signal.SIGKILL
    assert_none_left(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_ranks_do_not_outlive_a_killed_parent(tmp_path: Path, start_driver) -> None:  # type: ignore[no-untyped-def]
    driver = start_driver(f"mark('ready'); {HANGS}")
    driver.kill()
    driver.wait()
    assert_none_left(tmp_path)


def test_no_ranks_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        run_ranks([], 0)


def test_free_ports_are_free_and_not_those_of_whoever_connects() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        ports = {free_port() for _ in range(50)}
    assert len(ports) > 40 and all(20000 <= port < 32768 for port in ports)


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        used = taken.getsockname()[1]
        monkeypatch.setattr(random.SystemRandom, "sample", lambda self, population, k: [used])
        assert free_port() != used  # and where all that were drawn are in use, the system says
