from __future__ import annotations

from architecture_suite import COMMON, RELATIVE_POSITIONS, ArchitectureSuite


class TestMegatronBert(ArchitectureSuite):
    model_type = "megatron-bert"
    variants = COMMON | RELATIVE_POSITIONS
