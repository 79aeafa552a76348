"""The `distlock` process: starting, refusing to start, ending, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from distlock_proto import legacy_pb2
from distlock_proto import lock_table_pb2 as pb
from distlock_proto.legacy_pb2_grpc import LockManagerServiceStub
from distlock_proto.lock_table_pb2_grpc import LockTableStub
from tests.network import Network
from tests.servers import ServerProcess, await_health, connect

Start = Callable[..., ServerProcess]

EXIT_LIMIT_S: Final = 5.0
TTL_NS: Final = 60 * 10**9


def run_distlock(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "distlock_server", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def assert_refusal(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Check for a non-zero exit and one sentence with these words."""
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("distlock: ")]
    assert len(lines) == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for word in words:
        assert word in lines[0]


# -- starting ------------------------------------------------------------------------------------


def test_says_where_it_listens(server: ServerProcess) -> None:
    """One log line says where it listens, and both services and health answer there."""
    assert server.log.count(f"Server listening on 127.0.0.1:{server.port}") == 1
    with connect(server.address) as channel:
        LockTableStub(channel).GetServerInfo(pb.GetServerInfoRequest(), timeout=10)
        LockManagerServiceStub(channel).CountLocks(legacy_pb2.CountLocksRequest(), timeout=10)
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "distlock.v1.LockTable", "distlock.LockManagerService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_the_services(server: ServerProcess) -> None:
    """Reflection names both services."""
    with connect(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answers: Any = stub.ServerReflectionInfo(iter([request]), timeout=10)
        names = {service.name for service in next(answers).list_services_response.service}
    assert {"distlock.v1.LockTable", "distlock.LockManagerService"} <= names


def test_second_server_on_a_database(server: ServerProcess) -> None:
    """A second server on the same database says that it is in use; the first goes on."""
    assert_refusal(run_distlock(f"--db={server.db}", "--port=0"), "in use", str(server.db))
    await_health(server.address)


def test_port_in_use(server: ServerProcess, tmp_path: Path) -> None:
    """A port in use is one sentence that names it, and the first server keeps it."""
    done = run_distlock("--db", str(tmp_path / "other"), "--port", str(server.port))
    assert_refusal(done, f"127.0.0.1:{server.port}", "in use")
    await_health(server.address)


def test_host_that_is_not_ours(tmp_path: Path) -> None:
    """An address of another machine is one sentence."""
    done = run_distlock(f"--db={tmp_path / 'db'}", "--host=192.0.2.1", "--port=0", "--insecure")
    assert done.returncode == 1
    assert "distlock: cannot listen on 192.0.2.1:0" in done.stderr
    assert "Traceback" not in done.stderr


def test_unusable_folders(tmp_path: Path) -> None:
    """A file as database, and a folder below a file, are one sentence each."""
    (tmp_path / "file").write_text("not a database")
    assert_refusal(run_distlock(f"--db={tmp_path / 'file'}", "--port=0"), "file")
    assert_refusal(run_distlock(f"--db={tmp_path / 'file' / 'db'}", "--port=0"), "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(tmp_path: Path) -> None:
    """A folder that cannot be written to is one sentence."""
    folder = tmp_path / "fixed"
    folder.mkdir(mode=0o500)
    assert_refusal(run_distlock(f"--db={folder}", "--port=0"), str(folder))


def test_read_only_file_system() -> None:
    """A folder where not even root may write is one sentence."""
    assert_refusal(run_distlock("--db=/proc/distlock-test", "--port=0"), "/proc/distlock-test")


def test_database_of_another_kind(start_server: Start) -> None:
    """A folder of another engine is refused by name; with `auto` it is opened as what it is."""
    server = start_server("--engine=rocksdb")
    assert server.terminate() == 0
    assert_refusal(
        run_distlock(f"--db={server.db}", "--port=0", "--engine=leveldb"), "RocksDB", "LevelDB"
    )
    again = start_server()
    with connect(again.address) as channel:
        info = LockTableStub(channel).GetServerInfo(pb.GetServerInfoRequest(), timeout=10)
    assert info.engine == "rocksdb"


@pytest.mark.needs_root
def test_other_interfaces_are_warned_about(
    network: Network, tmp_path: Path, cleanup: ExitStack
) -> None:
    """With --insecure, listening for other machines warns once that there is no authentication."""
    server = ServerProcess(tmp_path / "server", "--host=0.0.0.0", "--insecure")
    server.command_prefix, server.host = network.prefix, network.guest
    cleanup.callback(server.close)
    server.start()
    assert server.log.count("no authentication") == 1
    assert "Server listening on 0.0.0.0:" in server.log


def test_unix_socket(start_server: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a unix socket without --port there is no TCP port, and only the user may connect."""
    runtime = Path(os.environ["RUN_ONCE_RUNTIME_DIR"])
    path = runtime / "d.sock"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "distlock_server",
            f"--db={tmp_path / 'db'}",
            f"--unix_socket={path}",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        await_health(f"unix:{path}")
        assert path.stat().st_mode & 0o077 == 0
        assert_refusal(
            run_distlock(f"--db={tmp_path / 'db2'}", f"--unix_socket={path}"), str(path), "another"
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
        process.terminate()
        _, log = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0
    assert f"Server listening on unix:{path}\n" in log
    assert not path.exists()


def test_socket_of_a_killed_server_is_taken_over(tmp_path: Path, start_server: Start) -> None:
    """What a killed server left at the path of its socket does not stop the next one."""
    path = Path(os.environ["RUN_ONCE_RUNTIME_DIR"]) / "d.sock"
    server = start_server(f"--unix_socket={path}")
    server.restart()
    await_health(f"unix:{path}")
    await_health(server.address)


def test_pid_and_port_files(start_server: Start, tmp_path: Path) -> None:
    """The pid and port files hold what they say, and go with the server."""
    pid_file = tmp_path / "pid"
    server = start_server(f"--pid-file={pid_file}")
    assert int(pid_file.read_text()) == server.pid
    assert server.terminate() == 0
    assert not pid_file.exists()
    assert not (server.folder / "port").exists()


# -- ending --------------------------------------------------------------------------------------


class Load:
    """Writers, readers and parked waits on a server, until it is gone."""

    def __init__(self, address: str, n_writers: int = 6, n_waits: int = 50) -> None:
        self.n_done = 0
        self.waits: list[Any] = []
        self._address = address
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._write, args=(number,), daemon=True)
            for number in range(n_writers)
        ]
        self._channel = connect(address)
        stub = LockTableStub(self._channel)
        stub.Claim(pb.ClaimRequest(keys=[b"held"], claim_id=os.urandom(16), ttl_ns=3600 * 10**9))
        wait = pb.WaitRequest(keys=[b"held"], timeout_ns=60 * 10**9)
        self.waits = [stub.Wait.future(wait, timeout=60) for _ in range(n_waits)]
        for thread in self._threads:
            thread.start()

    def _write(self, number: int) -> None:
        count = 0
        with connect(self._address) as channel:
            stub = LockTableStub(channel)
            while not self._stop.is_set():
                keys = [b"%d-%d-%d" % (number, count, place) for place in range(500)]
                count += 1
                request = pb.ClaimRequest(keys=keys, claim_id=os.urandom(16), ttl_ns=TTL_NS)
                try:
                    stub.Claim(request, timeout=20)
                except grpc.RpcError:
                    return
                self.n_done += 1

    def close(self) -> None:
        """Stop the writers."""
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        self._channel.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ends_in_time_under_load(
    server: ServerProcess, cleanup: Any, number: signal.Signals, report: Callable[[str], None]
) -> None:
    """Under load a signal ends it with status 0 within 5 s, and parked waits are answered."""
    load = Load(server.address)
    cleanup.callback(load.close)
    deadline_s = time.monotonic() + 30
    while load.n_done < 10 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert load.n_done >= 10, "there was no load"
    started_s = time.monotonic()
    os.kill(server.pid, number)
    assert server.wait() == 0
    took_s = time.monotonic() - started_s
    report(f"{number.name} under load: ended after {took_s:.2f} s, {load.n_done} requests done")
    assert took_s < EXIT_LIMIT_S
    # All end with the server; gRPC now and then resets some connection before its answers are read.
    n_answered = sum(_ended_with_answer(wait) for wait in load.waits)
    report(f"{n_answered} of {len(load.waits)} parked waits were answered")
    assert n_answered >= len(load.waits) / 2


def _ended_with_answer(wait: Any) -> bool:
    code = wait.code()
    assert code in (
        grpc.StatusCode.OK,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
    )
    return code is grpc.StatusCode.OK


def test_clean_end_keeps_expired_leases_expired(start_server: Start) -> None:
    """A lease that ran out before a clean end does not run again after the restart; others do."""
    server = start_server()
    ids = [os.urandom(16), os.urandom(16)]
    with connect(server.address) as channel:
        stub = LockTableStub(channel)
        stub.Claim(pb.ClaimRequest(keys=[b"short"], claim_id=ids[0], ttl_ns=10**6), timeout=10)
        stub.Claim(pb.ClaimRequest(keys=[b"long"], claim_id=ids[1], ttl_ns=TTL_NS), timeout=10)
        expired = pb.WaitRequest(keys=[b"short"], timeout_ns=10 * 10**9)
        assert list(stub.Wait(expired, timeout=20).states) == [pb.KEY_STATE_EXPIRED]
    assert server.terminate() == 0
    server.start()
    with connect(server.address) as channel:
        reply = LockTableStub(channel).Lookup(
            pb.LookupRequest(keys=[b"short", b"long"]), timeout=10
        )
    assert list(reply.states) == [pb.KEY_STATE_EXPIRED, pb.KEY_STATE_BUSY]


def test_idle_exit(start_server: Start) -> None:
    """With --idle_exit_s it ends by itself with status 0, but not while a lease runs."""
    server = start_server("--idle_exit_s=0.5")
    with connect(server.address) as channel:
        stub = LockTableStub(channel)
        claim_id = os.urandom(16)
        token = stub.Claim(
            pb.ClaimRequest(keys=[b"a"], claim_id=claim_id, ttl_ns=TTL_NS), timeout=10
        ).tokens[0]
        with pytest.raises(subprocess.TimeoutExpired):
            server.wait(1.5)
        holder = pb.Holder(key=b"a", claim_id=claim_id, token=token)
        settlement = pb.Settlement(holder=holder, complete=pb.Complete())
        stub.Settle(pb.SettleRequest(settlements=[settlement]), timeout=10)
    assert server.wait(20) == 0
    assert "nobody uses the server" in server.log


def test_storage_failure_ends_the_process(tmp_path: Path) -> None:
    """When the disk refuses a write, the caller is told, and the process ends with status 1."""
    script = tmp_path / "broken.py"
    script.write_text(_BROKEN_ENGINE)
    port_file = tmp_path / "port"
    process = subprocess.Popen(
        [
            sys.executable,
            str(script),
            f"--db={tmp_path / 'db'}",
            "--port=0",
            f"--port_file={port_file}",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline_s = time.monotonic() + 30
        while not port_file.exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        with connect(f"127.0.0.1:{port_file.read_text().strip()}") as channel:
            stub = LockTableStub(channel)
            stub.Claim(pb.ClaimRequest(keys=[b"a"], claim_id=os.urandom(16), ttl_ns=1), timeout=10)
            with pytest.raises(grpc.RpcError) as caught:
                stub.Claim(
                    pb.ClaimRequest(keys=[b"break"], claim_id=os.urandom(16), ttl_ns=1), timeout=10
                )
        _, log = process.communicate(timeout=20)
    finally:
        process.kill()
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "may or may not be stored" in error.details()
    assert process.returncode == 1
    assert "distlock: the storage failed, and the server must end: " in log


_BROKEN_ENGINE = """
from distlock_server import cli
from distlock_server.engines.base import EngineError
from distlock_server.engines.keyvalue import KeyValueEngine

commit = KeyValueEngine.commit

def failing(self, swaps, meta):
    if any(b"break" in swap.keys for swap in swaps):
        raise EngineError("planted I/O error")
    return commit(self, swaps, meta)

KeyValueEngine.commit = failing
cli.main()
"""
