"""The calls of the client of 2021."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from distlock_proto import legacy_pb2 as pb
from distlock_proto.legacy_pb2_grpc import LockManagerServiceStub

_OPTIONS_2021 = (
    ("grpc.keepalive_time_ms", 10000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.bdp_probe", 1),
    ("grpc.use_local_subchannel_pool", 1),  # ours: a connection for each client
)


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
