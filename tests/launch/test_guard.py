"""The guard of a rank, beside ranks that do nothing but hang in some way; nothing here imports torch."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
from faults import Member, alive, members, state, until, until_gone

import farspan
from farspan.launch import guard, guard_process, hang_report
from farspan.launch.exit_codes import HUNG
from farspan.launch.guard_process import Guard
from farspan.launch.local import run_ranks

HANG = 0.8  # seconds
PATIENCE = 30.0  # of these tests, with a machine that has other things to do

PRELUDE = """
import ctypes, os, pathlib, signal, subprocess, sys, threading, time
from farspan.launch.guard import Guard
from farspan.pretrain import heartbeat
rank, world, run_dir = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sys.argv[1]
guard = Guard(rank, world)
guard.configure(run_dir=run_dir, hang_seconds={hang}, timeout_seconds={timeout})
alive = heartbeat.current()
def live(seconds=1e6):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        alive.beat()
        time.sleep(0.02)
def hang():
    time.sleep(1e6)
def hold_the_gil():
    c, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    c.pthread_mutex_lock(mutex)
    c.pthread_mutex_lock(mutex)
def mark(name):
    pathlib.Path(run_dir, f"{{name}}-{{rank}}").touch()
"""


def program(script: str, *, hang: float = HANG, timeout: float = 60.0) -> list[str]:
    return [sys.executable, "-c", PRELUDE.format(hang=hang, timeout=timeout) + textwrap.dedent(script)]


class Rank:
    """One rank without a launcher, its output caught as a launcher would."""

    def __init__(self, folder: Path, script: str, *, rank: int = 0, world: int = 1, **limits: float) -> None:
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world)}
        environment.pop("FARSPAN_FAILURE_FILE", None)
        self.folder = folder
        self.process = subprocess.Popen(
            [*program(script, **limits), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    def marked(self, name: str) -> None:
        until(lambda: list(self.folder.glob(f"{name}-*")), PATIENCE)

    def member(self) -> Member:
        """It, with its guard."""
        until(lambda: any(m.guard for m in members(self.process.pid).values()), PATIENCE)
        (found,) = members(self.process.pid).values()
        return found

    def end(self, seconds: float = PATIENCE) -> tuple[int, str]:
        """Its exit code, and what was written to its standard error until nobody held that open."""
        _, error = self.process.communicate(timeout=seconds)
        return self.process.returncode, error


@pytest.fixture
def start(tmp_path):
    started: list[Rank] = []

    def call(script: str, **options: Any) -> Rank:
        started.append(Rank(tmp_path, script, **options))
        return started[-1]

    yield call
    for rank in started:
        if rank.process.poll() is None:
            os.killpg(rank.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.process.communicate(timeout=10.0)


def only_hang(folder: Path) -> Path:
    (found,) = [path for path in (folder / "hangs").iterdir() if not path.name.startswith(".")]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ", found.name)
    return found


def report(folder: Path, rank: int = 0) -> tuple[str, hang_report.Report]:
    text = (only_hang(folder) / f"rank-{rank:05d}.txt").read_text()
    return text, hang_report.from_text(text)


HANGS = {
    "sleeps": ("def in_a_trap():\n    time.sleep(1e6)\n", HUNG, "in in_a_trap", "asleep"),
    "loops": ("def in_a_trap():\n    while True: pass\n", HUNG, "in in_a_trap", "running"),
    "holds the GIL": ("in_a_trap = hold_the_gil\n", -9, "in hold_the_gil", "asleep"),
    "stops": (
        "def in_a_trap():\n    os.kill(os.getpid(), signal.SIGSTOP)\n    hang()\n",
        HUNG,
        "in in_a_trap",
        "stopped",
    ),
}


@pytest.mark.parametrize("how", HANGS)
def test_a_rank_that_hangs_is_reported_and_ended(start, tmp_path, how):
    trap, code, where, state_said = HANGS[how]
    rank = start(trap + "with alive.phase('training'):\n    alive.beat(17)\n    in_a_trap()\n")
    guard = rank.member().guard
    began = time.monotonic()
    ended, error = rank.end()
    assert ended == code
    assert time.monotonic() - began < HANG + 12.0  # SIGKILL comes 5 s after the question
    until_gone([guard], 5.0)
    text, data = report(tmp_path)
    assert where in text and "line " in text and "17 steps done" in text
    assert (data["rank"], data["pid"], data["record"]["phase"]) == (0, rank.process.pid, "training")
    assert HANG <= data["silent_seconds"] < HANG + 3.0
    summary = (only_hang(tmp_path) / "summary.txt").read_text()
    assert summary.startswith(f"the run hangs at rank 0 of 1 ({os.uname().nodename}, pid {rank.process.pid}): ")
    assert state_said in summary
    assert f"farspan: {summary.splitlines()[0]}\n" in error
    assert f"{only_hang(tmp_path)}/summary.txt" in error


def test_all_threads_are_in_the_report(start, tmp_path):
    rank = start("""
        def in_a_thread():
            time.sleep(1e6)
        threading.Thread(target=in_a_thread, daemon=True).start()
        with alive.phase("training"):
            hang()
    """)
    assert rank.end()[0] == HUNG
    text, data = report(tmp_path)
    assert "in in_a_thread" in text and "in hang" in text
    assert "in hang" in data["top"]  # the main thread's


def test_stacks_are_taken_of_a_process_that_goes_on_and_do_not_end_it(start):
    """Stopped anywhere, it goes on for its stacks to be read, and calls functions that are gone a moment later: what
    reads them beside that, as a signal's handler in another thread does, reads freed memory once in some twenty times.
    """
    rank = start("""
        def called(depth):
            space = {}
            exec("def passing(n): return [i for i in range(n)]", space)
            return space["passing"](5), called(depth - 1) if depth else None
        for _ in range(8):
            threading.Thread(target=hang, daemon=True).start()  # they take signals too
        mark("here")
        while True:
            alive.beat()
            called(20)
    """)
    rank.marked("here")
    member = rank.member()
    arguments = json.loads(Path(f"/proc/{member.guard}/cmdline").read_text().split("\0")[-2])
    guard = Guard.__new__(Guard)
    guard.parent = member.pid
    guard.stacks, guard.pipe = (
        os.open(f"/proc/{member.guard}/fd/{arguments[name]}", flags)
        for name, flags in (("stacks", os.O_RDONLY), ("pipe", os.O_WRONLY))
    )
    for _ in range(100):
        member.stop()
        assert "in hang" in (stacks := guard._take_stacks()), "it has ended"
        assert 'File "<string>", line' in hang_report.main_thread(stacks)
    for descriptor in (guard.stacks, guard.pipe):
        os.close(descriptor)
    assert rank.process.poll() is None


def test_signs_of_life_and_a_stop_within_the_limit(start, tmp_path):
    """Ten times the limit, and in the middle it stands still for a part of it."""
    rank = start("""
        mark("lives")
        with alive.phase("training"):
            live(10 * 0.8)
    """)
    rank.marked("lives")
    time.sleep(1.0)
    with rank.member().stopped():
        time.sleep(HANG / 2)
    assert rank.end() == (0, "")
    assert not (tmp_path / "hangs").exists()


@pytest.mark.parametrize(("phase", "code"), [("saving", 0), ("starting", 0), ("evaluating", HUNG)])
def test_each_phase_has_its_limit(start, tmp_path, phase, code):
    rank = start(f"with alive.phase({phase!r}):\n    time.sleep(3.0)\n")
    assert rank.end()[0] == code


def test_a_stopped_rank_gets_no_longer_time_to_save(start, tmp_path):
    rank = start("mark('saves')\nwith alive.phase('saving'):\n    hang()")
    rank.marked("saves")
    rank.member().stop()
    assert rank.end()[0] == HUNG
    assert report(tmp_path)[1]["record"]["phase"] == "saving"
    assert "stopped" in (only_hang(tmp_path) / "summary.txt").read_text()


def test_a_start_that_takes_too_long_is_a_hang(start, tmp_path):
    assert start("time.sleep(60)", hang=0.5, timeout=1.5).end()[0] == HUNG
    assert report(tmp_path)[1]["limit_seconds"] == 1.5


def test_time_in_which_all_stand_still_is_nobodys_silence(start, tmp_path):
    """A job that is suspended: the guard too is stopped."""
    rank = start("mark('lives')\nwith alive.phase('training'): live(7.0)", hang=3.0)
    rank.marked("lives")
    both = rank.member()
    time.sleep(1.0)
    both.stop()
    time.sleep(0.6)  # the guard has seen its last sign of life
    os.kill(both.guard, signal.SIGSTOP)
    time.sleep(4.0)
    os.kill(both.guard, signal.SIGCONT)
    time.sleep(0.1)
    both.go_on()
    assert rank.end() == (0, "")
    assert not (tmp_path / "hangs").exists()


def test_without_a_limit_there_is_no_guard(start, tmp_path):
    rank = start("mark('here')\nalive.beat()\ntime.sleep(1.5)\n", hang=0.0)
    rank.marked("here")
    assert [member.guard for member in members(rank.process.pid).values()] in ([], [None])
    assert rank.end() == (0, "")


# What a guard must not do.


def test_it_does_not_outlive_its_rank(start):
    rank = start("mark('here')\nhang()\n")
    rank.marked("here")
    member = rank.member()
    os.kill(member.guard, signal.SIGSTOP)  # not even so
    member.kill()
    began = time.monotonic()
    assert rank.end()[0] == -9  # whoever waits for the end of the output is not kept waiting
    assert time.monotonic() - began < 5.0
    until_gone([member.guard], 5.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_for_the_whole_job_do_not_end_it(start, tmp_path, number):
    rank = start(f"signal.signal({int(number)}, signal.SIG_IGN)\nmark('here')\nwith alive.phase('training'): hang()")
    rank.marked("here")
    member = rank.member()
    until(lambda: state(member.guard) == "S", PATIENCE)
    time.sleep(0.2)
    os.killpg(rank.process.pid, number)
    os.kill(member.guard, number)  # as from a launcher that signals every process of a job
    assert rank.end()[0] == HUNG
    assert only_hang(tmp_path)


def test_a_clone_of_any_name_has_guards(tmp_path):
    """The package's folder need not be called like the package."""
    root = Path(farspan.__file__).parent
    clone = tmp_path / "my clone"
    for path in (path for part in ("*.py", "launch/*.py", "pretrain/*.py") for path in root.glob(part)):
        (clone / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, clone / path.relative_to(root))
    load = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("farspan", {str(clone / "__init__.py")!r})
