"""Compare three server models for the lock table: threads, asyncio calls, asyncio streams.

    python benchmarks/server_model.py [--quick] [--only busy parked health shutdown]

Each model answers with the same stand-in for the lock table: one committer thread gathers all
changes that wait, writes them in one synced LevelDB batch and answers them together. Messages
are raw bytes, so only the model is measured. The server and every load generator are separate
processes on 127.0.0.1. Rounds are interleaved (A B C A B C ...) and medians are reported.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from server_model_servers import HEADER, OPS, SERVICE, TOKEN, UNARY

CHANNELS = 4  # connections of one load process
CHILD_LIMIT_S = 60.0
CALL_LIMIT_S = 8.0
BATCH_KEYS = 10_000
SERVERS = Path(__file__).with_name("server_model_servers.py")


Call = Callable[[str, bytes], Awaitable[bytes]]
ENDED = (grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError)


class StreamClient:
    """Many requests on one stream."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stream: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(
            f"/{SERVICE}/Stream"
        )(metadata=(TOKEN,))
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._next = 0
        self._writing = asyncio.Lock()
        self._reader = asyncio.create_task(self._read())

    async def call(self, op: str, body: bytes) -> bytes:
        """Send one request and wait for its answer."""
        self._next += 1
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[self._next] = future
        frame = HEADER.pack(self._next, OPS[op]) + body
        async with self._writing:
            await self._stream.write(frame)
        return await future

    async def _read(self) -> None:
        try:
            while (frame := await self._stream.read()) is not grpc.aio.EOF:
                assert isinstance(frame, bytes)
                self._waiting.pop(HEADER.unpack_from(frame)[0]).set_result(frame[HEADER.size :])
        except ENDED:
            pass
        for future in self._waiting.values():
            future.cancel()


