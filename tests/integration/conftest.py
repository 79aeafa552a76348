"""Fixtures of several files: runs that leave a trace, and the real run-once 0.4.2 of 2021."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import legacy_2021
from tests.legacy_2021 import Running


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Give a folder in which each run of a body leaves a file."""
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def unpacked_2021(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of the unpacked wheel of 2021."""
    return legacy_2021.unpack(tmp_path_factory.mktemp("wheel-2021"))


@pytest.fixture(scope="session")
def python_2021() -> Path:
    """Give a Python that the client of 2021 runs on."""
    return legacy_2021.client_python()


@pytest.fixture
def server_2021(unpacked_2021: Path, tmp_path: Path) -> Iterator[legacy_2021.Server2021]:
    """Give the running server of 2021."""
    server = legacy_2021.Server2021(unpacked_2021, tmp_path / "2021")
    yield server
    server.close()


@pytest.fixture(params=["2021", "ours"])
def either(request: pytest.FixtureRequest) -> Running:
    """Give each kind of server in turn."""
    name = "server_2021" if request.param == "2021" else "server"
    running: Running = request.getfixturevalue(name)
    return running
