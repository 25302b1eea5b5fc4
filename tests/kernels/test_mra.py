"""MRA-2 attention: the definition against loops in float64, the form by selected blocks against the definition."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from farspan.kernels.mra import BLOCK, Form, block_budget, mra_attention
from farspan.kernels.mra.selection import Options, Selection, by_column

blocks = importlib.import_module("farspan.kernels.mra.blocks")
FORMS: tuple[Form, ...] = ("reference", "blocks")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
MASKS = ("none", "holes", "left", "blocks", "all")


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix at a time, single rows of blocks, and room for hardly more than one."""
    monkeypatch.setattr(blocks, "GIVEN", 1)
    monkeypatch.setattr(blocks, "PIECE", 1)


def make(
    l: int, d: int = 8, e: int | None = None, *, n: int = 1, h: int = 1, seed: int = 0, size: float = 1.0
) -> list[Tensor]:
    """q, k, v in float64, but exact in float32: neighbours alike, so that the means of blocks say something."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(n, h, -(-l // 16), d, generator=generator).repeat_interleave(16, 2)[:, :, :l]
    q, k = (size * (common + torch.randn(n, h, l, d, generator=generator)) for _ in range(2))
    return [t.double() for t in (q, k, torch.randn(n, h, l, e or d, generator=generator))]


def make_mask(kind: str, n: int, l: int, seed: int = 0) -> Tensor | None:
    generator = torch.Generator().manual_seed(seed)
    if kind == "none":
        return None
    if kind == "holes":
        return torch.rand(n, l, generator=generator) < 0.6
    if kind == "left":
        return torch.arange(l) >= torch.randint(l, (n, 1), generator=generator)
    if kind == "blocks":
        return (torch.rand(n, -(-l // BLOCK), generator=generator) < 0.5).repeat_interleave(BLOCK, 1)[:, :l]
    return torch.zeros(n, l, dtype=torch.bool)


def loops(
    q: Tensor, k: Tensor, v: Tensor, *, budget: int, mask: Tensor | None = None, sparse: bool = False,
    first_blocks: int = 0, diagonal_blocks: int = 0,
) -> Tensor:  # fmt: skip
    """NUMERICS step by step."""
    n, h, l, _ = q.shape
    real = torch.ones(n, l, dtype=torch.bool) if mask is None else mask
    options = (budget, sparse, first_blocks, diagonal_blocks)
    return torch.stack([
        torch.stack([_one_matrix(q[a, b], k[a, b], v[a, b], real[a].tolist(), *options) for b in range(h)])
        for a in range(n)
    ])  # fmt: skip


def _one_matrix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: list[bool],
    budget: int,
    sparse: bool,
    first_blocks: int,
    diagonal_blocks: int,
) -> Tensor:
    l, d = q.shape
    tokens = [[t for t in range(start, min(start + 32, l)) if real[t]] for start in range(0, l, 32)]
    nb, scale = len(tokens), 1 / math.sqrt(d)
    q_mean, k_mean, v_mean = ([x[of_block].sum(0) / (len(of_block) + 1e-6) for of_block in tokens] for x in (q, k, v))
    logits = [[scale * q_mean[i].dot(k_mean[j]) for j in range(nb)] for i in range(nb)]
    scores = {}
    for i in range(nb):
        r = max(logits[i]).item()
        for j in range(nb):
            score = logits[i][j].item() - r
            score -= 1e4 if len(tokens[i]) * len(tokens[j]) < 0.5 else 0
            score += 5e3 if diagonal_blocks and abs(i - j) <= diagonal_blocks // 2 else 0
            score += 5e3 if i < first_blocks else 0
            score += 5e3 if j < first_blocks else 0
            scores[i, j] = score
    selected = set(sorted(scores, key=lambda ij: (-scores[ij], ij))[:budget])
    rows = []
    for t in range(l):
        i, exponents, numbers, values = t // 32, [], [], []
        for j in range(nb) if real[t] else ():
            if (i, j) in selected:
                for u in tokens[j]:
                    exponents.append(scale * q[t].dot(k[u]))
                    numbers.append(1)
                    values.append(v[u])
            elif tokens[j] and not sparse:
                exponents.append(logits[i][j])
                numbers.append(len(tokens[j]))
                values.append(v_mean[j])
        if not exponents:
            rows.append(0 * (v[t] + q[t].sum() + k[t].sum()))
            continue
        weights = torch.tensor(numbers) * (torch.stack(exponents) - max(exponents).detach()).exp()
        rows.append(weights @ torch.stack(values) / (weights.sum() + 1e-6))
    return torch.stack(rows)


def softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is None:
        return scores.softmax(-1) @ v
    weights = scores.masked_fill(~mask[:, None, None, :], -math.inf).softmax(-1).nan_to_num(0)
    return (weights @ v) * mask[:, None, :, None]


def results(
    compute: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype = torch.float64, **options: Any
) -> list[Tensor]:
    """The result and the gradients of a product with fixed numbers."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    y = compute(*leaves, **options)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def assert_near(actual: list[Tensor], target: list[Tensor], tolerance: float) -> None:
    # Gradients of q and k nearly vanish where a query has one key: those of v then say what is small.
    least = 0.2 * max(t.double().norm().item() for t in target[1:]) if len(target) > 1 else 0
    for name, a, t in zip(("y", "q", "k", "v"), actual, target, strict=False):
        assert a.shape == t.shape, name
        assert a.isfinite().all(), name
        error, size = (a.double() - t.double()).norm().item(), max(t.double().norm().item(), least)
        assert error <= tolerance * size, f"{name}: off by {error:.2e} of {size:.2e}"


