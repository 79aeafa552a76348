"""Passes over one list spread out: each key once, no request for nothing, from front to back."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
from google.protobuf.message import Message

from distlock_proto import lock_table_pb2 as pb
from run_once import asker
from run_once.channel import TransportError
from run_once.key_pass import KeyPass
from run_once.key_source import KeySource, key_maker
from run_once.live import LiveItem, registry
from run_once.pass_options import PassOptions
from run_once.todo import Piece
from tests.fake_server import FakeServer, FakeTransport, ReplyT, make_session

BLOCK = 50
NAMES = [f"k{number:03d}" for number in range(4 * BLOCK + 20)]
MS = 1_000_000


class Noting(FakeTransport):
    """A server of which some do not know of frontiers; what a claim came to is noted.

    Attributes:
        granted: How many keys each claim got, before which all keys were not gone.
        named: Every key that was asked for.
    """

    knows_frontier = True

    def __init__(self, server: FakeServer) -> None:
        super().__init__(server)
        self.granted: list[int] = []
        self.named: list[str] = []

    def call(
        self, method: str, request: Message, reply_type: type[ReplyT], timeout_s: float
    ) -> ReplyT:
        """Send a request."""
        if method == "Frontier" and not self.knows_frontier:
            raise TransportError("UNIMPLEMENTED", "an older server")
        if isinstance(request, pb.ClaimRequest):
            self.named += [key.decode() for key in request.keys]
        is_left = any(self.server.state_of(name.encode()) == pb.KEY_STATE_ABSENT for name in NAMES)
        reply = super().call(method, request, reply_type, timeout_s)
        if isinstance(reply, pb.ClaimReply) and is_left:
            self.granted.append(len(reply.tokens))
        if isinstance(reply, pb.ClaimReply) and not self.knows_frontier:
            reply.ClearField("next")
        return reply


class Pass(KeyPass[str]):
    """A pass that waits for nobody.

    Attributes:
        others: Called instead; is told for how long.
    """

    others: Callable[[float], object] = staticmethod(lambda _pause_s: None)

    def _await_others(self, pause_s: float) -> None:
        self.others(pause_s)


class Worker:
    """A pass over the list, with short bodies.

    Attributes:
        running: The pass.
        done: What it handed out, in order.
    """

    def __init__(
        self,
        server: FakeServer,
        *,
        knows_frontier: bool = True,
        items: Iterable[str] = NAMES,
        has_quick_keys: bool = True,
    ) -> None:
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
            items,
            key_maker(None, 0, ""),
            clock=server.clock,
            has_quick_keys=has_quick_keys,
            block_keys=BLOCK,
            min_block_keys=10,
        )
        self.running = Pass(source, make_session(self.transport), options, server.clock)
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


KINDS: dict[str, Callable[[FakeServer], Worker]] = {
    "list": Worker,
    "generator": lambda server: Worker(server, items=iter(NAMES)),
    "key=": lambda server: Worker(server, has_quick_keys=False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_each_key_once_and_no_request_for_nothing(server: FakeServer, seed: int, kind: str) -> None:
    """While a key is free, whoever claims gets some; each goes to the end before it comes back."""
    workers = [KINDS[kind](server) for _ in range(3)]
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


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_told_other_places(server: FakeServer, kind: str) -> None:
    """Behind what was read before bodies were known, no two ask for the same keys."""
    workers = [KINDS[kind](server) for _ in range(2)]
    for _ in range(15):
        for worker in workers:
            for _ in range(5):
                assert worker.step()
    first, second = (set(worker.transport.named) for worker in workers)
    assert not (first & second) - set(NAMES[:10])
    assert all(len(named) > BLOCK for named in (first, second))


class Timed:
    """A generator of the keys, each of which takes a while.

    Attributes:
        n_given: So many it has given.
    """

    def __init__(self, server: FakeServer, item_s: float) -> None:
        self.n_given = 0
        self._server = server
        self._item_s = item_s

    def __iter__(self) -> Iterator[str]:
        for name in NAMES:
            self._server.clock.advance(self._item_s)
            self.n_given += 1
            yield name


def asks_for_places(server: FakeServer) -> bool:
    """Tell whether anybody asked the server for places of blocks."""
    return any(
        isinstance(request, pb.FrontierRequest)
        or (isinstance(request, pb.ClaimRequest) and request.HasField("frontier"))
        for _, request in server.requests
    )


def sizes_read(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how much is read at a time."""
    source = worker.running._source
    sizes: list[int] = []

    def read(size: int, prompt_size: int) -> Piece[str]:
        piece = KeySource.read(source, size, prompt_size)
        sizes.append(len(piece.keys))
        return piece

    monkeypatch.setattr(source, "read", read)
    return sizes


def test_a_block_is_read_in_pieces(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a block takes more than a moment, and no more than a few, others share it as well."""
    items = Timed(server, 0.003)
    worker = Worker(server, items=items)
    sizes = sizes_read(worker, monkeypatch)
    while worker.step():
        assert items.n_given % BLOCK == 0 or items.n_given == len(NAMES)
    assert worker.done == NAMES
    assert max(sizes) == 17  # 50 ms
    assert asks_for_places(server)


def test_keys_are_made_in_pieces(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a `key=` hold an item up for longer than a moment at a time."""
    worker = Worker(server, has_quick_keys=False)
    sizes = sizes_read(worker, monkeypatch)

    def make_keys(items: Sequence[str]) -> list[bytes]:
        server.clock.advance(0.003 * len(items))
        return [item.encode() for item in items]

    monkeypatch.setattr(worker.running._source, "_make_keys", make_keys)
    while worker.step():
        pass
    assert worker.done == NAMES
    assert max(sizes) == 17
    assert asks_for_places(server)


def test_a_slow_generator_is_not_read_ahead(server: FakeServer) -> None:
    """What takes its time is handed out as it comes, and no block is waited for."""
    items = Timed(server, 0.010)
    worker = Worker(server, items=items)
    while worker.step():
        assert items.n_given <= len(worker.done) + 15
    assert worker.done == NAMES
    assert not asks_for_places(server)


def test_others_get_the_time_to_ask_for_what_they_were_told(server: FakeServer) -> None:
    """At the end of the list, once: then what they did not ask for is free for all."""
    first, second = Worker(server), Worker(server)
    for _ in range(20):
        assert first.step()
        assert second.step()
    pauses: list[float] = []

    def others(pause_s: float) -> None:
        assert pause_s == second.running.pace.patience_ns() / 1e9
        pauses.append(pause_s)
        assert second.done[-1] == NAMES[-1]

    second.running.others = others
    while len(second.done) + len(first.done) + len(first.running._ready) < len(NAMES):
        assert second.step()
    assert len(pauses) == 1
    held = [item for item, _ in first.running._ready]
    assert sorted(first.done + held + second.done) == NAMES


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


@pytest.mark.parametrize(
    ("kind", "bound"), [("list", "_MAX_PASSED_BLOCKS"), ("generator", "_MAX_KEPT_BLOCKS")]
)
def test_what_is_passed_is_bounded(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, kind: str, bound: str
) -> None:
    """Who passes over many blocks looks at the first before it reads on."""
    monkeypatch.setattr(asker, bound, 1)
    monkeypatch.setattr(asker, "_SHARED_BLOCKS", 1)
    first, second = KINDS[kind](server), KINDS[kind](server)
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
