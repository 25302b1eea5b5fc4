"""Asked to stop: by a signal, or because the job's time is running out."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

# Unix seconds.  The first is for schedulers that do not say it, the second is SLURM's.
END_TIMES = ("FARSPAN_JOB_END_TIME", "SLURM_JOB_END_TIME")
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_END_OF_TIME = 255  # no signal has this number


class StopRequests:
    """While it is open, SIGTERM and SIGUSR1 do not end this process but are remembered, and so is that the job ends in
    less than ``margin_seconds``.

    Schedulers send such signals to all ranks or to some, sooner to one than to another: a rank tells the others
    ``code``, and all stop after the same step.  Before it is open, while a run starts, a signal ends the process:
    nothing is there to save.
    """

    def __init__(self, margin_seconds: float, environ: Mapping[str, str] = os.environ) -> None:
        self._received = 0
        self._previous: dict[int, Any] = {}
        self._stop_at = end_time(environ) - margin_seconds

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():  # others cannot have handlers
            self._previous = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _remember(self, number: int, _: FrameType | None) -> None:
        self._received = self._received or number

    @property
    def code(self) -> int:
        """Why this rank was asked to stop, as a number; 0: it was not."""
        if self._received:
            return self._received
        return _END_OF_TIME if time.time() >= self._stop_at else 0

    @staticmethod
    def agreed(codes: list[list[float]] | None) -> str | None:
        """The first of what ranks said that is a reason, in words; None where none is.  ``codes``: a row of each rank
        that begins with its ``code``."""
        code = next((int(row[0]) for row in codes or () if row[0]), None)
        if code is None:
            return None
        return "the end of the job's time" if code == _END_OF_TIME else signal.Signals(code).name


def end_time(environ: Mapping[str, str] = os.environ) -> float:
    """When the job ends, in Unix seconds; infinity where nobody says.  ValueError where that is no number."""
    for name in END_TIMES:
        if text := environ.get(name):
            try:
                return float(text)
            except ValueError:
                raise ValueError(f"{name}={text!r} is no time in Unix seconds: set it to one, or unset it") from None
    return float("inf")
