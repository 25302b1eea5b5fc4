"""One run at a time on a run folder: a lease that its holder renews.

Locks of the file system do not hold between the nodes of every cluster (NFS, Lustre without flock); a hard link to a
name that exists fails everywhere.  Times are those of the folder's file system, never of two nodes' clocks.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..parallel.mesh import Mesh
from .files import explain, parents_of

LEASE = "lease.json"
RENEW_SECONDS = 5.0
STALE_SECONDS = 60.0  # not renewed for so long: whoever held it is gone


class InUse(ValueError):
    """Another process holds the folder: it may be free later."""


class LeaseLost(ValueError):
    """Another process has taken the run over."""


class Lease:
    """Holds a run folder for this process.  ``take`` makes one; a thread renews it until ``release``."""

    def __init__(self, path: Path, token: str) -> None:
        self.path, self.token = path, token
        self._released = threading.Event()
        self._lost = False
        self._thread = threading.Thread(target=self._renew, name="farspan-lease", daemon=True)
        self._thread.start()

    @staticmethod
    def take(folder: Path, *, stale_seconds: float = STALE_SECONDS) -> Lease:
        """The lease of a folder that exists.  One that was not renewed for ``stale_seconds`` is taken over, at once
        where its process ran on this host and is gone.

        ``InUse``, in one line, where another process holds it: one that runs on this host, or was seen to renew it.
        """
        path, token = folder / LEASE, uuid.uuid4().hex
        mine = folder / f".{LEASE}.{token}"

        def write() -> None:
            with _naming(folder):
                mine.write_text(json.dumps(_about_this_process(token), indent=2) + "\n", encoding="utf-8")

        try:
            write()
            seen = _Holder.of(path)
            began = time.monotonic()
            while True:
                try:
                    if _put(mine, path):
                        break
                    os.utime(mine)
                    now = mine.stat().st_mtime
                except FileNotFoundError:  # this process stood still, and one that took the lease has cleared it away
                    write()
                    continue
                holder = _Holder.of(path)
                if holder is None:
                    continue  # it was released a moment ago
                if seen is None or seen.token != holder.token:
                    seen, began = holder, time.monotonic()
                alive = holder.runs_here()
                if alive or holder.renewed != seen.renewed:
                    raise InUse(f"{folder} is in use by {holder.describe()}: wait for its end, or set another run_dir")
                old = now - holder.renewed > stale_seconds
                if alive is False or old or time.monotonic() - began > stale_seconds:
                    _put_aside(path, holder, folder / f".{LEASE}.{token}.old")
                else:
                    time.sleep(0.2)
            _clear(folder, path.stat().st_mtime, stale_seconds)
            return Lease(path, token)
        finally:
            mine.unlink(missing_ok=True)

    def check(self) -> None:
        """``LeaseLost`` where the lease is no longer this process's, as far as is known."""
        if self._lost:
            raise LeaseLost(
                f"{self.path.parent} was taken over by another process while this one did not answer: "
                "it goes on there, nothing more is written here"
            )

    def confirm(self) -> None:
        """``check``, having looked now: before something is done that cannot be undone."""
        self._look()
        self.check()

    def release(self) -> None:
        """Let others have the folder."""
        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            holder = _Holder.of(self.path)
            if holder is not None and holder.token == self.token:
                self.path.unlink()

    def _renew(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            self._look()
            if self._lost:
                return
            with contextlib.suppress(OSError):  # a file system that does not answer: others cannot see it either
                os.utime(self.path)

    def _look(self) -> None:
        with contextlib.suppress(OSError):
            holder = _Holder.of(self.path)
            self._lost = self._lost or holder is None or holder.token != self.token


class _Holder:
    """What a lease says of who holds it."""

    def __init__(self, about: dict[str, Any], renewed: float) -> None:
        self.about, self.renewed = about, renewed
        self.token = about.get("token")

    @staticmethod
    def of(path: Path) -> _Holder | None:
        """None where there is no lease."""
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                renewed = os.fstat(file.fileno()).st_mtime
                text = file.read()
        except FileNotFoundError:
            return None
        try:
            about = json.loads(text)
        except ValueError:  # somebody's edit: it goes when it is old
            about = None
        return _Holder(about if isinstance(about, dict) else {}, renewed)

    def runs_here(self) -> bool | None:
        """Whether its process runs on this host; None: it is of another host (or container), nobody can tell."""
        if not self.about.get("machine") or self.about["machine"] != _machine():
            return None
        return _start_time(self.about.get("pid", 0)) == self.about.get("started")

    def describe(self) -> str:
        job = f", {self.about['job']}" if self.about.get("job") else ""
        return f"process {self.about.get('pid')} on {self.about.get('host')}{job}, since {self.about.get('since')}"


def _about_this_process(token: str) -> dict[str, Any]:
    job = f"SLURM job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else None
    return {
        "token": token,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": job,
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "started": _start_time(os.getpid()),
    }


def _machine() -> str | None:
    """What a process id means something in: this boot of this machine, and the container.  None where that is not
    known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _start_time(pid: int) -> str | None:
    """When a process started, in ticks since the boot (proc(5), /proc/pid/stat); None: it is gone, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _put(mine: Path, path: Path) -> bool:
    """Give the lease its name, unless there is one."""
    try:
        os.link(mine, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        try:  # a file system without hard links
            with path.open("x", encoding="utf-8") as file:
                file.write(mine.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    return True


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """An error of the system inside names the folder, not a file that nobody knows."""
    try:
        yield
    except OSError as error:
        error.filename = str(folder)
        raise


def _clear(folder: Path, now: float, stale_seconds: float) -> None:
    """Remove what processes have left that were killed while they took the lease.  ``now``: by the folder's clock."""
    for left in folder.glob(f".{LEASE}.*"):
        with contextlib.suppress(OSError):
            age = now - left.stat().st_mtime
            holder = _Holder.of(left)
            runs = None if holder is None else holder.runs_here()
            old = age > (stale_seconds if holder is not None and holder.token else RENEW_SECONDS)
            if runs is False or (old and not runs):
                left.unlink()


def _put_aside(path: Path, holder: _Holder, aside: Path) -> None:
    """Remove the lease of a holder that is gone; that of another, who was quicker, is put back."""
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    found = _Holder.of(aside)  # None: whoever took it has cleared it away, for its holder is gone
    if found is not None and found.token != holder.token:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)


@contextlib.contextmanager
def leased(folder: Path, mesh: Mesh) -> Iterator[Lease | None]:
    """The run folder, held by the first rank for all; collective.  Yields the lease there, None on the others.

    ``InUse`` on every rank where another run holds it; OSError where nothing can be written there.  A folder that
    is new goes again where the block fails and has left nothing in it.
    """
    with contextlib.ExitStack() as stack:
        lease, problem, refused = None, None, None
        if mesh.is_writer:
            try:
                stack.enter_context(parents_of(folder / LEASE))
                lease = Lease.take(folder)
                stack.callback(lease.release)
            except InUse as error:
                problem = str(error)
            except OSError as error:
                refused = error
        said = mesh.first_problem(problem if refused is None else explain(refused))
        if refused is not None:
            raise refused
        if said is not None:
            raise InUse(problem or said)
        yield lease