@pytest.mark.parametrize("prior", [{}, {"diagonal_blocks": 1}, {"first_blocks": 1, "diagonal_blocks": 3}])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_the_definition(kind: str, sparse: bool, prior: dict[str, int]) -> None:
    for l, budget in ((1, 1), (64, 1), (33, 2), (100, 7)):
        inputs, mask = make(l, 3, 2, seed=l), make_mask(kind, 1, l, seed=l)
        options = {"budget": budget, "mask": mask, "sparse": sparse, **prior}
        target = results(loops, inputs, **options)
        assert_near(results(mra_attention, inputs, form="reference", **options), target, 1e-12)


@pytest.mark.parametrize("d", [8, 20, 32, 64, 96, 256])
@pytest.mark.parametrize("l", [1, 31, 32, 33, 100, 257, 1000])
def test_every_length_and_head_size(l: int, d: int) -> None:
    nb = -(-l // BLOCK)
    inputs = make(l, d, h=2, seed=l + d, size=8 / d**0.5)
    for budget in {1, nb, min(4 * nb, nb * nb), nb * nb}:
        options = {"budget": budget, "diagonal_blocks": 1}
        target = results(mra_attention, inputs, form="reference", **options)
        for dtype, tolerance in TOLERANCE.items():
            if dtype == torch.float32 or l < 300:
                assert_near(results(mra_attention, inputs, dtype, form="blocks", **options), target, tolerance)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    l=st.integers(1, 330), d=st.integers(1, 9), e=st.integers(1, 9), n=st.integers(1, 3), h=st.integers(1, 3),
    share=st.floats(0, 1), kind=st.sampled_from(MASKS), sparse=st.booleans(), first=st.integers(0, 3),
    diagonal=st.integers(0, 5), dtype=st.sampled_from(list(TOLERANCE)), size=st.sampled_from([0.1, 1.0, 4.0]),
    seed=st.integers(0, 99), given_room=st.sampled_from([1, 1 << 14, 1 << 23]),
    piece=st.sampled_from([1, 1 << 14, 1 << 20]),
)  # fmt: skip
def test_any(
    l: int, d: int, e: int, n: int, h: int, share: float, kind: str, sparse: bool, first: int, diagonal: int,
    dtype: torch.dtype, size: float, seed: int, given_room: int, piece: int,
) -> None:  # fmt: skip
    nb = -(-l // BLOCK)
    inputs, mask = make(l, d, e, n=n, h=h, seed=seed, size=size), make_mask(kind, n, l, seed)
    options = {
        "budget": max(1, round(share * nb * nb)), "mask": mask, "sparse": sparse, "first_blocks": first,
        "diagonal_blocks": diagonal,
    }  # fmt: skip
    target = results(mra_attention, inputs, form="reference", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "GIVEN", given_room)
        patch.setattr(blocks, "PIECE", piece)
        actual = results(mra_attention, inputs, dtype, form="blocks", **options)
    assert_near(actual, target, TOLERANCE[dtype] * max(1, size**2))
    if mask is not None:
        assert not any(t.transpose(1, 2)[~mask].any() for t in actual)


@pytest.mark.parametrize("form", [*FORMS, None])
@pytest.mark.parametrize("kind", MASKS)
def test_everything_selected_is_softmax(kind: str, form: Form | None) -> None:
    for l, d in ((1, 8), (31, 20), (32, 256), (33, 32), (100, 96), (257, 64), (1000, 8)):
        for size in (1, 6):
            inputs, mask = make(l, d, seed=l, size=size * d**-0.25), make_mask(kind, 1, l, seed=l)
            budget = block_budget(l, 10**6)
            target = results(softmax, inputs, mask=mask)
            for dtype in TOLERANCE:
                actual = results(mra_attention, inputs, dtype, budget=budget, mask=mask, form=form)
                assert_near(actual, target, 1e-5 * max(1, size**2 / 4))


@pytest.mark.parametrize("form", [*FORMS, None])
@pytest.mark.parametrize("offset", [-1000.0, 1000.0])
def test_all_logits_far_from_zero(form: Form | None, offset: float) -> None:
    """Padding, whose logits would be 0, must not be the highest of any sum."""
    q, k, v = make(100, 4)
    q[..., 0], k[..., 0] = 1, 2 * offset
    for masked in (None, make_mask("holes", 1, 100), torch.arange(100).view(1, -1) < 64):
        target = results(softmax, [q, k, v], mask=masked)
        actual = results(mra_attention, [q, k, v], torch.float32, budget=16, mask=masked, form=form)
        assert_near(actual, target, 2e-3)  # of logits around 1000 in float32
        for budget in (1, 5):
            target = results(loops, [q, k, v], budget=budget, mask=masked)
            actual = results(mra_attention, [q, k, v], budget=budget, mask=masked, form=form)
            assert_near(actual, target, 1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1e2, 1e5, 1e15])
