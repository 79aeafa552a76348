"""Real processes that are stopped, cut off, deceived about the time, or forked: what must hold.

Each function of `SCENARIOS` is one fault from beginning to end, with lengths that are drawn, and
says in its docstring what must hold. `test_processes.py` tries each, `make soak` again and again.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import grpc

from distlock_proto import lock_table_pb2 as pb
from distlock_proto.lock_table_pb2_grpc import LockTableStub
from tests.faults.processes import FakeTime, PuppetProcess
from tests.faults.traffic import LONG_TTL_NS, Caller, Recorder
from tests.network import Network
from tests.other_client import until
from tests.servers import ServerProcess, connect

KEY: Final = "key"
RAW: Final = b"key"
DAY_S: Final = 86_400
REPLIES: Final = ("-m", "length", "--length", "53:65535")
"""Packets that carry more than an acknowledgement."""


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

    def wall_s(self) -> float:
        """Ask the server for the time of day."""
        reply = self.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=20)
        return float(reply.wall_ns / 1e9)


class Pair(NamedTuple):
    """A server and two clients of it.

    Attributes:
        puppet: A process; what goes wrong happens to it.
        other: In this process, and always well.
    """

    server: ServerProcess
    puppet: PuppetProcess
    other: Other


def _pair(folder: Path, cleanup: ExitStack) -> Pair:
    server = _started(ServerProcess(folder / "server"), cleanup)
    return Pair(server, PuppetProcess(cleanup, server.address), _other(server, cleanup))


def _parted(folder: Path, cleanup: ExitStack) -> tuple[Network, Pair]:
    """Give the same with a network between the server and the puppet."""
    network = Network(cleanup)
    server = ServerProcess(folder / "server", f"--host={network.host}", "--insecure")
    server.host = network.host
    _started(server, cleanup)
    puppet = PuppetProcess(cleanup, server.address, network.prefix)
    return network, Pair(server, puppet, _other(server, cleanup))


def _started(server: ServerProcess, cleanup: ExitStack) -> ServerProcess:
    cleanup.callback(server.close)
    server.start()
    return server


def _other(server: ServerProcess, cleanup: ExitStack) -> Other:
    return Other(cleanup.enter_context(connect(server.address)))


def _short_s(rng: random.Random) -> float:
    return rng.uniform(0.3, 0.8)


# -- pauses --------------------------------------------------------------------------------------


def pause_then_another_was_granted(folder: Path, cleanup: ExitStack, rng: random.Random) -> None:
    """A client stopped past its lease is refused once another holds the key, and knows it."""
    _, puppet, other = _pair(folder, cleanup)
    token = puppet.ask("claim", KEY, _short_s(rng), True)
    puppet.stop()
    other.await_expiry()
    assert other.claim() > token
    puppet.go_on()
    assert puppet.ask("held", KEY) is False
    assert puppet.ask("complete", KEY) == ["LOST", "BUSY"]
    assert other.caller.settle("complete", *other.held) == "COMPLETED"


def pause_then_another_completed(folder: Path, cleanup: ExitStack, rng: random.Random) -> None:
    """Of two runs of a key, one before and one after a pause, the second is the accepted one."""
    _, puppet, other = _pair(folder, cleanup)
    assert puppet.ask("claim", KEY, _short_s(rng), rng.random() < 0.5)
    puppet.stop()
    other.await_expiry()
    other.claim()
    assert other.caller.settle("complete", *other.held) == "COMPLETED"
    puppet.go_on()
    assert puppet.ask("complete", KEY) == ["LOST", "DONE"]


def pause_and_nobody_came(folder: Path, cleanup: ExitStack, rng: random.Random) -> None:
    """A client stopped past its lease completes all the same as long as nobody was granted it."""
    _, puppet, other = _pair(folder, cleanup)
    assert puppet.ask("claim", KEY, _short_s(rng), False)
    puppet.stop()
    other.await_expiry()
    puppet.go_on()
    assert puppet.ask("complete", KEY) == ["COMPLETED", "UNSPECIFIED"]
    assert other.state() == pb.KEY_STATE_DONE


def pause_of_the_server(folder: Path, cleanup: ExitStack, rng: random.Random) -> None:
    """While the server is stopped leases run out on both sides; then one run is accepted."""
    server, puppet, other = _pair(folder, cleanup)
    token = puppet.ask("claim", KEY, _short_s(rng), False)
    os.kill(server.pid, signal.SIGSTOP)
    until(lambda: puppet.ask("held", KEY) is False)
    os.kill(server.pid, signal.SIGCONT)
    other.await_expiry()
    assert other.claim() > token
    assert puppet.ask("complete", KEY) == ["LOST", "BUSY"]


# -- the network ---------------------------------------------------------------------------------


def partition(folder: Path, cleanup: ExitStack, rng: random.Random) -> None:
    """A client that is cut off stops believing its lease before anybody else is granted it.

    When the partition heals its completion is refused.
    """
    network, (_, puppet, other) = _parted(folder, cleanup)
    token = puppet.ask("claim", KEY, rng.uniform(0.8, 1.5), True)
    network.lose(rng.choice(["INPUT", "OUTPUT"]))
    other.await_expiry()
    assert puppet.ask("held", KEY) is False
    assert other.claim() > token
    network.heal()
    assert puppet.ask("complete", KEY) == ["LOST", "BUSY"]


def lost_reply_of_a_claim(folder: Path, cleanup: ExitStack, rng: random.Random) -> None:
    """A claim whose reply was lost is repeated, and learns that it holds the key."""
    network, (_, puppet, other) = _parted(folder, cleanup)
    first = puppet.ask("claim", "first", 60.0, False)
    network.lose("INPUT", *REPLIES)
    puppet.tell("claim", KEY, 60.0, False)
    until(lambda: other.state() == pb.KEY_STATE_BUSY)
    network.heal()
    assert puppet.answer() == first + 1, "the repetition was granted anew"
    assert puppet.ask("complete", KEY) == ["COMPLETED", "UNSPECIFIED"]


def lost_reply_of_a_completion(folder: Path, cleanup: ExitStack, rng: random.Random) -> None:
    """A completion whose reply was lost is repeated and answered alike; it is accepted once."""
    network, (_, puppet, other) = _parted(folder, cleanup)
    assert puppet.ask("claim", KEY, 60.0, False)
    network.lose("INPUT", *REPLIES)
    puppet.tell("complete", KEY)
    until(lambda: other.state() == pb.KEY_STATE_DONE)
    network.heal()
    assert puppet.answer() == ["COMPLETED", "UNSPECIFIED"]
    assert other.claim() == 0


def lossy_network(folder: Path, cleanup: ExitStack, rng: random.Random) -> None:
    """With many packets lost each claim is granted once and each completion accepted."""
    network, (_, puppet, _) = _parted(folder, cleanup)
    probability = f"{rng.uniform(0.08, 0.12):.3f}"
    for chain in ("INPUT", "OUTPUT"):
        network.lose(chain, "-m", "statistic", "--mode", "random", "--probability", probability)
    tokens = []
    for number in range(10):
        key = f"{KEY}-{number}"
        tokens.append(puppet.ask("claim", key, 60.0, True))
        assert puppet.ask("complete", key) == ["COMPLETED", "UNSPECIFIED"]
    assert tokens == list(range(1, 11))
    assert network.n_lost() > 0, "no packet was lost: the run is void"


# -- clocks --------------------------------------------------------------------------------------


def wall_clock_of_the_server(
    folder: Path, cleanup: ExitStack, rng: random.Random, *, direction: int
) -> None:
    """Wall time moves no lease: what runs goes on, what ran out is granted, over a restart too."""
    clock = FakeTime(folder)
    server = ServerProcess(folder / "server")
    server.environment = clock.environment
    _started(server, cleanup)
    other, puppet = _other(server, cleanup), PuppetProcess(cleanup, server.address)
    assert puppet.ask("claim", "long", 600.0, True)
    token = puppet.ask("claim", KEY, _short_s(rng), False)
    jump_s = direction * rng.randint(DAY_S, 30 * DAY_S)
    clock.jump(jump_s)
    assert abs(other.wall_s() - time.time() - jump_s) < 60, "the clock did not jump: void"
    other.await_expiry()
    assert other.claim() > token
    assert other.claim(b"long") == 0
    server.restart()
    assert other.claim(b"long") == 0
    assert puppet.ask("complete", "long") == ["COMPLETED", "UNSPECIFIED"]


def wall_clock_of_a_client(folder: Path, cleanup: ExitStack, rng: random.Random) -> None:
    """A client whose wall clock jumps keeps its lease alive beyond the ttl."""
    server = _started(ServerProcess(folder / "server"), cleanup)
    other, clock = _other(server, cleanup), FakeTime(folder)
    puppet = PuppetProcess(cleanup, server.address, environment=clock.environment)
    ttl_s = _short_s(rng)
    assert puppet.ask("claim", KEY, ttl_s, True)
    assert puppet.ask("claim", "measure", 2 * ttl_s, False)
    clock.jump(rng.choice([-1, 1]) * DAY_S)
    other.await_expiry(b"measure")
    assert puppet.ask("held", KEY) is True
    assert other.claim() == 0
    assert puppet.ask("complete", KEY) == ["COMPLETED", "UNSPECIFIED"]


# -- forks ---------------------------------------------------------------------------------------


def fork_of_a_holder(folder: Path, cleanup: ExitStack, rng: random.Random) -> None:
    """The child of a holder cannot settle its parent's lease, and claims for itself.

    The parent's lease is kept alive meanwhile, and completed by the parent.
    """
    _, puppet, other = _pair(folder, cleanup)
    token = puppet.ask("claim", KEY, rng.uniform(2.0, 3.0), True)
    answer = puppet.ask("fork", KEY)
    assert isinstance(answer, str), answer
    said, child_token = answer.split()
    assert said == "NotHeldError"
    assert int(child_token) > token
    assert other.state() == pb.KEY_STATE_BUSY
    assert puppet.ask("complete", KEY) == ["COMPLETED", "UNSPECIFIED"]


Scenario: TypeAlias = Callable[[Path, ExitStack, random.Random], None]

PARTITIONS: Final[dict[str, Scenario]] = {
    "partition": partition,
    "lost reply of a claim": lost_reply_of_a_claim,
    "lost reply of a completion": lost_reply_of_a_completion,
    "lossy network": lossy_network,
}
"""Those that need root."""

SCENARIOS: Final[dict[str, Scenario]] = {
    "pause, then another was granted": pause_then_another_was_granted,
    "pause, then another completed": pause_then_another_completed,
    "pause, and nobody came": pause_and_nobody_came,
    "pause of the server": pause_of_the_server,
    **PARTITIONS,
    "wall clock of the server, on": partial(wall_clock_of_the_server, direction=1),
    "wall clock of the server, back": partial(wall_clock_of_the_server, direction=-1),
    "wall clock of a client": wall_clock_of_a_client,
    "fork of a holder": fork_of_a_holder,
}
