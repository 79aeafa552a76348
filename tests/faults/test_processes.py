"""Real processes that are stopped, cut off, deceived about the time, or forked."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from distlock_proto import lock_table_pb2 as pb
from distlock_proto.lock_table_pb2_grpc import LockTableStub
from tests.faults.processes import FakeTime, Network, PuppetProcess
from tests.faults.traffic import LONG_TTL_NS, Caller, Recorder
from tests.other_client import until
from tests.servers import ServerProcess, connect

KEY: Final = "key"
RAW: Final = b"key"
SHORT_S: Final = 0.4
DAY_S: Final = 86_400


class Other:
    """Another client, in this process."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub: Any = LockTableStub(channel)
        self.recorder = Recorder()
        self.caller = Caller(self.stub, self.recorder)
        self.held: tuple[bytes, bytes, int] = (b"", b"", 0)

    def claim(self, key: bytes = RAW) -> int:
        """Claim a key; give the token, 0: not granted."""
        granted = self.caller.claim([key], os.urandom(16), LONG_TTL_NS)
        if granted:
            self.held = granted[0]
        return granted[0][2] if granted else 0

    def await_expiry(self, key: bytes = RAW) -> None:
        """Wait until the server says that the lease ran out."""
        request = pb.WaitRequest(keys=[key], timeout_ns=10 * 10**9)
        reply = self.stub.Wait(request, timeout=20)
        assert list(reply.states) == [pb.KEY_STATE_EXPIRED]

    def state(self, key: bytes = RAW) -> int:
        """Look a key up."""
        return int(self.stub.Lookup(pb.LookupRequest(keys=[key]), timeout=20).states[0])


@pytest.fixture
def other(server: ServerProcess, cleanup: ExitStack) -> Other:
    """Give another client of the server."""
    return Other(cleanup.enter_context(connect(server.address)))


# -- pauses --------------------------------------------------------------------------------------


def test_stopped_holder_is_refused_after_another_was_granted(
    server: ServerProcess, other: Other, cleanup: ExitStack
) -> None:
    """A client stopped past its lease is refused once another holds the key, and knows it."""
    puppet = PuppetProcess(cleanup, server.address)
    token = puppet.ask("claim", KEY, SHORT_S, True)
    puppet.stop()
    other.await_expiry()
    assert other.claim() > token
    puppet.go_on()
    assert puppet.ask("held", KEY) is False
    assert puppet.ask("complete", KEY) == ["LOST", "BUSY"]
    assert other.caller.settle("complete", *other.held) == "COMPLETED"


def test_stopped_holder_is_refused_after_another_completed(
    server: ServerProcess, other: Other, cleanup: ExitStack
) -> None:
    """Of two runs of a key, one before and one after a pause, the second is the accepted one."""
    puppet = PuppetProcess(cleanup, server.address)
    assert puppet.ask("claim", KEY, SHORT_S, False)
    puppet.stop()
    other.await_expiry()
    other.claim()
    assert other.caller.settle("complete", *other.held) == "COMPLETED"
    puppet.go_on()
    assert puppet.ask("complete", KEY) == ["LOST", "DONE"]


def test_stopped_holder_completes_if_nobody_came(
    server: ServerProcess, other: Other, cleanup: ExitStack
) -> None:
    """A client stopped past its lease completes all the same as long as nobody was granted it."""
    puppet = PuppetProcess(cleanup, server.address)
    assert puppet.ask("claim", KEY, SHORT_S, False)
    puppet.stop()
    other.await_expiry()
    puppet.go_on()
    assert puppet.ask("complete", KEY) == ["COMPLETED", "UNSPECIFIED"]
    assert other.state() == pb.KEY_STATE_DONE


def test_stopped_server_grants_no_lease_twice(
    server: ServerProcess, other: Other, cleanup: ExitStack
) -> None:
    """While the server is stopped leases run out on both sides; then one run is accepted."""
    puppet = PuppetProcess(cleanup, server.address)
    token = puppet.ask("claim", KEY, SHORT_S, False)
    os.kill(server.pid, signal.SIGSTOP)
    until(lambda: puppet.ask("held", KEY) is False)
    os.kill(server.pid, signal.SIGCONT)
    other.await_expiry()
    assert other.claim() > token
    assert puppet.ask("complete", KEY) == ["LOST", "BUSY"]


# -- the network ---------------------------------------------------------------------------------


@pytest.fixture
def network(cleanup: ExitStack) -> Network:
    """Give a network whose packets can be lost."""
    return Network(cleanup)


@pytest.fixture
def remote(network: Network, tmp_path: Path, cleanup: ExitStack) -> ServerProcess:
    """Give a server that is reached from there."""
    server = ServerProcess(tmp_path / "server", f"--host={network.host}", "--insecure")
    server.host = network.host
    cleanup.callback(server.close)
    server.start()
    return server


@pytest.fixture
def near(remote: ServerProcess, cleanup: ExitStack) -> Other:
    """Give a client of that server that no packet is lost to."""
    return Other(cleanup.enter_context(connect(remote.address)))


def _far(cleanup: ExitStack, network: Network, server: ServerProcess) -> PuppetProcess:
    return PuppetProcess(cleanup, server.address, network.prefix)


