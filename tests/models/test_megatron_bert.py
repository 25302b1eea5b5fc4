from __future__ import annotations

from architecture_suite import COMMON, RELATIVE_POSITIONS
from reference_suite import ReferenceSuite


class TestMegatronBert(ReferenceSuite):
    model_type = "megatron-bert"
    variants = COMMON | RELATIVE_POSITIONS
