"""The one table from our errors to gRPC status, and the wrapper that applies it to each method."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, NoReturn, Protocol, TypeVar

import grpc

from distlock_server.blobs import (
    BlobChecksumError,
    BlobDiskError,
    BlobLimitError,
    BlobMissingError,
    BlobSizeError,
)
from distlock_server.codec import CodecError
from distlock_server.engines.base import EngineError
from distlock_server.limits import OverloadError, RequestError
from distlock_server.pending import ContendedError, StorageError, TableClosedError
from distlock_server.results import DamagedError, NotHeldError, NotUploadedError

logger = logging.getLogger(__name__)

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")
ServiceT = TypeVar("ServiceT", bound="Busy")


STATUS: Final[tuple[tuple[type[Exception], grpc.StatusCode], ...]] = (
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (OverloadError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (NotHeldError, grpc.StatusCode.FAILED_PRECONDITION),
    (NotUploadedError, grpc.StatusCode.FAILED_PRECONDITION),
    (BlobMissingError, grpc.StatusCode.NOT_FOUND),
    (BlobSizeError, grpc.StatusCode.INVALID_ARGUMENT),
    # Damaged on the way: to be sent again from the start.
    (BlobChecksumError, grpc.StatusCode.ABORTED),
    (BlobLimitError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (BlobDiskError, grpc.StatusCode.UNAVAILABLE),
    (DamagedError, grpc.StatusCode.DATA_LOSS),
    (CodecError, grpc.StatusCode.DATA_LOSS),
    (ContendedError, grpc.StatusCode.ABORTED),
    (TableClosedError, grpc.StatusCode.UNAVAILABLE),
    # The outcome is unknown and the process is ending: the retry, with the same ids, finds out.
    (StorageError, grpc.StatusCode.UNAVAILABLE),
    (EngineError, grpc.StatusCode.UNAVAILABLE),
)
"""First match wins; what is not here is INTERNAL, and a bug of ours."""


class Busy(Protocol):
    """What `guarded` needs of a service: to say that a request is being worked on."""

    @property
    def activity(self) -> Activity:
        """The server's count of requests."""
        ...


class Activity:
    """Counts requests, for the idle exit.

    Attributes:
        in_flight: Requests being worked on.
        started: Requests since the server started.
    """

    def __init__(self) -> None:
        """Start at zero."""
        self.in_flight = 0
        self.started = 0

    def __enter__(self) -> None:
        """Count a request in."""
        self.in_flight += 1
        self.started += 1

    def __exit__(self, *exc: object) -> None:
        """Count it out."""
        self.in_flight -= 1


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """Give the gRPC status and sentence for an error."""
    for kind, code in STATUS:
        if isinstance(error, kind):
            return code, str(error)
    return grpc.StatusCode.INTERNAL, f"the server failed on this request: {error!r}"


class GoneCallers(logging.Filter):
    """Leaves out what gRPC logs, with a traceback, when it cannot tell a caller that has gone.

    It happens in gRPC's own code, behind the methods: there is nobody to tell, and nothing wrong.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is about anything else."""
        error = record.exc_info[1] if record.exc_info else None
        return type(error).__name__ != "ExecuteBatchError"


_GRPC_LOGGER: Final = "grpc._cython.cygrpc"


def leave_out_gone_callers() -> None:
    """Put the filter in, once."""
    grpc_logger = logging.getLogger(_GRPC_LOGGER)
    if not any(isinstance(one, GoneCallers) for one in grpc_logger.filters):
        grpc_logger.addFilter(GoneCallers())


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Tell a caller something within this context.

    Raises:
        asyncio.CancelledError: It has gone; gRPC would log a traceback for its failure to tell it.
    """
    try:
        yield
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None


async def refuse(context: Any, code: grpc.StatusCode, text: str) -> NoReturn:
    """End a call with a status. Every refusal goes through here.

    Raises:
        Exception: What gRPC ends a method with.
        asyncio.CancelledError: The caller has gone.
    """
    with telling():
        await context.abort(code, text)
    raise AssertionError("abort returned")


def guarded(
    handler: Callable[[ServiceT, RequestT], Awaitable[ReplyT]],
) -> Callable[[ServiceT, RequestT, Any], Awaitable[ReplyT]]:
    """Make a gRPC method of a handler: errors become status, and the request is counted."""

    @functools.wraps(handler)
    async def answer(self: ServiceT, request: RequestT, context: Any) -> ReplyT:
        with self.activity:
            try:
                return await handler(self, request)
            except Exception as error:
                code, text = status_of(error)
                if code is grpc.StatusCode.INTERNAL:
                    logger.exception("%s failed", handler.__name__)
            return await refuse(context, code, text)

    return answer
