"""The three server models that server_model.py measures, over one stand-in for the lock table.

Run by server_model.py as a process of its own: prints its port, serves until SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import resource
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import plyvel

SERVICE = "bench.Table"
UNARY = ("Claim", "Health", "Wait", "Settle", "Stats")
OPS = {name: number for number, name in enumerate(UNARY)}
HEADER = struct.Struct(">IB")  # a stream's frame: request id, operation
TOKEN = ("authorization", "Bearer benchmark")
REFUSED = b"refused"
GRACE_S = 3.0
STREAM_DRAIN_S = 0.05

Answers = list[tuple[Any, bytes]]


class Committer:
    """One thread that turns waiting changes into synced batches (group commit)."""

    def __init__(self, path: str, resolve: Callable[[Answers], None], disk_s: float) -> None:
        self._disk_s = disk_s  # added to each commit, to stand for a slow disk
        self._db = plyvel.DB(path, create_if_missing=True)
        self._resolve = resolve
        self._ready = threading.Condition()
        self._inbox: list[tuple[bytes, Any, bool]] = []
        self._waiters: list[Any] = []
        self._closing = False
        self._token = 0
        self.groups = 0
        self.pending = 0  # changes not answered yet
        self._thread = threading.Thread(target=self._run, name="committer")
        self._thread.start()

    def submit(self, keys: bytes, future: Any, settles: bool = False) -> Any:
        """Queue a change (keys separated by newlines); its future gets one token per key."""
        with self._ready:
            self._inbox.append((keys, future, settles))
            self.pending += 1
            self._ready.notify()
        return future

    def park(self, future: Any) -> Any:
        """Keep a long poll's future until a change settles."""
        with self._ready:
            self._waiters.append(future)
        return future

    def release_waiters(self, answer: bytes) -> None:
        """Answer every parked long poll."""
        with self._ready:
            waiters, self._waiters = self._waiters, []
        self._resolve([(waiter, answer) for waiter in waiters])

    def close(self) -> None:
        """Commit what is queued, then stop."""
        with self._ready:
            self._closing = True
            self._ready.notify()
        self._thread.join()
        self._db.close()

    def _run(self) -> None:
        while True:
            with self._ready:
                while not self._inbox and not self._closing:
                    self._ready.wait()
                group, self._inbox = self._inbox, []
            if not group:
                return
            answers = [(future, self._apply(keys)) for keys, future, _ in self._write(group)]
            if any(settles for _, _, settles in group):
                with self._ready:
                    answers += [(waiter, b"settled") for waiter in self._waiters]
                    self._waiters = []
            with self._ready:
                self.pending -= len(group)
            self.groups += 1
            self._resolve(answers)

    def _write(self, group: list[tuple[bytes, Any, bool]]) -> list[tuple[bytes, Any, bool]]:
        with self._db.write_batch(sync=True) as batch:
            for keys, _, _ in group:
                for key in keys.split(b"\n"):
                    batch.put(key, b"held by a client until later")
        if self._disk_s:
            time.sleep(self._disk_s)
        return group

    def _apply(self, keys: bytes) -> bytes:
        tokens = []
        for _ in keys.split(b"\n"):
            self._token += 1
            tokens.append(self._token.to_bytes(8, "big"))
        return b"".join(tokens)


