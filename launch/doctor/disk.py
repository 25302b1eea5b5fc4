"""The disk that checkpoints go to: what it is, whether what saving needs works there, how fast it is."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import mmap
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ...pretrain.files import DISK_FULL, explain, sync
from ..tables import size
from .report import Section

BLOCK = 4 << 20
MOST_BYTES, MOST_SECONDS = 512 << 20, 6.0  # of a measurement of writing
SLOW, LONG = 100e6, 300.0  # bytes per second; seconds of a save
_PREFIX = ".farspan-doctor-"

_NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fhgfs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4",
    "ocfs2", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "virtiofs", "wekafs",
}  # fmt: skip
_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}


@dataclasses.dataclass(frozen=True)
class FileSystem:
    """What is mounted where a path lies."""

    kind: str  # "ext4", "lustre", ...; "" where the system does not say
    mount: str
    source: str

    @property
    def network(self) -> bool:
        # FUSE is whatever its program makes of it: mostly an object store or a remote disk.
        return self.kind in _NETWORK or self.kind.startswith("fuse.")

    @staticmethod
    def of(path: Path, mountinfo: str | None = None) -> FileSystem:
        """``mountinfo``: the text of /proc/self/mountinfo (proc(5)), read here where it is not given."""
        if mountinfo is None:
            with contextlib.suppress(OSError):
                mountinfo = Path("/proc/self/mountinfo").read_text(errors="replace")
        best = FileSystem("", "", "")
        for line in (mountinfo or "").splitlines():
            left, _, right = line.partition(" - ")
            fields, described = left.split(), right.split()
            if len(fields) < 5 or len(described) < 2:
                continue
            mount = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
            # The last of several mounts on one place hides the others.
            if (path == Path(mount) or Path(mount) in path.parents) and len(mount) >= len(best.mount):
                best = FileSystem(described[0], mount, described[1])
        return best


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes: of one checkpoint, of those that are kept at once at least, of those that are kept in the end."""

    checkpoint: int
    least: int
    end: int


def look(section: Section, path: Path, *, quick: bool, need: Need | None = None) -> None:
    """``path``: the folder of checkpoints, which need not exist."""
    folder = nearest_folder(path)
    filesystem = FileSystem.of(folder)
    section.facts |= {"path": str(path), **dataclasses.asdict(filesystem), "network": filesystem.network}
    what = f"{filesystem.kind or 'unknown file system'}, mounted on {filesystem.mount or '?'}"
    section.say(f"{path}" + ("" if folder == path else f" (to be made in {folder})") + f": {what}")
    _say_what_it_is(section, filesystem, path)
    if not folder.is_dir():
        section.fault(
            f"{folder} is a file where a folder of {path} belongs",
            "nothing can be written below it",
            "set another path",
        )
        return
    _space(section, folder, need)
    try:
        made = scratch_folder(folder)
    except OSError as error:
        section.facts["writable"] = False
        section.fault(
            f"nothing can be written in {folder}: {explain(OSError(error.errno, error.strerror))}",
            "a run writes its checkpoints and metrics there",
            "get rights there, or set another run_dir",
        )
        return
    section.facts["writable"] = True
    with made as scratch:
        _operations(section, Path(scratch), folder)
        if not quick:
            _speed(section, Path(scratch), folder, need)


def nearest_folder(path: Path) -> Path:
    """The path, or what there is of those around it."""
    path = path.expanduser().absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _say_what_it_is(section: Section, filesystem: FileSystem, path: Path) -> None:
    if filesystem.kind in _IN_MEMORY:
        section.warn(
            f"{path} lies in memory ({filesystem.kind})",
            "a run kept there is lost with this machine, and takes the ranks' memory",
            "set run_dir to a disk that the nodes share",
        )
    elif filesystem.kind == "overlay":
        section.warn(
            f"{path} lies in the container's own layer (overlay)",
            "it goes when the container goes",
            "mount a folder of the host and set run_dir there",
        )


