"""What is told of a run's starts and ends, in ``run_dir/restarts.jsonl``, and how long starting again makes sense."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILE = "restarts.jsonl"
FRUITLESS = 3  # starts again in a row without a new checkpoint, after which a supervisor gives up

Record = dict[str, Any]


def record(run_dir: Path, event: str, **about: Any) -> None:
    """Add a line.  A disk that is full keeps no run from starting."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = json.dumps({"time": now, "event": event} | {k: v for k, v in about.items() if v is not None}) + "\n"
    with contextlib.suppress(OSError):
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, line.encode())  # one write: lines of several processes do not mix
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def records(run_dir: Path) -> list[Record]:
    """All lines, the oldest first; one that a failure has cut is left out."""
    try:
        lines = (run_dir / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            if isinstance(value := json.loads(line), dict):
                found.append(value)
    return found


def fruitless(told: Sequence[Record], step: int, before: str | None = None) -> int:
    """How many of the last starts began at ``step`` and have brought no checkpoint since.

    Those that were asked to stop do not count, nor those that a job scheduler ended and started again by itself
    (preempted, a node lost): a start without an end after which the same job began again.  ``before``: the job that is
    about to be started.  Other starts whose end nobody could tell count.
    """
    count, asked, job = 0, False, before
    for one in reversed(told):
        if one.get("event") == "end":
            asked, job = bool(one.get("asked")), None
        elif one.get("event") == "start":
            if one.get("step") != step:
                break
            count += not (asked or (job is not None and one.get("job") == job))
            asked, job = False, one.get("job")
    return count
