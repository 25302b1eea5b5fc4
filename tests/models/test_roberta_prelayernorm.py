from __future__ import annotations

from architecture_suite import COMMON, RELATIVE_POSITIONS, ArchitectureSuite


class TestRobertaPreLayerNorm(ArchitectureSuite):
    model_type = "roberta-prelayernorm"
    variants = COMMON | RELATIVE_POSITIONS
