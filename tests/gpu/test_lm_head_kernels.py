"""The language-model head's loss on a GPU: against float64 on the CPU, its memory, and that nothing waits for it."""

from __future__ import annotations

import pytest
import torch
from lm_head_cases import (
    DTYPES,
    Case,
    assert_same,
    assert_same_tile,
    exact_tile,
    expected,
    found,
    make_case,
    make_tile,
    tile_results,
)

from farspan.kernels import forms
from farspan.kernels.lm_head import lm_head_loss, tiles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch sees none"),
]
ROUNDINGS = {torch.float32: 64, torch.bfloat16: 4, torch.float16: 4}


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "elsewhere"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "real"), [(1, 1), (3, 8), (65, 300), (130, 19), (9, 5000), (77, 50265), (2500, 3200), (5000, 130)]
)
def test_a_tile(rows: int, real: int, dtype: torch.dtype, in_place: bool) -> None:
    case = make_tile(rows, real, dtype)
    with forms.mode("require"):
        first, second = (tile_results(case.to("cuda"), in_place=in_place) for _ in range(2))
    assert_same_tile(first, exact_tile(case), dtype)
    for name, value in first.items():
        assert torch.equal(value.nan_to_num(), second[name].nan_to_num()), f"{name}: two runs differ"


@pytest.mark.parametrize("tiling", ["one tile", "columns", "rows and columns"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "h", "v", "size"), [(21, 8, 400, 389), (700, 64, 5120, 5001), (5, 64, 389, 389)])
def test_losses_and_gradients(
    monkeypatch: pytest.MonkeyPatch, n: int, h: int, v: int, size: int, dtype: torch.dtype, tiling: str
) -> None:
    if tiling != "one tile":
        monkeypatch.setattr(tiles, "TILE_BYTES", 1 << 16)
        monkeypatch.setattr(tiles, "KEPT_BYTES", 0)
    if tiling == "rows and columns":
        monkeypatch.setattr(tiles, "TILE_ROWS", 64)
    case = make_case(n, h, v, size, dtype)
    # The logits of features of variance 1 grow with their number, and with them what rounding makes of them.
    case.x.data /= h**0.5
    on_gpu = case.to(dtype, "cuda")
    with forms.mode("require"):
        first = found(on_gpu)
        second = found(on_gpu)
    assert_same({k: v for k, v in first.items() if k != "correct"}, _but_correct(case), dtype, ROUNDINGS[dtype])
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name}: two runs differ"
    with forms.mode("reference"):
        reference = found(on_gpu)
    assert torch.equal(first["correct"], reference["correct"])
    torch.testing.assert_close(first["losses"], reference["losses"], rtol=2e-6, atol=2e-6)


def _but_correct(case: Case) -> dict[str, torch.Tensor]:
    return {name: value for name, value in expected(case).items() if name != "correct"}


def _large(dtype: torch.dtype = torch.bfloat16) -> Case:
    """15% of 32k tokens."""
    generator = torch.Generator("cuda").manual_seed(0)
    n, h, size = 4915, 1024, 50265
    v = tiles.round_up(size, 128)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device="cuda") * 0.1).to(dtype).requires_grad_()

    labels = torch.randint(size, (n,), generator=generator, device="cuda")
    upstream = torch.rand(n, generator=generator, device="cuda")
    return Case(random(n, h), random(v, h), random(v), labels, upstream, size)


def test_memory() -> None:
    """Beyond inputs, results and gradients at most 100 MB, where the logits take 500 MB in bfloat16."""
    case = _large()
    with forms.mode("require"):
        found(case)
        for p in case.parameters.values():
            p.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = found(case)
        torch.cuda.synchronize()
        kept = sum(value.numel() * value.element_size() for value in results.values())
        assert torch.cuda.max_memory_allocated() - before - kept <= 100e6


def test_nothing_waits() -> None:
    case = _large()
    with forms.mode("require"):
        found(case)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found(case)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_losses_of_whole_logits() -> None:
    case = _large()
    with forms.mode("require"), torch.no_grad():
        losses, _ = lm_head_loss(case.x, case.weight, case.bias, case.labels, size=case.size)
        for rows in torch.arange(len(losses), device="cuda").split(1024):
            logits = torch.nn.functional.linear(case.x[rows], case.weight, case.bias)[:, : case.size].float()
            whole = torch.nn.functional.cross_entropy(logits, case.labels[rows], reduction="none")
            # Both round logits of up to 12 to bfloat16; another product may round a few of them otherwise.
            torch.testing.assert_close(losses[rows], whole, rtol=0, atol=0.04)
            assert (losses[rows] - whole).abs().mean() < 1e-3


def test_another_stream() -> None:
    case = make_case(700, 64, 5120, 5001, torch.bfloat16).to(torch.bfloat16, "cuda")
    with forms.mode("require"):
        first = found(case)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            case.x.data.mul_(1.0)
            second = found(case)
        torch.cuda.current_stream().wait_stream(stream)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_another_device() -> None:
    case = make_case(21, 8, 400, 389, torch.float32)
    with forms.mode("require"):
        assert_same(found(case.to(torch.float32, "cuda:1")), expected(case), torch.float32, ROUNDINGS[torch.float32])
