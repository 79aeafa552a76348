"""The way to a lock server: one unary call at a time over gRPC, safe across fork().

gRPC does not survive a fork() while one of its calls runs: the child hangs. So a fork waits at
a gate until the calls of this process are over, calls that would take long are cancelled (every
call may be repeated), and the child starts with a new channel. The parent's channel is neither
used nor closed there, since the connection still belongs to the parent.

gRPC is imported by the first call, since that takes a tenth of a second.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, cast

from google.protobuf.message import Message

from run_once.access import OPEN, Access, credentials, is_unix, why_no_tls
from run_once.threads import Elsewhere, Outcome, await_outcome, may_be_interrupted

if TYPE_CHECKING:
    import grpc

ReplyT = TypeVar("ReplyT", bound=Message)

SERVICE: Final = "distlock.v1.LockTable"
MAX_RECEIVE_BYTES: Final = 64 * 1024 * 1024
FORKED: Final = "FORKED"
"""Code of a call that was cancelled to let a fork pass; gRPC has none of this name."""
NO_TLS: Final = "NO_TLS"
"""Code of a call that failed since server and client cannot agree on TLS; none of gRPC's."""
SHORT_CALL_S: Final = 10.0
"""Calls with a longer deadline can be cancelled, so that a fork need not wait for them."""

_BEGIN_S: Final = 2.0
_FORK_WAIT_S: Final = 12.0
_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Also the time that one attempt to connect may take, hence not less.
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
    ("grpc.max_send_message_length", -1),
    # A channel after a fork must not share the connection of one before it.
    ("grpc.use_local_subchannel_pool", 1),
    # Lock servers are inside a network; a proxy meant for the web does not reach them.
    ("grpc.enable_http_proxy", 0),
)


class TransportError(Exception):
    """A call failed; only `run_once.client` sees this.

    Attributes:
        code: Name of the gRPC status, such as UNAVAILABLE, or `FORKED`, or `NO_TLS`.
        detail: What gRPC or the server says about it.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class Transport(Protocol):
    """The seam between the client and the network."""

    address: str
    """Where the server is, for messages."""

    def call(
        self, method: str, request: Message, reply_type: type[ReplyT], timeout_s: float
    ) -> ReplyT:
        """Send one request to the lock table and wait for the reply.

        Args:
            method: Name of the method, such as "Claim".
            request: Its request.
            reply_type: Class of its reply.
            timeout_s: Deadline of this attempt, in seconds.

        Returns:
            The reply.

        Raises:
            TransportError: There is none.
        """
        ...

    def close(self) -> None:
        """Close the connection; closing twice is no error."""
        ...


class GrpcTransport:
    """One channel to one server; any number of threads may call at once.

    Attributes:
        address: `host:port`, `[ipv6]:port` or `unix:/path`.
    """

    def __init__(self, address: str, *, service: str = SERVICE, access: Access = OPEN) -> None:
        self.address = address
        self._access = access
        token = access.token
        self._metadata = (("authorization", f"Bearer {token}"),) if token else None
        self._service = service
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._methods: dict[str, Callable[..., Any]] = {}
        self._is_closed = False
        self._is_known = False
        """The server has answered: what fails from then on is no question of TLS."""
        _GATE.watch(self)

    def call(
        self, method: str, request: Message, reply_type: type[ReplyT], timeout_s: float
    ) -> ReplyT:
        """Send one request; see `Transport.call`. Signals interrupt the wait."""
        send = partial(self._call_in_gate, method, request, reply_type, timeout_s)
        if timeout_s <= SHORT_CALL_S and may_be_interrupted():
            # In a call of its own, an interrupt leaves a lock of gRPC's locked for ever.
            return _ELSEWHERE.run(send)
        return send()

    def _call_in_gate(
        self, method: str, request: Message, reply_type: type[ReplyT], timeout_s: float
    ) -> ReplyT:
        """Send one request when no fork goes on."""
        try:  # an interrupt right behind enter() must not leave the call counted
            _GATE.enter()
            return self._call(method, request, reply_type, timeout_s)
        finally:
            _GATE.leave()

    def _call(
        self, method: str, request: Message, reply_type: type[ReplyT], timeout_s: float
    ) -> ReplyT:
        """Send one request from inside of the gate."""
        import grpc  # noqa: PLC0415 (the first call imports it, where no fork can cut it short)

        try:
            multicallable = self._method(method, request, reply_type)
            if timeout_s > SHORT_CALL_S:
                reply = _call_cancellable(multicallable, request, timeout_s, self._metadata)
            else:
                reply = multicallable(request, timeout=timeout_s, metadata=self._metadata)
            self._is_known = True
            return cast("ReplyT", reply)
        except grpc.FutureCancelledError:
            raise TransportError("CANCELLED", "the call was cancelled") from None
        except grpc.RpcError as error:
            raise self._describe(error) from None
        except ValueError as error:  # what gRPC raises if another thread closed the channel
            raise TransportError("CANCELLED", str(error)) from None

    def close(self) -> None:
        """Close the channel; calls under way end with CANCELLED."""
        with self._lock:
            self._is_closed = True
            channel, self._channel = self._channel, None
            self._methods = {}
        if channel is not None:
            channel.close()

    def forget_channel(self) -> None:
        """Start anew in a forked child, without a word to the parent's server."""
        self._lock = threading.Lock()
        if self._channel is not None:
            _PARENTS_CHANNELS.append((self._channel, self._methods))
        self._channel = None
        self._methods = {}

    def _connect(self) -> grpc.Channel:
        """Make a channel."""
        import grpc  # noqa: PLC0415 (by now it is imported)

        options: list[tuple[str, Any]] = list(_OPTIONS)
        if not self._access.tls or is_unix(self.address):
            return grpc.insecure_channel(self.address, options=options)
        if self._access.name:
            options.append(("grpc.ssl_target_name_override", self._access.name))
        return grpc.secure_channel(self.address, credentials(self._access), options=options)

    def _describe(self, error: grpc.RpcError) -> TransportError:
        """Take the status out of gRPC's error; find out what gRPC does not say of TLS."""
        described = _describe(error)
        if described.code == "UNAVAILABLE" and not (self._is_known or is_unix(self.address)):
            problem = why_no_tls(self.address, self._access)
            if problem:
                return TransportError(NO_TLS, problem)
        return described

    def _method(
        self, method: str, request: Message, reply_type: type[Message]
    ) -> Callable[..., Any]:
        """Find the callable of a method, and make the channel if there is none."""
        found = self._methods.get(method)
        if found is not None:
            return found
        with self._lock:
            if self._is_closed:
                raise TransportError("CANCELLED", "the connection was closed")
            if self._channel is None:
                self._channel = self._connect()
            made: Callable[..., Any] = self._channel.unary_unary(
                f"/{self._service}/{method}",
                request_serializer=type(request).SerializeToString,
                response_deserializer=reply_type.FromString,
            )
            self._methods[method] = made
            return made


