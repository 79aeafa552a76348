"""Large values on their way in and out: who may send one, and what may be named as complete."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import TypeGuard, TypeVar

from distlock_proto import lock_table_pb2 as pb
from distlock_server import limits
from distlock_server.blobs import BlobDiskError, BlobMissingError, BlobStore
from distlock_server.calls import Calls
from distlock_server.limits import RequestError
from distlock_server.space import Space
from distlock_server.state import Complete, Done, Held, Record, Storage

T = TypeVar("T")


class NotHeldError(Exception):
    """The caller does not hold the key that it wants to store a value for."""


class NotUploadedError(Exception):
    """A completion names a value that was not sent before."""


class DamagedError(Exception):
    """A value cannot be read any more; the caller may invalidate the key."""


class Results:
    """The server's large values, as the services use them."""

    def __init__(
        self, blobs: BlobStore, calls: Calls, executor: Executor, space: Space | None = None
    ) -> None:
        """Serve values.

        Args:
            blobs: Where they are.
            calls: Asks the table who holds a key.
            executor: Runs what touches the disk, off the event loop.
            space: The free space for values. None: there is no limit.
        """
        self._blobs = blobs
        self._calls = calls
        self._executor = executor
        self._space = space or Space()

    async def require(self, key: bytes, command: Complete) -> None:
        """Check that the value that a completion names is on disk.

        A completion that will be refused anyway, since the key is not held with its token, passes.

        Raises:
            NotUploadedError: It is not.
        """
        result = command.result
        exists = partial(self._blobs.exists, key, command.token, result.size_bytes, result.sha256)
        if await self._off_loop(exists):
            return
        if _is_held(await self._record(key), command.claim_id, command.token):
            raise NotUploadedError(
                f"the value of key {key!r} with token {command.token} is not on the server: "
                "send it by UploadResult first"
            )

    async def upload(self, request: pb.UploadResultRequest) -> pb.UploadResultReply:
        """Take a chunk from the holder of a key."""
        holder = request.holder
        limits.check_key(holder.key, "holder.key")
        limits.check_claim_id(holder.claim_id, "holder.claim_id")
        limits.check_length(request.chunk, limits.MAX_CHUNK_BYTES, f"chunk of key {holder.key!r}")
        if request.size_bytes > limits.MAX_RESULT_BYTES:
            raise RequestError(
                f"size_bytes: the value of key {holder.key!r} has {request.size_bytes} bytes, "
                f"at most {limits.MAX_RESULT_BYTES} are allowed"
            )
        if len(request.sha256) != limits.SHA256_BYTES:
            raise RequestError(f"sha256: {len(request.sha256)} bytes, it must have 32")
        if not _is_held(await self._record(holder.key), holder.claim_id, holder.token):
            return await self._repeated(request)
        self._space.require(len(request.chunk))
        write = partial(
            self._blobs.write_chunk,
            holder.key,
            holder.token,
            request.offset_bytes,
            request.chunk,
            request.size_bytes,
            request.sha256,
        )
        return pb.UploadResultReply(received_bytes=await self._off_loop(write))

    async def _repeated(self, request: pb.UploadResultRequest) -> pb.UploadResultReply:
        """Answer a chunk that came late: well if the value is complete already."""
        key, token = request.holder.key, request.holder.token
        exists = partial(self._blobs.exists, key, token, request.size_bytes, request.sha256)
        if not await self._off_loop(exists):
            raise NotHeldError(f"key {key!r} is not held with token {token} (any more)")
        return pb.UploadResultReply(received_bytes=request.size_bytes)

    async def download(self, request: pb.DownloadResultRequest) -> pb.DownloadResultReply:
        """Give a chunk of a value, also of one in the record that a reply had no room for."""
        limits.check_key(request.key, "key")
        n_bytes = request.max_bytes or limits.MAX_CHUNK_BYTES
        if n_bytes > limits.MAX_CHUNK_BYTES:
            raise RequestError(
                f"max_bytes: {n_bytes} for key {request.key!r}, "
                f"at most {limits.MAX_CHUNK_BYTES} are allowed"
            )
        read = partial(self._blobs.read, request.key, request.token, request.offset_bytes, n_bytes)
        try:
            chunk, size_bytes = await self._off_loop(read)
        except BlobMissingError:
            record = await self._record(request.key)
            if not _holds_value(record, request.token):
                raise
            payload = record.result.payload
            chunk, size_bytes = payload[request.offset_bytes :][:n_bytes], len(payload)
        except BlobDiskError as error:
            raise DamagedError(str(error)) from error
        return pb.DownloadResultReply(chunk=chunk, size_bytes=size_bytes)

    async def _record(self, key: bytes) -> Record:
        return await self._calls.run([key], lambda txn: txn.get(key))

    async def _off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


def names_value(record: Record, token: int) -> bool:
    """Tell whether a record needs the value stored under a token: its holder may name it yet."""
    if isinstance(record, Held):
        return record.token == token
    return (
        isinstance(record, Done)
        and record.token == token
        and record.result.storage is Storage.SERVER
    )


def _holds_value(record: Record, token: int) -> TypeGuard[Done]:
    """Tell whether the value of a completion is in its record."""
    return (
        isinstance(record, Done)
        and record.token == token
        and record.result.storage is Storage.INLINE
    )


def _is_held(record: Record, claim_id: bytes, token: int) -> bool:
    return isinstance(record, Held) and record.claim_id == claim_id and record.token == token
