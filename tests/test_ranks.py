"""The helper that the tests of several processes stand on: it must fail loudly and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks as helper
from forking import ForkServer
from ranks import RankError, Ranks


@pytest.fixture
def own(fork_server):
    pool = Ranks(fork_server)
    yield pool
    pool.stop()


def names(mesh, greeting):
    return greeting, mesh.rank, mesh.tensor.rank, mesh.pipeline.rank, mesh.data.rank


def place():
    return os.environ["RANK"], os.environ["WORLD_SIZE"], os.getpid()


def fail_on(number):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if dist.get_rank() == number:
        raise ValueError("a reason of its own")
    dist.barrier()


def die_on(number):
    print(f"the last words of {os.environ['RANK']}")
    if int(os.environ["RANK"]) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def hang(number):
    if int(os.environ["RANK"]) == number:
        time.sleep(60)


def state():
    tasks = Path("/proc/self/task")
    threads = [task.name for task in tasks.iterdir()] if tasks.exists() else [None] * 2
    return "deepspeed" in sys.modules, len(threads), os.getpgrp() == os.getpid(), os.environ["OMP_NUM_THREADS"]


def gone(pids):
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_meshes_one_after_the_other_in_the_same_processes(ranks):
    assert ranks.on_mesh(names, "a", tensor=2) == [("a", 0, 0, 0, 0), ("a", 1, 1, 0, 0)]
    pids = ranks.pids
    assert ranks.on_mesh(names, "b", pipeline=2) == [("b", 0, 0, 0, 0), ("b", 1, 0, 1, 0)]
    assert ranks.on_mesh(names, "c", data=2) == [("c", 0, 0, 0, 0), ("c", 1, 0, 0, 1)]
    assert ranks.run(place, count=1) == [("0", "1", pids[0])]
    assert ranks.pids == pids


def test_fresh_ranks_have_all_imports_and_nothing_else(own):
    """The second thread waits for calls."""
    assert own.run(state, count=2) == [(True, 2, True, "1")] * 2


def test_begun_and_stopped(own):
    own.begin(place, count=2)
    own.finish()
    pids = own.pids
    own.begin(hang, 0, count=2)
    end = time.monotonic() + 10
    while not own.answered():  # rank 1 has nothing to wait for
        assert time.monotonic() < end
    assert own.stop() == [-signal.SIGKILL] * 2
    assert gone(pids)
    own.begin(hang, 0, count=1)
    assert not own.answered()


def test_fork_server_that_cannot_start_says_why():
    server = ForkServer(preload=("farspan.nothing",))
    with pytest.raises(RuntimeError, match=r"No module named.*nothing"):
        Ranks(server).run(place, count=1)
    server.stop()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (fail_on, "rank 1:.*a reason of its own"),
        (die_on, "rank 1 ended with code -9:\nthe last words of 1\n$"),
        (hang, r"ranks \[1\](?s:.*)in hang"),
    ],
)
def test_failure_is_told_and_ends_all(own, function, said):
    own.run(place, count=2)
    pids = own.pids
    with pytest.raises(RankError, match=f"(?s){said}"):
        own.run(function, 1, count=2, seconds=10 if function is not hang else 1)
    assert gone(pids)
    assert [rank for rank, *_ in own.run(place, count=2)] == ["0", "1"]  # new ones


def test_ranks_end_with_the_process_that_started_them():
    code = """
import os, signal, sys, threading, time
sys.path[:0] = sys.argv[1:]
import forking, ranks, test_ranks
pool = ranks.Ranks(forking.ForkServer(preload=()))
pool.run(test_ranks.place, count=2)
print(*pool.pids, flush=True)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
pool.run(test_ranks.hang, 0, count=2)
"""
    folders = [str(Path(file).parent) for file in (helper.__file__, __file__)]
    ended = subprocess.run([sys.executable, "-P", "-c", code, *folders], stdout=subprocess.PIPE, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in ended.stdout.split()]
    assert len(pids) == 2 and gone(pids)