def _call_cancellable(multicallable: Any, request: Message, timeout_s: float, metadata: Any) -> Any:
    """Make a call that a fork may cancel; it costs threads, so only long ones are made so."""
    start = partial(multicallable.future, request, timeout=timeout_s, metadata=metadata)
    try:
        return _LongCall(start).result()
    except _CutError:
        raise TransportError(FORKED, "the call was cancelled for a fork") from None


class _LongCall:
    """A call whose caller touches nothing of gRPC's, since it may be interrupted.

    Between making a call and noting it, or inside of a condition, an interrupt would leave a
    channel that can never be closed.
    """

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start = start
        self._future: Any = None
        self._began = allocate_lock()
        self._ended: SimpleQueue[Outcome[Any]] = SimpleQueue()

    def result(self) -> Any:
        """Make the call; return its reply, or raise what gRPC raised."""
        is_over = False
        self._began.acquire()
        start_new_thread(self._begin, ())
        try:
            ended = await_outcome(self._ended)
            is_over = True
        finally:
            if not is_over:  # an interrupt
                self._began.acquire(timeout=_BEGIN_S)
                start_new_thread(self._cancel, ())
        return ended.value()

    def _begin(self) -> None:
        """Start the call; a thread of gRPC's tells its end."""
        try:
            self._future = self._start()
            _GATE.add_long(self._future)
            self._future.add_done_callback(self._tell)
        except BaseException as error:  # noqa: BLE001 (told to the thread that asked)
            self._ended.put(Outcome(error=error))
        finally:
            self._began.release()

    def _tell(self, future: Any) -> None:
        """Pass on what came."""
        import grpc  # noqa: PLC0415 (by now it is imported)

        is_cut = _GATE.drop_long(future)
        try:
            self._ended.put(Outcome(future.result()))
        except grpc.FutureCancelledError as error:
            self._ended.put(Outcome(error=_CutError() if is_cut else error))
        except BaseException as error:  # noqa: BLE001 (told to the thread that asked)
            self._ended.put(Outcome(error=error))

    def _cancel(self) -> None:
        """Let the server know that nobody waits."""
        if self._future is not None:
            self._future.cancel()


