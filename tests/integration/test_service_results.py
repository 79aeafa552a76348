"""Large values: sent in chunks, named by a completion, fetched in chunks."""

from __future__ import annotations

import os
from typing import Any

import grpc

from distlock_proto import lock_table_pb2 as pb
from distlock_server import limits
from tests.servers import InprocServer
from tests.service_calls import (
    hold,
    lookup,
    refused,
    settle,
    states_of,
    stored,
    upload_request,
)


def test_large_value_goes_in_and_out(inproc_server: InprocServer) -> None:
    """A value sent in chunks, then completed, comes back in chunks as it was."""
    value = os.urandom(2_500_000)
    holder = hold(inproc_server, b"a")
    step = limits.MAX_CHUNK_BYTES
    for offset in range(0, len(value), step):
        request = upload_request(holder, value, offset, offset + step)
        received = inproc_server.table.UploadResult(request).received_bytes
        assert received == min(offset + step, len(value))
    assert states_of(settle(inproc_server, holder, complete=stored(value))) == ["COMPLETED"]
    got = b""
    while len(got) < len(value):
        reply = inproc_server.table.DownloadResult(
            pb.DownloadResultRequest(key=b"a", token=holder.token, offset_bytes=len(got))
        )
        assert reply.size_bytes == len(value)
        got += reply.chunk
    assert got == value


def test_value_must_be_there_before_it_is_named(inproc_server: InprocServer) -> None:
    """A completion naming a value that was not sent whole is refused, and the key stays held."""
    holder = hold(inproc_server, b"a")
    value = b"x" * 1000

    def complete() -> Any:
        return settle(inproc_server, holder, complete=stored(value))

    refused(complete, grpc.StatusCode.FAILED_PRECONDITION, "'a'", "UploadResult")
    inproc_server.table.UploadResult(upload_request(holder, value, 0, 500))
    refused(complete, grpc.StatusCode.FAILED_PRECONDITION, "'a'")
    assert states_of(lookup(inproc_server, b"a")) == ["BUSY"]
    inproc_server.table.UploadResult(upload_request(holder, value, 500))
    assert states_of(complete()) == ["COMPLETED"]


def test_only_the_holder_may_send_a_value(inproc_server: InprocServer) -> None:
    """A chunk from somebody who does not hold the key is refused."""
    stale = hold(inproc_server, b"a")
    inproc_server.advance(60)
    hold(inproc_server, b"a")
    refused(
        lambda: inproc_server.table.UploadResult(upload_request(stale, b"value")),
        grpc.StatusCode.FAILED_PRECONDITION,
        "'a'",
    )
    missing = pb.DownloadResultRequest(key=b"a", token=stale.token)
    refused(lambda: inproc_server.table.DownloadResult(missing), grpc.StatusCode.NOT_FOUND, "'a'")
