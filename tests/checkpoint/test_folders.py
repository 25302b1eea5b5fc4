"""Which checkpoints there are, which comes first, which stay; whatever fails or dies, older ones are whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from checkpoints import check_whole, content, edit, manifest_at, names, refused, save

from farspan.pretrain.checkpoint import folders, tensor_file
from farspan.pretrain.checkpoint.folders import Retention, candidates, find, forget, latest, steps, undo


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    """Disks are slow, and none of them fails here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def fake(root, *numbers, losses=()):
    """Manifests alone."""
    for number, loss in zip(numbers, losses or [None] * len(numbers), strict=True):
        folder = folders.step_folder(root, number)
        folder.mkdir(parents=True)
        manifest_at(number, loss).write(folder)


def point(root, content):
    (root / "latest").write_bytes(content if isinstance(content, bytes) else f"step-{content:08d}\n".encode())


def numbers(found):
    return [folders.step_of(folder) for folder in found]


# Finding.


def test_a_run_its_checkpoints_or_one_of_them(tmp_path):
    root = tmp_path / "checkpoints"
    first, second = save(root, 5).folder, save(root, 10).folder
    assert (root / "latest").read_text() == "step-00000010\n"
    assert find(tmp_path) == find(root) == find(second) == second
    assert find(first) == first
    point(root, 5)
    assert find(tmp_path) == first
    for nothing in (tmp_path / "none", root / "latest", first / "weights-00000.safetensors"):
        refused(lambda: find(nothing), f"{nothing} has no checkpoint: give a run folder")  # noqa: B023


@pytest.mark.parametrize(
    ("pointer", "order"),
    [
        (None, [20, 15, 10, 5]), (20, [20, 15, 10, 5]), (10, [10, 5, 20, 15]), (5, [5, 20, 15, 10]),
        (12, [10, 5, 20, 15]), (99, [20, 15, 10, 5]), (1, [20, 15, 10, 5]),  # it was removed by hand
        *((garbage, [20, 15, 10, 5]) for garbage in (
            b"", b"\xff\xfe", b"..\n", b"../elsewhere/step-00000001", b"step-5", b"step-" + b"9" * 5000,
            "step-٠٠٠٠٠٠٠٥".encode(), b"step-00000005/../x", b"step-00000005\nstep-00000010",
        )),
    ],
)  # fmt: skip
def test_the_order_in_which_a_resume_tries_them(pointer, order, tmp_path):
    """The latest and those before it; then those that a run which went back has left behind."""
    fake(tmp_path, 15, 5, 20, 10)
    if pointer is not None:
        point(tmp_path, pointer)
    assert numbers(candidates(tmp_path)) == order
    assert numbers([latest(tmp_path), find(tmp_path)]) == order[:1] * 2
    assert numbers(steps(tmp_path)) == [5, 10, 15, 20]


def test_what_is_no_checkpoint(tmp_path):
    root = tmp_path / "checkpoints"
    assert candidates(root) == [] and latest(root) is None and steps(root) == []
    fake(root, 5)
    for name in (".step-00000010.tmp", ".step-00000010.old", "step-10", "step-00000011x", "step-٠٠٠٠٠٠١٢", "other"):
        shutil.copytree(root / "step-00000005", root / name)
    (root / "step-00000011").mkdir()  # a candidate, which is named when it is not taken
    point(root, 11)
    assert numbers(candidates(root)) == [11, 5]
    assert numbers(steps(root)) == [5] and latest(root) == find(tmp_path) == root / "step-00000005"
    (root / "latest").unlink()
    (root / "latest").mkdir()
    assert latest(root) == root / "step-00000005"


def test_more_than_eight_digits(tmp_path):
    fake(tmp_path, 99_999_999, 123_456_789, 5)
    assert numbers(candidates(tmp_path)) == [123_456_789, 99_999_999, 5]


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    for function in (candidates, latest, steps):
        refused(lambda: function(tmp_path / "checkpoints"), "is a file where the folder of checkpoints belongs")  # noqa: B023


# Retention.