class _CutError(Exception):
    """The call was cancelled for a fork."""


def _describe(error: grpc.RpcError) -> TransportError:
    """Take the status out of gRPC's error."""
    code = getattr(error, "code", lambda: None)()
    detail = getattr(error, "details", lambda: None)()
    return TransportError(getattr(code, "name", "UNKNOWN"), str(detail or error))


class _ForkGate:
    """Lets calls pass, and holds them back while a fork goes on.

    The lock is re-entrant, since a signal handler of the main thread may fork or call inside of
    a call; such a call of the forking thread itself is not waited for.
    """

    def __init__(self) -> None:
        self._is_registered = False
        self._transports: weakref.WeakSet[GrpcTransport] = weakref.WeakSet()
        self._reset()

    def _reset(self) -> None:
        """Forget the calls: there are none, or they are those of the parent."""
        # Not `with` of the condition itself: an interrupt in that can leave it locked.
        self._mutex = threading.RLock()
        self._changed = threading.Condition(self._mutex)
        self._is_forking = False
        self._calls_by_thread: dict[int, int] = {}
        self._long: list[Any] = []
        self._cut: list[Any] = []

    def watch(self, transport: GrpcTransport) -> None:
        """Register a transport, and with the first one the handlers."""
        with self._mutex:
            self._transports.add(transport)
            if not self._is_registered and hasattr(os, "register_at_fork"):
                self._is_registered = True
                os.register_at_fork(
                    before=self._before_fork,
                    after_in_parent=self._after_in_parent,
                    after_in_child=self._after_in_child,
                )

    def enter(self) -> None:
        """Begin a call, after a fork that goes on."""
        me = threading.get_ident()
        with self._mutex:
            while self._is_forking and me not in self._calls_by_thread:
                self._changed.wait()
            self._calls_by_thread[me] = self._calls_by_thread.get(me, 0) + 1

    def leave(self) -> None:
        """End a call."""
        me = threading.get_ident()
        with self._mutex:
            count = self._calls_by_thread.pop(me, 0)
            if count > 1:
                self._calls_by_thread[me] = count - 1
            self._changed.notify_all()

    def add_long(self, future: Any) -> None:
        """Name a call that a fork may cancel."""
        with self._mutex:
            self._long.append(future)
            if self._is_forking:
                self._cut_calls()

    def drop_long(self, future: Any) -> bool:
        """Take back what `add_long` named; tell whether it was cancelled for a fork."""
        with self._mutex:
            if future in self._long:
                self._long.remove(future)
            is_cut = future in self._cut
            if is_cut:
                self._cut.remove(future)
            return is_cut

    def _cut_calls(self) -> None:
        """Cancel the long calls."""
        for future in tuple(self._long):
            self._cut.append(future)
            future.cancel()

    def _before_fork(self) -> None:
        """Wait until no other thread is inside of a call, and let none begin."""
        self._changed.acquire()
        self._is_forking = True
        self._cut_calls()
        me = threading.get_ident()
        self._changed.wait_for(lambda: not (self._calls_by_thread.keys() - {me}), _FORK_WAIT_S)

    def _after_in_parent(self) -> None:
        """Let calls pass again."""
        self._is_forking = False
        self._changed.notify_all()
        self._changed.release()

    def close_all(self) -> None:
        """Close what was left open."""
        for transport in tuple(self._transports):
            transport.close()

    def _after_in_child(self) -> None:
        """Begin anew: the threads of the parent's calls do not exist here."""
        self._reset()
        _ELSEWHERE.forget_threads()
        for transport in tuple(self._transports):
            transport.forget_channel()


_PARENTS_CHANNELS: Final[list[object]] = []
"""Kept for ever: freeing one in a forked child would wait for threads that are not there."""
_GATE: Final = _ForkGate()
_ELSEWHERE: Final = Elsewhere()
atexit.register(_GATE.close_all)
"""Behind all that was registered later and still needs a connection. Left to the interpreter, a
connection would wait for a call that was interrupted, and whose thread is no more."""
