"""Under load: no lease of a live holder is lost, memory is bounded, and the end comes in time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from distlock_proto import lock_table_pb2 as pb
from distlock_proto.lock_table_pb2_grpc import LockTableStub
from tests.faults.crashes import Rig
from tests.faults.traffic import check_counts, read_back
from tests.load.clients import (
    CROWD_TTL_S,
    BusyClients,
    CrowdProcess,
    Flood,
    Kept,
    LargeRequests,
)
from tests.load.load import (
    rss_mb,
    start_on_slow_disk,
    terminate_under_load,
    until,
    watched,
)
from tests.load.peers import RawPeer, connect_silently, is_closed, many_files
from tests.servers import ServerProcess, connect
from tests.service_calls import refused

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="a process's memory is read from /proc"
)

SMALL = str(Path(__file__).with_name("small_server.py"))


@pytest.fixture
def rig(tmp_path: Path, shim: Path, cleanup: ExitStack) -> Rig:
    """Give a server on a disk that can be slowed down, not started."""
    rig = Rig(tmp_path / "rig", shim)
    cleanup.callback(rig.server.close)
    return rig


def test_a_thousand_connections(
    rig: Rig, seed: int, cleanup: ExitStack, report: Callable[[str], None]
) -> None:
    """800 clients hold leases or wait while 200 work: nothing is lost, nothing is done twice."""
    cleanup.enter_context(many_files(2_000))
    start_on_slow_disk(rig)
    before_mb = rss_mb(rig.server)
    with watched(rig.server) as seen:
        crowds = [CrowdProcess(cleanup, rig.server.address, 400) for _ in range(2)]
        busy = BusyClients(rig.server, rig.recorder, 200, random.Random(seed))
        for crowd in crowds:
            crowd.await_ready()
        ready_s = time.monotonic()
        rig.recorder.await_ops(2_000)
        # Longer than a lease: each has been renewed by then.
        rig.recorder.await_ops(10**9, lambda: time.monotonic() > ready_s + CROWD_TTL_S + 1)
        counts = [crowd.end(rig.recorder) for crowd in crowds]
        n_refused = busy.end()
    read_back(rig.server.address, rig.recorder)
    checked = rig.recorder.check()
    check_counts(rig.server.address)
    peak_mb = max(seen.peak_mb)
    report(
        f"seed {seed}: {checked.n_ops} operations checked, {n_refused} refused, "
        f"{sum(c['RENEWED'] for c in counts)} renewals; memory {before_mb:.0f} to {peak_mb:.0f} MB;"
        f" health p50 {seen.share_s(0.5) * 1e3:.0f} ms, p99 {seen.share_s(0.99) * 1e3:.0f} ms"
    )
    assert peak_mb < before_mb + 300
    assert sum(c["RENEWED"] for c in counts) >= 400


def test_leases_on_a_slow_disk(
    rig: Rig, seed: int, cleanup: ExitStack, report: Callable[[str], None]
) -> None:
    """While a flood of claims waits for a slow disk, no lease that is kept alive is lost.

    Half of the leases start meanwhile, which must be written, and somebody else claims all of
    their keys again and again. In the end all is done, each key once.
    """
    start_on_slow_disk(rig)
    kept = Kept(rig.server.address, 6, 120, "kept")
    cleanup.callback(kept.close)
    rig.power.slow_down(700)
    with watched(rig.server) as seen:
        flood = Flood(rig.server.address, n_clients=8, n_keys=10_000, name="flood")
        until(lambda: bool(flood.tokens))
        kept.start()
        flood.end()
    rig.power.slow_down(0)
    n_kept = kept.complete()
    with connect(rig.server.address) as channel:
        counted = LockTableStub(channel).Count(pb.CountRequest(), timeout=20)
    report(
        f"{counted.done} keys done, {n_kept} leases kept, {kept.n_tries} tries to take them; "
        f"claims took up to {flood.slowest_s:.1f} s; health p99 {seen.share_s(0.99) * 1e3:.0f} ms"
    )
    assert (counted.done, counted.held, counted.failed) == (80_000 + n_kept, 0, 0)
    assert flood.slowest_s > 2, "the claims did not pile up"


def test_large_requests_on_a_slow_disk(
    rig: Rig, cleanup: ExitStack, report: Callable[[str], None]
) -> None:
    """Large requests that wait for a slow disk are refused, not kept: memory stays bounded.

    Those refused come again, and in the end each has its answer.
    """
    rig.server.program = [SMALL]
    start_on_slow_disk(rig)
    before_mb = rss_mb(rig.server)
    rig.power.slow_down(700)
    with watched(rig.server) as seen:
        busy = BusyClients(rig.server, rig.recorder, 4, random.Random(0))
        large = LargeRequests(rig.server.address, n_clients=60, n_bytes=12 << 20)
        large.end()
        n_refused = busy.end() + large.n_refused
    peak_mb = max(seen.peak_mb)
    report(
        f"{large.n_answered} requests of 12 MiB answered, {n_refused} refused before; memory "
        f"{before_mb:.0f} to {peak_mb:.0f} MB; health p99 {seen.share_s(0.99) * 1e3:.0f} ms"
    )
    assert large.n_refused > 0
    assert large.n_answered == 60
    # Without a bound: 1,800 MB more.
    assert peak_mb < before_mb + 900
    rig.recorder.check()


@pytest.mark.parametrize("sync_ms", [300, 30_000])
def test_end_under_load(sync_ms: int, rig: Rig, seed: int, report: Callable[[str], None]) -> None:
    """SIGTERM under load, on a slow disk or one that hangs: gone within 5 s, nothing is lost."""
    start_on_slow_disk(rig)
    counts = terminate_under_load(rig, random.Random(seed), 100, sync_ms)
    report(f"seed {seed}: {counts['operations']} operations, ended in {counts['end_ms']} ms")


def test_replies_that_nobody_reads(
    rig: Rig, cleanup: ExitStack, report: Callable[[str], None]
) -> None:
    """Replies that nobody reads do not pile up; leases are renewed and small requests answered."""
    rig.server.program = [SMALL]
    rig.server.start()
    stub = LockTableStub(cleanup.enter_context(connect(rig.server.address)))
    Flood(rig.server.address, n_keys=8_000, name="page", key_bytes=1_000).end()
    before_mb = rss_mb(rig.server)
    request = pb.ListRequest()
    n_bytes = stub.List(request, timeout=20).ByteSize()
    peers = [RawPeer(rig.server.host, rig.server.port) for _ in range(4)]
    for _ in range(25):
        for peer in peers:
            peer.ask("List", request.SerializeToString())
    with watched(rig.server) as seen:
        refused(lambda: _until_refused(stub), grpc.StatusCode.RESOURCE_EXHAUSTED, "replies")
        kept = Kept(rig.server.address, 1, 10, "kept")
        until(lambda: kept.n_tries > 0 and len(seen.health_s) > 20)
        kept.complete()
        kept.close()
    report(
        f"100 replies of {n_bytes >> 10} KiB not read; memory {before_mb:.0f} to "
        f"{max(seen.peak_mb):.0f} MB; health p99 {seen.share_s(0.99) * 1e3:.0f} ms"
    )
    assert max(seen.peak_mb) < before_mb + 120
    for peer in peers:
        peer.close()
    until(lambda: _is_answered(stub))


def _until_refused(stub: LockTableStub) -> None:
    for _ in range(200):
        stub.List(pb.ListRequest(), timeout=20)


def _is_answered(stub: LockTableStub) -> bool:
    try:
        stub.List(pb.ListRequest(), timeout=20)
    except grpc.RpcError:
        return False
    return True


def test_thousands_of_silent_connections(
    server: ServerProcess, cleanup: ExitStack, report: Callable[[str], None]
) -> None:
    """3,000 connections that never speak, or break off in the greeting, keep nobody waiting.

    After 10 s the server closes them.
    """
    cleanup.enter_context(many_files(4_000))
    before_mb = rss_mb(server)
    silent = connect_silently(server.host, server.port, 3_000)
    for peer in silent:
        cleanup.callback(peer.close)
    connected_s = time.monotonic()
    with watched(server) as seen:
        until(lambda: len(seen.health_s) >= 40)
        until(lambda: all(is_closed(peer) for peer in silent[::50]), 60)
    closed_s = time.monotonic() - connected_s
    report(
        f"3,000 silent connections: health p50 {seen.share_s(0.5) * 1e3:.0f} ms, p99 "
        f"{seen.share_s(0.99) * 1e3:.0f} ms, memory {before_mb:.0f} to {max(seen.peak_mb):.0f} MB; "
        f"closed after {closed_s:.0f} s"
    )
    assert seen.share_s(0.9) < 0.25


def test_open_files_run_out(
    tmp_path: Path, cleanup: ExitStack, report: Callable[[str], None]
) -> None:
    """With few open files the server says so, and connections leave enough for the database."""
    cleanup.enter_context(many_files(2_000))
    server = ServerProcess(tmp_path / "server")
    cleanup.callback(server.close)
    server.command_prefix = ["sh", "-c", 'ulimit -n 256; exec "$@"', "sh"]
    server.start()
    assert "256 open files" in server.log
    flood = Flood(server.address, n_clients=2, n_rounds=10, n_keys=200, name="early")
    silent = connect_silently(server.host, server.port, 600)
    for peer in silent:
        cleanup.callback(peer.close)
    until(lambda: sum(not is_closed(peer) for peer in silent) < 256)
    n_open = sum(not is_closed(peer) for peer in silent)
    report(f"of 600 connections {n_open} were let in beside the clients")
    assert n_open > 0
    # Connected before the rest, they go on, and so does the database.
    flood.end()
    for peer in silent:
        peer.close()
    until(lambda: _can_connect(server))


def _can_connect(server: ServerProcess) -> bool:
    try:
        Flood(server.address, name=f"late-{time.time_ns()}").end()
    except Exception:  # noqa: BLE001 - it is tried again
        return False
    return True
