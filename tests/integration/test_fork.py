"""fork() while leases are renewed and calls run: no child hangs, and none holds what is not its."""

from __future__ import annotations

import json
import subprocess
import sys

import grpc
import pytest

from distlock_proto import lock_table_pb2 as pb
from run_once.channel import GrpcTransport
from run_once.client import LockClient
from tests.servers import ServerProcess

PREAMBLE = """
import json, multiprocessing, os, sys, threading, time
from distlock_proto import lock_table_pb2 as pb
from run_once.config import load_config
from run_once.task import Session, run_task

config = load_config(address=sys.argv[1], lease_s=2)
session = Session.get(config)
(lease,) = session.claim([b"parent"], ttl_s=2).leases
"""

BUSY_PARENT = (
    PREAMBLE
    + """
n_calls = [0] * 3
stop = False

def call(number):
    while not stop:
        session.client.lookup([b"parent"])
        n_calls[number] += 1

def park():
    while not stop:
        session.client.wait([b"parent"], 20)

threads = [threading.Thread(target=call, args=(n,), daemon=True) for n in range(3)]
threads.append(threading.Thread(target=park, daemon=True))
for thread in threads:
    thread.start()

def work(number):
    assert not lease.held
    assert not lease.is_open
    assert session.keeper.leases() == []
    own = Session.get(config)
    assert own is not session
    assert own.keeper.step() is None
    key = b"child %d" % number
    assert run_task(own, key, lambda lease: lease.held, ttl_s=60).value is True
    assert run_task(own, b"parent", lambda lease: 1, ttl_s=60).state == pb.KEY_STATE_BUSY
    (left,) = own.claim([b"left by %d" % number], ttl_s=60).leases
    assert left.held

context = multiprocessing.get_context("fork")
slowest_s = 0.0
codes = []
for number in range(40):
    child = context.Process(target=work, args=(number,))
    before_s = time.monotonic()
    child.start()
    slowest_s = max(slowest_s, time.monotonic() - before_s)
    child.join(60)
    if child.exitcode is None:
        child.kill()
        child.join()
        codes.append("hung")
    else:
        codes.append(child.exitcode)
n_before = sum(n_calls)
end_s = time.monotonic() + 30
while sum(n_calls) < n_before + 10 and time.monotonic() < end_s:
    time.sleep(0.01)
is_alive_after = sum(n_calls) >= n_before + 10
held = lease.held
is_completed = session.complete(lease).state == pb.KEY_STATE_COMPLETED
stop = True
print(json.dumps([codes, slowest_s, n_before, is_alive_after, held, is_completed]))
"""
)

NORMAL_EXIT = (
    PREAMBLE
    + """
pid = os.fork()
if pid == 0:
    sys.exit(0)  # runs the exit handlers that the child has inherited
_, status = os.waitpid(pid, 0)
time.sleep(0.1)
state = session.client.lookup([b"parent"]).states[0]
print(json.dumps([status, state == pb.KEY_STATE_BUSY, lease.held]))
"""
)

SAME_CLIENT = (
    PREAMBLE
    + """
pid = os.fork()
if pid == 0:
    states = session.client.lookup([b"parent"]).states
    os._exit(0 if states == bytes([pb.KEY_STATE_BUSY]) else 1)
print(json.dumps([os.waitpid(pid, 0)[1], len(session.client.lookup([b"parent"]).states)]))
"""
)

FORK_BY_A_SIGNAL = (
    PREAMBLE
    + """
import signal
codes = []

def fork(*_):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    codes.append(os.waitpid(pid, 0)[1])
    arm()  # only now: on a slow machine a steady timer would nest the handlers without end

def arm():
    if not is_over:
        signal.setitimer(signal.ITIMER_REAL, 0.01)

is_over = False
signal.signal(signal.SIGALRM, fork)
arm()
before_s = time.monotonic()
while len(codes) < 20:
    session.client.lookup([b"parent"])
session.client.wait([b"parent"], 0.5)
is_over = True
signal.setitimer(signal.ITIMER_REAL, 0)
print(json.dumps([set(codes) == {0}, time.monotonic() - before_s]))
"""
)


def _run(script: str, server: ServerProcess) -> list[object]:
    """Run a script in a process of its own, since it forks; give what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", script, server.address],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, list)
    return found


def _state(server: ServerProcess, key: bytes) -> int:
    client = LockClient(GrpcTransport(server.address))
    try:
        return client.lookup([key]).states[0]
    finally:
        client.close()


@pytest.mark.skipif(
    tuple(int(part) for part in grpc.__version__.split(".")[:2]) < (1, 80),
    reason="gRPC before 1.80 may hang a forked child by itself; see docs/joblib.md",
)
def test_children_of_a_busy_parent(server: ServerProcess) -> None:
    """With renewals, calls and long polls under way no child hangs; the parent's lease goes on."""
    codes, slowest_s, n_calls, is_alive_after, held, is_completed = _run(BUSY_PARENT, server)
    assert codes == [0] * 40
    assert isinstance(slowest_s, float)
    assert slowest_s < 10, "a fork waits for short calls only"
    assert isinstance(n_calls, int)
    assert n_calls > 40, "too little happened for a finding"
    assert is_alive_after
    assert held
    assert is_completed
    assert _state(server, b"child 39") == pb.KEY_STATE_DONE


def test_normal_exit_of_a_child(server: ServerProcess) -> None:
    """A child that ends with its exit handlers releases nothing of its parent's."""
    assert _run(NORMAL_EXIT, server) == [0, True, True]
    assert _state(server, b"parent") == pb.KEY_STATE_ABSENT, "the parent released it at its end"


def test_inherited_client(server: ServerProcess) -> None:
    """A client that a child has inherited makes a channel of its own there."""
    assert _run(SAME_CLIENT, server) == [0, 1]


def test_fork_within_a_call(server: ServerProcess) -> None:
    """A signal handler that forks in the midst of a call does not wait for that call."""
    all_well, took_s = _run(FORK_BY_A_SIGNAL, server)
    assert all_well
    assert isinstance(took_s, float)
    assert took_s < 30
