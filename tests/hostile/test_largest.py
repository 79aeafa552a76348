"""No request keeps another waiting: health is answered while the largest requests are served."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from distlock_proto import legacy_pb2
from distlock_proto import lock_table_pb2 as pb
from distlock_proto.legacy_pb2_grpc import LockManagerServiceStub
from distlock_proto.lock_table_pb2_grpc import LockTableStub
from tests.hostile.largest import LARGEST, Request, claim
from tests.hostile.methods import raw_call
from tests.servers import ServerProcess, connect

WINDOW_S: Final = 12.0
PROBE_EVERY_S: Final = 0.02
WINDOWS: Final = 3
SPIN_S: Final = 2.0
MIN_CORE_SHARE: Final = 0.8
"""With less than that per thread, latencies are those of the machine and not the server's."""

P99_S: Final = 0.25
CONNECTIONS: Final = 4
REFUSED: Final = frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED})


class Load:
    """Connections that each send one of the largest requests after another."""

    def __init__(self, server: ServerProcess, requests: list[Request], cleanup: ExitStack) -> None:
        """Start them; they stop with the stack."""
        self.sent: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._requests = requests
        self._stop = threading.Event()
        for number in range(CONNECTIONS):
            channel = cleanup.enter_context(connect(server.address))
            thread = threading.Thread(target=self._send, args=(channel, number), daemon=True)
            thread.start()
            cleanup.callback(thread.join)
        cleanup.callback(self._stop.set)

    def _send(self, channel: grpc.Channel, number: int) -> None:
        rng = random.Random(number)
        while not self._stop.is_set():
            method, raw = rng.choice(self._requests)
            try:
                raw_call(channel, method.path)(raw, timeout=60)
            except grpc.RpcError as error:
                failed: Any = error
                if failed.code() not in REFUSED:
                    self.wrong.append(f"{method.name}: {failed.code()}: {failed.details()}")
            self.sent[method.name] += 1


def probe_times(address: str, window_s: float) -> list[float]:
    """Ask for health again and again; give how long each answer took, sorted."""
    times = []
    with connect(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        health.Check(health_pb2.HealthCheckRequest(), timeout=30, wait_for_ready=True)
        end_s = time.monotonic() + window_s
        while time.monotonic() < end_s:
            started_s = time.perf_counter()
            health.Check(health_pb2.HealthCheckRequest(), timeout=30)
            times.append(time.perf_counter() - started_s)
            time.sleep(PROBE_EVERY_S)
    return sorted(times)


def _window(server: ServerProcess, requests: list[Request], window_s: float) -> tuple[float, str]:
    """Probe under such requests for a while; give the p99, and a line that says all."""
    with ExitStack() as under_load:
        load = Load(server, requests, under_load)
        times = probe_times(server.address, window_s)
    assert not load.wrong, load.wrong
    n_kinds = len({method.name for method, _ in requests})
    assert len(load.sent) > n_kinds // 2, f"too little was sent: {load.sent}"
    p50_s, p99_s = times[len(times) // 2], times[len(times) * 99 // 100]
    return p99_s, (
        f"{len(times)} probes, p50 {p50_s * 1e3:.0f} ms, p99 {p99_s * 1e3:.0f} ms, "
        f"most {times[-1] * 1e3:.0f} ms, under {sum(load.sent.values())} of the largest requests"
    )


def _best_window(
    server: ServerProcess,
    requests: list[Request],
    window_s: float,
    report: Callable[[str], None],
) -> None:
    """Check the p99 of the best window: the machine may be busy with something else in one."""
    figures = []
    for _ in range(WINDOWS):
        p99_s, line = _window(server, requests, window_s)
        figures.append(line)
        if p99_s <= P99_S:
            break
    report("; ".join(figures))
    if p99_s > P99_S and core_share() < MIN_CORE_SHARE:
        pytest.skip(f"the machine has too much else to do to tell: {figures}")
    assert p99_s <= P99_S, figures


def core_share() -> float:
    """Tell how much of a core a thread gets on this machine now, with the server idle."""
    wall_s, cpu_s = time.perf_counter(), time.thread_time()
    while time.perf_counter() - wall_s < SPIN_S:
        pass
    return (time.thread_time() - cpu_s) / (time.perf_counter() - wall_s)


@pytest.mark.timeout(300)
def test_health_under_the_largest_requests(
    server: ServerProcess, cleanup: ExitStack, report: Callable[[str], None]
) -> None:
    """99 of 100 probes are answered within 250 ms, and all of the server works afterwards."""
    rng = random.Random(20_263)
    _best_window(server, [make(rng) for make in LARGEST], WINDOW_S, report)
    assert "Traceback" not in server.log
    channel = cleanup.enter_context(connect(server.address))
    table, legacy = LockTableStub(channel), LockManagerServiceStub(channel)
    claimed = table.Claim(
        pb.ClaimRequest(keys=[b"k"], claim_id=b"i" * 16, ttl_ns=10**9), timeout=30
    )
    assert claimed.states == bytes([pb.KEY_STATE_GRANTED])  # the committer lives
    assert table.Count(pb.CountRequest(prefix=b"k"), timeout=30).held == 1  # and who scans
    assert legacy.ListLocks(legacy_pb2.ListLocksRequest(start_key="k"), timeout=30).locks
    assert table.List(pb.ListRequest(start_key=b"k"), timeout=30).infos  # and who reads


@pytest.mark.soak
@pytest.mark.parametrize("make", LARGEST, ids=[make.__name__ for make in LARGEST])
def test_health_under_one_kind(
    make: Callable[[random.Random], Request],
    server: ServerProcess,
    report: Callable[[str], None],
) -> None:
    """The same for each kind of them alone, from all connections at once."""
    with connect(server.address) as channel:  # something to read and count
        for seed in range(3):
            method, raw = claim(random.Random(seed))
            raw_call(channel, method.path)(raw, timeout=60)
    _best_window(server, [make(random.Random(20_264))], WINDOW_S, report)
