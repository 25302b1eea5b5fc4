"""What is looked at on one node, in which order."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...kernels import forms
from . import compilers, devices, disk, host, interfaces, versions
from .disk import Need
from .report import Section, examine

if TYPE_CHECKING:
    from ...pretrain.config import Config
    from .run_checks import Ranks


@dataclasses.dataclass(frozen=True)
class Wanted:
    """``path``: where checkpoints would go, if not into the configuration's run folder."""

    config: Config | None
    ranks: Ranks | None
    path: Path | None
    quick: bool

    @property
    def path_of_checkpoints(self) -> Path | None:
        return self.path or (Path(self.config.run_dir) / "checkpoints" if self.config is not None else None)


def examine_node(wanted: Wanted) -> list[Section]:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    config, quick = wanted.config, wanted.quick
    operations, offload = None, False
    if config is not None:
        from ...pretrain.models import architecture

        forms.configure(config.kernels.mode, config.kernels.cache, config.kernels.build_timeout_seconds)
        operations = list(architecture(config.model.model_type).operations)
        offload = config.parallel.offload_optimizer
    sections = [
        examine("versions", lambda it: versions.look(it, quick=quick)),
        examine("machine", lambda it: host.look(it, gpus=gpus)),
        examine("devices", devices.look),
        examine("interfaces", interfaces.look),
        examine(
            "compilers", lambda it: compilers.look(it, quick=quick, operations=operations, offload=offload)
        ),
    ]  # fmt: skip
    need = None
    if config is not None:
        found, need = _examine_run(config, wanted, gpus)
        sections += found
    path = wanted.path_of_checkpoints or Path.cwd()
    sections.append(examine("disk", lambda it: disk.look(it, path, quick=quick, need=need)))
    return sections


def _examine_run(config: Config, wanted: Wanted, gpus: int) -> tuple[list[Section], Need | None]:
    from ...pretrain import checkpoint as ckpt
    from ...pretrain.resume import checkpoints_folder
    from . import run_checks, sizes

    ranks, resolved, need = wanted.ranks, config, None
    assert ranks is not None

    def data(section: Section) -> None:
        nonlocal resolved
        resolved = run_checks.look_at_data(section, config, quick=wanted.quick)

    def layout(section: Section) -> None:
        nonlocal need
        run_checks.look_at_layout(section, resolved, ranks, memory=host.memory_limit(), gpus=gpus)
        if resolved.model.vocab_size:
            already = len(ckpt.steps(checkpoints_folder(config)))
            need = Need(sizes.checkpoint_bytes(resolved), *sizes.kept_bytes(resolved, already))

    return [examine("data", data), examine("layout", layout)], need
