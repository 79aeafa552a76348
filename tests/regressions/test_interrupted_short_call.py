"""Ctrl-C inside of gRPC left a lock of its channel locked: whoever called next hung for ever."""

from __future__ import annotations

import gc
import signal
import threading
import time
from functools import partial
from typing import Any

import pytest

from run_once import threads
from run_once.channel import GrpcTransport
from run_once.client import LockClient
from run_once.threads import Elsewhere
from tests.other_client import until
from tests.servers import ServerProcess


def interrupt() -> None:
    """Press Ctrl-C, and give it the time to arrive."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    time.sleep(0.05)


def condition_of(transport: GrpcTransport) -> threading.Condition:
    """Give the lock under which a channel of gRPC's makes and ends calls."""
    inner = transport._channel._channel  # type: ignore[union-attr]
    below = [part for state in gc.get_referents(inner) for part in gc.get_referents(state)]
    return next(part for part in below if isinstance(part, threading.Condition))


def test_an_interrupt_inside_of_grpc(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes where gRPC makes the call and holds its lock; the next call goes on all the same."""
    leave = threading.Condition.__exit__
    is_armed = threading.Event()
    transport = GrpcTransport(server.address)
    client = LockClient(transport)
    client.claim([b"a"], ttl_s=600)
    condition = condition_of(transport)

    def interrupted(self: threading.Condition, *error: Any) -> None:
        if is_armed.is_set() and self is condition:
            is_armed.clear()
            interrupt()
        leave(self, *error)

    monkeypatch.setattr(threading.Condition, "__exit__", interrupted)
    is_armed.set()
    with pytest.raises(KeyboardInterrupt):
        client.claim([b"b"], ttl_s=600)
    assert not is_armed.is_set()
    found: list[Any] = []
    caller = threading.Thread(target=lambda: found.append(client.lookup([b"a"])), daemon=True)
    caller.start()
    caller.join(10)
    assert found
    client.close()


def test_what_an_interrupted_call_still_does_harms_no_later_one() -> None:
    """Its thread is busy: the next call is made by another, and gets its own outcome."""
    elsewhere, may_end = Elsewhere(), threading.Event()

    def slow() -> str:
        interrupt()
        assert may_end.wait(10)
        return "slow"

    with pytest.raises(KeyboardInterrupt):
        elsewhere.run(slow)
    assert elsewhere.run(lambda: "next") == "next"
    may_end.set()
    until(lambda: len(elsewhere._idle) == 2)
    assert [elsewhere.run(partial(int, number)) for number in range(3)] == [0, 1, 2]


def test_without_another_thread_calls_are_made_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the interpreter ends, newer releases of Python start none."""

    def refuse(*_: object) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threads, "start_new_thread", refuse)
    assert Elsewhere().run(threading.get_ident) == threading.get_ident()


def test_an_error_of_a_call_is_the_callers() -> None:
    """It is raised where the call was asked for, and the thread goes on."""
    elsewhere = Elsewhere()
    with pytest.raises(ZeroDivisionError):
        elsewhere.run(lambda: 1 // 0)
    assert elsewhere.run(threading.get_ident) != threading.get_ident()
    assert len(elsewhere._idle) == 1
