"""The moving average in every form against its kernel written out, in float64."""

from __future__ import annotations

import gc
import importlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from farspan.kernels import ema as package
from farspan.kernels.documents import Documents
from farspan.kernels.ema import EmaState, Form, ema

chunked = importlib.import_module("farspan.kernels.ema.chunked")  # the package has a function of that name
lanes = importlib.import_module("farspan.kernels.ema.lanes")
FORMS: tuple[Form, ...] = ("recurrence", "chunked")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
NAMES = ("y", "x", "damping", "decay", "expansion", "projection")
LOG_ODDS = {"any": 0.0, "close to 1": math.log(0.01 / 0.99)}  # of the sigmoids: with the second q is about 1 − 1e-4


@pytest.fixture(autouse=True)
def _one_thread_and_slabs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads only slow tiny tensors down; several slabs even of a few features."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(chunked, "SLAB", 1)
    monkeypatch.setattr(chunked, "FEATURES", 2)
    yield
    torch.set_num_threads(threads)


def make(
    s: int, b: int = 2, d: int = 3, n: int = 4, *, directions: int = 1, log_odds: float = 0.0, seed: int = 0
) -> list[Tensor]:
    """x and the four parameters in float64, but exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(s, b, d, generator=generator)
    parameters = torch.randn(4, directions, d, n, generator=generator)
    parameters[:2] = parameters[:2] * (0.1 if log_odds else 1.0) + log_odds
    return [t.double() for t in (x, *parameters)]


def line(parameters: list[Tensor], k: int, length: int, truncation: int | None) -> Tensor:
    """The kernel of a direction, [d, length] (NUMERICS: q^l by a power, not a logarithm)."""
    damping, decay, expansion, projection = (p[k].unsqueeze(-1) for p in parameters)
    p = 1 / (1 + (-damping).exp())
    q = 1 - p / (1 + (-decay).exp())
    lags = torch.arange(length, dtype=torch.float64)
    kernel = (projection * p * expansion * q**lags).sum(1) / math.sqrt(projection.shape[1])
    return kernel * (lags < (math.inf if truncation is None else truncation))


def truth(x: Tensor, *parameters: Tensor, truncation: int | None = None, ids: Tensor | None = None) -> Tensor:
    """x [s, b, d] convolved row by row, or (ids [b, s]) document by document; long ones through float64 FFTs."""
    if ids is not None:
        y = 0 * x
        for row, of_row in enumerate(ids):
            for document in set(of_row.tolist()) - {0}:
                at = (of_row == document).nonzero().squeeze(1)
                alone = truth(x[at, row : row + 1], *parameters, truncation=truncation)
                y = y.index_put((at, torch.tensor(row)), alone.squeeze(1))
        return y
    s, y = len(x), torch.zeros_like(x)
    for k in range(len(parameters[0])):
        kernel, of_k = line(list(parameters), k, s, truncation), x.flip(0) if k else x
        if s > 300:
            product = torch.fft.rfft(of_k, 2 * s, dim=0) * torch.fft.rfft(kernel.T, 2 * s, dim=0).unsqueeze(1)
            of_k = torch.fft.irfft(product, 2 * s, dim=0)[:s]
        else:
            lags = torch.arange(s).unsqueeze(1) - torch.arange(s)
            of_k = torch.einsum("dij,jbd->ibd", kernel[:, lags.clamp(0)] * (lags >= 0), of_k)
        y = y + (of_k.flip(0) if k else of_k)
    return y


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """y and the gradients of a product with fixed numbers."""
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream, materialize_grads=True)]


def expected(inputs: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    return gradients(truth(*leaves, **options), leaves)


def found(inputs: list[Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    return gradients(ema(*leaves, **options)[0], leaves)


def assert_near(actual: list[Tensor], target: list[Tensor], tolerance: float, names: tuple[str, ...] = NAMES) -> None:
    for name, a, t in zip(names, actual, target, strict=True):
        assert a.shape == t.shape, name
        error, size = (a.double() - t).norm().item(), t.double().norm().item()
        if t.numel() == 1:  # a sum that may nearly cancel: the other gradients then say what is small
            size = max(size, 0.05 * max(other.double().norm().item() for other in target[1:]))
        assert error <= tolerance * size + 1e-13, f"{name}: off by {error:.2e} of {size:.2e}"


def test_the_truth_is_a_sum_over_lags() -> None:
    x, *parameters = make(310, 1, 2, 2, directions=2)
    y = truth(x, *parameters, truncation=20)
    first, second = (line(parameters, k, 310, 20) for k in range(2))
    for t in (0, 1, 19, 20, 200, 309):
        for d in range(2):
            by_hand = sum(first[d, t - i] * x[i, 0, d] for i in range(t + 1))
            by_hand += sum(second[d, i - t] * x[i, 0, d] for i in range(t, 310))
            assert abs(by_hand - y[t, 0, d]) < 1e-13


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    s=st.integers(1, 200), b=st.integers(1, 3), d=st.integers(1, 3), n=st.integers(1, 4), directions=st.integers(1, 2),
    odds=st.sampled_from(list(LOG_ODDS)), truncation=st.none() | st.integers(1, 70), chunk=st.sampled_from([4, 16, 64]),
    form=st.sampled_from(FORMS), dtype=st.sampled_from(list(TOLERANCE)),
)  # fmt: skip
def test_small(
    s: int, b: int, d: int, n: int, directions: int, odds: str, truncation: int | None, chunk: int, form: Form,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    inputs = make(s, b, d, n, directions=directions, log_odds=LOG_ODDS[odds], seed=s)
    with mock.patch.object(lanes, "CHUNK", chunk):
        actual = found(inputs, dtype, truncation=truncation, form=form)
    assert_near(actual, expected(inputs, truncation=truncation), TOLERANCE[dtype])


@pytest.mark.parametrize("odds", LOG_ODDS)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("s", [1, 2, 63, 64, 65, 129, 1000, 4097, 19_997])
def test_every_length(s: int, directions: int, odds: str) -> None:
    inputs = make(s, 1, 2, 3, directions=directions, log_odds=LOG_ODDS[odds])
    target = expected(inputs)
    for form in FORMS:
        if form == "chunked" or s <= 1000 or (s > 5000 and odds == "close to 1" and directions == 1):
            assert_near(found(inputs, torch.float32, form=form), target, TOLERANCE[torch.float32])


def test_decay_over_thousands_of_chunks() -> None:
    """It would round to a multiple of 6e-8, and the error grow with every chunk."""
    inputs = make(9999, 1, 2, 3, log_odds=LOG_ODDS["close to 1"])
    with mock.patch.object(lanes, "CHUNK", 1):
        assert_near(found(inputs, torch.float32), expected(inputs), TOLERANCE[torch.float32])


@pytest.mark.parametrize("truncation", [1, 5, 64, 65, 127, 1000, 5000])
def test_truncation(truncation: int) -> None:
    """Other than as a difference of two averages: that would cancel where q is close to 1."""
    inputs = make(1999, 2, 2, 3, directions=2, log_odds=LOG_ODDS["close to 1"])
    target = expected(inputs, truncation=truncation)
    assert_near(found(inputs, torch.float32, truncation=truncation), target, TOLERANCE[torch.float32])
    if truncation < 100:
        recurrence = found(inputs, torch.float32, truncation=truncation, form="recurrence")
        assert_near(recurrence, target, TOLERANCE[torch.float32])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("log_odds", [-30.0, 30.0])
def test_saturated_sigmoids(form: Form, log_odds: float) -> None:
    """In float32 q rounds to 1 or to 0."""
    inputs = make(70, log_odds=log_odds, directions=2)
    y = found(inputs, torch.float32, form=form)
    assert all(t.isfinite().all() for t in y)
    assert_near(y[:2], expected(inputs)[:2], 1e-5, NAMES[:2])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("truncation", [None, 1, 5, 9])
def test_gradcheck(form: Form, truncation: int | None) -> None:
    for directions in (1, 2):
        inputs = [t.requires_grad_() for t in make(13, 2, 2, 2, directions=directions)]

        def compute(*tensors: Tensor) -> Tensor:
            return ema(*tensors, truncation=truncation, form=form)[0]

        with mock.patch.object(lanes, "CHUNK", 4):
            assert torch.autograd.gradcheck(compute, inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("truncation", [None, 5])
def test_gradcheck_of_the_state(form: Form, truncation: int | None) -> None:
    inputs = [t.requires_grad_() for t in make(11, 2, 2, 2)]
    generator = torch.Generator().manual_seed(1)
    shape = (2, 2, 2) if truncation is None else (truncation - 1, 2, 2)
    before = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    def compute(before: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        state = EmaState(before, None) if truncation is None else EmaState(None, before)
        y, after = ema(*tensors, state=state, carry=True, truncation=truncation, form=form)
        assert after is not None
        return y, *(t for t in (after.hidden, after.inputs) if t is not None)

    with mock.patch.object(lanes, "CHUNK", 4):
        assert torch.autograd.gradcheck(compute, (before, *inputs))


def test_the_state_is_the_hidden_one() -> None:
    """That of the definition, so that a state from elsewhere can be taken up."""
    x, *parameters = make(70, 2, 2, 3)
    p, q = parameters[0][0].sigmoid(), 1 - parameters[0][0].sigmoid() * parameters[1][0].sigmoid()
    h = torch.zeros(2, 2, 3, dtype=torch.float64)
    for x_t in x:
        h = q * h + p * parameters[2][0] * x_t.unsqueeze(-1)
    for form in FORMS:
        state = ema(x, *parameters, carry=True, form=form)[1]
        assert state is not None
        assert state.hidden is not None
        torch.testing.assert_close(state.hidden, h, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    pieces=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    truncation=st.none() | st.sampled_from([1, 2, 50, 400]), odds=st.sampled_from(list(LOG_ODDS)),
    form=st.sampled_from(FORMS), dtype=st.sampled_from(list(TOLERANCE)), padded=st.booleans(),
    chunk=st.sampled_from([8, 64]),
)  # fmt: skip
def test_split_anywhere(
    pieces: list[int], truncation: int | None, odds: str, form: Form, dtype: torch.dtype, padded: bool, chunk: int
) -> None:  # fmt: skip
    s = sum(pieces)
    inputs = make(s, 2, 3, 2, log_odds=LOG_ODDS[odds], seed=s)
    real = torch.ones(2, s, dtype=torch.long)
    if padded:
        real = (torch.rand(2, s, generator=torch.Generator().manual_seed(s)) < 0.7).long()
    leaves = [t.to(dtype).requires_grad_() for t in inputs]
    state, parts = None, []
    with mock.patch.object(lanes, "CHUNK", chunk):
        for x, mask in zip(leaves[0].split(pieces), real.split(pieces, 1), strict=True):
            documents = padding(mask) if padded else None
            y, state = ema(
                x, *leaves[1:], documents=documents, state=state, carry=True, truncation=truncation, form=form
            )
            parts.append(y)
    masked = [inputs[0] * real.T.unsqueeze(-1), *inputs[1:]]
    target = expected(masked, truncation=truncation)
    target[1] *= real.T.unsqueeze(-1)
    assert_near(gradients(torch.cat(parts), leaves), target, TOLERANCE[dtype])


def padding(real: Tensor) -> Documents:
    indices = torch.arange(real.shape[1]).expand_as(real)
    return Documents.of(real, indices, "padding", causal=False)


@settings(deadline=None, max_examples=20)
@given(s=st.integers(1, 150), directions=st.integers(1, 2), form=st.sampled_from(FORMS), share=st.floats(0, 1))
def test_padding_is_zeroed_and_takes_its_time(s: int, directions: int, form: Form, share: float) -> None:
    inputs = make(s, 3, 2, 2, directions=directions, seed=s)
    real = (torch.rand(3, s, generator=torch.Generator().manual_seed(s)) < share).long()
    zeroed = real.T.unsqueeze(-1)
    target = expected([inputs[0] * zeroed, *inputs[1:]])
    target[1] *= zeroed
    assert_near(found(inputs, torch.float64, documents=padding(real), form=form), target, 1e-11)


def packed(ids: Tensor) -> Documents:
    return Documents.of(ids, torch.arange(ids.shape[1]).expand_as(ids), "document", causal=False)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.lists(st.tuples(st.booleans(), st.integers(1, 100)), max_size=5), min_size=1, max_size=3),
    directions=st.integers(1, 2), truncation=st.none() | st.integers(1, 80), form=st.sampled_from(FORMS),
    dtype=st.sampled_from(list(TOLERANCE)), chunk=st.sampled_from([4, 32, 64]),
)  # fmt: skip
def test_packed_documents_are_as_each_alone(
    rows: list[list[tuple[bool, int]]], directions: int, truncation: int | None, form: Form, dtype: torch.dtype,
    chunk: int,
) -> None:  # fmt: skip
    s = max(1, *(sum(n for _, n in row) for row in rows))
    ids = torch.zeros(len(rows), s, dtype=torch.long)
    for row, of_row in enumerate(rows):
        at = 0
        for i, (real, n) in enumerate(of_row):
            ids[row, at : at + n] = i + 1 if real else 0
            at += n
    inputs = make(s, len(rows), 3, 2, directions=directions, seed=s)
    with mock.patch.object(lanes, "CHUNK", chunk):
        actual = found(inputs, dtype, documents=packed(ids), truncation=truncation, form=form)
    assert_near(actual, expected(inputs, truncation=truncation, ids=ids), TOLERANCE[dtype])
    assert not actual[0][ids.T == 0].any()


@pytest.mark.parametrize("form", FORMS)
def test_neighbours_do_not_matter(form: Form) -> None:
    """Bit by bit, even beside numbers that are none."""
    ids = torch.tensor([[1] * 70 + [2] * 30 + [0] * 5 + [3] * 90])
    inputs = make(195, 1, directions=2)
    documents = packed(ids)
    y = ema(*inputs, documents=documents, form=form)[0]
    own = (ids[0] == 2).nonzero().squeeze(1)
    inputs[0][(ids[0] != 2)] = math.nan
    assert torch.equal(ema(*inputs, documents=documents, form=form)[0][own], y[own])


def test_the_layout_is_made_once_for_a_microbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    made = mock.Mock(wraps=lanes._pack)
    monkeypatch.setattr(lanes, "_pack", made)
    gc.collect()
    known = len(lanes._packed)
    documents = packed(torch.tensor([[1, 1, 2, 2, 2, 0]]))
    for _ in range(3):
        ema(*make(6, 1), documents=documents)
    assert made.call_count == 1
    assert len(lanes._packed) == known + 1
    del documents
    gc.collect()
    assert len(lanes._packed) == known


def test_full_documents_are_rows() -> None:
    inputs = make(70)
    ids = torch.ones(2, 70, dtype=torch.long)
    indices = torch.arange(70).expand_as(ids)
    y = ema(*inputs)[0]
    for kind in ("full", "padding", "document"):
        documents = Documents.of(ids, indices, kind, causal=True)
        assert torch.equal(ema(*inputs, documents=documents)[0], y)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("directions", [1, 2])
def test_bfloat16(form: Form, directions: int) -> None:
    x, *parameters = make(300, log_odds=LOG_ODDS["close to 1"], directions=directions)
    x = x.bfloat16()
    y = ema(x, *(p.float() for p in parameters), form=form)[0]
    assert y.dtype == torch.bfloat16
    assert_near([y], [truth(x.double(), *parameters)], 2**-8, ("y",))  # the result is rounded, nothing before it
    assert (y.float() != truth(x.double(), *parameters)).any()


def test_any_strides_and_every_bit_again() -> None:
    x, *parameters = (t.float() for t in make(131, 2, 3, directions=2))
    wide = torch.randn(2, 131, 7)
    wide[..., 2:5] = x.transpose(0, 1)
    view = wide.transpose(0, 1)[..., 2:5]
    assert not view.is_contiguous()
    for a, b in zip(found([x, *parameters], torch.float32), found([view, *parameters], torch.float32), strict=True):
        assert torch.equal(a, b)


def test_a_form_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [t.float() for t in make(65)]
    y = {form: ema(*inputs, form=form)[0] for form in FORMS}
    assert not torch.equal(y["recurrence"], y["chunked"])
    assert torch.equal(ema(*inputs)[0], y["chunked"])
    monkeypatch.setattr(package, "DEFAULT", "recurrence")
    assert torch.equal(ema(*inputs)[0], y["recurrence"])


@pytest.mark.parametrize("truncation", [None, 100])
def test_only_the_inputs_are_kept(truncation: int | None) -> None:
    inputs = [t.float().requires_grad_() for t in make(500, directions=2)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ema(*inputs, truncation=truncation)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in inputs}


class Largest(TorchDispatchMode):
    """The most elements that a result has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("truncation", [None, 1000])
