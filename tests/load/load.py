"""A run under load: figures of the server, its end, and what must hold then."""

from __future__ import annotations

import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from grpc_health.v1 import health_pb2, health_pb2_grpc

from distlock_proto import lock_table_pb2 as pb
from distlock_proto.lock_table_pb2_grpc import LockTableStub
from tests.faults.crashes import Rig, check_after_restart
from tests.faults.traffic import Recorder
from tests.load.clients import BusyClients, CrowdProcess, LargeRequests
from tests.load.peers import RawPeer, many_files
from tests.servers import ServerProcess, connect

MAX_PEAK_MB: Final = 3_000
"""Memory that a server with its own limits may have in `run_load`."""

END_LIMIT_S: Final = 5.0
"""The promise: after SIGTERM the server is gone so soon."""


class Watched(NamedTuple):
    """What was seen of a server over some time.

    Attributes:
        peak_mb: The most memory that it had.
        health_s: How long each health check took.
    """

    peak_mb: list[float]
    health_s: list[float]

    def share_s(self, share: float) -> float:
        """Give the time within which this share of the health checks was answered."""
        ordered = sorted(self.health_s)
        return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


@contextmanager
def watched(server: ServerProcess, every_s: float = 0.05) -> Iterator[Watched]:
    """Ask a server for its health, and the system for its memory, as long as the context lasts."""
    seen = Watched([], [])
    ended = threading.Event()
    errors: list[BaseException] = []

    def look() -> None:
        try:
            with connect(server.address) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                while not ended.is_set():
                    began_s = time.monotonic()
                    stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
                    seen.health_s.append(time.monotonic() - began_s)
                    seen.peak_mb.append(rss_mb(server))
                    ended.wait(every_s)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join(30)
    if errors:
        raise errors[0]


def rss_mb(server: ServerProcess) -> float:
    """Tell how much memory a server has, in MB."""
    status = Path(f"/proc/{server.pid}/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


def start_on_slow_disk(rig: Rig, sync_ms: int = 0) -> None:
    """Start a server whose syncs can be slowed down at any time."""
    rig.server.environment = rig.power.environment()
    rig.power.slow_down(0)
    rig.server.start()
    rig.power.slow_down(sync_ms)


def terminate_under_load(rig: Rig, rng: random.Random, n_busy: int, sync_ms: int) -> Counter[str]:
    """End a server by SIGTERM amid everything; cut the power, and check what was acknowledged."""
    server, recorder = rig.server, rig.recorder
    began = len(recorder.ops)
    busy = BusyClients(server, recorder, n_busy, rng)
    peers = [RawPeer(server.host, server.port) for _ in range(8)]
    with connect(server.address) as channel:
        stub: Any = LockTableStub(channel)
        recorder.await_ops(n_busy)
        waited = next(op for op in recorder.ops[began:] if op.answer == "GRANTED")
        request = pb.WaitRequest(keys=[waited.key], timeout_ns=60 * 10**9)
        waits = [stub.Wait.future(request) for _ in range(100)]
        for peer in peers:
            peer.upload_half()
            peer.begin("Claim")
            peer.ask("List", pb.ListRequest(want_results=True).SerializeToString())
        rig.power.slow_down(sync_ms)
        _await_stall(recorder, sync_ms)
        took_s = end_in_time(server)
        for wait in waits:
            wait.cancel()
    busy.end()
    for peer in peers:
        peer.close()
    recorder.server_is_dead()
    rig.power.apply(rng)
    server.environment = {}
    server.start()
    check_after_restart(server, recorder, recorder.max_token)
    n_ops = len(recorder.ops) - began
    return Counter(operations=n_ops, ends=1, end_ms=int(took_s * 1000))


def _await_stall(recorder: Recorder, sync_ms: int) -> None:
    """Return once the clients wait for a slow sync, if it is a very slow one."""
    seen = -1
    while len(recorder.ops) != seen:
        seen = len(recorder.ops)
        time.sleep(min(sync_ms, 800) / 1000)
        if sync_ms < 800:
            return


def end_in_time(server: ServerProcess) -> float:
    """Send SIGTERM; give how long the server took to end, within the promise."""
    began_s = time.monotonic()
    assert server.terminate(30) == 0
    took_s = time.monotonic() - began_s
    assert took_s < END_LIMIT_S, f"the server took {took_s:.1f} s to end"
    return took_s


def until(holds: Callable[[], bool], limit_s: float = 30.0) -> None:
    """Return once something holds."""
    deadline_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline_s, "it did not come true"
        time.sleep(0.02)


def run_load(folder: Path, shim: Path, seed: int) -> Counter[str]:
    """Load a server in every way at once, with the limits that it has, and end it under load.

    1,000 connections, 200 of them busy, on a disk that gets slow while claims pile up and large
    requests come; then SIGTERM on a slow disk or on one that hangs, and a power cut.

    Args:
        folder: Where the server's files go.
        shim: The compiled shim of `power.py`.
        seed: Of all choices.

    Returns:
        What was tried and seen, to be added up.

    Raises:
        AssertionError: Something was lost, or came too late, or took too much memory.
    """
    rng = random.Random(seed)
    figures = Counter(tried=1)
    try:
        with ExitStack() as cleanup:
            cleanup.enter_context(many_files(3_000))
            rig = Rig(folder / "rig", shim)
            cleanup.callback(rig.server.close)
            start_on_slow_disk(rig)
            figures += _load_in_every_way(rig, rng, cleanup)
            sync_ms = rng.choice([rng.randint(50, 1_000), 30_000])
            figures += terminate_under_load(rig, rng, 200, sync_ms)
    except Exception as error:
        raise AssertionError(f"load, seed {seed}: {error}") from error
    return figures


def _load_in_every_way(rig: Rig, rng: random.Random, cleanup: ExitStack) -> Counter[str]:
    server, recorder = rig.server, rig.recorder
    with watched(server) as seen:
        crowds = [CrowdProcess(cleanup, server.address, 400) for _ in range(2)]
        for crowd in crowds:
            crowd.await_ready()
        busy = BusyClients(server, recorder, 200, rng)
        recorder.await_ops(5_000)
        rig.power.slow_down(rng.randint(100, 1_000))
        recorder.await_ops(1_000)
        large = LargeRequests(server.address, n_clients=60, n_bytes=12 << 20)
        large.end()
        rig.power.slow_down(0)
        counts = sum((crowd.end(recorder) for crowd in crowds), Counter())
        n_refused = busy.end() + large.n_refused
    assert max(seen.peak_mb) < MAX_PEAK_MB, f"the server had {max(seen.peak_mb):.0f} MB"
    return Counter(
        operations=len(recorder.ops),
        renewals=counts["RENEWED"],
        refused=n_refused,
        peak_mb=int(max(seen.peak_mb)),
        health_p99_ms=int(seen.share_s(0.99) * 1e3),
    )