LOSSES = {2: 3.0, 4: None, 6: 1.0, 8: 2.0, 10: 1.0, 12: 5.0}


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), [2, 4, 6, 8, 10, 12]), (Retention(every=4, best=1), [2, 4, 6, 8, 10, 12]),
        (Retention(last=1), [12]), (Retention(last=2), [10, 12]), (Retention(last=6), [2, 4, 6, 8, 10, 12]),
        (Retention(last=99), [2, 4, 6, 8, 10, 12]), (Retention(last=1, every=4), [4, 8, 12]),
        (Retention(last=1, every=5), [10, 12]), (Retention(last=1, best=1), [10, 12]),  # of two as good the later
        (Retention(last=1, best=2), [6, 10, 12]), (Retention(last=1, best=3), [6, 8, 10, 12]),
        (Retention(last=1, best=99), [2, 6, 8, 10, 12]), (Retention(last=2, every=8, best=1), [8, 10, 12]),
        (Retention(last=1, reach=1), [10, 12]), (Retention(last=1, reach=2), [10, 12]),
        (Retention(last=1, reach=3), [8, 10, 12]), (Retention(last=1, reach=99), [2, 4, 6, 8, 10, 12]),
    ],
)  # fmt: skip
def test_what_stays(retention, kept, tmp_path):
    fake(tmp_path, *LOSSES, losses=LOSSES.values())
    gone = retention.forgotten(steps(tmp_path))
    assert [n for n in LOSSES if n not in numbers(gone)] == kept
    forget(tmp_path, tmp_path / "step-00000012", retention)
    assert numbers(steps(tmp_path)) == kept


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf"), "1", None, [1], {}])
def test_a_loss_that_is_none_is_not_the_best(loss, tmp_path):
    fake(tmp_path, 1, 2, 3, 4, losses=(2.0, 5.0, 3.0, 9.0))
    edit(tmp_path / "step-00000002", lambda m: m["metrics"].update(validation_loss=loss))
    assert numbers(Retention(last=1, best=2).forgotten(steps(tmp_path))) == [2]


def test_a_damaged_manifest_is_not_the_best(tmp_path):
    fake(tmp_path, 1, 2, 3, losses=(2.0, 1.0, 9.0))
    path = tmp_path / "step-00000002" / "manifest.json"
    path.write_text(path.read_text().replace("1.0", "0.0"))
    assert numbers(Retention(last=1, best=1).forgotten(steps(tmp_path))) == [2]


def test_what_may_be_needed_is_there_whenever_it_is(tmp_path):
    """Saved every 3 steps: at any save the newest that is 7 steps older is there, but at the very beginning."""
    for step in range(3, 60, 3):
        fake(tmp_path, step)
        forget(tmp_path, tmp_path / f"step-{step:08d}", Retention(last=1, reach=7))
        there = numbers(steps(tmp_path))
        assert step <= 9 or max(s for s in there if s <= step - 7) > step - 10
        assert len(there) <= 4


