"""Ranks that are persistently slower than those that do the same work."""

from __future__ import annotations

import math
import socket
from collections.abc import Sequence

import numpy as np
import torch.distributed as dist

from ..parallel.mesh import Mesh
from .config import Config
from .metrics import HealthMetrics, Straggler


class Stragglers:
    """Compares the ranks of each pipeline stage: they have the same work, and wait for each other in its collectives,
    so that the time in which a rank does not wait tells who is slow.

    ``stages``: of every rank.  A straggler is a rank whose median over ``window`` steps is ``factor`` times that of the
    others of its stage (the median over them) or more; it is one until its ratio is nearer to 1 than to ``factor``.
    """

    def __init__(self, stages: Sequence[int], hosts: Sequence[str], factor: float, window: int) -> None:
        self.hosts, self.factor = hosts, factor
        ranks = {stage: [r for r, s in enumerate(stages) if s == stage] for stage in sorted(set(stages))}
        self._stages = [np.array(of_stage) for of_stage in ranks.values() if len(of_stage) > 1]
        self._seconds = np.zeros((window, len(stages)))
        self._steps = 0
        self._named: dict[int, Straggler] = {}

    def see(self, step: int, busy: Sequence[float]) -> HealthMetrics | None:
        """``busy``: the seconds of a step in which each rank did not wait; ``step``: as it is reported.  None while the
        window is not full, and where no two ranks do the same work."""
        window = len(self._seconds)
        self._seconds[self._steps % window] = busy
        self._steps += 1
        if self._steps < window or not self._stages:
            return None
        medians = np.median(self._seconds, axis=0)
        others = np.full(len(medians), math.nan)
        for ranks in self._stages:
            others[ranks] = _median_of_others(medians[ranks])
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(others > 0, medians / others, math.nan)
        if np.isnan(ratios).all():
            return None
        slowest = int(np.nanargmax(ratios))
        begun = [
            Straggler(rank, self.hosts[rank], float(ratios[rank]), float(medians[rank]), float(others[rank]))
            for rank in np.flatnonzero(ratios >= self.factor).tolist()
            if rank not in self._named
        ]
        ended = [one for rank, one in self._named.items() if not ratios[rank] >= (1 + self.factor) / 2]
        self._named |= {one.rank: one for one in begun}
        for one in ended:
            del self._named[one.rank]
        return HealthMetrics(step, slowest, float(ratios[slowest]), window, tuple(begun), tuple(ended))


def _median_of_others(values: np.ndarray) -> np.ndarray:
    """For each of two or more values the median of the others."""
    count = len(values)
    order = np.argsort(values, kind="stable")
    place = np.empty(count, dtype=int)
    place[order] = np.arange(count)

    def other(index: int) -> np.ndarray:
        """For each value: of the others, in their order, the one at this index."""
        return values[order[np.where(index < place, index, index + 1)]]

    return (other((count - 2) // 2) + other((count - 1) // 2)) / 2


def stragglers_of(config: Config, mesh: Mesh) -> Stragglers | None:
    """What looks out for them, on the rank that writes; collective.  None on the others, and where there is nothing to
    compare."""
    health = config.health
    if not health.straggler_factor or mesh.size == 1:
        return None
    hosts = [""] * mesh.size
    dist.all_gather_object(hosts, socket.gethostname())
    stages = [rank // (mesh.tensor.size * mesh.data.size) for rank in range(mesh.size)]  # the order of the mesh
    return Stragglers(stages, hosts, health.straggler_factor, health.straggler_window) if mesh.is_writer else None