sys.modules["farspan"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
"""
    script = load + PRELUDE.format(hang=HANG, timeout=60.0) + "with alive.phase('training'): hang()"
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(command, env=environment, timeout=PATIENCE, check=False).returncode == HUNG
    assert str(clone) in report(tmp_path)[0]


def test_its_end_is_said_and_the_rank_goes_on(start):
    rank = start("mark('here')\nlive(1.0)\nprint('goes on')")
    rank.marked("here")
    os.kill(rank.member().guard, signal.SIGKILL)
    output, error = rank.process.communicate(timeout=PATIENCE)
    assert (rank.process.returncode, output) == (0, "goes on\n")
    assert error == "farspan: the guard of this rank has ended: nobody notices if it hangs\n"


def test_it_is_small(start):
    rank = start("mark('here')\nhang()")
    rank.marked("here")
    guard = rank.member().guard
    until(lambda: state(guard) == "S", PATIENCE)
    time.sleep(0.3)
    own = sum(map(int, re.findall(r"^Private_\w+: +(\d+) kB", Path(f"/proc/{guard}/smaps_rollup").read_text(), re.M)))
    assert 1000 < own < 16_000
    open_files = {os.readlink(path) for path in Path(f"/proc/{guard}/fd").iterdir()}  # noqa: PTH115
    error = os.readlink(f"/proc/{rank.process.pid}/fd/2")  # noqa: PTH115
    output = os.readlink(f"/proc/{rank.process.pid}/fd/1")  # noqa: PTH115
    assert error in open_files and output not in open_files


@pytest.mark.parametrize("what", ["a file", "a pipe"])
def test_where_nothing_can_be_written_the_rank_is_ended_all_the_same(start, tmp_path, what):
    """A folder that cannot be made; and one in which a write waits for ever."""
    rank = start("mark('here')\nwith alive.phase('training'): hang()", hang=4.0)
    rank.marked("here")
    if what == "a file":
        (tmp_path / "hangs").write_text("in the way")
    else:  # the folder is there, as if the guard of another rank had made it
        time.sleep(1.5)  # until the guard has seen that there was none before
        (tmp_path / "hangs/here").mkdir(parents=True)
        writer = f"{socket.gethostname()}-{rank.member().guard}"
        os.mkfifo(tmp_path / f"hangs/here/.rank-00000.txt.{writer}.tmp")
        (tmp_path / "hangs/.claims").mkdir()
        (tmp_path / "hangs/.claims/1").symlink_to("here")
    ended, error = rank.end(60.0)
    assert ended == HUNG
    assert "the run hangs at rank 0 of 1" in error
    assert f"nothing can be written to {tmp_path}/hangs; the main thread's stack:\n  File" in error
    assert "in hang\n" in error


def test_on_a_gpu_the_flight_record_is_kept(tmp_path, monkeypatch):
    """Where CUDA runs, what NCCL recorded; elsewhere nothing is asked for."""
    asked: list[dict[str, bool]] = []

    def dump(**options: bool) -> bytes:
        asked.append(options)
        return b"a record"

    for initialized, files in ((False, []), (True, ["flight-record-3"])):
        bindings = types.SimpleNamespace(_distributed_c10d=types.SimpleNamespace(_dump_nccl_trace=dump))
        cuda = types.SimpleNamespace(is_initialized=lambda initialized=initialized: initialized)
        monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda, _C=bindings))
        guard._write_flight_record(str(tmp_path), 3)
        assert [path.name for path in tmp_path.iterdir()] == files
    assert (tmp_path / "flight-record-3").read_bytes() == b"a record"
    assert asked == [{"includeCollectives": True, "includeStackTraces": False}]
    guard._write_flight_record("", 3)  # there is no folder
    assert len(asked) == 1


# Several ranks.

TOGETHER = """
mark("here")
while len(list(pathlib.Path(run_dir).glob("here-*"))) < world:
    time.sleep(0.01)
time.sleep(0.5)  # every guard has its settings
def waits_with(rank, number):
    slot, name = alive.group("7", "world", list(range(world))), alive.name("all_reduce float32")
    for n in range(1, number + 1):
        alive.begun(slot, n, name, 64)
        if n < number:
            alive.ended(slot, n)
    alive.waits(slot, number, name, 64)
    hang()
"""


@pytest.mark.parametrize("stopped", [0, 2])
def test_of_several_ranks_the_stopped_one_is_named(tmp_path, capfd, stopped):
    """Also where it waits in the same collective as the others; and they all report, end, and are told apart."""
    script = (
        TOGETHER
        + f"""
with alive.phase("training"):
    if rank == {stopped}:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGSTOP)).start()
    waits_with(rank, 5)
