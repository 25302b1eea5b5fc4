"""Starts the guard of this rank (``guard_process``), and is its hand in the rank: stacks, and the end."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from ..pretrain import heartbeat
from ..pretrain.heartbeat import Heartbeat, Record
from .exit_codes import HUNG
from .guard_process import ASK_END, ASK_STACKS, STACKS_SIGNAL
from .parent import die_with

# Nothing that is installed, no environment variables: what the guard imports is what Python has, and this package, from
# where it lies, whatever its folder is called.
_PROGRAM = """\
import sys
from importlib import util
spec = util.spec_from_file_location("farspan", {root!r} + "/__init__.py", submodule_search_locations=[{root!r}])
sys.modules["farspan"] = package = util.module_from_spec(spec)
spec.loader.exec_module(package)
from farspan.launch.guard_process import main
main()
"""


class Guard:
    """The guard of this process, from its start to the end of the process or ``stop``."""

    def __init__(self, rank: int, world: int) -> None:
        """Start it; it knows no limits before ``configure``.  Linux only."""
        self._rank, self._stopping = rank, False
        record, self._stacks = Record.file(), os.memfd_create("farspan-stacks")
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
        reader, writer = os.pipe()
        arguments = {"rank": rank, "world": world, "parent": os.getpid()}
        arguments |= {"record": record, "stacks": self._stacks, "pipe": writer}
        program = _PROGRAM.format(root=str(Path(__file__).resolve().parents[1]))
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program, json.dumps(arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # it has this process's standard error, and nothing else that others wait for
            pass_fds=[record, self._stacks, writer],
            start_new_session=True,
            preexec_fn=die_with(os.getpid()),
        )
        os.close(writer)
        self.heartbeat = Heartbeat(Record(record))
        os.close(record)
        heartbeat.use(self.heartbeat)
        threading.Thread(target=self._listen, args=(reader,), name="farspan-guard", daemon=True).start()

    def configure(self, *, run_dir: str, hang_seconds: float, timeout_seconds: float) -> None:
        """Tell it where to write, and how long this rank may be silent: in training and evaluation (0: the guard ends),
        and otherwise."""
        if not hang_seconds:
            self.stop()
            return
        self.heartbeat.settings(
            {"run_dir": str(Path(run_dir).absolute()), "hang_seconds": hang_seconds, "timeout_seconds": timeout_seconds}
        )

    def stop(self) -> None:
        """End the guard; the process goes on without one."""
        if self._stopping:
            return
        self._stopping = True
        heartbeat.use(Heartbeat())
        self._process.kill()
        self._process.wait()
        faulthandler.unregister(STACKS_SIGNAL)
        os.close(self._stacks)

    def _listen(self, pipe: int) -> None:
        """In a thread, what the guard asks for; if the guard ends itself, the rank goes on.

        A thread that runs has the interpreter's lock, so that no other one changes the frames that are read here.  In a
        signal's handler that is not so, and a process that is not stuck can die of it.
        """
        with open(pipe, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                asked, _, folder = line.rstrip("\n").partition(" ")
                if asked == ASK_STACKS:
                    faulthandler.dump_traceback(self._stacks, all_threads=True)
                elif asked == ASK_END:
                    with contextlib.suppress(BaseException):
                        _write_flight_record(folder, self._rank)
                    os._exit(HUNG)
        if not self._stopping:
            print("farspan: the guard of this rank has ended: nobody notices if it hangs", file=sys.stderr, flush=True)


def _write_flight_record(folder: str, rank: int) -> None:
    """What NCCL's flight recorder knows, for ``torchfrtrace``: on a GPU a rank that waits is in no collective any more,
    its stream is."""
    torch: Any = sys.modules.get("torch")
    if not folder or torch is None or not torch.cuda.is_initialized():
        return
    dump = torch._C._distributed_c10d._dump_nccl_trace(includeCollectives=True, includeStackTraces=False)
    (Path(folder) / f"flight-record-{rank}").write_bytes(dump)
