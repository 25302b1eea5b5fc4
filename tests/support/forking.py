"""A process that imports what ranks need, once, and forks a fresh one in milliseconds: the imports alone take seconds.

Nothing is inherited but modules: before the first fork there is one thread, no socket and no process group.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

# The last three are imported at their first use only.
PRELOAD = (
    "pytest",
    "hypothesis",
    "farspan.pretrain.train",
    "farspan.pretrain.data.prepare",
    "deepspeed",
    "megatron.core.transformer.multi_token_prediction",
    "numpy.ma",
)

_SECONDS = 180.0  # for the imports, and for an answer on a busy machine
_NUMBER = struct.Struct("=i")


class ForkServer:
    """Starts at once; ``fork`` waits for it.  It ends, and all that it forked, when this process does."""

    def __init__(self, preload: Sequence[str] = PRELOAD) -> None:
        self._control, there = socket.socketpair()
        self._control.settimeout(_SECONDS)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by stop)
        path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
        # OpenMP's threads would not survive a fork: one thread from the start.  On a machine with a GPU torch is to
        # look for it without starting CUDA, which does not survive one either.
        threads = {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        code = f"import forking, ranks; forking.serve({there.fileno()}, ranks.serve, {tuple(preload)!r})"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-u", "-c", code],
            env={**os.environ, "PYTHONPATH": path, **threads},
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            process_group=0,
        )
        there.close()

    def fork(self, connection: int, log: int) -> int:
        """A process, in a group of its own, that serves this descriptor and prints to that one; its pid."""
        return self._ask(0, [connection, log])

    def wait(self, pid: int) -> int:
        """Wait for the end of a process that was forked, as Popen.wait does.  Until then its pid stays its own."""
        return self._ask(pid)

    def stop(self) -> None:
        """The server ends, and all that it forked."""
        self._control.close()
        self._process.wait(_SECONDS)
        self._log.close()

    def _ask(self, number: int, descriptors: Sequence[int] = ()) -> int:
        with contextlib.suppress(OSError):
            socket.send_fds(self._control, [_NUMBER.pack(number)], descriptors)
            answer = self._control.recv(_NUMBER.size)
            if answer:
                return int(_NUMBER.unpack(answer)[0])
        self._control.close()  # an answer that came late would pass for that to the next question
        self._log.seek(0)
        raise RuntimeError(f"the fork server does not answer:\n{self._log.read().decode(errors='replace')[-6000:]}")


def serve(descriptor: int, rank: Callable[[int], None], preload: Sequence[str]) -> None:
    """The server: forks a process that runs ``rank(its connection)`` where two descriptors come, else waits for one."""
    control = socket.socket(fileno=descriptor)
    for name in preload:
        importlib.import_module(name)
    tasks = Path("/proc/self/task")
    assert not tasks.exists() or len(list(tasks.iterdir())) == 1, "an import started a thread: a fork would lose it"
    gc.collect()
    gc.freeze()  # the garbage collector of a forked process is not to touch, and so copy, what it shares
    children: set[int] = set()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, _NUMBER.size, 2)
        if not message:
            break
        number = int(_NUMBER.unpack(message)[0])
        if descriptors:
            number = os.fork()
            if number == 0:
                control.close()
                _become(rank, *descriptors)
            with contextlib.suppress(PermissionError, ProcessLookupError):  # it has done so itself
                os.setpgid(number, number)
            children.add(number)
            for other in descriptors:
                os.close(other)
        else:
            children.discard(number)
            number = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
        with contextlib.suppress(OSError):  # nobody waits for it any more: the next message is the end
            control.sendall(_NUMBER.pack(number))
    for pid in children:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _become(rank: Callable[[int], None], connection: int, log: int) -> None:
    """The rest of a forked process's life."""
    try:
        os.setpgid(0, 0)
        for output in (1, 2):
            os.dup2(log, output)
        os.close(log)
        rank(connection)
    finally:
        os._exit(1)