"""
    )
    began = time.monotonic()
    assert run_ranks([str(tmp_path)], 3, command=program(script), grace_seconds=20.0) == HUNG
    assert time.monotonic() - began < PATIENCE
    reports = [report(tmp_path, rank)[1] for rank in range(3)]
    assert [r["process"]["state"] == "T" for r in reports] == [rank == stopped for rank in range(3)]
    assert "in waits_with" in report(tmp_path, stopped)[0]
    summary = (only_hang(tmp_path) / "summary.txt").read_text()
    named = re.findall(r"^the run hangs at rank (\d)", summary, re.M)
    assert named == [str(stopped)]
    error = capfd.readouterr().err
    assert f"farspan: the run hangs at rank {stopped} of 3" in error
    assert f"farspan: the run hung, its guards ended it (exit code {HUNG}): {only_hang(tmp_path)}/summary.txt" in error
    assert "memory" not in error
    assert not any(alive(r["pid"]) for r in reports)


def test_the_rank_that_did_not_come_is_named(tmp_path, capfd):
    """It holds the GIL, so that it is killed: to the launcher it is a hang all the same."""
    script = (
        TOGETHER
        + """
def elsewhere():
    hold_the_gil()
with alive.phase("training"):
    alive.group("7", "world", list(range(world)))
    if rank == 1:
        elsewhere()
    waits_with(rank, 5)
