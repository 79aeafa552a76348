"""Ctrl-C in gRPC's making of a call left a connection that nobody could close: the exit hung."""

from __future__ import annotations

import importlib
import signal
import threading
import time
from typing import Any

import pytest

from run_once.channel import GrpcTransport, _LongCall
from run_once.client import LockClient
from tests.other_client import until
from tests.servers import ServerProcess


class _SlowCall:
    """A call that is made slowly, as on a loaded machine, and that never ends by itself."""

    def __init__(self) -> None:
        self.makers: list[int] = []
        self.n_cancels = 0

    def start(self) -> Any:
        self.makers.append(threading.get_ident())
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.05)
        return self

    def add_done_callback(self, _tell: object) -> None:
        """It is never done."""

    def cancel(self) -> None:
        self.n_cancels += 1


def test_an_interrupt_while_a_call_is_made() -> None:
    """The caller's thread makes no call of gRPC's, and what was made meanwhile is cancelled."""
    call = _SlowCall()
    with pytest.raises(KeyboardInterrupt):
        _LongCall(call.start).result()
    until(lambda: call.n_cancels == 1)
    assert call.makers
    assert threading.get_ident() not in call.makers


def test_an_interrupted_wait_leaves_a_channel_that_closes(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt comes when gRPC has made the call, and before a thread looks after it."""
    channels = importlib.import_module("grpc._channel")
    look_after = channels._run_channel_spin_thread

    def interrupted(state: Any) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.05)
        look_after(state)

    client = LockClient(GrpcTransport(server.address))
    client.claim([b"a"], ttl_s=600)
    monkeypatch.setattr(channels, "_run_channel_spin_thread", interrupted)
    with pytest.raises(KeyboardInterrupt):
        client.wait([b"a"], 60)
    closer = threading.Thread(target=client.close, daemon=True)
    closer.start()
    closer.join(10)
    assert not closer.is_alive()
