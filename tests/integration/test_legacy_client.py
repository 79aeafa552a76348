"""The client of 2021 against the server of 2021 and against ours."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from distlock_proto import legacy_pb2 as pb
from distlock_proto import lock_table_pb2
from distlock_proto.legacy_pb2_grpc import LockManagerServiceStub
from distlock_proto.lock_table_pb2_grpc import LockTableStub
from tests import legacy_2021
from tests.legacy_2021 import Running, acquire
from tests.servers import ServerProcess, connect

# -- the client of 2021 --------------------------------------------------------------------------

CLIENT: Final = '''
import json, sys, time
import run_once
from run_once import *

sent = []
send = run_once.release_lock_async

def release_lock_async(key, callback=None):
    """Keep the future: 2021 drops it, and gRPC may then cancel a release before it is sent."""
    sent.append(send(key, callback))
    return sent[-1]

run_once.release_lock_async = release_lock_async

def until(condition):
    end = time.time() + 20
    while not condition():
        assert time.time() < end
        time.sleep(0.01)

def released(prefix):
    """Releases of 2021 are sent without waiting for the answer."""
    until(lambda: not search_keys_by_prefix(prefix))

exec(sys.stdin.read())
print(json.dumps(main()))
'''


class Client:
    """Runs scripts with the client of 2021, each in a process of its own."""

    def __init__(self, python: Path, unpacked: Path, home: Path, running: Running) -> None:
        home.mkdir(parents=True, exist_ok=True)
        ini = f"[DEFAULT]\naddress = 127.0.0.1\nport = {running.port}\n"
        (home / ".run_once.ini").write_text(ini)
        self._command = [str(python), "-c", CLIENT]
        self._folder = unpacked  # what it is imported from must stand before any other run_once
        self._environment = {
            "HOME": str(home),
            "PATH": os.environ.get("PATH", ""),
        }

    def start(self, script: str) -> subprocess.Popen[str]:
        """Start a script that defines `main`."""
        process = subprocess.Popen(
            self._command,
            env=self._environment,
            cwd=self._folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        process.stdin.write(script)
        process.stdin.close()
        process.stdin = None
        return process

    def finish(self, process: subprocess.Popen[str]) -> Any:
        """Give what `main` returned."""
        try:
            out, log = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 0, log
        return json.loads(out.splitlines()[-1])

    def run(self, script: str) -> Any:
        """Run a script and give what its `main` returned."""
        return self.finish(self.start(script))


@pytest.fixture
def client(python_2021: Path, unpacked_2021: Path, tmp_path: Path, either: Running) -> Client:
    """Give the client of 2021, configured for each kind of server in turn."""
    return Client(python_2021, unpacked_2021, tmp_path / "home-2021", either)


def test_client_iterates(client: Client) -> None:
    """Two processes share a loop: together they get each key once, and count them as done."""
    script = """
def main():
    got = []
    for key in DistributedIterator(["k%03d" % i for i in range(200)], timeout=60, chunksize=7):
        got.append(key)
        notify_success(key)
    return got
"""
    processes = [client.start(script) for _ in range(2)]
    first, second = (client.finish(process) for process in processes)
    assert sorted(first + second) == [f"k{number:03d}" for number in range(200)]
    counts = client.run("def main(): return count_keys_by_prefix('k')")
    assert counts == {"expired": 0, "in_progress": 0, "success": 200}
    assert client.run(script) == []


def test_client_iterates_permanently_and_by_version(client: Client) -> None:
    """timeout=0 locks for ever at once; another version is another set of keys; ints are keys."""
    script = """
def main():
    keys = range(1, 31)
    return [
        list(DistributedIterator(keys)), list(DistributedIterator(keys)),
        list(DistributedIterator(keys, version=2)), count_keys_by_prefix(""),
    ]
"""
    first, again, versioned, counts = client.run(script)
    assert first == [str(number) for number in range(1, 31)]
    assert again == []
    assert versioned == [f"{number}_v002" for number in range(1, 31)]
    assert counts == {"expired": 0, "in_progress": 0, "success": 60}


def test_client_decorator(client: Client) -> None:
    """distributed_task gives its four statuses, and an error releases the key."""
    script = """
def main():
    calls = []
    inner = []

    @distributed_task("task", timeout=60)
    def work():
        calls.append(1)
        inner.append(distributed_task("task", timeout=60)(lambda: 1)()[0].name)
        if len(calls) == 1:
            raise RuntimeError("planned")
        return 42

    log.setLevel("CRITICAL")
    first = work()
    released("task")
    second = work()
    third = work()
    return [(status.name, value) for status, value in (first, second, third)], inner
"""
    outcomes, inner = client.run(script)
    assert outcomes == [["COMPUTE_ERROR", None], ["COMPUTE_OK", 42], ["SKIP_OK", None]]
    assert inner == ["SKIP_IN_PROGRESS", "SKIP_IN_PROGRESS"]


def test_client_notifies(client: Client) -> None:
    """notify_success twice raises ValueError; notify_failure gives the key to the next one."""
    script = """
def main():
    keys = ["a", "b"]
    got = list(DistributedIterator(keys, timeout=60))
    notify_success("a")
    try:
        notify_success("a")
        raised = False
    except ValueError:
        raised = True
    notify_success("a", assert_unique=False)
    notify_failure("b")
    released("b")
    return got, raised, list(DistributedIterator(keys, timeout=60))
"""
    assert client.run(script) == [["a", "b"], True, ["b"]]


def test_client_searches_and_counts(client: Client) -> None:
    """Search and count by prefix tell expired, running and done keys apart."""
    script = """
