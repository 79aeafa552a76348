"""From the bytes of a request to its message: counted before they are parsed, refused if malformed.

Two bytes are enough for one item of a request, and its message takes hundreds: a request of the
largest size would take gigabytes. So the items of a long request are counted in its bytes, before
anything is made of them; other requests get their turns meanwhile. What is no message is the
caller's mistake, with a status of its own and no line in the log.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import grpc
from google.protobuf import message_factory
from google.protobuf.message import DecodeError, Message

from distlock_server.limits import MAX_PARTS_PER_REQUEST, RequestError
from distlock_server.status import refuse, status_of, telling
from distlock_server.turns import next_turn

_COUNTED_FROM_BYTES: Final = 262_144
"""Shorter requests cannot have so many items that it matters."""

_PARTS_PER_TURN: Final = 1_000
"""Parts counted before other requests get a turn."""

_VARINT, _FIXED64, _LENGTH, _START, _END, _FIXED32 = range(6)
_MAX_VARINT_BYTES: Final = 10

MessageType = type[Message]


class Streams(grpc.aio.ServerInterceptor):
    """Makes the requests of methods that stream; gRPC would log a traceback for a bad one.

    Those of the others are made where they are let in.
    """

    def __init__(self, types: dict[str, MessageType]) -> None:
        """Parse the requests of these methods.

        Args:
            types: Full name of a method -> type of its request.
        """
        self._types = types
        self._handlers: dict[str, Any] = {}

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Give the method's handler with the parser before it."""
        method = handler_call_details.method
        handler = self._handlers.get(method)
        if handler is None:
            handler = await continuation(handler_call_details)
            if handler is not None and not handler.unary_unary and method in self._types:
                handler = self._handlers[method] = _parsing(handler, self._types[method])
        return handler


def request_types(services: Sequence[Any]) -> dict[str, MessageType]:
    """Give the type of the request of each method of some services.

    Args:
        services: Their descriptors.
    """
    return {
        f"/{service.full_name}/{method.name}": message_factory.GetMessageClass(method.input_type)
        for service in services
        for method in service.methods
    }


async def parse_request(raw: bytes, kind: MessageType) -> Any:
    """Make a request's message.

    Raises:
        RequestError: It is malformed, or has too many parts.
    """
    if len(raw) < _COUNTED_FROM_BYTES:
        return _parse(raw, kind)
    for n_parts, _ in enumerate(parts(raw, kind.DESCRIPTOR), start=1):
        if n_parts > MAX_PARTS_PER_REQUEST:
            raise RequestError(
                f"the request has more than {MAX_PARTS_PER_REQUEST} parts: send fewer items"
            )
        if n_parts % _PARTS_PER_TURN == 0:
            await next_turn()
    request = _parse(raw, kind)
    await next_turn()
    return request


def _parse(raw: bytes, kind: MessageType) -> Any:
    try:
        return kind.FromString(raw)
    except DecodeError:
        raise RequestError(f"the request is no {kind.DESCRIPTOR.full_name}") from None


def parts(raw: bytes, message: Any) -> Iterator[None]:
    """Give something for each field in a message's bytes, and in messages inside that repeat any.

    Raises:
        RequestError: The bytes are no message.
    """
    levels = [(0, len(raw), message)]
    while levels:
        at, end, message = levels.pop()
        inside = _repeating(message)
        while at < end:
            yield
            tag, at = _varint(raw, at, end)
            wire_type = tag & 7
            if wire_type == _LENGTH:
                size, at = _varint(raw, at, end)
                child = inside.get(tag >> 3)
                if child is not None:
                    levels.append((at, min(at + size, end), child))
                at += size
            elif wire_type == _VARINT:
                _, at = _varint(raw, at, end)
            elif wire_type in {_FIXED64, _FIXED32}:
                at += 8 if wire_type == _FIXED64 else 4
            elif wire_type not in {_START, _END}:  # what is in a group counts as well
                raise RequestError(f"the request is no {message.full_name}")


def _varint(raw: bytes, at: int, end: int) -> tuple[int, int]:
    if at < end and raw[at] < 0x80:  # noqa: PLR2004 - most have one byte
        return raw[at], at + 1
    value = shift = 0
    for place in range(at, min(at + _MAX_VARINT_BYTES, end)):
        byte = raw[place]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004 - the last of a number
            return value, place + 1
        shift += 7
    raise RequestError("the request is malformed: a number in it does not end")


_repeating_of: Final[dict[str, dict[int, Any]]] = {}


def _repeating(message: Any) -> dict[int, Any]:
    """Give the message fields of a message, by number, in which something may repeat."""
    found = _repeating_of.get(message.full_name)
    if found is None:
        found = _repeating_of[message.full_name] = {
            field.number: field.message_type
            for field in message.fields
            if field.message_type is not None and _may_repeat(field.message_type, set())
        }
    return found


def _may_repeat(message: Any, seen: set[str]) -> bool:
    if message.full_name in seen:
        return False
    seen.add(message.full_name)
    return any(
        isinstance(field.default_value, list)  # that of a repeated field
        or (field.message_type is not None and _may_repeat(field.message_type, seen))
        for field in message.fields
    )


async def parse_or_abort(raw: bytes, context: Any, kind: MessageType) -> Any:
    """Make a request's message, or end the call."""
    try:
        return await parse_request(raw, kind)
    except RequestError as error:
        refusal = status_of(error)
    return await refuse(context, *refusal)


def _parsing(handler: Any, kind: MessageType) -> Any:
    """Put the parser before a handler."""
    codec = {"response_serializer": handler.response_serializer}
    parse = partial(parse_or_abort, kind=kind)
    if handler.unary_stream:
        assert inspect.iscoroutinefunction(handler.unary_stream), "health writes its replies itself"

        async def watch(raw: bytes, context: Any) -> None:
            request = await parse(raw, context)
            with telling():
                await handler.unary_stream(request, context)

        return grpc.unary_stream_rpc_method_handler(watch, **codec)
    assert handler.stream_stream, "no method of ours only takes a stream"

    async def stream(raws: AsyncIterator[bytes], context: Any) -> None:
        async def requests() -> AsyncIterator[Any]:
            async for raw in raws:
                yield await parse(raw, context)

        async for reply in handler.stream_stream(requests(), context):
            with telling():
                await context.write(reply)

    return grpc.stream_stream_rpc_method_handler(stream, **codec)