def usage(committer: Committer) -> bytes:
    """This process's processor time, threads, memory and committed groups."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    report = {
        "cpu_s": used.ru_utime + used.ru_stime,
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "rss_mib": used.ru_maxrss / 1024,
        "groups": committer.groups,
    }
    return json.dumps(report).encode()


class Table:
    """Starts an operation; the models differ in the future and in who waits for it."""

    def __init__(
        self, path: str, resolve: Callable[[Answers], None], args: argparse.Namespace
    ) -> None:
        self.committer = Committer(path, resolve, args.disk_s)
        self._admit = args.admit

    def start(self, op: int, body: bytes, future: Any) -> Any:
        """Start the operation; the future gets the answer, or REFUSED when the queue is full."""
        if op == OPS["Wait"]:
            return self.committer.park(future)
        if op == OPS["Settle"] or (op == OPS["Claim"] and self.committer.pending < self._admit):
            return self.committer.submit(body, future, op == OPS["Settle"])
        other = {OPS["Claim"]: REFUSED, OPS["Health"]: b"ok"}
        future.set_result(other[op] if op in other else usage(self.committer))
        return future

    def sync_call(self, op: int) -> Any:
        """A handler that keeps a thread until the answer is there."""

        def call(request: bytes, context: grpc.ServicerContext) -> bytes:
            answer: bytes = self.start(op, request, futures.Future()).result()
            if answer == REFUSED:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full")
            return answer

        return call

    def aio_call(self, op: int) -> Any:
        """A handler that keeps a coroutine until the answer is there."""
        loop = asyncio.get_running_loop()

        async def call(request: bytes, context: Any) -> bytes:
            answer: bytes = await self.start(op, request, loop.create_future())
            if answer == REFUSED:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full")
            return answer

        return call

    def aio_stream(self, draining: asyncio.Future[None]) -> Any:
        """A handler for many requests on one stream, answered in the order they are ready."""
        loop = asyncio.get_running_loop()

        def answer(outbox: Any, prefix: bytes, done: asyncio.Future[bytes]) -> None:
            outbox.put_nowait(prefix + done.result())

        async def read(context: Any, outbox: asyncio.Queue[bytes | None]) -> None:
            # The server stops or the client is gone: the stream ends, and nobody awaits this task.
            with contextlib.suppress(grpc.aio.BaseError):
                while (frame := await context.read()) is not grpc.aio.EOF:
                    future = loop.create_future()
                    reply = functools.partial(answer, outbox, frame[: HEADER.size])
                    future.add_done_callback(reply)
                    self.start(frame[4], frame[HEADER.size :], future)

        async def stream(_: Any, context: Any) -> None:
            outbox: asyncio.Queue[bytes | None] = asyncio.Queue()
            reader = asyncio.create_task(read(context, outbox))
            for end in (draining, reader):
                end.add_done_callback(lambda _: outbox.put_nowait(None))
            try:
                while (frame := await outbox.get()) is not None:
                    await context.write(frame)
            finally:
                reader.cancel()

        return stream

    def handlers(self, call: Callable[[int], Any], stream: Any = None) -> grpc.GenericRpcHandler:
        """All methods, with raw bytes on the wire."""
        methods: dict[str, Any] = {
            n: grpc.unary_unary_rpc_method_handler(call(op)) for n, op in OPS.items()
        }
        if stream:
            methods["Stream"] = grpc.stream_stream_rpc_method_handler(stream)
        return grpc.method_handlers_generic_handler(SERVICE, methods)


class SyncAuth(grpc.ServerInterceptor):
    """Token check of the threaded server; a call without the token finds no method."""

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Let a call with the token through."""
        return continuation(details) if TOKEN in details.invocation_metadata else None


class AioAuth(grpc.aio.ServerInterceptor):
    """Token check of the asyncio server."""

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Let a call with the token through."""
        return await continuation(details) if TOKEN in details.invocation_metadata else None


def set_all(answers: Answers) -> None:
    """Answer the futures that nobody gave up."""
    for future, value in answers:
        if not future.done():
            future.set_result(value)


def serve_sync(args: argparse.Namespace) -> None:
    """Run the threaded server until SIGTERM."""
    table = Table(args.path, set_all, args)
    pool = futures.ThreadPoolExecutor(args.pool)
    server = grpc.server(pool, interceptors=[SyncAuth()] if args.auth else [])
    server.add_generic_rpc_handlers((table.handlers(table.sync_call),))
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    stop.wait()
    stopped = server.stop(GRACE_S)  # refuses new calls
    if not args.keep_waits:
        table.committer.release_waiters(b"draining")
    stopped.wait()
    table.committer.release_waiters(b"draining")  # their threads would keep the process
    table.committer.close()


async def serve_aio(args: argparse.Namespace) -> None:
    """Run the asyncio server, for calls and streams, until SIGTERM."""
    loop = asyncio.get_running_loop()

    def resolve(answers: Answers) -> None:
        loop.call_soon_threadsafe(set_all, answers)  # one wake-up of the loop for the group

    table, draining = Table(args.path, resolve, args), loop.create_future()
    server = grpc.aio.server(interceptors=[AioAuth()] if args.auth else [])
    server.add_generic_rpc_handlers((table.handlers(table.aio_call, table.aio_stream(draining)),))
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await stop.wait()
    stopping = asyncio.create_task(server.stop(GRACE_S))
    if not args.keep_waits:
        table.committer.release_waiters(b"draining")
        # A stream does not end by itself: the server ends it after the last answers.
        loop.call_later(STREAM_DRAIN_S, draining.set_result, None)
    await stopping
    await loop.run_in_executor(None, table.committer.close)


def main() -> None:
    """Serve one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("sync", "aio"))
    parser.add_argument("path", help="the database's folder")
    parser.add_argument("--pool", type=int, default=256, help="threads of the sync server")
    parser.add_argument("--admit", type=int, default=10**9, help="changes that may wait")
    parser.add_argument("--disk-s", type=float, default=0.0, help="added to each commit")
    parser.add_argument("--switch-s", type=float, default=0.005, help="thread switch interval")
    parser.add_argument("--auth", action="store_true", help="check a token in an interceptor")
    parser.add_argument("--keep-waits", action="store_true", help="leave long polls at SIGTERM")
    args = parser.parse_args()
    sys.setswitchinterval(args.switch_s)
    if args.model == "sync":
        serve_sync(args)
    else:
        asyncio.run(serve_aio(args))


if __name__ == "__main__":
    main()