def connect(port: int, streams: int, clients: int) -> list[Call]:
    """One call function per client; with streams, clients share that many streams."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", options)
        for _ in range(min(CHANNELS, clients))
    ]

    def unary(channel: grpc.aio.Channel) -> Call:
        methods: dict[str, Any] = {op: channel.unary_unary(f"/{SERVICE}/{op}") for op in UNARY}
        return lambda op, body: methods[op](body, timeout=CALL_LIMIT_S, metadata=(TOKEN,))

    if not streams:
        shared = [unary(channel) for channel in channels]
    else:
        shared = [StreamClient(channels[i % len(channels)]).call for i in range(streams)]
    return [shared[i % len(shared)] for i in range(clients)]


async def load(job: dict[str, Any]) -> dict[str, Any]:
    """Closed-loop load: each client sends its next request when the last is answered."""
    calls = connect(job["port"], job["streams"], job["clients"])
    control = connect(job["port"], 0, 1)[0]
    if job["op"] == "Wait":
        return await load_waits(job, calls, control)
    body = b"\n".join(b"key-%d" % i for i in range(BATCH_KEYS)) if job.get("batch") else b""
    took: list[float] = []
    counts = {"ok": 0, "refused": 0, "errors": 0}
    end = time.perf_counter() + job["warm_s"] + job["seconds"]

    async def client(number: int, call: Call) -> None:
        while (start := time.perf_counter()) < end:
            try:
                await call(job["op"], body or b"client-%d-%d" % (number, int(start * 1e9)))
                took.append(time.perf_counter() - start)
                counts["ok"] += 1
            except ENDED as error:
                refused = (
                    getattr(error, "code", lambda: None)() == grpc.StatusCode.RESOURCE_EXHAUSTED
                )
                counts["refused" if refused else "errors"] += 1
                if not refused:
                    return

    tasks = [asyncio.create_task(client(i, call)) for i, call in enumerate(calls)]
    print("running", flush=True)
    if job.get("until_error"):
        await asyncio.gather(*tasks)
        return dict(counts)
    await asyncio.sleep(job["warm_s"])
    before = json.loads(await control("Stats", b""))
    began, spent = time.perf_counter(), time.process_time()
    took.clear()
    counts.update(ok=0, refused=0)
    await asyncio.sleep(job["seconds"] - 0.1)
    after = json.loads(await control("Stats", b""))
    window, spent = time.perf_counter() - began, time.process_time() - spent
    done, latencies = dict(counts), sorted(took) or [float("nan")]
    await asyncio.gather(*tasks)
    answered = max(1, done["ok"] + done["refused"])
    return {
        "rpc_s": done["ok"] / window,
        "refused_s": done["refused"] / window,
        "errors": counts["errors"],
        "p50_ms": latencies[len(latencies) // 2] * 1e3,
        "p99_ms": latencies[int(len(latencies) * 0.99)] * 1e3,
        "server_us": (after["cpu_s"] - before["cpu_s"]) / answered * 1e6,
        "load_us": spent / answered * 1e6,
        "group": done["ok"] / max(1, after["groups"] - before["groups"]),
        "threads": after["threads"],
        "rss_mib": after["rss_mib"],
    }


async def load_waits(job: dict[str, Any], calls: list[Call], control: Call) -> dict[str, Any]:
    """Park long polls; on a line from stdin settle, and time how they wake."""
    woken: list[float] = []
    outcomes: dict[str, int] = {}

    async def park(call: Call) -> None:
        try:
            outcome = (await call("Wait", b"key")).decode()
        except ENDED as error:
            outcome = str(getattr(error, "code", lambda: "stream ended")())
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        woken.append(time.perf_counter())

    tasks = [asyncio.create_task(park(call)) for call in calls]
    await asyncio.sleep(1.0)
    print("running", flush=True)
    if job.get("until_error"):
        await asyncio.gather(*tasks)
        return outcomes
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    start = time.perf_counter()
    await control("Settle", b"key")
    await asyncio.gather(*tasks)
    woken.sort()
    return {
        "wake_p50_ms": (woken[len(woken) // 2] - start) * 1e3,
        "wake_last_ms": (woken[-1] - start) * 1e3,
        "woken": outcomes,
    }


Job = tuple[str, Callable[[], dict[str, Any]]]


class Server:
    """A server process with its own temporary directory."""

    def __init__(self, kind: str, *options: str) -> None:
        self._dir = tempfile.TemporaryDirectory(prefix="server-model-")
        command = [sys.executable, str(SERVERS), kind, self._dir.name + "/db", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def __enter__(self) -> Server:  # noqa: PYI034 - Self is not in Python 3.10
        return self

    def stop(self) -> float:
        """Seconds from SIGTERM to exit; killed if it does not end."""
        start = time.perf_counter()
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        return time.perf_counter() - start

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()
        self._dir.cleanup()


class Load:
    """A load process; it has started its requests once this returns."""

    def __init__(self, server: Server, op: str, clients: int, streams: int = 0, **job: Any) -> None:
        job = {
            "port": server.port,
            "op": op,
            "clients": clients,
            "streams": streams,
            "warm_s": 0.5,
            **job,
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--load", json.dumps(job)],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def result(self) -> dict[str, Any]:
        """Let it finish; its report."""
        try:
            out, _ = self._process.communicate("\n", CHILD_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            out, _ = self._process.communicate()
        return json.loads(out) if self._process.returncode == 0 else {"failed": 1.0}


def busy(kind: str, clients: int, streams: int, seconds: float, *options: str) -> dict[str, Any]:
    """Claims from closed-loop clients."""
    with Server(kind, *options) as server:
        return Load(server, "Claim", clients, streams, seconds=seconds).result()


def parked(
    kind: str, waits: int, *, stream: bool, seconds: float, options: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Sixteen clients claim while long polls are parked; then all are woken under that load."""
    with Server(kind, *options) as server:
        waiting = Load(server, "Wait", waits, waits if stream else 0)
        result = Load(server, "Claim", 16, 16 if stream else 0, seconds=seconds).result()
        claims = Load(server, "Claim", 16, 16 if stream else 0, seconds=2.0)
        time.sleep(0.7)
        return {
            **result,
            **waiting.result(),
            **({} if "rpc_s" in claims.result() else {"starved": 1.0}),
        }


