"""Large values to and from the lock server, in chunks.

A chunk names where it starts, so that its repetition is harmless. A server that lost the
beginning (restarted, or the bytes were damaged on the way) is sent the value anew.
"""

from __future__ import annotations

from typing import Final

from distlock_proto import lock_table_pb2 as pb
from run_once.answers import Grant, check, name_holder
from run_once.buffers import Parts, aligned_buffer
from run_once.buffers import sha256 as sha256_of
from run_once.errors import (
    LeaseLostError,
    ResultDamagedError,
    ResultMissingError,
    ResultTooLargeError,
    ServerError,
)
from run_once.retrying import Caller

_MAX_STARTS: Final = 5
_SEND_ANEW: Final = frozenset({"ABORTED", "NOT_FOUND"})


def upload_result(
    caller: Caller,
    grant: Grant,
    data: bytes | Parts,
    limits: pb.GetServerInfoReply,
    sha256: bytes | None = None,
) -> pb.Result:
    """Send a large value to the server, before the settlement that names it.

    Args:
        caller: Makes the calls.
        grant: The lease under which the value was computed.
        data: The value.
        limits: The server's limits.
        sha256: The value's SHA-256, 32 bytes; None: computed here.

    Returns:
        The result to complete the key with.

    Raises:
        ResultTooLargeError: The server does not take so much.
        LeaseLostError: The lease was lost meanwhile.
    """
    if len(data) > limits.max_result_bytes:
        raise ResultTooLargeError(
            f"the value of key {grant.key!r} has {len(data)} bytes; the server takes "
            f"{limits.max_result_bytes} at most: write it to a file of its own and return its name"
        )
    sha256 = sha256 or sha256_of(data)
    for start in range(_MAX_STARTS):
        try:
            _send_chunks(caller, grant, data, sha256, limits.max_chunk_bytes)
            break
        except ServerError as error:
            if error.code == "FAILED_PRECONDITION":
                raise LeaseLostError(
                    f"the lease on key {grant.key!r} was lost while its value was sent"
                ) from None
            if error.code not in _SEND_ANEW or start + 1 == _MAX_STARTS:
                raise
    return pb.Result(storage=pb.Result.STORAGE_SERVER, size_bytes=len(data), sha256=sha256)


def _send_chunks(
    caller: Caller, grant: Grant, data: bytes | Parts, sha256: bytes, chunk_bytes: int
) -> None:
    """Send a value from its start to its end."""
    start = 0
    while True:
        request = pb.UploadResultRequest(
            holder=name_holder(grant),
            offset_bytes=start,
            chunk=data[start : start + chunk_bytes],
            size_bytes=len(data),
            sha256=sha256,
        )
        reply, _ = caller.call("UploadResult", request, pb.UploadResultReply, not_again=_SEND_ANEW)
        if reply.received_bytes >= len(data):
            return
        check(reply.received_bytes > start, "UploadResult")
        start = reply.received_bytes


def download_result(caller: Caller, key: bytes, token: int, size_bytes: int) -> memoryview:
    """Fetch a large value from the server.

    Args:
        caller: Makes the calls.
        key: The done key.
        token: The token of its completion.
        size_bytes: Length of the value.

    Returns:
        The value, in memory of its own that may be written to.

    Raises:
        ResultMissingError: The server does not have it, or not whole.
    """
    data = memoryview(b"")
    start = 0
    while start < size_bytes:
        request = pb.DownloadResultRequest(key=key, token=token, offset_bytes=start)
        try:
            reply, _ = caller.call("DownloadResult", request, pb.DownloadResultReply)
        except ServerError as error:
            shown = f"the value of key {key!r} (token {token})"
            if error.code == "NOT_FOUND":
                raise ResultMissingError(f"{shown} is not on the server: {error}") from None
            if error.code == "DATA_LOSS":
                raise ResultDamagedError(f"{shown} is damaged on the server: {error}") from None
            raise
        end = start + len(reply.chunk)
        if not reply.chunk or reply.size_bytes != size_bytes or end > size_bytes:
            raise ResultDamagedError(
                f"the value of key {key!r} (token {token}) has {reply.size_bytes} bytes on "
                f"the server, not {size_bytes}"
            )
        if not data:
            data = aligned_buffer(size_bytes)
        data[start:end] = reply.chunk
        start = end
    return data
