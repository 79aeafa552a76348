"""The server: built from its parts, started, drained and stopped.

It runs its event loop in a thread of its own, so the command line and tests use the same object.
Why it should end, it says through `on_end`; ending the process is its owner's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from distlock_proto import legacy_pb2, lock_table_pb2
from distlock_proto.legacy_pb2_grpc import add_LockManagerServiceServicer_to_server
from distlock_proto.lock_table_pb2_grpc import add_LockTableServicer_to_server
from distlock_server.admission import Admission
from distlock_server.auth import Guard
from distlock_server.blobs import BlobStore
from distlock_server.calls import Calls, LoopNotify
from distlock_server.clock import Clock
from distlock_server.codec import CodecError
from distlock_server.engines.base import Engine
from distlock_server.failpoints import reach
from distlock_server.files import max_connections
from distlock_server.legacy_service import LegacyService
from distlock_server.limits import MAX_MESSAGE_BYTES, MAX_QUEUED_REQUESTS, MAX_WAITS
from distlock_server.results import Results, names_value
from distlock_server.service import LockTableService
from distlock_server.space import Space
from distlock_server.status import Activity, leave_out_gone_callers
from distlock_server.table import Table
from distlock_server.waits import Waits
from distlock_server.wire import Streams, request_types

logger = logging.getLogger(__name__)

DRAIN_S: Final = 2.0
"""How long requests under way may take to finish once the server is asked to stop."""

_FLUSH_S: Final = 0.1
"""How long the last answers may take to reach their readers."""

SWEEP_EVERY_S: Final = 3600.0
"""How often values that no record names are deleted."""

SWEEP_OLDER_THAN_S: Final = 600.0
"""Such values must be so old: an upload under way is none of them."""

_READER_THREADS: Final = 4
"""Threads for what reads a little: pages, counters, values."""

_SCANNER_THREADS: Final = 2
"""Threads for what may read the whole database, so that it does not hold up the others."""

_MAX_SOCKET_PATH_BYTES: Final = 100
"""A little below what the smallest system allows for the path of a unix socket."""

_LOOPBACK: Final = "127.0.0.1"

_SERVICES: Final = (
    lock_table_pb2.DESCRIPTOR.services_by_name["LockTable"].full_name,
    legacy_pb2.DESCRIPTOR.services_by_name["LockManagerService"].full_name,
)

_REQUESTS: Final = request_types(
    (
        lock_table_pb2.DESCRIPTOR.services_by_name["LockTable"],
        legacy_pb2.DESCRIPTOR.services_by_name["LockManagerService"],
        health_pb2.DESCRIPTOR.services_by_name["Health"],
        reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
    )
)

_CHANNEL_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    # Two servers on one port would share its connections silently.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    # What nobody asked for yet must not fill the memory: 64 KiB of each request, and no guessing.
    ("grpc.http2.bdp_probe", 0),
    # Connections that never speak are closed, and those whose other end is gone.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Clients ping often, to notice a healed partition within a second.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
)


class ServeError(Exception):
    """The server cannot listen; the message says why and what to do."""


class Listen(NamedTuple):
    """Where to listen.

    Attributes:
        host: Name or address of the interface; None: not on TCP.
        port: TCP port; 0: any that is free.
        unix_socket: Path of a unix socket; None: on none.
        credentials: Key and certificate for TCP; None: in the clear.
        legacy_port: TCP port on loopback, always in the clear; 0: any that is free, None: none.
    """

    host: str | None = "127.0.0.1"
    port: int = 0
    unix_socket: Path | None = None
    credentials: grpc.ServerCredentials | None = None
    legacy_port: int | None = None


class Idle:
    """A reason to end: nobody used the server for long enough."""


@dataclass(frozen=True, slots=True)
class Died:
    """A reason to end: the storage failed, and what was being written may or may not be stored."""

    error: BaseException


class Server:
    """One lock server over one database.

    Attributes:
        port: The bound TCP port, once started; 0 without TCP.
        legacy_port: The bound port for clients of 2021, if there is one of its own.
        table: The table, once started.
        death: The storage's error, if it failed.
    """

    def __init__(
        self,
        engine: Engine,
        blobs: BlobStore,
        clock: Clock,
        listen: Listen,
        on_end: Callable[[Idle | Died], None],
        *,
        idle_exit_s: float | None = None,
        space: Space | None = None,
        guard: Guard | None = None,
    ) -> None:
        """Make a server; `start` starts it.

        Args:
            engine: The database; closed when the server stops.
            blobs: Large values beside it.
            clock: The time that leases go by.
            listen: Where to listen.
            on_end: Called, in any thread, when the server should be stopped; must not block.
            idle_exit_s: Be `Idle` after so long without a request and without a running lease;
                None: never.
            space: The free space for changes. None: there is no limit.
            guard: Checks who may call what; None: whoever reaches the server may do everything.
        """
        self.port = 0
        self.legacy_port = 0
        self.death: BaseException | None = None
        self._engine = engine
        self._blobs = blobs
        self._clock = clock
        self._listen = listen
        self._on_end = on_end
        self._idle_exit_s = idle_exit_s
        self._space = space
        self._guard = guard
        self._activity = Activity()
        self._executor = ThreadPoolExecutor(_READER_THREADS, thread_name_prefix="reader")
        self._scanner = ThreadPoolExecutor(_SCANNER_THREADS, thread_name_prefix="scanner")
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._waits: Waits | None = None
        self._calls: Calls | None = None
        self.table: Table | None = None

    @property
    def targets(self) -> list[str]:
        """Give the gRPC addresses under which the server is reached."""
        targets = []
        if self._listen.host is not None:
            targets.append(_tcp_address(self._listen.host, self.port))
        if self._listen.unix_socket is not None:
            targets.append(f"unix:{self._listen.unix_socket}")
        return targets

    def start(self) -> None:
        """Open the table and listen.

        Raises:
            ServeError: The address cannot be listened on.
            EngineError: The database cannot be read.
        """
        self._thread.start()
        self._started.result()

    def stop(self) -> None:
        """Refuse new requests, finish those under way, close the database; twice is no error."""
        if self._loop is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop has just ended
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def wake_waits(self) -> None:
        """Have parked waits look again; for tests that move the clock by hand."""
        if self._loop is not None and self._waits is not None:
            self._loop.call_soon_threadsafe(self._waits.wake_all)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if self._started.done():
                logger.exception("the server's loop failed")
                self._on_death(error)
            else:
                self._started.set_exception(error)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        leave_out_gone_callers()
        self.table = table = Table(
            self._engine, self._clock, LoopNotify(self._loop, self._on_death)
        )
        self._waits = Waits(table)
        server = grpc.aio.server(
            options=(
                *_CHANNEL_OPTIONS,
                ("grpc.max_allowed_incoming_connections", max_connections()),
            ),
            maximum_concurrent_rpcs=MAX_QUEUED_REQUESTS + MAX_WAITS,
            # The guard comes first: who may not call takes no room.
            interceptors=[
                *([] if self._guard is None else [self._guard]),
                Admission(_REQUESTS),
                Streams(_REQUESTS),
            ],
        )
        checks = self._add_services(server, table, self._waits)
        try:
            self._bind(server)
            await server.start()
        except BaseException:
            self._engine.close()
            raise
        table.start()
        for name in ("", *_SERVICES):
            await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
        tasks = [asyncio.create_task(self._sweep_hourly(table))]
        if self._idle_exit_s is not None:
            tasks.append(asyncio.create_task(self._watch_idle(table, self._idle_exit_s)))
        self._started.set_result(None)
        await self._stop.wait()
        for task in tasks:
            task.cancel()
        await self._drain(server, checks, table)

    def _add_services(
        self, server: grpc.aio.Server, table: Table, waits: Waits
    ) -> health.aio.HealthServicer:
        calls = self._calls = Calls(table, self._space)
        results = Results(self._blobs, calls, self._executor, self._space)
        add_LockTableServicer_to_server(
            LockTableService(
                table,
                calls,
                waits,
                results,
                self._clock,
                self._executor,
                self._scanner,
                self._activity,
            ),
            server,
        )
        add_LockManagerServiceServicer_to_server(
            LegacyService(table, calls, self._clock, self._scanner, self._activity), server
        )
        checks = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        reflection.enable_server_reflection(
            (*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        return checks

    # -- listening --------------------------------------------------------------------------------

    def _bind(self, server: grpc.aio.Server) -> None:
        listen = self._listen
        if listen.host is not None:
            self.port = _bind_tcp(server, listen.host, listen.port, listen.credentials)
        if listen.legacy_port is not None:
            self.legacy_port = _bind_tcp(server, _LOOPBACK, listen.legacy_port, None)
        unix_socket = listen.unix_socket
        if unix_socket is not None:
            _clear_socket(unix_socket)
            before = os.umask(0o077)
            try:
                server.add_insecure_port(f"unix:{unix_socket}")
            except RuntimeError as error:
                raise ServeError(
                    f"cannot listen on the unix socket {unix_socket}: {error}"
                ) from error
            finally:
                os.umask(before)

    # -- while it runs ----------------------------------------------------------------------------

    async def _sweep_hourly(self, table: Table) -> None:
        """Delete values that no record names, at the start and now and then."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                await loop.run_in_executor(self._executor, self._sweep, table)
            except Exception:
                logger.exception("values that no record names could not be deleted")
            await asyncio.sleep(SWEEP_EVERY_S)

    def _sweep(self, table: Table) -> None:
        n_removed = self._blobs.sweep(
            partial(_is_named, table),
            SWEEP_OLDER_THAN_S,
            self._clock.wall_ns() / 1e9,
        )
        if n_removed:
            logger.info("deleted %d values that no record names", n_removed)

    async def _watch_idle(self, table: Table, idle_exit_s: float) -> None:
        """Be `Idle` once nobody asked for anything, and no lease ran, for so long."""
        loop = asyncio.get_running_loop()
        idle_since_s, n_started = loop.time(), -1
        while True:
            is_used = self._activity.in_flight > 0 or self._activity.started != n_started
            if is_used or table.store.has_live_lease():
                idle_since_s, n_started = loop.time(), self._activity.started
            elif loop.time() - idle_since_s >= idle_exit_s:
                self._on_end(Idle())
                return
            await asyncio.sleep(min(1.0, idle_exit_s / 10))

    def _on_death(self, error: BaseException) -> None:
        if self.death is None:
            self.death = error
            self._on_end(Died(error))

    # -- the end ----------------------------------------------------------------------------------

    async def _drain(
        self, server: grpc.aio.Server, checks: health.aio.HealthServicer, table: Table
    ) -> None:
        await checks.enter_graceful_shutdown()
        if self._waits is not None:
            self._waits.close()
        await server.stop(DRAIN_S)
        # A connection that is closed with requests unread is reset, and its last answers are lost.
        await asyncio.sleep(_FLUSH_S)
        reach("end.drained")
        await asyncio.to_thread(table.close)
        for executor in (self._executor, self._scanner):
            executor.shutdown(wait=False, cancel_futures=True)
        if self._listen.unix_socket is not None:
            self._listen.unix_socket.unlink(missing_ok=True)


