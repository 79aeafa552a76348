"""What no lock table on this machine can pass: synced appends, synced LevelDB batches, empty calls.

python benchmarks/limits.py
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from child import Child, child_ready
from common import Sample, rate, sized, take_turns
from report import Report, run

RECORD_BYTES = 100
METHOD = "/empty.Empty/Call"
BATCHES = (1, 10, 100, 1_000)
CLIENTS = (1, 16, 200)


def synced_appends(count: int) -> None:
    """Append a little and sync, so often: the disk's limit for one change at a time."""
    with tempfile.TemporaryDirectory() as folder:
        descriptor = os.open(Path(folder) / "log", os.O_WRONLY | os.O_CREAT)
        try:
            for _ in range(count):
                os.write(descriptor, b"x" * RECORD_BYTES)
                getattr(os, "fdatasync", os.fsync)(descriptor)
        finally:
            os.close(descriptor)


class Batches:
    """LevelDB through plyvel, one synced batch at a time."""

    def __init__(self, folder: str) -> None:
        """Make a database."""
        import plyvel  # noqa: PLC0415 - has no wheel for every Python

        self._db = plyvel.DB(folder, create_if_missing=True)
        self._keys = itertools.count()

    def write(self, batches: int, keys: int) -> None:
        """Write so many batches of so many new keys."""
        for _ in range(batches):
            with self._db.write_batch(sync=True) as batch:
                for number in itertools.islice(self._keys, keys):
                    batch.put(b"key-%09d" % number, b"x" * RECORD_BYTES)

    def close(self) -> None:
        """Close it."""
        self._db.close()


@contextmanager
def leveldb(report: Report) -> Iterator[Batches | None]:
    """Give a LevelDB; None where plyvel is missing."""
    if importlib.util.find_spec("plyvel") is None:
        report.skip("LevelDB's own rate: there is no plyvel for this Python")
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        batches = Batches(folder)
        try:
            yield batches
        finally:
            batches.close()


class EmptyCalls:
    """A gRPC server in Python that answers nothing to nothing, and clients of it."""

    def __init__(self, clients: int) -> None:
        """Start it, with one connection for each client, at most 20."""
        self._server = Child("limits.py", {})
        self.pid = self._server.pid
        options = [("grpc.use_local_subchannel_pool", 1)]
        address = f"127.0.0.1:{self._server.said}"
        self._channels = [grpc.insecure_channel(address, options) for _ in range(min(20, clients))]
        self._calls: list[Any] = [channel.unary_unary(METHOD) for channel in self._channels]
        self._pool = ThreadPoolExecutor(clients)
        self._clients = clients

    def call(self, count: int) -> None:
        """Make so many calls in all."""

        def client(number: int) -> None:
            call = self._calls[number % len(self._calls)]
            for _ in range(max(1, count // self._clients)):
                call(b"")

        list(self._pool.map(client, range(self._clients)))

    def sized_run(self, goal_s: float) -> Callable[[], Sample]:
        """Give a run of about so long."""
        count = sized(self._clients, 50_000, goal_s, self.call)
        return lambda: rate(count, lambda: self.call(count), self.pid)

    def close(self) -> None:
        """End clients and server."""
        self._pool.shutdown()
        for channel in self._channels:
            channel.close()
        self._server.close()


@contextmanager
def empty_calls(clients: int) -> Iterator[EmptyCalls]:
    """Give an empty server and its clients."""
    calls = EmptyCalls(clients)
    try:
        yield calls
    finally:
        calls.close()


async def serve_nothing() -> None:
    """Be the empty server, until killed."""

    async def answer(_request: bytes, _context: Any) -> bytes:
        return b""

    handlers: dict[str, Any] = {"Call": grpc.unary_unary_rpc_method_handler(answer)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("empty.Empty", handlers),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await asyncio.get_running_loop().run_in_executor(None, child_ready, str(port))
    await server.wait_for_termination()


def disk(report: Report) -> list[Sample]:
    """Measure synced appends and add them to a report, as the limit of single changes."""
    count = sized(10, 5_000, report.goal_s(0.5), synced_appends)
    samples = [rate(count, lambda: synced_appends(count)) for _ in range(report.runs)]
    report.add("limit: synced appends", samples, "syncs/s", f"{RECORD_BYTES} bytes, fdatasync")
    return samples


def measure(report: Report) -> None:
    """Measure all limits."""
    disk(report)
    with leveldb(report) as batches:
        if batches is not None:
            for keys in BATCHES:
                count = sized(2, 5_000, report.goal_s(0.5), lambda n, k=keys: batches.write(n, k))  # type: ignore[misc]
                side = {"": lambda n=count, k=keys: rate(n * k, lambda: batches.write(n, k))}
                samples = take_turns(report.runs, side)[""]
                report.add(f"limit: LevelDB, synced batches of {keys:,}", samples, how="plyvel")
    for clients in CLIENTS:
        with empty_calls(clients) as calls:
            once = calls.sized_run(report.goal_s(0.6))
            samples = [once() for _ in range(report.runs)]
            how = "grpc.aio server, threads as clients, no message at all"
            report.add(f"limit: empty calls, {clients} clients", samples, "calls/s", how)


if __name__ == "__main__":
    if sys.argv[1:] == ["{}"]:
        asyncio.run(serve_nothing())
    else:
        run("limits", "The limits of this machine", measure)