def _space(section: Section, folder: Path, need: Need | None) -> None:
    space = os.statvfs(folder)
    free, total = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    section.facts |= {"free_bytes": free, "total_bytes": total, "free_files": space.f_favail if space.f_files else None}
    section.say(f"{size(free)} of {size(total)} are free")
    if need is not None:
        section.facts["needed_bytes"], section.facts["needed_in_the_end_bytes"] = need.least, need.end
        section.say(f"checkpoints take {size(need.checkpoint)} each, {size(need.end)} in the end")
        mend = "free some space there, keep fewer (checkpoint.keep_last), or set another run_dir"
        if need.least > free:
            section.fault(
                f"{size(free)} are free where checkpoints go, and those kept at once take {size(need.least)}",
                "saves fail once the disk is full, and the run goes on without",
                mend,
            )
        elif need.end > free:
            section.warn(
                f"{size(free)} are free where checkpoints go, and all that are kept take {size(need.end)} in the end",
                "saves fail once the disk is full, and the run goes on without",
                mend,
            )
    if space.f_files and space.f_favail < 1000:
        section.fault(
            f"{folder} can take {space.f_favail} more files",
            "a checkpoint is some files for each rank: the disk is full for them though bytes are free",
            "remove files that are not needed there, or set another run_dir",
        )