def test_undone(tmp_path):
    fake(tmp_path, 2, 4, 6, 8)
    (tmp_path / "latest").write_text("step-00000008\n")
    undo(tmp_path, [tmp_path / "step-00000006", tmp_path / "step-00000008"])
    assert numbers(candidates(tmp_path)) == [4, 2] and latest(tmp_path) == tmp_path / "step-00000004"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002", "step-00000004"]
    undo(tmp_path, steps(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_that_went_back_has_left_behind_stays(tmp_path):
    """Until it comes to it: then it is one of its own."""
    fake(tmp_path, 5, 10, 15, 20)
    forget(tmp_path, tmp_path / "step-00000010", Retention(last=1))
    assert numbers(steps(tmp_path)) == [10, 15, 20]
    forget(tmp_path, tmp_path / "step-00000020", Retention(last=1))
    assert numbers(steps(tmp_path)) == [20]


def test_a_checkpoint_that_is_a_link_is_forgotten_and_what_it_names_stays(tmp_path):
    """Moved to another disk by hand; it is not ours to empty that."""
    root, other = tmp_path / "checkpoints", tmp_path / "other"
    fake(root, 5, 10)
    (root / "step-00000005").rename(other)
    (root / "step-00000005").symlink_to(other)
    assert find(root / "step-00000005") == root / "step-00000005"
    forget(root, root / "step-00000010", Retention(last=1))
    assert names(root) == ["step-00000010"] and names(other) == ["manifest.json"]
    (root / ".step-00000003.tmp").symlink_to(tmp_path / "nowhere")
    forget(root, root / "step-00000010", Retention(last=1))
    assert names(root) == ["step-00000010"]


def test_what_cannot_be_removed_does_not_keep_the_others(tmp_path):
    fake(tmp_path, 5, 6, 7, 8)
    (tmp_path / ".step-00000001.tmp").write_text("a file")
    real = shutil.rmtree

    def stubborn(path, *args, **kwargs):
        if "00000006" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        real(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", stubborn)
        with pytest.raises(OSError):
            forget(tmp_path, tmp_path / "step-00000008", Retention(last=1))
    assert names(tmp_path) == [".step-00000006.old", "step-00000008"]


# Failures while saving.

OPERATIONS = {
    "os.fsync": (os, "fsync"), "os.open": (os, "open"), "os.rename": (os, "rename"), "os.replace": (os, "replace"),
    "os.mkdir": (os, "mkdir"), "os.unlink": (os, "unlink"), "os.rmdir": (os, "rmdir"),
    "Path.mkdir": (Path, "mkdir"), "Path.replace": (Path, "replace"),
    "Path.open": (Path, "open"), "write": (tensor_file._Checked, "write"), "finish": (tensor_file._Checked, "finish"),
}  # fmt: skip


class Stop(BaseException):
    """The process ends here: nothing that handles errors does anything to the disk."""


class Fault:
    """Counts the calls of all operations that touch the disk, and fails at one of them; after ``Stop``, at all."""

    def __init__(self, monkeypatch, at, error):
        self.at, self.error, self.calls, self.where = at, error, 0, ""
        for name, (owner, attribute) in OPERATIONS.items():
            monkeypatch.setattr(owner, attribute, self.failing(name, getattr(owner, attribute)))

    def failing(self, name, operation):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self.at or (self.where and self.error is Stop):
                self.where = self.where or f"{name}({args})"
                raise self.error("injected")
            return operation(*args, **kwargs)

        return call


def faults(tmp_path, error, step, retention, asynchronous):
    """One folder with the checkpoints of steps 5 and 10 for each operation at which saving ``step`` is made to fail,
    where it failed, and what became of the save."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    before = tmp_path / "before"
    save(before, 5), save(before, 10)
    for at in range(1, 200):
        root = Path(shutil.copytree(before, tmp_path / str(at)))
        (root / ".step-00000001.tmp").mkdir()  # left by a killed process
        with pytest.MonkeyPatch.context() as monkeypatch:
            fault = Fault(monkeypatch, at, error)
            try:
                outcome = save(root, step, retention, asynchronous=asynchronous, tokenizer=tokenizer)
            except Stop as stop:
                outcome = stop
        if not fault.where:
            assert at > 20, "the operations are not the ones that saving uses"
            assert outcome.problem is outcome.warning is None
            return
        yield root, fault.where, outcome
        shutil.rmtree(root)
    raise AssertionError("saving does not end")


@pytest.mark.parametrize(("step", "last", "asynchronous"), [(10, 0, False), (15, 0, True), (15, 1, False)])
def test_a_failure_leaves_the_older_ones_whole(step, last, asynchronous, tmp_path):
    before, outcomes = tmp_path / "before", set()
    for root, where, saved in faults(tmp_path, OSError, step, Retention(last), asynchronous):
        outcomes.add((saved.problem is None, saved.warning is None))
        if saved.problem is not None:
            assert "injected" in saved.problem and "\n" not in saved.problem and saved.warning is None
            assert content(root / "step-00000005") == content(before / "step-00000005"), where
            if step == 15:
                assert content(root / "step-00000010") == content(before / "step-00000010"), where
        else:  # clearing up can fail without harm
            assert latest(root) == saved.folder and check_whole(saved.folder) == step, where
        whole = [check_whole(folder) for folder in candidates(root)]
        assert whole[0] in (10, 15) and (last or {5, 10} <= {*whole}), where
        assert save(root, 20, Retention(last=1), asynchronous=asynchronous).warning is None
        assert names(root) == ["latest", "step-00000020"], where
        assert check_whole(root / "step-00000020") == 20
    assert outcomes >= {(False, True), (True, False)}


@pytest.mark.parametrize(("step", "last", "asynchronous"), [(10, 0, False), (15, 0, True), (15, 1, False)])
def test_a_process_that_dies_leaves_whole_checkpoints(step, last, asynchronous, tmp_path):
    for root, where, outcome in faults(tmp_path, Stop, step, Retention(last), asynchronous):
        assert isinstance(outcome, Stop), where
        whole = [check_whole(folder) for folder in candidates(root)]
        # A checkpoint that is saved again is not there for the moment in which it changes places.
        assert whole and whole[0] in ((5, 10) if step == 10 else (10, 15)), where
        assert last or 5 in whole
        save(root, 20, Retention(last=1), asynchronous=asynchronous)
        assert names(root) == ["latest", "step-00000020"], where


def test_latest_changes_when_the_new_one_is_there(tmp_path, monkeypatch):
    """And before any old one goes."""
    save(tmp_path, 5)
    seen = []
    real = folders.remove
    monkeypatch.setattr(
        folders, "remove", lambda folder: seen.append((names(tmp_path), latest(tmp_path))) or real(folder)
    )
    save(tmp_path, 10, Retention(last=1))
    assert seen and all(found == tmp_path / "step-00000010" for _, found in seen)
    assert json.loads((tmp_path / "step-00000010" / "manifest.json").read_text())["step"] == 10
