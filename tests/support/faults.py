"""What befalls the ranks of a run: stopped, continued, slowed down, killed.  Finds them from outside, as a cluster
sees them: by their processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Member:
    """A rank of a run: its process, and that of its guard where it has one yet."""

    rank: int
    pid: int
    guard: int | None

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """While the block lasts."""
        self.stop()
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                self.go_on()

    @contextlib.contextmanager
    def slowed(self, stopped_seconds: float, running_seconds: float) -> Iterator[None]:
        """While the block lasts it is stopped now and again."""
        over = threading.Event()

        def pulse() -> None:
            with contextlib.suppress(ProcessLookupError):
                while not over.is_set():
                    with self.stopped():
                        time.sleep(stopped_seconds)
                    over.wait(running_seconds)

        thread = threading.Thread(target=pulse, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def members(*roots: int) -> dict[int, Member]:
    """The ranks among these processes (a launcher's, or ranks') and all that they started, by rank."""
    found: dict[int, Member] = {}
    guards = {}
    pids = list(_family(roots))
    for pid in pids:
        if (about := _guarded_by(pid)) is not None:
            guards[about["parent"]] = pid, about["rank"]
    for pid in pids:
        if pid in guards:
            guard, rank = guards[pid]
            found[rank] = Member(rank, pid, guard)
        elif (said := _said(pid, "RANK")) is not None and _guarded_by(pid) is None and _is_rank(pid):
            found.setdefault(int(said), Member(int(said), pid, None))
    return found


def alive(pid: int) -> bool:
    """Whether there is a process of this number that has not ended."""
    return state(pid) not in (None, "Z", "X")


def state(pid: int) -> str | None:
    """As /proc says it (R, S, T, ...); None: there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def until(condition: Callable[[], object], seconds: float, what: str = "what was waited for") -> float:
    """Wait for it; how long that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"{what} has not come in {seconds:.0f} s"
        time.sleep(0.02)
    return time.monotonic() - began


def until_gone(pids: Iterable[int | None], seconds: float) -> float:
    pids = [pid for pid in pids if pid is not None]
    return until(lambda: not any(alive(pid) for pid in pids), seconds, f"the end of {pids}")


def _family(roots: Iterable[int]) -> Iterator[int]:
    """These processes, and all that descend from them."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text(errors="replace").rpartition(") ")[2].split()[1])
            children.setdefault(parent, []).append(int(path.name))
    left = list(roots)
    while left:
        pid = left.pop()
        yield pid
        left += children.get(pid, [])


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def _guarded_by(pid: int) -> dict[str, int] | None:
    """What a guard was told: its rank, the number of that process, ...; None for other processes."""
    arguments = _arguments(pid)
    if not any("guard_process" in argument for argument in arguments):
        return None
    about: dict[str, int] = json.loads(arguments[-1])
    return about


def _is_rank(pid: int) -> bool:
    return "train" in _arguments(pid)


def _said(pid: int, name: str) -> str | None:
    """A variable of a process's environment, as it was started."""
    with contextlib.suppress(OSError):
        for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if variable.startswith(name.encode() + b"="):
                return variable.decode().partition("=")[2]
    return None