def _is_named(table: Table, key: bytes, token: int) -> bool:
    """Tell whether a value is to be kept; what a damaged record names is not known."""
    try:
        return names_value(table.store.peek(key), token)
    except CodecError:
        return True


def _bind_tcp(
    server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None
) -> int:
    """Listen on TCP, and give the bound port.

    Raises:
        ServeError: That cannot be.
    """
    address = _tcp_address(host, port)
    try:
        if credentials is None:
            bound: int = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, credentials)
    except RuntimeError:
        bound = 0
    if not bound:
        raise ServeError(_why_not(host, port))
    return bound


def _tcp_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _why_not(host: str, port: int) -> str:
    """Find out why gRPC, which does not say, could not listen on an address."""
    address = _tcp_address(host, port)
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen()
    except OSError as error:
        reason = error.strerror or str(error)
    else:
        reason = "the address was in use a moment ago"
    return f"cannot listen on {address}: {reason}; choose another address with --host and --port"


def _clear_socket(path: Path) -> None:
    """Remove what a killed server left at the path of a unix socket.

    Raises:
        ServeError: A server listens there, or the path cannot be used.
    """
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
        raise ServeError(
            f"the path of the unix socket is too long for the system: {path} has "
            f"{len(os.fsencode(path))} bytes, at most {_MAX_SOCKET_PATH_BYTES} are allowed"
        )
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ServeError(f"{path} is not a unix socket; give --unix_socket another path")
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise ServeError(f"the folder of the unix socket {path} does not exist") from None
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise ServeError(f"another server listens on the unix socket {path}")
