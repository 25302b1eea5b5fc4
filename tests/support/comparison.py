"""How close is equal: every tolerance of the tests that compare models, layers and layouts stands here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# Float32 sums taken in another order, relative to the largest magnitude of the tensor that is compared with.
RELATIVE = 1e-5
# What a deliberate fault must exceed, so that a comparison that passes says something.
FAULT = 100 * RELATIVE
# Bfloat16 against float32, a few steps from the same start: 8 bits of precision.
BFLOAT16 = 1e-2
# Operations counted against the formula, which leaves out what is not a product of the layers or the word head.
FLOPS = 0.02


def difference(actual: Any, expected: Any, scale: float | None = None) -> float:
    """The largest difference, relative to ``scale``: by default the largest magnitude of ``expected``."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape, f"shapes {tuple(actual.shape)} and {tuple(expected.shape)}"
    if not expected.numel():
        return 0.0
    if scale is None:
        scale = expected.abs().max().item()
    largest = (actual - expected).abs().max().item()
    return largest / scale if scale > 0 else (0.0 if largest == 0 else float("inf"))


def assert_close(actual: Any, expected: Any, what: str, *, scale: float | None = None) -> None:
    found = difference(actual, expected, scale)
    assert found <= RELATIVE, f"{what}: relative difference {found:.2e}, allowed {RELATIVE:.0e}"


def assert_differs(actual: Any, expected: Any, what: str) -> None:
    found = difference(actual, expected)
    assert found > FAULT, f"{what}: relative difference {found:.2e}, the fault should exceed {FAULT:.0e}"


def assert_all_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str, scale: Callable[[str], str] = str
) -> None:
    """The same names and, in each, the same numbers.  ``scale``: the name of the tensor whose size a name's error is
    compared with."""
    assert set(actual) == set(expected), f"{what}: only in one of them: {sorted(set(actual) ^ set(expected))}"
    for name, value in expected.items():
        against = expected[scale(name)].abs().max().item()
        assert_close(actual[name], value, f"{what} {name}", scale=against)


def assert_identical(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, types and bits."""
    assert set(actual) == set(expected), f"only in one of them: {sorted(set(actual) ^ set(expected))}"
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), f"{name} differs in {(actual[name] != value).sum()} values"


def merge(parts: Iterable[tuple[Any, Tensor]]) -> Tensor:
    """The logical tensor of the (Logical, local value) of all tensor ranks, after a check of what merging throws away:
    copies must be the same, padding must be zero."""
    logicals, values = zip(*parts, strict=True)
    logical = logicals[0]
    if logical.dim is None:
        assert all(torch.equal(value, values[0]) for value in values[1:]), "the copies of tensor ranks differ"
    elif logical.padded is not None:
        shape = list(logical.shape)
        shape[logical.dim] = logical.padded // len(values)
        rows = torch.cat([value.reshape(shape) for value in values], logical.dim)
        padding = rows.narrow(logical.dim, logical.shape[logical.dim], logical.padded - logical.shape[logical.dim])
        assert not padding.any(), "padding is not zero"
    return logical.merge(values)
