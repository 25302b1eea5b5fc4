"""The compiled forms of the language-model head's pointwise part: the CUDA source emulated, and that for a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from guarded import in_child
from lm_head_cases import (
    DTYPES,
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
from farspan.kernels.lm_head import tiles

FORMS = ["emulated", "cpu"]


@contextlib.contextmanager
def form(name: str, order: int = 0) -> Iterator[None]:
    with forms.emulated(order) if name == "emulated" else forms.mode("require"):
        yield


# Rows beyond a block's 64 and not a multiple of a warp's; columns from one to several steps of a row's warps, and of
# the chunks of a CPU.
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "elsewhere"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("rows", "real"), [(1, 1), (3, 8), (7, 77), (65, 300), (130, 19), (9, 1100), (5, 2100)])
def test_a_tile(rows: int, real: int, name: str, dtype: torch.dtype, in_place: bool) -> None:
    case = make_tile(rows, real, dtype)
    with form(name):
        ours = tile_results(case, in_place=in_place)
    assert_same_tile(ours, exact_tile(case), dtype)


@pytest.mark.parametrize("name", FORMS)
def test_tiles_of_many_sizes(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    with form(name, 7):
        for seed in range(12):
            rows, real = (int(torch.randint(1, most, (), generator=generator)) for most in (40, 700))
            dtype = DTYPES[seed % 3]
            case = make_tile(rows, real, dtype, seed=seed)
            assert_same_tile(tile_results(case, in_place=True), exact_tile(case), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_threads_changes_nothing(dtype: torch.dtype) -> None:
    case = make_tile(70, 600, dtype)
    results = []
    for order in (0, 1, 2, 3):
        with form("emulated", order):
            results.append(tile_results(case, in_place=True))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


def test_the_number_of_threads_changes_nothing() -> None:
    case, results = make_tile(300, 3000, torch.float32), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        with form("cpu"):
            results.append(tile_results(case, in_place=True))
    for other in results[1:]:
        for name, value in results[0].items():
            assert name == "sums" or torch.equal(other[name], value), name
            torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-6)  # torch adds up the parts of the sums


@pytest.mark.parametrize("name", FORMS)
def test_what_is_not_finite_is_seen(name: str) -> None:
    for dtype in DTYPES:
        for value in (torch.nan, torch.inf):
            case = make_tile(9, 200, dtype)
            case.logits[6, 150] = value
            with form(name):
                ours = tile_results(case, in_place=False)
            others = torch.arange(9) != 6
            assert ours["total"][6].isnan() and ours["total"][others].isfinite().all()
            gradient = ours["gradient"].float()
            assert gradient[6, :200].isnan().all() == gradient[6].isnan().any()
            assert gradient[6].isnan().any() and gradient[others].isfinite().all()
        case = make_tile(9, 200, dtype)
        case.upstream[2] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # rounds up to no number
        with form(name):
            assert tile_results(case, in_place=False)["gradient"][2, :200].isnan().all()


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "computed again"])
@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 16), (torch.bfloat16, 4), (torch.float16, 4)])
@pytest.mark.parametrize("name", FORMS)
def test_losses_and_gradients(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, roundings: float, kept: bool
) -> None:
    monkeypatch.setattr(tiles, "CPU_COLUMNS", 128)
    monkeypatch.setattr(tiles, "CPU_ROWS", 16)
    if not kept:
        monkeypatch.setattr(tiles, "CPU_KEPT_BYTES", 0)
    case = make_case(21, 8, 400, 389, dtype)
    with form(name):
        ours = found(case)
    assert_same(ours, expected(case), dtype, roundings)
    assert not ours["gradient of weight"][389:].any() and not ours["gradient of bias"][389:].any()
    with forms.mode("reference"):
        reference = found(case)
    assert torch.equal(ours["correct"], reference["correct"])
    torch.testing.assert_close(ours["losses"], reference["losses"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_no_memory_beyond_the_tensors_is_touched(name: str) -> None:
    cases = [make_tile(rows, real, dtype) for rows, real in ((5, 131), (67, 9)) for dtype in DTYPES]
    with form(name):
        in_child(lambda: [tile_results(case, in_place=False) for case in cases])


@pytest.mark.parametrize("name", FORMS)
def test_float64_takes_the_reference(name: str) -> None:
    case = make_case(5, 8, 40, 39, torch.float64)
    with form(name):
        assert_same(found(case), expected(case), torch.float64, 16)