def main():
    for key, seconds in (("p-short", 0.02), ("p-long", 60), ("p-done", 0), ("q", 60)):
        try_lock(make_lock(key, seconds))
    until(lambda: count_keys_by_prefix("p-")["expired"] == 1)
    return [
        search_keys_by_prefix("p-"), search_keys_by_prefix("p-", is_expired=True),
        search_keys_by_prefix("p-", is_expired=False), count_keys_by_prefix("p-"),
        list(DistributedIterator(["p-short", "p-long", "p-done"], timeout=60)),
    ]
"""
    everything, expired, others, counts, acquired = client.run(script)
    assert everything == ["p-done", "p-long", "p-short"]
    assert expired == ["p-short"]
    assert others == ["p-done", "p-long"]
    assert counts == {"expired": 1, "in_progress": 1, "success": 1}
    assert acquired == ["p-short"]


def test_client_pages_through_long_lists(client: Client, either: Running) -> None:
    """A search whose answer is longer than a page finds every key once."""
    keys = [f"{number:05d}" + "x" * 1_000 for number in range(7_000)]
    with connect(either.address) as channel:
        stub = LockManagerServiceStub(channel)
        for half in (keys[::2], keys[1::2]):  # 2021 took 4 MiB at most
            requests = [acquire(key, 0) for key in half]
            stub.AcquireMany(pb.AcquireManyRequest(requests=requests), timeout=60)
        page = stub.ListLocks(pb.ListLocksRequest(), timeout=60)
        assert 2.5 * 2**20 < page.ByteSize() < 3.5 * 2**20
    found = client.run(
        "def main(): return [(key[:5], len(key)) for key in search_keys_by_prefix('0')]"
    )
    assert found == [[key[:5], len(key)] for key in keys]


# -- clients of both kinds on our server ---------------------------------------------------------


def test_both_kinds_see_each_others_locks(
    server: ServerProcess, python_2021: Path, unpacked_2021: Path, tmp_path: Path
) -> None:
    """What one kind of client holds or has done, the other sees so; failed keys are invisible."""
    old = Client(python_2021, unpacked_2021, tmp_path / "home-2021", server)
    script = """
def main():
    got = list(DistributedIterator(["old-held", "old-done"], timeout=60))
    notify_success("old-done")
    return got
"""
    assert old.run(script) == ["old-held", "old-done"]
    keys = [b"old-held", b"old-done", b"held", b"done", b"failed"]
    claim_id = os.urandom(16)
    with connect(server.address) as channel:
        stub = LockTableStub(channel)
        request = lock_table_pb2.ClaimRequest(keys=keys, claim_id=claim_id, ttl_ns=60 * 10**9)
        reply = stub.Claim(request, timeout=20)
        assert list(reply.states) == [
            lock_table_pb2.KEY_STATE_BUSY,
            lock_table_pb2.KEY_STATE_DONE,
            *[lock_table_pb2.KEY_STATE_GRANTED] * 3,
        ]
        holders = [
            lock_table_pb2.Holder(key=key, claim_id=claim_id, token=token)
            for key, token in zip(keys[2:], reply.tokens, strict=True)
        ]
        settlements = [
            lock_table_pb2.Settlement(holder=holders[1], complete=lock_table_pb2.Complete()),
            lock_table_pb2.Settlement(holder=holders[2], fail=lock_table_pb2.Fail(error="no")),
        ]
        stub.Settle(lock_table_pb2.SettleRequest(settlements=settlements), timeout=20)
    script = """
def main():
    before = search_keys_by_prefix(""), count_keys_by_prefix("")
    return before, list(DistributedIterator(["held", "done", "failed"], timeout=60))
"""
    (found, counts), acquired = old.run(script)
    assert found == ["done", "held", "old-done", "old-held"]
    assert counts == {"expired": 0, "in_progress": 2, "success": 2}
    assert acquired == ["failed"]


def test_a_database_of_2021_opens_as_it_is(
    server_2021: legacy_2021.Server2021, start_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    """Our server over a database of 2021 has its done keys, its locks, and in time its counts."""
    n_keys = 5_000
    with connect(server_2021.address) as channel:
        stub = LockManagerServiceStub(channel)
        requests = [acquire(f"d{number}", 0, data=b"D") for number in range(n_keys)]
        requests += [acquire("held", 3600 * 10**9), acquire("short", 1)]
        stub.AcquireMany(pb.AcquireManyRequest(requests=requests), timeout=60)
    server_2021.close()
    folder = tmp_path / "taken-over"
    folder.mkdir()
    server_2021.db.rename(folder / "db")
    server = start_server(folder=folder)
    with connect(server.address) as channel:
        table, legacy = LockTableStub(channel), LockManagerServiceStub(channel)
        request = lock_table_pb2.LookupRequest(keys=[b"d1", b"held", b"short", b"none"])
        assert list(table.Lookup(request, timeout=20).states) == [
            lock_table_pb2.KEY_STATE_DONE,
            lock_table_pb2.KEY_STATE_BUSY,
            lock_table_pb2.KEY_STATE_EXPIRED,
            lock_table_pb2.KEY_STATE_ABSENT,
        ]
        answer = legacy.AcquireLock(acquire("d1", 0, overwrite=True), timeout=20)
        assert answer.existing_lock.data == b"D"
        deadline_s = time.monotonic() + 30
        while not (counts := table.Count(lock_table_pb2.CountRequest(), timeout=20)).is_complete:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
    assert (counts.done, counts.held, counts.expired, counts.failed) == (n_keys, 1, 1, 0)
