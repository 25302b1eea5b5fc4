"""The moving average's CUDA source, emulated: against the definition in float64, and as an operation of torch."""

from __future__ import annotations

import functools
import importlib
import math
import random

import pytest
import torch
from ema_cases import CASES, CLOSE_TO_1, TOLERANCE, Case, assert_accurate, assert_near, results, truth
from guarded import in_child
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from farspan.kernels import forms
from farspan.kernels.documents import Documents
from farspan.kernels.ema import EmaState, ema, layout

fused = importlib.import_module("farspan.kernels.ema.fused")  # the package has a function of that name
ORDERS = tuple(functools.partial(forms.emulated, order) for order in (0, 1, 7))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_near_float64_in_any_order(case: str, dtype: torch.dtype) -> None:
    assert_accurate(CASES[case], dtype, *(ORDERS if CASES[case].s < 1000 else ORDERS[::2]))


def test_any_shape() -> None:
    choose = random.Random(5)
    for _ in range(12):
        s, b = choose.randint(1, 400), choose.randint(1, 4)
        lengths: list[tuple[int, ...]] = []
        for _ in range(b if choose.random() < 0.5 else 0):
            rest, of_row = s, []
            while rest:
                of_row.append(choose.randint(1, min(rest, choose.choice([3, 70, 300]))))
                rest -= of_row[-1]
            lengths.append(tuple(x if choose.random() < 0.8 else -x for x in of_row))
        case = Case(
            s, b, choose.randint(1, 18), choose.randint(1, 16), choose.randint(1, 2),
            choose.choice([0.0, CLOSE_TO_1]), tuple(lengths),
        )  # fmt: skip
        assert_accurate(case, choose.choice(list(TOLERANCE)), ORDERS[2])


@pytest.mark.parametrize("pieces", [(64, 128), (1, 63, 65), (100, 30), (20, 44, 3), (2176, 70)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_split_anywhere(pieces: tuple[int, ...], dtype: torch.dtype) -> None:
    """A state in and out, with gradients through both."""
    case = Case(sum(pieces), 2, 3, 5, 1, CLOSE_TO_1 if len(pieces) == 2 else 0.0)

    def run(x: Tensor, *parameters: Tensor, documents: None) -> tuple[Tensor]:
        state, parts = None, []
        for part in x.split(pieces):
            y, state = ema(part, *parameters, state=state, carry=True)
            parts.append(y)
        return (torch.cat(parts),)

    with forms.emulated():
        found = results(case, dtype, run=run)
    # Gradients of x come in two parts that are added in its dtype.
    assert_near(found, truth(case, dtype), dtype, factor=2)


@pytest.mark.parametrize(("s", "n"), [(30, 3), (64, 3), (64, 18), (2500, 3), (2176, 18)])
def test_states_and_their_gradients(s: int, n: int) -> None:
    """Of the last state too, whose gradient nothing else needs."""
    generator = torch.Generator().manual_seed(s)
    x, parameters = torch.randn(s, 2, 3, generator=generator), torch.randn(4, 1, 3, n, generator=generator)
    parameters[:2] += CLOSE_TO_1
    start, of_last = (torch.randn(2, 3, n, generator=generator) for _ in range(2))

    def run(dtype: torch.dtype, form: str | None) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, *parameters, start)]
        y, last = ema(*leaves[:5], state=EmaState(leaves[5], None), carry=True, form=form)  # type: ignore[arg-type]
        assert last is not None and last.hidden is not None
        total = y.sum() / 10 + (last.hidden * of_last.to(dtype)).sum()
        return [y, last.hidden, *torch.autograd.grad(total, leaves)]

    expected = run(torch.float64, "recurrence")
    with forms.emulated():
        found = run(torch.float32, None)
        leaves = [t.requires_grad_() for t in (start.clone(), x.clone())]
        y = ema(leaves[1], *parameters, state=EmaState(leaves[0], None))[0]  # a start alone
        (of_start,) = torch.autograd.grad(y.sum(), leaves[0])
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert (f.double() - e).norm() <= 5e-6 * e.norm(), i
    exact = start.double().requires_grad_()
    y = ema(x.double(), *parameters.double(), state=EmaState(exact, None), form="recurrence")[0]
    assert (of_start.double() - torch.autograd.grad(y.sum(), exact)[0]).norm() <= 5e-6 * of_start.norm()


def test_padding_is_zeroed() -> None:
    x, *parameters = CASES["odd sizes"].tensors()
    real = (torch.rand(3, 67, generator=torch.Generator().manual_seed(0)) < 0.7).long()
    documents = Documents.of(real, torch.arange(67).expand_as(real), "padding", causal=False)
    with forms.emulated():
        y = ema(x, *parameters, documents=documents)[0]
        assert torch.equal(y, ema(x * real.T.unsqueeze(-1), *parameters)[0])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_neighbours_do_not_matter(dtype: torch.dtype) -> None:
    """Bit by bit, even beside numbers that are none; nor do those in padding."""
    case = Case(195, 1, directions=2, lengths=((70, 30, -5, 90),))
    x, *parameters = case.tensors()
    x, documents = x.to(dtype), case.documents()
    with forms.emulated():
        y = ema(x, *parameters, documents=documents)[0]
        x[:70] = x[100:] = math.nan
        again = ema(x, *parameters, documents=documents)[0]
    assert torch.equal(again[70:100], y[70:100]) and not again[100:105].any() and again[105:].isnan().any()