def test_nothing_is_much_larger_than_the_input(monkeypatch: pytest.MonkeyPatch, truncation: int | None) -> None:
    monkeypatch.setattr(chunked, "FEATURES", 128)
    inputs = [t.float().requires_grad_() for t in make(4097, 1, 4, 16, directions=2)]
    with Largest() as forward:
        y, _ = ema(*inputs, truncation=truncation)
    with Largest() as backward:
        y.sum().backward()
    assert inputs[0].numel() <= forward.elements <= backward.elements < 1.1 * inputs[0].numel() + 4 * 64 * 64


def test_errors() -> None:
    x, *parameters = make(6, 1)
    two = make(6, 1, directions=2)[1:]
    state = ema(x, *parameters, carry=True)[1]
    truncated = ema(x, *parameters, carry=True, truncation=3)[1]
    ids = torch.tensor([[1, 1, 2, 1, 1, 0]])
    packed_rows = packed(torch.tensor([[1, 1, 2, 2, 2, 2]]))
    for arguments, options, message in (
        ((x[0], *parameters), {}, "give x"),
        ((x[:0], *parameters), {}, "s > 0"),
        ((x, *parameters[:3], two[3]), {}, "of one shape"),
        ((x[..., :2], *parameters), {}, "has 2 features"),
        ((x, *parameters), {"truncation": 0}, "truncation 0"),
        ((x, *parameters), {"documents": padding(torch.ones(2, 6, dtype=torch.long))}, "document ids"),
        ((x, *parameters), {"documents": packed(ids)}, "in pieces"),
        ((x, *two), {"carry": True}, "two directions"),
        ((x, *two), {"state": state}, "two directions"),
        ((x, *parameters), {"carry": True, "documents": packed_rows}, "packed documents"),
        ((x, *parameters), {"state": state, "documents": packed_rows}, "packed documents"),
        ((x, *parameters), {"state": truncated}, "made with a truncation"),
        ((x, *parameters), {"state": state, "truncation": 3}, "made without truncation"),
        ((x.expand(6, 2, 3), *parameters), {"state": state}, "a state of shape"),
        ((x.expand(6, 2, 3), *parameters), {"state": truncated, "truncation": 3}, "a state of shape"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            ema(*arguments, **options)
        assert "\n" not in str(error.value)
