"""What ranks tell each other after every step: whether one of them was asked to stop, and how long each was busy."""

from __future__ import annotations

from ..parallel.mesh import Mesh
from ..parallel.roll_call import RollCall
from .config import Config
from .lease import Lease
from .metrics import MetricsWriter
from .stop import StopRequests
from .stragglers import stragglers_of


class Rounds:
    """While it is open, a signal that asks this rank to stop is heard, and all ranks learn of it; every method is
    collective.  ``lease``: of the run folder, where this rank holds it."""

    def __init__(self, config: Config, mesh: Mesh, lease: Lease | None, writer: MetricsWriter) -> None:
        self._lease, self._writer = lease, writer
        self._roll_call, self._stragglers = RollCall(mesh), stragglers_of(config, mesh)
        self._stop = StopRequests(config.checkpoint.margin_seconds)

    def __enter__(self) -> Rounds:
        self._stop.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.__exit__()
        if kind is None:
            self._roll_call.answer()

    def after(self, done: int, busy: float) -> str | None:
        """After update ``done``, in which this rank was busy for so many seconds: what has asked any of the ranks to
        stop, in words.  What one says in a round all know in the next, so that nobody waits.  ``LeaseLost`` where
        another process has taken over the run."""
        said = self._roll_call.answer()
        self._roll_call.ask(self._stop.code, busy)
        if said is not None and self._stragglers is not None:
            self._writer.health(self._stragglers.see(done - 1, [seconds for _, seconds in said]))
        if self._lease is not None:
            self._lease.check()
        return self._stop.agreed(said)

    def asked_by(self) -> str | None:
        """What has asked any rank to stop, up to now; for that all ranks wait for each other."""
        before = self._stop.agreed(self._roll_call.answer())
        self._roll_call.ask(self._stop.code)
        return self._stop.agreed(self._roll_call.answer()) or before
