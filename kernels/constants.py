"""Functions whose results are constants for torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_Function = TypeVar("_Function", bound=Callable[..., object])


def constant_when_compiled(function: _Function) -> _Function:
    """As ``torch.compiler.assume_constant_result``, which loads Dynamo to mark a function in the same way:
    seconds of every process, most of which compile nothing."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
