"""How many bytes of requests and replies the server keeps: the interceptor that lets calls in.

gRPC by itself reads every request at once, however many there are and however large, and keeps
each reply until it is read. Here a call waits, unread, until there is room for the largest message
in its lane; then its size is known and only that is counted, until the call has ended. What finds
no room soon is refused with RESOURCE_EXHAUSTED before it is read. Meanwhile HTTP/2's flow control
holds the sender back. Renewals have a lane of their own, and so have settlements and waits. What
may be answered at length waits likewise for room for its reply.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import grpc

from distlock_server.limits import (
    MAX_MESSAGE_BYTES,
    MAX_RENEWAL_BYTES,
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    MAX_SETTLEMENT_BYTES,
    MAX_UNREAD_BYTES,
    MAX_WAIT_BYTES,
)
from distlock_server.status import refuse
from distlock_server.wire import MessageType, parse_or_abort

LANE_WAIT_S: Final = 1.0
"""How long a call waits for room before it is refused."""

MAX_OUTSIDE: Final = 4_000
"""Calls of one lane that wait for room at once; gRPC may hold 64 KiB of each."""

PROMPT_S: Final = 0.25
"""A request that takes longer to arrive is slow: at most half of a lane is for such."""

ARRIVAL_S: Final = 30.0
"""A request that takes longer to arrive is refused."""

SMALL_REPLY_BYTES: Final = 4_096
"""Replies up to here are not counted: a client must learn that its lease was renewed."""

REPLY_ROOM_BYTES: Final = MAX_REPLY_BYTES + (1 << 20)
"""Room for one reply that may be long, before its length is known."""

_TABLE: Final = "/distlock.v1.LockTable/"
_LONG_REPLIES: Final = frozenset(
    {f"{_TABLE}List", f"{_TABLE}DownloadResult", "/distlock.LockManagerService/ListLocks"}
)
_FULL: Final = grpc.StatusCode.RESOURCE_EXHAUSTED
_UNREAD: Final = "too many replies wait to be read; try again in a second"
_MALFORMED: Final = grpc.StatusCode.INVALID_ARGUMENT
_UNKNOWN: Final = grpc.StatusCode.UNIMPLEMENTED


class Lane:
    """Room for the requests of some methods, or for replies.

    Attributes:
        n_bytes: What is taken: of messages that are here their length, of others the most.
    """

    def __init__(
        self, max_bytes: int, unit_bytes: int = MAX_MESSAGE_BYTES, *, max_outside: int = MAX_OUTSIDE
    ) -> None:
        """Make room.

        Args:
            max_bytes: For so many bytes.
            unit_bytes: The most that one message takes.
            max_outside: So many calls may wait for it.
        """
        self.n_bytes = 0
        self._max_bytes = max_bytes
        self._unit_bytes = unit_bytes
        self._max_outside = max_outside
        self._max_slow = max(1, max_bytes // unit_bytes // 2)
        self._n_slow = 0
        self._outside: deque[asyncio.Future[bool]] = deque()

    async def enter(self) -> bool:
        """Wait for room for the largest message; tell whether there is."""
        if not self._outside and self.take(self._unit_bytes):
            return True
        if len(self._outside) >= self._max_outside:
            return False
        loop = asyncio.get_running_loop()
        place: asyncio.Future[bool] = loop.create_future()
        self._outside.append(place)
        timer = loop.call_later(LANE_WAIT_S, _close, place)
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.result():
                self.leave(self._unit_bytes)
            raise
        finally:
            timer.cancel()
            if place in self._outside:
                self._outside.remove(place)

    def take(self, n_bytes: int) -> bool:
        """Take room at once; tell whether there is."""
        if self.n_bytes + n_bytes > self._max_bytes:
            return False
        self.n_bytes += n_bytes
        return True

    def leave(self, n_bytes: int) -> None:
        """Give room back, and let in who waits."""
        self.n_bytes -= n_bytes
        while self._outside and self.n_bytes + self._unit_bytes <= self._max_bytes:
            place = self._outside.popleft()
            if not place.done():
                self.n_bytes += self._unit_bytes
                place.set_result(True)

    def slow_down(self) -> bool:
        """Count a slow sender; tell whether there is room for one."""
        if self._n_slow >= self._max_slow:
            return False
        self._n_slow += 1
        return True

    def end_slow(self) -> None:
        """Count it out."""
        self._n_slow -= 1


class Arrival:
    """A request on its way in; ends it if it takes too long."""

    def __init__(self, lane: Lane) -> None:
        """Start the clock of a request whose task is the running one."""
        self.is_late = False
        self._lane = lane
        self._is_slow = False
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(PROMPT_S, self._slow_down)

    def end(self) -> None:
        """Stop the clock."""
        self._timer.cancel()
        if self._is_slow:
            self._lane.end_slow()

    def _slow_down(self) -> None:
        self._is_slow = self._lane.slow_down()
        if self._is_slow:
            self._timer = self._loop.call_later(ARRIVAL_S - PROMPT_S, self._give_up)
        else:
            self._give_up()

    def _give_up(self) -> None:
        self.is_late = True
        if self._task is not None:
            self._task.cancel()


class Hold:
    """Room that the running call has until it is over, its reply taken or given up."""

    def __init__(self, lane: Lane, n_bytes: int) -> None:
        """Hold room that was taken."""
        self._lane = lane
        self._n_bytes = n_bytes
        task = asyncio.current_task()
        assert task is not None, "a call runs in a task"
        task.add_done_callback(lambda _task: self.become(0))

    def become(self, n_bytes: int) -> None:
        """Hold as much as the message turned out to need."""
        given_back, self._n_bytes = self._n_bytes - n_bytes, n_bytes
        self._lane.leave(given_back)


class Admission(grpc.aio.ServerInterceptor):
    """Lets calls in while there is room for what they bring and for what they are answered."""

    def __init__(self, types: Mapping[str, MessageType]) -> None:
        """Start with all of the room.

        Args:
            types: Full name of a method -> type of its request.
        """
        self._types = types
        renewals = Lane(MAX_RENEWAL_BYTES)
        self._lanes = {
            f"{_TABLE}Renew": renewals,
            "/grpc.health.v1.Health/Check": renewals,
            f"{_TABLE}Settle": Lane(MAX_SETTLEMENT_BYTES),
            f"{_TABLE}Wait": Lane(MAX_WAIT_BYTES),
        }
        self._others = Lane(MAX_REQUEST_BYTES)
        self._replies = Lane(MAX_UNREAD_BYTES, REPLY_ROOM_BYTES)
        self._handlers: dict[str, Any] = {}

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Give a handler that reads its request only when there is room."""
        method = handler_call_details.method
        made = self._handlers.get(method)
        if made is not None:
            return made
        handler = await continuation(handler_call_details)
        if handler is None or not handler.unary_unary or method not in self._types:
            return handler
        # As a stream of one request: that is read only when the method asks for it.
        made = grpc.stream_unary_rpc_method_handler(self._admitted(handler, method))
        self._handlers[method] = made
        return made

    def _admitted(self, handler: Any, method: str) -> Callable[[Any, Any], Awaitable[bytes]]:
        """Give a method that reads, parses and answers one request while there is room."""
        lane = self._lanes.get(method, self._others)
        kind = self._types[method]
        wants = _long_if(method, kind)

        async def answer(_requests: Any, context: Any) -> bytes:
            raw = await _receive(lane, context)
            request = await parse_or_abort(raw, context, kind)
            del raw
            hold = None
            if wants is None or any(getattr(request, name) for name in wants):
                if not await self._replies.enter():
                    await refuse(context, _FULL, _UNREAD)
                hold = Hold(self._replies, REPLY_ROOM_BYTES)
            try:
                reply = await handler.unary_unary(request, context)
            except NotImplementedError:  # one of gRPC's own that a newer release only declares
                await refuse(context, _UNKNOWN, "this server does not do that")
            content: bytes = handler.response_serializer(reply)
            if hold is not None:
                hold.become(len(content))
            elif len(content) > SMALL_REPLY_BYTES:
                if not self._replies.take(len(content)):
                    await refuse(context, _FULL, _UNREAD)
                Hold(self._replies, len(content))
            return content

        return answer


def _long_if(method: str, kind: MessageType) -> tuple[str, ...] | None:
    """Name the fields of a request that ask for a reply that may be long; None: it always may."""
    if method in _LONG_REPLIES:
        return None
    return tuple(
        name for name in ("want_results", "want_infos") if name in kind.DESCRIPTOR.fields_by_name
    )


async def _receive(lane: Lane, context: Any) -> bytes:
    """Read the request of a call; its room is given back when the call has ended."""
    if not await lane.enter():
        n_mb = lane.n_bytes >> 20
        await refuse(
            context,
            _FULL,
            f"the server is overloaded: {n_mb} MiB of requests are under way; try again soon",
        )
    hold = Hold(lane, MAX_MESSAGE_BYTES)
    arrival = Arrival(lane)
    try:
        raw = await context.read()
    except asyncio.CancelledError:
        if not arrival.is_late:
            raise
        await refuse(context, _FULL, "the request was too slow to arrive; try again")
    finally:
        arrival.end()
    if raw is grpc.aio.EOF:
        await refuse(context, _MALFORMED, "the call has no request")
    content = bytes(raw)
    hold.become(len(content))
    return content


def _close(place: asyncio.Future[bool]) -> None:
    if not place.done():
        place.set_result(False)
