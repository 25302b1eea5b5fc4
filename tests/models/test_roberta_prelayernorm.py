from __future__ import annotations

from architecture_suite import COMMON, RELATIVE_POSITIONS
from reference_suite import ReferenceSuite


class TestRobertaPreLayerNorm(ReferenceSuite):
    model_type = "roberta-prelayernorm"
    variants = COMMON | RELATIVE_POSITIONS
