"""The ledger of collectives, against what the ranks did."""

from __future__ import annotations

import time
import types
from typing import Any

import pytest
import torch
import torch.distributed as dist

from farspan.parallel import ledger as ledger_module
from farspan.parallel.ledger import Ledger
from farspan.pretrain.heartbeat import Heartbeat, Record

SECONDS = 0.5


class Board(Heartbeat):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(Record(Record.file()))
        self.told: list[tuple[str, int]] = []

    def begun(self, slot: int, number: int, name: int, elements: int) -> None:
        super().begun(slot, number, name, elements)
        self.told.append(("begun", number))

    def waits(self, slot: int, number: int, name: int, elements: int) -> None:
        super().waits(slot, number, name, elements)
        self.told.append(("waits", number))

    def ended(self, slot: int, number: int) -> None:
        super().ended(slot, number)
        self.told.append(("ended", number))


def state(board: Board) -> dict[str, Any]:
    assert board.record is not None
    return board.record.state()


def last(board: Board) -> tuple[str, int, int, bool]:
    found = state(board)["last"]
    return found["name"], found["number"], found["elements"], found["waiting"]


def test_on_a_gpu_a_collective_that_nobody_waits_for_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of NCCL's that are not asynchronous torch keeps no request: it is the stream that waits, from its launch on."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    class Event:
        def __init__(self) -> None:
            self.made = len(events)
            events.append(self)

        def query(self) -> bool:
            return True

        def elapsed_time(self, end: Event) -> float:
            return 1000.0 * (end.made - self.made)

    events: list[Event] = []
    board = Board()
    ledger = Ledger(board)
    monkeypatch.setattr(ledger_module, "_event", Event)
    series = ledger_module._Series(board.group("0", "world", [0, 1]))
    monkeypatch.setattr(ledger, "_series_of", lambda *_: series)
    tensor = torch.ones(6).as_subclass(OnGpu)

    def begin(work: Any, **options: bool) -> Any:
        call = ([tensor], types.SimpleNamespace(**options))
        return ledger._begin("a group", "", None, "all_reduce", lambda *_: work, call, {})

    assert begin(None, asyncOp=False) is None
    assert board.told == [("begun", 1), ("ended", 1)] and ledger.waited() == 1.0
    work = Event()  # what somebody will wait for
    assert begin(work, asyncOp=True) is work
    assert board.told[2:] == [("begun", 2)] and ledger.waited() == 0.0