"""
    )
    assert run_ranks([str(tmp_path)], 3, command=program(script), grace_seconds=20.0) == HUNG
    summary = (only_hang(tmp_path) / "summary.txt").read_text()
    first, *_, last = summary.splitlines()
    assert first.startswith("the run hangs at rank 1 of 3") and "outside of any collective" in first
    assert "in hold_the_gil" in first
    assert last.startswith("rank 2 of 3") and last.endswith("; waits for rank 1")
    error = capfd.readouterr().err
    assert f"farspan: the run hung, its guards ended it (exit code {HUNG})" in error
    assert "exited with code" not in error and "memory" not in error


def test_a_second_hang_of_a_run_has_a_folder_of_its_own(tmp_path):
    script = TOGETHER + "with alive.phase('training'): hang()"
    for count in (1, 2):
        assert run_ranks([str(tmp_path)], 2, command=program(script)) == HUNG
        folders = [path for path in (tmp_path / "hangs").iterdir() if not path.name.startswith(".")]
        assert len(folders) == count
        assert all(
            {p.name for p in f.iterdir()} == {"rank-00000.txt", "rank-00001.txt", "summary.txt"} for f in folders
        )
        for path in tmp_path.glob("here-*"):
            path.unlink()
        time.sleep(1.0)  # the names have seconds


# The finding, without processes.


def made(rank: int, *, waits: tuple[str, int] | None = None, begun: dict[str, int] | None = None, **said: Any) -> Any:
    groups = {"all": [0, 1, 2, 3], "0>1": [0, 1], "low": [0, 1], "high": [2, 3]}
    counts = {**(begun or {}), **({waits[0]: waits[1]} if waits else {})}
    record = {
        "phase": "training",
        "step": said.get("step", 7),
        "groups": {
            k: {"key": k, "name": "g", "ranks": groups[k], "begun": n, "ended": n - 1} for k, n in counts.items()
        },
        "last": None,
    }
    if waits:
        last = {
            "group": waits[0],
            "number": waits[1],
            "name": "all_reduce",
            "elements": 4,
            "waiting": True,
            "seconds": 1,
        }
        record["last"] = last
    process = {"state": said.get("state", "S"), "threads": []}
    return {"rank": rank, "world": 4, "host": "n", "pid": rank, "process": process, "record": record, "top": None,
            "silent_seconds": 1.0}  # fmt: skip


def found(*reports: Any) -> list[int]:
    return sorted(hang_report.culprits({r["rank"]: r for r in reports}, 4))


def test_who_is_named() -> None:
    wait_all = [made(rank, waits=("all", 9)) for rank in range(4)]
    assert found(*wait_all) == [0, 1, 2, 3]  # all have come: nobody of them is late
    assert found(*wait_all[:3], made(3, begun={"all": 8})) == [3]
    assert found(*wait_all[:3]) == [3]  # no report
    assert found(*wait_all[:3], made(3, waits=("all", 9), state="T")) == [3]
    assert found(*wait_all[:2], made(2, begun={"all": 8}), made(3, waits=("all", 9), state="T")) == [3]
    assert found(*wait_all[:3], made(3, waits=("all", 9), state="D")) == [3]
    # 0 and 1 wait for 2, which waits for 3, which has not come to the others: the one that all depend on.
    low = [made(rank, waits=("all", 9), begun={"low": 4}) for rank in (0, 1)]
    chain = [made(2, waits=("high", 5), begun={"all": 8}), made(3, begun={"all": 8, "high": 4})]
    assert found(*low, *chain) == [3]
    # A message that was not sent.
    assert found(made(0, begun={"all": 8}), made(1, waits=("0>1", 3), begun={"all": 8}), *wait_all[2:]) == [0]
    # All outside, as on a GPU, where a collective that was launched is over for the rank: one has launched fewer.
    launched = [made(rank, begun={"all": 9}) for rank in range(3)]
    assert found(*launched, made(3, begun={"all": 8})) == [3]
    assert found(*launched, made(3, begun={"all": 9})) == [0, 1, 2, 3]
    # In two collectives at once: they wait for each other.
    assert found(*low, *[made(r, waits=("high", 5), begun={"all": 8}) for r in (2, 3)]) == [2, 3]


def test_no_rank_ends_before_it_is_written_who_holds_up_whom(tmp_path):
    """The end of one rank may end the others, and the guard that is about to write it."""
    guard = Guard.__new__(Guard)
    guard.rank, guard.world, guard.folder = 1, 2, tmp_path
    said: list[str] = []
    guard._say = said.append  # type: ignore[method-assign]
    reports = {0: made(0) | {"host": "n0"}, 1: made(1, state="T")}
    ending = threading.Thread(target=guard._hear, args=(reports[1],), daemon=True)
    ending.start()
    ending.join(0.5)
    assert ending.is_alive()
    (tmp_path / "summary.txt").write_text(hang_report.summary(reports, 2))
    ending.join(PATIENCE)
    assert not ending.is_alive()
    assert said == ["rank 1 of 4 (n, pid 1) holds up the others, stopped (by a signal: SIGSTOP, or one like it)\n"]


def test_what_a_summary_says_of_a_rank() -> None:
    reports = {rank: made(rank, begun={"all": 8}, state="T" if rank in (1, 11) else "S") for rank in range(12)}
    text = hang_report.summary(reports, 12)
    stopped = hang_report.STATES["T"]
    assert [hang_report.said_of(rank, text) for rank in (1, 11, 0, 2)] == [stopped, stopped, None, None]
    missing = hang_report.summary({0: made(0)}, 2)
    assert hang_report.said_of(1, missing) == "no report of it: its process, its guard or its node is gone"
    assert hang_report.said_of(0, "") is None


def test_of_many_ranks_one_reads_the_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others list the folder, and read nothing but who holds up whom."""
    for rank in (1, 2):
        about = {"no_stacks": "", "limit_seconds": 1.0, "time": "", "stacks": ""}
        (tmp_path / f"rank-{rank:05d}.txt").write_text(hang_report.to_text(made(rank) | about))
    (tmp_path / ".rank-00000.txt.tmp").write_text("half of a rep")
    guard = Guard.__new__(Guard)
    guard.rank, guard.world, guard.folder = 2, 3, tmp_path
    began = time.monotonic()
    assert guard._wait_for_reports(3, began + 0.5) == {1, 2} and time.monotonic() - began >= 0.5
    assert guard._wait_for_reports(2, began + PATIENCE) == {1, 2}
    assert {rank: one["pid"] for rank, one in guard._read({1, 2}).items()} == {1: 1, 2: 2}
    (tmp_path / "rank-00000.txt").write_text("no report")
    assert guard._wait_for_reports(3, began + PATIENCE) == {0, 1, 2} and set(guard._read({0, 1, 2})) == {1, 2}
    monkeypatch.setattr(guard_process, "_WRITE_SECONDS", 0.3)
    assert not guard._hear(made(2)), "the one that was to write it is gone"
    listings = iter([["rank-00001.txt"], ["rank-00000.txt"]])
    monkeypatch.setattr(guard, "_names", lambda: next(listings, []))  # a file system that then says nothing
    assert guard._wait_for_reports(3, time.monotonic() + 0.5) == {0, 1}
    guard.folder = None
    assert guard._wait_for_reports(3, began + PATIENCE) == set()
