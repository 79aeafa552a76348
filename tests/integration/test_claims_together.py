"""Many threads of one process that claim and settle at the same time, at a real server."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from distlock_proto import lock_table_pb2 as pb
from run_once.channel import GrpcTransport
from run_once.client import LockClient
from run_once.config import Config
from run_once.keys import stored_key
from run_once.lease import Lease
from run_once.task import Session
from tests.servers import ServerProcess

N_THREADS = 50
N_KEYS = 200

FORKING = """
import os, sys, threading
from run_once.config import Config
from run_once.task import Session
config = Config(address=sys.argv[1], owner="parent")
session = Session.get(config)
is_over = False

def claim_on(name):
    number = 0
    while not is_over:
        key = b"%s-%d" % (name, number)
        (lease,) = session.claim([key], ttl_s=60).leases
        session.complete(lease)
        number += 1

threads = [threading.Thread(target=claim_on, args=(b"thread %d" % n,)) for n in range(10)]
for thread in threads:
    thread.start()
codes = []
for number in range(10):
    child = os.fork()
    if child == 0:
        leases = session.client.claim([b"child %d" % number], ttl_s=60).grants
        os._exit(0 if len(leases) == 1 else 1)
    codes.append(os.waitpid(child, 0)[1])
is_over = True
for thread in threads:
    thread.join()
print(codes == [0] * 10)
"""


@pytest.fixture
def session(server: ServerProcess, cleanup: ExitStack) -> Session:
    """Give a session with a server process."""
    made = Session(LockClient(GrpcTransport(server.address)))
    cleanup.callback(made.close)
    return made


def test_each_key_is_granted_to_one_thread(session: Session) -> None:
    """Threads claim the same keys, each in its own order: every key has one holder, once."""
    granted: list[Lease] = []
    states: Counter[int] = Counter()
    barrier = threading.Barrier(N_THREADS)

    def claim(number: int) -> None:
        barrier.wait()
        for place in range(N_KEYS):
            key = b"key %d" % ((place + number * 7) % N_KEYS)
            claimed = session.claim([key], ttl_s=600, keep_alive=False)
            states[claimed.states[0]] += 1
            granted.extend(claimed.leases)

    with ThreadPoolExecutor(N_THREADS) as threads:
        list(threads.map(claim, range(N_THREADS)))
    assert len(granted) == N_KEYS
    assert len({lease.key for lease in granted}) == N_KEYS
    assert len({lease.token for lease in granted}) == N_KEYS
    assert states.keys() == {pb.KEY_STATE_GRANTED, pb.KEY_STATE_BUSY}
    answers = session.complete_all(granted)
    assert {answer.state for answer in answers} == {pb.KEY_STATE_COMPLETED}


def test_threads_claim_and_settle_their_own_keys(session: Session) -> None:
    """All is granted and accepted, in far fewer requests than there are calls."""
    transport = session.client.transport
    calls: Counter[str] = Counter()
    real = transport.call

    def count(method: str, *args: object) -> object:
        calls[method] += 1
        return real(method, *args)  # type: ignore[arg-type]

    transport.call = count  # type: ignore[method-assign,assignment]

    def work(number: int) -> set[int]:
        ended = set()
        for place in range(20):
            (lease,) = session.claim([b"%d of %d" % (place, number)], ttl_s=600).leases
            ended.add(session.complete(lease).state)
        return ended

    with ThreadPoolExecutor(N_THREADS) as threads:
        states = set().union(*threads.map(work, range(N_THREADS)))
    assert states == {pb.KEY_STATE_COMPLETED}
    assert session.client.count(prefix=b"").done == N_THREADS * 20
    assert calls["Claim"] + calls["Settle"] < N_THREADS * 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forks_while_threads_claim(server: ServerProcess) -> None:
    """Neither a child nor its parent hangs, whatever was under way or in line."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKING, server.address],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


def test_threads_of_one_process_share_a_session(server: ServerProcess) -> None:
    """Whoever asks for the same server has the same client, or its claims could not travel."""
    config = Config(address=server.address)
    with ThreadPoolExecutor(10) as threads:
        sessions = list(threads.map(lambda _: Session.get(config), range(100)))
    assert len(set(map(id, sessions))) == 1
    key = stored_key("a", namespace="shared")
    assert sessions[0].claim([key], ttl_s=60).leases
