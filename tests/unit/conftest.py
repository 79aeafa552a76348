"""Fixtures of the ways in: a configured server in this process, and somebody else on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from run_once.live import registry
from tests.other_client import Other
from tests.servers import InprocServer


@pytest.fixture
def configured_server(
    inproc_server: InprocServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[InprocServer]:
    """Configure the server in this process; see that no item stays live after the test."""
    monkeypatch.setenv("RUN_ONCE_ADDRESS", inproc_server.address)
    monkeypatch.setenv("RUN_ONCE_RETRY_S", "5")
    yield inproc_server
    for item in list(registry()._items):
        item.release()
        registry().remove(item)


@pytest.fixture
def other(configured_server: InprocServer, cleanup: ExitStack) -> Other:
    """Give another process's client."""
    made = Other(configured_server.address)
    cleanup.callback(made.client.close)
    return made
