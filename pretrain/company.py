"""The ranks of a run, from its beginning to its end, whatever it goes back to in between."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from ..parallel.ledger import Ledger
from ..parallel.mesh import Mesh
from . import heartbeat, run
from .config import Config
from .lease import Lease, leased


@dataclasses.dataclass(frozen=True)
class Company:
    """``ledger``: of this rank's collectives.  ``lease``: of the run folder, on the rank that holds it for all."""

    mesh: Mesh
    ledger: Ledger
    lease: Lease | None

    @staticmethod
    @contextlib.contextmanager
    def of(config: Config) -> Iterator[Company]:
        """Meet the other ranks, and hold the run folder, until the block ends; collective.  ValueError where the ranks
        do not fit the configuration, or another run is in the folder."""
        with Ledger(heartbeat.current()).installed() as ledger:
            mesh = run.mesh_of(config)
            try:
                with leased(Path(config.run_dir), mesh) as lease:
                    yield Company(mesh, ledger, lease)
            except BaseException:
                # NCCL's end waits for the other ranks, which wait in a collective for this one: it is to be heard.
                if mesh.device.type != "cuda":
                    mesh.destroy()
                raise
            mesh.destroy()
