"""The guard: a small process beside a rank, that ends it, and says why, when it gives no sign of life for too long.

It reads the rank's record (``pretrain.heartbeat``) and /proc, and must work where nothing else does: it imports the
standard library alone, waits for no file system, and is killed by the kernel when its rank ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..pretrain.heartbeat import Record
from . import endings, hang_report
from .environment import FAILURE_FILE, HUNG_SUFFIX
from .exit_codes import HUNG
from .hang_report import Report

STACKS_SIGNAL = signal.SIGRTMIN + 3  # nobody else's, we hope: SIGUSR1 asks to save, schedulers send SIGUSR2
ASK_STACKS, ASK_END = "stacks", "end"  # what the thread in the rank is asked, a line each; the end with a folder
FOLDER = "hangs"
_SUMMARY, _REPORT = "summary.txt", re.compile(r"rank-(\d+)\.txt")
_CLAIMS = ".claims"  # in it: 1, 2, ... for the run's first hang, its second, ...
PATIENCE_SECONDS = 15.0  # for the reports of other ranks,
_PATIENCE_FOR_EACH = 0.02  # and of a thousand more
_LIMIT_SECONDS = 1800.0  # until the configuration has been read
_POLL_SECONDS = 1.0
_WRITE_SECONDS = 10.0  # that a file system gets
_ASKED_SECONDS = 2.0  # that the thread in the rank gets, which waits for the interpreter's lock
_STACKS_SECONDS = 3.0  # that the signal gets
_END_SECONDS = 5.0  # that a rank gets to end by itself


class Guard:
    """``rank``, ``world``: as launchers count.  ``parent``: the rank's process.  Descriptors: of the record, of what
    faulthandler writes to, and of a pipe to the thread in the rank that ends it."""

    def __init__(self, rank: int, world: int, parent: int, record: int, stacks: int, pipe: int) -> None:
        self.rank, self.world, self.parent = rank, world, parent
        self.record, self.stacks, self.pipe = Record(record), stacks, pipe
        self.settings: dict[str, Any] = {}
        self.silent = 0.0
        self.folder: Path | None = None  # of this hang
        self._claims: int | None = None  # hangs of this run until now

    def run(self) -> None:
        self.watch()
        try:
            self.report()
        finally:
            self.end()

    # Watching.

    def watch(self) -> None:
        """Return when the rank has been silent for too long, or the guard of another one says so of its own.

        Time in which this process does not run either (a job that is suspended, a machine that is frozen) is not the
        rank's silence: of each look no more counts than it was to last.
        """
        beats, last = self.record.beats, time.monotonic()
        while True:
            pause = min(_POLL_SECONDS, self.limit / 20)
            time.sleep(pause)
            now = time.monotonic()
            passed, last = min(now - last, 2 * pause), now
            self.silent = self.silent + passed if self.record.beats == beats else 0.0
            beats = self.record.beats
            self._read_settings()
            if self.silent >= self.limit:
                return
            if self.silent >= self.hang_seconds and about_process(self.parent)["state"] in hang_report.STOPPED:
                return  # in any phase
            if self.silent >= min(self.limit, self.hang_seconds) / 2 and self._others_claim():
                return

    @property
    def hang_seconds(self) -> float:
        return float(self.settings.get("hang_seconds", _LIMIT_SECONDS))

    @property
    def limit(self) -> float:
        """Of the phase in which the rank is."""
        if self.record.phase in ("training", "evaluating"):
            return self.hang_seconds
        return float(self.settings.get("timeout_seconds", _LIMIT_SECONDS))

    @property
    def hangs(self) -> Path | None:
        """Where hangs of this run are written."""
        return Path(self.settings["run_dir"]) / FOLDER if "run_dir" in self.settings else None

    def _read_settings(self) -> None:
        if self.settings:
            return
        self.settings = self.record.settings()
        hangs = self.hangs
        if hangs is not None:
            self._claims = within(_WRITE_SECONDS, lambda: len(list((hangs / _CLAIMS).glob("*"))))

    # All guards of a run write to the same folder: the first makes a link to it whose name all can tell beforehand.

    @property
    def _claim(self) -> Path | None:
        return None if self.hangs is None or self._claims is None else self.hangs / _CLAIMS / str(self._claims + 1)

    def _others_claim(self) -> bool:
        claim = self._claim
        there = claim is not None and within(1.0, lambda: claim.is_symlink())
        if there is None:  # a file system that does not answer is not asked again
            self._claims = None
        return bool(there)

    def _make_folder(self) -> Path | None:
        if self.hangs is None:
            return None
        self.hangs.mkdir(parents=True, exist_ok=True)
        name = time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())
        if self._claim is not None:
            with contextlib.suppress(OSError):  # it is there, or the file system has no links
                self._claim.parent.mkdir(exist_ok=True)
                self._claim.symlink_to(name)
            with contextlib.suppress(OSError):
                name = str(self._claim.readlink())
        folder = self.hangs / name
        folder.mkdir(exist_ok=True)
        return folder

    # Reporting.

    def report(self) -> None:
        """Write this rank's report, wait for the others', say who is to blame."""
        silent, limit, process = self.silent, self.limit, about_process(self.parent)
        record = self.record.state()
        self.folder = within(_WRITE_SECONDS, self._make_folder)
        patience = PATIENCE_SECONDS + self.world * _PATIENCE_FOR_EACH
        end = time.monotonic() + patience
        if process["state"] in hang_report.STOPPED:
            # It would go on for a moment, and others with it: their stacks come first.
            self._wait_for_reports(self.world - 1, time.monotonic() + patience / 3)
        stacks = self._take_stacks()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.parent, signal.SIGSTOP)  # nothing is to change, and nobody to fail before all have reported
        mine: Report = {
            "rank": self.rank,
            "world": self.world,
            "host": socket.gethostname(),
            "pid": self.parent,
            "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "silent_seconds": silent,
            "limit_seconds": limit,
            "process": process,
            "record": record,
            "stacks": stacks,
            "no_stacks": "the process does not answer a signal",
            "top": hang_report.top_of(stacks),
        }
        folder = self.folder
        if folder is not None:
            written = within(_WRITE_SECONDS, lambda: _write(_file(folder, self.rank), hang_report.to_text(mine)))
            self.folder = folder if written else None
        there = self._wait_for_reports(self.world, end)
        # One reads them all, and says who holds up whom: a thousand would keep a file system busy for minutes.
        first = self.folder is None or self.rank == min(there | {self.rank})
        if first or not self._hear(mine):
            self._conclude(self._read(there) | {self.rank: mine}, mine)
        if note := os.environ.get(FAILURE_FILE):
            within(1.0, lambda: Path(note + HUNG_SUFFIX).write_text(str(self.folder or "")))
        said = f"no sign of life for {silent:.0f} s" + ("" if self.folder is None else f", see {self.folder}")
        within(1.0, lambda: endings.note(HUNG, message=said, environ=os.environ | {"RANK": str(self.rank)}))

    def _conclude(self, reports: dict[int, Report], mine: Report) -> None:
        """Say who holds up whom."""
        text, folder = hang_report.summary(reports, self.world), self.folder
        if folder is None:  # all that is left is to say it
            text += f"nothing can be written to {self.hangs}; the main thread's stack:\n"
            text += hang_report.main_thread(mine["stacks"])
        elif within(_WRITE_SECONDS, lambda: _write(folder / _SUMMARY, text)):
            text = text.split("\n\n")[0] + f"\nstacks and last collectives of all ranks: {folder / _SUMMARY}\n"
        self._say(text)

    def _hear(self, mine: Report) -> bool:
        """Wait until another guard has written who holds up whom, for the end of this rank may be the end of all; say
        it where it is this one.  Whether it was written."""
        assert self.folder is not None
        file, end = self.folder / _SUMMARY, time.monotonic() + _WRITE_SECONDS + self.world * _PATIENCE_FOR_EACH
        while _SUMMARY not in self._names():
            if time.monotonic() >= end:
                return False
            time.sleep(self._pause)
        text = within(_WRITE_SECONDS, lambda: _text_of(file))
        why = hang_report.said_of(self.rank, text or "")
        if why is not None:
            self._say(f"{hang_report.who(mine)} holds up the others, {why}\n")
        return bool(text)

    def _say(self, text: str) -> None:
        _say(f"farspan: {text}" if self.rank == 0 else f"farspan: [rank {self.rank}] {text}")

    def _wait_for_reports(self, count: int, end: float) -> set[int]:
        """The ranks that have reported, once there are so many or the time is over."""
        there: set[int] = set()  # what was seen stays: a listing may fail
        while self.folder is not None:
            there |= {int(match[1]) for name in self._names() if (match := _REPORT.fullmatch(name)) is not None}
            if len(there) >= count or time.monotonic() >= end:
                break
            time.sleep(self._pause)
        return there

    def _names(self) -> list[str]:
        """In the folder of the reports, listed: a network file system goes on saying of a name that it is not there."""
        assert self.folder is not None
        folder = self.folder
        return within(_WRITE_SECONDS, lambda: [path.name for path in folder.iterdir()]) or []

    @property
    def _pause(self) -> float:
        return 0.1 + self.world / 2000

    def _read(self, ranks: set[int]) -> dict[int, Report]:
        reports: dict[int, Report] = {}
        for rank in sorted(ranks):
            assert self.folder is not None, "ranks have reported to it"
            file = _file(self.folder, rank)
            text = within(_WRITE_SECONDS, lambda file=file: _text_of(file))  # type: ignore[misc]
            if text is None:
                break  # the file system does not answer: not ten seconds for each of a thousand
            with contextlib.suppress(ValueError):
                reports[rank] = hang_report.from_text(text)
        return reports

    def _take_stacks(self) -> str:
        """All threads' stacks in the rank; a stopped process must go on for that.

        From the thread in it, and where that does not come to run, from a signal: whoever has the interpreter's lock is
        stuck with it then, and its frames do not change while the signal's handler reads them.
        """
        before = os.fstat(self.stacks).st_size
        try:
            self._ask(ASK_STACKS)
            os.kill(self.parent, signal.SIGCONT)
            if not self._written(before, _ASKED_SECONDS):
                os.kill(self.parent, STACKS_SIGNAL)
                self._written(before, _STACKS_SECONDS)
        except ProcessLookupError:
            return ""
        return os.pread(self.stacks, os.fstat(self.stacks).st_size - before, before).decode(errors="replace")

    def _written(self, before: int, seconds: float) -> bool:
        """Wait until stacks have been written whole; whether there are any."""
        size, end = before, time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.05)
            now = os.fstat(self.stacks).st_size
            if now > before and now == size:
                return True
            size = now
        return size > before

    def _ask(self, *words: str) -> None:
        """The thread in the rank; one that is gone needs nothing any more."""
        with contextlib.suppress(OSError):
            os.write(self.pipe, " ".join(words).encode() + b"\n")

    # The end.

    def end(self) -> None:
        """End the rank: by the thread in it, with the exit code that says why; by SIGKILL if that does not come."""
        self._ask(ASK_END, str(self.folder or ""))
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.parent, signal.SIGCONT)
            time.sleep(_END_SECONDS)  # its end is ours
            os.kill(self.parent, signal.SIGKILL)
        time.sleep(_END_SECONDS)
        os._exit(HUNG)


def within(seconds: float, action: Callable[[], Any]) -> Any:
    """What ``action`` returns; None where that is an error of the system, or does not come in time: a file system that
    does not answer may be why a rank hangs."""
    results: list[Any] = []

    def act() -> None:
        with contextlib.suppress(OSError, ValueError):
            results.append(action())

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def about_process(pid: int) -> dict[str, Any]:
    """State of a process, and its threads in words, those alike as one, as /proc says them."""
    threads, state = Counter[str](), "Z"
    for task in sorted(Path(f"/proc/{pid}/task").glob("*"), key=lambda path: int(path.name)):
        with contextlib.suppress(OSError):
            head, _, rest = (task / "stat").read_text(errors="replace").rpartition(") ")
            letter, name = rest.split()[0], head.partition("(")[2]
            state = letter if int(task.name) == pid else state
            threads[f"{name}: {hang_report.STATES.get(letter, letter)}, {_kernel_function(task)}"] += 1
    return {"state": state, "threads": [f"{count} {thread}" for thread, count in threads.items()]}


def _kernel_function(task: Path) -> str:
    with contextlib.suppress(OSError):
        return (task / "wchan").read_text().strip() or "-"
    return "-"


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.txt"


def _text_of(file: Path) -> str:
    """Empty where there is none yet."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _write(path: Path, text: str) -> bool:
    """Whole or not at all."""
    beside = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    return True


def _say(text: str) -> None:
    """On the rank's standard error, if somebody reads it: no more than a pipe takes at once."""
    ready = select.poll()
    ready.register(2, select.POLLOUT)
    if ready.poll(2000):
        with contextlib.suppress(OSError):
            os.write(2, text.encode()[:4096])


def main() -> None:
    arguments = json.loads(sys.argv[1])
    # Signals that are meant for a whole job reach this process too: it ends with its rank, and not before.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    Guard(**arguments).run()
