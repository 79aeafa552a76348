"""Passes over one list spread out: each key once, no request for nothing, from front to back."""

from __future__ import annotations

import itertools
import random

import pytest
from google.protobuf.message import Message

from distlock_proto import lock_table_pb2 as pb
from run_once import asker
from run_once.channel import TransportError
from run_once.key_pass import KeyPass
from run_once.key_source import KeySource, key_maker
from run_once.live import LiveItem, registry
from run_once.pass_options import PassOptions
from tests.fake_server import FakeServer, FakeTransport, ReplyT, make_session

BLOCK = 50
NAMES = [f"k{number:03d}" for number in range(4 * BLOCK + 20)]
MS = 1_000_000


class Noting(FakeTransport):
    """A server of which some do not know of frontiers; what a claim came to is noted.

    Attributes:
        granted: How many keys each claim got, before which all keys were not gone.
    """

    knows_frontier = True

    def __init__(self, server: FakeServer) -> None:
        super().__init__(server)
        self.granted: list[int] = []

    def call(
        self, method: str, request: Message, reply_type: type[ReplyT], timeout_s: float
    ) -> ReplyT:
        """Send a request."""
        if method == "Frontier" and not self.knows_frontier:
            raise TransportError("UNIMPLEMENTED", "an older server")
        is_left = any(self.server.state_of(name.encode()) == pb.KEY_STATE_ABSENT for name in NAMES)
        reply = super().call(method, request, reply_type, timeout_s)
        if isinstance(reply, pb.ClaimReply) and is_left:
            self.granted.append(len(reply.tokens))
        if isinstance(reply, pb.ClaimReply) and not self.knows_frontier:
            reply.ClearField("next")
        return reply


class Worker:
    """A pass over the list, with short bodies.

    Attributes:
        running: The pass.
        done: What it handed out, in order.
    """

    def __init__(self, server: FakeServer, *, knows_frontier: bool = True) -> None:
        options = PassOptions(
            ttl_s=60.0,
            is_kept=True,
            is_for_good=False,
            is_explicit=True,
            chunksize=10,
            waits=False,
            max_attempts=0,
            max_ahead=12,
        )
        self.transport = Noting(server)
        self.transport.knows_frontier = knows_frontier
        source = KeySource(
            NAMES, key_maker(None, 0, ""), clock=server.clock, block_keys=BLOCK, min_block_keys=10
        )
        self.running = KeyPass(source, make_session(self.transport), options, server.clock)
        self.running.pace.note_body(MS)
        self.running.pace.note_request(50 * MS)
        self.done: list[str] = []

    def step(self) -> LiveItem[str] | None:
        """Do the next item; None: nothing is left."""
        live = self.running.claim_next()
        if live is not None:
            self.done.append(live.item)
            live.complete()
            registry().remove(live)
        return live


@pytest.fixture
def server() -> FakeServer:
    """Give a server."""
    return FakeServer()


def run_all(workers: list[Worker], rng: random.Random) -> None:
    """Let workers take turns until one has nothing left, and then the others."""
    left = list(workers)
    while left:
        worker = rng.choice(left)
        for _ in range(rng.randint(1, 30)):
            if worker.step() is None:
                left.remove(worker)
                break


@pytest.mark.parametrize("seed", range(8))
def test_each_key_once_and_no_request_for_nothing(server: FakeServer, seed: int) -> None:
    """While a key is free, whoever claims gets some; each goes to the end before it comes back."""
    workers = [Worker(server) for _ in range(3)]
    run_all(workers, random.Random(seed))
    assert sorted(name for worker in workers for name in worker.done) == NAMES
    for worker in workers:
        pairs = itertools.pairwise(worker.done)
        back = [place for place, (one, following) in enumerate(pairs) if following < one]
        assert all(worker.done[place] >= NAMES[-2 * BLOCK] for place in back[:1]), worker.done
    granted = [number for worker in workers for number in worker.transport.granted]
    # Who comes to the end looks at what was told to one that does not go on for a while.
    assert granted.count(0) <= len(workers), granted
    named = [
        len(request.keys) for _, request in server.requests if type(request) is pb.ClaimRequest
    ]
    assert sum(named) < 2 * len(NAMES)


def test_what_was_given_back_is_found(server: FakeServer) -> None:
    """A loop that is left gives back what it held; others come to it though they had passed it."""
    first, second = Worker(server), Worker(server)
    for _ in range(5):
        assert first.step()
    for _ in range(30):
        assert second.step()
    first.running.session.release(first.running.close())
    while second.step():
        pass
    assert sorted(first.done + second.done) == NAMES


def test_what_is_passed_is_bounded(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who passes over many blocks looks at the first before it reads on."""
    monkeypatch.setattr(asker, "_MAX_PASSED_BLOCKS", 1)
    monkeypatch.setattr(asker, "_SHARED_BLOCKS", 1)
    first, second = Worker(server), Worker(server)
    most = 0
    for _ in range(20):
        for worker in (first, second):
            for _ in range(5):
                worker.step()
                worker.running.step_ahead()  # so that it never runs dry
            most = max(most, len(worker.running._asker._todo.passed))
    while first.step() or second.step():
        pass
    assert sorted(first.done + second.done) == NAMES
    assert 1 <= most <= 3  # one more, and what was read by then


def test_a_later_run_begins_at_the_front(server: FakeServer) -> None:
    """What an earlier run left open is asked for in order once nobody works on the list."""
    first = Worker(server)
    while first.step():
        pass
    for name in NAMES[30:40]:
        server.records.pop(name.encode())
    server.clock.advance(6)
    again = Worker(server)
    assert again.step()
    assert again.done == ["k030"]


def test_a_server_without_frontiers(server: FakeServer) -> None:
    """With an older server loops do as they did: every key, with some requests for nothing."""
    workers = [Worker(server, knows_frontier=False) for _ in range(2)]
    run_all(workers, random.Random(1))
    assert sorted(name for worker in workers for name in worker.done) == NAMES
    asked = [method for method in server.methods() if method == "Frontier"]
    assert asked == []
