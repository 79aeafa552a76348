"""Wait: parked until keys settle, leases run out, time is up or the server ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import pytest

from distlock_proto import lock_table_pb2 as pb
from tests.servers import InprocServer
from tests.service_calls import (
    hold,
    refused,
    renew,
    settle,
    states_of,
)


class Waiting:
    """A Wait under way in a thread."""

    def __init__(self, server: InprocServer, keys: Sequence[bytes], **more: Any) -> None:
        request = pb.WaitRequest(keys=keys, timeout_ns=more.pop("timeout_ns", 60 * 10**9), **more)
        self.reply: Any = None
        self._thread = threading.Thread(target=self._wait, args=(server, request), daemon=True)
        self._thread.start()

    def _wait(self, server: InprocServer, request: pb.WaitRequest) -> None:
        self.reply = server.table.Wait(request)

    def states(self) -> list[str]:
        """Give the reply's states once it is there."""
        self._thread.join(20)
        assert self.reply is not None, "the wait was not answered"
        return states_of(self.reply)

    def is_parked(self, server: InprocServer) -> bool:
        """Tell, after giving it time to be answered wrongly, whether it still waits."""
        waits: Any = server.server._waits
        deadline_s = time.monotonic() + 10
        while not waits._parked and time.monotonic() < deadline_s:
            time.sleep(0.005)
        time.sleep(0.05)
        return self.reply is None


def test_wait_answers_at_once_when_settled(inproc_server: InprocServer) -> None:
    """A wait for a key that nobody holds is answered at once."""
    assert Waiting(inproc_server, [b"a"]).states() == ["ABSENT"]


@pytest.mark.parametrize(
    ("how", "state"),
    [
        ({"complete": pb.Complete()}, "DONE"),
        ({"fail": pb.Fail()}, "FAILED"),
        ({"release": pb.Release()}, "ABSENT"),
    ],
)
def test_wait_wakes_on_settle(inproc_server: InprocServer, how: dict[str, Any], state: str) -> None:
    """A parked wait is answered when a key is completed, failed or released."""
    holder = hold(inproc_server, b"a")
    hold(inproc_server, b"b")
    waiting = Waiting(inproc_server, [b"a", b"b"])
    assert waiting.is_parked(inproc_server)
    settle(inproc_server, holder, **how)
    assert waiting.states() == [state, "BUSY"]


def test_wait_wakes_on_expiry(inproc_server: InprocServer) -> None:
    """A parked wait is answered when a lease runs out, and a renewal puts that off."""
    holder = hold(inproc_server, b"a", ttl_ns=20 * 10**9)
    waiting = Waiting(inproc_server, [b"a"])
    assert waiting.is_parked(inproc_server)
    inproc_server.advance(10)
    renew(inproc_server, holder, ttl_ns=20 * 10**9)
    inproc_server.advance(19)
    assert waiting.is_parked(inproc_server)
    inproc_server.advance(1)
    assert waiting.states() == ["EXPIRED"]


def test_parked_wait_is_quiet(inproc_server: InprocServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parked wait asks the table nothing while its keys stay as they are."""
    hold(inproc_server, b"a", ttl_ns=3600 * 10**9)
    waiting = Waiting(inproc_server, [b"a"])
    assert waiting.is_parked(inproc_server)
    table: Any = inproc_server.server.table
    asked: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(table, "submit", lambda *arguments: asked.append(arguments))
        time.sleep(0.2)
    assert asked == []
    inproc_server.server.stop()
    assert waiting.states() == ["BUSY"]


def test_wait_min_settled(inproc_server: InprocServer) -> None:
    """A wait for several keys is answered once so many are settled."""
    holders = [hold(inproc_server, key) for key in (b"a", b"b", b"c")]
    waiting = Waiting(inproc_server, [b"a", b"b", b"c"], min_settled=2)
    settle(inproc_server, holders[0], complete=pb.Complete())
    assert waiting.is_parked(inproc_server)
    settle(inproc_server, holders[2], complete=pb.Complete())
    assert waiting.states() == ["DONE", "BUSY", "DONE"]


def test_wait_ends_at_its_timeout(inproc_server: InprocServer) -> None:
    """A wait whose keys stay busy is answered at its timeout with their states."""
    hold(inproc_server, b"a", ttl_ns=3600 * 10**9)
    waiting = Waiting(inproc_server, [b"a"], timeout_ns=10 * 10**9)
    assert waiting.is_parked(inproc_server)
    inproc_server.advance(10)
    assert waiting.states() == ["BUSY"]


def test_waits_are_bounded_and_given_back(inproc_server: InprocServer) -> None:
    """Too many waits are RESOURCE_EXHAUSTED; a cancelled one makes room again."""
    waits: Any = inproc_server.server._waits
    waits._max_waits = 1
    hold(inproc_server, b"a", ttl_ns=3600 * 10**9)
    request = pb.WaitRequest(keys=[b"a"], timeout_ns=60 * 10**9)
    first = inproc_server.table.Wait.future(request)
    _until(lambda: len(waits._parked) == 1)
    refused(lambda: inproc_server.table.Wait(request), grpc.StatusCode.RESOURCE_EXHAUSTED, "waits")
    first.cancel()
    _until(lambda: not waits._parked)
    assert waits._n_keys == 0
    table: Any = inproc_server.server.table
    assert table._watches == {}


def _until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline_s, "it did not come true"
        time.sleep(0.005)


def test_stop_answers_parked_waits(inproc_server: InprocServer) -> None:
    """A server that is stopped answers its parked waits at once with what it sees."""
    hold(inproc_server, b"a", ttl_ns=3600 * 10**9)
    waiting = Waiting(inproc_server, [b"a"])
    assert waiting.is_parked(inproc_server)
    inproc_server.server.stop()
    assert waiting.states() == ["BUSY"]