def every_collective(mesh: Any) -> list[Any]:
    """What the board says after each."""
    size, rank = mesh.size, mesh.rank
    one, two = torch.ones(6), torch.ones(6, dtype=torch.float64)
    steps = [
        lambda: dist.all_reduce(one),
        lambda: dist.all_reduce(two, async_op=True).wait(),
        lambda: dist.broadcast(one, src=0),
        lambda: dist.all_gather([torch.ones(6) for _ in range(size)], one),
        lambda: dist.all_gather_into_tensor(torch.ones(6 * size), one),
        lambda: dist.reduce_scatter_tensor(torch.ones(6 // size), one),
        lambda: dist.all_to_all_single(torch.ones(6), one),
        lambda: dist.reduce(one, dst=0),
        lambda: dist.gather(one, [torch.ones(6) for _ in range(size)] if rank == 0 else None, dst=0),
        lambda: dist.scatter(one, [torch.ones(6) for _ in range(size)] if rank == 0 else None, src=0),
        lambda: dist.barrier(),
    ]
    board, found = Board(), []
    with Ledger(board).installed():
        for step in steps:
            board.told.clear()
            step()
            found.append((last(board), list(board.told)))
        board.told.clear()
        dist.all_gather_object([None] * size, "words")
        objects = len(board.told)
    board.told.clear()
    dist.all_reduce(one)
    return [found, objects, list(board.told)]


def test_every_collective_is_seen(ranks) -> None:
    names = [
        "all_reduce float32", "all_reduce float64", "broadcast float32", "all_gather float32",
        "all_gather_into_tensor float32", "reduce_scatter_tensor float32", "all_to_all_single float32",
        "reduce float32", "gather float32", "scatter float32", "barrier",
    ]  # fmt: skip
    for found, objects, outside in ranks.on_mesh(every_collective, data=2):
        assert [said[0] for said, _ in found] == names
        assert [said[1] for said, _ in found] == list(range(1, 12))
        assert not any(said[3] for said, _ in found)
        assert found[0][0][2] == 6
        for said, told in found:
            assert told == [("begun", said[1]), ("waits", said[1]), ("ended", said[1])], said
        assert objects == 2 * 3  # sizes and contents
        assert outside == []  # not installed any more


def groups_and_messages(mesh: Any) -> dict[str, Any]:
    board = Board()
    with Ledger(board).installed():
        if mesh.pipeline.first:
            for _ in range(3):
                dist.send(torch.ones(4), dst=mesh.rank + 2)
        else:
            for _ in range(3):
                dist.recv(torch.ones(4), src=mesh.rank - 2)
        dist.all_reduce(torch.ones(2), group=mesh.tensor.group)
        dist.all_reduce(torch.ones(2), group=mesh.pipeline.group)
        dist.all_reduce(torch.ones(2), group=mesh.tensor.group)
    return state(board)["groups"]


def test_groups_and_messages_count_by_themselves(ranks) -> None:
    found = ranks.on_mesh(groups_and_messages, tensor=2, pipeline=2)
    for rank, groups in enumerate(found):
        low, high = rank % 2, rank % 2 + 2
        messages = {key: group for key, group in groups.items() if ">" in key}
        assert [key.split()[1] for key in messages] == [f"{low}>{high}"]
        counts = sorted(
            (group["name"], tuple(group["ranks"]), group["begun"], group["ended"]) for group in groups.values()
        )
        tensor = (rank // 2 * 2, rank // 2 * 2 + 1)
        assert counts == [
            ("PIPELINE_MODEL_PARALLEL_GROUP", (low, high), 1, 1),
            ("TENSOR_MODEL_PARALLEL_GROUP", tensor, 2, 2),
            (f"default_pg (messages from rank {low} to {high})", (low, high), 3, 3),
        ]
    keys = [set(groups) for groups in found]
    assert keys[0] & keys[2] and len(keys[0] & keys[1]) == 1  # of the same group the same key, on all ranks


def late(mesh: Any) -> tuple[float, float, float]:
    """The last rank comes late: how long each has waited; then the same without waiting for it."""
    ledger, x = Ledger(Heartbeat()), torch.ones(3)
    with ledger.installed():
        dist.barrier()
        ledger.waited()
        if mesh.rank == mesh.size - 1:
            time.sleep(SECONDS)
        dist.all_reduce(x)
        first = ledger.waited()
        work = dist.all_reduce(x, async_op=True)
        time.sleep(SECONDS)
        work.wait()
        second = ledger.waited()
    return first, second, ledger.waited()


def test_seconds_waited(ranks) -> None:
    found = ranks.on_mesh(late, data=2)
    assert 0.8 * SECONDS < found[0][0] < 2 * SECONDS
    assert found[1][0] < 0.5 * SECONDS  # who is late does not wait
    for _, beside, nothing in found:
        assert beside < 0.5 * SECONDS and nothing == 0.0


def waiting(mesh: Any) -> Any:
    """What another process would read while the first rank waits for the second."""
    import threading

    board, seen = Board(), []
    assert board.record is not None
    with Ledger(board).installed():
        dist.all_reduce(torch.ones(1))
        look = threading.Timer(SECONDS / 2, lambda: seen.append(state(board)["last"]))
        if mesh.rank == 0:
            look.start()
        else:
            time.sleep(SECONDS)
        dist.all_reduce(torch.ones(5))
        if mesh.rank == 0:
            look.join()
    return seen


def test_whoever_waits_is_seen_to_wait(ranks) -> None:
    (seen,), nothing = ranks.on_mesh(waiting, data=2)
    assert (seen["name"], seen["number"], seen["elements"], seen["waiting"]) == ("all_reduce float32", 2, 5, True)
    assert 0.1 * SECONDS < seen["seconds"] < SECONDS
    assert nothing == []


def test_a_record_that_is_full_goes_on_without_names() -> None:
    board = Heartbeat(Record(Record.file()))
    long = "x" * 1000
    slots = [board.group(f"{index}", long, [0, 1]) for index in range(600)]
    assert slots[0] == 0 and slots[-1] is None
    assert board.name("one more" + long * 200) is None
    board.beat(5)
    assert board.record is not None
    assert board.record.state()["step"] == 5
    assert len(board.record.state()["groups"]) == sum(slot is not None for slot in slots)


@pytest.mark.parametrize("ranks_said", [[0, 1, 2, 3], [3, 7, 11], [0, 2, 3], [5], [2, 0]])
def test_ranks_of_a_group_are_told_whole(ranks_said: list[int]) -> None:
    from farspan.pretrain.heartbeat import ranks_of

    board = Heartbeat(Record(Record.file()))
    board.group("a", "group", ranks_said)
    assert board.record is not None
    assert ranks_of(board.record.state()["groups"]["a"]["ranks"]) == ranks_said


def test_phases() -> None:
    board = Heartbeat(Record(Record.file()))
    record = board.record
    assert record is not None
    beats = [record.beats]
    with board.phase("training"):
        beats.append(record.beats)
        with board.phase("saving"):
            assert record.phase == "saving"
        beats.append(record.beats)
        assert record.phase == "training"
    assert record.phase == "starting"
    assert beats == sorted(set(beats))
    with pytest.raises(ValueError, match="not in tuple"), board.phase("dreaming"):
        pass
