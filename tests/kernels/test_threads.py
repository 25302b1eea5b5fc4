"""Work shared by the piece: everything is done once, and nothing of how torch shares its own work changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from farspan.kernels.mra import mra_attention
from farspan.kernels.threads import for_each

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_item_once_in_a_thread_that_shares_nothing(threads: int) -> None:
    seen: list[tuple[int, str, int, bool]] = []

    def note(item: int) -> None:
        name = threading.current_thread().name
        seen.append((item, name, torch.get_num_threads(), torch.is_grad_enabled()))

    for_each(note, range(40), CPU)
    assert sorted(item for item, *_ in seen) == list(range(40))
    if threads > 1:
        assert {(inner, grad) for _, _, inner, grad in seen} == {(1, False)}
        assert all(name.startswith("farspan") for _, name, *_ in seen)


def test_torch_goes_on_as_before(threads: int) -> None:
    for_each(lambda item: None, range(4), CPU)
    others: list[int] = []
    other = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert (torch.get_num_threads(), others) == (threads, [threads])


def test_an_error_is_the_callers(threads: int) -> None:
    def fail(item: int) -> None:
        if item == 3:
            raise ValueError("the fourth")

    with pytest.raises(ValueError, match="the fourth"):
        for_each(fail, range(5), CPU)


def test_the_number_of_threads_may_change_before_the_backward_pass(threads: int) -> None:
    x = torch.randn(2, 4, 200, 16, generator=torch.Generator().manual_seed(1))
    gradients = []
    for then in (threads, 5):
        torch.set_num_threads(threads)
        q = x.clone().requires_grad_()
        y = mra_attention(q, q, q, budget=10)
        torch.set_num_threads(then)
        y.square().sum().backward()
        gradients.append(q.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_attention_is_as_on_one_thread_and_works_in_inference_mode(threads: int) -> None:
    q, k, v = torch.randn(3, 2, 4, 200, 16, generator=torch.Generator().manual_seed(1)).unbind(0)

    def run() -> list[torch.Tensor]:
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = mra_attention(*inputs, budget=10)
        y.square().sum().backward()
        return [y.detach(), *(x.grad for x in inputs)]

    found = run()
    with torch.inference_mode():
        assert torch.equal(mra_attention(q, k, v, budget=10), found[0])
    torch.set_num_threads(1)
    for ours, one in zip(found, run(), strict=True):
        torch.testing.assert_close(ours, one, rtol=1e-6, atol=1e-6)
