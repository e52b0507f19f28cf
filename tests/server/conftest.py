"""One server process for all tests that change nothing in it, and the checkpoint that it reads."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server import checkpoints, processes
from tests.server.processes import Server, serving


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    processes.PROGRAMS = str(tmp_path_factory.getbasetemp().parent / "server-programs")
    return checkpoints.write(tmp_path_factory.mktemp("checkpoint") / "model", checkpoints.random_model())


@pytest.fixture(scope="session")
def server(checkpoint: Path) -> Iterator[Server]:
    with serving(checkpoint, "--draft-tokens", "2") as server:
        yield server
