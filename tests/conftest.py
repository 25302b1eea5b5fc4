from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("architecture_suite", "comparison", "encoder_suite", "models", "reference_suite", "runs")

from forking import ForkServer  # noqa: E402
from ranks import Ranks  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ranks wait for each other by turning: two sets of them on the same cores take many times as long as one."""
    for item in items:
        if "fork_server" in getattr(item, "fixturenames", ()):
            item.add_marker("alone")


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
    from runs import prepare_text  # here: tests of kernels need nothing but torch

    return prepare_text(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def remote_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies a folder's code to, instead of the user's cache; forgotten afterwards."""
    cache = str(tmp_path_factory.mktemp("modules"))

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", list(sys.path))
        forget()
        yield
        forget()
