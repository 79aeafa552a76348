"""What run-once is measured beside: its own release of 2021, and Redis. Each may be missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from distlock_proto import legacy_pb2 as pb
from distlock_proto.legacy_pb2_grpc import LockManagerServiceStub
from report import Report
from tests import legacy_2021

_OPTIONS_2021 = (
    ("grpc.keepalive_time_ms", 10000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.bdp_probe", 1),
    ("grpc.use_local_subchannel_pool", 1),  # ours: a connection for each client
)
REDIS_START_S = 10.0

# A lock for each key that has none, with its owner, for some milliseconds; those got are counted.
LUA_CLAIM = """
local got = 0
for _, key in ipairs(KEYS) do
  if redis.call('SET', key, ARGV[1], 'NX', 'PX', ARGV[2]) then got = got + 1 end
end
return got
"""


@contextmanager
def server_2021(
    report: Report, folder: Path | None = None
) -> Iterator[legacy_2021.Server2021 | None]:
    """Run the server of 2021 out of its wheel; None where it is not to be had.

    Args:
        report: Is told what is missing.
        folder: Its database is in `db` of this; None: a temporary one.
    """
    with tempfile.TemporaryDirectory(prefix="run-once-2021-") as made:
        try:
            unpacked = legacy_2021.unpack(Path(made) / "wheel")
            server = legacy_2021.Server2021(unpacked, folder or Path(made))
        except pytest.skip.Exception as why:
            report.skip(f"run-once 0.4.2: {why}")
            yield None
            return
        try:
            yield server
        finally:
            server.close()


class Client2021:
    """The calls that the client of 2021 makes, message for message."""

    def __init__(self, address: str) -> None:
        """Connect."""
        self._channel = grpc.insecure_channel(address, options=_OPTIONS_2021)
        self._stub: Any = LockManagerServiceStub(self._channel)
        self._owner = f"{socket.gethostname()}_{os.getpid():05d}_{os.getppid():05d}"

    def loop(self, keys: Sequence[str], chunksize: int = 10, timeout_s: int = 60) -> Iterator[str]:
        """Be `DistributedIterator` of 2021: ask for a chunk, take the first that is free."""
        at = 0
        while True:
            request = pb.AcquireManyRequest(
                requests=[
                    pb.AcquireLockRequest(lock=self._lock(key, timeout_s))
                    for key in keys[at : at + chunksize]
                ],
                max_acquired_locks=1,
            )
            responses = self._stub.AcquireMany(request, timeout=30).responses
            if not responses:
                return
            at += len(responses)
            if responses[-1].HasField("acquired_lock"):
                yield responses[-1].acquired_lock.global_id

    def claim(self, key: str, timeout_s: int = 60) -> bool:
        """Ask for one key, as its decorator does."""
        request = pb.AcquireLockRequest(lock=self._lock(key, timeout_s))
        return bool(self._stub.AcquireLock(request, timeout=10).HasField("acquired_lock"))

    def notify_success(self, key: str) -> None:
        """Make a key done: a permanent lock, whatever was there."""
        lock = pb.Lock(global_id=key, expires_in=Duration())
        self._stub.AcquireLock(pb.AcquireLockRequest(lock=lock, overwrite=True), timeout=10)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def _lock(self, key: str, timeout_s: int) -> pb.Lock:
        expires_in = Duration(seconds=timeout_s)
        return pb.Lock(global_id=key, expires_in=expires_in, last_owner_name=self._owner)


class Running2021(NamedTuple):
    """A server of 2021 and a client of it."""

    address: str
    pid: int
    client: Client2021


@contextmanager
def running_2021(report: Report, folder: Path | None = None) -> Iterator[Running2021 | None]:
    """Give a server of 2021 with a client, or None; see `server_2021`."""
    with server_2021(report, folder) as server:
        if server is None:
            yield None
            return
        client = Client2021(server.address)
        try:
            yield Running2021(server.address, server.pid, client)
        finally:
            client.close()


class Redis:
    """A Redis server that syncs each write before it answers, and a client of it."""

    def __init__(self, folder: Path) -> None:
        """Start it on a unix socket in a folder, and connect."""
        import redis  # noqa: PLC0415 - optional

        path = folder / "socket"
        self._process = subprocess.Popen(
            [
                *("redis-server", "--port", "0", "--unixsocket", str(path)),
                *("--dir", str(folder), "--appendonly", "yes", "--appendfsync", "always"),
                *("--save", "", "--daemonize", "no", "--loglevel", "warning"),
            ],
            stdout=subprocess.DEVNULL,
        )
        self.pid = self._process.pid
        self.client: Any = redis.Redis(unix_socket_path=str(path))
        self.lua_claim: Any = self.client.register_script(LUA_CLAIM)
        end_s = time.monotonic() + REDIS_START_S
        while True:
            try:
                self.client.ping()
            except redis.RedisError:
                if time.monotonic() > end_s:
                    self.close()
                    raise
                time.sleep(0.02)
            else:
                return

    def close(self) -> None:
        """End it."""
        self.client.close()
        self._process.terminate()
        self._process.wait()


@contextmanager
def redis_server(report: Report) -> Iterator[Redis | None]:
    """Run a Redis server; None where it is not installed."""
    if shutil.which("redis-server") is None:
        report.skip("Redis: there is no redis-server (Debian: apt-get install redis-server)")
        yield None
        return
    if importlib.util.find_spec("redis") is None:
        report.skip("Redis: its Python client is missing (pip install 'run-once[bench]')")
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="run-once-redis-") as folder:
        server = Redis(Path(folder))
        try:
            yield server
        finally:
            server.close()
