"""``farspan doctor``: the disk that checkpoints go to."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from small_disk import no_file_larger_than

from farspan.launch.doctor import disk
from farspan.launch.doctor.disk import FileSystem, Need
from farspan.launch.doctor.report import Section, examine

MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
25 22 0:23 / /dev/shm rw - tmpfs tmpfs rw
40 22 0:50 / /scratch rw,relatime shared:9 - lustre 10.0.0.1@tcp:/scratch rw
41 40 0:51 / /scratch/my\\040runs rw - nfs4 filer:/export rw
42 22 0:52 / /data rw - ext4 /dev/vdb rw
43 42 0:53 / /data rw - fuse.s3fs s3fs rw
"""


@pytest.mark.parametrize(
    ("path", "kind", "mount", "network"),
    [
        ("/home/me", "ext4", "/", False),
        ("/scratch", "lustre", "/scratch", True),
        ("/scratch/a/b", "lustre", "/scratch", True),
        ("/scratchy", "ext4", "/", False),
        ("/scratch/my runs/a", "nfs4", "/scratch/my runs", True),
        ("/dev/shm/run", "tmpfs", "/dev/shm", False),
        ("/data/x", "fuse.s3fs", "/data", True),  # mounted over the other
    ],
)
def test_the_file_system_of_a_path(path: str, kind: str, mount: str, network: bool) -> None:
    found = FileSystem.of(Path(path), MOUNTS)
    assert (found.kind, found.mount, found.network) == (kind, mount, network)


def test_the_file_system_here_is_the_one_that_the_system_names(tmp_path: Path) -> None:
    found = FileSystem.of(tmp_path.resolve())
    assert found.kind and Path(found.mount).stat().st_dev == tmp_path.stat().st_dev


def look(path: Path, quick: bool = True, need: Need | None = None) -> tuple[Section, str]:
    section = examine("disk", lambda it: disk.look(it, path, quick=quick, need=need))
    return section, "\n".join([*section.lines, *(f"{f.severity}: {f.what}; {f.mend}" for f in section.findings)])


def test_what_works_and_nothing_is_left(tmp_path: Path) -> None:
    section, said = look(tmp_path / "runs/mine/checkpoints")
    assert f"(to be made in {tmp_path})" in said and section.facts["writable"] is True
    assert set(section.facts["operations"].values()) == {None}
    assert "what works: writing and flushing, renaming onto a file, renaming a folder, hard links, locks" in said
    assert list(tmp_path.iterdir()) == []
    assert section.facts["free_bytes"] == pytest.approx(
        os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize, rel=0.2
    )


def test_memory_and_a_containers_layer_are_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, words in (("tmpfs", "lies in memory (tmpfs)"), ("overlay", "own layer (overlay)"), ("nfs4", "")):
        monkeypatch.setattr(FileSystem, "of", lambda path, kind=kind: FileSystem(kind, "/", "x"))
        section, said = look(tmp_path)
        assert words in said and bool(section.findings) is bool(words) and section.facts["network"] is (kind == "nfs4")


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    _, said = look(tmp_path / "run/checkpoints")
    assert f"fault: {tmp_path / 'run'} is a file where a folder" in said


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, said = look(Path("/proc/self"))  # where not even root may
    assert "fault: nothing can be written in /proc/self: " in said

    def refuse(*_: Any, **__: Any) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(disk.tempfile, "mkdtemp", refuse)
    section, said = look(tmp_path)
    assert f"fault: nothing can be written in {tmp_path}: Read-only file system (nothing can be written there" in said
    assert section.facts["writable"] is False and "operations" not in section.facts


