"""Fixtures of several files: traces of runs, the real run-once 0.4.2 of 2021, secure servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from distlock_server.security import Wanted
from tests import legacy_2021
from tests.integration.security_servers import TOKENS, Start, secure_channel
from tests.integration.security_servers import Running as Secured
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


@pytest.fixture
def start(tmp_path: Path, cleanup: ExitStack) -> Start:
    """Give a function that starts a server with options."""

    def begin(host: str = "127.0.0.1", **options: Any) -> Secured:
        unix_socket = options.pop("unix_socket", None)
        wanted = Wanted(host, tmp_path / "db", **options)
        running = Secured(tmp_path / "results", wanted, unix_socket)
        cleanup.callback(running.server.stop)
        return running

    return begin


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """Give one server with TLS and a token of each role, for tests that change nothing in it."""
    folder = tmp_path_factory.mktemp("guarded")
    token_file = folder / "tokens"
    token_file.write_text("".join(f"{role} {token}\n" for role, token in TOKENS.items()))
    token_file.chmod(0o600)
    wanted = Wanted("127.0.0.1", folder / "db", secure=True, token_file=token_file)
    running = Secured(folder / "results", wanted._replace(legacy_port=0))
    yield running
    running.server.stop()


@pytest.fixture(scope="module")
def stub_channel(guarded: Secured) -> Iterator[grpc.Channel]:
    """Give a channel to that server."""
    with secure_channel(guarded) as channel:
        yield channel
