from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from farspan.kernels import forms


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only slow tiny tensors down, and the rule for forms of attention counts them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def as_configured() -> Iterator[None]:
    """What a test configures is not the next one's."""
    yield
    forms.configure()