def test_too_little_space(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    _, said = look(tmp_path, need=Need(10**6, 10**6, 2 * 10**6))
    assert "checkpoints take 1.0 MB each, 2.0 MB in the end" in said and "fault" not in said and "warning" not in said
    _, said = look(tmp_path, need=Need(10**6, 10**6, 2 * free))
    assert "warning: " in said and "all that are kept take" in said and "fault" not in said
    _, said = look(tmp_path, need=Need(10**6, 2 * free, 2 * free))
    assert "fault: " in said and "those kept at once take" in said


def test_no_more_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = os.statvfs(tmp_path)
    full = os.statvfs_result((*found[:5], 10**6, 12, 12, *found[8:]))
    monkeypatch.setattr(disk.os, "statvfs", lambda path: full)
    assert f"fault: {tmp_path} can take 12 more files" in look(tmp_path)[1]


@pytest.mark.parametrize(
    ("name", "code", "line"),
    [
        ("flock", errno.ENOLCK, "warning: locks: they do not work in"),
        ("link", errno.EPERM, "warning: hard links: they do not work in"),
        ("rename", errno.EXDEV, "fault: renaming onto a file does not work in"),
        ("fsync", errno.EINVAL, "fault: writing and flushing does not work in"),
        ("fsync", errno.EDQUOT, "your quota there is used up; free some space or files there"),
    ],
)
def test_what_does_not_work(name: str, code: int, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    if name == "rename":
        monkeypatch.setattr(Path, "replace", fail)
    else:
        monkeypatch.setattr(disk.fcntl if name == "flock" else os, name, fail)
    section, said = look(tmp_path)
    works = list(section.facts["operations"].values()).count(None)
    assert line in said and works == (0 if name == "fsync" else 4)  # after the first nothing else is tried


def test_speed_is_that_of_the_bytes_and_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "write_speed", lambda file: (file.write_bytes(b"x" * 4096), 0.00002)[0:2])
    monkeypatch.setattr(disk, "read_speed", lambda file: (3e9, "past the cache"))
    section, said = look(tmp_path, quick=False, need=Need(10**9, 10**9, 10**9))
    assert "writes 204.8 MB/s" in said and "reads 3.0 GB/s (past the cache)" in said
    assert "a checkpoint of 1.0 GB takes about 4.9 s" in said and section.facts["save_seconds"] == pytest.approx(
        4.88, 0.01
    )
    assert "fault" not in said and list(tmp_path.iterdir()) == []
    _, said = look(tmp_path, quick=False, need=Need(10**11, 10**11, 10**11))
    assert "takes 204.8 MB/s: a checkpoint takes 488 s" in said


def test_writing_measures_all_bytes_that_reach_the_disk(tmp_path: Path) -> None:
    written, seconds = disk.write_speed(tmp_path / "file", most_bytes=(9 << 20) + 5)
    content = (tmp_path / "file").read_bytes()
    assert written == len(content) == (9 << 20) + 5 and seconds > 0
    blocks = {content[i : i + 4096] for i in range(0, 9 << 20, 4096)}
    assert len(blocks) == (9 << 20) // 4096  # a disk that keeps equal blocks once gains nothing
    assert disk.write_speed(tmp_path / "file", most_seconds=0.0)[0] == 0


def test_reading_goes_past_the_cache_or_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.write_speed(tmp_path / "file", most_bytes=(5 << 20) + 7)
    found = disk.read_speed(tmp_path / "file")
    assert found is not None and found[0] > 0 and found[1] in ("past the cache", "cache dropped")
    opened, read = os.open, []
    monkeypatch.setattr(os, "O_DIRECT", 1 << 30, raising=False)

    def without_direct(path: Any, flags: int, *rest: Any) -> int:
        if flags & (1 << 30):
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", without_direct)
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: read.append(arguments[3]))
    found = disk.read_speed(tmp_path / "file")
    assert found is not None and found[1] == "cache dropped" and read == [os.POSIX_FADV_DONTNEED]


def test_a_disk_that_fills_up_while_it_is_measured(tmp_path: Path) -> None:
    with no_file_larger_than(1 << 20):
        _, said = look(tmp_path, quick=False)
    assert "fault: writing fails in" in said and "ulimit -f" in said and list(tmp_path.iterdir()) == []


def test_flushing_takes_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: (flushed.append(descriptor), time.sleep(0.01)))
    assert 0.01 <= disk.flush_latency(tmp_path / "file", times=3) < 0.5 and len(flushed) == 3