@pytest.mark.needs_root
def test_partitioned_holder_gives_up_first(
    network: Network, remote: ServerProcess, near: Other, cleanup: ExitStack
) -> None:
    """A client that is cut off stops believing its lease before anybody else is granted it.

    When the partition heals its completion is refused.
    """
    puppet = _far(cleanup, network, remote)
    token = puppet.ask("claim", KEY, 1.0, True)
    network.lose("OUTPUT")
    near.await_expiry()
    assert puppet.ask("held", KEY) is False
    assert near.claim() > token
    network.heal()
    assert puppet.ask("complete", KEY) == ["LOST", "BUSY"]


@pytest.mark.needs_root
def test_lost_reply_of_a_claim(
    network: Network, remote: ServerProcess, near: Other, cleanup: ExitStack
) -> None:
    """A claim whose reply was lost is repeated, and learns that it holds the key."""
    puppet = _far(cleanup, network, remote)
    first = puppet.ask("claim", "first", 60.0, False)
    network.lose("INPUT", "-m", "length", "--length", "53:65535")
    puppet.tell("claim", KEY, 60.0, False)
    until(lambda: near.state() == pb.KEY_STATE_BUSY)
    network.heal()
    assert puppet.answer() == first + 1, "the repetition was granted anew"
    assert puppet.ask("complete", KEY) == ["COMPLETED", "UNSPECIFIED"]


@pytest.mark.needs_root
def test_lost_reply_of_a_completion(
    network: Network, remote: ServerProcess, near: Other, cleanup: ExitStack
) -> None:
    """A completion whose reply was lost is repeated and answered alike; it is accepted once."""
    puppet = _far(cleanup, network, remote)
    assert puppet.ask("claim", KEY, 60.0, False)
    network.lose("INPUT", "-m", "length", "--length", "53:65535")
    puppet.tell("complete", KEY)
    until(lambda: near.state() == pb.KEY_STATE_DONE)
    network.heal()
    assert puppet.answer() == ["COMPLETED", "UNSPECIFIED"]
    assert near.claim() == 0


@pytest.mark.needs_root
def test_lossy_network(
    network: Network, remote: ServerProcess, near: Other, cleanup: ExitStack
) -> None:
    """With a tenth of all packets lost each claim is granted once and each completion accepted."""
    puppet = _far(cleanup, network, remote)
    for chain in ("INPUT", "OUTPUT"):
        network.lose(chain, "-m", "statistic", "--mode", "random", "--probability", ".1")
    tokens = []
    for number in range(10):
        key = f"{KEY}-{number}"
        tokens.append(puppet.ask("claim", key, 60.0, True))
        assert puppet.ask("complete", key) == ["COMPLETED", "UNSPECIFIED"]
    assert tokens == list(range(1, 11))
    assert network.n_lost() > 0, "no packet was lost: the run is void"


# -- clocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_wall_clock_of_the_server_jumps(jump_s: int, tmp_path: Path, cleanup: ExitStack) -> None:
    """Wall time moves no lease: what runs goes on, what ran out is granted, over a restart too."""
    clock = FakeTime(tmp_path)
    server = ServerProcess(tmp_path / "server")
    server.environment = clock.environment
    cleanup.callback(server.close)
    server.start()
    other = Other(cleanup.enter_context(connect(server.address)))
    puppet = PuppetProcess(cleanup, server.address)
    assert puppet.ask("claim", "long", 600.0, True)
    token = puppet.ask("claim", KEY, SHORT_S, False)
    clock.jump(jump_s)
    assert abs(_wall_s(other) - time.time() - jump_s) < 60, "the clock did not jump: void"
    other.await_expiry()
    assert other.claim() > token
    assert other.claim(b"long") == 0
    server.restart()
    assert other.claim(b"long") == 0
    assert puppet.ask("complete", "long") == ["COMPLETED", "UNSPECIFIED"]


def _wall_s(other: Other) -> float:
    reply = other.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=20)
    return float(reply.wall_ns / 1e9)


def test_wall_clock_of_a_client_jumps(
    server: ServerProcess, other: Other, tmp_path: Path, cleanup: ExitStack
) -> None:
    """A client whose wall clock jumps keeps its lease alive beyond the ttl."""
    clock = FakeTime(tmp_path)
    puppet = PuppetProcess(cleanup, server.address, environment=clock.environment)
    assert puppet.ask("claim", KEY, SHORT_S, True)
    assert puppet.ask("claim", "measure", 2 * SHORT_S, False)
    clock.jump(-DAY_S)
    other.await_expiry(b"measure")
    assert puppet.ask("held", KEY) is True
    assert other.claim() == 0
    assert puppet.ask("complete", KEY) == ["COMPLETED", "UNSPECIFIED"]


# -- forks ---------------------------------------------------------------------------------------


def test_client_that_forks(server: ServerProcess, other: Other, cleanup: ExitStack) -> None:
    """The child of a holder cannot settle its parent's lease, and claims for itself.

    The parent's lease is kept alive meanwhile, and completed by the parent.
    """
    puppet = PuppetProcess(cleanup, server.address)
    token = puppet.ask("claim", KEY, 2.0, True)
    answer = puppet.ask("fork", KEY)
    assert isinstance(answer, str), answer
    said, child_token = answer.split()
    assert said == "NotHeldError"
    assert int(child_token) > token
    assert other.state() == pb.KEY_STATE_BUSY
    assert puppet.ask("complete", KEY) == ["COMPLETED", "UNSPECIFIED"]
