"""Ranks for tests: processes that start once and then run functions of the test modules, on a mesh if one is asked for.

    def halves(mesh, x):                        # top level in the test module
        return x.chunk(mesh.tensor.size)[mesh.tensor.rank]

    def test_halves(ranks):
        left, right = ranks.on_mesh(halves, torch.arange(4), tensor=2)

A rank that fails, dies or hangs ends them all; the next call starts new ones, which takes milliseconds: they are forked
from a process that has imported what they need.  A rank ends by itself when the process that asked for it is gone,
however that went.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import importlib.util
import inspect
import os
import pickle
import queue
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe, wait
from typing import IO, Any

from forking import ForkServer

from farspan.launch.environment import RankEnvironment, apply
from farspan.launch.local import free_port

SECONDS = 60.0  # a call's time limit unless it says otherwise


class RankError(Exception):
    """What happened on the first rank that failed."""


@dataclasses.dataclass(frozen=True)
class _Call:
    """A function by the file that holds it: pytest imports test modules under names that nobody else can import."""

    module: str
    file: str
    name: str
    arguments: bytes  # pickled: read once the module is there
    environment: RankEnvironment
    mesh: tuple[int, int] | None  # tensor, pipeline

    def function(self) -> Callable[..., Any]:
        if self.module not in sys.modules:
            spec = importlib.util.spec_from_file_location(self.module, self.file)
            assert spec is not None and spec.loader is not None
            sys.modules[self.module] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return functools.reduce(getattr, self.name.split("."), sys.modules[self.module])  # type: ignore[arg-type]

    def __call__(self) -> Any:
        apply(self.environment)
        function = self.function()
        args, kwargs = pickle.loads(self.arguments)
        if self.mesh is None:
            return function(*args, **kwargs)
        import torch

        from farspan.parallel import cpu
        from farspan.parallel.mesh import Mesh

        cpu.patch()
        tensor, pipeline = self.mesh
        mesh = Mesh.create(tensor, pipeline, device=torch.device("cpu"), timeout_seconds=SECONDS)
        try:
            return function(mesh, *args, **kwargs)
        finally:
            mesh.destroy()


@dataclasses.dataclass
class _Process:
    pid: int
    server: ForkServer
    connection: Connection
    log: IO[bytes]
    code: int | None = None  # how it ended

    @staticmethod
    def start(server: ForkServer) -> _Process:
        here, there = Pipe()
        log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by end)
        with there:
            return _Process(server.fork(there.fileno(), log.fileno()), server, here, log)

    def signal(self, number: int) -> None:
        """To the rank and whatever it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def wait(self) -> int:
        """Wait for its end; how it ended, as Popen.wait says it."""
        if self.code is None:
            self.code = self.server.wait(self.pid)
        return self.code

    def close(self) -> None:
        self.connection.close()
        self.log.close()

    def last_words(self) -> str:
        """The end of what it printed; where it stands, if it still runs."""
        if self.code is None:
            os.kill(self.pid, signal.SIGUSR2)
            time.sleep(0.5)
        size = self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, size - 6000))
        return self.log.read().decode(errors="replace")