def scratch_folder(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder of our own in there, gone after ``with``; OSError where none can be made."""
    return tempfile.TemporaryDirectory(prefix=_PREFIX, dir=folder, ignore_cleanup_errors=True)


def is_seen(file: Path, seconds: float) -> bool:
    """Whether a file that another node has made is here, or comes within that time: a network file system remembers for
    a while that there was nothing."""
    deadline = time.monotonic() + seconds
    while not (seen := file.exists()) and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            list(file.parent.iterdir())  # asks the file system again
        time.sleep(0.2)
    return seen


def _operations(section: Section, scratch: Path, folder: Path) -> None:
    """What saving and the lease on a run folder stand on."""
    old, new = scratch / "old", scratch / "new"

    def write() -> None:
        for path, text in ((old, "old"), (new, "new")):
            path.write_text(text)
            sync(path)
        sync(scratch)

    def rename() -> None:
        new.replace(old)
        if old.read_text() != "new" or new.exists():
            raise OSError(errno.EIO, "the old content was still read after it")

    def rename_folder() -> None:
        (scratch / ".step.tmp").mkdir()
        (scratch / ".step.tmp" / "file").write_text("x")
        (scratch / ".step.tmp").rename(scratch / "step")
        if (scratch / "step" / "file").read_text() != "x":
            raise OSError(errno.EIO, "its content was not there after it")

    def link() -> None:
        os.link(old, scratch / "link")
        with contextlib.suppress(FileExistsError):
            os.link(old, scratch / "link")
            raise OSError(errno.EIO, "a second link took the first one's place")

    def lock() -> None:
        with (scratch / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    works = {"writing and flushing": _attempt(section, "writing and flushing", write, folder, fault=True)}
    if works["writing and flushing"] is None:
        for name, action, fault in (
            ("renaming onto a file", rename, True),
            ("renaming a folder", rename_folder, True),
            ("hard links", link, False),
            ("locks", lock, False),
        ):
            works[name] = _attempt(section, name, action, folder, fault=fault)
    section.facts["operations"] = works
    section.say("what works: " + (", ".join(name for name, found in works.items() if found is None) or "nothing"))
    for name, found in works.items():
        if found is not None:
            section.say(f"{name}: {found}")


def _attempt(section: Section, name: str, action: Callable[[], None], folder: Path, *, fault: bool) -> str | None:
    """Why it fails; None: it works."""
    try:
        action()
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno in DISK_FULL:
            _full(section, error, folder)
        elif fault:
            section.fault(
                f"{name} does not work in {folder}: {why}",
                "checkpoints are written beside, flushed and renamed, so that they are whole or not there",
                "set run_dir to another file system",
            )
        else:
            section.warn(
                f"{name}: they do not work in {folder}: {why}",
                "where two runs start on one folder, the second is noticed later, or by its host alone",
                "start one run on a folder, or set run_dir to another file system",
            )
        return why
    return None


def _full(section: Section, error: OSError, folder: Path) -> None:
    kind = {errno.EDQUOT: "your quota there is used up", errno.EFBIG: "files may not grow beyond a limit (ulimit -f)"}
    section.fault(
        f"writing fails in {folder}: {error.strerror}: {kind.get(error.errno or 0, 'the disk is full')}",
        "no checkpoint can be saved",
        {errno.EFBIG: "ulimit -f unlimited"}.get(
            error.errno or 0, "free some space or files there (`quota -s`, `df -i`)"
        ),
    )


def _speed(section: Section, scratch: Path, folder: Path, need: Need | None) -> None:
    file = scratch / "speed"
    try:
        written, took = write_speed(file)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        _full(section, error, folder)
        return
    rate = written / took
    section.facts |= {"write_bytes_per_second": rate, "measured_bytes": written}
    said = f"writes {size(int(rate))}/s (with fsync, {size(written)})"
    if (read := read_speed(file)) is not None:
        read_rate, how = read
        section.facts |= {"read_bytes_per_second": read_rate, "read_how": how}
        said += f", reads {size(int(read_rate))}/s ({how})"
    latency = flush_latency(scratch / "small")
    section.facts["flush_seconds"] = latency
    section.say(f"{said}, flushes a small file in {1000 * latency:.1f} ms")
    if need is not None:
        save = section.facts["save_seconds"] = need.checkpoint / rate
        seconds = f"{save:,.0f}" if save >= 10 else f"{save:.2g}"
        section.say(f"a checkpoint of {size(need.checkpoint)} takes about {seconds} s when one node writes it")
    if rate < SLOW if need is None else need.checkpoint / rate > LONG:
        takes = "" if need is None else f": a checkpoint takes {need.checkpoint / rate:,.0f} s"
        section.warn(
            f"{folder} takes {size(int(rate))}/s{takes}",
            "a save that is under way when the next one is due, or when the job ends, is waited for",
            "set run_dir to a faster disk, or save less often (checkpoint.interval)",
        )


def write_speed(file: Path, most_bytes: int = MOST_BYTES, most_seconds: float = MOST_SECONDS) -> tuple[int, float]:
    """Bytes written, and the seconds from the first of them until all are on the disk.

    Random bytes: some disks compress.  As much as fits into ``most_seconds``, and at most ``most_bytes``.
    """
    block = os.urandom(BLOCK)
    done, flushed = 0, 0.0
    with file.open("wb", buffering=0) as out:
        began = time.perf_counter()
        while done < most_bytes and time.perf_counter() - began < most_seconds:
            step = min(BLOCK, most_bytes - done)
            # Rotated, or a disk that keeps equal blocks once would look fast.
            turn = done // BLOCK % BLOCK
            done += out.write(memoryview(block[turn:] + block[:turn])[:step])
            if (
                done - flushed >= 64 << 20
            ):  # the page cache takes seconds of bytes that the disk then still has to write
                os.fdatasync(out.fileno())
                flushed = done
        os.fsync(out.fileno())
        return done, time.perf_counter() - began


def read_speed(file: Path) -> tuple[float, str] | None:
    """Bytes per second of reading it, and how the cache was kept out of it; None where it cannot be."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
        how = "past the cache"
    except (OSError, AttributeError):
        descriptor = os.open(file, os.O_RDONLY)
        how = "cache dropped"
    try:
        if how == "cache dropped":
            if not hasattr(os, "posix_fadvise"):
                return None
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = mmap.mmap(-1, BLOCK)  # at a page's beginning, as direct reading asks for
        done, began = 0, time.perf_counter()
        while (got := os.readv(descriptor, [buffer])) > 0:
            done += got
            if time.perf_counter() - began > MOST_SECONDS:
                break
        return (done / (time.perf_counter() - began), how) if done else None
    except OSError:
        return None
    finally:
        os.close(descriptor)


def flush_latency(file: Path, times: int = 5) -> float:
    """Seconds, the median, that a write of a few bytes takes until it is on the disk."""
    found = []
    with file.open("wb", buffering=0) as out:
        for _ in range(times):
            began = time.perf_counter()
            out.write(b"x" * 512)
            os.fsync(out.fileno())
            found.append(time.perf_counter() - began)
    return sorted(found)[times // 2]
