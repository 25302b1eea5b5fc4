"""What Farspan takes of megatron-core, imported without what it would compile.

megatron-core decorates functions with ``torch.compile`` while it is imported (its jit.py), which loads Dynamo and
Inductor: seconds of every process, for functions that nothing here calls.  They are compiled when they are called.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def compiled_when_called() -> Iterator[None]:
    """Functions that ``torch.compile`` decorates inside are compiled when they are first called."""
    compile_now = torch.compile

    def decorate(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return functools.partial(decorate, **options)
        compiled = functools.cache(lambda: compile_now(function, **options))

        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            return compiled()(*args, **named)

        return call

    torch.compile = decorate  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


with compiled_when_called():
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.enums import ModelType
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = [
    "ModelParallelConfig",
    "ModelType",
    "TransformerConfig",
    "get_forward_backward_func",
    "parallel_state",
    "tensor_parallel",
]