class Ranks:
    """The processes, as many as were asked for so far."""

    def __init__(self, server: ForkServer) -> None:
        self._server = server
        self._ranks: list[_Process] = []
        self._running = 0  # the first so many have been called and not been heard yet
        self._what = ""

    def run(self, function: Callable[..., Any], *args: Any, count: int, seconds: float = SECONDS, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)`` on ``count`` ranks at once, in the environment that a launcher would give them;
        the list of what they return.  RankError where one fails or ``seconds`` pass."""
        self.begin(function, *args, count=count, **kwargs)
        return self.finish(seconds)

    def on_mesh(
        self,
        function: Callable[..., Any],
        *args: Any,
        tensor: int = 1,
        pipeline: int = 1,
        data: int = 1,
        seconds: float = SECONDS,
        **kwargs: Any,
    ) -> Any:
        """``function(mesh, *args, **kwargs)`` on every rank of a mesh of these sizes; the list of what they return."""
        self._begin(function, args, kwargs, tensor * pipeline * data, (tensor, pipeline))
        return self.finish(seconds)

    def begin(self, function: Callable[..., Any], *args: Any, count: int, **kwargs: Any) -> None:
        """The first half of ``run``, which does not wait; ``finish`` or ``stop`` follows."""
        self._begin(function, args, kwargs, count, None)

    def answered(self) -> bool:
        """Whether one of the ranks that were called has returned, failed or died."""
        return bool(wait([rank.connection for rank in self._ranks[: self._running]], 0.0))

    def finish(self, seconds: float = SECONDS) -> list[Any]:
        """The second half of ``run``."""
        try:
            return self._results(self._running, time.monotonic() + seconds, f"{self._what}, {seconds:.0f} s")
        except BaseException:
            self.stop()
            raise
        finally:
            self._running = 0

    def stop(self) -> list[int]:
        """SIGKILL to all ranks at once, whatever they do; no process is left after this.  How each of them ended."""
        for rank in self._ranks:
            rank.signal(signal.SIGKILL)
        codes = [rank.wait() for rank in self._ranks]
        for rank in self._ranks:
            rank.close()
        self._ranks, self._running = [], 0
        return codes

    @property
    def pids(self) -> list[int]:
        return [rank.pid for rank in self._ranks]

    def _begin(self, function: Callable[..., Any], args: Any, kwargs: Any, count: int, mesh: Any) -> None:
        while len(self._ranks) < count:
            self._ranks.append(_Process.start(self._server))
        self._running, self._what = count, function.__qualname__
        port = free_port()
        for number, rank in enumerate(self._ranks[:count]):
            environment = RankEnvironment(number, number, count, count, "127.0.0.1", port)
            where = function.__module__, inspect.getfile(function), function.__qualname__
            call = _Call(*where, pickle.dumps((args, kwargs)), environment, mesh)
            rank.connection.send_bytes(pickle.dumps(call))

    def _results(self, count: int, deadline: float, what: str) -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[tuple[float, str]] = []
        while len(results) + len(failures) < count:
            waiting = {self._ranks[i].connection: i for i in range(count) if i not in results}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready and not failures:
                words = "\n".join(f"[rank {i}] {self._ranks[i].last_words()}" for i in sorted(waiting.values()))
                raise RankError(f"time is over ({what}) for ranks {sorted(waiting.values())}:\n{words}")
            if not ready:
                break
            for connection in ready:
                number = waiting[connection]  # type: ignore[index]
                results[number], failure = self._receive(number)
                if failure is not None:
                    failures.append(failure)
                    # A rank that lost its partner may be the first to say so: hear them all.
                    deadline = min(deadline, time.monotonic() + 1.0)
            if failures and len(results) == count:
                break
        if failures:
            raise RankError(min(failures)[1])
        return [results[number] for number in range(count)]

    def _receive(self, number: int) -> tuple[Any, tuple[float, str] | None]:
        rank = self._ranks[number]
        try:
            when, succeeded, value = pickle.loads(rank.connection.recv_bytes())
        except (EOFError, ConnectionError):
            return None, (0.0, f"rank {number} ended with code {rank.wait()}:\n{rank.last_words()}")
        return (value, None) if succeeded else (None, (when, f"rank {number}:\n{value}"))


def serve(descriptor: int) -> None:
    """A rank: runs what arrives, one call after the other, until the other end is gone."""
    faulthandler.register(signal.SIGUSR2)
    connection = Connection(descriptor)
    calls: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        # In a thread, so that the end of the parent is noticed while a call hangs in a collective.
        with contextlib.suppress(EOFError, OSError):
            while True:
                calls.put(connection.recv_bytes())
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        call = calls.get()
        try:
            answer = pickle.dumps((time.monotonic(), True, pickle.loads(call)()))
        except BaseException:
            answer = pickle.dumps((time.monotonic(), False, traceback.format_exc()))
        connection.send_bytes(answer)
