from __future__ import annotations

import pytest
import torch
from comparison import assert_close

from farspan.parallel.norms import sums_of_squares

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_sums_of_squares_of_many_tensors(device):
    sizes = (1, 0, 7, 4096, 5000, 1 << 20)
    generator = torch.Generator().manual_seed(0)
    tensors = [10.0**n * torch.randn(size, generator=generator).to(device) for n, size in enumerate(sizes)]
    found = sums_of_squares(tensors)
    assert found.shape == (6,) and found.dtype == torch.float64 and found.device.type == device
    for value, tensor in zip(found, tensors, strict=True):
        assert_close(value, tensor.double().square().sum(), f"{tensor.numel()} values")
