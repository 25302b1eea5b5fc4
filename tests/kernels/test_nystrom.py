"""Nyström attention against loops over rows, segments and queries in float64, and against transformers' module."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import BFLOAT16, assert_close, assert_differs, difference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import NystromformerConfig
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

from farspan.kernels.nystrom import largest_column_sum, nystrom_attention, position_convolution, segment

EXACT = 1e-10  # float64, through a pseudo-inverse
LANDMARKS, HEADS, D, E = 6, 2, 4, 3
LENGTHS = [1, 6, 7, 12, 16, 23, 30]
MASKS = ["none", "all real", "at the end", "at the start", "anywhere", "whole segments", "rows of padding"]


def make_mask(kind: str, n: int, l: int) -> Tensor | None:
    place, rows = torch.arange(l).expand(n, l), torch.arange(1, n + 1).unsqueeze(1)
    return {
        "none": None,
        "all real": place >= 0,
        "at the end": place < l - 3 * rows,
        "at the start": place >= 3 * rows,
        "anywhere": torch.rand(n, l, generator=torch.Generator().manual_seed(l)) < 0.5,
        "whole segments": (place // segment(l, LANDMARKS) + rows) % 3 > 0,
        "rows of padding": (rows != 2).expand(n, l),
    }[kind]


def make(n: int, l: int, *, h: int = HEADS, d: int = D, e: int = E, scale: float = 2.0) -> list[Tensor]:
    """Queries, keys, values and a gradient of the result."""
    generator = torch.Generator().manual_seed(100 * n + l)
    shapes = ((n, h, l, d), (n, h, l, d), (n, h, l, e), (n, h, l, e))
    return [scale * torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def softmax_rows(queries: list[Tensor], keys: list[Tensor]) -> Tensor:
    d = queries[0].shape[-1]
    return torch.stack([torch.stack([q @ k / d**0.5 for k in keys]).softmax(0) for q in queries])


def landmark_means(x: Tensor, members: list[list[int]]) -> list[Tensor]:
    return [sum(x[i] for i in tokens) / len(tokens) for tokens in members]  # type: ignore[misc]


def one_head(
    q: Tensor, k: Tensor, v: Tensor, real: list[int], *, counts: bool, exact: bool, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q, k, v: [l, ...]; real: the real tokens → the result and the largest column sum."""
    l, zero = len(q), torch.zeros((), dtype=q.dtype)
    if not real and not counts:
        return 0 * v, zero
    answered = range(l) if counts else real
    keys, values = [k[i] for i in real], v[real]
    if exact or l <= LANDMARKS:
        rows = softmax_rows([q[i] for i in answered], keys) @ values if real else 0 * v
        largest = zero
    else:
        s = -(-l // LANDMARKS)
        segments = [range(first, min(first + s, l)) for first in range(0, l, s)]
        members = [[i for i in tokens if counts or i in real] for tokens in segments]
        members = [tokens for tokens in members if tokens]
        q_means, k_means = landmark_means(q, members), landmark_means(k, members)
        a, i = softmax_rows(q_means, k_means), torch.eye(len(members), dtype=q.dtype)
        largest = a.sum(0).max()
        z = a.T / (largest if start is None else start)
        for _ in range(6):
            z = z @ (13 * i - a @ z @ (15 * i - a @ z @ (7 * i - a @ z))) / 4
        if not real:
            return 0 * v, largest
        rows = softmax_rows([q[i] for i in answered], k_means) @ z @ softmax_rows(q_means, keys) @ values
    y = list(0 * v)
    for place, row in zip(answered, rows, strict=True):
        y[place] = row
    return torch.stack(y), largest


def by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    counts: bool = False,
    exact: bool = False,
    shared: bool = False,
) -> Tensor:
    def heads(start: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        return [
            one_head(
                q[i, j], k[i, j], v[i, j], [t for t in range(q.shape[2]) if mask is None or mask[i, t]],
                counts=counts and mask is not None, exact=exact, start=start,
            )
            for i, j in itertools.product(range(q.shape[0]), range(q.shape[1]))
        ]  # fmt: skip

    start = torch.stack([largest for _, largest in heads(None)]).max() if shared else None
    return torch.stack([y for y, _ in heads(start)]).view(v.shape)


def results(y: Tensor, upstream: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(y, inputs, upstream, materialize_grads=True)
    return {"y": y, **{f"gradient {i}": g for i, g in enumerate(gradients)}}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        scale = max(value.abs().max().item(), 1e-3)  # gradients of q and k are zero where there is one key
        assert difference(actual[name], value, scale) < EXACT, name


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("l", LENGTHS)
def test_against_loops(l: int, kind: str) -> None:
    *qkv, upstream = make(3, l)
    mask = make_mask(kind, 3, l)
    q, k, v = (x.requires_grad_() for x in qkv)
    for counts, exact, shared in itertools.product((False, True), repeat=3):
        options: dict[str, Any] = {"landmarks": LANDMARKS, "mask": mask, "padding_counts": counts}
        start = None
        if shared:
            start = largest_column_sum(q, k, **options)
            assert start.shape == () and (start > 0) == (l > LANDMARKS)
        y = nystrom_attention(q, k, v, **options, exact=exact, start=start)
        expected = by_hand(q, k, v, mask, counts=counts, exact=exact, shared=shared and not exact)
        assert y.shape == v.shape and y.isfinite().all()
        if mask is not None:
            answered = mask.any(1, keepdim=True).expand_as(mask) if counts else mask
            assert not y.masked_select(~answered[:, None, :, None]).any()
        assert_same(results(y, upstream, q, k, v), results(expected, upstream, q, k, v))


@pytest.mark.parametrize("kernel", [None, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_as_released(padded: bool, kernel: int | None) -> None:
    """transformers' module, whose rows have exactly the configured length, with its weights' gradients."""
    torch.manual_seed(4)
    config = NystromformerConfig(
        hidden_size=HEADS * D, num_attention_heads=HEADS, num_landmarks=LANDMARKS, segment_means_seq_len=24,
        conv_kernel_size=kernel or 65,
    )  # fmt: skip
    module = NystromformerSelfAttention(config).double()
    if kernel is None:
        module.conv_kernel_size = None
        del module.conv
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    x, upstream = torch.randn(2, 3, 24, HEADS * D, dtype=torch.float64)
    mask = make_mask("at the end", 3, 24) if padded else None
    added = None if mask is None else (~mask)[:, None, None, :].double() * torch.finfo(torch.float64).min
    expected = module(x, added)[0]

    q, k, v = (f(x).unflatten(2, (HEADS, D)).transpose(1, 2) for f in (module.query, module.key, module.value))
    options: dict[str, Any] = {"landmarks": LANDMARKS, "mask": mask, "padding_counts": True}
    start = largest_column_sum(q, k, **options)
    y = nystrom_attention(q, k, v, **options, start=start)
    if kernel is not None:
        y = y + position_convolution(v, module.conv.weight[:, 0, :, 0])
    y = y.transpose(1, 2).flatten(2)
    parameters = tuple(module.parameters())
    assert_same(results(y, upstream, *parameters), results(expected, upstream, *parameters))
    assert_differs(nystrom_attention(q, k, v, **options), nystrom_attention(q, k, v, **options, start=start), "starts")


def test_as_many_landmarks_as_tokens_is_softmax() -> None:
    q, k, v, _ = make(2, 9)
    expected = F.scaled_dot_product_attention(q, k, v)
    assert difference(nystrom_attention(q, k, v, landmarks=9), expected) < 1e-13
    assert difference(nystrom_attention(q, k, v, landmarks=64), expected) < 1e-13
    assert difference(nystrom_attention(q, k, v, landmarks=2, exact=True), expected) < 1e-13
    assert_differs(nystrom_attention(q, k, v, landmarks=8), expected, "landmarks of two tokens")


@pytest.mark.parametrize("counts", [False, True])
def test_rows_and_heads_are_alone(counts: bool) -> None:
    """Neither depends on another, but for the released start: that is the largest of all of them."""
    q, k, v, _ = make(3, 20, h=4)
    mask = make_mask("at the end", 3, 20)
    assert mask is not None
    options: dict[str, Any] = {"landmarks": LANDMARKS, "padding_counts": counts}
    together = nystrom_attention(q, k, v, mask=mask, **options)
    start = largest_column_sum(q, k, mask=mask, **options)
    released = nystrom_attention(q, k, v, mask=mask, start=start, **options)
    for i in range(3):
        alone = [x[i : i + 1] for x in (q, k, v)]
        of_row = {"mask": mask[i : i + 1], **options}
        assert difference(nystrom_attention(*alone, **of_row), together[i : i + 1]) < EXACT
        assert difference(nystrom_attention(*alone, **of_row, start=start), released[i : i + 1]) < EXACT
    halves = [[x[:, part] for x in (q, k, v)] for part in (slice(0, 2), slice(2, 4))]
    assert difference(torch.cat([nystrom_attention(*x, mask=mask, **options) for x in halves], 1), together) < EXACT
    starts = [largest_column_sum(*x[:2], mask=mask, **options) for x in halves]
    assert torch.stack(starts).max() == start and starts[0] != starts[1]


def test_padding_at_the_end_matters_by_the_length_of_segments_only() -> None:
    q, k, v, _ = make(1, 25)
    whole = nystrom_attention(q, k, v, landmarks=LANDMARKS)
    for more in (1, 3, 5):  # up to 30 tokens have segments of 5
        rows = [F.pad(x, (0, 0, 0, more), value=9.0) for x in (q, k, v)]
        mask = (torch.arange(25 + more) < 25).unsqueeze(0)
        y = nystrom_attention(*rows, landmarks=LANDMARKS, mask=mask)
        assert difference(y[:, :, :25], whole) < EXACT and not y[:, :, 25:].any()
    rows = [F.pad(x, (0, 0, 0, 6)) for x in (q, k, v)]
    y = nystrom_attention(*rows, landmarks=LANDMARKS, mask=(torch.arange(31) < 25).unsqueeze(0))
    assert_differs(y[:, :, :25], whole, "segments of 6")


def test_what_stands_in_padding_does_not_matter() -> None:
    q, k, v, upstream = make(3, 23)
    mask = make_mask("anywhere", 3, 23)
    assert mask is not None
    real, found = mask[:, None, :, None], []
    for value in (0.0, -50.0):
        inputs = [torch.where(real, x, value).requires_grad_() for x in (q, k, v)]
        found.append(results(nystrom_attention(*inputs, landmarks=LANDMARKS, mask=mask), upstream, *inputs))
    assert_same(found[1], found[0])
    gradients = [found[0][f"gradient {i}"] for i in range(3)]
    assert not any(g.masked_select(~real).any() for g in gradients)


@pytest.mark.parametrize("kind", ["none", "anywhere"])
def test_other_types(kind: str) -> None:
    """Float32 and bfloat16 beside float64 of the same numbers."""
    mask = make_mask(kind, 2, 50)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5 * BFLOAT16)):
        *qkv, upstream = [x.to(dtype) for x in make(2, 50, scale=1.0)]
        found = []
        for given in (dtype, torch.float64):
            inputs = [x.to(given).requires_grad_() for x in qkv]
            start = largest_column_sum(*inputs[:2], landmarks=LANDMARKS, mask=mask)
            assert start.dtype == (torch.float64 if given == torch.float64 else torch.float32)
            y = nystrom_attention(*inputs, landmarks=LANDMARKS, mask=mask)
            assert y.dtype == given
            found.append(results(y, upstream.to(given), *inputs))
        for name, expected in found[1].items():
            assert difference(found[0][name], expected) < tolerance, (dtype, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_extreme_scores_are_finite(scale: float, dtype: torch.dtype) -> None:
    for kind, counts in itertools.product(MASKS, (False, True)):
        *qkv, upstream = make(3, 25, scale=1.0)
        q, k, v = (x.to(dtype).requires_grad_() for x in (scale * qkv[0], scale * qkv[1], qkv[2]))
        options: dict[str, Any] = {"landmarks": LANDMARKS, "mask": make_mask(kind, 3, 25), "padding_counts": counts}
        for start in (None, largest_column_sum(q, k, **options)):
            y = nystrom_attention(q, k, v, **options, start=start)
            found = results(y, upstream.to(dtype), q, k, v)
            assert all(x.isfinite().all() for x in found.values())


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that an operation gives."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_memory_is_linear_in_the_length() -> None:
    found = []
    for l in (512, 2048):
        q, k, v, upstream = (x.float() for x in make(1, l))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        weight = torch.randn(HEADS, 65, requires_grad=True)
        mask = torch.arange(l).unsqueeze(0) < l - 5
        with Largest() as largest:
            y = nystrom_attention(*inputs, landmarks=LANDMARKS, mask=mask) + position_convolution(v, weight, mask)
            y.backward(upstream)
        found.append(largest.numbers)
    assert found[1] < 4.5 * found[0] and found[1] < 2048 * 64


def test_the_same_numbers_every_time() -> None:
    *qkv, upstream = (x.float() for x in make(2, 90))
    mask = make_mask("anywhere", 2, 90)
    weight = torch.randn(HEADS, 9, requires_grad=True)
    inputs = [x.requires_grad_() for x in qkv]
    found = []
    for _ in range(2):
        y = nystrom_attention(*inputs, landmarks=LANDMARKS, mask=mask) + position_convolution(inputs[2], weight, mask)
        found.append(results(y, upstream, *inputs, weight))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("c", [1, 3, 9, 31, 33, 65, 129])
def test_convolution(c: int, dtype: torch.dtype) -> None:
    """Against torch's in float64, where its gradient of weights is right."""
    torch.manual_seed(c)
    for n, l in ((2, 1), (1, 31), (2, 64), (3, 150)):
        v = torch.randn(l, n, HEADS, D).permute(1, 2, 0, 3).to(dtype).requires_grad_()
        weight = torch.randn(HEADS, c).to(dtype).requires_grad_()
        upstream = torch.randn(n, HEADS, l, D).to(dtype)
        for mask in (None, make_mask("anywhere", n, l)):
            exact_v, exact_weight = (x.detach().double().requires_grad_() for x in (v, weight))
            zeros = exact_v if mask is None else exact_v * mask[:, None, :, None]
            expected = F.conv2d(zeros, exact_weight[:, None, :, None], padding=(c // 2, 0), groups=HEADS)
            expected = results(expected, upstream.double(), exact_v, exact_weight)
            y = position_convolution(v, weight, mask)
            assert y.dtype == dtype
            for name, value in results(y, upstream, v, weight).items():
                if dtype == torch.bfloat16:
                    assert difference(value, expected[name]) < 2 * BFLOAT16, (l, name)
                else:
                    assert_close(value, expected[name], f"{l} {name}")


def test_gradient_of_the_convolution() -> None:
    v = torch.randn(2, 2, 7, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    for mask in (None, make_mask("anywhere", 2, 7)):
        assert torch.autograd.gradcheck(lambda v, weight, mask=mask: position_convolution(v, weight, mask), (v, weight))
    assert torch.autograd.grad(position_convolution(v, weight.detach()).sum(), v)[0].shape == v.shape
    assert torch.autograd.grad(position_convolution(v.detach(), weight).sum(), weight)[0].shape == weight.shape


def test_one_line_errors() -> None:
    q, k, v, _ = make(2, 8)
    with pytest.raises(ValueError, match=r"^landmarks is 0, must be at least 1$"):
        nystrom_attention(q, k, v, landmarks=0)
    for mask in (torch.ones(2, 7).bool(), torch.ones(2, 8)):
        for call in (
            lambda mask: nystrom_attention(q, k, v, landmarks=4, mask=mask),
            lambda mask: largest_column_sum(q, k, landmarks=4, mask=mask),
            lambda mask: position_convolution(v, torch.ones(HEADS, 3), mask),
        ):
            with pytest.raises(ValueError, match=r"^the mask is .*, must be torch.bool \[2, 8\] \(rows, tokens\)$"):
                call(mask)
    with pytest.raises(ValueError, match=r"^a convolution over 4 positions has no middle: set an odd number$"):
        position_convolution(v, torch.ones(HEADS, 4))


def test_segments() -> None:
    assert [segment(l, 64) for l in (1, 64, 65, 128, 512, 4096)] == [1, 1, 2, 2, 8, 64]


@pytest.mark.parametrize("landmarks", [4, 40])
def test_what_is_not_finite_in_padding_stays_there(landmarks: int) -> None:
    q, k, v = torch.randn(3, 2, 3, 20, 8, generator=torch.Generator().manual_seed(1)).unbind(0)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 5:9] = False
    clean = nystrom_attention(q, k, v, landmarks=landmarks, mask=mask)
    for x in (q, k, v):
        x[0, :, 5:9] = torch.nan
    inputs = [x.requires_grad_() for x in (q, k, v)]
    y = nystrom_attention(*inputs, landmarks=landmarks, mask=mask)
    assert torch.equal(y, clean)
    y.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


def test_shapes_that_do_not_fit_are_told() -> None:
    q = torch.zeros(1, 2, 20, 8)
    with pytest.raises(ValueError, match=r"are \[1, 2, 20, 8\], \[1, 2, 21, 8\], \[1, 2, 20, 8\]: must agree in rows"):
        nystrom_attention(q, torch.zeros(1, 2, 21, 8), q, landmarks=4)
