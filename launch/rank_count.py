"""How many ranks a run has."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..pretrain.config import Config


def of_layout(config: Config) -> int:
    """As the configuration's layout says; of replicas that it leaves open, one."""
    parallel = config.parallel
    return parallel.tensor * parallel.pipeline * (parallel.data or 1)


def by_default(config: Config) -> int:
    """On this machine, where nobody says a number: the layout's; where it leaves the replicas open, every GPU, or one
    replica on a CPU."""
    import torch

    gpus = torch.cuda.device_count()
    return gpus if gpus and config.parallel.data is None else of_layout(config)


def check(config: Config, ranks: int) -> None:
    """ValueError where so many do not fit the layout."""
    import torch

    from ..pretrain.config import check_world

    # The layout only, with the CPU's name: asking a GPU what it can do would leave this process's context on it.  What
    # depends on the device each rank checks for itself.
    check_world(config, ranks, torch.device("cpu"))
