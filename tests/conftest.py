from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("architecture_suite", "comparison", "models")

from ranks import Ranks  # noqa: E402


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes to run collective code on, started once for all tests (importing the stack takes seconds)."""
    pool = Ranks()
    yield pool
    pool.stop()
