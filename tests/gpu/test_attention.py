"""Attention on a GPU, the variable-length kernel among its forms, against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
from attention_cases import ROWS, VARIANTS, assert_same, by_hand, flattened, make_case, outputs_and_gradients

from farspan.kernels.attention import attention
from farspan.kernels.documents import Form

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch sees none"),
]
FORMS: tuple[Form | None, ...] = (None, "dense", "grouped")  # None: what the rule picks


@pytest.mark.parametrize("joined", [False, True], ids=["rows", "one row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ROWS)
def test_each_document_alone(rows: str, dtype: torch.dtype, joined: bool) -> None:
    cpu = make_case(ROWS[rows], size=16).to(dtype=dtype)
    if joined:
        cpu, _ = flattened(cpu)
    exact, case = cpu.to(dtype=torch.float64), cpu.to(device="cuda")
    # Products of float32 may go through TF32, with 10 bits after the point as float16.
    allowed = 16 * torch.finfo(torch.float16 if dtype == torch.float32 else dtype).eps
    for variant in VARIANTS:
        causal, dropping, distances = variant
        expected = outputs_and_gradients(exact, by_hand(exact, *variant))
        for form in FORMS[:1] if joined else FORMS:
            documents = case.documents("document", causal, form)
            y = attention(case.q, case.k, case.v, documents, **case.options(dropping, distances))
            found = outputs_and_gradients(case, y)
            assert y.isfinite().all()
            assert_same({name: value.cpu() for name, value in found.items()}, expected, allowed)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_variable_length_kernel_is_chosen(dtype: torch.dtype, causal: bool) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    case = make_case(ROWS["uneven documents"], size=64).to(dtype=dtype).to(device="cuda")
    documents = case.documents("document", causal, None)
    assert documents.form(case.q, explicit=False) == "varlen"
    assert documents.form(case.q, explicit=True) in ("dense", "grouped")
    assert documents.form(case.q.float(), explicit=False) in ("dense", "grouped")
    assert documents.form(case.q[..., :4], explicit=False) in ("dense", "grouped")
    assert case.documents("full", causal, None).form(case.q, explicit=False) == "dense"
