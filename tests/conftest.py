from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("architecture_suite", "comparison", "models", "runs")

from ranks import Ranks  # noqa: E402
from runs import prepare_text  # noqa: E402


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes to run collective code on, started once for all tests (importing the stack takes seconds)."""
    pool = Ranks()
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared dataset of real text, to be read only."""
    return prepare_text(tmp_path_factory.mktemp("prepared"))
