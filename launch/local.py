"""Starts the ranks of a run on this machine, watches over them, and leaves none behind."""

from __future__ import annotations

import contextlib
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from .environment import FAILURE_FILE, HUNG_SUFFIX, RankEnvironment, apply
from .exit_codes import HUNG, IO_ERROR, STOPPED, USER_ERROR
from .network import available_cores
from .parent import die_with

# -P: the working directory is no place to import from (it may well hold a folder named like a package).
COMMAND = (sys.executable, "-P", "-m", "farspan.launch.cli")
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_TAIL_BYTES, _TAIL_LINES = 16384, 30
_POLL_SECONDS = 0.02
_PATIENCE_SECONDS = 2.0  # for the rank whose own words explain a failure


def run_ranks(
    arguments: Sequence[str],
    ranks: int,
    *,
    env: Mapping[str, str] | None = None,
    command: Sequence[str] = COMMAND,
    grace_seconds: float = 10.0,
    logs: Path | None = None,
) -> int:
    """Run ``command`` with ``arguments`` as ``ranks`` processes; return the first exit code that is not 0, or 0.

    Each process gets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and its share of
    the cores as OMP_NUM_THREADS unless that is set.  Rank 0 writes straight to this process's output.  Of the others
    the last lines are kept, and shown once if one is the first to fail.  When a rank fails the rest get SIGTERM, and
    SIGKILL ``grace_seconds`` later.  SIGINT, SIGTERM and SIGUSR1 are passed on; a second SIGINT kills.  A rank that a
    signal ended counts as 128 + its number, as in a shell.  If this process itself is killed, so are the ranks
    (Linux).  ``logs``: a folder for a file of each rank, with all that it says.
    """
    if ranks < 1:
        raise ValueError(f"the number of ranks must be at least 1, not {ranks}")
    base = dict(os.environ if env is None else env)
    base.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // ranks)))
    port = free_port()
    received: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, remember) for number in _FORWARDED}
    notes = tempfile.TemporaryDirectory(prefix="farspan-ranks-")
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
    group = _Group(grace_seconds, Path(notes.name), logs)
    try:
        for rank in range(ranks):
            rank_env = dict(base)
            apply(RankEnvironment(rank, rank, ranks, ranks, "127.0.0.1", port), rank_env)
            group.start([*command, *arguments], rank_env)
        while group.running:
            group.watch()
            while received:
                group.forward(received.pop(0))
    finally:
        group.close()
        notes.cleanup()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return group.conclude()


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nothing uses at this moment.

    Below those that systems give to whoever connects (32768 up on Linux, 49152 up by RFC 6335): between this moment and
    the ranks' start, runs beside this one connect thousands of times.
    """
    for port in random.SystemRandom().sample(range(20000, 32768), 100):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    with socket.socket() as listener:  # a crowded machine: whatever the system has
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class _Rank:
    """One process, and the last of what it wrote."""

    def __init__(self, process: subprocess.Popen[bytes], copies: Sequence[BinaryIO]) -> None:
        self.process = process
        self.tail = b""
        self.copies = copies  # files that get all of it

    def read(self) -> bool:
        """Take what is there without waiting; False at the end of the output."""
        assert self.process.stdout is not None
        for _ in range(64):  # not without end: the other ranks want to be looked at too
            try:
                chunk = os.read(self.process.stdout.fileno(), 65536)
            except BlockingIOError:
                return True
            if not chunk:
                return False
            self.tail = (self.tail + chunk)[-_TAIL_BYTES:]
            for file in self.copies:
                with contextlib.suppress(OSError):  # a full disk, a terminal that has gone
                    file.write(chunk)
                    file.flush()
        return True


class _Group:
    """The ranks of one run, from the first start to the last end."""

    def __init__(self, grace_seconds: float, notes: Path, logs: Path | None) -> None:
        self._ranks: list[_Rank] = []
        self._grace, self._notes, self._logs = grace_seconds, notes, logs
        self._selector = selectors.DefaultSelector()
        self._files = contextlib.ExitStack()  # logs
        self._failures: dict[int, float] = {}  # rank -> when it was seen to have failed by itself
        self._culprit: int | None = None  # the rank that failed first
        self._hang: str | None = None  # guards ended the ranks: the folder of what they wrote
        self._interrupted = 0  # SIGINTs passed on
        self._signalled = False
        self._stop_at: float | None = None  # when the ranks that are left get SIGTERM
        self._kill_at: float | None = None
        self.running: set[int] = set()

    def start(self, command: list[str], env: dict[str, str]) -> None:
        rank = len(self._ranks)
        env[FAILURE_FILE] = str(self._notes / str(rank))
        # A group of its own, so that Ctrl-C in the terminal reaches a rank once, through us, and so that whatever a
        # rank started can be ended with it.  Only one thread runs here, which is what preexec_fn asks for.
        options: dict[str, Any] = {"env": env, "stdin": subprocess.DEVNULL, "process_group": 0}
        copies: list[BinaryIO] = [sys.stdout.buffer] if rank == 0 else []
        if self._logs is not None:
            copies.append(self._files.enter_context((self._logs / f"rank-{rank:05d}.log").open("ab")))
        if rank > 0 or self._logs is not None:
            env.setdefault("PYTHONUNBUFFERED", "1")
            options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started = _Rank(subprocess.Popen(command, preexec_fn=die_with(os.getpid()), **options), copies)
        if started.process.stdout is not None:
            os.set_blocking(started.process.stdout.fileno(), False)
            self._selector.register(started.process.stdout, selectors.EVENT_READ, started)
        self._ranks.append(started)
        self.running.add(rank)

    def watch(self) -> None:
        """Look once at every rank, and do what is due."""
        for key, _ in self._selector.select(_POLL_SECONDS):
            if not key.data.read():
                self._selector.unregister(key.fileobj)
        for rank in sorted(self.running):
            code = self._ranks[rank].process.poll()
            if code is not None:
                self._kill_group(rank)  # helpers that it left
                self.running.remove(rank)
                if code != 0 and self._kill_at is None:
                    self._failures[rank] = time.time()
        now = time.monotonic()
        if self._failures and self._culprit is None:
            self._culprit = self._first_to_fail()
            self._stop_at = now + (self._grace if self._signalled else _PATIENCE_SECONDS)
        if self._stop_at is not None and self._is_time_to_stop(now):
            self._stop_at = None
            self._send(signal.SIGTERM)
            self._kill_at = now + self._grace
        if self._kill_at is not None and now >= self._kill_at:
            self.kill()

    def _first_to_fail(self) -> int:
        """By the ranks' own notes, running or not.

        A rank that left none ended a little before it was seen; one that was killed or crashed was no doubt first.
        An abort may be NCCL's answer to the failure of another.
        """
        times = {rank: seen - 2 * _POLL_SECONDS for rank, seen in self._failures.items()}
        times |= {rank: 0.0 for rank in times if -signal.SIGABRT != self._ranks[rank].process.returncode < 0}
        for note in self._notes.iterdir():
            with contextlib.suppress(ValueError):  # being written
                times[int(note.name)] = float(note.read_text())
        return min(times, key=lambda rank: times[rank])

    def _is_time_to_stop(self, now: float) -> bool:
        assert self._stop_at is not None
        assert self._culprit is not None
        if now >= self._stop_at:
            return True
        if self._signalled:
            return False  # all were told to end: let each of them
        code = self._ranks[self._culprit].process.returncode
        # An error of the user's is mostly found by every rank: rank 0 gets the time to say it itself.
        return code is not None and (code not in (USER_ERROR, IO_ERROR) or 0 not in self.running)

    def forward(self, number: int) -> None:
        self._signalled |= number != signal.SIGUSR1  # which asks for something else than the end
        self._interrupted += number == signal.SIGINT
        if self._interrupted > 1:
            self.kill()
        else:
            self._send(number)

    def _send(self, number: int) -> None:
        # To the rank alone: it knows how to end its own helpers.
        for rank in self.running:
            self._ranks[rank].process.send_signal(number)

    def kill(self) -> None:
        """End at once the ranks that still run, and their helpers."""
        for rank in self.running:
            self._kill_group(rank)

    def _kill_group(self, rank: int) -> None:
        # macOS answers PermissionError for a group of which all have ended.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._ranks[rank].process.pid, signal.SIGKILL)

    def close(self) -> None:
        """After this no process of the group is left."""
        self.kill()
        for rank in self._ranks:
            rank.process.wait()
            if rank.process.stdout is not None:
                rank.read()
                rank.process.stdout.close()
        self._files.close()
        self._selector.close()
        for note in self._notes.glob(f"*{HUNG_SUFFIX}"):
            self._hang = note.read_text() or self._hang or ""

    def conclude(self) -> int:
        """Say which rank failed first and how; return the exit code."""
        if self._culprit is None:
            return 0
        if self._hang is not None:
            where = f": {self._hang}/summary.txt has the stacks" if self._hang else ""
            print(f"farspan: the run hung, its guards ended it (exit code {HUNG}){where}", file=sys.stderr, flush=True)
            return HUNG
        # One that failed but had to be ended has no exit code of its own.
        code = self._ranks[self._culprit].process.returncode if self._culprit in self._failures else 1
        zero_said_it = code in (USER_ERROR, IO_ERROR, STOPPED) and self._ranks[0].process.returncode == code
        if not (self._signalled or zero_said_it):
            print(self._report(self._culprit, code), file=sys.stderr, flush=True)
        return code if code > 0 else 128 - code

    def _report(self, rank: int, code: int) -> str:
        if rank not in self._failures:
            how = "failed and had to be ended"
        elif code > 0:
            how = f"exited with code {code}"
        else:
            how = f"was ended by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                how += " (the system may have run out of memory)"
        report = f"farspan: rank {rank} of {len(self._ranks)} {how}"
        lines = self._ranks[rank].tail.decode(errors="replace").splitlines()[-_TAIL_LINES:]
        if lines:
            report += "; its last lines:\n" + "\n".join(f"[rank {rank}] {line}" for line in lines)
        return report
