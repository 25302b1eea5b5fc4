"""What keeps a launcher going: signals to ranks, starts again, an end.  The launchers here are small programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from farspan.launch.launchers.processes import environment_of, kill_all, ranks_below

# Supervises programs that stand in for torchrun: `start-N.py` is start number N, the last one stays.
SUPERVISOR = """
import pathlib, sys
from farspan.launch.launchers.supervise import Launcher, Limits, supervise
from farspan.launch.progress import Progress

folder = pathlib.Path(sys.argv[1])

def progress():
    path = folder / "step"
    return Progress(int(path.read_text()) if path.exists() else 0, 10)

def command(start):
    programs = sorted(folder.glob("start-*.py"))
    return [sys.executable, str(programs[min(start, len(programs) - 1)])]

limits = Limits(fruitless=int(sys.argv[2]), first_pause=0.05, longest_pause=0.2, margin_seconds=5)
sys.exit(supervise(Launcher("agent", command, tells_codes=False), progress, limits, run_dir=folder / "run"))
"""
# An agent with a rank of its own, in a session of its own as torchrun starts them.
AGENT = """
import os, pathlib, signal, subprocess, sys, time
folder = pathlib.Path(__file__).parent
def start():
    environ = {**os.environ, "RANK": "0"}
    return subprocess.Popen([sys.executable, "-c", RANK], env=environ, cwd=folder, start_new_session=True)
rank = start()
signal.signal(signal.SIGTERM, lambda *_: (rank.kill(), os._exit(9)))
"""


class Supervised:
    def __init__(self, folder: Path, *programs: str, fruitless: int = 3) -> None:
        self.folder = folder
        for number, program in enumerate(programs):
            (folder / f"start-{number}.py").write_text(textwrap.dedent(program))
        with (folder / "error").open("w") as error:  # not a pipe, which ranks that are left would keep open
            words = [sys.executable, "-P", "-c", SUPERVISOR, str(folder), str(fruitless)]
            self.process = subprocess.Popen(words, stderr=error)

    def wait_for(self, name: str) -> str:
        end = time.monotonic() + 60
        while not (self.folder / name).exists():
            assert time.monotonic() < end and self.process.poll() is None, (self.folder / "error").read_text()
            time.sleep(0.02)
        return (self.folder / name).read_text()

    def finish(self) -> tuple[int, str]:
        return self.process.wait(timeout=120), (self.folder / "error").read_text()

    def told(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in (self.folder / "run/restarts.jsonl").read_text().splitlines()]


def agent(rank: str, then: str) -> str:
    return f"RANK = {textwrap.dedent(rank)!r}\n{AGENT}\n{textwrap.dedent(then)}"


# Waits for a signal, saves, ends.
SAVES = """
import os, pathlib, signal, time
def stop(number, _):
    pathlib.Path("step").write_text("5")
    pathlib.Path("heard").write_text(signal.Signals(number).name)
    os._exit(0)
signal.signal(signal.SIGTERM, stop), signal.signal(signal.SIGUSR1, stop)
pathlib.Path("pid.new").write_text(str(os.getpid())), os.rename("pid.new", "pid")
time.sleep(100)
"""
DIES = "import os; open('step', 'w').write('{}'); os._exit(1)"


def is_running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_started_again_until_done(tmp_path: Path) -> None:
    first = "open(__file__.replace('start-0.py', 'step'), 'w').write('4'); import sys; sys.exit(3)"
    last = "open(__file__.replace('start-1.py', 'step'), 'w').write('10')"
    run = Supervised(tmp_path, first, last)
    code, error = run.finish()
    assert code == 0
    assert "agent ended with exit code 3 at step 4 of 10: started again in 0.05 s" in error
    assert [(line["event"], line["step"]) for line in run.told()] == [
        ("start", 0), ("end", 4), ("start", 4), ("end", 10),
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_ranks_not_the_agent(tmp_path: Path, number: int) -> None:
    run = Supervised(tmp_path, agent(SAVES, "sys.exit(rank.wait())"))
    run.wait_for("pid")
    run.process.send_signal(number)
    code, _ = run.finish()
    assert code == 75
    assert (tmp_path / "heard").read_text() == signal.Signals(number).name
    assert len(run.told()) == 2


def test_a_signal_before_there_are_ranks_ends_it(tmp_path: Path) -> None:
    program = "import pathlib, time; pathlib.Path(__file__).with_name('up').touch(); time.sleep(100)"
    run = Supervised(tmp_path, program)
    run.wait_for("up")
    began = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    code, _ = run.finish()
    assert code == 128 + signal.SIGTERM and time.monotonic() - began < 30


def test_a_signal_after_the_ranks_have_saved_and_gone(tmp_path: Path) -> None:
    """Another node's signal was first: the agent is about to end by itself, well."""
    rank = "import os; open('step', 'w').write('5'); os._exit(0)"
    then = "rank.wait()\nopen(folder / 'gone', 'w')\nimport time; time.sleep(1)\nsys.exit(0)"
    run = Supervised(tmp_path, agent(rank, then))
    run.wait_for("gone")
    run.process.send_signal(signal.SIGTERM)
    assert run.finish()[0] == 75


