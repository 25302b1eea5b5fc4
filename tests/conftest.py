from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("architecture_suite", "comparison", "models", "reference_suite", "runs")

from forking import ForkServer  # noqa: E402
from ranks import Ranks  # noqa: E402
from runs import prepare_text  # noqa: E402


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """What ranks are forked from: importing the stack takes seconds."""
    server = ForkServer()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def ranks(fork_server: ForkServer) -> Iterator[Ranks]:
    """Processes to run collective code on, the same for all tests."""
    pool = Ranks(fork_server)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared dataset of real text, to be read only."""
    return prepare_text(tmp_path_factory.mktemp("prepared"))
