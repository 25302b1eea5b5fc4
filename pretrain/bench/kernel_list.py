"""Which calls are measured where, and what is asked of them on a GPU."""

from __future__ import annotations

import dataclasses

import torch

from .kernel_cases import (
    BACKWARD,
    BOTH,
    FORWARD,
    TORCH,
    Against,
    Case,
    Goal,
    attention_case,
    bias_gelu_case,
    dropout_add_layer_norm_case,
    dropout_case,
    ema_case,
    layer_norm_case,
    lm_head_case,
    mra_case,
    pinv_case,
)
from .kernel_peers import FAST, FFT, FLASH, FLASH_FFT, MRA_KERNELS

US, MS, MB = 1e-6, 1e-3, 1e6
WORDS = 50265


def cases(device_type: str, *, quick: bool = False) -> list[Case]:
    """In the order of the page.  ``quick``: sizes for tests, which nothing is asked of."""
    if quick:
        return [dataclasses.replace(case, goals=(), against=()) for case in _quick(device_type)]
    return _gpu() if device_type == "cuda" else _cpu()


def _gpu() -> list[Case]:
    bf16 = torch.bfloat16
    rows = 8192
    return [
        dataclasses.replace(
            ema_case(
                8, 4096, 1024, 16, bf16,
                goals=(Goal(FORWARD, 50 * US), Goal(BOTH, 140 * US), Goal("saved beside inputs", 0)),
                against=tuple(
                    Against(peer, quantity, least)
                    for peer, least in ((FFT, 40), (FLASH_FFT, 2))
                    for quantity in (FORWARD, BOTH)
                ),
            ),
            smaller=ema_case(1, 4096, 1024, 16, bf16),
        ),
        dataclasses.replace(
            mra_case(
                8, 12, 4096, 64, 8, bf16,
                goals=(Goal(FORWARD, 0.20 * MS), Goal(BOTH, 0.75 * MS), Goal("two runs differ", 0)),
                against=tuple(
                    Against(peer, quantity, least)
                    for peer, least in ((MRA_KERNELS, 8), (FLASH, 4))
                    for quantity in (FORWARD, BOTH)
                ),
            ),
            smaller=mra_case(1, 12, 4096, 64, 8, bf16),
        ),
        dropout_add_layer_norm_case(
            rows, 1024, bf16, goals=(Goal(FORWARD, 17.5 * US), Goal(BACKWARD, 23 * US)),
            against=(
                Against(TORCH, FORWARD, 1.65), Against(TORCH, BACKWARD, 1.75), Against(FAST, FORWARD, 1),
                Against(FAST, BACKWARD, 1),
            ),
        ),
        dropout_add_layer_norm_case(rows, 768, bf16),  # a size that apex FastLayerNorm omits
        layer_norm_case(
            rows, 1024, bf16, goals=(Goal(FORWARD, 8.7 * US), Goal(BACKWARD, 13.8 * US)),
            against=(Against(TORCH, BACKWARD, 1.4),),
        ),
        dataclasses.replace(
            lm_head_case(
                64 * 77, 64 * 512, 768, WORDS, bf16, goals=(Goal("peak memory", 100 * MB), Goal("host waits", 0))
            ),
            smaller=lm_head_case(8 * 77, 8 * 512, 768, WORDS, bf16),
        ),
        pinv_case(
            8, 12, 64, torch.float32, goals=(Goal("launches", 1), Goal(FORWARD, 15 * US)),
            against=(Against("reference", FORWARD, 10),),
        ),
        attention_case(16, 16, 512, 64, bf16),
        dropout_case(rows, 1024, bf16),
        bias_gelu_case(rows, 4096, bf16),
    ]  # fmt: skip


def _cpu() -> list[Case]:
    float32 = torch.float32
    return [
        ema_case(1, 1024, 512, 16, float32),
        mra_case(1, 12, 2048, 64, 4, float32),
        dropout_add_layer_norm_case(2048, 768, float32),
        layer_norm_case(2048, 768, float32),
        lm_head_case(307, 2048, 768, WORDS, float32),
        pinv_case(2, 12, 64, float32),
        attention_case(1, 12, 512, 64, float32),
        dropout_case(2048, 768, float32),
        bias_gelu_case(1024, 3072, float32),
    ]


def _quick(device_type: str) -> list[Case]:
    dtype = torch.bfloat16 if device_type == "cuda" else torch.float32
    return [
        ema_case(2, 64, 16, 4, dtype),
        mra_case(1, 2, 256, 32, 2, dtype),
        dropout_add_layer_norm_case(16, 64, dtype),
        layer_norm_case(16, 64, dtype),
        lm_head_case(12, 80, 64, 96, dtype),
        pinv_case(1, 2, 16, torch.float32),
        attention_case(2, 2, 48, 16, dtype),
        dropout_case(16, 64, dtype),
        bias_gelu_case(16, 64, dtype),
    ]
