"""Saving: a snapshot, written behind what goes on; failures on any rank are those of all; one save at a time."""

from __future__ import annotations

import errno
import os
import resource
import threading
import time

import pytest
import torch
from checkpoints import check_whole, content, manifest_at, names, pieces_at, save, state_at

from farspan.parallel.mesh import Axis, Mesh
from farspan.parallel.parts import Part, Piece
from farspan.parallel.state import share
from farspan.pretrain.checkpoint import folders
from farspan.pretrain.checkpoint import saver as saver_module
from farspan.pretrain.checkpoint.folders import Retention
from farspan.pretrain.checkpoint.reader import Reader
from farspan.pretrain.checkpoint.saver import Saver

# One process.


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_saved_is_read(asynchronous, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    saved = save(tmp_path / "c", 100, asynchronous=asynchronous, tokenizer=tokenizer, loss=2.5)
    assert (saved.step, saved.problem, saved.warning) == (100, None, None)
    assert saved.folder == tmp_path / "c" / "step-00000100" and check_whole(saved.folder) == 100
    assert 0 <= saved.stall_seconds <= saved.seconds
    assert names(saved.folder) == [
        "manifest.json",
        "optimizer-00000.safetensors",
        "tokenizer",
        "weights-00000.safetensors",
    ]
    assert saved.bytes == sum(
        (saved.folder / f"{x}-00000.safetensors").stat().st_size for x in ("weights", "optimizer")
    )
    assert (saved.folder / "tokenizer" / "tokenizer.json").read_text() == "{}"
    manifest = Reader(saved.folder).manifest
    assert manifest.metrics == {"validation_loss": 2.5} and set(manifest.tokenizer) == {"tokenizer.json"}


def changing(step, dtype=torch.float32):
    """A tensor and its piece; what changes the one changes the other."""
    values = torch.full((3, 4), float(step), dtype=dtype)
    return values, [Piece("weight", "x", Part.whole((3, 4)), values.view(-1), True)]


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until it is opened."""
    opened, real = threading.Event(), saver_module.write_tensors

    def slow(*args, **kwargs):
        assert opened.wait(30)
        return real(*args, **kwargs)

    monkeypatch.setattr(saver_module, "write_tensors", slow)
    yield opened
    opened.set()


def test_an_asynchronous_save_is_a_snapshot(tmp_path, gate):
    """What changes after it is not in the file; the copy is used again, and has the new values then."""
    saver = Saver(tmp_path, Mesh.solo(), Retention(), asynchronous=True)
    values, pieces = changing(1, torch.bfloat16)
    assert saver.save(manifest_at(1), pieces, {}) == []
    values.fill_(9)
    gate.set()
    assert saver.finish().problem is None
    copies = {key: x.data_ptr() for key, x in saver._host.items()}
    values.fill_(2)
    saver.save(manifest_at(2), pieces, {})
    values.fill_(9)
    saver.finish()
    assert copies == {key: x.data_ptr() for key, x in saver._host.items()}
    for step in (1, 2):
        assert Reader(folders.step_folder(tmp_path, step)).tensor("x").tolist() == [[step] * 4] * 3


def test_polling_does_not_wait(tmp_path, gate):
    saver = Saver(tmp_path, Mesh.solo(), Retention(), asynchronous=True)
    began = time.perf_counter()
    saver.save(manifest_at(1), pieces_at(1), {})
    for _ in range(20):
        assert saver.poll() is None
    assert time.perf_counter() - began < 10 and names(tmp_path) != ["latest", "step-00000001"]
    gate.set()
    while (saved := saver.poll()) is None:
        time.sleep(0.001)
    assert saved.problem is None and saved.stall_seconds < saved.seconds and saver.poll() is saver.finish() is None
    assert folders.latest(tmp_path) == saved.folder


def test_one_save_at_a_time(tmp_path):
    """The next one waits for the one before, and says how it ended."""
    saver = Saver(tmp_path, Mesh.solo(), Retention(), asynchronous=True)
    assert saver.save(manifest_at(1), pieces_at(1), {}) == []
    assert [saved.step for saved in saver.save(manifest_at(2), pieces_at(2), {})] == [1]
    assert saver.finish().step == 2 and saver.finish() is None
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_said_and_counted(asynchronous, tmp_path):
    """Where the disk takes a part of what is written, nothing of it stays."""
    save(tmp_path, 5)
    before, limits = content(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    saver = Saver(tmp_path, Mesh.solo(), Retention(last=1), asynchronous=asynchronous)
    for step in (6, 7):
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
        try:
            ended = saver.save(manifest_at(step), pieces_at(step), {})
            ended += [saver.finish()] if asynchronous else []
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        path = tmp_path / f".step-{step:08d}.tmp" / "optimizer-00000.safetensors"
        assert [x.problem for x in ended] == [
            f"{path}: File too large (raise the limit on the size of files, ulimit -f)"
        ]
        assert content(tmp_path) == before and names(tmp_path) == ["latest", "step-00000005"]
    assert saver.failed == 2
    ended = saver.save(manifest_at(8), pieces_at(8), dict.fromkeys(state_at(8), 8.0))
    assert (ended or [saver.finish()])[0].problem is None and saver.failed == 2
    assert names(tmp_path) == ["latest", "step-00000008"] and check_whole(tmp_path / "step-00000008") == 8


def test_what_comes_first_can_fail(tmp_path):
    saver = Saver(tmp_path, Mesh.solo(), Retention())

    def before():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    (saved,) = saver.save(manifest_at(1), pieces_at(1), {}, before=before)
    assert saved.problem == "metrics.jsonl: No space left on device (free some space there)" and saver.failed == 1
    assert names(tmp_path) == []


def test_an_old_one_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch):
    save(tmp_path, 5)

    def stubborn(folder):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(folders, "remove", stubborn)
        saved = save(tmp_path, 6, Retention(last=1))
    assert saved.problem is None and "Permission denied" in saved.warning and "\n" not in saved.warning
    assert folders.latest(tmp_path) == saved.folder and check_whole(saved.folder) == 6


def test_a_fault_of_ours_is_none_of_the_disk(tmp_path):
    """It ends the run, and not some save."""
    saver = Saver(tmp_path, Mesh.solo(), Retention(), asynchronous=True)
    values = torch.zeros(3)
    with pytest.raises(RuntimeError):
        saver.save(manifest_at(1), [Piece("weight", "x", Part.whole((4,)), values, True)], {})
        saver.finish()


def test_what_a_killed_process_left_goes_when_the_next_one_starts(tmp_path):
    save(tmp_path, 5)
    for name in (".step-00000007.tmp", ".step-00000008.tmp"):
        (tmp_path / name / "tokenizer").mkdir(parents=True)
        (tmp_path / name / "weights-00000.safetensors").write_bytes(bytes(10))
    Saver(tmp_path, Mesh.solo(), Retention())
    assert names(tmp_path) == ["latest", "step-00000005"]


# Which replica writes what.


def test_every_replica_has_its_share():
    """All of what they have copies of once, as evenly as sizes allow, in whatever order; their own is theirs."""
    generator = torch.Generator().manual_seed(0)
    sizes = [int(size) for size in torch.randint(0, 1000, (60,), generator=generator)] + [20_000]
    copies = [Piece("weight", f"w{n}", Part.whole((size,)), torch.zeros(size), True) for n, size in enumerate(sizes)]
    for replicas in (1, 2, 3, 8):
        taken, loads = [], []
        for rank in range(replicas):
            own = Piece("exp_avg", f"w{rank}", Part.whole((5,)), torch.zeros(5), False)
            order = torch.randperm(len(copies), generator=generator).tolist()
            mine = share([*(copies[i] for i in order), own], Axis(rank, replicas, None))
            assert own in mine and sum(not piece.copies for piece in mine) == 1
            assert [(p.kind, p.name) for p in mine] == sorted((p.kind, p.name) for p in mine)
            taken += [piece.name for piece in mine if piece.copies]
            loads.append(sum(piece.values.numel() for piece in mine if piece.copies))
        assert sorted(taken) == sorted(piece.name for piece in copies)
        assert max(loads) <= max(20_000, sum(sizes) / replicas + 1000)


# Several ranks.  Each has a slice of one tensor, and the first all of another.

N = 12


def split(mesh, step):
    part = Part.whole((N, 2)).run(mesh.rank * 2 * N // mesh.size, (mesh.rank + 1) * 2 * N // mesh.size)
    full = torch.arange(N * 2.0) + 100 * step
    pieces = [Piece("exp_avg", "x", part, full[part.begin : part.end].clone(), False)]
    if mesh.is_writer:
        pieces.append(Piece("weight", "x", Part.whole((N, 2)), full.clone(), True))
    return pieces


def check_split(folder, step):
    reader = Reader(folder)
    reader.verify()
    for kind in ("weight", "exp_avg"):
        assert reader.tensor("x", kind=kind).flatten().tolist() == [100 * step + n for n in range(2 * N)]


def say(saved):
    return (saved.step, saved.problem, saved.folder.name)


def some_saves(mesh, root, asynchronous):
    """A good one, one that fails on the last rank, a good one; how they ended, here."""
    ended = []
    saver = Saver(root, mesh, Retention(last=2), asynchronous=asynchronous)
    for step in (1, 2, 3, 4):
        pieces = split(mesh, step)
        with pytest.MonkeyPatch.context() as patch:
            if step in (2, 3) and mesh.rank == mesh.size - 1:

                def full(*_):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "disk")

                patch.setattr(saver_module, "write_tensors", full)
            ended += saver.save(manifest_at(step), pieces, {})
            for piece in pieces:
                piece.values.fill_(-1)
            ended += [saver.finish()] if asynchronous else []
        if mesh.rank == 0 and step == 3:
            check_split(root / "step-00000001", 1)
            assert names(root) == ["latest", "step-00000001"]
        mesh.first_problem(None)  # nobody goes on before that
    return [say(saved) for saved in ended], saver.failed


def waiting(mesh, root):
    """A slow disk on one rank: how long each poll took at most, and in which of them the save was over."""
    real = saver_module.write_tensors

    def slow(*args):
        time.sleep(0.5 if mesh.rank == mesh.size - 1 else 0)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver_module, "write_tensors", slow)
        saver = Saver(root, mesh, Retention(), asynchronous=True)
        began = time.perf_counter()
        saver.save(manifest_at(1), split(mesh, 1), {})
        first, polls = time.perf_counter() - began, 0
        while (saved := saver.poll()) is None:
            polls += 1
            time.sleep(0.005)
    return first, polls, saved.problem, saved.stall_seconds < saved.seconds, time.perf_counter() - began


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_a_failure_of_one_rank_is_that_of_all(ranks, size, asynchronous, tmp_path):
    found = ranks.on_mesh(some_saves, tmp_path, asynchronous, data=size)
    problem = f"rank {size - 1}: disk: No space left on device (free some space there)"
    expected = [(step, problem if step in (2, 3) else None, f"step-{step:08d}") for step in (1, 2, 3, 4)]
    assert found == [(expected, 2)] * size
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000004"]
    check_split(tmp_path / "step-00000004", 4)
    check_split(tmp_path / "step-00000001", 1)
    expected = [*(f"optimizer-{rank:05d}.safetensors" for rank in range(size)), "weights-00000.safetensors"]
    assert names(tmp_path / "step-00000004") == ["manifest.json", *expected]


def test_all_ranks_learn_at_once_that_a_save_is_over(ranks, tmp_path):
    found = ranks.on_mesh(waiting, tmp_path, data=3)
    firsts, polls, problems, sensible, seconds = zip(*found, strict=True)
    assert set(problems) == {None} and all(sensible)
    assert len(set(polls)) == 1 and polls[0] >= 3, "all of them, and not at the first"
    assert max(firsts) < min(seconds), "the save goes on behind"
    check_split(tmp_path / "step-00000001", 1)


def full_everywhere(mesh, root):
    """The first rank cannot write the manifest."""
    saver = Saver(root, mesh, Retention())
    ended = saver.save(manifest_at(1), split(mesh, 1), {})
    with pytest.MonkeyPatch.context() as patch:

        def broken(*_):
            raise OSError(errno.EIO, os.strerror(errno.EIO), "manifest")

        patch.setattr(saver_module.Manifest, "write", broken)
        ended += saver.save(manifest_at(2), split(mesh, 2), {})
    return [say(saved) for saved in ended]


def test_a_manifest_that_cannot_be_written(ranks, tmp_path):
    found = ranks.on_mesh(full_everywhere, tmp_path, data=2)
    assert found == [[(1, None, "step-00000001"), (2, "rank 0: manifest: Input/output error", "step-00000002")]] * 2
    assert names(tmp_path) == ["latest", "step-00000001"]
    check_split(tmp_path / "step-00000001", 1)