def test_logits_of_any_size_give_finite_numbers(form: Form, size: float) -> None:
    for sparse in (False, True):
        for kind in ("none", "holes", "blocks"):
            inputs, mask = make(200, 8, seed=3, size=size), make_mask(kind, 1, 200)
            y, *gradients = results(mra_attention, inputs, torch.float32, budget=9, mask=mask, sparse=sparse, form=form)
            assert all(t.isfinite().all() for t in (y, gradients[2]))
            assert y.abs().max() <= inputs[2].abs().max() * 1.001


@pytest.mark.parametrize("form", FORMS)
def test_weights_keep_their_digits_beside_large_logits(form: Form) -> None:
    """Logits that float32 holds exactly: a sum's logarithm would vanish beside them."""
    q, k, v = make(100, 4)
    q[:], k[:] = 1.0, torch.tensor([1000.0, 2000.0, 4000.0, 9384.0])
    k[..., 0] += torch.arange(100) % 2 * 2  # logits 8192 and 8193
    target = results(softmax, [q, k, v], mask=None)
    assert_near(results(mra_attention, [q, k, v], torch.float32, budget=16, form=form)[::3], target[::3], 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_whose_selected_blocks_are_all_empty(form: Form) -> None:
    """Empty blocks have logits of 0 in the selection: the highest, less 10,000."""
    q, k, v = make(100, 4)
    q[:], k[:] = 1.0, -1e5
    mask = torch.arange(100).view(1, -1) < 64
    y, *gradients = results(mra_attention, [q, k, v], torch.float32, budget=4, mask=mask, sparse=True, form=form)
    assert not any(t.any() for t in (y, *gradients))
    y = mra_attention(q, k, v, budget=4, mask=mask, form=form)
    torch.testing.assert_close(y[:, :, 5], v[:, :, :64].mean(2), rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    nb=st.integers(1, 7), share=st.floats(0, 1), values=st.integers(1, 4), m=st.integers(1, 3), seed=st.integers(0, 99)
)
def test_ties_go_to_the_lower_index(nb: int, share: float, values: int, m: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(values, (m, nb, nb), generator=generator).double()
    logits[..., 0] = values  # the highest of every row
    budget = max(1, round(share * nb * nb))
    counts = torch.full((m, nb), BLOCK)
    selection = Selection.of(logits.clone(), counts, Options(budget, False, 0, 0))
    for matrix, of_matrix in enumerate(logits.flatten(1).tolist()):
        expected = sorted(sorted(range(nb * nb), key=lambda f: (-of_matrix[f], f))[:budget])
        assert selection.indices[matrix].tolist() == expected
        starts = selection.pointers[matrix].tolist()
        for row in range(nb):
            columns = selection.columns[matrix, starts[row] : starts[row + 1]].tolist()
            assert columns == [f % nb for f in expected if f // nb == row]
    order, starts = by_column(selection.columns[0], nb)
    for column, (start, end) in enumerate(zip(starts.tolist(), [*starts.tolist()[1:], budget], strict=True)):
        listed = order[start:end].tolist()
        assert listed == [f for f, c in enumerate(selection.columns[0].tolist()) if c == column]


@pytest.mark.parametrize("form", FORMS)
def test_equal_tokens_lose_no_block(form: Form) -> None:
    """All scores are the same: whatever is selected, the result is that of softmax."""
    q, k, v = make(320, 8, h=2)
    q[:], k[:] = q[:, :, :1], k[:, :, :1]
    for budget in (1, 7, 10, 50, 99):
        y = mra_attention(q, k, v, budget=budget, form=form)
        torch.testing.assert_close(y, v.mean(2, keepdim=True).expand_as(v), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["none", "holes"])
def test_neighbours_do_not_matter(kind: str) -> None:
    inputs, mask = make(300, 16, n=3, h=4), make_mask(kind, 3, 300)
    options = {"budget": 30, "form": "blocks"}
    together = results(mra_attention, inputs, torch.float32, mask=mask, **options)
    for row in range(3):
        of_row = None if mask is None else mask[row : row + 1]
        for heads in (slice(0, 2), slice(2, 4)):
            alone = [t[row : row + 1, heads].float().requires_grad_() for t in inputs]
            y = mra_attention(*alone, mask=of_row, **options)
            torch.testing.assert_close(y, together[0][row : row + 1, heads], rtol=1e-6, atol=1e-6)


def test_the_same_bits_in_every_run() -> None:
    inputs = make(200, 16, n=2, h=2)
    first = results(mra_attention, inputs, torch.float32, budget=20, form="blocks")
    torch.set_num_threads(2)
    for a, b in zip(results(mra_attention, inputs, torch.float32, budget=20, form="blocks"), first, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("many_parts")
def test_little_room() -> None:
    inputs, mask = make(500, 16, n=2, h=3), make_mask("holes", 2, 500)
    target = results(mra_attention, inputs, budget=60, mask=mask, form="reference")
    assert_near(results(mra_attention, inputs, budget=60, mask=mask, form="blocks"), target, 1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sparse", [False, True])
def test_gradcheck(form: Form, sparse: bool) -> None:
    for kind in ("none", "holes"):
        inputs, mask = [t.requires_grad_() for t in make(70, 2, 1, h=2)], make_mask(kind, 1, 70)

        def compute(*tensors: Tensor, mask: Tensor | None = mask) -> Tensor:
            return mra_attention(*tensors, budget=4, mask=mask, sparse=sparse, form=form)

        assert torch.autograd.gradcheck(compute, inputs, fast_mode=True)


@pytest.mark.parametrize("form", [*FORMS, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_the_tensors_only(dtype: torch.dtype, form: Form | None) -> None:
    inputs = [t.to(dtype).double() for t in make(150, 8, h=2)]
    for budget in (8, 25):
        target = results(mra_attention, inputs, budget=budget, form="reference")
        actual = results(mra_attention, inputs, dtype, budget=budget, form=form)
        assert all(t.dtype == dtype for t in actual)
        assert_near(actual, target, 2 * torch.finfo(dtype).eps)
        exact = mra_attention(*(t.float() for t in inputs), budget=budget, form=form)
        assert torch.equal(actual[0], exact.to(dtype))


@pytest.mark.parametrize("form", [*FORMS, None])
def test_numbers_at_padding_do_not_matter(form: Form | None) -> None:
    inputs, mask = make(100, 8, n=2), make_mask("holes", 2, 100)
    for budget in (5, 16):
        first = results(mra_attention, inputs, budget=budget, mask=mask, form=form)
        other = [t.transpose(1, 2).masked_fill(~mask[:, :, None, None], math.nan).transpose(1, 2) for t in inputs]
        for a, b in zip(results(mra_attention, other, budget=budget, mask=mask, form=form), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("form", [*FORMS, None])
def test_nothing_to_attend_to(form: Form | None) -> None:
    for budget in (3, 16):
        q, k, v = (torch.zeros(0, 2, 100, 4, requires_grad=True) for _ in range(3))
        y = mra_attention(q, k, v, budget=budget, form=form)
        assert y.shape == (0, 2, 100, 4)
        y.sum().backward()
        assert q.grad is not None


def test_tensors_as_they_lie_in_a_model() -> None:
    """[s, b, h, d] turned, and a gradient that is one number expanded."""
    q, k, v = (t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3).requires_grad_() for t in make(150, 8, n=2, h=3))
    found = torch.autograd.grad(mra_attention(q, k, v, budget=9, form="blocks").sum(), (q, k, v))
    target = torch.autograd.grad(mra_attention(q, k, v, budget=9, form="reference").sum(), (q, k, v))
    assert_near([v, *found], [v, *target], 1e-10)


class Made(TorchDispatchMode):
    """The shapes of all tensors that are made, and the bytes of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.shapes = 0, set[tuple[int, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
                self.shapes.add(tuple(t.shape))
        return result


def test_memory_is_linear_in_selected_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "GIVEN", 1 << 18)
    monkeypatch.setattr(blocks, "PIECE", 1 << 18)
    l, h, d = 16_384, 4, 8
    leaves = [t.float().requires_grad_() for t in make(l, d, h=h)]
    saved: list[Tensor] = []
    with Made() as mode, torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = mra_attention(*leaves, budget=block_budget(l, 2))
        torch.autograd.grad(y.sum(), leaves)
    nb = l // BLOCK
    assert mode.bytes <= max(8 * nb * nb, 4 * blocks.GIVEN, 4 * h * l * d)  # of one matrix of blocks in float64
    inputs_and_result = 4 * 4 * h * l * d
    assert sum(t.numel() * t.element_size() for t in saved) <= inputs_and_result + 4 * 2 * h * l + 4 * h * (3 * nb + 1)


def test_nothing_is_kept_without_gradients() -> None:
    q, k, v = make(100)
    norms = (2, 1, 1, 128)
    for leaf in (q, q.clone().requires_grad_()):
        with torch.no_grad(), Made() as mode:
            mra_attention(leaf, k, v, budget=5)
        assert norms not in mode.shapes
    with Made() as mode:
        assert not mra_attention(q, k, v, budget=5).requires_grad
        assert norms not in mode.shapes
        assert mra_attention(leaf, k, v, budget=5).requires_grad
        assert norms in mode.shapes


def test_block_budget() -> None:
    assert [block_budget(l, 4) for l in (1, 32, 33, 100, 128, 129, 512)] == [1, 1, 4, 16, 16, 20, 64]


def test_a_kernel_is_held_against_scaled_dot_product_attention() -> None:
    """The short way of a CPU is taken where everything is selected, and there alone."""
    q, k, v = make(100)
    y = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(mra_attention(q, k, v, budget=16), y)
    assert not torch.equal(mra_attention(q, k, v, budget=16, form="blocks"), y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0}, "budget 0: select 1 block or more"),
        ({"k": torch.zeros(1, 2, 7, 4)}, r"q \(1, 2, 8, 4\), k \(1, 2, 7, 4\), v \(1, 2, 8, 3\): give q and k"),
        ({"v": torch.zeros(1, 1, 8, 4)}, "give q and k"),
        ({"q": torch.zeros(2, 8, 4), "k": torch.zeros(2, 8, 4)}, "give q and k"),
        ({n: torch.zeros(1, 2, 0, 4) for n in "qkv"}, "l > 0"),
        ({"mask": torch.ones(1, 7, dtype=torch.bool)}, r"mask \(1, 7\) of torch.bool for q \(1, 2, 8, 4\)"),
        ({"mask": torch.ones(1, 8)}, "of torch.float32"),
        ({"first_blocks": -1}, "first_blocks -1, diagonal_blocks 0"),
        ({"diagonal_blocks": -2}, "first_blocks 0, diagonal_blocks -2"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    q = torch.zeros(1, 2, 8, 4)
    arguments = {"q": q, "k": q, "v": torch.zeros(1, 2, 8, 3), "budget": 1, **change}
    with pytest.raises(ValueError, match=message) as error:
        mra_attention(**arguments)
    assert "\n" not in str(error.value)
