"""The CUDA kernels of MRA-2 attention, emulated on a CPU: against the definition in float64, and selection block by
block."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from guarded import in_child
from mra_cases import CASES, DTYPES, Case, assert_lists, assert_right, lists_of_kernels, random_cases, run, spoiled
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from farspan.kernels import forms
from farspan.kernels.mra import BLOCK, mra_attention
from farspan.kernels.mra.selection import Options

fused = importlib.import_module("farspan.kernels.mra.fused")
SIZES = (16, 32, 40, 64, 64, 80)


@pytest.fixture
def emulated() -> Iterator[None]:
    with forms.emulated():
        yield


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_definition_in_any_order(case: Case, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and case.d not in (16, 64):
        pytest.skip("as bfloat16")
    found = []
    for order in (0, 1, 5):
        with forms.emulated(order):
            found.append(run(case, case.laid_out(dtype, "cpu"), "compiled"))
        assert_same(found[-1], found[0])
        if case.l > 300:
            break
    assert_right(found[0], case, dtype)


@pytest.mark.parametrize("seed", range(3))
def test_any(seed: int) -> None:
    for i, case in enumerate(random_cases(12, 200, SIZES, seed)):
        dtype = DTYPES[i % 3]
        with forms.emulated(i):
            assert_right(run(case, case.laid_out(dtype, "cpu"), "compiled"), case, dtype)


@pytest.mark.parametrize("ways", ["together", "one by one", "shared by blocks"])
def test_selection(ways: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if ways != "together":
        monkeypatch.setattr(fused, "KEYS", 1)
    if ways == "shared by blocks":
        monkeypatch.setattr(fused, "ALONE", 0)
        monkeypatch.setattr(fused, "PART", 100)
    cases = random_cases(8, 700, (16,), 7)
    cases += [Case(1200, 16, 300, "holes", first=1, diagonal=2, h=2), Case(1200, 16, 38**2, "right")]
    for i, case in enumerate(cases):
        q, k, v, _ = case.laid_out(torch.float32, "cpu")
        with forms.emulated(i):
            assert_lists(lists_of_kernels(case, q, k, v), case, q, k)


@pytest.mark.usefixtures("emulated")
def test_ties_go_to_the_lower_index() -> None:
    generator = torch.Generator().manual_seed(0)
    for nb, values, share in ((3, 2, 0.5), (7, 2, 0.2), (7, 1, 0.6), (13, 3, 0.3), (35, 2, 0.4)):
        # Logits of blocks are integers: sums without rounding.
        q, k = (torch.randint(values, (2, 1, nb, 16), generator=generator).float() for _ in range(2))
        q[..., 1:] *= torch.rand(15, generator=generator) < 0.1
        q, k = (x.repeat_interleave(BLOCK, 2) for x in (q, k))
        for mask in ("none", "blocks"):
            case = Case(nb * BLOCK, 16, round(share * nb * nb), mask, n=2)
            assert_lists(lists_of_kernels(case, q, k, k), case, q, k)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("d", [16, 64])
def test_numbers_at_padding_do_not_matter(d: int) -> None:
    for sparse in (False, True):
        case = Case(100, d, 6, "holes", sparse, n=2)
        tensors, mask = case.laid_out(torch.bfloat16, "cpu"), case.make_mask()
        assert mask is not None
        assert_same(run(case, spoiled(tensors, mask), "compiled"), run(case, tensors, "compiled"))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_far_from_zero(dtype: torch.dtype) -> None:
    """A sum's logarithm would vanish beside them; and padding, whose logits are 0, is the highest of none."""
    for offset in (-1024.0, 1024.0):
        q, k, v = (torch.zeros(1, 1, 100, 16) for _ in range(3))
        q[:], k[:] = 1.0, offset
        k[..., 0] += torch.arange(100) % 2 * 8
        v.copy_(torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).bfloat16())
        for mask in (None, torch.arange(100).view(1, -1) % 3 < 2, torch.arange(100).view(1, -1) < 64):
            for budget in (3, 16):
                target = mra_attention(q.double(), k.double(), v.double(), budget=budget, mask=mask, form="reference")
                y = mra_attention(*(x.to(dtype) for x in (q, k, v)), budget=budget, mask=mask, form="compiled")
                torch.testing.assert_close(y.double(), target, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.usefixtures("emulated")
def test_a_row_whose_selected_blocks_are_all_empty() -> None:
    q, k, v = (torch.randn(1, 1, 100, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    q[:], k[:] = 1.0, -1e5
    mask = torch.arange(100).view(1, -1) < 64
    leaves = [x.requires_grad_() for x in (q, k, v)]
    y = mra_attention(*leaves, budget=4, mask=mask, sparse=True, form="compiled")
    assert not any(x.any() for x in (y, *torch.autograd.grad(y.sum(), leaves)))
    y = mra_attention(q, k, v, budget=4, mask=mask, form="compiled")
    torch.testing.assert_close(y[:, :, 5], v[:, :, :64].mean(2), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("emulated")
def test_gradients_that_are_asked_for() -> None:
    case = Case(70, 16, 4)
    whole = run(case, case.laid_out(torch.float32, "cpu"), "compiled")[1:]
    for wanted in (0, 1, 2):
        *leaves, of_y = case.laid_out(torch.float32, "cpu")
        y = mra_attention(*(x.requires_grad_(i == wanted) for i, x in enumerate(leaves)), budget=4, form="compiled")
        (found,) = torch.autograd.grad(y, leaves[wanted], of_y)
        assert torch.equal(found, whole[wanted])
    assert not mra_attention(*(x.detach() for x in leaves), budget=4, form="compiled").requires_grad
    *leaves, _ = case.laid_out(torch.float32, "cpu")
    leaves = [x.requires_grad_() for x in leaves]
    expanded = torch.autograd.grad(mra_attention(*leaves, budget=4, form="compiled").sum(), leaves)
    ones = torch.autograd.grad(mra_attention(*leaves, budget=4, form="compiled"), leaves, torch.ones(1, 1, 70, 16))
    assert_same(list(expanded), list(ones))


@pytest.mark.usefixtures("emulated")
def test_results_lie_as_queries_do() -> None:
    case = Case(40, 16, 2, n=2, h=2, layout="turned")
    q, k, v, _ = case.laid_out(torch.bfloat16, "cpu")
    y = mra_attention(q, k, v, budget=2, form="compiled")
    assert y.stride() == q.stride()
    assert torch.equal(y, mra_attention(q, k.contiguous(), v.contiguous(), budget=2, form="compiled"))
    odd = [torch.stack([x, x], 4)[..., 0] for x in (q, k, v)]  # no dense last dimension
    assert torch.equal(y, mra_attention(*odd, budget=2, form="compiled"))
    shifted = [torch.cat([x.flatten()[:1], x.contiguous().flatten()])[1:].view(x.shape) for x in (q, k, v)]
    assert torch.equal(y, mra_attention(*shifted, budget=2, form="compiled"))
    one = [x[:, :1, :1].expand(-1, 3, 33, -1) for x in (q, k, v)]
    torch.testing.assert_close(mra_attention(*one, budget=2, form="compiled"), one[2], rtol=0.01, atol=0.01)


@pytest.mark.usefixtures("emulated")
def test_nothing_to_attend_to() -> None:
    q, k, v = (torch.zeros(0, 2, 100, 16, requires_grad=True) for _ in range(3))
    y = mra_attention(q, k, v, budget=3, form="compiled")
    assert y.shape == (0, 2, 100, 16)
    y.sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape


@pytest.mark.usefixtures("emulated")
def test_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """One group, and no copy ahead."""
    monkeypatch.setattr(fused, "_shared", lambda device: fused._least_shared(64))
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(150, 64, 20, "holes")
        assert_right(run(case, case.laid_out(dtype, "cpu"), "compiled"), case, dtype)
    q = torch.randn(1, 1, 40, 72)
    with pytest.raises(ValueError, match="head size 72 needs 42 KiB of shared memory, which cpu does not have"):
        mra_attention(q, q, q, budget=2, form="compiled")


@pytest.mark.usefixtures("emulated")
def test_what_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 1, 40, 20)
    with pytest.raises(ValueError, match="head sizes 20 and 20: must be one multiple of 8 from 16 to 256"):
        mra_attention(q, q, q, budget=2, form="compiled")
    with pytest.raises(ValueError, match="all must be float32, bfloat16 or float16"):
        mra_attention(q[..., :16], q[..., :16].bfloat16(), q[..., :16], budget=2, form="compiled")
    said: list[tuple[str, str]] = []
    monkeypatch.setattr(forms, "declined", lambda *text: said.append(text))
    y = mra_attention(q, q, q[..., :16], budget=2, form="compiled")
    assert torch.equal(y, mra_attention(q, q, q[..., :16], budget=2, form="reference"))
    assert [name for name, _ in said] == ["mra"]
    mra_attention(q.double(), q.double(), q.double(), budget=2, form="compiled")
    assert len(said) == 1
    with forms.mode("reference"), pytest.raises(ValueError, match="form compiled: mra has none on cpu in mode refer"):
        mra_attention(q, q, q, budget=2, form="compiled")


@pytest.mark.usefixtures("emulated")
def test_a_registered_operation() -> None:
    for sparse, kind in ((False, "none"), (True, "holes")):
        case = Case(70, 16, 4, kind, sparse, n=2, layout="turned")
        *tensors, _ = case.laid_out(torch.float32, "cpu")
        leaves = [x.requires_grad_() for x in tensors]
        arguments = (*leaves, case.make_mask(), *Options(4, sparse, 0, 1))
        torch.library.opcheck(
            torch.ops.farspan.mra_forward.default, arguments,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )  # fmt: skip

        def attend(q: Tensor, k: Tensor, v: Tensor, case: Case = case) -> Tensor:
            return mra_attention(q * 1.0, k, v, form="compiled", **case.options)

        def gradients(y: Tensor, leaves: list[Tensor] = leaves) -> list[Tensor]:
            return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

        target = gradients(attend(*leaves))
        options: dict[str, Any] = {"fullgraph": True, "backend": "aot_eager"}
        mask = case.make_mask()

        def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, case: Case = case) -> Tensor:
            return mra_attention(q * 1.0, k, v, budget=4, mask=mask, sparse=case.sparse, form="compiled")

        assert_same(gradients(torch.compile(attend_masked, **options)(*leaves, mask)), target)
        assert_same(gradients(checkpoint(attend, *leaves, use_reentrant=False)), target)  # type: ignore[arg-type]


def test_memory_beyond_tensors_is_left_alone() -> None:
    def every_form() -> None:
        with forms.emulated():
            for case in (
                Case(33, 64, 3, h=2), Case(70, 40, 4, "holes", layout="turned", h=2), Case(40, 16, 4, sparse=True, n=2),
            ):  # fmt: skip
                for dtype in (torch.bfloat16, torch.float32):
                    run(case, case.laid_out(dtype, "cpu"), "compiled")

    with forms.emulated():
        forms.compiled("mra", torch.device("cpu"))
    in_child(every_form)
