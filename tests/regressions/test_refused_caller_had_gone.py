"""A caller that went while it was refused left a traceback of gRPC's in the server's log."""

from __future__ import annotations

import asyncio
import importlib
from typing import Any

import grpc
import pytest

from distlock_server.status import refuse
from tests.servers import InprocServer


class _Context:
    def __init__(self, error: Exception) -> None:
        self.error = error

    async def abort(self, *_: Any) -> None:
        raise self.error


def test_a_refusal_of_nobody_is_a_cancelled_call() -> None:
    """What gRPC cannot tell a caller that has gone ends the method as if it were cancelled."""
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(refuse(_Context(grpc.aio.InternalError("gone")), grpc.StatusCode.NOT_FOUND, ""))
    with pytest.raises(grpc.aio.AbortError):
        asyncio.run(refuse(_Context(grpc.aio.AbortError("so")), grpc.StatusCode.NOT_FOUND, ""))


def test_what_grpc_cannot_tell_is_not_logged(
    inproc_server: InprocServer, caplog: pytest.LogCaptureFixture
) -> None:
    """What gRPC itself cannot tell a caller that has gone is left out of the log, and no more."""
    cygrpc: Any = importlib.import_module("grpc._cython.cygrpc")
    for error in (cygrpc.ExecuteBatchError("gone"), ValueError("another")):
        cygrpc._LOGGER.error("%s raised in core", type(error).__name__, exc_info=error)
    assert [record.getMessage() for record in caplog.records] == ["ValueError raised in core"]
