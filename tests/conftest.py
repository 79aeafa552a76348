"""Fixtures: a clean environment, a clock to move, servers that are ended whatever happens."""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from distlock_server.clock import ManualClock
from distlock_server.engines.memory import MemoryEngine
from tests.hermetic import ours, user_folders
from tests.network import Network
from tests.servers import InprocServer, ServerProcess, connect

REPORT = "figure"


def pytest_configure() -> None:
    """Let tests interrupt what they start, also where a shell runs them in the background.

    There SIGINT is ignored, which every process hands on to those that it starts.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def hermetic_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Hide the user's configuration, home and variables; give the home folder that is seen."""
    for name in ours():
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    for variable, folder in user_folders(home).items():
        monkeypatch.setenv(variable, folder)
    # The path of a unix socket must be short; pytest's folders are not.
    runtime = tempfile.mkdtemp(prefix="ro-")
    monkeypatch.setenv("RUN_ONCE_RUNTIME_DIR", runtime)
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    yield home
    shutil.rmtree(runtime, ignore_errors=True)


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Give a function for figures that the end of the test run is to show."""
    return lambda line: record_property(REPORT, line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the figures that tests reported."""
    lines = [
        f"{test.nodeid}: {line}"
        for tests in terminalreporter.stats.values()
        for test in tests
        if isinstance(test, pytest.TestReport) and test.when == "call"
        for name, line in test.user_properties
        if name == REPORT
    ]
    if lines:
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture
def manual_clock() -> ManualClock:
    """Give a clock that stands still until it is moved."""
    return ManualClock()


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    """Give a stack for what must be ended, also when the test fails."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def network(cleanup: ExitStack) -> Network:
    """Give a network that only this host reaches; needs root."""
    return Network(cleanup)


@pytest.fixture
def start_server(tmp_path: Path, cleanup: ExitStack) -> Callable[..., ServerProcess]:
    """Give a function that starts a server process, with more options if given."""

    def start(*arguments: str, folder: Path | None = None) -> ServerProcess:
        server = ServerProcess(folder or tmp_path / "server", *arguments)
        cleanup.callback(server.close)
        server.start()
        return server

    return start


@pytest.fixture
def server(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    """Give a running server process on a free port."""
    return start_server()


@pytest.fixture
def two_servers(
    tmp_path: Path, start_server: Callable[..., ServerProcess]
) -> tuple[ServerProcess, ServerProcess]:
    """Give two running server processes, each with its own database."""
    return start_server(folder=tmp_path / "one"), start_server(folder=tmp_path / "two")


@pytest.fixture
def inproc_server(tmp_path: Path, manual_clock: ManualClock, cleanup: ExitStack) -> InprocServer:
    """Give a server in this process, in memory, under the manual clock."""
    server = InprocServer(MemoryEngine(), tmp_path / "results", manual_clock)
    cleanup.callback(server.close)
    return server


@pytest.fixture
def channel(inproc_server: InprocServer, cleanup: ExitStack) -> grpc.Channel:
    """Give a channel to the server in this process."""
    return cleanup.enter_context(connect(inproc_server.address))