def test_ranks_that_an_agent_starts_after_a_signal_are_ended(tmp_path: Path) -> None:
    run = Supervised(tmp_path, agent(SAVES, "rank.wait()\nrank = start()\nsys.exit(rank.wait())"))
    run.wait_for("pid")
    run.process.send_signal(signal.SIGUSR1)
    code, _ = run.finish()
    assert code == 9 and not is_running(int((tmp_path / "pid").read_text()))
    assert len(run.told()) == 2


def test_what_a_killed_agent_leaves_is_ended(tmp_path: Path) -> None:
    killed = agent(SAVES, "while not (folder / 'pid').exists(): time.sleep(0.01)\nos.kill(os.getpid(), signal.SIGKILL)")
    last = "open(__file__.replace('start-1.py', 'step'), 'w').write('10')"
    run = Supervised(tmp_path, killed, last)
    code, error = run.finish()
    assert code == 0 and "exit code 137" in error
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_it_gives_up_where_nothing_comes_of_it(tmp_path: Path) -> None:
    run = Supervised(
        tmp_path, agent("import time; time.sleep(2); raise SystemExit(1)", "sys.exit(rank.wait())"), fruitless=1
    )
    code, error = run.finish()
    assert code == 1 and "2 starts in a row brought no new checkpoint" in error
    assert len(run.told()) == 4


def test_progress_is_a_reason_to_go_on(tmp_path: Path) -> None:
    programs = [agent(DIES.format(step), "rank.wait(); time.sleep(0.5); sys.exit(1)") for step in (3, 6, 9, 10)]
    run = Supervised(tmp_path, *programs, fruitless=0)
    assert run.finish()[0] == 0
    assert [line["step"] for line in run.told() if line["event"] == "start"] == [0, 3, 6, 9]


def test_an_agent_without_ranks_is_tried_again_and_again(tmp_path: Path) -> None:
    """A rendezvous that does not come about: the others may come back."""
    run = Supervised(
        tmp_path, *["raise SystemExit(1)"] * 6, "open(__file__.replace('start-6.py', 'step'), 'w').write('10')"
    )
    assert run.finish()[0] == 0
    assert len(run.told()) == 14


def test_last_words_of_the_users_concern_end_it(tmp_path: Path) -> None:
    rank = """
    import json, os
    path = os.path.join(os.environ["FARSPAN_ENDINGS"], "rank-00000.json")
    said = {"rank": 0, "code": 2, "time": 1.0, "kind": "ValueError", "message": "no such key"}
    open(path, "w").write(json.dumps(said))
    """
    run = Supervised(tmp_path, agent(rank, "time.sleep(100)"))
    code, error = run.finish()
    assert code == 2 and "rank 0 said: no such key" in error
    assert len(run.told()) == 2


def test_the_code_of_an_agent_that_tells_none_is_that_of_its_ranks(tmp_path: Path) -> None:
    rank = """
    import json, os
    path = os.path.join(os.environ["FARSPAN_ENDINGS"], "rank-00000.json")
    open(path, "w").write(json.dumps({"rank": 0, "code": 76, "time": 1.0}))
    """
    run = Supervised(tmp_path, agent(rank, "rank.wait(); sys.exit(1)"), fruitless=0)
    code, error = run.finish()
    assert code == 76 and "brought no new checkpoint (exit code 76): given up" in error
    assert run.told()[-1]["code"] == 76


def test_ctrl_c(tmp_path: Path) -> None:
    run = Supervised(tmp_path, agent(SAVES, "sys.exit(rank.wait())"))
    pid = int(run.wait_for("pid"))
    run.process.send_signal(signal.SIGINT)
    code, _ = run.finish()
    assert code == 130 and not is_running(pid)


def test_the_end_of_the_jobs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARSPAN_JOB_END_TIME", str(time.time() + 3))
    run = Supervised(tmp_path, "open(__file__.replace('start-0.py', 'step'), 'w').write('4')")
    assert run.finish()[0] == 75


def test_a_killed_supervisor_leaves_nothing(tmp_path: Path) -> None:
    run = Supervised(tmp_path, agent(SAVES, "sys.exit(rank.wait())"))
    pid = int(run.wait_for("pid"))
    run.process.kill()
    run.finish()
    end = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(pid)


def test_ranks_and_what_they_start(tmp_path: Path) -> None:
    inner = "import time; open('up', 'w').close(); time.sleep(100)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    environ = {**os.environ, "RANK": "0", "FARSPAN_TEST_MARK": str(tmp_path)}
    middle = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {outer!r}], env={environ!r})"
    parent = subprocess.Popen([sys.executable, "-c", middle], cwd=tmp_path)
    try:
        while not (tmp_path / "up").exists():
            time.sleep(0.02)
        (rank,) = ranks_below(parent.pid)
        assert environment_of(rank)["RANK"] == "0" and ranks_below(rank)
        assert kill_all("FARSPAN_TEST_MARK", str(tmp_path)) == 2
        assert parent.wait(timeout=60) == 0
    finally:
        parent.kill()
        parent.wait()
    assert environment_of(rank) == {} and ranks_below(parent.pid) == []
