"""Dropout's kernel on a GPU: the cases of the emulated one, and what only a GPU shows."""

from __future__ import annotations

import functools

import pytest
import torch
from dropout_cases import CASES, DTYPES, Case, assert_as_the_reference

from farspan.kernels import forms
from farspan.kernels.dropout import DropoutKey, dropout, keep_mask, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch sees none"),
]
COMPILED = functools.partial(forms.mode, "require")
LARGE = {
    "hidden states": Case((8, 1024, 768), p=0.1, add=True),
    "inner features of a tensor rank": Case((512, 4, 1536), p=0.1, first=1536),
    "weights of attention": Case((4, 6, 333, 333), p=0.1, first=(4, 1, 1)),
    "long rows": Case((3, 1_000_003), p=0.5),
    "many short rows": Case((200_001, 3), p=0.5),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES | LARGE)
def test_as_the_reference(case: str, dtype: torch.dtype) -> None:
    assert_as_the_reference((CASES | LARGE)[case], dtype, COMPILED, COMPILED, device="cuda")


def test_keys_are_the_references() -> None:
    samples, positions = torch.arange(3, 9), torch.arange(4096).unsqueeze(1)
    for heads in (torch.zeros(1, dtype=torch.int64), torch.arange(12).view(12, 1, 1) << 32):
        with COMPILED():
            keys = DropoutKey(5, 7, samples.cuda()).rows(3, (positions + heads).cuda())
        assert torch.equal(keys.cpu(), reference.row_keys(reference.base_key(5, 7, 3), samples, positions + heads))


def test_more_numbers_than_32_bits_count() -> None:
    rows, features = 70_001, 32_768
    if torch.cuda.mem_get_info()[0] < 5 * rows * features * 2:
        pytest.skip("needs 23 GB of GPU memory")
    keys = DropoutKey(1, 2, torch.tensor(0)).rows(3, torch.arange(rows))
    with COMPILED():
        y = dropout(torch.ones(rows, features, dtype=torch.bfloat16, device="cuda"), 0.5, keys.cuda())
    for row in (0, 65_535, 65_536, rows - 1):
        assert torch.equal(y[row].cpu() != 0, keep_mask(keys[row], features, 0.5))


@pytest.mark.parametrize("where", ["another stream", "another device"])
def test_elsewhere(where: str) -> None:
    if where == "another device" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = Case((64, 8, 129), add=True)
    with torch.cuda.stream(torch.cuda.Stream() if where == "another stream" else None):
        device = "cuda:1" if where == "another device" else "cuda"
        assert_as_the_reference(case, torch.bfloat16, COMPILED, device=device)
