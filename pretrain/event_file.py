"""What TensorBoard reads: a file of Event messages (tensorflow/core/util/event.proto), each in a TFRecord.

torch's SummaryWriter leaves the writing to a thread, which a full disk ends: what comes later is lost, or an error.
"""

from __future__ import annotations

import io
import itertools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import text

from .appended import Appended

_NUMBERS = itertools.count()  # of this process's files


class EventFile(Appended):
    """A new file in the folder ``folder``.  TensorBoard drops what older ones say of ``purge_step`` and later steps."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        super().__init__(folder / name)
        self.append(_record(0, file_version="brain.Event:2"))
        self.append(_record(purge_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> str | None:
        """Curves, one for every name; what ``append`` returns."""
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        return self.append(_record(step, summary=Summary(value=points)))

    def text(self, step: int, name: str, words: str) -> str | None:
        """Markdown; what ``append`` returns."""
        return self.append(_record(step, summary=text(name, words)))


def _record(step: int, **content: Any) -> bytes:
    record = io.BytesIO()
    RecordWriter(record).write(Event(wall_time=time.time(), step=step, **content).SerializeToString())
    return record.getvalue()