def health(kind: str, stream: bool, seconds: float, *options: str) -> dict[str, Any]:
    """One client asks for health while another sends 10,000-key batches without a pause."""
    with Server(kind, *options) as server:
        batches = Load(server, "Claim", 1, int(stream), seconds=seconds + 2, batch=True)
        result = Load(server, "Health", 1, int(stream), seconds=seconds).result()
        return {**result, "batches_s": batches.result().get("rpc_s")}


def shutdown(kind: str, stream: bool, *options: str) -> dict[str, Any]:
    """SIGTERM with 200 parked long polls and 200 busy clients."""
    with Server(kind, *options) as server:
        waiting = Load(server, "Wait", 200, 200 if stream else 0, until_error=True)
        claims = Load(server, "Claim", 200, 200 if stream else 0, seconds=20, until_error=True)
        time.sleep(1.0)
        took = server.stop()
        code = server.process.returncode
        return {"exit_s": took, "code": code, **claims.result(), "waits": waiting.result()}


def plan(seconds: float) -> dict[str, list[Job]]:
    """Every measurement, in interleaved order."""
    models = (("sync", "sync", False), ("aio", "aio", False), ("stream", "aio", True))
    slow, admit, shut = ("--disk-s", "0.05"), ("--admit", "64"), ("--pool", "448")
    busy_jobs: list[Job] = [
        (f"{name} clients={n}", partial(busy, kind, n, n * stream, seconds))
        for n in (1, 16, 200)
        for name, kind, stream in models
    ]
    busy_jobs.append(("stream clients=200 on 4 streams", partial(busy, "aio", 200, 4, seconds)))
    busy_jobs += [
        (f"{name} clients=16 auth", partial(busy, kind, 16, 16 * stream, seconds, "--auth"))
        for name, kind, stream in models
    ]
    busy_jobs += [
        (f"{kind} clients=200 slow disk {label}", partial(busy, kind, 200, 0, seconds, *options))
        for kind in ("sync", "aio")
        for label, options in (("", slow), ("admit=64", slow + admit))
    ]
    small_pool = partial(
        parked, "sync", 200, stream=False, seconds=seconds, options=("--pool", "32")
    )
    parked_jobs: list[Job] = [("sync pool=32 waits=200", small_pool)]
    parked_jobs += [
        (f"{name} waits={waits}", partial(parked, kind, waits, stream=stream, seconds=seconds))
        for name, kind, stream in models
        for waits in ((200, 1000) if kind == "aio" else (200,))
    ]
    health_jobs: list[Job] = [
        (f"{name} {' '.join(options)}", partial(health, kind, stream, seconds, *options))
        for options in ((), ("--switch-s", "0.0005"))
        for name, kind, stream in models
    ]
    shutdown_jobs: list[Job] = [
        (f"{name} {' '.join(options)}", partial(shutdown, kind, stream, *shut, *options))
        for name, kind, stream in models
        for options in ((), ("--keep-waits",))
    ]
    return {
        "busy": busy_jobs,
        "parked": parked_jobs,
        "health": health_jobs,
        "shutdown": shutdown_jobs,
    }


def summary(results: list[dict[str, Any]]) -> str:
    """Medians of numbers, the last value of anything else."""
    parts = []
    for key in dict.fromkeys(key for result in results for key in result):
        values = [result[key] for result in results if result.get(key) is not None]
        numbers = [value for value in values if isinstance(value, (int, float))]
        parts.append(
            f"{key}={statistics.median(numbers):.4g}" if numbers else f"{key}={values[-1:]}"
        )
    return " ".join(parts)


def main() -> None:
    """Run the measurements, or be one load process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=("busy", "parked", "health", "shutdown"))
    parser.add_argument("--load", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        try:
            report = asyncio.run(load(json.loads(args.load)))
        except grpc.aio.AioRpcError as error:
            report = {"failed": error.code().name}
        print(json.dumps(report))
        return
    rounds, jobs = (1, plan(0.8)) if args.quick else (args.rounds, plan(1.5))
    for group in args.only or jobs:
        collected: dict[str, list[dict[str, Any]]] = {name: [] for name, _ in jobs[group]}
        for _ in range(rounds):
            for name, run in jobs[group]:
                collected[name].append(run())
        for name, results in collected.items():
            print(f"{group:9}{name:38}{summary(results)}", flush=True)


if __name__ == "__main__":
    main()
