"""How each rank ended, in its own words.

A launcher's exit code tells little: srun gives the highest of all, so that an error of one rank hides behind the
signals that end the others, torchrun's agent gives 1.  Where ``ENDINGS`` names a folder, ``farspan train`` leaves a
note there when it ends by itself with another code than 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from .exit_codes import DONE, FAULT, STOPPED, USER_ERROR

ENDINGS = "FARSPAN_ENDINGS"


@dataclasses.dataclass(frozen=True)
class Ending:
    rank: int
    code: int
    time: float  # Unix seconds
    kind: str = ""  # of the error
    message: str = ""
    restart: int = 0  # how often torchrun's agent had started the ranks again

    @property
    def is_final(self) -> bool:
        """Whether starting again changes nothing.  A folder that another run holds may be free later: after the loss
        of a node its ranks may live on for a while."""
        return self.code == USER_ERROR and self.kind != "InUse"


def note(
    code: int, error: BaseException | None = None, message: str = "", environ: Mapping[str, str] = os.environ
) -> None:
    """Leave word of how this rank ends; never an error."""
    folder, rank = environ.get(ENDINGS), environ.get("RANK") or environ.get("SLURM_PROCID", "0")
    if not folder or not rank.isdigit():
        return
    kind, restart = type(error).__name__ if error else "", environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    ending = Ending(int(rank), code, time.time(), kind, message[:1000], int(restart) if restart.isdigit() else 0)
    path = Path(folder, f"rank-{int(rank):05d}.json")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(dataclasses.asdict(ending)) + "\n", encoding="utf-8")
        beside.replace(path)


def read(folder: Path) -> list[Ending]:
    """All notes of a folder, the earliest first; none where there is no folder."""
    found = []
    for path in folder.glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(Ending(**json.loads(path.read_text(encoding="utf-8"))))
    return sorted(found, key=lambda ending: ending.time)


def final(endings: list[Ending]) -> Ending | None:
    """The first that makes starting again useless; None where none does."""
    return next((ending for ending in endings if ending.is_final), None)


def cause(endings: list[Ending]) -> Ending | None:
    """The first that went wrong of those that were started last, as far as they have said so; one that knows what went
    wrong before one that does not: the end of a rank is an error of others.  None where nobody said anything."""
    last = max((ending.restart for ending in endings), default=0)
    wrong = [one for one in endings if one.restart == last and one.code not in (DONE, STOPPED)]
    return min(wrong, key=lambda one: (one.code == FAULT, one.time), default=None)