def test_any_strides_and_dtypes_of_parameters() -> None:
    x, *parameters = Case(131, 2, 8).tensors()
    wide = torch.randn(2, 131, 11)
    wide[..., 2:10] = x.transpose(0, 1)
    turned = [p.transpose(1, 2).contiguous().transpose(1, 2) for p in parameters]
    with forms.emulated():
        y = ema(x, *parameters)[0]
        assert torch.equal(ema(wide.transpose(0, 1)[..., 2:10], *turned)[0], y)
        # Contiguous, but from an address that vectors cannot be loaded from.
        at_odds = torch.randn(131 * 16 + 1)[1:].view(131, 2, 8).copy_(x)
        assert torch.equal(ema(at_odds, *parameters)[0], y)
        rounded = [p.bfloat16().requires_grad_() for p in parameters]
        y = ema(x, *rounded)[0]
        assert torch.equal(y, ema(x, *(p.float() for p in rounded))[0])
        y.sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in rounded)


def test_gradients_of_what_asks_for_them() -> None:
    case = CASES["odd sizes"]
    with forms.emulated():
        every = results(case, torch.float32)[1:]
        for which in range(5):
            tensors = case.tensors()
            tensors[which].requires_grad_()
            y = ema(*tensors)[0]
            upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
            assert torch.equal(torch.autograd.grad(y, tensors[which], upstream)[0], every[which])
        assert not ema(*case.tensors())[0].requires_grad


def test_only_the_inputs_are_kept() -> None:
    inputs = [t.requires_grad_() for t in CASES["odd sizes"].tensors()]
    kept: list[Tensor] = []
    with forms.emulated(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ema(*inputs)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in inputs}


def test_nothing_to_do() -> None:
    parameters = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(4)]
    with forms.emulated():
        y = ema(torch.zeros(5, 0, 3), *parameters)[0]
        assert y.shape == (5, 0, 3)
        y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in parameters)


def test_an_operation_of_torch() -> None:
    x, *parameters = (t.requires_grad_() for t in Case(64, 1, 2, 2, 1).tensors())
    start = torch.randn(1, 2, 2, requires_grad=True)
    given = [t.detach() for t in (x, *parameters)]
    with forms.emulated():
        for before, carry in ((None, False), (start, True)):
            torch.library.opcheck(fused.ema_forward, (x, *parameters, before, None, None, 0, False, 2, carry))
            of_last = torch.ones(1, 2, 2) if carry else None
            before = None if before is None else before.detach()
            arguments = torch.ones_like(given[0]), of_last, *given, before, None, None, 0, False, 2, carry, True
            torch.library.opcheck(fused.ema_backward, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_and_computed_again(dtype: torch.dtype) -> None:
    with forms.emulated():
        for name in ("odd sizes, one direction", "hidden dimensions for two"):
            expected = results(CASES[name], dtype)
            whole = torch.compile(ema, fullgraph=True, backend="aot_eager")
            again = functools.partial(checkpoint, ema, use_reentrant=False)
            for run in (whole, again):
                for found, value in zip(results(CASES[name], dtype, run=run), expected, strict=True):
                    assert torch.equal(found, value)


def test_what_it_does_not_take() -> None:
    x, *parameters = Case(20, n=33).tensors()
    with forms.emulated():
        with pytest.raises(ValueError, match="33 hidden dimensions"):
            ema(x, *parameters)
        for tensors, options in (([x, *parameters], {"truncation": 5}), ([t.double() for t in (x, *parameters)], {})):
            expected = ema(*tensors, form="chunked", **options)[0]  # type: ignore[arg-type]
            assert torch.equal(ema(*tensors, **options)[0], expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("groups", [1, 64])
def test_every_position_is_in_one_chunk(groups: int) -> None:
    choose = random.Random(1)
    for _ in range(30):
        s, b = choose.choice([1, 63, 500, 9000]), choose.randint(1, 3)
        cuts = [sorted(choose.sample(range(1, s), choose.randint(0, min(s - 1, 9)))) for _ in range(b)]
        rows = [[b - a for a, b in zip([0, *at], [*at, s], strict=True)] for at in cuts]
        lengths = tuple(tuple(x if choose.random() < 0.7 else -x for x in row) for row in rows)
        documents = Case(s, b, lengths=lengths).documents()
        assert documents is not None
        if documents.stretches is None or not documents.stretches.compact:
            continue
        made = layout.of_documents(documents, groups, 4)
        assert made.segments[0] == 0 and made.segments[-1] == len(made.chunks)
        sizes = made.segments.diff()
        assert sizes.min() > 0 and (sizes.max() + 15) // 16 == made.tiles <= 4
        seen = torch.zeros(b, s, dtype=torch.long)
        for position, row, length, flags in made.chunks.tolist():
            of_chunk = documents.document_ids[row, position : position + length]
            assert 0 < length <= 64 and len(of_chunk) == length and (of_chunk == of_chunk[0]).all()
            assert bool(flags & layout.PADDING) == (of_chunk[0] == 0)
            seen[row, position : position + length] += 1
        assert (seen == 1).all()


def test_the_layout_is_made_once_for_a_microbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    case, calls = CASES["documents"], []
    made, documents = layout._layout, case.documents()
    monkeypatch.setattr(layout, "_layout", lambda *given, **named: calls.append(1) or made(*given, **named))
    with forms.emulated():
        for _ in range(3):
            ema(*case.tensors(), documents=documents)
    assert len(calls) == 1


def test_no_memory_but_its_own_is_touched() -> None:
    def run() -> None:
        with forms.emulated():
            for case in (Case(1), Case(67, 2, 8, 16), Case(70, 1, 5, 3, 1), CASES["documents, one direction"]):
                for dtype in TOLERANCE:
                    results(case, dtype)
            x, *parameters = Case(4416, 1, 2, 2, 1).tensors()
            ema(x, *parameters, state=EmaState(torch.zeros(1, 2, 2), None), carry=True)

    in_child(run)
